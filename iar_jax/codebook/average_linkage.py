"""Unequal clusters by average linkage, as MASC has them (arXiv 2510.04220).

Two clusters are joined, again and again, whose codes are nearest to each other on the mean. Nothing keeps clusters of
one size, so that a crowd of codes that look alike stays one cluster, and a code that is like no other is one by itself.
"""

import numpy as np
import scipy.cluster.hierarchy
from jaxtyping import Float, Int


def average_linkage(
    vectors: Float[np.ndarray, "N d"], num_clusters: int
) -> tuple[Int[np.ndarray, " N"], tuple[int, ...]]:
    """Old ids in the order of the tree's leaves, in which every cluster is a run, and the clusters' offsets.

    The tree takes N² / 2 distances in float64: 1.1 GB for 16,384 codes, and as much again while it is made.

    Args:
        vectors: finite.
        num_clusters: n in [1, N]; fewer come where distances are equal.
    """
    if len(vectors) == 1:
        return np.zeros(1, np.int32), (0, 1)
    tree = scipy.cluster.hierarchy.linkage(np.asarray(vectors, np.float64), method="average")
    labels = scipy.cluster.hierarchy.fcluster(tree, num_clusters, criterion="maxclust")
    order = scipy.cluster.hierarchy.leaves_list(tree).astype(np.int32)
    starts = np.flatnonzero(np.diff(labels[order])) + 1
    return order, (0, *starts.tolist(), len(order))
