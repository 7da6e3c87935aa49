"""If these fail, structural similarity is not the one of the paper."""

import numpy as np
import pytest

from iar_jax.metrics.ssim import ssim


def by_definition(first, second):
    """Window by window, in float64."""
    places = np.arange(11) - 5
    weights = np.exp(-(places[:, None] ** 2 + places[None] ** 2) / (2 * 1.5**2))
    weights /= weights.sum()
    height, width, channels = first.shape
    found = []
    for channel in range(channels):
        for y in range(height - 10):
            for x in range(width - 10):
                a, b = (image[y : y + 11, x : x + 11, channel].astype(np.float64) for image in (first, second))
                mean1, mean2 = (weights * a).sum(), (weights * b).sum()
                variance1, variance2 = (weights * (a - mean1) ** 2).sum(), (weights * (b - mean2) ** 2).sum()
                covariance = (weights * (a - mean1) * (b - mean2)).sum()
                c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
                found.append(
                    (2 * mean1 * mean2 + c1) * (2 * covariance + c2)
                    / ((mean1**2 + mean2**2 + c1) * (variance1 + variance2 + c2))
                )  # fmt: skip
    return np.mean(found)


@pytest.mark.parametrize("noise", [1.0, 30.0])
def test_it_is_the_definition(noise):
    rng = np.random.default_rng(0)
    first = rng.integers(0, 256, (2, 14, 17, 3)).astype(np.uint8)
    second = np.clip(first + noise * rng.standard_normal(first.shape), 0, 255).astype(np.uint8)
    expected = [by_definition(*pair) for pair in zip(first, second, strict=True)]
    # Variances are differences of squares up to 65,025 in float32: 1e-7 of that against c2 = 58.
    np.testing.assert_allclose(ssim(first, second), expected, atol=2e-4)


def test_equal_images_have_one_and_flat_ones_of_other_brightness_less():
    image = np.random.default_rng(0).integers(0, 256, (1, 20, 20, 3)).astype(np.uint8)
    np.testing.assert_allclose(ssim(image, image), 1.0, atol=1e-6)
    assert ssim(np.zeros((1, 20, 20, 3), np.uint8), np.full((1, 20, 20, 3), 255, np.uint8))[0] < 1e-3
