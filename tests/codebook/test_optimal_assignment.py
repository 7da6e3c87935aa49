"""If these fail, "optimal" is not, or the gap that is reported proves nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from iar_jax.codebook.balanced_kmeans import balanced_kmeans, greedy_assignment
from iar_jax.codebook.distances import squared_distances
from iar_jax.codebook.optimal_assignment import optimal_assignment


def itself(rows):
    """Costs of vectors that are rows of a cost matrix already."""
    return rows


@jax.jit
def solve(distances, prices):
    return optimal_assignment(distances[None], itself, prices, (1.0, 0.1), 10, fallback=greedy_assignment)


def cheapest(distances):
    """The cost of the best balanced assignment, by scipy's exact solver with each cluster repeated."""
    size = distances.shape[0] // distances.shape[1]
    repeated = np.repeat(distances.astype(np.float64), size, axis=1)
    rows, columns = linear_sum_assignment(repeated)
    return repeated[rows, columns].sum()


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from([(1, 1), (1, 7), (7, 1), (4, 4), (8, 16), (16, 8)]),
    st.integers(0, 10_000),
    st.sampled_from(["uniform", "clustered", "duplicates", "equal", "skewed"]),
)
def test_the_cost_is_that_of_an_exact_solver(shape, seed, kind):
    num_clusters, size = shape
    rng = np.random.default_rng(seed)
    distances = rng.uniform(0, 1, (num_clusters * size, num_clusters))
    if kind == "clustered":
        points, centres = rng.standard_normal((num_clusters * size, 2)), rng.standard_normal((num_clusters, 2))
        distances = np.square(points[:, None] - centres).sum(axis=-1)
    if kind == "duplicates":
        distances = distances[rng.integers(0, min(3, len(distances)), len(distances))]
    if kind == "equal":
        distances = np.full_like(distances, 0.7)
    if kind == "skewed":
        distances = distances + 10.0 * np.arange(num_clusters)
    distances = distances.astype(np.float32)
    found = solve(jnp.asarray(distances), jnp.zeros(num_clusters))
    np.testing.assert_array_equal(np.bincount(found.assignment, minlength=num_clusters), size)
    cost = distances[np.arange(len(distances)), found.assignment].astype(np.float64).sum()
    best = cheapest(distances)
    rounding = 4e-6 * np.abs(distances).max() * len(distances)
    # The gap is an upper bound of what is missing; and where there are no ties by the dozen, nothing is.
    assert cost - best <= float(found.gap) + rounding
    if kind not in ("duplicates", "equal"):
        assert cost - best <= rounding


def test_the_gap_bounds_a_bad_assignment_too():
    # Everything is nearest to cluster 0 by a tie: the greedy fallback answers, with a gap that is honest about it.
    distances = jnp.zeros((64, 4)).at[:, 1:].add(jnp.arange(64.0)[:, None] * 1e-3)
    prices = jnp.array([-1e3, 0.0, 0.0, 0.0])
    found = optimal_assignment(distances[None], itself, prices, (), 0, fallback=greedy_assignment)
    cost = np.asarray(distances)[np.arange(64), found.assignment].sum()
    best = cheapest(np.asarray(distances))
    assert cost > best
    assert cost - best <= float(found.gap) + 1e-4


def test_chunks_change_nothing_but_memory():
    rng = np.random.default_rng(0)
    vectors, centroids = (jnp.asarray(rng.standard_normal((count, 3)), jnp.float32) for count in (240, 8))
    costs = functools.partial(squared_distances, centroids=centroids)
    whole, parts = (
        optimal_assignment(vectors.reshape(chunks, -1, 3), costs, jnp.zeros(8), (0.3,), 8, fallback=greedy_assignment)
        for chunks in (1, 6)
    )
    np.testing.assert_array_equal(whole.assignment, parts.assignment)
    greedy = [greedy_assignment(vectors.reshape(chunks, -1, 3), costs, jnp.zeros(8)) for chunks in (1, 6)]
    np.testing.assert_array_equal(*greedy)


def test_optimal_runs_end_lower_than_greedy_ones(golden):
    small = np.load(golden("kmeans_small.npz"))
    start = small["vectors"][small["init_indices"]]
    greedy = balanced_kmeans(small["vectors"], 16, initial_centroids=start)
    optimal = balanced_kmeans(small["vectors"], 16, initial_centroids=start, assignment="optimal")
    assert optimal.inertia < 0.99 * greedy.inertia
    assert abs(float(optimal.gap)) < 1e-3
    assert np.isnan(greedy.gap)
    history = np.asarray(optimal.inertia_history)[: int(optimal.num_iterations)]
    # Both steps of an iteration can only lower the error, but for float32 rounding.
    assert (np.diff(history) <= 1e-5 * history[:-1]).all()


@pytest.mark.parametrize(("num_vectors", "num_clusters"), [(12, 12), (12, 1), (12, 3)])
@pytest.mark.parametrize("kind", ["normal", "duplicates", "equal"])
def test_every_case_is_balanced(num_vectors, num_clusters, kind):
    vectors = np.random.default_rng(0).standard_normal((num_vectors, 2)).astype(np.float32)
    if kind == "duplicates":
        vectors = np.repeat(vectors[:4], 3, axis=0)
    if kind == "equal":
        vectors[:] = 2.0
    found = balanced_kmeans(vectors, num_clusters, key=jax.random.key(0), assignment="optimal", num_restarts=3)
    np.testing.assert_array_equal(np.bincount(found.assignment, minlength=num_clusters), num_vectors // num_clusters)
