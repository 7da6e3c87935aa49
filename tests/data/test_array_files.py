"""If these fail, an array of a file is read as another one, takes more memory than there is, or ends a run."""

import io
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest
from etils import epath

from iar_jax.data.array_files import MOST_BYTES, RowReader, array_names, read_array
from iar_jax.runtime.errors import UserError

IMAGES = np.random.default_rng(0).integers(0, 256, (7, 4, 5, 3), dtype=np.uint8)


def npy(array, version=None):
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, version)
    return buffer.getvalue()


def archive(tmp_path, content, method=zipfile.ZIP_STORED, name="arr_0.npy"):
    with zipfile.ZipFile(tmp_path / "file.npz", "w", method) as file:
        file.writestr(name, content)
    return epath.Path(tmp_path) / "file.npz"


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("packed", [None, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_rows_are_those_of_numpy_in_every_form(tmp_path, version, order, packed):
    content = npy(np.asarray(IMAGES, order=order), version)
    path = epath.Path(tmp_path) / "file.npy"
    path.write_bytes(content)
    if packed is not None:
        path = archive(tmp_path, content, packed)
    reader = RowReader(path)
    assert (reader.shape, reader.dtype) == (IMAGES.shape, np.uint8)
    np.testing.assert_array_equal(np.concatenate(list(reader.batches(3))), IMAGES)
    np.testing.assert_array_equal(np.concatenate(list(reader.batches(3, first=2))), IMAGES[2:])
    np.testing.assert_array_equal(read_array(path), IMAGES)
    assert array_names(path) == {"arr_0"}


def test_files_are_told_by_their_content_and_not_by_their_names(tmp_path):
    (tmp_path / "a.npz").write_bytes(npy(IMAGES))
    np.testing.assert_array_equal(read_array(epath.Path(tmp_path) / "a.npz"), IMAGES)
    archive(tmp_path, npy(IMAGES)).rename(tmp_path / "b.npy")
    np.testing.assert_array_equal(read_array(epath.Path(tmp_path) / "b.npy"), IMAGES)


def header(shape, descr="|u1", fortran=False):
    text = f"{{'descr': {descr!r}, 'fortran_order': {fortran}, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text) + 1) + text + b"\n"


def patched(path, place, value):
    """An archive with other numbers in the entry of its directory."""
    content = bytearray(path.read_bytes())
    at = content.index(b"PK\x01\x02") + place
    content[at : at + len(value)] = value
    path.write_bytes(content)
    return path


DAMAGED = {
    "beyond": (lambda tmp: archive(tmp, header((10**6, 10**6)) + bytes(50)), "more than the file holds"),
    "negative": (lambda tmp: archive(tmp, header((-5, 4))), "more than the file holds"),
    "endless": (lambda tmp: archive(tmp, header((2**62, 2**62)) + bytes(50)), "more than the file holds"),
    "no shape": (lambda tmp: archive(tmp, header("(") + bytes(50)), "cannot be read as arrays"),
    "texts": (lambda tmp: archive(tmp, header((2,), "|O") + bytes(50)), "it holds object, not numbers"),
    "fields": (lambda tmp: archive(tmp, npy(np.zeros(2, [("a", "i4")]))), "not numbers"),
    "method": (lambda tmp: archive(tmp, npy(IMAGES), zipfile.ZIP_LZMA), "packed by method 14"),
    "unknown": (lambda tmp: patched(archive(tmp, npy(IMAGES)), 10, b"\x63"), "packed by method 99"),
    "encrypted": (lambda tmp: patched(archive(tmp, npy(IMAGES)), 8, b"\x01"), "encrypted"),
    "too much": (
        lambda tmp: patched(archive(tmp, npy(IMAGES)), 24, struct.pack("<I", 2**31)),
        "more than there can be",
    ),
    "page": (lambda tmp: written(tmp, b"<!DOCTYPE html><html>Not found</html>"), "it is a web page"),
    "pointer": (lambda tmp: written(tmp, b"version https://git-lfs.github.com/spec/v1\n"), "run git lfs pull"),
    "weights": (lambda tmp: written(tmp, bytes(range(256))), "neither a .npz nor a .npy file"),
    "another": (lambda tmp: archive(tmp, npy(IMAGES), name="images.npy"), "no array 'arr_0'; it has: images"),
    "none": (lambda tmp: epath.Path(tmp) / "nowhere.npz", "nowhere.npz is not there"),
}


def written(tmp_path, content):
    (tmp_path / "file.npz").write_bytes(content)
    return epath.Path(tmp_path) / "file.npz"


@pytest.mark.parametrize("name", DAMAGED)
def test_what_is_wrong_with_a_file_is_told_in_a_line(tmp_path, name):
    make, message = DAMAGED[name]
    path = make(tmp_path)
    for read in (read_array, lambda path: list(RowReader(path).batches(2))):
        with pytest.raises(UserError, match=message) as refusal:
            read(path)
        assert path.name in str(refusal.value)
        assert "\n" not in str(refusal.value)


def test_damaged_deflate_is_told(tmp_path):
    path = archive(tmp_path, npy(np.tile(IMAGES, (50, 1, 1, 1))), zipfile.ZIP_DEFLATED)
    content = bytearray(path.read_bytes())
    content[200:260] = bytes(60)
    path.write_bytes(content)
    with pytest.raises(UserError, match="cannot be read as arrays"):
        read_array(path)


def test_a_bomb_takes_the_memory_of_the_rows_that_are_asked_for(tmp_path):
    # 3 GB of zeros in 3 MB.
    rows, row_bytes = 3000, 1 << 20
    with (
        zipfile.ZipFile(tmp_path / "file.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file,
        file.open("arr_0.npy", "w", force_zip64=True) as member,
    ):
        member.write(header((rows, row_bytes)))
        for _ in range(rows):
            member.write(bytes(row_bytes))
    path = epath.Path(tmp_path) / "file.npz"
    tracemalloc.start()
    assert next(RowReader(path).batches(10)).shape == (10, row_bytes)
    with pytest.raises(UserError, match=rf"at most {MOST_BYTES:,} are read as a whole"):
        read_array(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100 << 20


def test_numbers_in_a_header_that_python_would_run_are_not_run(tmp_path):
    path = archive(tmp_path, header("__import__('os').system('touch executed')") + bytes(50))
    with pytest.raises(UserError, match="cannot be read as arrays"):
        read_array(path)
    assert not (tmp_path / "executed").exists()
