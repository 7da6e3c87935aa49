"""If these fail, generators are trained on other contexts than the config says, or on noisy targets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iar_jax.codebook.neighbours import near_codes
from iar_jax.generators.settings import Objective
from iar_jax.losses.neighbours import Neighbours
from iar_jax.training.context_noise import highest_share, noise_of, noisy

VOCAB = 64
CODES = jnp.asarray(np.random.default_rng(0).integers(0, VOCAB, (4000, 16)), jnp.int32)
OFFSETS = (0, 1, 7, 40, 64)
NEAR = near_codes(np.random.default_rng(1).standard_normal((VOCAB, 4)), 5, 1.0)


@pytest.mark.parametrize("draw", ["uniform", "cluster", "neighbours"])
def test_shares_of_pictures_are_even_from_nothing_to_the_highest(draw):
    objective = Objective((1,), neighbours=Neighbours(*NEAR))
    if draw == "cluster":
        objective = Objective((16,))
    found = np.asarray(noisy(jax.random.key(0), CODES, jnp.float32(0.8), draw, objective, VOCAB))
    changed = (found != np.asarray(CODES)).mean(axis=1)
    # A draw of the code itself is no change: 1 of 64 codes, 1 of 16 of a cluster, no neighbour.
    visible = {"uniform": 63 / 64, "cluster": 15 / 16, "neighbours": 1.0}[draw]
    # The mean of 4,000 even draws from [0, 0.8] has a standard error of 0.0037; five of them.
    assert changed.mean() == pytest.approx(0.4 * visible, abs=0.02)
    # An even draw's deviation is 0.8 / sqrt(12); counting 16 positions adds to it, and one share for all would not
    # reach it.
    assert 0.2 < changed.std() < 0.3


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 1000), st.sampled_from([(1,), (16,), (4, 16), (OFFSETS,)]))
def test_codes_stay_in_their_cluster(seed, sizes):
    found = np.asarray(noisy(jax.random.key(seed), CODES[:50], jnp.float32(1.0), "cluster", Objective(sizes), VOCAB))
    bounds = np.asarray(sizes[0]) if isinstance(sizes[0], tuple) else np.arange(0, VOCAB + 1, sizes[0])
    clusters = np.searchsorted(bounds, [found, np.asarray(CODES[:50])], side="right")
    np.testing.assert_array_equal(*clusters)


def test_near_codes_are_those_of_the_table_but_the_code_itself():
    objective = Objective((1,), neighbours=Neighbours(*NEAR))
    found = np.asarray(noisy(jax.random.key(0), CODES, jnp.float32(1.0), "neighbours", objective, VOCAB))
    changed = found != np.asarray(CODES)
    near = NEAR[0][np.asarray(CODES)]
    assert np.all((near[..., 1:] == found[..., None]).any(axis=-1)[changed])


def test_noise_ends_before_the_training_does():
    section = {"context_noise": 1.0, "context_noise_end": 0.75, "num_steps": 400, "context_noise_draw": "uniform"}
    highest = highest_share(section)
    # reAR's max(0, 1 - 4t/3).
    steps = np.arange(400)
    np.testing.assert_allclose(highest(steps), np.maximum(0.0, 1.0 - 4.0 * (steps / 400) / 3.0), atol=1e-6)
    noise = noise_of(section, Objective((1,)), VOCAB)
    np.testing.assert_array_equal(noise(jax.random.key(0), CODES, 300), CODES)
    assert np.any(noise(jax.random.key(0), CODES, 299) != CODES)
    assert noise_of(section | {"context_noise": 0.0}, Objective((1,)), VOCAB) is None
