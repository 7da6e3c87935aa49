"""If these fail, samples come from another distribution than the one asked for."""

import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from iar_jax.sampling import guidance


def test_guidance_moves_from_unconditional_to_conditional():
    conditional, unconditional = jnp.array([[1.0, 2.0]]), jnp.array([[0.0, 5.0]])
    both = jnp.concatenate([conditional, unconditional])
    np.testing.assert_allclose(guidance.guide(both, jnp.float32(1.0)), conditional)
    np.testing.assert_allclose(guidance.guide(both, jnp.float32(0.0)), unconditional)
    np.testing.assert_allclose(guidance.guide(both, jnp.float32(3.0)), [[3.0, -4.0]])


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 1000), st.integers(1, 12))
def test_top_k_keeps_the_k_largest(seed, k):
    logits = np.random.default_rng(seed).standard_normal((3, 10)).astype(np.float32)
    kept = np.isfinite(guidance.keep_top_k(jnp.asarray(logits), k))
    assert (kept.sum(axis=-1) == min(k, 10)).all()
    for row, mask in zip(logits, kept, strict=True):
        assert row[mask].min() >= row[~mask].max(initial=-np.inf)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 1000), st.floats(0.01, 1.0))
def test_top_p_keeps_the_smallest_set_that_reaches_p(seed, p):
    logits = 2 * np.random.default_rng(seed).standard_normal((3, 10)).astype(np.float32)
    kept = np.isfinite(guidance.keep_top_p(jnp.asarray(logits), p))
    probability = np.exp(logits.astype(np.float64))
    probability /= probability.sum(axis=-1, keepdims=True)
    for row, mask in zip(probability, kept, strict=True):
        assert mask[row.argmax()]
        assert row[mask].sum() >= p - 1e-5
        if mask.sum() > 1:
            assert row[mask].sum() - row[mask].min() < p + 1e-5
