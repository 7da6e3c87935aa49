"""If these fail, clusters are not balanced, not the paper's, or depend on chance that no key controls."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iar_jax.codebook.balanced_kmeans import (
    balanced_kmeans,
    means_and_inertia,
    plus_plus_seeds,
    unconstrained_inertia,
)


@pytest.fixture(scope="module")
def small(golden):
    return dict(np.load(golden("kmeans_small.npz")))


def test_one_iteration_is_the_reference_element_by_element(small):
    start = small["vectors"][small["init_indices"]]
    found = balanced_kmeans(small["vectors"], 16, initial_centroids=start, max_iterations=1)
    np.testing.assert_array_equal(found.assignment, small["assignment_1"])


def test_a_whole_run_ends_at_the_reference_error(small):
    start = small["vectors"][small["init_indices"]]
    found = balanced_kmeans(small["vectors"], 16, initial_centroids=start)
    # The published program prints the error over the dimension, 8.
    assert abs(float(found.inertia) / (8 * small["mse_history"][-1]) - 1) < 0.002
    assert found.converged
    history = np.asarray(found.inertia_history)[: int(found.num_iterations)]
    np.testing.assert_allclose(history[0], 8 * small["mse_history"][0], rtol=1e-5)
    assert np.isnan(np.asarray(found.inertia_history)[int(found.num_iterations) :]).all()


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 1000), st.sampled_from(["normal", "duplicates", "equal"]))
def test_every_cluster_has_the_same_size(num_clusters, size, seed, kind):
    rng = np.random.default_rng(seed)
    vectors = rng.standard_normal((num_clusters * size, 3)).astype(np.float32)
    if kind == "duplicates":
        vectors = vectors[rng.integers(0, max(1, len(vectors) // 3), len(vectors))]
    if kind == "equal":
        vectors[:] = 1.0
    found = balanced_kmeans(vectors, num_clusters, key=jax.random.key(seed), max_iterations=10)
    np.testing.assert_array_equal(np.bincount(found.assignment, minlength=num_clusters), size)
    groups = [vectors[np.asarray(found.assignment) == c].astype(np.float64) for c in range(num_clusters)]
    inertia = sum(np.square(g - g.mean(axis=0)).sum() for g in groups)
    np.testing.assert_allclose(found.inertia, inertia, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("assignment", ["greedy", "optimal"])
def test_restarts_keep_the_best(small, assignment):
    key = jax.random.key(3)
    vectors = jnp.asarray(small["vectors"])
    found = balanced_kmeans(vectors, 16, key=key, num_restarts=4, assignment=assignment)
    single = [
        float(
            balanced_kmeans(
                vectors, 16, initial_centroids=plus_plus_seeds(vectors, 16, k), assignment=assignment
            ).inertia
        )
        for k in jax.random.split(key, 4)
    ]
    # Annealing grows rounding, which differs side by side, into other optima; these differ by tenths of a percent.
    tolerance = {"greedy": 1e-5, "optimal": 5e-3}[assignment]
    assert abs(float(found.inertia) / min(single) - 1.0) <= tolerance
    assert max(single) > (1.0 + tolerance) * min(single)


def test_the_annealed_start_beats_k_means_without_balance(small):
    # Where both begin with the same centroids: the bar that no balanced run from there could reach without annealing.
    vectors = small["vectors"]
    start = vectors[small["init_indices"]]
    annealed = balanced_kmeans(vectors, 16, initial_centroids=start, assignment="optimal")
    assert annealed.inertia <= 1.005 * unconstrained_inertia(vectors, jnp.asarray(start))
    assert annealed.inertia >= unconstrained_inertia(vectors, annealed.centroids)


def test_one_device_and_eight_find_the_same(small):
    start = small["vectors"][small["init_indices"]]
    for assignment in ("greedy", "optimal"):
        options = {"initial_centroids": start, "assignment": assignment}
        many = balanced_kmeans(small["vectors"], 16, **options)
        with mock.patch("jax.local_devices", return_value=jax.local_devices()[:1]):
            one = balanced_kmeans(small["vectors"], 16, **options)
        # Sums over devices round differently, and ties may fall differently after many iterations.
        np.testing.assert_allclose(many.inertia, one.inertia, rtol=1e-3)
        assert len(many.centroids.sharding.device_set) == 8


def test_seeds_are_vectors_far_apart(small):
    vectors = jnp.asarray(small["vectors"])
    seeds = np.asarray(plus_plus_seeds(vectors, 16, jax.random.key(0)))
    distances = np.square(seeds[:, None] - small["vectors"][None]).sum(axis=-1)
    assert distances.min(axis=1).max() == 0.0
    assert len(np.unique(seeds, axis=0)) == 16


def test_means_are_exact_where_float32_sums_are_not():
    rng = np.random.default_rng(0)
    vectors = (1e4 + rng.standard_normal((4096, 2))).astype(np.float32)
    means, inertia = means_and_inertia(jnp.asarray(vectors), jnp.zeros(4096, jnp.int32), 1)
    exact = vectors.astype(np.float64).mean(axis=0)
    # The best that a float32 result can do is half a unit in the last place of 1e4.
    assert np.abs(np.asarray(means)[0] - exact).max() <= np.spacing(np.float32(1e4))
    np.testing.assert_allclose(inertia, np.square(vectors - exact).sum(), rtol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_clusters": 3}, "num_clusters 3 does not divide the number of vectors, 8"),
        ({"num_clusters": 9}, r"num_clusters is 9; with 8 vectors it must be in \[1, 8\]"),
        ({"num_clusters": 0}, "num_clusters is 0"),
        ({"num_clusters": 2, "key": None}, "give initial_centroids, or a key"),
        ({"num_clusters": 2, "initial_centroids": np.zeros((2, 2), np.float32)}, "not both"),
        ({"num_clusters": 2, "key": None, "initial_centroids": np.zeros((3, 2), np.float32)}, "of shape"),
        ({"num_clusters": 2, "max_iterations": 0}, "must be positive"),
    ],
)
def test_impossible_arguments_are_refused(arguments, message):
    vectors = np.random.default_rng(0).standard_normal((8, 2)).astype(np.float32)
    with pytest.raises(ValueError, match=message):
        balanced_kmeans(vectors, **{"key": jax.random.key(0), **arguments})


def test_a_vector_that_is_not_finite_is_named():
    vectors = np.ones((8, 2), np.float32)
    vectors[5, 1] = np.nan
    with pytest.raises(ValueError, match="vector 5"):
        balanced_kmeans(vectors, 2, key=jax.random.key(0))


def test_a_random_partition_is_balanced_and_knows_nothing_of_the_vectors(small):
    vectors, key = small["vectors"], jax.random.key(0)
    found = balanced_kmeans(vectors, 16, key=key, assignment="random")
    np.testing.assert_array_equal(np.bincount(found.assignment, minlength=16), len(vectors) // 16)
    # Clusters drawn at random have, on the average, the whole set's error less a degree of freedom for each.
    of_all = np.square(vectors - vectors.mean(axis=0)).sum()
    expected = of_all * (1.0 - 15 / (len(vectors) - 1))
    assert abs(float(found.inertia) / expected - 1.0) < 0.02
    again = balanced_kmeans(vectors, 16, key=key, assignment="random")
    np.testing.assert_array_equal(found.assignment, again.assignment)
    other = balanced_kmeans(vectors, 16, key=jax.random.key(1), assignment="random")
    assert np.mean(np.asarray(found.assignment) == np.asarray(other.assignment)) < 0.2
