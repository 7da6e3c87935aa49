"""If these fail, pictures reach the tokenizer cropped, coloured or scaled otherwise than the docs say."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from iar_jax.data import image_grids, preprocessing
from iar_jax.data.images import read_image
from iar_jax.data.tfds_images import TfdsSource


def test_transparency_lies_over_white_in_every_mode():
    rgba = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    rgba.putpixel((1, 0), (0, 0, 255, 255))
    np.testing.assert_array_equal(np.asarray(preprocessing.to_rgb(rgba)), [[[255, 255, 255], [0, 0, 255]]])
    palette = Image.new("P", (1, 1), 0)
    palette.putpalette([0, 255, 0])
    np.testing.assert_array_equal(np.asarray(preprocessing.to_rgb(palette)), [[[0, 255, 0]]])
    palette.info["transparency"] = 0
    np.testing.assert_array_equal(np.asarray(preprocessing.to_rgb(palette)), [[[255, 255, 255]]])
    grey_alpha = Image.new("LA", (1, 1), (10, 0))
    np.testing.assert_array_equal(np.asarray(preprocessing.to_rgb(grey_alpha)), [[[255, 255, 255]]])


@pytest.mark.parametrize(("mode", "value", "expected"), [("L", 7, 7), ("1", 1, 255), ("I;16", 65535, 255)])
def test_grey_pictures_become_three_equal_channels(mode, value, expected):
    np.testing.assert_array_equal(
        np.asarray(preprocessing.to_rgb(Image.new(mode, (2, 2), value))), np.full((2, 2, 3), expected)
    )


def test_exif_rotation_is_applied(tmp_path):
    image = Image.new("RGB", (3, 2), "black")
    image.putpixel((0, 0), (255, 255, 255))
    exif = image.getexif()
    exif[0x0112] = 6  # turn clockwise to show
    image.save(tmp_path / "turned.png", exif=exif)
    upright = preprocessing.to_rgb(Image.open(tmp_path / "turned.png"))
    assert upright.size == (2, 3)
    assert upright.getpixel((1, 0)) == (255, 255, 255)


@pytest.mark.parametrize("size", [(64, 64), (131, 64), (65, 300), (40, 33), (257, 129), (32, 32)])
def test_center_crop_is_box_halves_then_bicubic_then_the_middle(size):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    expected = image
    while min(expected.size) >= 64:
        expected = expected.resize(tuple(side // 2 for side in expected.size), Image.Resampling.BOX)
    scale = 32 / min(expected.size)
    expected = np.asarray(
        expected.resize(tuple(round(side * scale) for side in expected.size), Image.Resampling.BICUBIC)
    )
    top, left = (expected.shape[0] - 32) // 2, (expected.shape[1] - 32) // 2
    np.testing.assert_array_equal(preprocessing.center_crop(image, 32), expected[top : top + 32, left : left + 32])


@pytest.mark.parametrize("size", [16, 13])
def test_images_are_reduced_as_pytorch_does(golden, size):
    # torch.nn.functional.interpolate(images, (size, size), mode="bicubic") of PyTorch 2.13, which places pixels in
    # float32: off by some 1e-6 of a pixel, at slopes of a few units a pixel.
    expected = np.load(golden("bicubic.npz"))
    found = preprocessing.reduced(expected["images"], size)
    np.testing.assert_allclose(found, expected[f"to_{size}"], atol=1e-5)


@given(st.integers(-3, 3), st.integers(-3, 3))
def test_shift_moves_pixels_and_repeats_the_border(down, right):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    moved = preprocessing.shift(pixels, down, right)
    inside = slice(3, 5)
    source = (slice(3 - down, 5 - down), slice(3 - right, 5 - right))
    np.testing.assert_array_equal(moved[inside, inside], pixels[source])
    if down > 0:
        np.testing.assert_array_equal(moved[:down], moved[down : down + 1].repeat(down, axis=0))


def test_crops_begin_with_the_picture_itself():
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    for kind, count in (("center", 1), ("mirror", 2), ("shifts", 9)):
        found = preprocessing.CROPS[kind](Image.fromarray(pixels), preprocessing.Views(8, max_shift=2))
        assert found.shape == (count, 8, 8, 3)
        np.testing.assert_array_equal(found[0], pixels)
        assert len({crop.tobytes() for crop in found}) == count


@pytest.mark.parametrize("size", [(50, 70), (33, 33), (200, 45)])
def test_ten_crops_are_torchvisions(size):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    found = preprocessing.CROPS["ten_crop"](image, preprocessing.Views(32, crop_ranges=(1.1, 1.05)))
    assert found.shape == (20, 32, 32, 3)
    for first, side in ((0, 35), (10, 33)):
        whole = preprocessing.center_crop(image, side)
        far = side - 32
        # torchvision.transforms.functional.ten_crop: top left, top right, bottom left, bottom right, centre; then the
        # same five of the mirrored picture.
        corners = [(0, 0), (0, far), (far, 0), (far, far), (round(far / 2), round(far / 2))]
        for i, picture in enumerate((whole, whole[:, ::-1])):
            for j, (top, left) in enumerate(corners):
                np.testing.assert_array_equal(found[first + 5 * i + j], picture[top : top + 32, left : left + 32])
        np.testing.assert_array_equal(found[first + 5][:, ::-1], whole[:32, far:])


@pytest.mark.parametrize("name", ["grey.png", "cmyk.jpg", "alpha.png", "turned.jpg", "odd.png", "small.png"])
def test_files_of_all_kinds_become_the_crops_of_torchvision(golden, tmp_path, name):
    # Made with `ten_crop` of torchvision 0.28 and Pillow 13 after ADM's centre crop, at ranges 1.1 and 1.05: "adm" of
    # the picture converted to RGB as it lies, "folder" of it turned as its EXIF says and laid over white.
    expected = np.load(golden("ten_crop.npz"))
    content = expected[f"file/{name}"].tobytes()
    (tmp_path / name).write_bytes(content)
    records = TfdsSource("set", [{"image": content, "label": 3}], 0, 24)
    for kind, picture in (("folder", read_image(str(tmp_path / name))), ("adm", records.example(0)[0])):
        found = preprocessing.CROPS["ten_crop"](picture, preprocessing.Views(24, crop_ranges=(1.1, 1.05)))
        np.testing.assert_array_equal(found, expected[f"{kind}/{name}"])


def test_random_crops_keep_the_size_and_depend_on_the_generator_alone():
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    first = preprocessing.random_crop_flip(pixels, 0.5, np.random.default_rng(3))
    assert first.shape == pixels.shape
    np.testing.assert_array_equal(first, preprocessing.random_crop_flip(pixels, 0.5, np.random.default_rng(3)))
    whole = [preprocessing.random_crop_flip(pixels, 1.0, np.random.default_rng(seed)) for seed in range(20)]
    mirrored = [np.array_equal(crop, pixels[:, ::-1]) for crop in whole]
    assert all(m or np.array_equal(crop, pixels) for m, crop in zip(mirrored, whole, strict=True))
    assert 0 < sum(mirrored) < 20


def test_pixel_values_go_to_minus_one_to_one_and_back():
    pixels = np.arange(256, dtype=np.uint8)
    values = preprocessing.to_unit_range(pixels)
    assert (values.min(), values.max()) == (-1.0, 1.0)
    np.testing.assert_array_equal(preprocessing.to_uint8(values), pixels)
    np.testing.assert_array_equal(preprocessing.to_uint8(np.array([-9.0, 9.0, 0.0])), [0, 255, 128])


def test_a_class_grid_has_one_row_a_class():
    images = np.stack([np.full((64, 64, 3), i, np.uint8) for i in range(5)])
    grid = image_grids.class_grid(images, np.array([1, 0, 1, 0, 2]))
    assert grid.shape == (3 * 66 + 2, 10 * 66 + 2, 3)
    assert grid[2, 2, 0] == 1
    assert grid[2, 68, 0] == 3
    assert grid[68, 2, 0] == 0
    assert grid[2 * 66 + 2, 68, 0] == 0  # nothing there
