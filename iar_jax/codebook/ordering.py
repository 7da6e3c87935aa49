"""The order of codes inside a cluster. It makes pictures and statistics readable; training does not see it."""

import numpy as np
from jaxtyping import Float, Int


def order_by_cluster(vectors: Float[np.ndarray, "N d"], assignment: Int[np.ndarray, " N"]) -> Int[np.ndarray, " N"]:
    """Old ids in their new order: clusters by index, inside each the nearest-neighbour chain.

    Args:
        vectors: the vectors that were clustered.
        assignment: cluster of each; all clusters equally large.

    Returns:
        `order` with order[new] = old.
    """
    num_clusters = int(assignment.max()) + 1
    chains = []
    for cluster in range(num_clusters):
        members = np.flatnonzero(assignment == cluster)
        chains.append(members[nearest_neighbour_chain(vectors[members])])
    return np.concatenate(chains).astype(np.int32)


def nearest_neighbour_chain(members: Float[np.ndarray, "m d"]) -> Int[np.ndarray, " m"]:
    """A chain through the members of one cluster, grown from its middle to both sides.

    The member nearest the mean comes to place m/2 - 1 and its nearest neighbour to m/2; then the left end and the
    right end take their nearest member that is left, in turn (the order of the published IAR mapping).
    """
    members = np.asarray(members, np.float64)
    size = len(members)
    distances = np.sum(np.square(members[:, None] - members[None]), axis=-1)
    start = int(np.argmin(np.sum(np.square(members - members.mean(axis=0)), axis=-1)))
    chain = np.full(size, -1)
    free = np.ones(size, bool)
    left = right = max(size // 2 - 1, 0)
    chain[left] = start
    free[start] = False
    for step in range(size - 1):
        go_right = (step % 2 == 0 or left == 0) and right < size - 1
        end = chain[right if go_right else left]
        following = int(np.argmin(np.where(free, distances[end], np.inf)))
        free[following] = False
        if go_right:
            right += 1
            chain[right] = following
        else:
            left -= 1
            chain[left] = following
    return chain
