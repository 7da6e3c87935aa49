"""If these fail, image sets from Hugging Face are read in another order, with other labels, or not at all."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from iar_jax.config.fields import defaults
from iar_jax.data.images import open_images
from iar_jax.runtime.errors import UserError

NAMES = ["cat", "dog", "eel"]


def encoded(number, mode="RGB"):
    """An image whose size and colour tell its number."""
    buffer = io.BytesIO()
    Image.new(mode, (20 + number, 16), (number, 100, 50, 0)[: len(mode)]).save(buffer, "PNG")
    return buffer.getvalue()


def table(numbers, image="image", label="label", names=NAMES, labels=None):
    rows = [{"bytes": encoded(number), "path": f"{number}.png"} for number in numbers]
    features = {image: {"_type": "Image"}, label: {"names": names, "_type": "ClassLabel"}}
    made = pa.table({image: rows, label: labels or [number % 3 for number in numbers]})
    if names:
        made = made.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    return made


def section(path, **fields):
    return defaults("data") | {"source": f"parquet:{path}", "resolution": 8, "val_fraction": 0.25, **fields}


def test_a_folder_with_splits_is_read_as_hugging_face_stores_it(tmp_path):
    (tmp_path / "data").mkdir()
    for file, numbers in (("train-00000-of-00002", range(7)), ("train-00001-of-00002", range(7, 12))):
        pq.write_table(table(numbers), tmp_path / "data" / f"{file}-abc.parquet", row_group_size=3)
    pq.write_table(table(range(12, 16)), tmp_path / "data" / "validation-00000-of-00001.parquet")
    # As ImageNet's own test set, which has no labels; it is not used beside a validation set.
    pq.write_table(table(range(2), labels=[-1, -1]), tmp_path / "data" / "test-00000-of-00001.parquet")
    images = open_images(section(tmp_path, val_fraction=0.2))
    assert images.class_names == tuple(NAMES)
    assert (len(images.train), len(images.val)) == (12, 4)
    # At random, over files and row groups.
    for index in np.random.default_rng(0).permutation(12).tolist():
        image, label = images.train.example(index)
        assert image.size == (20 + index, 16)
        assert image.getpixel((0, 0)) == (index, 100, 50)
        assert label == index % 3
        assert images.train[index]["image"].shape == (8, 8, 3)
        assert images.train[index]["label"] == index % 3
    assert images.val.example(1)[0].size == (33, 16)
    assert not set(images.train.image_ids) & set(images.val.image_ids)
    np.testing.assert_array_equal(images.train.labels, np.arange(12) % 3)


def test_a_file_by_itself_is_split_by_the_rule_of_all_sources(tmp_path):
    pq.write_table(table(range(12), image="img"), tmp_path / "cifar.parquet", row_group_size=5)
    images = open_images(section(tmp_path / "cifar.parquet"))
    assert (len(images.train), len(images.val)) == (9, 3)
    np.testing.assert_array_equal(np.bincount(images.val.labels), 1)
    for i in range(9):
        assert images.train.example(i)[0].width - 20 == images.train.image_ids[i]


def test_other_columns_are_named_in_the_config_and_may_be_plain_bytes(tmp_path):
    rows = {"picture": [encoded(i) for i in range(6)], "kind": [i % 2 for i in range(6)]}
    pq.write_table(pa.table(rows), tmp_path / "mine.parquet")
    with pytest.raises(UserError, match=r"no column 'image' or 'img' of images; they have picture, kind: set "):
        open_images(section(tmp_path / "mine.parquet"))
    with pytest.raises(UserError, match=r"no column 'label' of labels; they have picture, kind: set --config.data.lab"):
        open_images(section(tmp_path / "mine.parquet", image_column="picture"))
    images = open_images(section(tmp_path / "mine.parquet", image_column="picture", label_column="kind"))
    assert images.class_names == ("0", "1")
    assert len(images.train) + len(images.val) == 6
    nested = {"picture": [{"jpeg": encoded(i)} for i in range(6)], "label": [i % 2 for i in range(6)]}
    pq.write_table(pa.table(nested), tmp_path / "nested.parquet")
    images = open_images(section(tmp_path / "nested.parquet", image_column="picture.jpeg"))
    assert images.train.example(0)[0].height == 16
    with pytest.raises(UserError, match="column 'picture' has no field 'bytes'; it has jpeg"):
        open_images(section(tmp_path / "nested.parquet", image_column="picture")).train.example(0)


def test_the_fingerprint_follows_the_content_and_not_the_place(tmp_path):
    for name, numbers in (("a", range(6)), ("b", range(6)), ("c", range(1, 7))):
        (tmp_path / name).mkdir()
        pq.write_table(table(numbers), tmp_path / name / "train.parquet")
    first, same, other = (open_images(section(tmp_path / name)).fingerprint for name in "abc")
    assert first == same != other


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, -1, 1, 1], "a label is -1; there are 3 classes"),
        ([0, 2**40, 1, 1], "a label is 1099511627776; there are 3 classes"),
        ([0, None, 1, 1], "column 'label' is empty in 1 rows; each image has a label"),
        ([0, 0, 1, 2], "class 'dog' has 1 readable image; each class needs two"),
    ],
)
def test_labels_that_cannot_be_used_are_named(tmp_path, labels, message):
    pq.write_table(table(range(4), labels=labels), tmp_path / "some.parquet")
    with pytest.raises(UserError, match=message):
        open_images(section(tmp_path / "some.parquet"))


def test_every_file_has_the_columns(tmp_path):
    pq.write_table(table(range(6)), tmp_path / "train-0.parquet")
    pq.write_table(table(range(6)).drop_columns(["label"]), tmp_path / "train-1.parquet")
    with pytest.raises(UserError, match=r"train-1\.parquet has no column 'label'; it has image"):
        open_images(section(tmp_path))
    with pytest.raises(UserError, match=r"column 'label' is of type int64; images are encoded files, as bytes"):
        open_images(section(tmp_path / "train-0.parquet", image_column="label"))
    with pytest.raises(UserError, match=r"column 'image.path' is of type string; images are encoded files"):
        open_images(section(tmp_path / "train-0.parquet", image_column="image.path"))


def test_what_cannot_be_read_is_named(tmp_path):
    with pytest.raises(UserError, match="there is no such file, and no folder with"):
        open_images(section(tmp_path / "nowhere"))
    (tmp_path / "text.parquet").write_text("no parquet file at all")
    with pytest.raises(UserError, match=r"text\.parquet cannot be read as parquet"):
        open_images(section(tmp_path / "text.parquet"))
    pq.write_table(table([]).slice(0, 0), tmp_path / "empty.parquet")
    with pytest.raises(UserError, match=r"empty\.parquet has no rows"):
        open_images(section(tmp_path / "empty.parquet"))
    words = pa.table({"image": [{"bytes": encoded(0)}] * 2, "label": ["a", "b"]})
    pq.write_table(words, tmp_path / "words.parquet")
    with pytest.raises(UserError, match="column 'label' is of type string; labels are integers"):
        open_images(section(tmp_path / "words.parquet"))
    broken = pa.table({"image": [{"bytes": b"nothing"}, {"bytes": None}] * 2, "label": [0, 0, 1, 1]})
    pq.write_table(broken, tmp_path / "broken.parquet")
    images = open_images(section(tmp_path / "broken.parquet"))
    messages = set()
    for source in (images.train, images.val):
        for i in range(len(source)):
            with pytest.raises(UserError, match=r"broken\.parquet: row \d (is not an image|has no image)") as error:
                source.example(i)
            messages.add(str(error.value))
    assert len(messages) == 4
