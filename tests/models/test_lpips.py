"""If these fail, the perceptual loss is not LPIPS."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from iar_jax.interop.lpips import load_lpips
from iar_jax.models.lpips import STAGES
from iar_jax.runtime.errors import UserError


def random_weights(rng):
    vgg, linear, index, channels_in = {}, {}, 0, 3
    for i, (channels, num_convs) in enumerate(STAGES):
        for _ in range(num_convs):
            scale = (2 / (9 * channels_in)) ** 0.5
            vgg[f"features.{index}.weight"] = (scale * rng.standard_normal((channels, channels_in, 3, 3))).astype("f4")
            vgg[f"features.{index}.bias"] = (0.1 * rng.standard_normal(channels)).astype("f4")
            index, channels_in = index + 2, channels
        index += 1
        linear[f"lin{i}.model.1.weight"] = rng.uniform(0, 1, (1, channels, 1, 1)).astype("f4")
    return vgg, linear


def numpy_lpips(vgg, linear, first, second):
    """LPIPS of one pair in float64, from its definition."""
    shift, scale = np.array([-0.030, -0.088, -0.188]), np.array([0.458, 0.448, 0.450])

    def features(image):
        x, index, found = (image.astype(np.float64) - shift) / scale, 0, []
        for i, (_, num_convs) in enumerate(STAGES):
            if i:
                h, w, c = x.shape
                x = x[: h // 2 * 2, : w // 2 * 2].reshape(h // 2, 2, w // 2, 2, c).max(axis=(1, 3))
            for _ in range(num_convs):
                padded = np.pad(x, ((1, 1), (1, 1), (0, 0)))
                windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(0, 1))
                kernel, bias = vgg[f"features.{index}.weight"], vgg[f"features.{index}.bias"]
                x = np.maximum(np.einsum("hwcij,dcij->hwd", windows, kernel.astype(np.float64)) + bias, 0)
                index += 2
            index += 1
            found.append(x / (np.linalg.norm(x, axis=-1, keepdims=True) + 1e-10))
        return found

    return sum(
        (np.square(a - b) @ linear[f"lin{i}.model.1.weight"].reshape(-1)).mean()
        for i, (a, b) in enumerate(zip(features(first), features(second), strict=True))
    )


def test_distances_equal_the_definition_in_float64(tmp_path):
    rng = np.random.default_rng(0)
    vgg, linear = random_weights(rng)
    save_file(vgg, tmp_path / "vgg.safetensors")
    save_file(linear, tmp_path / "lpips.safetensors")
    distance = load_lpips(str(tmp_path / "vgg.safetensors"), str(tmp_path / "lpips.safetensors"))
    first, second = rng.uniform(-1, 1, (2, 2, 18, 20, 3)).astype(np.float32)
    expected = [numpy_lpips(vgg, linear, a, b) for a, b in zip(first, second, strict=True)]
    # Thirteen float32 convolutions of up to 4,608 terms.
    np.testing.assert_allclose(distance(first, second), expected, rtol=1e-4)
    np.testing.assert_allclose(distance(first, first), 0.0, atol=1e-7)


def test_a_file_without_the_weights_is_named(tmp_path):
    save_file({"a": np.zeros(3, np.float32)}, tmp_path / "vgg.safetensors")
    with pytest.raises(UserError, match=r"vgg\.safetensors: the tensor features\.0\.weight is missing"):
        load_lpips(str(tmp_path / "vgg.safetensors"), str(tmp_path / "vgg.safetensors"))
