"""If these fail, a share of the target goes to codes that do not look like it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iar_jax.codebook.neighbours import near_codes


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 1000), st.integers(2, 12), st.floats(0.01, 10.0))
def test_near_codes_and_their_shares(seed, count, temperature):
    vectors = np.random.default_rng(seed).standard_normal((40, 3))
    ids, shares = near_codes(vectors, count, temperature)
    squares = np.square(vectors[:, None] - vectors).sum(axis=-1)
    nearest = np.argsort(squares, axis=1)[:, :count]
    np.testing.assert_array_equal(ids, nearest)
    powers = np.exp(-np.take_along_axis(squares, nearest, axis=1) / temperature)
    # Distances come from float32 products of vectors of length up to 4.
    np.testing.assert_allclose(
        shares, powers / powers.sum(axis=1, keepdims=True), rtol=2e-5 / min(temperature, 1.0), atol=1e-6
    )
    np.testing.assert_array_equal(ids[:, 0], np.arange(40))


@pytest.mark.parametrize("count", [2, 8, 40])
def test_the_temperature_that_is_chosen_gives_half_of_the_highest_entropy(count):
    _, shares = near_codes(np.random.default_rng(0).standard_normal((40, 3)), count)
    entropy = -np.sum(shares * np.log(np.maximum(shares, 1e-30)), axis=1)
    assert entropy.mean() == pytest.approx(np.log(count) / 2, rel=1e-4)


@pytest.mark.parametrize("count", [1, 41])
def test_too_few_and_too_many_are_refused(count):
    with pytest.raises(ValueError, match=rf"{count} near codes: 2 to all 40"):
        near_codes(np.zeros((40, 3)), count)
