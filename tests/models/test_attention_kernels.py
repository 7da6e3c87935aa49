"""If these fail, a chip's attention is not the CPU's: in its numbers, its gradients, or where it is split."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iar_jax.models import attention, attention_decode
from iar_jax.models.rope import apply_rope, rope_table
from iar_jax.runtime import sharding
from iar_jax.runtime.errors import UserError


def problem(side, heads, kv_heads, head_dim, rows=2):
    """Queries, keys, values, a gradient, and the rotary table of a class token and all codes but the last."""
    rng, length = np.random.default_rng(0), side**2
    q, k, v, g = (
        rng.standard_normal((rows, length, count, head_dim)).astype(np.float32)
        for count in (heads, kv_heads, kv_heads, heads)
    )
    return q, k, v, g, rope_table(side, head_dim)[:length]


def in_float64(q, k, v, rope, causal=True):
    """Softmax attention of turned queries and keys, one mask over all positions; differentiable."""
    if rope is not None:
        pairs = [x.reshape(*x.shape[:-1], -1, 2) for x in (q, k)]
        cos, sin = rope[:, None, :, 0], rope[:, None, :, 1]
        q, k = (
            jnp.stack([x[..., 0] * cos - x[..., 1] * sin, x[..., 1] * cos + x[..., 0] * sin], -1).reshape(y.shape)
            for x, y in zip(pairs, (q, k), strict=True)
        )
    group = q.shape[2] // k.shape[2]
    k, v = jnp.repeat(k, group, axis=2), jnp.repeat(v, group, axis=2)
    scores = jnp.einsum("bthk,bshk->bhts", q, k) / np.sqrt(q.shape[-1])
    if causal:
        scores = jnp.where(np.tri(scores.shape[-1], dtype=bool), scores, -jnp.inf)
    return jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(scores, axis=-1), v)


def with_gradients(function, arrays, g):
    return jax.jit(lambda *a: (function(*a), *jax.vjp(function, *a)[1](g)))(*arrays)


# Sides 4, 12 and 18: one block, several of them, and lengths that kernels pad; heads of 64 as ours, 100 as 3B's.
CASES = [(4, 2, 2, 64), (12, 4, 2, 32), (12, 2, 2, 100), (18, 3, 3, 64)]


@functools.cache
def exact_turned(case, causal):
    """Attention and its gradients in float64, which all implementations are held to."""
    q, k, v, g, rope = problem(*case)
    with jax.enable_x64(True):
        wide = [jnp.asarray(x, jnp.float64) for x in (q, k, v, g)]
        found = with_gradients(lambda *a: in_float64(*a, rope.astype(np.float64), causal), wide[:3], wide[3])
        return [np.asarray(x) for x in found]


@pytest.mark.parametrize("name", ["blocks", "fused", "splash"])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("causal", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_each_is_softmax_attention_of_turned_heads(name, case, causal):
    q, k, v, g, rope = problem(*case)
    attend = attention.ATTENTIONS[name].attend
    found = with_gradients(lambda *a: attend(*a, jnp.asarray(rope), 64, causal), [jnp.asarray(x) for x in (q, k, v)], g)
    for ours, theirs in zip(found, exact_turned(case, causal), strict=True):
        # Sums of up to 324 float32 products and exponentials, some hundred roundings of 2^-24.
        np.testing.assert_allclose(ours, theirs, atol=2e-5 * np.abs(theirs).max())


@functools.cache
def not_turned(head_dim):
    """A problem and what solves it in float64."""
    # A square and a register, as masked models have them: a length that nothing divides.
    arrays = [np.random.default_rng(i).standard_normal((2, 145, 3, head_dim)).astype(np.float32) for i in range(4)]
    with jax.enable_x64(True):
        wide = [jnp.asarray(x, jnp.float64) for x in arrays]
        return arrays, [
            np.asarray(x) for x in with_gradients(lambda *a: in_float64(*a, None, False), wide[:3], wide[3])
        ]


@pytest.mark.parametrize("name", ["blocks", "fused", "splash"])
@pytest.mark.parametrize("head_dim", [32, 85, 100])
def test_each_sees_everything_of_heads_that_are_not_turned(name, head_dim):
    arrays, exact = not_turned(head_dim)
    attend = attention.ATTENTIONS[name].attend
    q, k, v, g = map(jnp.asarray, arrays)
    for ours, theirs in zip(with_gradients(lambda *a: attend(*a, None, 64, False), [q, k, v], g), exact, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5 * np.abs(theirs).max())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["blocks", "fused", "splash"])
@pytest.mark.parametrize("shape", [(2, 2, 2), (8, 1, 1), (1, 1, 4)], ids=str)
def test_each_is_the_same_on_a_mesh(name, shape):
    q, k, v, g, rope = problem(4, 4, 4, 32, rows=8)
    attend = attention.ATTENTIONS[name].attend
    arrays = [jnp.asarray(x) for x in (q, k, v)]

    def run(*a):
        return with_gradients(lambda *b: attend(*b, jnp.asarray(rope), 16, True), a, g)

    alone = run(*arrays)
    with sharding.use_mesh(sharding.mesh_of(jax.devices()[: np.prod(shape)], shape)):
        on_mesh = run(*arrays)
    for ours, theirs in zip(on_mesh, alone, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-6 * np.abs(theirs).max())


def test_one_row_runs_on_a_mesh_that_does_not_divide_it():
    q, k, v, _, rope = problem(4, 4, 4, 32, rows=1)
    with sharding.use_mesh(sharding.mesh_of(jax.devices()[:8], (8, 1, 1))):
        found = jax.jit(attention.fused, static_argnums=(4, 5))(q, k, v, rope, 16, True)
    turned_q, turned_k = (apply_rope(jnp.asarray(x), jnp.asarray(rope)) for x in (q, k))
    expected = jax.nn.dot_product_attention(turned_q, turned_k, jnp.asarray(v), is_causal=True)
    np.testing.assert_allclose(found, expected, atol=3e-6)


@pytest.mark.parametrize(
    ("length", "heads", "head_dim", "position"), [(32, 12, 64, 31), (144, 3, 100, 77), (9, 2, 16, 0)]
)
def test_the_decoding_kernel_attends_to_the_positions_so_far(length, heads, head_dim, position):
    rng = np.random.default_rng(0)
    q = rng.standard_normal((4, heads * head_dim)).astype(np.float32)
    keys, values = rng.standard_normal((2, 4, length, heads * head_dim)).astype(np.float32)
    found, to_first = attention_decode.attend(*map(jnp.asarray, (q, keys, values, np.int32(position))), head_dim)
    split = [x[:, : position + 1].reshape(4, -1, heads, head_dim).astype(np.float64) for x in (keys, values)]
    scores = np.einsum("bhk,bthk->bht", q.reshape(4, heads, head_dim), split[0])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    expected = np.einsum("bht,bthk->bhk", weights, split[1]).reshape(4, -1)
    # The scores, not scaled here, reach some 30: float32 keeps 2e-6 of them.
    np.testing.assert_allclose(found, expected, atol=2e-5)
    np.testing.assert_allclose(to_first, weights[..., 0], atol=2e-5)


def case(platform="tpu", dtype=jnp.bfloat16, head_dim=64, length=256):
    return attention.Case(platform, dtype, head_dim, length)


@pytest.mark.parametrize(
    ("found", "name", "reason"),
    [
        (case(), "fused", ""),
        (case(length=4096), "splash", "fused keeps all keys on the chip, of 1024 positions at most"),
        (case(dtype=jnp.float32), "blocks", "takes bfloat16, not float32 (config.model.dtype)"),
        (case("gpu"), "cudnn", ""),
        (case("gpu", dtype=jnp.float32), "blocks", "cudnn takes bfloat16, not float32 (config.model.dtype)"),
        (case("gpu", head_dim=160), "blocks", "cudnn takes heads of 128 dimensions at most"),
        (case("cpu"), "blocks", ""),
    ],
)
def test_auto_takes_the_fastest_and_says_what_keeps_it_from_a_faster_one(found, name, reason):
    chosen = attention.choose("auto", found)
    assert chosen.name == name
    assert reason in chosen.reason
    assert bool(chosen.reason) == bool(reason)


@pytest.mark.parametrize(
    ("kind", "found", "message"),
    [
        (
            "cudnn",
            case("cpu"),
            r"is cudnn, which is for GPUs; on this platform \(cpu, bfloat16, heads of 64\)",
        ),
        ("splash", case("gpu"), r"is splash, which is for TPUs; .* there are auto, cudnn, blocks"),
        ("fused", case(dtype=jnp.float32), r"is fused, which takes bfloat16, not float32 \(config.model.dtype\);"),
        (
            "cudnn",
            case("gpu", head_dim=256),
            r"128 dimensions at most; .*heads of 256\) there are auto, blocks",
        ),
    ],
)
def test_what_cannot_run_is_refused_with_what_can(kind, found, message):
    with pytest.raises(UserError, match=message):
        attention.choose(kind, found)


@pytest.mark.parametrize("head_dim", [64, 100])
def test_cudnn_is_called_without_a_mask(monkeypatch, head_dim):
    # The library is asked for its version when a program is lowered; the text is what is looked at here.
    from jax._src.cudnn import fused_attention_stablehlo as library

    monkeypatch.setattr(library, "check_cudnn_version", lambda: 92800)
    monkeypatch.setattr(library, "check_compute_capability", lambda capability: True)
    q, k, v, _, rope = problem(24, 2, 2, head_dim)
    arrays = [jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)]
    lowered = jax.jit(lambda *a: attention.cudnn(*a, jnp.asarray(rope), 0, True)).trace(*arrays)
    text = lowered.lower(lowering_platforms=("cuda",)).as_text()
    assert "__cudnn$fmhaSoftmax" in text
    assert "CAUSAL" in text
    assert "ScaleMask" not in text
    assert "ScaleBias" not in text
    assert f"x{head_dim + -head_dim % 8}xbf16" in text
