"""If these fail, reported distances are not what their names say."""

import numpy as np
import pytest
import scipy.linalg

from iar_jax.metrics.frechet import feature_statistics, frechet_distance
from iar_jax.metrics.precision_recall import precision_recall


@pytest.fixture(scope="module")
def small(golden):
    return dict(np.load(golden("metrics_small.npz")))


def test_the_golden_distance_is_reproduced(small):
    reference, samples = (feature_statistics(small[k]) for k in ("reference_features", "sample_features"))
    np.testing.assert_allclose(frechet_distance(*reference, *samples), small["fid"], rtol=1e-6)


def test_the_distance_is_that_of_the_matrix_square_root():
    rng = np.random.default_rng(0)
    mixes = rng.standard_normal((2, 10, 10))
    (m1, c1), (m2, c2) = (feature_statistics(rng.standard_normal((200, 10)) @ mix) for mix in mixes)
    root = scipy.linalg.sqrtm(c1 @ c2).real
    expected = np.square(m1 - m2).sum() + np.trace(c1 + c2 - 2 * root)
    np.testing.assert_allclose(frechet_distance(m1, c1, m2, c2), expected, rtol=1e-9)
    np.testing.assert_allclose(frechet_distance(m1, c1, m1, c1), 0.0, atol=1e-9)


def test_the_distance_is_defined_for_fewer_images_than_dimensions():
    rng = np.random.default_rng(0)
    few, many = feature_statistics(rng.standard_normal((5, 20))), feature_statistics(rng.standard_normal((50, 20)))
    root = scipy.linalg.sqrtm(few.covariance @ many.covariance).real
    expected = np.square(few.mean - many.mean).sum() + np.trace(few.covariance + many.covariance - 2 * root)
    for pair in ((few, many), (many, few)):
        np.testing.assert_allclose(frechet_distance(*pair[0], *pair[1]), expected, rtol=1e-6)
    np.testing.assert_allclose(frechet_distance(*few, *few), 0.0, atol=1e-6)


def test_bad_features_are_refused():
    with pytest.raises(ValueError, match="two rows"):
        feature_statistics(np.zeros((1, 3)))
    with pytest.raises(ValueError, match="finite"):
        feature_statistics(np.full((3, 3), np.nan))


def test_the_golden_precision_and_recall_are_reproduced(small):
    precision, recall = precision_recall(small["reference_features"], small["sample_features"], k=3)
    # The reference rounds distances to float16.
    assert abs(precision - small["precision"]) < 0.01
    assert abs(recall - small["recall"]) < 0.01


def test_precision_and_recall_equal_the_definition_in_any_block_size(monkeypatch):
    rng = np.random.default_rng(1)
    reference, samples = rng.standard_normal((40, 3)), 0.8 * rng.standard_normal((30, 3)) + 0.5

    def inside(points, manifold, k):
        distances = np.linalg.norm(manifold[:, None] - manifold[None], axis=-1)
        radii = np.sort(distances, axis=1)[:, k]
        return np.mean((np.linalg.norm(points[:, None] - manifold[None], axis=-1) <= radii).any(axis=1))

    expected = inside(samples, reference, 2), inside(reference, samples, 2)
    for block in (7, 2048):
        monkeypatch.setattr("iar_jax.metrics.precision_recall.BLOCK", block)
        np.testing.assert_allclose(precision_recall(reference, samples, k=2), expected)
    with pytest.raises(ValueError, match="more than 3 rows"):
        precision_recall(reference[:3], samples)
