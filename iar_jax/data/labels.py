"""Which classes are sampled."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Int


def balanced(num_images: int, num_classes: int, seed: int) -> Int[np.ndarray, " N"]:
    """The classes in turn."""
    return (np.arange(num_images) % num_classes).astype(np.int32)


def uniform(num_images: int, num_classes: int, seed: int) -> Int[np.ndarray, " N"]:
    """Drawn evenly at random, as LlamaGen does."""
    return np.random.default_rng(seed).integers(0, num_classes, num_images).astype(np.int32)


# config.sampling.labels: (number of images, number of classes, seed) -> labels int32 [N].
PROTOCOLS: dict[str, Callable[[int, int, int], Int[np.ndarray, " N"]]] = {"balanced": balanced, "uniform": uniform}
