"""If these fail, sets of TensorFlow Datasets are read in another order, with other labels, or not at all.

The golden set was written by `tfds.dataset_builders.store_as_tfds_dataset`, 12 and 6 PNG pictures of 12 x 10 and more
pixels in both file formats, with labels 0, 1, 2, 0, ... by the number that makes a picture's height.
"""

import io
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from iar_jax.config.fields import default_config
from iar_jax.data.images import open_images
from iar_jax.data.tfds_images import TfdsSource, TfdsSplits
from iar_jax.runtime.errors import UserError


def opened(golden, file_format, **fields):
    section = default_config().data
    section.update(
        {"source": "tfds:tiny_set", "resolution": 8, "tfds_dir": str(golden(f"tfds/{file_format}")), **fields}
    )
    return open_images(section)


@pytest.mark.parametrize("file_format", ["array_record", "tfrecord"])
def test_a_prepared_set_is_read_in_both_formats(golden, file_format):
    images = opened(golden, file_format)
    assert images.class_names == ("a", "b", "c")
    assert (len(images.train), len(images.val)) == (12, 6)
    for source in (images.train, images.val):
        examples = [source.example(i) for i in range(len(source))]
        # The writer shuffles; heights tell which picture is which.
        assert sorted(picture.height for picture, _ in examples) == list(range(10, 10 + len(source)))
        assert [label for _, label in examples] == [(picture.height - 10) % 3 for picture, _ in examples]
        np.testing.assert_array_equal(source.labels, [label for _, label in examples])
        assert source[0]["image"].shape == (8, 8, 3)
    assert not set(images.train.image_ids) & set(images.val.image_ids)


def encoded(image, file_format, **options):
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def test_pictures_are_converted_as_adm_does():
    rng = np.random.default_rng(0)
    colours = Image.fromarray(rng.integers(0, 256, (9, 7, 4), dtype=np.uint8), "RGBA")
    turned = colours.convert("RGB").getexif()
    turned[0x0112] = 6
    grey = Image.fromarray(rng.integers(0, 256, (9, 7), dtype=np.uint8))
    cmyk = Image.fromarray(rng.integers(0, 256, (9, 7, 4), dtype=np.uint8), "CMYK")
    files = [
        encoded(colours, "PNG"),
        encoded(colours.convert("RGB"), "PNG", exif=turned),
        encoded(grey, "PNG"),
        encoded(cmyk, "JPEG"),
    ]
    source = TfdsSource("some", [{"image": content, "label": 0} for content in files], 0, 4)
    transparency_dropped, not_turned, three_channels, from_cmyk = (np.asarray(source.example(i)[0]) for i in range(4))
    np.testing.assert_array_equal(transparency_dropped, np.asarray(colours)[..., :3])
    np.testing.assert_array_equal(not_turned, np.asarray(colours)[..., :3])
    np.testing.assert_array_equal(three_channels, np.repeat(np.asarray(grey)[..., None], 3, axis=-1))
    np.testing.assert_array_equal(from_cmyk, np.asarray(Image.open(io.BytesIO(files[3])).convert("RGB")))
    with pytest.raises(UserError, match="some: record 0 is not an image"):
        TfdsSource("some", [{"image": b"nothing", "label": 0}], 0, 4).example(0)


def test_tensorflow_is_not_imported(golden):
    code = (
        "import sys; from iar_jax.data.tfds_images import TfdsSplits;"
        f"TfdsSplits('tiny_set', {str(golden('tfds/array_record'))!r}, 8).sources['train'].labels;"
        "assert 'tensorflow' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_set_without_validation_is_split(golden, tmp_path):
    shutil.copytree(golden("tfds/tfrecord"), tmp_path / "tfds")
    info = tmp_path / "tfds" / "tiny_set" / "1.0.0" / "dataset_info.json"
    info.write_text(info.read_text().replace('"validation"', '"elsewhere"'))
    for path in info.parent.glob("*validation*"):
        path.rename(path.with_name(path.name.replace("validation", "elsewhere")))
    images = opened(golden, "tfrecord", tfds_dir=str(tmp_path / "tfds"), val_fraction=0.25)
    assert (len(images.train), len(images.val)) == (9, 3)
    assert sorted(images.val.labels) == [0, 1, 2]
    assert len(set(images.train.image_ids) | set(images.val.image_ids)) == 12
    assert [images.val.example(i)[1] for i in range(3)] == images.val.labels.tolist()


def test_what_is_not_prepared_or_damaged_is_said(golden, tmp_path):
    with pytest.raises(UserError, match=r"not prepared in .*tfds build nothing"):
        opened(golden, "tfrecord", source="tfds:nothing")
    shutil.copytree(golden("tfds/tfrecord"), tmp_path / "tfds")
    (path,) = (tmp_path / "tfds" / "tiny_set" / "1.0.0").glob("*train*")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="ends inside record 11"):
        opened(golden, "tfrecord", tfds_dir=str(tmp_path / "tfds"))


def test_a_record_that_cannot_be_parsed_is_named(golden, tmp_path):
    shutil.copytree(golden("tfds/tfrecord"), tmp_path / "tfds")
    (path,) = (tmp_path / "tfds" / "tiny_set" / "1.0.0").glob("*train*")
    content = bytearray(path.read_bytes())
    content[12:20] = b"\xff" * 8
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"tfds:tiny_set train: record 0 cannot be read .*prepare the set again"):
        TfdsSplits("tiny_set", str(tmp_path / "tfds"), 8).sources["train"].example(0)


def test_damaged_array_records_are_named(golden, tmp_path):
    shutil.copytree(golden("tfds/array_record"), tmp_path / "tfds")
    (path,) = (tmp_path / "tfds" / "tiny_set" / "1.0.0").glob("*train*")
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], bytes(len(whole)), whole[:-70_000] + bytes(70_000)):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"tfds:tiny_set train.*cannot be read"):
            TfdsSplits("tiny_set", str(tmp_path / "tfds"), 8).sources["train"].labels  # noqa: B018
