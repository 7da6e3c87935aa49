"""If these fail, codes are misaligned with the codebook: pictures turn to noise without any error."""

import numpy as np
import pytest
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse.csgraph import minimum_spanning_tree

from iar_jax.codebook.ordering import (
    nearest_neighbour_chain,
    order_along_path,
    order_by_cluster,
    path_length,
    spanning_tree_length,
)
from iar_jax.codebook.permutation import Permutation, invert, load_permutation, save_permutation


@given(st.permutations(list(range(24))))
def test_round_trips(order):
    permutation = Permutation.from_order(np.array(order), 4)
    ids = np.arange(24)
    np.testing.assert_array_equal(permutation.new_to_old[permutation.old_to_new[ids]], ids)
    np.testing.assert_array_equal(permutation.old_to_new[permutation.new_to_old[ids]], ids)
    np.testing.assert_array_equal(permutation.new_to_old, order)
    np.testing.assert_array_equal(permutation.cluster_of_old, invert(np.array(order)) // 4)


def test_the_published_order_is_reproduced(golden):
    small = np.load(golden("kmeans_small.npz"))
    np.testing.assert_array_equal(order_by_cluster(small["vectors"], small["assignment"]), small["order"])


@given(st.integers(1, 9), st.integers(0, 100))
def test_a_chain_visits_every_member_once_also_among_duplicates(size, seed):
    members = np.random.default_rng(seed).integers(0, 2, (size, 2)).astype(np.float32)
    assert sorted(nearest_neighbour_chain(members).tolist()) == list(range(size))


def test_duplicate_codes_keep_their_own_places():
    vectors = np.zeros((8, 2), np.float32)
    order = order_by_cluster(vectors, np.array([0, 1, 0, 1, 0, 1, 0, 1]))
    assert sorted(order.tolist()) == list(range(8))
    assert set(order[:4].tolist()) == {0, 2, 4, 6}


@settings(deadline=None, max_examples=20)
@given(
    # A few shapes, each of which is compiled once.
    st.sampled_from([(1, 1), (1, 7), (6, 1), (2, 2), (3, 9), (5, 4)]),
    st.integers(0, 100),
    st.sampled_from(["normal", "duplicates", "equal"]),
)
@pytest.mark.slow
def test_a_path_keeps_clusters_together_and_is_no_shorter_than_the_tree(shape, seed, kind):
    num_clusters, size = shape
    rng = np.random.default_rng(seed)
    vectors = rng.standard_normal((num_clusters * size, 3)).astype(np.float32)
    if kind == "duplicates":
        vectors = vectors[rng.integers(0, max(1, len(vectors) // 3), len(vectors))]
    if kind == "equal":
        vectors[:] = 1.0
    assignment = rng.permutation(np.repeat(np.arange(num_clusters), size)).astype(np.int32)
    order = order_along_path(vectors, assignment)
    assert sorted(order.tolist()) == list(range(len(vectors)))
    blocks = assignment[order].reshape(num_clusters, size)
    assert (blocks == blocks[:, :1]).all()
    assert path_length(vectors, order) >= spanning_tree_length(vectors) - 1e-3


def test_the_tree_is_that_of_scipy():
    vectors = np.random.default_rng(0).standard_normal((200, 8)).astype(np.float32)
    distances = np.linalg.norm(vectors[:, None].astype(np.float64) - vectors, axis=-1)
    np.testing.assert_allclose(spanning_tree_length(vectors), minimum_spanning_tree(distances).sum(), rtol=1e-5)


def test_no_move_shortens_a_path_any_more(golden):
    small = np.load(golden("kmeans_small.npz"))
    vectors = small["vectors"].astype(np.float32)
    order = order_along_path(vectors, small["assignment"].astype(np.int32))
    assert path_length(vectors, order) < 0.97 * path_length(vectors, small["order"])
    # Every turn of a part of a cluster, not only those that the neighbour lists offer: hardly any helps still.
    along = vectors[order].astype(np.float64)
    distances = np.linalg.norm(along[:, None] - along, axis=-1)
    gains = []
    for start in range(0, len(order), 32):
        for i in range(max(start, 1), start + 32):
            for j in range(i + 1, min(start + 32, len(order) - 1)):
                before = distances[i - 1, i] + distances[j, j + 1]
                gains.append(before - distances[i - 1, j] - distances[i, j + 1])
    assert max(gains) < 0.01 * path_length(vectors, order)
    assert np.mean(np.array(gains) > 1e-5) < 0.001


def test_codes_and_codebook_are_rearranged_alike():
    rng = np.random.default_rng(0)
    permutation = Permutation.from_order(rng.permutation(16), 4)
    codebook, codes = rng.standard_normal((16, 3)), rng.integers(0, 16, (5, 7))
    rearranged = permutation.rearrange_codes(codes)
    np.testing.assert_array_equal(permutation.rearrange_codebook(codebook)[rearranged], codebook[codes])


@pytest.mark.parametrize(
    ("mapping", "cluster_size", "message"),
    [
        ([0, 1, 1, 2], 2, "code 2 goes to 1, and so does a code before it"),
        ([0, 1, 4, 2], 2, r"code 2 goes to 4, which is outside \[0, 4\)"),
        ([0, -1, 1, 2], 2, "code 1 goes to -1"),
        ([0, 1, 2, 3], 3, "cluster_size 3 does not divide the codebook size 4"),
    ],
)
def test_what_is_no_permutation_is_refused(mapping, cluster_size, message):
    with pytest.raises(ValueError, match=message):
        Permutation(np.array(mapping), cluster_size)


def test_the_file_round_trips_and_a_damaged_one_is_refused(tmp_path):
    path = epath.Path(tmp_path) / "permutation.npz"
    permutation = Permutation.from_order(np.random.default_rng(0).permutation(32), 8)
    save_permutation(path, permutation, "abc")
    found, fingerprint = load_permutation(path)
    np.testing.assert_array_equal(found.old_to_new, permutation.old_to_new)
    assert (found.cluster_size, fingerprint) == (8, "abc")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="permutation"):
        load_permutation(path)


def test_a_pickle_in_the_file_is_not_run(tmp_path):
    path = epath.Path(tmp_path) / "permutation.npz"
    evil = np.array([{"a": 1}], dtype=object)
    np.savez(path, old_to_new=evil, cluster_size=1, codebook_fingerprint="x")
    with pytest.raises(ValueError, match="allow_pickle"):
        load_permutation(path)
