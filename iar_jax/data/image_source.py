"""What a source of labelled images is."""

import dataclasses
import functools
import threading
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from iar_jax.data.pictures import Unreadable, decoded
from iar_jax.data.preprocessing import center_crop
from iar_jax.runtime.errors import UserError
from iar_jax.runtime.progress import say


@runtime_checkable
class ImageSource(Protocol):
    """Random access to one split.

    `source[i]` is {"image": uint8 [R, R, 3], "label", "image_id"}; `source.example(i)` the whole upright RGB image
    that it was cut from, with its label; `source.labels` and `source.image_ids` are int [N].
    """

    @property
    def labels(self) -> np.ndarray: ...

    @property
    def image_ids(self) -> np.ndarray: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict: ...

    def example(self, index: int) -> tuple[Image.Image, int]: ...


def centred(source: ImageSource, index: int, resolution: int) -> dict:
    """`source[index]` of a source whose images are decoded when asked for: the centre square of the example, brought to
    `resolution` pixels."""
    image, label = source.example(index)
    return {
        "image": center_crop(image, resolution),
        "label": np.int32(label),
        "image_id": np.int64(source.image_ids[index]),
    }


class Unreadables:
    """Pictures of a source that turn out unreadable when they are asked for: named, and at most so many. Threads share
    it."""

    def __init__(self, at_most: int):
        self.at_most, self.found, self.guard = at_most, set[str](), threading.Lock()

    def note(self, problem: str) -> None:
        """Counts one, once; `problem` says which it is and what is wrong.

        Raises:
            UserError: it is one more than may be.
        """
        with self.guard:
            if problem in self.found:
                return
            self.found.add(problem)
            if len(self.found) > self.at_most:
                raise UserError(f"{problem}; config.data.max_unreadable allows {self.at_most} such pictures")
            say(f"{problem}; the picture before it takes its place")

    def example(
        self, index: int, count: int, content: Callable[[int], tuple[bytes | None, int, str]]
    ) -> tuple[Image.Image, int]:
        """The picture and label of an index, or of the nearest one before it that can be read.

        Args:
            count: of the source's pictures; before the first comes the last.
            content: gives the encoded picture of an index, its label, and where it lies.
        """
        for step in range(count):
            encoded, label, where = content((index - step) % count)
            problem = f"{where} has no image; only its path was stored"
            if encoded is not None:
                try:
                    return decoded(encoded), label
                except Unreadable as error:
                    problem = f"{where} is not an image ({error})"
            self.note(problem)
        raise UserError(f"{problem}, and neither is any other of the source")


@dataclasses.dataclass(frozen=True)
class Subset:
    """Some images of a source."""

    source: ImageSource
    indices: np.ndarray

    @functools.cached_property
    def labels(self) -> np.ndarray:
        return self.source.labels[self.indices]

    @functools.cached_property
    def image_ids(self) -> np.ndarray:
        return self.source.image_ids[self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict:
        return self.source[int(self.indices[index])]

    def example(self, index: int) -> tuple[Image.Image, int]:
        return self.source.example(int(self.indices[index]))


@dataclasses.dataclass(frozen=True)
class ArraySource:
    """Images held in memory; ids are their places."""

    images: UInt8[np.ndarray, "N R R 3"]
    labels: np.ndarray

    @functools.cached_property
    def image_ids(self) -> np.ndarray:
        return np.arange(len(self.labels))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict:
        return {"image": self.images[index], "label": np.int32(self.labels[index]), "image_id": np.int64(index)}

    def example(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]), int(self.labels[index])


@dataclasses.dataclass(frozen=True)
class Opened:
    """What an opener of sources finds.

    Attributes:
        train: images to train on; also those to validate with, where `val` is None.
        val: images of a split that the source has for that.
        class_names: names in the order of the labels.
        fingerprint: of the images, their labels, and of the bytes that say which images are held out.
        unreadable: files that were left out.
    """

    train: ImageSource
    val: ImageSource | None
    class_names: tuple[str, ...]
    fingerprint: Callable[[bytes], str]
    unreadable: tuple[str, ...] = ()
