"""The class-conditional masked transformer of Halton-MaskGIT, which was trained on LlamaGen's codes.

The input is all codes of a picture, some of them masked; logits at a position are of its own code. The label acts
through shifts, scales and gates of every layer (AdaLN), queries and keys are normed over the whole width before they
are split into heads, and the head is the table of codes. Registers are positions that are no code; they come last.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from iar_jax.models.attention import attend
from iar_jax.models.layers import (
    Dropout,
    FeedForward,
    RMSNorm,
    from_heads,
    normed,
    partitioned,
    scanned,
    to_heads,
)
from iar_jax.models.remat import KEPT

EPSILON = 1e-5


def matrices(in_axes: Sequence[int] = (0,), out_axes: Sequence[int] = (-1,)) -> nn.initializers.Initializer:
    """Glorot's uniform draw, for a matrix whose rows and columns are some axes of an array."""
    return nn.initializers.variance_scaling(1.0, "fan_avg", "uniform", in_axis=in_axes, out_axis=out_axes)


class Modulation(nn.Module):
    """Vectors [B, parts, D] of each picture, from a linear layer on silu(condition)."""

    parts: int
    initial: nn.initializers.Initializer
    dtype: DTypeLike

    @nn.compact
    def __call__(self, condition: Float[Array, "B D"]) -> Float[Array, "B parts D"]:
        dim = condition.shape[-1]
        kernel = self.param("kernel", partitioned(self.initial, "embed", None, None), (dim, self.parts, dim))
        bias = self.param("bias", partitioned(nn.initializers.zeros, None, None), (self.parts, dim))
        out = jnp.einsum("bd,dpe->bpe", nn.silu(condition), kernel.astype(self.dtype)) + bias.astype(self.dtype)
        return nn.with_logical_constraint(out, ("batch", None, None))


class Attention(nn.Module):
    """Self-attention of all positions with all."""

    num_heads: int
    kind: str
    block_size: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        dim = x.shape[-1]
        # Where heads do not divide the width, the published networks leave the rest out.
        head_dim = dim // self.num_heads
        qkv = partitioned(matrices((0,), (1, 3)), "embed", "heads", "qkv", "head_dim")
        wqkv = self.param("wqkv", qkv, (dim, self.num_heads, 3, head_dim))
        out = partitioned(matrices((0, 1), (2,)), "heads", "head_dim", "embed")
        wo = self.param("wo", out, (self.num_heads, head_dim, dim))
        q, k, v = (to_heads(x, wqkv[:, :, i], self.dtype) for i in range(3))
        q, k = (normed(part, EPSILON).astype(self.dtype) for part in (q, k))
        q, k, v = (part.reshape(*x.shape[:2], -1, head_dim) for part in (q, k, v))
        return from_heads(attend(self.kind, q, k, v, None, self.block_size, causal=False), wo, self.dtype)


class Block(nn.Module):
    """One layer, as a step of the scan over layers."""

    num_heads: int
    hidden_dim: int
    attention_kind: str
    attention_block: int
    residual_dropout_rate: float
    ffn_dropout_rate: float
    drop_path_rate: float
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], condition: Float[Array, "B D"]) -> tuple[Float[Array, "B T D"], None]:
        x = nn.with_logical_constraint(x, ("batch", None, None))
        vectors = Modulation(6, nn.initializers.zeros, self.dtype, name="modulation")(condition)
        shift1, scale1, gate1, shift2, scale2, gate2 = (vectors[:, i, None] for i in range(6))
        inside = RMSNorm(EPSILON, self.dtype, name="attention_norm")(x) * (1 + scale1) + shift1
        out = Attention(self.num_heads, self.attention_kind, self.attention_block, self.dtype, name="attention")(inside)
        x = checkpoint_name(x + gate1 * self.left_out(Dropout(self.residual_dropout_rate)(out)), KEPT)
        inside = RMSNorm(EPSILON, self.dtype, name="ffn_norm")(x) * (1 + scale2) + shift2
        out = FeedForward(self.hidden_dim, matrices(), self.dtype, self.ffn_dropout_rate, name="feed_forward")(inside)
        return x + gate2 * self.left_out(out), None

    def left_out(self, x):
        return Dropout(self.drop_path_rate, shared_axes=(1, 2))(x)


