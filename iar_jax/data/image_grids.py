"""Pictures for people: grids of images, as PNG."""

import io

import numpy as np
from etils import epath
from jaxtyping import UInt8
from PIL import Image

from iar_jax.runtime.files import write_bytes


def image_grid(
    images: UInt8[np.ndarray, "N H W 3"], columns: int, scale: int = 1, gap: int = 2
) -> UInt8[np.ndarray, "Y X 3"]:
    """Images row by row in one picture, with gaps of `gap` grey pixels, enlarged by whole pixels."""
    count, height, width, _ = images.shape
    images = images.repeat(scale, axis=1).repeat(scale, axis=2)
    height, width = height * scale, width * scale
    rows = -(-count // columns)
    grid = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, 3), 128, np.uint8)
    for i, image in enumerate(images):
        top, left = gap + (i // columns) * (height + gap), gap + (i % columns) * (width + gap)
        grid[top : top + height, left : left + width] = image
    return grid


def class_grid(images: UInt8[np.ndarray, "N H W 3"], labels: np.ndarray) -> UInt8[np.ndarray, "Y X 3"]:
    """One row a class, the first ten classes and ten images of each; missing ones are black."""
    places = places_in_class_grid(labels)
    images, labels = images[places], labels[places]
    rows = []
    for label in sorted(set(labels.tolist())):
        row = images[labels == label]
        rows.append(np.concatenate([row, np.zeros((10 - len(row), *images.shape[1:]), np.uint8)]))
    return image_grid(np.concatenate(rows), columns=10, scale=scale_to_see(images.shape[1]))


def places_in_class_grid(labels: np.ndarray) -> np.ndarray:
    """Indices of the images that a `class_grid` shows."""
    classes = sorted(set(labels.tolist()))[:10]
    return np.concatenate([np.flatnonzero(labels == label)[:10] for label in classes])


def scale_to_see(size: int) -> int:
    """Factor that brings small images to about 64 pixels."""
    return max(1, 64 // size)


def png_bytes(pixels: UInt8[np.ndarray, "Y X 3"]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def write_png(path: epath.Path, pixels: UInt8[np.ndarray, "Y X 3"]) -> None:
    """Writes a PNG, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, png_bytes(pixels))
