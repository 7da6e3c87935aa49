"""Arrays in .npz and .npy files, told by their first bytes: rows a few at a time, or an array as a whole.

Python objects are never loaded. A header is believed as far as the file has as many bytes as it speaks of, and no
array of more than MOST_BYTES is read as a whole.
"""

import contextlib
import io
import math
import zipfile
from collections.abc import Iterator
from typing import Any

import numpy as np
from etils import epath

from iar_jax.runtime import files
from iar_jax.runtime.errors import UserError, brief

# Of all archives: the same rows are the same file.
DATE = (1980, 1, 1, 0, 0, 0)

# Of arrays that are read as a whole. Images in C order are read a few rows at a time and may be of any size.
MOST_BYTES = 1 << 30

# Deflate makes of a byte 1032 at most.
MOST_DEFLATED = 1032


class RowReader:
    """The rows of an array in a .npz or .npy file, in order, a few at a time: the file is never whole in memory, unless
    the array is in Fortran's order.

    Attributes:
        shape, dtype: of the whole array.

    Raises:
        UserError: not there, damaged, no such array, or one that holds Python objects.
    """

    def __init__(self, path: epath.Path, name: str = "arr_0"):
        self.path, self.name = path, name
        with opened(path, name) as (file, size):
            self.shape, self.dtype, self.fortran_order = header(file, size)

    def batches(self, size: int, first: int = 0) -> Iterator[np.ndarray]:
        """Rows first, first + 1, ... in arrays of `size`; the last one may be shorter."""
        if self.fortran_order:
            whole = read_array(self.path, self.name)
            for start in range(first, self.shape[0], size):
                yield np.ascontiguousarray(whole[start : start + size])
            return
        row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        with opened(self.path, self.name) as (file, num_bytes):
            header(file, num_bytes)
            skip(file, first * row_bytes)
            for start in range(first, self.shape[0], size):
                count = min(size, self.shape[0] - start)
                content = file.read(count * row_bytes)
                if len(content) != count * row_bytes:
                    raise ValueError(f"it ends in row {start + len(content) // max(row_bytes, 1)} of {self.shape[0]}")
                yield np.frombuffer(content, self.dtype).reshape(count, *self.shape[1:])


def read_array(path: epath.Path, name: str = "arr_0") -> np.ndarray:
    """An array of a .npz file (by its name) or of a .npy file.

    Raises:
        UserError: not there, damaged, larger than MOST_BYTES, or one that holds Python objects.
    """
    with opened(path, name) as (file, size):
        shape, dtype, fortran_order = header(file, size)
        num_bytes = math.prod(shape) * dtype.itemsize
        if num_bytes > MOST_BYTES:
            order = " in Fortran's order; save it with np.ascontiguousarray" if fortran_order else ""
            raise ValueError(f"{name} has {num_bytes:,} bytes, and at most {MOST_BYTES:,} are read as a whole{order}")
        content = file.read(num_bytes)
        if len(content) != num_bytes:
            raise ValueError("it is shorter than its header says")
        flat = np.frombuffer(content, dtype)
        return flat.reshape(shape[::-1]).T if fortran_order else flat.reshape(shape)


def array_names(path: epath.Path) -> set[str]:
    """Names of the arrays of a .npz file; the one array of a .npy file is called arr_0.

    Raises:
        UserError: it is neither.
    """
    with refused(path), path.open("rb") as file:
        if not is_archive(file):
            return {"arr_0"}
        with zipfile.ZipFile(file) as archive:
            return {name.removesuffix(".npy") for name in archive.namelist()}


def write_npz(path: epath.Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes arrays by name, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.writing(path) as local, zipfile.ZipFile(local, "w") as archive:
        for name, array in arrays.items():
            archive.writestr(zipfile.ZipInfo(f"{name}.npy", DATE), npy_bytes(array))


def npy_bytes(array: np.ndarray) -> bytes:
    """An array as np.save writes it."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


@contextlib.contextmanager
def opened(path: epath.Path, name: str) -> Iterator[tuple[Any, int]]:
    """An array's .npy file or member of an archive, and its bytes."""
    with refused(path), path.open("rb") as file:
        if not is_archive(file):
            yield file, path.stat().length
            return
        with zipfile.ZipFile(file) as archive:
            found = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            if name not in found:
                there = ", ".join(sorted(found)[:10]) or "none"
                raise UserError(f"{path} has no array {name!r}; it has: {there}")
            info = found[name]
            check_member(info, path.stat().length)
            with archive.open(info) as member:
                yield member, info.file_size


def check_member(info: zipfile.ZipInfo, archive_size: int) -> None:
    """Raises ValueError where a member cannot have as many bytes as the archive says, or is packed in another way than
    numpy's."""
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{info.filename} is packed by method {info.compress_type}; numpy stores or deflates")
    most = info.compress_size * (MOST_DEFLATED if info.compress_type == zipfile.ZIP_DEFLATED else 1)
    if info.header_offset + info.compress_size > archive_size or info.file_size > most:
        raise ValueError(f"{info.filename} says that it has {info.file_size:,} bytes, more than there can be")


def is_archive(file: Any) -> bool:
    """Whether a file is a .npz, or else a .npy; raises ValueError where it is neither."""
    head = file.read(512)
    file.seek(0)
    if head.startswith(b"PK"):
        return True
    if head.startswith(b"\x93NUMPY"):
        return False
    raise ValueError(f"it {files.leftover(head) or 'is neither a .npz nor a .npy file'}")


def header(file: Any, size: int) -> tuple[tuple[int, ...], np.dtype, bool]:
    """Shape, dtype, and whether the order is Fortran's.

    Args:
        size: bytes of the file, with the header.

    Raises:
        ValueError: it holds Python objects, or speaks of other bytes than there are.
    """
    version = np.lib.format.read_magic(file)
    # The third version differs in how names of fields are written, which images and statistics have none of.
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran_order, dtype = read(file)
    if dtype.hasobject or dtype.names is not None or not dtype.itemsize:
        raise ValueError(f"it holds {dtype}, not numbers")
    if min(shape, default=0) < 0 or file.tell() + math.prod(shape) * dtype.itemsize > size:
        raise ValueError(f"its header says {dtype} {list(shape)}, more than the file holds")
    return shape, dtype, fortran_order


def skip(file: Any, num_bytes: int) -> None:
    """Reads on; a member of an archive may be compressed, where there is no other way."""
    while num_bytes > 0:
        read = len(file.read(min(num_bytes, 1 << 24)))
        if not read:
            raise ValueError("it is shorter than its header says")
        num_bytes -= read


@contextlib.contextmanager
def refused(path: epath.Path) -> Iterator[None]:
    """Turns what a missing or damaged file raises into a UserError."""
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(f"{path} is not there") from error
    except UserError:
        raise
    except Exception as error:  # zipfile, zlib, numpy and Python's tokenizer of headers raise many kinds
        raise UserError(f"{path} cannot be read as arrays ({brief(error)})") from error
