"""Rotary embedding and attention in one kernel for TPUs, on heads as the projections leave them.

XLA would turn queries and keys, and move heads before positions, by passes over memory that cost more than attention
itself where heads are narrower than the 128 numbers of a vector's row: a kernel that wants heads first gets them padded
to twice their size. This one takes [positions, 128] at a time: two heads of 64 beside each other, or one of 128. All
keys of a row are on the chip together, so nothing of the scores is kept, and the backward pass makes them again; it
needs q, k, v and the gradient alone.

A head's scores come from products over all 128 numbers, with the other head's queries set to zero: a matrix unit does
128 at a time anyway.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from iar_jax.models.attention_blocks import blocks
from iar_jax.models.rope import turning_tables
from iar_jax.runtime import sharding

LANES = 128
HIDDEN = -1e30  # a score that has no weight; an infinity would make NaNs of its difference
LONGEST = 1024  # positions whose keys, values and blocks of scores fit on the chip


def attend(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H2 K"],
    v: Float[Array, "B T H2 K"],
    rope: Float[Array, "T half 2"] | None,
    block_size: int,
    causal: bool,
) -> Float[Array, "B T H K"]:
    """Attention of queries and keys that are not turned yet; off TPUs the kernel is interpreted.

    Heads are padded with zeros to a divisor or a multiple of 128 dimensions (3B's have 100), and their number to fill
    the last 128. Queries are taken `block_size` at a time, with all keys or (causal) those up to their own end.
    """
    batch, length, num_heads, head_dim = q.shape
    group = num_heads // k.shape[2]
    k, v = (jnp.repeat(x, group, axis=2) if group > 1 else x for x in (k, v))
    wide = next((n for n in (16, 32, 64, LANES) if n >= head_dim), -(-head_dim // LANES) * LANES)
    heads_together = max(1, LANES // wide)
    padding = ((0, 0), (0, 0), (0, -num_heads % heads_together), (0, wide - head_dim))
    columns = [jnp.pad(x, padding).reshape(batch, length, -1) for x in (q, k, v)]
    if rope is None:  # angles of zero
        rope = jnp.stack([jnp.ones((length, wide // 2)), jnp.zeros((length, wide // 2))], axis=-1)
    else:
        rope = jnp.pad(rope, ((0, 0), (0, (wide - head_dim) // 2), (0, 0)))
    cos, sin = turning_tables(rope, heads_together)
    static = Static(wide, head_dim**-0.5, block_size, causal, sharding.platform() != "tpu")
    out = rotary_attention(*columns, cos, sin, static)
    return out.reshape(batch, length, -1, wide)[:, :, :num_heads, :head_dim]


class Static(NamedTuple):
    """What a kernel is compiled for."""

    head_dim: int
    scale: float
    block_size: int
    causal: bool
    interpret: bool


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def rotary_attention(q, k, v, cos, sin, static):
    """[B, T, heads beside each other], turned and attended to."""
    return run(forward_kernel, static, cos, sin, q, k, v, products=2, outputs=1)[0]


def forward(q, k, v, cos, sin, static):
    return rotary_attention(q, k, v, cos, sin, static), (q, k, v, cos, sin)


def backward(static, saved, gradient):
    q, k, v, cos, sin = saved
    return *run(backward_kernel, static, cos, sin, q, k, v, gradient, products=5, outputs=3), None, None


rotary_attention.defvjp(forward, backward)


def run(kernel, static: Static, cos, sin, *arrays, products: int, outputs: int):
    """A kernel for each row and each group of heads that fills 128 columns."""
    batch, length, width = arrays[0].shape
    columns = cos.shape[1]
    one = pl.BlockSpec((1, length, columns), lambda row, group: (row, 0, group))
    table = pl.BlockSpec((length, columns), lambda row, group: (0, 0))
    heads = batch * width // static.head_dim
    scores = heads * sum(
        (stop - start) * seen for start, stop, seen in blocks(length, static.block_size, static.causal)
    )
    cost = pl.CostEstimate(
        flops=2 * products * scores * columns,
        transcendentals=scores,
        bytes_accessed=(len(arrays) + outputs) * arrays[0].size * arrays[0].dtype.itemsize,
    )
    return pl.pallas_call(
        functools.partial(kernel, static=static),
        name=f"rotary_attention_{kernel.__name__.removesuffix('_kernel')}",
        grid=(batch, width // columns),
        in_specs=[table, table, *[one] * len(arrays)],
        out_specs=[one] * outputs,
        out_shape=[jax.ShapeDtypeStruct(arrays[0].shape, arrays[0].dtype)] * outputs,
        cost_estimate=cost,
        interpret=static.interpret,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
    )(cos, sin, *arrays)


def forward_kernel(cos, sin, q, k, v, out, *, static: Static):
    turned_q, turned_k = turned_pair(q[0], k[0], cos[...], sin[...], static)
    values = v[0]
    for start, stop, seen in blocks(values.shape[0], static.block_size, static.causal):
        rows = turned_q[start:stop]
        mixed = jnp.zeros(rows.shape, jnp.float32)
        for own in heads_of(rows.shape, static.head_dim):
            weights, total = weights_of(only(own, rows), turned_k[:seen], start, static.causal)
            mixed = jnp.where(own, product(weights.astype(values.dtype), values[:seen], (1, 0)) / total, mixed)
        out[0, start:stop] = mixed.astype(out.dtype)


def backward_kernel(cos, sin, q, k, v, gradient, dq, dk, dv, *, static: Static):
    turned_q, turned_k = turned_pair(q[0], k[0], cos[...], sin[...], static)
    values, g, dtype = v[0], gradient[0], q.dtype
    length, columns = values.shape
    dkeys = dvalues = jnp.zeros((length, columns), jnp.float32)
    for start, stop, seen in reversed(blocks(length, static.block_size, static.causal)):
        rows, g_rows = turned_q[start:stop], g[start:stop]
        dqueries = jnp.zeros(rows.shape, jnp.float32)
        dkeys_here = dvalues_here = jnp.zeros((seen, columns), jnp.float32)
        for own in heads_of(rows.shape, static.head_dim):
            own_rows, own_g = only(own, rows), only(own, g_rows)
            weights, total = weights_of(own_rows, turned_k[:seen], start, static.causal)
            weights = weights / total
            dweights = product(own_g, values[:seen], (1, 1))
            mean = jnp.sum(weights * dweights, axis=1, keepdims=True)
            dscores = (weights * (dweights - mean)).astype(dtype)
            dvalues_here += product(weights.astype(dtype), own_g, (0, 0))
            dkeys_here += product(dscores, own_rows, (0, 0))
            dqueries = jnp.where(own, product(dscores, turned_k[:seen], (1, 0)), dqueries)
        dq[0, start:stop] = turned(dqueries * static.scale, cos[start:stop], -sin[start:stop]).astype(dtype)
        later = ((0, length - seen), (0, 0))
        dkeys, dvalues = dkeys + jnp.pad(dkeys_here, later), dvalues + jnp.pad(dvalues_here, later)
    dk[0] = turned(dkeys, cos[...], -sin[...]).astype(dtype)
    dv[0] = dvalues.astype(dtype)


def turned_pair(q, k, cos, sin, static: Static):
    """Queries, scaled, and keys, as the products take them."""
    return (turned(q, cos, sin) * static.scale).astype(q.dtype), turned(k, cos, sin).astype(k.dtype)


def turned(x, cos, sin):
    """As `rope.apply_rope`, of [T, columns]; -sin turns back. float32."""
    x = x.astype(jnp.float32)
    even = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1) % 2 == 0
    partner = jnp.where(even, pltpu.roll(x, x.shape[1] - 1, 1), pltpu.roll(x, 1, 1))
    return x * cos + partner * sin


def heads_of(shape, head_dim: int) -> list[Array]:
    """For each head, where its columns are."""
    column = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    return [column // head_dim == head for head in range(shape[1] // head_dim)]


def only(own, x):
    return jnp.where(own, x, jnp.zeros_like(x))


def weights_of(queries, keys, start: int, causal: bool):
    """exp(scores - their highest), and their sums, of the queries from `start` on with these keys."""
    scores = product(queries, keys, (1, 1))
    if causal:
        query = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 0) + start
        scores = jnp.where(jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1) <= query, scores, HIDDEN)
    weights = jnp.exp(scores - jnp.max(scores, axis=1, keepdims=True))
    return weights, jnp.sum(weights, axis=1, keepdims=True)


def product(a, b, contracted: tuple[int, int]):
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    axes = (((contracted[0],), (contracted[1],)), ((), ()))
    return jax.lax.dot_general(a, b, axes, precision=precision, preferred_element_type=jnp.float32)
