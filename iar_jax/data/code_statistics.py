"""What sets of codes look like: how evenly codes are used, and how much neighbours tell of each other."""

import numpy as np
from jaxtyping import Int


def perplexity(counts: Int[np.ndarray, " N"]) -> float:
    """exp of the entropy of the usage: as many codes as would be used, if evenly."""
    share = counts[counts > 0] / counts.sum()
    return float(np.exp(-np.sum(share * np.log(share))))


def usage_overlap(first: Int[np.ndarray, " N"], second: Int[np.ndarray, " N"]) -> float:
    """The mass that two usage histograms share, 1 for equal ones."""
    return float(np.minimum(first / first.sum(), second / second.sum()).sum())


def neighbour_information(grids: Int[np.ndarray, "B h w"], codebook_size: int, down: int, right: int) -> float:
    """Mutual information in nats between codes and those `down` and `right` of them, less what as many pairs of the
    same codes without any order have.

    Codes are put into 64 classes by their place in the usage's order, for most pairs of codes are never seen.
    """
    counts = np.bincount(grids.ravel(), minlength=codebook_size)
    rank = np.argsort(np.argsort(-counts, kind="stable"))
    classes = np.minimum(rank * 64 // int(np.count_nonzero(counts)), 63)[grids]
    height, width = grids.shape[1:]
    first, second = classes[:, : height - down, : width - right].ravel(), classes[:, down:, right:].ravel()
    shuffled = np.random.default_rng(0).permutation(second)
    return mutual_information(first, second) - mutual_information(first, shuffled)


def mutual_information(first: Int[np.ndarray, " N"], second: Int[np.ndarray, " N"]) -> float:
    """Of pairs of small integers, in nats, by their counts."""
    joint = np.zeros((int(first.max()) + 1, int(second.max()) + 1))
    np.add.at(joint, (first, second), 1.0 / len(first))
    independent = joint.sum(axis=1, keepdims=True) * joint.sum(axis=0, keepdims=True)
    seen = joint > 0
    return float(np.sum(joint[seen] * np.log(joint[seen] / independent[seen])))
