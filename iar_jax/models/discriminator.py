"""The patch discriminator of the tokenizer's adversarial loss (PatchGAN with BatchNorm, as in LlamaGen)."""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float


class PatchDiscriminator(nn.Module):
    """4x4 convolutions of stride 2 with doubling width, then two of stride 1; a logit for each patch.

    `channels` 64 and `num_layers` 3 are LlamaGen's. BatchNorm statistics live in "batch_stats".
    """

    channels: int = 64
    num_layers: int = 3
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, images: Float[Array, "B H W 3"], train: bool) -> Float[Array, "B h w 1"]:
        def conv(features, strides, use_bias, name):
            return nn.Conv(
                features,
                (4, 4),
                strides=strides,
                padding=1,
                use_bias=use_bias,
                dtype=self.dtype,
                kernel_init=nn.initializers.normal(0.02),
                name=name,
            )

        x = nn.leaky_relu(conv(self.channels, 2, True, "conv_in")(images.astype(self.dtype)), 0.2)
        for i in range(1, self.num_layers + 1):
            strides = 2 if i < self.num_layers else 1
            x = conv(self.channels * min(2**i, 8), strides, False, f"conv{i}")(x)
            x = nn.BatchNorm(
                use_running_average=not train,
                momentum=0.9,
                epsilon=1e-5,
                dtype=self.dtype,
                scale_init=lambda key, shape, dtype: 1.0 + nn.initializers.normal(0.02)(key, shape, dtype),
                name=f"norm{i}",
            )(x)
            x = nn.leaky_relu(x, 0.2)
        return conv(1, 1, True, "conv_out")(x).astype(jnp.float32)
