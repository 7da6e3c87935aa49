"""The VQ tokenizer: LlamaGen's convolutional encoder and decoder around a normalised codebook.

With `patch_size=1` it is LlamaGen's network, name for name (VQ-16: channels 128, multipliers (1, 1, 2, 2, 4)).
With a larger patch the stem folds patches into channels before the first convolution and the last convolution
unfolds them, which leaves almost no work at full resolution.
"""

import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from iar_jax.models.quantizer import Quantized, Quantizer


def space_to_depth(images: Float[Array, "B H W C"], patch_size: int) -> Float[Array, "B h w P"]:
    """Folds p x p patches into channels, [B, H, W, C] -> [B, H/p, W/p, p*p*C]."""
    b, h, w, c = images.shape
    p = patch_size
    patches = images.reshape(b, h // p, p, w // p, p, c).transpose(0, 1, 3, 2, 4, 5)
    return patches.reshape(b, h // p, w // p, p * p * c)


def depth_to_space(patches: Float[Array, "B h w P"], patch_size: int) -> Float[Array, "B H W C"]:
    """Undoes `space_to_depth`."""
    b, h, w, folded = patches.shape
    p = patch_size
    c = folded // (p * p)
    images = patches.reshape(b, h, w, p, p, c).transpose(0, 1, 3, 2, 4, 5)
    return images.reshape(b, h * p, w * p, c)


class GroupNormSwish(nn.Module):
    """GroupNorm (32 groups, fewer where the width is not a multiple of 32; eps 1e-6), then swish if asked for."""

    swish: bool = True
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        x = nn.GroupNorm(num_groups=math.gcd(32, x.shape[-1]), epsilon=1e-6, dtype=self.dtype, name="norm")(x)
        return nn.swish(x) if self.swish else x


def conv(features: int, kernel: int, dtype: DTypeLike, name: str | None) -> nn.Conv:
    return nn.Conv(features, (kernel, kernel), padding=kernel // 2, dtype=dtype, name=name)


class ResidualBlock(nn.Module):
    """norm, swish, 3x3 convolution, twice; a 1x1 convolution on the shortcut where the width changes."""

    channels: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W D"]:
        h = GroupNormSwish(dtype=self.dtype, name="norm1")(x)
        h = conv(self.channels, 3, self.dtype, "conv1")(h)
        h = GroupNormSwish(dtype=self.dtype, name="norm2")(h)
        h = conv(self.channels, 3, self.dtype, "conv2")(h)
        if x.shape[-1] != self.channels:
            x = conv(self.channels, 1, self.dtype, "shortcut")(x)
        return x + h


class AttentionBlock(nn.Module):
    """Single-head self-attention over all positions of a feature map, with a residual connection."""

    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        b, h, w, c = x.shape
        normed = GroupNormSwish(swish=False, dtype=self.dtype, name="norm")(x)
        q, k, v = (conv(c, 1, self.dtype, name)(normed).reshape(b, h * w, 1, c) for name in ("q", "k", "v"))
        out = jax.nn.dot_product_attention(q, k, v).reshape(b, h, w, c)
        return x + conv(c, 1, self.dtype, "proj_out")(out)


class Encoder(nn.Module):
    """Images [B, H, W, 3] -> features [B, h, w, z_channels]."""

    channels: int
    channel_multipliers: Sequence[int]
    num_res_blocks: int
    z_channels: int
    patch_size: int
    attention: bool
    dtype: DTypeLike

    @nn.compact
    def __call__(self, images: Float[Array | np.ndarray, "B H W 3"]) -> Float[Array, "B h w Z"]:
        x = space_to_depth(jnp.asarray(images, self.dtype), self.patch_size)
        x = conv(self.channels, 3, self.dtype, "conv_in")(x)
        last = len(self.channel_multipliers) - 1
        for i, multiplier in enumerate(self.channel_multipliers):
            for j in range(self.num_res_blocks):
                x = ResidualBlock(self.channels * multiplier, self.dtype, name=f"level{i}_res{j}")(x)
                if i == last and self.attention:
                    x = AttentionBlock(self.dtype, name=f"level{i}_attn{j}")(x)
            if i != last:
                x = nn.Conv(
                    x.shape[-1],
                    (3, 3),
                    strides=2,
                    padding=((0, 1), (0, 1)),
                    dtype=self.dtype,
                    name=f"level{i}_downsample",
                )(x)
        x = middle(x, self.attention, self.dtype)
        x = GroupNormSwish(dtype=self.dtype, name="norm_out")(x)
        return conv(self.z_channels, 3, self.dtype, "conv_out")(x)


class PatchEncoder(nn.Module):
    """Images [B, H, W, 3] -> features [B, h, w, z_channels] of each patch by itself: two hidden layers on its pixels.

    Equal patches get equal codes, whatever is around them. On pictures with a flat background, where a convolutional
    encoder spends most of its codes on the background's surroundings, that leaves far less for a transformer to guess.
    """

    channels: int
    z_channels: int
    patch_size: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, images: Float[Array | np.ndarray, "B H W 3"]) -> Float[Array, "B h w Z"]:
        x = space_to_depth(jnp.asarray(images, self.dtype), self.patch_size)
        x = nn.swish(conv(self.channels, 1, self.dtype, "conv_in")(x))
        x = nn.swish(conv(self.channels, 1, self.dtype, "conv_mid")(x))
        return conv(self.z_channels, 1, self.dtype, "conv_out")(x)


class Decoder(nn.Module):
    """Features [B, h, w, z_channels] -> images [B, H, W, 3], unbounded."""

    channels: int
    channel_multipliers: Sequence[int]
    num_res_blocks: int
    patch_size: int
    attention: bool
    dtype: DTypeLike

    @nn.compact
    def __call__(self, features: Float[Array, "B h w Z"]) -> Float[Array, "B H W 3"]:
        last = len(self.channel_multipliers) - 1
        x = conv(self.channels * self.channel_multipliers[-1], 3, self.dtype, "conv_in")(features)
        x = middle(x, self.attention, self.dtype)
        for i in reversed(range(last + 1)):
            for j in range(self.num_res_blocks + 1):
                x = ResidualBlock(self.channels * self.channel_multipliers[i], self.dtype, name=f"level{i}_res{j}")(x)
                if i == last and self.attention:
                    x = AttentionBlock(self.dtype, name=f"level{i}_attn{j}")(x)
            if i != 0:
                x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
                x = conv(x.shape[-1], 3, self.dtype, f"level{i}_upsample")(x)
        x = GroupNormSwish(dtype=self.dtype, name="norm_out")(x)
        x = conv(3 * self.patch_size**2, 3, self.dtype, "conv_out")(x)
        return depth_to_space(x, self.patch_size)


def middle(x: Float[Array, "B H W C"], attention: bool, dtype: DTypeLike) -> Float[Array, "B H W C"]:
    """The blocks between encoder levels and bottleneck; names them in the module that calls it."""
    x = ResidualBlock(x.shape[-1], dtype, name="mid_res0")(x)
    if attention:
        x = AttentionBlock(dtype, name="mid_attn")(x)
    return ResidualBlock(x.shape[-1], dtype, name="mid_res1")(x)


class VQModel(nn.Module):
    """The tokenizer. Images are [B, H, W, 3] in [-1, 1]; codes are [B, h, w] int32 in [0, codebook_size).

    H and W must be multiples of `downsampling`. Fields are the arguments of LlamaGen's `VQModel`, plus
    `patch_size` (the stem), `local_encoder` (a `PatchEncoder` in place of LlamaGen's; one level only), `attention`
    (self-attention at the lowest resolution) and `dtype` (of the computation; parameters are float32).
    """

    channels: int
    channel_multipliers: Sequence[int]
    num_res_blocks: int
    z_channels: int
    codebook_size: int
    codebook_dim: int
    patch_size: int = 1
    local_encoder: bool = False
    attention: bool = True
    dtype: DTypeLike = jnp.float32

    @property
    def downsampling(self) -> int:
        """Pixels of an image's side for each code."""
        return self.patch_size * 2 ** (len(self.channel_multipliers) - 1)

    def setup(self):
        stem = {"channels": self.channels, "patch_size": self.patch_size, "dtype": self.dtype}
        levels = {
            "channel_multipliers": tuple(self.channel_multipliers),
            "num_res_blocks": self.num_res_blocks,
            "attention": self.attention,
        }
        if self.local_encoder:
            self.encoder = PatchEncoder(z_channels=self.z_channels, **stem)
        else:
            self.encoder = Encoder(z_channels=self.z_channels, **stem, **levels)
        self.decoder = Decoder(**stem, **levels)
        self.quantizer = Quantizer(self.codebook_size, self.codebook_dim)
        self.quant_conv = conv(self.codebook_dim, 1, self.dtype, None)
        self.post_quant_conv = conv(self.z_channels, 1, self.dtype, None)

    def features(self, images: Float[Array | np.ndarray, "B H W 3"]) -> Float[Array, "B h w d"]:
        """Encoder outputs before normalisation and look-up, float32."""
        return self.quant_conv(self.encoder(images)).astype(jnp.float32)

    def decode(self, vectors: Float[Array | np.ndarray, "B h w d"]) -> Float[Array, "B H W 3"]:
        """Images of code vectors; float32, not clipped."""
        return self.decoder(self.post_quant_conv(vectors.astype(self.dtype))).astype(jnp.float32)

    def encode(self, images: Float[Array | np.ndarray, "B H W 3"]) -> Int[Array, "B h w"]:
        """Codes [B, h, w] of images."""
        return self.quantizer(self.features(images)).codes

    def code_sides(self, resolution: int) -> tuple[int, ...]:
        """Sides of the squares of codes that an image of a resolution becomes: one."""
        return (resolution // self.downsampling,)

    def decode_positions(self, codes: Int[Array | np.ndarray, "B L"]) -> Float[Array, "B H W 3"]:
        """Images of the codes of all positions, in the order in which `encode` has them; as `decode_codes`."""
        side = math.isqrt(codes.shape[1])
        return self.decode_codes(codes.reshape(-1, side, side))

    def decode_codes(self, codes: Int[Array | np.ndarray, "B h w"]) -> Float[Array, "B H W 3"]:
        """Images of codes; float32, not clipped."""
        return self.decode(self.quantizer.lookup(codes))

    def __call__(
        self, images: Float[Array | np.ndarray, "B H W 3"], quantize: bool | Bool[Array, ""] = True
    ) -> tuple[Float[Array, "B H W 3"], Quantized]:
        """Reconstructions and what the quantizer returned for them.

        With `quantize` false the decoder sees the unit encoder outputs themselves.
        """
        quantized = self.quantizer(self.features(images))
        vectors = jnp.where(quantize, quantized.vectors, quantized.unit_encoded)
        return self.decode(vectors), quantized
