"""Attention of one query to a cache of keys and values, as a kernel for TPUs that reads the cache once.

A row's queries stand in a matrix [heads, all heads' dimensions] whose other entries are zero: scores of all heads are
then one product with the keys as they lie, and so are the mixed values, of which each head's own part counts. XLA would
write both out, several times the size of what is wanted.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from iar_jax.models.attention_fused import HIDDEN, LANES, product
from iar_jax.runtime import sharding

# Rows whose keys and values are on the chip together, twice, for the next ones come while these are worked on.
ROOM = 12 * 2**20
LARGEST_BLOCK = 8
HEADS_MULTIPLE = 16  # rows of a tile of bfloat16


def attend(
    q: Float[Array, "B H_K"],
    keys: Float[Array, "B T H_K"],
    values: Float[Array, "B T H_K"],
    position: Int[Array, ""],
    head_dim: int,
) -> tuple[Float[Array, "B H_K"], Float[Array, "B H"]]:
    """softmax(q k^T) v over the positions up to `position`, in q's dtype, and each head's weight of the first position.

    Scores and sums are float32. Off TPUs the kernel is interpreted.

    Args:
        q: scaled.
    """
    batch, length, width = keys.shape
    num_heads = width // head_dim
    lines = -(-num_heads // HEADS_MULTIPLE) * HEADS_MULTIPLE
    rows = next(
        n
        for n in (LARGEST_BLOCK, 4, 2, 1)
        if batch % n == 0 and (n == 1 or 4 * n * length * width * keys.dtype.itemsize <= ROOM)
    )
    whole = pl.BlockSpec((rows, length, width), lambda i, position: (i, 0, 0))
    line = pl.BlockSpec((rows, 1, width), lambda i, position: (i, 0, 0))
    first = pl.BlockSpec((rows, lines, LANES), lambda i, position: (i, 0, 0))
    out, to_first = pl.pallas_call(
        functools.partial(kernel, head_dim=head_dim, lines=lines),
        name="decode_attention",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1, grid=(batch // rows,), in_specs=[line, whole, whole], out_specs=[line, first]
        ),
        out_shape=[
            jax.ShapeDtypeStruct((batch, 1, width), q.dtype),
            jax.ShapeDtypeStruct((batch, lines, LANES), jnp.float32),
        ],
        cost_estimate=pl.CostEstimate(
            flops=4 * batch * lines * length * width,
            transcendentals=batch * num_heads * length,
            bytes_accessed=2 * keys.size * keys.dtype.itemsize,
        ),
        interpret=sharding.platform() != "tpu",
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
    )(position[None], q[:, None], keys, values)
    return out[:, 0], to_first[:, :num_heads, 0]


def kernel(position, q, keys, values, out, to_first, *, head_dim: int, lines: int):
    rows, length, width = keys.shape
    head = jax.lax.broadcasted_iota(jnp.int32, (lines, width), 0)
    own = jax.lax.broadcasted_iota(jnp.int32, (lines, width), 1) // head_dim == head
    so_far = jax.lax.broadcasted_iota(jnp.int32, (lines, length), 1) <= position[0]
    for row in range(rows):
        # Chosen among in float32, whose tiles a mask's are like.
        queries = jnp.where(own, jnp.broadcast_to(q[row].astype(jnp.float32), (lines, width)), 0.0).astype(q.dtype)
        scores = jnp.where(so_far, product(queries, keys[row], (1, 1)), HIDDEN)
        weights = jnp.exp(scores - jnp.max(scores, axis=1, keepdims=True))
        total = jnp.sum(weights, axis=1, keepdims=True)
        mixed = product(weights.astype(values.dtype), values[row], (1, 0)) / total
        out[row] = jnp.sum(jnp.where(own, mixed, 0.0), axis=0, keepdims=True).astype(out.dtype)
        to_first[row] = jnp.broadcast_to((weights / total)[:, :1], (lines, LANES))
