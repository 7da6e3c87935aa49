"""Encoded pictures to RGB: which formats are read, how large they may be, and what a broken one raises.

Whatever a decoder raises makes the picture unreadable: named by the caller, never a stack trace.
"""

import io
import math
import os
import warnings
from pathlib import Path

from etils import epath
from PIL import Image

from iar_jax.data.preprocessing import middle, to_rgb
from iar_jax.runtime.errors import brief

# Pillow would open anything that it can, by what is in the file: one named .png may be PostScript, for which it starts
# a program.
FORMATS = ("PNG", "JPEG", "WEBP")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
# The size is looked at here, before anything is decoded; a filter around each reading would be shared by its threads.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class Unreadable(ValueError):
    """A picture that cannot be read; says why."""


def read_image(path: str | os.PathLike[str]) -> Image.Image:
    """An upright RGB picture from a file: turned by its EXIF orientation, transparency laid over white, 16 bit to 8.

    Raises:
        Unreadable: whatever is wrong with it.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise Unreadable(error.strerror or str(error)) from error
    return decoded(content, upright=True)


def is_lossy(path: os.PathLike[str]) -> bool:
    """Whether a file is a JPEG, or a WebP that was not stored without losses."""
    with epath.Path(path).open("rb") as file:
        head = file.read(1 << 16)
    if head.startswith(b"\xff\xd8"):
        return True
    # A lossless WebP has its pixels in a chunk VP8L, a lossy one in a chunk VP8 with a space.
    return head[:4] == b"RIFF" and head[8:12] == b"WEBP" and b"VP8L" not in head


def decoded(content: bytes, upright: bool = False) -> Image.Image:
    """The RGB picture in a file's content; a strip is cut to its middle.

    Args:
        upright: turned by its EXIF orientation, with transparency laid over white; else as ADM and LlamaGen convert
            ImageNet's, transparency dropped and not turned.

    Raises:
        Unreadable: whatever is wrong with it.
    """
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            if image.width * image.height > (Image.MAX_IMAGE_PIXELS or math.inf):
                raise Unreadable(f"{image.width} x {image.height} pixels, more than {Image.MAX_IMAGE_PIXELS:,}")
            image.load()
            return to_rgb(image) if upright else middle(image).convert("RGB")
    except Unreadable:
        raise
    except Image.UnidentifiedImageError as error:
        raise Unreadable(f"not a picture of a format that is read ({', '.join(FORMATS)})") from error
    except Exception as error:  # decoders and readers of EXIF raise many kinds
        raise Unreadable(brief(error)) from error
