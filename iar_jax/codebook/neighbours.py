"""The codes near each code, and how much of a target each of them gets."""

import numpy as np
from jaxtyping import Array, Float, Int

from iar_jax.codebook.distances import nearest_neighbours

# Steps of a bisection, of the logarithm of the temperature.
BISECTIONS = 60


def near_codes(
    vectors: Float[Array | np.ndarray, "N d"], count: int, temperature: float = 0.0
) -> tuple[Int[np.ndarray, "N k"], Float[np.ndarray, "N k"]]:
    """The nearest codes of each, itself first, and their shares: softmax(−d² / τ) over the k.

    Args:
        vectors: of codes, unit ones where the tokenizer compares such: d² is then in [0, 4].
        count: k, from 2 to N.
        temperature: τ. 0 takes the one at which the entropy of the shares is half of ln k on the mean over all codes:
            neither the code alone nor all alike. (DIST2Loss, arXiv 2503.02379, matches entropies as well, and says 9.7
            for squared errors of one codebook of 16,384; which entropy it matches could not be found out.)

    Raises:
        ValueError: a count below 2 or above N.
    """
    if not 2 <= count <= len(vectors):
        raise ValueError(f"{count} near codes: 2 to all {len(vectors)} are possible, the code itself among them")
    ids, distances = (np.asarray(found) for found in nearest_neighbours(vectors, count - 1))
    own = np.arange(len(ids), dtype=np.int32)[:, None]
    squares = np.concatenate([np.zeros((len(ids), 1)), distances.astype(np.float64)], axis=1)
    shares = shares_at(squares, temperature or matched_temperature(squares))
    return np.concatenate([own, ids], axis=1).astype(np.int32), shares.astype(np.float32)


def shares_at(squares: Float[np.ndarray, "N k"], temperature: float) -> Float[np.ndarray, "N k"]:
    """softmax(−squares / τ) of each row, in float64."""
    powers = np.exp(-(squares - squares.min(axis=1, keepdims=True)) / temperature)
    return powers / powers.sum(axis=1, keepdims=True)


def matched_temperature(squares: Float[np.ndarray, "N k"]) -> float:
    """The τ at which the mean entropy of the rows' shares is half of ln k; entropy rises with τ."""
    low, high = np.log(1e-12), np.log(1e6)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        shares = shares_at(squares, float(np.exp(middle)))
        entropy = -np.sum(shares * np.log(np.maximum(shares, 1e-300)), axis=1).mean()
        low, high = (middle, high) if entropy < np.log(squares.shape[1]) / 2 else (low, middle)
    return float(np.exp((low + high) / 2))
