"""The Fréchet distance between two Gaussians, without a general matrix square root."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float


class FeatureStatistics(NamedTuple):
    """Mean and unbiased covariance of features, float64."""

    mean: Float[np.ndarray, " D"]
    covariance: Float[np.ndarray, "D D"]


def feature_statistics(features: Float[np.ndarray, "N D"]) -> FeatureStatistics:
    """Mean and unbiased covariance (as numpy.cov with rowvar=False) in float64.

    Raises:
        ValueError: fewer than two rows, or features that are not finite.
    """
    features = np.asarray(features, np.float64)
    if len(features) < 2:
        raise ValueError(f"a covariance needs two rows of features at least; there are {len(features)}")
    if not np.isfinite(features).all():
        raise ValueError("features must be finite")
    return FeatureStatistics(features.mean(axis=0), np.cov(features, rowvar=False).reshape(features.shape[1], -1))


class RunningStatistics:
    """Statistics of features that come in parts and are not kept (Chan et al.'s update, float64)."""

    def __init__(self, dimension: int):
        self.count = 0
        self.mean = np.zeros(dimension)
        self.scatter = np.zeros((dimension, dimension))

    def update(self, features: Float[np.ndarray, "N D"]) -> None:
        """Takes some more rows.

        Raises:
            ValueError: features that are not finite.
        """
        rows = np.asarray(features, np.float64)
        if not np.isfinite(rows).all():
            raise ValueError("features must be finite")
        if not len(rows):
            return
        mean = rows.mean(axis=0)
        centred = rows - mean
        count = self.count + len(rows)
        apart = mean - self.mean
        self.scatter += centred.T @ centred + np.outer(apart, apart) * (self.count * len(rows) / count)
        self.mean += apart * (len(rows) / count)
        self.count = count

    def result(self) -> FeatureStatistics:
        """Mean and unbiased covariance; raises ValueError for fewer than two rows."""
        if self.count < 2:
            raise ValueError(f"a covariance needs two rows of features at least; there are {self.count}")
        return FeatureStatistics(self.mean, self.scatter / (self.count - 1))


def frechet_distance(
    mean1: Float[np.ndarray, " D"],
    cov1: Float[np.ndarray, "D D"],
    mean2: Float[np.ndarray, " D"],
    cov2: Float[np.ndarray, "D D"],
) -> float:
    """|mean1 - mean2|^2 + tr(cov1) + tr(cov2) - 2 tr((cov1 cov2)^(1/2)).

    The last trace is the sum of the square roots of the eigenvalues of R^T cov2 R, where R R^T = cov1: symmetric, so it
    is real and defined for singular covariances too; eigenvalues that rounding made negative count as zero. R is
    Cholesky's where there is one, and made of eigenvectors, which takes several times as long, where there is none. The
    distance of equal Gaussians is 0, and none is below.
    """
    mean1, cov1, mean2, cov2 = (np.asarray(x, np.float64) for x in (mean1, cov1, mean2, cov2))
    if np.array_equal(mean1, mean2) and np.array_equal(cov1, cov2):
        return 0.0  # rounding of the roots would say something else
    try:
        root = np.linalg.cholesky(cov1)
    except np.linalg.LinAlgError:
        values, vectors = np.linalg.eigh(cov1)
        root = vectors * np.sqrt(np.maximum(values, 0.0))
    middle = np.linalg.eigvalsh(root.T @ cov2 @ root)
    trace = np.sum(np.sqrt(np.maximum(middle, 0.0)))
    distance = np.sum(np.square(mean1 - mean2)) + np.trace(cov1) + np.trace(cov2) - 2.0 * trace
    return float(np.maximum(distance, 0.0))
