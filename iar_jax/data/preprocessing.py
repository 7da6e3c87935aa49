"""From decoded pictures to uint8 arrays [size, size, 3]: crops, shifts and flips."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from PIL import Image

from iar_jax.runtime.section import Section

# A longer picture is cut to its middle, of which every crop is made.
LONGEST = 8

ORIENTATION = 0x0112
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 where there is none, or it cannot be read. The rest of the block is let alone: it
    may hold anything."""
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # struct.error, TypeError, OverflowError and others
        return 1


def middle(image: Image.Image) -> Image.Image:
    """The picture, or the middle of a strip: no crop reaches further, and scaled as a whole it may take any memory."""
    longest = LONGEST * min(image.size)
    left, top = (max(0, side - longest) // 2 for side in image.size)
    return image.crop((left, top, image.width - left, image.height - top)) if left or top else image


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB picture of any PIL mode, upright: turned by its EXIF orientation, transparency laid over white, 16 bit to 8;
    a strip is cut to its middle."""
    turn, clear = UPRIGHT.get(orientation(image)), image.info.get("transparency")
    image = middle(image)
    if turn is not None:
        image = image.transpose(turn)
    if image.mode in ("I", "I;16", "I;16B", "I;16L", "I;16N", "F"):
        values = np.asarray(image, np.float32)
        shown = np.clip((values if image.mode == "F" else values / 257.0) + 0.5, 0, 255).astype(np.uint8)
        if isinstance(clear, int):
            shown = np.where(values == clear, np.uint8(255), shown)
        return Image.fromarray(shown).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or clear is not None:
        if clear is not None:  # which cutting and turning may have lost
            image.info["transparency"] = clear
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def center_crop(image: Image.Image, size: int) -> UInt8[np.ndarray, "size size 3"]:
    """Scales the shorter side to `size` and cuts out the centre, as ADM's `center_crop_arr` does.

    Box filter by halves while the shorter side is at least twice the size, then bicubic.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize(
        (max(size, round(image.width * scale)), max(size, round(image.height * scale))), Image.Resampling.BICUBIC
    )
    pixels = np.asarray(image)
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]


def shift(pixels: UInt8[np.ndarray, "H W 3"], down: int, right: int) -> UInt8[np.ndarray, "H W 3"]:
    """Moves a picture by whole pixels; what comes in from outside repeats the border."""
    height, width = pixels.shape[:2]
    rows = np.clip(np.arange(height) - down, 0, height - 1)
    columns = np.clip(np.arange(width) - right, 0, width - 1)
    return pixels[rows[:, None], columns]


def random_shift(
    pixels: UInt8[np.ndarray, "H W 3"], max_shift: int, rng: np.random.Generator
) -> UInt8[np.ndarray, "H W 3"]:
    """`shift` by uniform steps in [-max_shift, max_shift] on both axes."""
    down, right = rng.integers(-max_shift, max_shift + 1, size=2)
    return shift(pixels, int(down), int(right))


def random_crop_flip(
    pixels: UInt8[np.ndarray, "H W 3"], smallest: float, rng: np.random.Generator
) -> UInt8[np.ndarray, "H W 3"]:
    """A random square of side [smallest, 1] of the picture, scaled back to its size and mirrored half the time."""
    size = pixels.shape[0]
    side = round(size * rng.uniform(smallest, 1.0))
    top, left = (int(rng.integers(0, size - side + 1)) for _ in range(2))
    if side < size:
        crop = Image.fromarray(pixels[top : top + side, left : left + side])
        pixels = np.asarray(crop.resize((size, size), Image.Resampling.BICUBIC))
    return pixels[:, ::-1] if rng.random() < 0.5 else pixels


def shifted_crops(pixels: UInt8[np.ndarray, "H W 3"], max_shift: int) -> UInt8[np.ndarray, "9 H W 3"]:
    """Nine copies moved by -max_shift, 0, max_shift on both axes, the unmoved one first."""
    moves = [(0, 0)] + [
        (down, right) for down in (-max_shift, 0, max_shift) for right in (-max_shift, 0, max_shift) if down or right
    ]
    return np.stack([shift(pixels, down, right) for down, right in moves])


def with_mirror(pixels: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "2 H W 3"]:
    """The image and its mirror image."""
    return np.stack([pixels, pixels[:, ::-1]])


def ten_crop(image: Image.Image, size: int, crop_range: float) -> UInt8[np.ndarray, "10 size size 3"]:
    """Ten crops in torchvision's order: four corners and the centre, then the same of the mirrored picture.

    The picture is first brought to int(size * crop_range) pixels by `center_crop`, as LlamaGen's extraction does.
    """
    pixels = center_crop(image, int(size * crop_range))
    far = pixels.shape[0] - size
    middle = round(far / 2.0)  # as torchvision rounds the centre's corner
    corners = [(0, 0), (0, far), (far, 0), (far, far), (middle, middle)]
    both = (pixels, pixels[:, ::-1])
    return np.stack([p[top : top + size, left : left + size] for p in both for top, left in corners])


