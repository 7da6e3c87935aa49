"""A long array that is made piece by piece: parts on disk, joined into one .npz at the end, never all in memory."""

import hashlib
import itertools
import time
import zipfile
from collections.abc import Iterator

import numpy as np
from etils import epath

from iar_jax.data.array_files import DATE, npy_bytes
from iar_jax.runtime import artifacts, files
from iar_jax.runtime.errors import UserError


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
