"""Precision and recall of generated images (Kynkäänniemi et al. 2019), by manifolds of nearest-neighbour balls."""

import numpy as np
from jaxtyping import Float

BLOCK = 2048


def precision_recall(
    reference_features: Float[np.ndarray, "R D"], sample_features: Float[np.ndarray, "N D"], k: int = 3
) -> tuple[float, float]:
    """Share of the samples inside the reference's manifold, and of the reference inside the samples'.

    A set's manifold is the union of balls around its members, each as wide as the distance to its k-th neighbour.

    Raises:
        ValueError: a set with k members or fewer.
    """
    reference = np.asarray(reference_features, np.float32)
    samples = np.asarray(sample_features, np.float32)
    if min(len(reference), len(samples)) <= k:
        raise ValueError(f"{k} neighbours need more than {k} rows; there are {len(reference)} and {len(samples)}")
    reference_radii, sample_radii = squared_radii(reference, k), squared_radii(samples, k)
    inside_reference = np.zeros(len(samples), bool)
    inside_samples = np.zeros(len(reference), bool)
    for start in range(0, len(reference), BLOCK):
        block = slice(start, start + BLOCK)
        for other_start in range(0, len(samples), BLOCK):
            other = slice(other_start, other_start + BLOCK)
            distances = squared_distances(reference[block], samples[other])
            inside_reference[other] |= (distances <= reference_radii[block, None]).any(axis=0)
            inside_samples[block] |= (distances <= sample_radii[None, other]).any(axis=1)
    return float(inside_reference.mean()), float(inside_samples.mean())


def squared_distances(first: Float[np.ndarray, "A D"], second: Float[np.ndarray, "B D"]) -> Float[np.ndarray, "A B"]:
    """Squared Euclidean distances, not negative; float32 products of float32 rows."""
    norms = np.square(first).sum(axis=1)[:, None] + np.square(second).sum(axis=1)
    return np.maximum(norms - 2.0 * first @ second.T, 0.0)


def squared_radii(features: Float[np.ndarray, "N D"], k: int) -> Float[np.ndarray, " N"]:
    """Squared distance of each row to its k-th nearest other row."""
    radii = np.empty(len(features), np.float32)
    for start in range(0, len(features), BLOCK):
        block = slice(start, min(start + BLOCK, len(features)))
        nearest = np.full((block.stop - block.start, 0), np.inf, np.float32)
        for other_start in range(0, len(features), BLOCK):
            other = features[other_start : other_start + BLOCK]
            found = np.concatenate([nearest, squared_distances(features[block], other)], axis=1)
            nearest = np.partition(found, min(k, found.shape[1] - 1), axis=1)[:, : k + 1]
        # The nearest of all is the row itself.
        radii[block] = np.sort(nearest, axis=1)[:, k]
    return radii
