"""Labelled images by the name of their source, with a fixed split into train and val."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from iar_jax.data.folder_images import open_folder
from iar_jax.data.image_source import ImageSource, Opened, Subset
from iar_jax.data.mnist import open_mnist5k
from iar_jax.data.parquet_images import open_parquet
from iar_jax.data.pictures import read_image as read_image
from iar_jax.data.tfds_images import open_tfds
from iar_jax.runtime.errors import UserError
from iar_jax.runtime.section import Section


class Source(NamedTuple):
    """A source of images: how it is written in a config, and what opens it, given what is behind the colon and
    config.data."""

    usage: str
    open: Callable[[str, Section], Opened]


# config.data.source: NAME, or NAME:ARGUMENT.
SOURCES: dict[str, Source] = {
    "mnist5k": Source("mnist5k", open_mnist5k),
    "folder": Source("folder:PATH", open_folder),
    "tfds": Source("tfds:NAME", open_tfds),
    "parquet": Source("parquet:PATH", open_parquet),
}


@dataclasses.dataclass(frozen=True)
class ImageDataset:
    """A labelled data set with a fixed split.

    Attributes:
        name: what the config called it.
        train, val: the splits; an element is {"image": uint8 [R, R, 3], "label": int, "image_id": int}. Ids count
            through the whole data set, so that no id is in both.
        class_names: names in the order of the labels.
        fingerprint: changes when the pictures, their labels or the split change.
        unreadable: files that were left out.
    """

    name: str
    train: ImageSource
    val: ImageSource
    class_names: tuple[str, ...]
    fingerprint: str
    unreadable: tuple[str, ...] = ()


def open_images(section: Section) -> ImageDataset:
    """Opens the data set that config.data describes; the same one when it is asked for again.

    Raises:
        UserError: a source that is not known or cannot be trained on.
    """
    name = section["source"].partition(":")[0]
    if name not in SOURCES:
        allowed = ", ".join(repr(source.usage) for source in SOURCES.values())
        raise UserError(f"config.data.source is {section['source']!r}; allowed are {allowed}")
    return _opened(tuple(sorted(section.items())))


@functools.cache
def _opened(items: tuple[tuple[str, Any], ...]) -> ImageDataset:
    section = dict(items)
    name, _, argument = section["source"].partition(":")
    found = SOURCES[name].open(argument, section)
    train, val, held_out = found.train, found.val, b""
    if val is None:
        check_counts(found.train.labels, found.class_names, section["source"])
        of_train, of_val = split_by_class(found.train.labels, section["val_fraction"])
        train, val, held_out = Subset(found.train, of_train), Subset(found.train, of_val), of_val.tobytes()
    return ImageDataset(section["source"], train, val, found.class_names, found.fingerprint(held_out), found.unreadable)


def check_counts(labels: np.ndarray, class_names: tuple[str, ...], where: str) -> None:
    """Raises UserError for a class with one image, which cannot be both trained on and validated with."""
    counts = np.bincount(labels, minlength=len(class_names))
    for name, count in zip(class_names, counts, strict=True):
        if count == 1:
            raise UserError(
                f"{where}: class {name!r} has 1 readable image; each class needs two, one to train on and one to "
                "validate with"
            )


def split_by_class(labels: np.ndarray, val_fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Indices of train and val: the same share of every class, at least one picture in each split."""
    rng = np.random.default_rng(0)
    train, val = [], []
    for label in range(int(labels.max()) + 1):
        members = rng.permutation(np.flatnonzero(labels == label))
        num_val = min(max(1, round(len(members) * val_fraction)), len(members) - 1)
        val.append(members[:num_val])
        train.append(members[num_val:])
    return np.sort(np.concatenate(train)), np.sort(np.concatenate(val))
