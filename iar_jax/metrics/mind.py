"""MIND, the distance of two sets of features by their projections (arXiv 2605.06797)."""

import numpy as np
from jaxtyping import Float

BLOCK = 64


def mind(
    x: Float[np.ndarray, "A D"], y: Float[np.ndarray, "B D"], directions: Float[np.ndarray, "M D"], *, seed: int = 0
) -> float:
    """3 D times the mean, over directions u and ranks j, of (sort(x u)_j - sort(y u)_j)^2, in float64.

    No Gaussian is assumed and no covariance estimated, for which fewer images are said to suffice than for a Fréchet
    distance. For y = x + c and many directions it is 3 |c|^2. The value depends on the directions, of which the field
    takes 1,000: see `random_directions`.

    Args:
        x, y: features; of the larger set, as many rows as the smaller one has are drawn with `seed`.
        directions: normalised here.

    Raises:
        ValueError: an empty set, features that are not finite, or a direction without length.
    """
    x, y, directions = (np.asarray(array, np.float64) for array in (x, y, directions))
    if not len(x) or not len(y) or not len(directions):
        raise ValueError(f"nothing to compare: {len(x)} and {len(y)} rows, {len(directions)} directions")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("features must be finite")
    lengths = np.linalg.norm(directions, axis=1, keepdims=True)
    if not (np.isfinite(lengths).all() and lengths.all()):
        raise ValueError("a direction is zero or not finite")
    rng, count = np.random.default_rng(seed), min(len(x), len(y))
    x, y = (rows if len(rows) == count else rows[rng.choice(len(rows), count, replace=False)] for rows in (x, y))
    total = 0.0
    for units in np.array_split(directions / lengths, -(-len(directions) // BLOCK)):
        difference = np.sort(x @ units.T, axis=0) - np.sort(y @ units.T, axis=0)
        total += float(np.sum(np.square(difference)))
    return 3.0 * x.shape[1] * total / (len(directions) * count)


def random_directions(dim: int, count: int = 1000, seed: int = 0) -> Float[np.ndarray, "M D"]:
    """Directions drawn evenly from the sphere, not normalised. A value of `mind` goes with its count and seed."""
    return np.random.default_rng(seed).standard_normal((count, dim))
