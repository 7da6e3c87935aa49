"""The kernel Inception distance (KID, Binkowski et al. 2018)."""

import numpy as np
from jaxtyping import Float


def kernel_distance(
    first: Float[np.ndarray, "A D"],
    second: Float[np.ndarray, "B D"],
    *,
    num_subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """Mean and standard deviation of the unbiased squared MMD over random subsets, kernel (x . y / D + 1)^3.

    Unlike a Fréchet distance it is unbiased for any number of images; it may be a little below zero. Subsets are as
    large as the smaller set where that has fewer than `subset_size`.

    Raises:
        ValueError: fewer than two rows in a set.
    """
    size = min(subset_size, len(first), len(second))
    if size < 2:
        raise ValueError(f"an unbiased estimate needs two rows at least; there are {len(first)} and {len(second)}")
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(num_subsets):
        x = first[rng.choice(len(first), size, replace=False)].astype(np.float64)
        y = second[rng.choice(len(second), size, replace=False)].astype(np.float64)
        kernels = [(a @ b.T / x.shape[1] + 1.0) ** 3 for a, b in ((x, x), (y, y), (x, y))]
        within = sum((k.sum() - np.trace(k)) / (size * (size - 1)) for k in kernels[:2])
        found.append(within - 2.0 * kernels[2].mean())
    return float(np.mean(found)), float(np.std(found))
