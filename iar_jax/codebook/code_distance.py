"""What a wrong code costs in pixels: the observation that IAR rests on, as a measurement on any tokenizer.

A code's distance from another is its rank among that one's nearest neighbours. Every code of some pictures is replaced
by its k-th nearest neighbour, or by a random member of its own cluster, which is what the cluster loss forgives, and
the decoded pictures are compared with those of the true codes. (The paper's figure shows decodes that hardly change
below a distance of 12.)
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8

from iar_jax.codebook.distances import nearest_neighbours
from iar_jax.codebook.permutation import Permutation

RANKS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)

# Titles of the substitutions that are not a rank.
OWN_CLUSTER, ANY_CODE = "random member of its cluster", "any code at random"


class Change(NamedTuple):
    """How far pictures of substituted codes are from those of the true ones.

    Attributes:
        mse: mean squared error of pixels in [0, 1].
        psnr: of that, dB; infinite where nothing changed.
        lpips: mean perceptual distance, None without its weights.
    """

    mse: float
    psnr: float
    lpips: float | None


class Substitution(NamedTuple):
    """One way to replace all codes: its rank (0 where it has none), a title, the pictures and how far they are."""

    rank: int
    title: str
    images: UInt8[np.ndarray, "n H W 3"]
    change: Change


def substitution_study(
    codes: Int[np.ndarray, "n h w"],
    true: UInt8[np.ndarray, "n H W 3"],
    codebook: Float[np.ndarray, "N d"],
    permutation: Permutation,
    decode: Callable[[np.ndarray], np.ndarray],
    perceptual_distance: Callable[[np.ndarray, np.ndarray], float] | None,
    rng: np.random.Generator,
) -> list[Substitution]:
    """Every rank of RANKS that the codebook has, then random members of the own cluster, then any codes.

    Args:
        codes: original ids of some pictures.
        true: those pictures, decoded.
        codebook: the vectors that are compared, normalised where the tokenizer looks codes up so.
        decode: codes [n, h, w] -> uint8 pictures [n, H, W, 3].
        perceptual_distance: of two sets of uint8 pictures, the mean; None leaves LPIPS out.
    """
    ranks = ranks_below(len(codebook))
    neighbours = np.asarray(nearest_neighbours(codebook, ranks[-1])[0])
    replaced = [(rank, f"{_ordinal(rank)} nearest neighbour", neighbours[codes, rank - 1]) for rank in ranks]
    replaced.append((0, OWN_CLUSTER, random_members(codes, permutation, rng)))
    replaced.append((0, ANY_CODE, rng.integers(0, len(codebook), codes.shape)))
    found = []
    for rank, title, substitutes in replaced:
        images = decode(substitutes.astype(np.int32))
        found.append(Substitution(rank, title, images, change(true, images, perceptual_distance)))
    return found


def ranks_below(codebook_size: int) -> list[int]:
    """The ranks that a codebook has."""
    return [rank for rank in RANKS if rank < codebook_size]


def num_decodings(codebook_size: int) -> int:
    """How often a study decodes its pictures, with the true codes'."""
    return len(ranks_below(codebook_size)) + 3


def random_members(
    codes: Int[np.ndarray, "*shape"], permutation: Permutation, rng: np.random.Generator
) -> Int[np.ndarray, "*shape"]:
    """For each code another one of its cluster, all of them equally likely; the code itself in clusters of one."""
    bounds, clusters = permutation.bounds, permutation.cluster_of_old[codes]
    first, size = bounds[clusters], np.diff(bounds)[clusters]
    # One bound for all codes where there is one: the draws are others than for as many equal bounds.
    high = max(permutation.cluster_size, 2) if permutation.cluster_size else np.maximum(size, 2)
    step = np.where(size > 1, rng.integers(1, high, codes.shape), 0)
    place = permutation.rearrange_codes(codes) - first
    return permutation.new_to_old[first + (place + step) % size]


def change(
    true: UInt8[np.ndarray, "n H W 3"],
    images: UInt8[np.ndarray, "n H W 3"],
    perceptual_distance: Callable[[np.ndarray, np.ndarray], float] | None = None,
) -> Change:
    """How far pictures are from the true ones."""
    mse = float(np.mean(np.square((true.astype(np.float64) - images) / 255.0)))
    psnr = float("inf") if mse == 0.0 else -10.0 * float(np.log10(mse))
    return Change(mse, psnr, perceptual_distance(true, images) if perceptual_distance else None)


def first_visible_rank(substitutions: list[Substitution], own_error: Change) -> int | None:
    """The first rank whose change is larger than what the tokenizer itself does to a picture.

    By LPIPS where it was measured, or else by squared error. None where no rank changes that much.

    Args:
        own_error: how far the reconstructions are from the original pictures.
    """
    for rank, _, _, found in substitutions:
        if rank and (
            found.lpips > own_error.lpips
            if found.lpips is not None and own_error.lpips is not None
            else found.mse > own_error.mse
        ):
            return rank
    return None


def neighbours_in_own_cluster(codebook: Float[np.ndarray, "N d"], clusters: Int[np.ndarray, " N"], count: int) -> float:
    """Share of the codes' `count` nearest neighbours (fewer in smaller codebooks) that are in their cluster."""
    count = min(count, len(codebook) - 1)
    if count == 0:
        return 1.0
    neighbours = np.asarray(nearest_neighbours(codebook, count)[0])
    return float(np.mean(clusters[neighbours] == clusters[:, None]))


def _ordinal(number: int) -> str:
    suffix = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{suffix}"
