"""If these fail, samples come from another distribution than the one asked for."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from iar_jax.generators import guidance
from iar_jax.generators.guidance import Schedule


def test_guidance_moves_from_unconditional_to_conditional():
    conditional, unconditional = jnp.array([[1.0], [2.0]]), jnp.array([[0.0], [5.0]])
    both = jnp.concatenate([conditional, unconditional], axis=1)
    np.testing.assert_allclose(guidance.guide(both, jnp.float32(1.0)), conditional)
    np.testing.assert_allclose(guidance.guide(both, jnp.float32(0.0)), unconditional)
    np.testing.assert_allclose(guidance.guide(both, jnp.float32(3.0)), [[3.0], [-4.0]])
    # A scale for each image.
    two = jnp.concatenate([conditional, conditional, unconditional, unconditional], axis=1)
    np.testing.assert_allclose(guidance.guide(two, jnp.array([3.0, 0.0])), [[3.0, 0.0], [-4.0, 5.0]])


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Schedule(), [2.0, 2.0, 2.0, 2.0, 2.0]),
        (Schedule("interval", first=1, last=3), [1.0, 2.0, 2.0, 1.0, 1.0]),
        (Schedule("interval", first=2), [1.0, 1.0, 2.0, 2.0, 2.0]),
        (Schedule("linear", start=1.0), [1.0, 1.25, 1.5, 1.75, 2.0]),
        (Schedule("linear", start=3.0), [3.0, 2.75, 2.5, 2.25, 2.0]),
        (Schedule("power_cosine"), [1 + (1 - np.cos(np.pi * t / 5)) / 2 for t in range(5)]),
        (Schedule("power_cosine", power=2.0), [1 + (1 - np.cos(np.pi * (t / 5) ** 2)) / 2 for t in range(5)]),
        (Schedule("iar2", start=1.5, attention_weight=0.1), [1.5 + 0.5 * (t / 4 + 0.1 * 0.3) for t in range(5)]),
    ],
)
def test_the_scale_follows_its_schedule(schedule, expected):
    attention = jnp.array([0.3])
    found = [np.ravel(guidance.scale_at(schedule, jnp.float32(2.0), jnp.int32(t), 5, attention))[0] for t in range(5)]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def shares(logits, temperature=1.0, top_k=0, top_p=1.0, count=4096):
    """How often each code is drawn by evenly spaced numbers: its probability, to 1 / count at each of its borders."""
    uniform = (np.arange(count, dtype=np.float32) + 0.5) / count
    columns = jnp.tile(jnp.asarray(logits, jnp.float32)[:, None], (1, count))
    codes = guidance.draw(columns, jnp.asarray(uniform), jnp.float32(temperature), top_k=top_k, top_p=top_p)
    return np.bincount(np.asarray(codes), minlength=len(logits)) / count


@settings(deadline=None, max_examples=25)
@given(
    st.integers(0, 1000),
    st.sampled_from([10, 256]),
    st.sampled_from([(0, 1.0), (1, 1.0), (5, 1.0), (5, 0.7), (0, 0.6), (300, 1.0)]),
    st.floats(0.3, 3.0),
)
def test_draws_have_the_distribution_asked_for(seed, size, restriction, temperature):
    logits = np.random.default_rng(seed).standard_normal(size).astype(np.float32)
    top_k, top_p = restriction
    # In float64, by sorting.
    order = np.argsort(-logits, kind="stable")[: top_k or size]
    share = np.exp((logits[order] - logits.max()).astype(np.float64) / temperature)
    share /= share.sum()
    before = np.cumsum(share) - share
    assume(np.abs(before[1:] - top_p).min(initial=1.0) > 1e-4)  # rounding decides which side such a code is on
    kept = order[before < top_p]
    expected = np.zeros(size)
    expected[kept] = share[before < top_p] / share[before < top_p].sum()
    np.testing.assert_allclose(shares(logits, temperature, top_k, top_p), expected, atol=2.1 / 4096)


def test_no_draw_falls_on_a_code_without_probability():
    logits = np.full(256, -np.inf, np.float32)
    logits[[3, 200]] = 0.0
    for uniform in (0.0, 0.4999, 0.5, np.nextafter(np.float32(1), np.float32(0))):
        (code,) = guidance.draw(
            jnp.asarray(logits)[:, None], jnp.array([uniform], jnp.float32), jnp.float32(1.0), top_k=0, top_p=1.0
        )
        assert int(code) == (3 if uniform < 0.5 else 200)


def test_the_most_probable_code_is_always_kept():
    np.testing.assert_array_equal(shares([0.0, 5.0, 1.0], top_p=1e-6), [0, 1, 0])
    np.testing.assert_array_equal(shares([0.0, 5.0, 1.0], top_k=1, top_p=0.5), [0, 1, 0])
