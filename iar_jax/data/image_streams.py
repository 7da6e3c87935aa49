"""Images that are read in order, a few at a time: of a data set, of a folder, or made from others."""

import hashlib
from collections.abc import Callable, Iterator
from typing import Protocol, runtime_checkable

import grain
import numpy as np
from etils import epath

from iar_jax.data.folder_images import passed_over
from iar_jax.data.image_source import ImageSource
from iar_jax.data.pictures import SUFFIXES, Unreadable, is_lossy, read_image
from iar_jax.runtime.artifacts import sha256_of
from iar_jax.runtime.errors import UserError


@runtime_checkable
class ImageStream(Protocol):
    """An array uint8 [N, H, W, 3] that need not be in memory; `batches` gives rows first, first + 1, ... in arrays of
    `size`, the last one shorter."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def batches(self, size: int, first: int = 0) -> Iterator[np.ndarray]: ...


class SourceStream:
    """The images of a split, decoded on threads."""

    def __init__(self, source: ImageSource):
        self.source = source
        self.shape = (len(source), *source[0]["image"].shape)

    def batches(self, size: int, first: int = 0) -> Iterator[np.ndarray]:
        return decoded(lambda index: self.source[index]["image"], self.shape[0], size, first)


class MappedStream:
    """What a function makes of other rows, batch by batch, in the same shape."""

    def __init__(self, images: ImageStream, function: Callable[[np.ndarray], np.ndarray]):
        self.images, self.function, self.shape = images, function, images.shape

    def batches(self, size: int, first: int = 0) -> Iterator[np.ndarray]:
        return map(self.function, self.images.batches(size, first))


class FolderStream:
    """The pictures in a folder, in the order of their names; all of one size.

    Raises:
        UserError: no such folder, no picture in it, one that cannot be read, or one of another size than the first.
    """

    def __init__(self, directory: epath.Path):
        if not directory.is_dir():
            raise UserError(f"{directory} is not a folder of pictures")
        named = (path for path in directory.iterdir() if path.suffix.lower() in SUFFIXES and not passed_over(path.name))
        self.paths = sorted(path for path in named if not path.is_dir())
        if not self.paths:
            raise UserError(f"{directory}: no picture in it ({', '.join(SUFFIXES)})")
        self.shape = (len(self.paths), *self.pixels(0).shape)

    def batches(self, size: int, first: int = 0) -> Iterator[np.ndarray]:
        def same_size(index):
            found = self.pixels(index)
            if found.shape != self.shape[1:]:
                raise UserError(
                    f"{self.paths[index]} is {found.shape[1]} x {found.shape[0]}, and {self.paths[0].name} "
                    f"{self.shape[2]} x {self.shape[1]}; images that are scored together have one size"
                )
            return found

        return decoded(same_size, self.shape[0], size, first)

    def pixels(self, index: int) -> np.ndarray:
        try:
            return np.asarray(read_image(str(self.paths[index])))
        except Unreadable as error:
            raise UserError(f"{self.paths[index]} cannot be read ({error})") from error

    def lossy(self) -> bool:
        """Whether a file is stored with losses, which change features: by content, whatever its name."""
        return any(is_lossy(path) for path in self.paths)

    def sha256(self) -> str:
        """Of names and contents."""
        digest = hashlib.sha256()
        for path in self.paths:
            digest.update(f"{path.name} {sha256_of(path)}\n".encode())
        return digest.hexdigest()


def decoded(image: Callable[[int], np.ndarray], count: int, size: int, first: int) -> Iterator[np.ndarray]:
    """image(first), image(first + 1), ... in batches, made on threads ahead of their use."""
    if first >= count:
        return iter(())
    batches = grain.MapDataset.source(range(first, count)).map(image).batch(size)
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=4, prefetch_buffer_size=4)))
