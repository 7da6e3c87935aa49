"""Orders of codes: inside clusters, of the clusters, and of all codes along one short path.

The rearrangement that the IAR paper starts from is the permutation with the least sum of distances between neighbours,
a shortest Hamiltonian path; clusters are what it relaxes that to. Training sees the partition only: an order makes
pictures, statistics and neighbouring ids readable.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from iar_jax.codebook.distances import nearest_neighbours

# Candidates for a code's new neighbour on the path, and the longest run of codes that is moved as a whole.
CANDIDATES, LONGEST_RUN = 8, 3


def order_by_cluster(
    vectors: Float[np.ndarray, "N d"], assignment: Int[np.ndarray, " N"], *coarser: Int[np.ndarray, " n"]
) -> Int[np.ndarray, " N"]:
    """Old ids in the order of the published mapping: clusters by index, inside each the nearest-neighbour chain.

    Args:
        vectors: the vectors that were clustered.
        assignment: cluster of each; all clusters equally large.
        coarser: of further levels, the cluster of each cluster of the level before; those of one come together.

    Returns:
        `order` with order[new] = old.
    """
    num_clusters = int(assignment.max()) + 1
    chains = []
    for cluster in clusters_by_index(num_clusters, *coarser):
        members = np.flatnonzero(assignment == cluster)
        chains.append(members[nearest_neighbour_chain(vectors[members])])
    return np.concatenate(chains).astype(np.int32)


def clusters_by_index(num_clusters: int, *coarser: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """Clusters in the order of their index, those of one coarser cluster together, which come by index themselves."""
    if not coarser:
        return np.arange(num_clusters)
    groups = clusters_by_index(int(coarser[0].max()) + 1, *coarser[1:])
    return np.concatenate([np.flatnonzero(coarser[0] == group) for group in groups])


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


def order_along_path(
    vectors: Float[np.ndarray, "N d"], assignment: Int[np.ndarray, " N"], *coarser: Int[np.ndarray, " n"]
) -> Int[np.ndarray, " N"]:
    """Old ids along one short path through all codes that visits one cluster after the other.

    The clusters come in the order of a short path through their means. The codes start as a nearest-neighbour path,
    which 2-opt and Or-opt moves then shorten inside the clusters, until none helps.

    Args:
        vectors: the vectors that were clustered.
        assignment: cluster of each; all clusters equally large.
        coarser: of further levels, the cluster of each cluster of the level before; those of one come together.

    Returns:
        `order` with order[new] = old.
    """
    num_clusters = int(assignment.max()) + 1
    vectors = np.asarray(vectors, np.float32)
    if num_clusters == 1:
        return np.asarray(_short_path(vectors, jnp.asarray(assignment), jnp.zeros(1, jnp.int32)))
    members = np.argsort(assignment, kind="stable").reshape(num_clusters, -1)
    clusters = order_along_path(vectors[members].mean(axis=1), *(coarser or (np.zeros(num_clusters, np.int32),)))
    return np.asarray(_short_path(vectors, jnp.asarray(assignment), jnp.asarray(clusters)))


# config.codebook.order: (vectors, assignment, *coarser) -> old ids in their new order.
ORDERS = {"chain": order_by_cluster, "path": order_along_path}


def path_length(vectors: Float[np.ndarray, "N d"], order: Int[np.ndarray, " N"]) -> float:
    """Sum of the Euclidean distances between neighbours."""
    steps = np.diff(np.asarray(vectors, np.float64)[order], axis=0)
    return float(np.sum(np.linalg.norm(steps, axis=1)))


def spanning_tree_length(vectors: Float[np.ndarray, "N d"]) -> float:
    """Length of the minimum spanning tree (Prim): no path through all vectors is shorter."""
    return float(np.sum(np.asarray(_spanning_tree_edges(jnp.asarray(vectors, jnp.float32)), np.float64)))


@jax.jit
def _spanning_tree_edges(vectors: Float[Array, "N d"]) -> Float[Array, " edges"]:
    def grow(state, _):
        distance, newest = state
        distance = jnp.minimum(distance, jnp.sum(jnp.square(vectors - vectors[newest]), axis=1))
        # Members of the tree are marked by -inf, and stay so.
        distance = distance.at[newest].set(-jnp.inf)
        following = jnp.argmin(jnp.where(jnp.isinf(distance), jnp.inf, distance))
        return (distance, following), jnp.sqrt(distance[following])

    start = (jnp.full(vectors.shape[0], jnp.finfo(jnp.float32).max), jnp.int32(0))
    return jax.lax.scan(grow, start, length=vectors.shape[0] - 1)[1]


class _Moves(NamedTuple):
    """Changes of the path, one an entry: the run [first, last] becomes its part after `middle`, then that up to it.

    `gain` is how much shorter the path gets; either part can be turned round.
    """

    gain: Float[Array, " moves"]
    first: Int[Array, " moves"]
    middle: Int[Array, " moves"]
    last: Int[Array, " moves"]
    turn_head: Bool[Array, " moves"]
    turn_tail: Bool[Array, " moves"]


@jax.jit
def _short_path(
    vectors: Float[Array, "N d"], assignment: Int[Array, " N"], clusters: Int[Array, " n"]
) -> Int[Array, " N"]:
    num_vectors = vectors.shape[0]
    size = num_vectors // clusters.shape[0]
    order = _nearest_neighbour_path(vectors, assignment, clusters)
    if size < 3:
        return order
    candidates = nearest_neighbours(vectors, min(CANDIDATES, size - 1), assignment)[0]

    def shorten(state):
        order, round_, idle = state
        moves = _moves(vectors, order, candidates, size)
        # Two moves of one window could undo each other: each window makes its best one. Windows shift from round to
        # round, so that no place stays at a border.
        window = (jnp.arange(num_vectors + 2) + (round_ % 2) * size) // (2 * size)
        inside = window[moves.first] == window[moves.last + 2]
        gain = jnp.where(inside, moves.gain, 0.0)
        best = jnp.zeros(num_vectors + 2).at[window[moves.first]].max(gain)
        chosen = (gain > 1e-6) & (gain == best[window[moves.first]])
        number = jnp.arange(gain.shape[0], dtype=jnp.int32)
        winner = jnp.full(num_vectors + 2, -1, jnp.int32).at[window[moves.first]].max(jnp.where(chosen, number, -1))
        mine = winner[window[1:-1]]
        order = order[jnp.where(mine >= 0, _source(jax.tree.map(lambda x: x[mine], moves)), jnp.arange(num_vectors))]
        return order, round_ + 1, jnp.where(jnp.any(chosen), 0, idle + 1)

    return jax.lax.while_loop(lambda state: state[2] < 2, shorten, (order, jnp.int32(0), jnp.int32(0)))[0]


def _source(move: _Moves) -> Int[Array, " N"]:
    """Where the code at each place comes from when the place's move is made."""
    place = jnp.arange(move.first.shape[0])
    offset = place - move.first
    tail = move.last - move.middle
    from_tail = jnp.where(move.turn_tail, move.last - offset, move.middle + 1 + offset)
    from_head = jnp.where(move.turn_head, move.middle - (offset - tail), move.first + offset - tail)
    inside = (place >= move.first) & (place <= move.last)
    return jnp.where(inside, jnp.where(offset < tail, from_tail, from_head), place)


