"""Structural similarity (Wang et al. 2004)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num

WINDOW, SIGMA, K1, K2 = 11, 1.5, 0.01, 0.03


@jax.jit
def ssim(first: Num[Array | np.ndarray, "B H W C"], second: Num[Array | np.ndarray, "B H W C"]) -> Float[Array, " B"]:
    """Mean structural similarity of images in [0, 255], 1 for equal ones.

    Gaussian windows of 11 pixels (sigma 1.5) that lie inside the image, population variances, each channel by itself,
    as the paper and its MATLAB code. Images need 11 pixels a side at least.
    """
    first, second = (jnp.asarray(x, jnp.float32) for x in (first, second))
    mean1, mean2 = smooth(first), smooth(second)
    variance1, variance2 = smooth(first * first) - mean1**2, smooth(second * second) - mean2**2
    covariance = smooth(first * second) - mean1 * mean2
    c1, c2 = (K1 * 255.0) ** 2, (K2 * 255.0) ** 2
    luminance = (2 * mean1 * mean2 + c1) / (mean1**2 + mean2**2 + c1)
    structure = (2 * covariance + c2) / (variance1 + variance2 + c2)
    return jnp.mean(luminance * structure, axis=(1, 2, 3))


def smooth(x: Float[Array, "B H W C"]) -> Float[Array, "B h w C"]:
    """Gaussian means over the windows that lie inside."""
    places = np.arange(WINDOW) - WINDOW // 2
    weights = np.exp(-0.5 * np.square(places / SIGMA))
    weights = (weights / weights.sum()).astype(np.float32)
    convolve = functools.partial(jnp.convolve, mode="valid", precision="highest")
    for axis in (1, 2):
        x = jnp.apply_along_axis(lambda line: convolve(line, weights), axis, x)
    return x
