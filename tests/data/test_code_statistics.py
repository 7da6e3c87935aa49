"""If these fail, a check of extracted codes finds order where there is none, or none where there is."""

import numpy as np

from iar_jax.data import code_statistics


def test_perplexity_is_the_number_of_evenly_used_codes():
    np.testing.assert_allclose(code_statistics.perplexity(np.array([5, 5, 0, 5, 5])), 4.0)
    np.testing.assert_allclose(code_statistics.perplexity(np.array([0, 7])), 1.0)


def test_usage_overlap_is_the_shared_mass():
    first, second = np.array([2, 2, 0]), np.array([0, 4, 4])
    np.testing.assert_allclose(code_statistics.usage_overlap(first, first * 3), 1.0)
    np.testing.assert_allclose(code_statistics.usage_overlap(first, second), 0.5)


def test_neighbours_tell_of_each_other_along_the_axis_they_follow():
    rng = np.random.default_rng(0)
    columns = np.repeat(rng.integers(0, 64, (3000, 1, 8)), 2, axis=1)  # a code repeats downwards
    down = code_statistics.neighbour_information(columns, 64, 1, 0)
    right = code_statistics.neighbour_information(columns, 64, 0, 1)
    assert down > 3.0  # ln 64 is 4.16, less what chance gives so few pairs
    assert abs(right) < 0.3
    noise = rng.integers(0, 64, (200, 8, 8))
    assert abs(code_statistics.neighbour_information(noise, 64, 0, 1)) < 0.1


def test_mutual_information_of_copies_is_their_entropy():
    x = np.arange(4000) % 4
    np.testing.assert_allclose(code_statistics.mutual_information(x, x), np.log(4))
    np.testing.assert_allclose(code_statistics.mutual_information(x, x // 4 % 2), 0.0, atol=1e-12)
