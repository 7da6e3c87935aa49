"""A long array that is made piece by piece: parts on disk, joined into one .npz at the end, never all in memory."""

import contextlib
import hashlib
import io
import itertools
import time
import zipfile
from collections.abc import Iterator
from typing import Any

import numpy as np
from etils import epath

from iar_jax.runtime import artifacts, files
from iar_jax.runtime.errors import UserError, brief

# Of all archives: the same rows are the same file.
DATE = (1980, 1, 1, 0, 0, 0)


class ArrayParts:
    """Rows 0 .. done of an array [num_rows, ...], in a directory of files that are whole or not there.

    Each is a .npy with the SHA-256 of its rows behind it: a damaged one, and those after it, are made again.
    """

    def __init__(self, directory: epath.Path):
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self.starts = self._found(remove=True)

    @classmethod
    def made_elsewhere(cls, directory: epath.Path, num_rows: int) -> "ArrayParts":
        """All rows, which another process has written just now; waits for those that a network file system does not
        show yet.

        Raises:
            UserError: they never came.
        """
        parts = cls.__new__(cls)
        parts.directory = directory
        for _ in range(artifacts.SEEN_AFTER_SECONDS):
            parts.starts = parts._found(remove=False)
            if parts.done == num_rows:
                return parts
            time.sleep(1.0)
        raise UserError(f"{directory}: the first process wrote {num_rows} rows, and {parts.done} are seen here")

    def _found(self, remove: bool) -> list[int]:
        starts = [0]
        while (path := self._path(starts[-1])).exists():
            rows = self._read(path)
            if rows is None:
                if remove:
                    path.unlink()
                break
            starts.append(starts[-1] + len(rows))
        return starts

    @property
    def done(self) -> int:
        """Rows that are there."""
        return self.starts[-1]

    def append(self, rows: np.ndarray) -> None:
        """Writes the next rows."""
        files.write_bytes(self._path(self.done), npy_bytes(rows) + digest_of(rows))
        self.starts.append(self.done + len(rows))

    def take(self, indices: np.ndarray) -> np.ndarray:
        """The rows at `indices`, in their order."""
        found: dict[int, np.ndarray] = {}
        for start, stop in itertools.pairwise(self.starts):
            wanted = [int(index) for index in indices if start <= index < stop]
            if wanted:
                rows = self._rows(start)
                found |= {index: rows[index - start].copy() for index in wanted}
        return np.stack([found[int(index)] for index in indices])

    def batches(self) -> Iterator[np.ndarray]:
        """The parts in their order."""
        for start in self.starts[:-1]:
            yield self._rows(start)

    def save_npz(self, path: epath.Path) -> str:
        """Writes all rows as `arr_0` of an uncompressed .npz, whole or not at all; returns the SHA-256 of the rows."""
        digest = hashlib.sha256()
        row = self.take(np.array([0]))[0]
        header = {
            "descr": np.lib.format.dtype_to_descr(row.dtype),
            "fortran_order": False,
            "shape": (self.done, *row.shape),
        }
        name = zipfile.ZipInfo("arr_0.npy", DATE)
        with (
            files.writing(path) as local,
            zipfile.ZipFile(local, "w") as archive,
            archive.open(name, "w", force_zip64=True) as member,
        ):
            np.lib.format.write_array_header_1_0(member, header)
            for part in self.batches():
                rows = np.ascontiguousarray(part).data
                member.write(rows)
                digest.update(rows)
        return digest.hexdigest()

    def clear(self) -> None:
        """Begins anew."""
        self.remove()
        self.directory.mkdir(parents=True)
        self.starts = [0]

    def remove(self) -> None:
        self.directory.rmtree()

    def _path(self, start: int) -> epath.Path:
        return self.directory / f"from-{start:08d}.npy"

    def _rows(self, start: int) -> np.ndarray:
        rows = self._read(self._path(start))
        if rows is None:
            raise UserError(f"{self._path(start)} was damaged while its stage ran; run the same command again")
        return rows

    def _read(self, path: epath.Path) -> np.ndarray | None:
        try:
            with path.open("rb") as file:
                rows = np.load(file, allow_pickle=False)
                return rows if file.read() == digest_of(rows) else None
        except (OSError, ValueError, EOFError):
            return None


def digest_of(rows: np.ndarray) -> bytes:
    """SHA-256 of an array's kind and content."""
    digest = hashlib.sha256(f"{rows.shape} {rows.dtype}".encode())
    digest.update(np.ascontiguousarray(rows).data)
    return digest.digest()


def array_names(path: epath.Path) -> set[str]:
    """Names of the arrays of a .npz file; raises UserError where it is none."""
    with refused(path, ""), path.open("rb") as file, zipfile.ZipFile(file) as archive:
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


class RowReader:
    """The rows of an array in a .npz or .npy file, in order, a few at a time: the file is never whole in memory.

    Attributes:
        shape, dtype: of the whole array.

    Raises:
        UserError: not there, damaged, no such array, or one that holds Python objects.
    """

    def __init__(self, path: epath.Path, name: str = "arr_0"):
        self.path, self.name = path, name
        with refused(path, name), self._open() as file:
            self.shape, self.dtype = self._header(file)

    def batches(self, size: int, first: int = 0) -> Iterator[np.ndarray]:
        """Rows first, first + 1, ... in arrays of `size`; the last one may be shorter."""
        row_bytes = int(np.prod(self.shape[1:])) * self.dtype.itemsize
        with refused(self.path, self.name), self._open() as file:
            self._header(file)
            skip(file, first * row_bytes)
            for start in range(first, self.shape[0], size):
                count = min(size, self.shape[0] - start)
                content = file.read(count * row_bytes)
                if len(content) != count * row_bytes:
                    raise ValueError(f"it ends in row {start + len(content) // row_bytes} of {self.shape[0]}")
                yield np.frombuffer(content, self.dtype).reshape(count, *self.shape[1:])

    @contextlib.contextmanager
    def _open(self) -> Iterator[Any]:
        if self.path.suffix == ".npy":
            with self.path.open("rb") as file:
                yield file
            return
        with self.path.open("rb") as file, zipfile.ZipFile(file) as archive, archive.open(f"{self.name}.npy") as member:
            yield member

    def _header(self, file: Any) -> tuple[tuple[int, ...], np.dtype]:
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, fortran_order, dtype = read(file)
        if dtype.hasobject or fortran_order:
            raise ValueError("it holds Python objects, or is not in C order")
        return shape, dtype


def skip(file: Any, num_bytes: int) -> None:
    """Reads on; a member of an archive may be compressed, where there is no other way."""
    while num_bytes > 0:
        read = len(file.read(min(num_bytes, 1 << 24)))
        if not read:
            raise ValueError("it is shorter than its header says")
        num_bytes -= read


@contextlib.contextmanager
def refused(path: epath.Path, name: str) -> Iterator[None]:
    """Turns what a missing or damaged file raises into a UserError."""
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(f"{path} is not there") from error
    except KeyError as error:
        raise UserError(f"{path} has no array {name!r}") from error
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read as arrays ({brief(error)})") from error


def read_array(path: epath.Path, name: str = "arr_0") -> np.ndarray:
    """An array of a .npz file (by its name) or of a .npy file.

    Raises:
        UserError: not there, damaged, or one that holds Python objects, which are never loaded.
    """
    with refused(path, name), path.open("rb") as file:
        found = np.load(file, allow_pickle=False)
        return found[name] if isinstance(found, np.lib.npyio.NpzFile) else found
