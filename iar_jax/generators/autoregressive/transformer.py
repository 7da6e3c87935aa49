"""The class-conditional decoder-only transformer of LlamaGen.

The input is the class token followed by the codes but the last; logits at position t predict code t. Weights keep
LlamaGen's quirks: the class token's rotary entry is zero, RMSNorm works in float32 and casts before its weight, the
hidden width is rounded up to a multiple of 256, the head starts at zero.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from iar_jax.models.attention import attend
from iar_jax.models.layers import Dropout, FeedForward, RMSNorm, from_heads, partitioned, scanned, to_heads
from iar_jax.models.remat import KEPT
from iar_jax.models.rope import rope_table


class Attention(nn.Module):
    """Causal self-attention with fused projections and rotary embedding.

    The heads come in groups, one for each key-value head: its query heads, then its key, then its value.
    """

    num_heads: int
    num_kv_heads: int
    kind: str
    block_size: int
    init_std: float
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "B L D"], rope: Float[Array, "L half 2"]) -> Float[Array, "B L D"]:
        dim = x.shape[-1]
        head_dim = dim // self.num_heads
        init = nn.initializers.normal(self.init_std)
        group = self.num_heads // self.num_kv_heads
        wqkv = self.param(
            "wqkv",
            partitioned(init, "embed", "heads", "qkv", "head_dim"),
            (dim, self.num_kv_heads, group + 2, head_dim),
        )
        wo = self.param("wo", partitioned(init, "heads", "head_dim", "embed"), (self.num_heads, head_dim, dim))
        q, k, v = (
            to_heads(x, part, self.dtype).reshape(*x.shape[:2], -1, head_dim)
            for part in (wqkv[:, :, :group], wqkv[:, :, group], wqkv[:, :, group + 1])
        )
        return from_heads(attend(self.kind, q, k, v, rope, self.block_size, causal=True), wo, self.dtype)


class Block(nn.Module):
    """One pre-norm layer, as a step of the scan over layers."""

    num_heads: int
    num_kv_heads: int
    hidden_dim: int
    norm_eps: float
    attention_kind: str
    attention_block: int
    init_std: float
    residual_dropout_rate: float
    ffn_dropout_rate: float
    drop_path_rate: float
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "B L D"], rope: Float[Array, "L half 2"]) -> tuple[Float[Array, "B L D"], None]:
        x = nn.with_logical_constraint(x, ("batch", None, None))
        normed = RMSNorm(self.norm_eps, self.dtype, name="attention_norm")(x)
        out = Attention(
            self.num_heads,
            self.num_kv_heads,
            self.attention_kind,
            self.attention_block,
            self.init_std,
            self.dtype,
            name="attention",
        )(normed, rope)
        x = checkpoint_name(x + self.residual(out, self.residual_dropout_rate), KEPT)
        normed = RMSNorm(self.norm_eps, self.dtype, name="ffn_norm")(x)
        out = FeedForward(self.hidden_dim, nn.initializers.normal(self.init_std), self.dtype, name="feed_forward")(
            normed
        )
        return x + self.residual(out, self.ffn_dropout_rate), None

    def residual(self, x, dropout_rate):
        return Dropout(self.drop_path_rate, shared_axes=(1, 2))(Dropout(dropout_rate)(x))


class Transformer(nn.Module):
    """Class label and codes to logits over the codebook.

    Deterministic unless applied with a "dropout" key; with one, all dropouts and the class dropout are on.

    Attributes:
        vocab_size: N, number of codes.
        num_classes: labels are in [0, num_classes]; num_classes itself is the null class of guidance.
        grid_size: side of the square of codes; L = grid_size ** 2.
        dim, num_layers, num_heads: width, depth, attention heads.
        hidden_dim: of the feed-forward blocks; `swiglu_hidden_dim(dim)` is LlamaGen's.
        num_kv_heads: heads of keys and values, a divisor of num_heads; None is one for each head, as in all published
            models.
        init_std: standard deviation of all initial weights but the head's zeros; 0.02 is LlamaGen's, and too small
            for narrow models, which want about dim ** -0.5.
        dtype: of activations and matrix products; parameters are float32.
        remat: what the backward pass recomputes, a key of REMAT_POLICIES; with "none" no product.
        attention: a key of `models.attention.ATTENTIONS`.
        attention_block: queries that attention takes together.
        scan_unroll: layers unrolled in one step of the layer scan; 0 is all. Parameters are stacked
            over layers either way.
    """

    vocab_size: int
    num_classes: int
    grid_size: int
    dim: int
    num_layers: int
    num_heads: int
    hidden_dim: int
    num_kv_heads: int | None = None
    norm_eps: float = 1e-5
    rope_base: float = 10000.0
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

    def setup(self):
        init = nn.initializers.normal(self.init_std)
        self.class_table = self.param(
            "class_table", partitioned(init, "classes", "embed"), (self.num_classes + 1, self.dim)
        )
        self.token_table = self.param("token_table", partitioned(init, "vocab", "embed"), (self.vocab_size, self.dim))
        self.layers = scanned(
            Block,
            num_layers=self.num_layers,
            unroll=self.scan_unroll,
            remat=self.remat,
            **self.block_fields(),
        )
        self.norm = RMSNorm(self.norm_eps, self.dtype)
        self.head = self.param(
            "head", partitioned(nn.initializers.zeros, "embed", "vocab"), (self.dim, self.vocab_size)
        )
        self.token_dropout = Dropout(self.token_dropout_rate)

    def block_fields(self) -> dict:
        """Fields of the `Block`s of this model."""
        return {
            "num_heads": self.num_heads,
            "num_kv_heads": self.num_kv_heads or self.num_heads,
            "hidden_dim": self.hidden_dim,
            "norm_eps": self.norm_eps,
            "attention_kind": self.attention,
            "attention_block": self.attention_block,
            "init_std": self.init_std,
            "residual_dropout_rate": self.residual_dropout_rate,
            "ffn_dropout_rate": self.ffn_dropout_rate,
            "drop_path_rate": self.drop_path_rate,
            "dtype": self.dtype,
        }

    def rope(self) -> Float[Array, "L half 2"]:
        """The rotary table of the input positions 0 .. L - 1 (the last code is never an input)."""
        table = rope_table(self.grid_size, self.dim // self.num_heads, self.rope_base)
        return jnp.asarray(table[: self.num_tokens])

    def embed_labels(self, labels: Int[Array | np.ndarray, " B"]) -> Float[Array, "B 1 D"]:
        # Gathered along the width before the look-up, which cannot be split along it and over the batch at once.
        table = nn.with_logical_constraint(jnp.asarray(self.class_table, self.dtype), (None, None))
        return nn.with_logical_constraint(table[labels][:, None], ("batch", None, None))

    def embed_codes(self, codes: Int[Array | np.ndarray, "B T"]) -> Float[Array, "B T D"]:
        table = nn.with_logical_constraint(jnp.asarray(self.token_table, self.dtype), ("vocab", None))
        return nn.with_logical_constraint(table[codes], ("batch", None, None))

    def __call__(
        self, labels: Int[Array | np.ndarray, " B"], codes: Int[Array | np.ndarray, "B L"]
    ) -> Float[Array, "B L V"]:
        """Logits [B, L, V]; position t predicts codes[:, t] from the label and codes[:, :t]."""
        logits = self.hidden(labels, codes) @ self.head.astype(self.dtype)
        return nn.with_logical_constraint(logits, ("batch", None, "vocab"))

    def hidden(
        self, labels: Int[Array | np.ndarray, " B"], codes: Int[Array | np.ndarray, "B L"]
    ) -> Float[Array, "B L D"]:
        """What the head is applied to, after the final norm; in the model's dtype."""
        return self.normed(self.through(self.embedded(labels, codes)))

    def embedded(
        self, labels: Int[Array | np.ndarray, " B"], codes: Int[Array | np.ndarray, "B L"]
    ) -> Float[Array, "B L D"]:
        """What the first layer takes: the class and the codes but the last."""
        if self.class_dropout_rate > 0.0 and self.has_rng("dropout"):
            dropped = jax.random.bernoulli(self.make_rng("dropout"), self.class_dropout_rate, labels.shape)
            labels = jnp.where(dropped, self.null_class, labels)
        x = jnp.concatenate([self.embed_labels(labels), self.embed_codes(codes[:, :-1])], axis=1)
        return self.token_dropout(nn.with_logical_constraint(x, ("batch", None, None)))

    def through(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        """All layers."""
        x, _ = self.layers(x, self.rope())
        return x

    def normed(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        """The final norm."""
        return nn.with_logical_constraint(self.norm(x), ("batch", None, None))
