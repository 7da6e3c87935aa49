"""LPIPS weights: torchvision's VGG-16 and the linear layers of the LPIPS release, to our parameter tree."""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

from iar_jax.interop import downloads
from iar_jax.interop.torch_files import named_tensor, read_torch_file
from iar_jax.models.lpips import STAGES, Lpips


def load_lpips(
    vgg_path: str, lpips_path: str
) -> Callable[[Float[Array, "B H W 3"], Float[Array, "B H W 3"]], Float[Array, " B"]]:
    """The perceptual distance of two batches of images in [-1, 1].

    Args:
        vgg_path: torchvision's vgg16 (keys "features.0.weight" ...), .pth or .safetensors; "" for the one in the cache
            directory, fetched where it is not there.
        lpips_path: the linear layers ("lin0.model.1.weight" ...), the same way.

    Raises:
        UserError: a file that is nowhere, cannot be read or lacks a tensor.
    """
    vgg_path = str(downloads.find(vgg_path, downloads.VGG, "VGG-16 weights"))
    lpips_path = str(downloads.find(lpips_path, downloads.LPIPS, "LPIPS weights"))
    vgg, linear = read_torch_file(vgg_path), read_torch_file(lpips_path)
    params: dict = {}
    index, channels_in = 0, 3
    for i, (channels, num_convs) in enumerate(STAGES):
        for j in range(num_convs):
            kernel = named_tensor(vgg, f"features.{index}.weight", (channels, channels_in, 3, 3), vgg_path)
            bias = named_tensor(vgg, f"features.{index}.bias", (channels,), vgg_path)
            params[f"stage{i}_conv{j}"] = {"kernel": kernel.transpose(2, 3, 1, 0), "bias": bias}
            index, channels_in = index + 2, channels  # a ReLU follows each convolution
        index += 1  # and a pooling each stage
        weight = named_tensor(linear, f"lin{i}.model.1.weight", (1, channels, 1, 1), lpips_path)
        params[f"linear{i}"] = weight.reshape(channels)
    params = {"params": _to_jax(params)}
    return lambda first, second: Lpips().apply(params, first, second)


def available(vgg_path: str, lpips_path: str) -> bool:
    """Whether LPIPS can be had without fetching anything."""
    return bool((vgg_path or downloads.here(downloads.VGG)) and (lpips_path or downloads.here(downloads.LPIPS)))


def _to_jax(tree):
    return {k: _to_jax(v) for k, v in tree.items()} if isinstance(tree, dict) else jnp.asarray(tree)
