"""Attention that keeps no square of the length: scores are made block by block, and again in the backward pass.

Where it is causal, blocks of queries see only the keys up to their own end, so that the masked half costs little. Plain
matrix products for any backend; what the backward pass needs of the scores is one float32 a position and head.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from iar_jax.models.remat import KEPT


def attention_in_blocks(
    q: Float[Array, "B T H K"], k: Float[Array, "B T H2 K"], v: Float[Array, "B T H2 K"], block_size: int, causal: bool
) -> Float[Array, "B T H K"]:
    """softmax(q k^T / sqrt(K)) v over all positions, or (causal) those up to each one's own; scores in float32, result
    in q's dtype.

    H is a multiple of H2: consecutive query heads share a key-value head. Queries are taken in blocks of `block_size`.
    """
    group = q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(x, group, axis=2) if group > 1 else x for x in (k, v))
    q = q * q.shape[-1] ** -0.5
    return attend(*(x.swapaxes(1, 2) for x in (q, k, v)), block_size, causal).swapaxes(1, 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def attend(q, k, v, block_size, causal):
    """Heads lead: [B, H, T, K], q scaled."""
    return attend_forward(q, k, v, block_size, causal)[0]


def attend_forward(q, k, v, block_size, causal):
    outputs, log_normalisers = [], []
    for start, stop, seen in blocks(q.shape[2], block_size, causal):
        scores = scores_of(q, k, start, stop, causal)
        highest = jnp.max(scores, axis=-1, keepdims=True)
        weights = jnp.exp(scores - highest)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        mixed = product("bhts,bhsk->bhtk", weights.astype(v.dtype), v[:, :, :seen])
        outputs.append((mixed / total).astype(q.dtype))
        log_normalisers.append(highest + jnp.log(total))
    found = jnp.concatenate(outputs, axis=2), jnp.concatenate(log_normalisers, axis=2)
    output, log_normaliser = checkpoint_name(found, KEPT)
    return output, (q, k, v, output, log_normaliser)


def attend_backward(block_size, causal, saved, g):
    q, k, v, output, log_normalisers = saved
    # Each row of d(scores) is weights * (d(weights) - their mean), and that mean is the row's g . output.
    mean = jnp.sum(g.astype(jnp.float32) * output.astype(jnp.float32), axis=-1, keepdims=True)
    dq, dk, dv = [], [], []
    for start, stop, seen in blocks(q.shape[2], block_size, causal):
        rows = slice(start, stop)
        weights = jnp.exp(scores_of(q, k, start, stop, causal) - log_normalisers[:, :, rows])
        dweights = product("bhtk,bhsk->bhts", g[:, :, rows], v[:, :, :seen])
        dscores = (weights * (dweights - mean[:, :, rows])).astype(q.dtype)
        dv.append(product("bhts,bhtk->bhsk", weights.astype(g.dtype), g[:, :, rows]))
        dq.append(product("bhts,bhsk->bhtk", dscores, k[:, :, :seen]))
        dk.append(product("bhts,bhtk->bhsk", dscores, q[:, :, rows]))
    return (
        jnp.concatenate(dq, axis=2).astype(q.dtype),
        sum_of_prefixes(dk, k.shape[2]).astype(k.dtype),
        sum_of_prefixes(dv, v.shape[2]).astype(v.dtype),
    )


attend.defvjp(attend_forward, attend_backward)

product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def blocks(length: int, size: int, causal: bool) -> list[tuple[int, int, int]]:
    """(first query, end of the queries, end of the keys that they see) of each block."""
    ends = ((start, min(start + size, length)) for start in range(0, length, size))
    return [(start, stop, stop if causal else length) for start, stop in ends]


def scores_of(q, k, start: int, stop: int, causal: bool):
    """Scores of the queries start .. stop, float32: with all keys, or (causal) with those up to stop, -inf where a key
    comes later."""
    if not causal:
        return product("bhtk,bhsk->bhts", q[:, :, start:stop], k)
    scores = product("bhtk,bhsk->bhts", q[:, :, start:stop], k[:, :, :stop])
    return jnp.where(jnp.arange(stop) <= jnp.arange(start, stop)[:, None], scores, -math.inf)


def sum_of_prefixes(parts, length: int):
    """Sum of arrays that cover the positions from 0 on, each a little further than the last."""
    return functools.reduce(
        jnp.add, (jnp.pad(part, [(0, 0), (0, 0), (0, length - part.shape[2]), (0, 0)]) for part in parts)
    )
