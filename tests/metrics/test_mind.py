"""MIND is the published formula, to reference values in float64."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import wasserstein_distance_nd

from iar_jax.metrics.frechet import feature_statistics, frechet_distance
from iar_jax.metrics.mind import mind, random_directions

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "mind_fd_small.npz")


def test_reference_values():
    val, gen, directions = GOLDEN["val"], GOLDEN["gen"], GOLDEN["directions"]
    # Sums in another order: some 1e-16 for each of 25,000 terms.
    assert mind(val, gen, directions) == pytest.approx(float(GOLDEN["mind_val_gen"]), rel=1e-12)
    assert mind(gen, val, directions) == pytest.approx(float(GOLDEN["mind_gen_val"]), rel=1e-12)
    shifted = val.astype(np.float64) + GOLDEN["shift"]
    assert mind(val, shifted, directions) == pytest.approx(float(GOLDEN["mind_shifted"]), rel=1e-12)


def test_frechet_distances_of_the_same_reference():
    for first, second, name in (("gen", "train", "fd_gen_train"), ("val", "train", "fd_val_train")):
        statistics = (feature_statistics(GOLDEN[first]), feature_statistics(GOLDEN[second]))
        assert frechet_distance(*statistics[0], *statistics[1]) == pytest.approx(float(GOLDEN[name]), rel=1e-9)
    few = feature_statistics(GOLDEN["gen"][: int(GOLDEN["few"])])
    # A singular covariance: roots of eigenvalues that are rounding alone, some 1e-8 of the trace.
    assert frechet_distance(*few, *feature_statistics(GOLDEN["train"])) == pytest.approx(
        float(GOLDEN["fd_few_train"]), rel=1e-6
    )


def test_in_one_dimension_it_is_the_transport_of_sorted_points():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(50, 1)), rng.normal(1.0, 2.0, size=(50, 1))
    expected = 3.0 * np.mean(np.square(np.sort(x[:, 0]) - np.sort(y[:, 0])))
    assert mind(x, y, np.array([[-2.0]])) == pytest.approx(expected, rel=1e-12)
    assert wasserstein_distance_nd(x, y) ** 2 <= expected / 3.0 + 1e-12  # of order 1, not above that of order 2


@given(st.integers(1, 6), st.integers(2, 40), st.integers(0, 99))
def test_laws(dim, count, seed):
    rng = np.random.default_rng(seed)
    x, y, directions = rng.normal(size=(count, dim)), rng.normal(size=(count, dim)), rng.normal(size=(7, dim))
    value = mind(x, y, directions)
    assert value >= 0.0
    assert mind(x, x[::-1], directions) == 0.0
    assert mind(y, x, directions) == pytest.approx(value, rel=1e-12)
    assert mind(x, y, 5.0 * directions) == pytest.approx(value, rel=1e-9)
    assert mind(3.0 * x, 3.0 * y, directions) == pytest.approx(9.0 * value, rel=1e-9)


def test_a_shift_costs_three_times_its_square():
    x = np.random.default_rng(1).normal(size=(20, 30))
    shift = np.full(30, 0.1)
    # The mean of (u c)^2 over M directions is |c|^2 / D (1 +- sqrt(2 / M)).
    assert mind(x, x + shift, random_directions(30, 20_000)) == pytest.approx(3.0 * 0.3, rel=0.05)


def test_of_the_larger_set_as_many_rows_are_drawn():
    rng = np.random.default_rng(2)
    x, y, directions = rng.normal(size=(10, 3)), rng.normal(size=(25, 3)), rng.normal(size=(4, 3))
    assert mind(x, y, directions) == mind(x, y, directions)
    assert mind(x, y, directions, seed=1) != mind(x, y, directions)
    assert mind(x, np.repeat(x[:1], 25, axis=0), directions) == mind(x, np.repeat(x[:1], 10, axis=0), directions)


@pytest.mark.parametrize(
    ("x", "y", "directions", "words"),
    [
        (np.ones((0, 3)), np.ones((2, 3)), np.ones((1, 3)), "nothing to compare: 0 and 2 rows"),
        (np.full((2, 3), np.nan), np.ones((2, 3)), np.ones((1, 3)), "finite"),
        (np.ones((2, 3)), np.ones((2, 3)), np.zeros((1, 3)), "a direction is zero"),
    ],
)
def test_refused(x, y, directions, words):
    with pytest.raises(ValueError, match=words):
        mind(x, y, directions)