def _nearest_neighbour_path(
    vectors: Float[Array, "N d"], assignment: Int[Array, " N"], clusters: Int[Array, " n"]
) -> Int[Array, " N"]:
    size = vectors.shape[0] // clusters.shape[0]

    def step(state, place):
        free, last = state
        distance = jnp.sum(jnp.square(vectors - last), axis=1)
        allowed = free & (assignment == clusters[place // size])
        following = jnp.argmin(jnp.where(allowed, distance, jnp.inf)).astype(jnp.int32)
        return (free.at[following].set(False), vectors[following]), following

    # From the member of the first cluster that is farthest from the middle of everything.
    distance = jnp.sum(jnp.square(vectors - jnp.mean(vectors, axis=0)), axis=1)
    end = vectors[jnp.argmax(jnp.where(assignment == clusters[0], distance, -1.0))]
    start = (jnp.ones(vectors.shape[0], bool), end)
    return jax.lax.scan(step, start, jnp.arange(vectors.shape[0]))[1]


def _moves(vectors: Float[Array, "N d"], order: Int[Array, " N"], candidates: Int[Array, "N k"], size: int) -> _Moves:
    """All 2-opt and Or-opt moves inside clusters that bring a code beside one of its candidates."""
    num_vectors = vectors.shape[0]
    place_of = jnp.zeros(num_vectors, jnp.int32).at[order].set(jnp.arange(num_vectors, dtype=jnp.int32))
    here = jnp.repeat(jnp.arange(num_vectors, dtype=jnp.int32), candidates.shape[1])
    there = place_of[candidates[order]].ravel()
    along = vectors[order]

    def distance(a, b):
        """Between places; nothing beyond the ends of the path."""
        exists = (a >= 0) & (a < num_vectors) & (b >= 0) & (b < num_vectors)
        difference = along[jnp.clip(a, 0, num_vectors - 1)] - along[jnp.clip(b, 0, num_vectors - 1)]
        return jnp.where(exists, jnp.sqrt(jnp.sum(jnp.square(difference), axis=-1)), 0.0)

    place = jnp.arange(num_vectors, dtype=jnp.int32)
    edge = distance(place - 1, place)  # to the place before
    edge_after = distance(place, place + 1)
    new = distance(here, there)
    false, true = jnp.zeros(here.shape, bool), jnp.ones(here.shape, bool)
    found = []

    def add(possible, gain, first, middle, last, turn_head, turn_tail):
        inside = possible & (first // size == last // size) & (first >= 0) & (last < num_vectors)
        gain = jnp.where(inside, gain, 0.0)
        first, middle, last = (jnp.where(inside, x, 0) for x in (first, middle, last))
        found.append(_Moves(gain, first, middle, last, turn_head, turn_tail))

    low, high = jnp.minimum(here, there), jnp.maximum(here, there)
    # 2-opt: turn round what lies after the one up to the other, or before.
    gain = edge_after[low] + edge_after[high] - new - distance(low + 1, high + 1)
    add(here < there, gain, low + 1, high, high, true, false)
    gain = edge[low] + edge[high] - new - distance(low - 1, high - 1)
    add(here < there, gain, low, high - 1, high - 1, true, false)
    # Or-opt: a run that begins or ends here goes beside the candidate, this end next to it.
    for length in range(1, LONGEST_RUN + 1):
        # What the path gains when the run that starts at a place is taken out.
        ends = jnp.minimum(place + length - 1, num_vectors - 1)
        removal = edge + edge_after[ends] - distance(place - 1, ends + 1)
        for ends_here in (False, True):
            start = here - (length - 1) if ends_here else here
            stop = start + length - 1
            other = start if ends_here else stop
            cut = removal[jnp.maximum(start, 0)]
            outside = (there < start) | (there > stop)
            # Between the candidate and the one after it: this end comes first there.
            gain = cut + edge_after[there] - new - distance(other, there + 1)
            flip = true if ends_here else false
            add(outside & (there > stop), gain, start, stop, there, flip, false)
            add(outside & (there < start - 1), gain, there + 1, start - 1, stop, false, flip)
            # Between the one before the candidate and the candidate: this end comes last there.
            gain = cut + edge[there] - new - distance(other, there - 1)
            flip = false if ends_here else true
            add(outside & (there > stop + 1), gain, start, stop, there - 1, flip, false)
            add(outside & (there < start), gain, there, start - 1, stop, false, flip)
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *found)
