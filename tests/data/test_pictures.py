"""If these fail, a picture ends a run, is read as another one, or starts a program."""

import io
import struct
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from iar_jax.config.fields import defaults
from iar_jax.data import pictures, preprocessing
from iar_jax.data.images import open_images
from iar_jax.data.pictures import Unreadable, read_image
from iar_jax.runtime.errors import UserError

CASES = Path(__file__).parents[1] / "cases"


def folder(path, **fields):
    return open_images(defaults("data") | {"source": f"folder:{path}", "resolution": 8, "max_unreadable": 5} | fields)


def make_classes(path, names=("a", "b"), count=4):
    for name in names:
        (path / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (12, 9), (40, 10 * i, 0)).save(path / name / f"{i}.png")
    return path


@pytest.mark.parametrize(("name", "turn"), [("exif_write_fails.jpg", 6), ("exif_type_error.jpg", 5)])
def test_of_an_exif_block_the_orientation_alone_is_read(name, turn):
    raw = Image.open(CASES / name).convert("RGB")
    expected = np.asarray(raw.transpose(preprocessing.UPRIGHT[turn]))
    np.testing.assert_array_equal(np.asarray(read_image(CASES / name)), expected)


def with_exif(block):
    buffer = io.BytesIO()
    Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3)).save(buffer, "PNG", exif=b"Exif\0\0" + block)
    return buffer.getvalue()


def test_odd_exif_blocks_are_no_reason_to_fail():
    rng = np.random.default_rng(0)
    for _ in range(300):
        entries = int(rng.integers(0, 5))
        fields = [
            struct.pack("<HHI", int(rng.choice([0x0112, 0x010E, 0x8769, 0xA005])), int(rng.integers(0, 14)), 3)
            + rng.bytes(4)
            for _ in range(entries)
        ]
        block = b"II*\0" + struct.pack("<IH", int(rng.choice([8, 6, 2**31])), entries) + b"".join(fields) + rng.bytes(9)
        image = pictures.decoded(with_exif(block), upright=True)
        assert image.size == (4, 4)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_each_orientation_turns_as_it_says(orientation):
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    exif = Image.Exif()
    exif[preprocessing.ORIENTATION] = orientation
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", exif=exif)
    # What the standard calls row 0 and column 0 of the picture as it is stored.
    upright = {
        1: pixels,
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: pixels.swapaxes(0, 1),
        6: pixels[::-1].swapaxes(0, 1),
        7: pixels[::-1, ::-1].swapaxes(0, 1),
        8: pixels[:, ::-1].swapaxes(0, 1),
    }[orientation]
    np.testing.assert_array_equal(np.asarray(pictures.decoded(buffer.getvalue(), upright=True)), upright)


@pytest.mark.parametrize("name", ["1x10000.png", "30000x1.png"])
def test_a_strip_takes_no_more_time_and_memory_than_its_middle(name):
    started = time.monotonic()
    tracemalloc.start()
    crop = preprocessing.center_crop(read_image(CASES / name), 256)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert crop.shape == (256, 256, 3)
    np.testing.assert_array_equal(crop.reshape(-1, 3), np.broadcast_to((200, 100, 50), (256 * 256, 3)))
    assert time.monotonic() - started < 5
    assert peak < 100e6


def test_a_strip_is_cut_to_what_its_crop_is_made_of():
    pixels = np.random.default_rng(0).integers(0, 256, (40, 4000, 3)).astype(np.uint8)
    whole = preprocessing.center_crop(Image.fromarray(pixels), 32)
    cut = preprocessing.center_crop(preprocessing.middle(Image.fromarray(pixels)), 32)
    assert np.abs(whole.astype(int) - cut).max() <= 1


def test_sixteen_bit_grey_with_a_transparent_value_lies_over_white():
    np.testing.assert_array_equal(np.asarray(read_image(CASES / "g16_trns.png"))[..., 0].ravel(), [0, 255, 200, 255])


def test_what_is_of_another_format_is_unreadable_by_name(tmp_path, monkeypatch):
    make_classes(tmp_path)
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"
    (tmp_path / "a" / "cat.png").write_bytes(eps)
    (tmp_path / "a" / "cut.jpg").write_bytes((CASES / "avif_cut.jpg").read_bytes())
    Image.new("RGB", (9, 9)).save(tmp_path / "b" / "x.bmp")
    (tmp_path / "b" / "x.bmp").rename(tmp_path / "b" / "bmp.png")
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: pytest.fail("a program was started"))
    found = folder(tmp_path)
    assert len(found.unreadable) == 3
    assert all("not a picture of a format that is read (PNG, JPEG, WEBP)" in line for line in found.unreadable)


def test_a_size_is_looked_at_before_anything_is_decoded():
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    import zlib

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    with pytest.raises(Unreadable, match="pixels"):
        pictures.decoded(bomb)


def test_hidden_entries_at_any_depth_are_no_pictures(tmp_path):
    make_classes(tmp_path)
    picture = (tmp_path / "a" / "0.png").read_bytes()
    for hidden in (
        "a/._0.png",
        "a/.ipynb_checkpoints/0.png",
        "b/x/.thumbnails/0.png",
        "a/__MACOSX/0.png",
        "b/@eaDir/0.png",
    ):
        (tmp_path / hidden).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / hidden).write_bytes(picture)
    (tmp_path / "a" / "folder.png").mkdir()
    found = folder(tmp_path)
    assert len(found.train) + len(found.val) == 8


def test_splits_are_not_taken_for_classes(tmp_path):
    make_classes(tmp_path / "train")
    make_classes(tmp_path / "val")
    with pytest.raises(UserError, match=r"train, val are splits, and not classes; give one of them, as folder:.*train"):
        folder(tmp_path)


def test_a_class_whose_files_are_of_other_kinds_is_named(tmp_path, capsys):
    make_classes(tmp_path)
    (tmp_path / "a" / "notes.txt").write_text("x")
    folder(tmp_path)
    assert "1 files are no pictures of those that are read, and passed over (1 .txt)" in capsys.readouterr().out
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "x.heic").write_bytes(b"x")
    with pytest.raises(UserError, match=r"class 'c' has 1 files, of the kinds .heic, and none of those"):
        folder(tmp_path, resolution=9)


def test_classes_that_are_numbers_are_in_the_order_of_their_values(tmp_path):
    make_classes(tmp_path / "numbers", [str(i) for i in range(12)])
    assert folder(tmp_path / "numbers").class_names == tuple(str(i) for i in range(12))
    make_classes(tmp_path / "others", ("1", "2", "10"))
    assert folder(tmp_path / "others").class_names == ("1", "10", "2")


def test_names_that_are_not_utf_8(tmp_path):
    import os

    for name in (b"caf\xe9", b"plain"):
        path = os.path.join(os.fsencode(tmp_path), name)
        os.mkdir(path)
        for i in range(4):
            Image.new("RGB", (9, 9), (i, 0, 0)).save(os.fsdecode(os.path.join(path, b"\xff%d.png" % i)))
    found = folder(tmp_path)
    assert len(found.train) + len(found.val) == 8
    assert len(found.fingerprint) == 64
