"""If these fail, unequal clusters are not those of average linkage, or their ids are not runs."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iar_jax.codebook.average_linkage import average_linkage
from iar_jax.codebook.code_distance import random_members
from iar_jax.codebook.permutation import Permutation, invert, load_permutation, save_permutation
from iar_jax.data.codes import permutation_fingerprint


def by_definition(vectors, num_clusters):
    """Joins the two clusters of the least mean distance, in so many words."""
    clusters = [[i] for i in range(len(vectors))]
    distances = np.linalg.norm(vectors[:, None] - vectors, axis=-1)
    while len(clusters) > num_clusters:
        pairs = itertools.combinations(range(len(clusters)), 2)
        a, b = min(pairs, key=lambda pair: distances[np.ix_(clusters[pair[0]], clusters[pair[1]])].mean())
        clusters[a] += clusters.pop(b)
    return {frozenset(cluster) for cluster in clusters}


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 1000), st.integers(1, 24))
def test_clusters_are_those_of_the_definition(seed, num_clusters):
    vectors = np.random.default_rng(seed).standard_normal((24, 3))
    order, offsets = average_linkage(vectors, num_clusters)
    assert sorted(order.tolist()) == list(range(24))
    found = {frozenset(order[start:end].tolist()) for start, end in itertools.pairwise(offsets)}
    assert found == by_definition(vectors, num_clusters)


def test_an_unequal_partition_in_a_file_and_out_again(tmp_path):
    order, offsets = average_linkage(np.random.default_rng(0).standard_normal((40, 3)), 7)
    permutation = Permutation(invert(order), 0, offsets=offsets)
    path = tmp_path / "permutation.npz"
    save_permutation(path, permutation, "abc")
    found, _ = load_permutation(path)
    assert found.levels == (offsets,)
    assert permutation_fingerprint(found) == permutation_fingerprint(permutation)
    assert found.said() == f"7 clusters of {np.diff(offsets).min()} to {np.diff(offsets).max()} codes"
    clusters = found.cluster_of_old
    np.testing.assert_array_equal(np.bincount(clusters), np.diff(offsets))
    # Every use counts the size of its code's cluster.
    usage = np.arange(40)
    sizes = np.array([np.sum(clusters == cluster) for cluster in clusters])
    assert found.usage_weighted_size(usage) == pytest.approx(np.sum(usage * sizes) / usage.sum())


def test_members_drawn_are_others_of_the_same_unequal_cluster():
    order, offsets = average_linkage(np.random.default_rng(0).standard_normal((40, 3)), 7)
    permutation = Permutation(invert(order), 0, offsets=offsets)
    codes = np.tile(np.arange(40), (500, 1))
    drawn = random_members(codes, permutation, np.random.default_rng(1))
    clusters = permutation.cluster_of_old
    np.testing.assert_array_equal(clusters[drawn], clusters[codes])
    alone = np.diff(offsets)[clusters] == 1
    np.testing.assert_array_equal(drawn[:, alone], codes[:, alone])
    assert np.all(drawn[:, ~alone] != codes[:, ~alone])
    # All of them come.
    for code in np.flatnonzero(~alone):
        assert len(np.unique(drawn[:, code])) == np.diff(offsets)[clusters[code]] - 1


@pytest.mark.parametrize("offsets", [(0, 4), (1, 8), (0, 4, 4, 8), (0, 9)])
def test_offsets_that_are_none_are_refused(offsets):
    with pytest.raises(ValueError, match="rise from 0 to the number of codes, 8"):
        Permutation(np.arange(8, dtype=np.int32), 0, offsets=offsets)
