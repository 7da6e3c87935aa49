"""LPIPS: the perceptual distance from VGG-16 features (Zhang et al. 2018), as LlamaGen's tokenizer loss uses it."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

# Convolutions in each of VGG-16's five stages; a stage's last activation is what is compared.
STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))

# Mean and standard deviation of ImageNet's channels, moved from [0, 1] to pictures in [-1, 1].
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)


class Lpips(nn.Module):
    """Distance of two sets of pictures [B, H, W, 3] in [-1, 1]; one number >= 0 for each pair.

    Weights come from `interop/lpips.py`; sides of 16 pixels at least.
    """

    @nn.compact
    def __call__(
        self, first: Float[Array | np.ndarray, "B H W 3"], second: Float[Array | np.ndarray, "B H W 3"]
    ) -> Float[Array, " B"]:
        x = jnp.concatenate([first, second])
        x = (x - jnp.array(SHIFT)) / jnp.array(SCALE)
        total = jnp.zeros(first.shape[0])
        for i, (channels, num_convs) in enumerate(STAGES):
            if i:
                x = nn.max_pool(x, (2, 2), strides=(2, 2))
            for j in range(num_convs):
                x = nn.relu(nn.Conv(channels, (3, 3), padding=1, name=f"stage{i}_conv{j}")(x))
            unit = x / (jnp.sqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True)) + 1e-10)
            difference = jnp.square(unit[: first.shape[0]] - unit[first.shape[0] :])
            weight = self.param(f"linear{i}", nn.initializers.constant(1.0 / channels), (channels,))
            total += jnp.mean(difference @ weight, axis=(1, 2))
        return total
