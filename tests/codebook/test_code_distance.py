"""If these fail, the study of code distance measures something else than it says."""

import numpy as np
import pytest
from sklearn.neighbors import NearestNeighbors

from iar_jax.codebook import code_distance
from iar_jax.codebook.code_distance import Change, Substitution
from iar_jax.codebook.distances import nearest_neighbours
from iar_jax.codebook.permutation import Permutation


@pytest.fixture
def codebook():
    vectors = np.random.default_rng(0).standard_normal((96, 5)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_neighbours_are_those_of_scikit_learn(codebook):
    found, distances = nearest_neighbours(codebook, 7)
    expected, ids = NearestNeighbors(n_neighbors=8, algorithm="brute").fit(codebook.astype(np.float64)).kneighbors()
    np.testing.assert_array_equal(found, ids[:, :7])
    # float32 rounds squared distances of unit vectors by a few 1e-7.
    np.testing.assert_allclose(distances, expected[:, :7] ** 2, atol=2e-6)


def test_neighbours_can_be_kept_to_a_group(codebook):
    groups = np.arange(96) % 4
    found, _ = nearest_neighbours(codebook, 23, groups)
    assert (groups[np.asarray(found)] == groups[:, None]).all()
    assert (
        np.sort(np.concatenate([np.asarray(found), np.arange(96)[:, None]], axis=1))[0] == np.arange(0, 96, 4)
    ).all()


def test_random_members_are_other_members_of_the_cluster_all_equally_often():
    permutation = Permutation.from_order(np.random.default_rng(1).permutation(24), 4)
    codes = np.full(6000, 7)
    found = code_distance.random_members(codes, permutation, np.random.default_rng(2))
    own = np.flatnonzero(permutation.cluster_of_old == permutation.cluster_of_old[7])
    counts = np.bincount(found, minlength=24)
    assert counts[7] == 0
    assert set(np.flatnonzero(counts)) == set(own) - {7}
    # Three others: 2000 each, give or take 5 standard deviations.
    assert np.abs(counts[counts > 0] - 2000).max() < 5 * np.sqrt(6000 * 2 / 9)


def test_a_cluster_of_one_gives_the_code_itself():
    permutation = Permutation(np.arange(5, dtype=np.int32), 1)
    codes = np.array([3, 0, 4])
    np.testing.assert_array_equal(code_distance.random_members(codes, permutation, np.random.default_rng(0)), codes)


def test_each_row_of_a_study_decodes_the_codes_that_it_names(codebook):
    # A decoder that paints the id: what comes out tells what went in.
    def decode(codes):
        return np.broadcast_to(codes[..., None], (*codes.shape, 3)).astype(np.uint8)

    permutation = Permutation.from_order(np.random.default_rng(1).permutation(96), 8)
    codes = np.random.default_rng(2).integers(0, 96, (4, 3, 3))
    rng = np.random.default_rng(3)
    study = code_distance.substitution_study(codes, decode(codes), codebook, permutation, decode, None, rng)
    neighbours = np.asarray(nearest_neighbours(codebook, 64)[0])
    assert len(study) + 1 == code_distance.num_decodings(96)
    for rank, _, images, change in study[:-2]:
        np.testing.assert_array_equal(images[..., 0], neighbours[codes, rank - 1])
        squared = np.square((images[..., 0] - codes.astype(np.float64)) / 255)
        np.testing.assert_allclose(change.mse, squared.mean())
        np.testing.assert_allclose(change.psnr, 10 * np.log10(1 / squared.mean()))
    clusters = permutation.cluster_of_old
    assert (clusters[study[-2].images[..., 0]] == clusters[codes]).all()
    assert study[-2].title == code_distance.OWN_CLUSTER


def test_ranks_end_below_the_codebook():
    assert code_distance.ranks_below(5) == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("changes", "own", "expected"),
    [
        ([Change(0.1, 10, None), Change(0.3, 5, None)], Change(0.2, 7, None), 2),
        ([Change(0.1, 10, None), Change(0.3, 5, None)], Change(0.4, 4, None), None),
        ([Change(0.3, 10, 0.1), Change(0.3, 5, 0.5)], Change(0.2, 7, 0.2), 2),  # LPIPS goes first
    ],
)
def test_visible_is_more_than_the_tokenizer_loses(changes, own, expected):
    image = np.zeros((1, 1, 1, 3), np.uint8)
    study = [Substitution(rank, "", image, change) for rank, change in enumerate(changes, 1)]
    study.append(Substitution(0, code_distance.ANY_CODE, image, Change(9.0, -9.0, 9.0)))
    assert code_distance.first_visible_rank(study, own) == expected


def test_the_share_of_neighbours_in_the_own_cluster():
    line = np.arange(12, dtype=np.float32)[:, None]
    # Ends of a cluster have one of their two neighbours outside, but for the ends of the line.
    assert code_distance.neighbours_in_own_cluster(line, np.arange(12) // 12, 2) == 1.0
    assert code_distance.neighbours_in_own_cluster(line, np.arange(12), 2) == 0.0
    np.testing.assert_allclose(code_distance.neighbours_in_own_cluster(line, np.arange(12) // 6, 2), 22 / 24)