class Views(NamedTuple):
    """What the views of an image depend on besides it.

    Attributes:
        size: their side, pixels.
        max_shift: of `shifts`, pixels.
        crop_ranges: of `ten_crop`: the image's side over the crop's.
    """

    size: int
    max_shift: int = 0
    crop_ranges: Sequence[float] = ()


# config.codes.crops: an image and its `Views` -> the views whose codes are stored, uint8 [crops, size, size, 3].
CROPS: dict[str, Callable[[Image.Image, Views], UInt8[np.ndarray, "crops size size 3"]]] = {
    "center": lambda image, views: center_crop(image, views.size)[None],
    "mirror": lambda image, views: with_mirror(center_crop(image, views.size)),
    "shifts": lambda image, views: shifted_crops(center_crop(image, views.size), views.max_shift),
    "ten_crop": lambda image, views: np.concatenate([ten_crop(image, views.size, r) for r in views.crop_ranges]),
}


def crops(image: Image.Image, kind: str, views: Views) -> UInt8[np.ndarray, "crops size size 3"]:
    """The views of an image whose codes are stored; `kind` is a key of CROPS."""
    return CROPS[kind](image, views)


# A training image, config.data and a generator -> the image as it is trained on.
Augment = Callable[[np.ndarray, Section, np.random.Generator], np.ndarray]


def unchanged(pixels: np.ndarray, section: Section, rng: np.random.Generator) -> np.ndarray:
    """An `Augment` that leaves the image, uint8 [H, W, 3], as it is."""
    return pixels


def moved(pixels: np.ndarray, section: Section, rng: np.random.Generator) -> np.ndarray:
    """An `Augment`: `random_shift` by up to max_shift pixels."""
    return random_shift(pixels, section["max_shift"], rng)


def cropped(pixels: np.ndarray, section: Section, rng: np.random.Generator) -> np.ndarray:
    """An `Augment`: `random_crop_flip` with squares from smallest_crop of the side on."""
    return random_crop_flip(pixels, section["smallest_crop"], rng)


class Augmentation(NamedTuple):
    """What is done to training images: to those of the tokenizer, and to those of the classifier, which are always
    moved a little first."""

    of_tokenizer: Augment
    of_classifier: Augment


# config.data.augmentation.
AUGMENTATIONS = {
    "none": Augmentation(unchanged, unchanged),
    "shift": Augmentation(moved, unchanged),
    "crop_flip": Augmentation(cropped, cropped),
}


def reduced(images: Float[Array | np.ndarray, "B H H 3"], size: int) -> Float[Array, "B size size 3"]:
    """Images brought to a smaller size as LlamaGen does with its 384-px samples: PyTorch's bicubic interpolation (Keys'
    cubic of -0.75, half-pixel centres, borders repeated) without antialiasing, in floats, before they are clamped."""
    weights = jnp.asarray(bicubic_weights(images.shape[1], size))
    with jax.default_matmul_precision("highest"):
        return jnp.einsum("yh,bhwc,xw->byxc", weights, jnp.asarray(images, jnp.float32), weights)


def bicubic_weights(old: int, new: int) -> Float[np.ndarray, "new old"]:
    """What each old pixel of a row adds to each new one; see `reduced`."""
    a = -0.75
    near = lambda x: ((a + 2) * x - (a + 3)) * x * x + 1  # noqa: E731
    far = lambda x: ((a * x - 5 * a) * x + 8 * a) * x - 4 * a  # noqa: E731
    centre = (np.arange(new) + 0.5) * old / new - 0.5
    first, part = np.floor(centre).astype(int), centre - np.floor(centre)
    weights = np.zeros((new, old))
    for offset, values in ((-1, far(part + 1)), (0, near(part)), (1, near(1 - part)), (2, far(2 - part))):
        np.add.at(weights, (np.arange(new), np.clip(first + offset, 0, old - 1)), values)
    return weights.astype(np.float32)


def to_unit_range(pixels: UInt8[np.ndarray, "*B"]) -> Float[np.ndarray, "*B"]:
    """uint8 [0, 255] -> float32 [-1, 1]."""
    return pixels.astype(np.float32) / 127.5 - 1.0


def to_uint8(images: Float[Array | np.ndarray, "*B"]) -> UInt8[np.ndarray, "*B"]:
    """[-1, 1] -> uint8 as LlamaGen writes its samples: clamp(127.5 x + 128, 0, 255), truncated."""
    return np.clip(127.5 * np.asarray(images, np.float32) + 128.0, 0, 255).astype(np.uint8)
