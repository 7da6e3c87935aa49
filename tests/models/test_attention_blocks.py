"""If these fail, attention looks ahead, mixes heads, loses a block's edge, or its gradient is not its own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iar_jax.models import attention_blocks as module

BLOCK = 16
attention = functools.partial(module.attention_in_blocks, block_size=BLOCK)
causal_attention = functools.partial(attention, causal=True)


def arrays(length, heads, kv_heads, dim=8, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((2, length, count, dim)).astype(np.float32) for count in (heads, kv_heads, kv_heads)]


def reference(q, k, v, causal=True):
    """Softmax attention in float64, one mask over all positions."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    group = q.shape[2] // k.shape[2]
    k, v = np.repeat(k, group, axis=2), np.repeat(v, group, axis=2)
    scores = np.einsum("bthk,bshk->bhts", q, k) / np.sqrt(q.shape[-1])
    if causal:
        scores[:, :, np.triu(np.ones(scores.shape[2:], bool), 1)] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bhts,bshk->bthk", weights / weights.sum(-1, keepdims=True), v)


@pytest.mark.parametrize("length", [1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 37])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2)])
@pytest.mark.parametrize("causal", [True, False])
def test_it_is_softmax_attention_at_every_edge_of_its_blocks(length, heads, kv_heads, causal):
    q, k, v = arrays(length, heads, kv_heads)
    # A class token's query and key are zero: even weights.
    q[:, 0] = k[:, 0] = 0.0
    found = attention(*map(jnp.asarray, (q, k, v)), causal=causal)
    np.testing.assert_allclose(found, reference(q, k, v, causal), atol=3e-6)


@pytest.mark.slow
@pytest.mark.parametrize("heads", [(2, 2), (4, 2)])
@pytest.mark.parametrize("causal", [True, False])
def test_gradients_are_those_of_the_library_s_attention(heads, causal):
    q, k, v = map(jnp.asarray, arrays(2 * BLOCK + 5, *heads))
    g = np.random.default_rng(1).standard_normal(q.shape).astype(np.float32)

    def through(function):
        return jax.grad(lambda *qkv: jnp.vdot(function(*qkv), g), (0, 1, 2))(q, k, v)

    expected = through(lambda *qkv: jax.nn.dot_product_attention(*qkv, is_causal=causal))
    for ours, theirs in zip(through(functools.partial(attention, causal=causal)), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * float(jnp.max(jnp.abs(theirs))))


def test_scores_of_bfloat16_inputs_are_float32():
    # Scores near 100 that differ by 0.3: in bfloat16 they would be one number.
    q = jnp.full((1, 2, 1, 8), 6.0, jnp.bfloat16)
    k = jnp.stack([jnp.full((8,), 6.0), jnp.full((8,), 6.0).at[0].set(6.125)])[None, :, None].astype(jnp.bfloat16)
    v = jnp.asarray([0.0, 1.0], jnp.bfloat16).reshape(1, 2, 1, 1) * jnp.ones((1, 1, 1, 8), jnp.bfloat16)
    found = float(causal_attention(q, k, v)[0, 1, 0, 0])
    expected = reference(*(np.asarray(x, np.float32) for x in (q, k, v)))[0, 1, 0, 0]
    assert abs(found - expected) < 0.01
    assert expected > 0.55


def test_nothing_as_large_as_the_square_of_the_length_is_kept_for_the_backward_pass():
    q, k, v = (jnp.asarray(x) for x in arrays(8 * BLOCK, 2, 2, dim=4))
    _, backward = jax.vjp(causal_attention, q, k, v)
    kept = sum(leaf.size for leaf in jax.tree.leaves(backward))
    assert kept < 6 * q.size
