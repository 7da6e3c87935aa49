"""Sizes of the models that LlamaGen and IAR publish."""

from typing import NamedTuple


class Size(NamedTuple):
    """Depth, attention heads and width of a transformer."""

    num_layers: int
    num_heads: int
    dim: int


# LlamaGen's code (autoregressive/models/gpt.py).
SIZES = {
    "B": Size(12, 12, 768),
    "L": Size(24, 16, 1024),
    "XL": Size(36, 20, 1280),
    "XXL": Size(48, 24, 1536),
    "3B": Size(24, 32, 3200),
    "XXXL": Size(48, 40, 2560),
    "1B": Size(22, 32, 2048),
    "7B": Size(32, 32, 4096),
}


def size_named(num_layers: int, dim: int) -> str | None:
    """The name of the published model of a depth and a width; None where there is none."""
    return next((name for name, size in SIZES.items() if (size.num_layers, size.dim) == (num_layers, dim)), None)
