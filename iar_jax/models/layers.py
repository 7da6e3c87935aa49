"""What the layers of all transformers are made of."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from iar_jax.models.remat import KEPT, REMAT_POLICIES


def swiglu_hidden_dim(dim: int) -> int:
    """Hidden width of the feed-forward block: two thirds of 4 * dim, up to a multiple of 256."""
    return -(-int(2 * 4 * dim / 3) // 256) * 256


def partitioned(init, *axes: str | None):
    return nn.with_logical_partitioning(init, axes)


def normed(x: Float[Array, "B L D"], epsilon: float) -> Float[Array, "B L D"]:
    """x / rms(x), in float32."""
    x32 = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + epsilon)
    return x32 * checkpoint_name(inverse, KEPT)


def to_heads(x: Float[Array, "B L D"], weights: Float[Array, "D ..."], dtype: DTypeLike) -> Float[Array, "B L W"]:
    """What a projection makes of x, heads side by side.

    The weights are a plain matrix, and behind a barrier, so that their gradient is one too and needs no transposed
    copies of activations; heads lead, so a split over them stays one. The product is kept as it leaves the matrix unit:
    TPUs would pad narrow heads.
    """
    matrix = jax.lax.optimization_barrier(weights.astype(dtype).reshape(x.shape[-1], -1))
    out = (x.reshape(-1, x.shape[-1]) @ matrix).reshape(*x.shape[:2], -1)
    return checkpoint_name(nn.with_logical_constraint(out, ("batch", None, "heads")), KEPT)


def from_heads(
    mixed: Float[Array, "B L H K"], weights: Float[Array, "H K D"], dtype: DTypeLike
) -> Float[Array, "B L D"]:
    """The projection behind attention."""
    out = mixed.reshape(*mixed.shape[:2], -1)
    out = checkpoint_name(nn.with_logical_constraint(out, ("batch", None, "heads")), KEPT)
    matrix = jax.lax.optimization_barrier(weights.astype(dtype).reshape(-1, weights.shape[-1]))
    return (out.reshape(-1, out.shape[-1]) @ matrix).reshape(*out.shape[:2], -1)


def scanned(block: type[nn.Module], *, num_layers: int, unroll: int, remat: str, **fields: Any) -> nn.Module:
    """Layers that are stacked in one tree of parameters, and run one after the other.

    Args:
        block: (x, what all layers share) -> (x, None).
        unroll: layers compiled as one step of the scan; 0 is all.
        remat: what the backward pass recomputes, a key of REMAT_POLICIES.
        fields: of `block`.
    """
    return nn.scan(
        nn.remat(block, prevent_cse=False, policy=REMAT_POLICIES[remat]),
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=nn.broadcast,
        length=num_layers,
        unroll=unroll or num_layers,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )(**fields)


class RMSNorm(nn.Module):
    """x / rms(x) in float32, cast back, times a weight."""

    epsilon: float
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        weight = self.param("weight", partitioned(nn.initializers.ones, "norm"), (x.shape[-1],))
        return normed(x, self.epsilon).astype(self.dtype) * weight.astype(self.dtype)


class Dropout(nn.Module):
    """Dropout that is on where a "dropout" key is given and the rate is above zero.

    `shared_axes` share one draw: (1, 2) drops whole rows, which is drop-path. Draws have 16 bits, two from each random
    word, for the words are what dropout costs; the rate is off by 2 ** -17 at most, and the scale is that of the rate
    drawn.
    """

    rate: float
    shared_axes: tuple[int, ...] = ()

    @nn.compact
    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        if self.rate == 0.0 or not self.has_rng("dropout"):
            return x
        batch, length, dim = (1 if axis in self.shared_axes else size for axis, size in enumerate(x.shape))
        words = jax.random.bits(self.make_rng("dropout"), (batch, -(-length // 2), dim), jnp.uint32)
        draws = jnp.concatenate([words & 0xFFFF, words >> 16], axis=1)[:, :length]
        dropped = round(self.rate * 2**16)
        stays = checkpoint_name(draws >= dropped, KEPT)
        return jnp.where(stays, x * (2**16 / (2**16 - dropped)), 0.0).astype(x.dtype)


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x); w1 and w3 are one array [D, 2, F]. Dropout, where there is any, is of what w2
    takes."""

    hidden_dim: int
    initial: nn.initializers.Initializer
    dtype: DTypeLike
    dropout_rate: float = 0.0

    @nn.compact
    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        dim = x.shape[-1]
        w13 = self.param("w13", partitioned(self.initial, "embed", "gate", "hidden"), (dim, 2, self.hidden_dim))
        w2 = self.param("w2", partitioned(self.initial, "hidden", "embed"), (self.hidden_dim, dim))
        tokens = x.reshape(-1, dim)

        def half(weights):
            out = nn.with_logical_constraint(tokens @ weights.astype(self.dtype), ("batch", "hidden"))
            return checkpoint_name(out, KEPT)

        hidden = nn.silu(half(w13[:, 0])) * half(w13[:, 1])
        if self.dropout_rate:
            hidden = Dropout(self.dropout_rate)(hidden.reshape(*x.shape[:2], -1)).reshape(hidden.shape)
        return (hidden @ w2.astype(self.dtype)).reshape(x.shape)