class MaskedTransformer(nn.Module):
    """Class label and codes, some of them masked, to logits over the codebook.

    Deterministic unless applied with a "dropout" key; with one, all dropouts and the class dropout are on.

    Attributes:
        vocab_size: N, number of codes; N itself is the mask.
        num_classes: labels are in [0, num_classes]; num_classes itself is the null class of guidance.
        grid_size: side of the square of codes; L = grid_size ** 2.
        dim, num_layers, num_heads, hidden_dim: as the autoregressive transformer's.
        num_registers: positions behind the codes that are none.
        mask_output: the mask is a class of the head too, as in the published weights.
        init_std: standard deviation of the initial tables; matrices are drawn by Glorot's rule, and the layers' shifts,
            scales and gates begin at zero.
        residual_dropout_rate, ffn_dropout_rate: behind attention, and inside of the feed-forward block.
        dtype, remat, attention, attention_block, scan_unroll: as the autoregressive transformer's.
    """

    vocab_size: int
    num_classes: int
    grid_size: int
    dim: int
    num_layers: int
    num_heads: int
    hidden_dim: int
    num_registers: int = 1
    mask_output: bool = False
    init_std: float = 0.02
    token_dropout_rate: float = 0.0
    residual_dropout_rate: float = 0.0
    ffn_dropout_rate: float = 0.0
    drop_path_rate: float = 0.0
    class_dropout_rate: float = 0.0
    dtype: DTypeLike = jnp.float32
    remat: str = "none"
    attention: str = "auto"
    attention_block: int = 128
    scan_unroll: int = 1

    @property
    def num_tokens(self) -> int:
        return self.grid_size**2

    @property
    def null_class(self) -> int:
        return self.num_classes

    @property
    def mask(self) -> int:
        return self.vocab_size

    def setup(self):
        init = nn.initializers.normal(self.init_std)

        def table(name, rows, *axes):
            return self.param(name, partitioned(init, *axes), (rows, self.dim))

        self.class_table = table("class_table", self.num_classes + 1, "classes", "embed")
        self.token_table = table("token_table", self.vocab_size, "vocab", "embed")
        self.mask_vector = table("mask_vector", 1, None, "embed")
        self.position_table = table("position_table", self.num_tokens, None, "embed")
        self.register_table = table("register_table", self.num_registers, None, "embed")
        self.layers = scanned(
            Block,
            num_layers=self.num_layers,
            unroll=self.scan_unroll,
            remat=self.remat,
            num_heads=self.num_heads,
            hidden_dim=self.hidden_dim,
            attention_kind=self.attention,
            attention_block=self.attention_block,
            residual_dropout_rate=self.residual_dropout_rate,
            ffn_dropout_rate=self.ffn_dropout_rate,
            drop_path_rate=self.drop_path_rate,
            dtype=self.dtype,
        )
        self.norm = RMSNorm(EPSILON, self.dtype)
        self.norm_bias = self.param("norm_bias", partitioned(nn.initializers.zeros, "norm"), (self.dim,))
        self.modulation = Modulation(2, matrices((0,), (1, 2)), self.dtype)
        self.head_bias = self.param("head_bias", partitioned(nn.initializers.zeros, "vocab"), (self.vocab_size,))
        if self.mask_output:
            self.mask_bias = self.param("mask_bias", partitioned(nn.initializers.zeros, None), (1,))
        self.token_dropout = Dropout(self.token_dropout_rate)

    def __call__(
        self, labels: Int[Array | np.ndarray, " B"], masked_codes: Int[Array | np.ndarray, "B L"]
    ) -> Float[Array, "B L V"]:
        """Logits of each position's code; the mask's come last, where it is an output."""
        return self.logits(self.hidden(labels, masked_codes))

    def hidden(
        self, labels: Int[Array | np.ndarray, " B"], masked_codes: Int[Array | np.ndarray, "B L"]
    ) -> Float[Array, "B L D"]:
        """What the head is applied to, after the final norm; in the model's dtype.

        Args:
            masked_codes: rearranged ids, or `mask`.
        """
        labels, masked_codes = jnp.asarray(labels), jnp.asarray(masked_codes)
        if self.class_dropout_rate > 0.0 and self.has_rng("dropout"):
            dropped = jax.random.bernoulli(self.make_rng("dropout"), self.class_dropout_rate, labels.shape)
            labels = jnp.where(dropped, self.null_class, labels)
        # Gathered along the width before the look-ups, which cannot be split along it and over the batch at once.
        classes, codes = (
            nn.with_logical_constraint(jnp.asarray(table, self.dtype), (rows, None))
            for table, rows in ((self.class_table, None), (self.token_table, "vocab"))
        )
        condition = nn.with_logical_constraint(classes[labels], ("batch", None))
        known = codes[jnp.minimum(masked_codes, self.vocab_size - 1)]
        mask_vector = jnp.asarray(self.mask_vector[0], self.dtype)
        x = jnp.where(masked_codes[..., None] == self.mask, mask_vector, known)
        x = self.token_dropout(x + jnp.asarray(self.position_table, self.dtype))
        registers = jnp.asarray(self.register_table, self.dtype)
        x = jnp.concatenate([x, jnp.broadcast_to(registers, (x.shape[0], *registers.shape))], axis=1)
        x, _ = self.layers(nn.with_logical_constraint(x, ("batch", None, None)), condition)
        shift, scale = (part[:, None] for part in jnp.unstack(self.modulation(condition), axis=1))
        x = self.norm(x[:, : self.num_tokens]) + self.norm_bias.astype(self.dtype)
        return nn.with_logical_constraint(x * (1 + scale) + shift, ("batch", None, None))

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """The head on some positions."""
        logits = hidden @ self.token_table.astype(self.dtype).T + self.head_bias.astype(self.dtype)
        logits = nn.with_logical_constraint(logits, ("batch", None, "vocab"))
        if not self.mask_output:
            return logits
        return jnp.concatenate([logits, self.mask_logits(hidden)[..., None].astype(self.dtype)], axis=-1)

    def mask_logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T"]:
        """Of the mask, where it is an output; float32."""
        products = jnp.einsum("btd,d->bt", hidden, self.mask_vector[0].astype(self.dtype))
        return products.astype(jnp.float32) + self.mask_bias
