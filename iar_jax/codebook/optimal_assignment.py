"""The cheapest assignment of N vectors to n clusters of exactly N/n, with a proof of how cheap it is.

This is a transport problem with a dual of one price per cluster. Three steps, all of them small dense operations:

1. Prices. A few rounds of entropic scaling (Sinkhorn) make the clusters nearly equally popular when every vector
   goes where distance + price is least.
2. Repair. That assignment is optimal for the cluster sizes it happens to have. Each round moves one unit from an
   overfull to an underfull cluster along the shortest path in the graph of clusters, whose edge a -> b is the cheapest
   move of a member of a to b (successive shortest paths). Optimality is kept, so balanced sizes end at the optimum.
3. Proof. Shortest-path potentials are dual prices; cost minus dual value bounds how far the optimum can be.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class BalancedAssignment(NamedTuple):
    """A balanced assignment and its certificate.

    Attributes:
        assignment: cluster of each vector, int32 [N]; every cluster has N/n.
        prices: dual price of each cluster [n]; a good start for a problem with similar distances.
        gap: cost minus the dual value of the prices: no assignment is cheaper by more (but for float32 rounding, of
            about 1e-7 of the cost).
    """

    assignment: Int[Array, " N"]
    prices: Float[Array, " n"]
    gap: Float[Array, ""]


class _Repair(NamedTuple):
    """State of step 2. Rows of `members` hold the ids of each cluster's members, N where there is none."""

    members: Int[Array, "n cap"]
    sizes: Int[Array, " n"]
    move_cost: Float[Array, "n n"]
    mover: Int[Array, "n n"]
    failed: Bool[Array, ""]


def optimal_assignment(
    distances: Float[Array, "N n"],
    prices: Float[Array, " n"],
    temperatures: tuple[float, ...],
    rounds: int,
    fallback,
) -> BalancedAssignment:
    """Solves the balanced assignment.

    Args:
        distances: [N, n] costs, finite; n divides N.
        prices: a first guess, zeros if there is none.
        temperatures: of the entropic scaling, as shares of the mean of the smallest distances; `rounds` at each.
        fallback: makes a balanced assignment [N] of [N, n] costs, for problems whose ties leave one cluster with more
            than twice its share. Its result is returned with the gap that it has.
    """
    num_vectors, num_clusters = distances.shape
    size = num_vectors // num_clusters
    scale = mean_smallest(distances)
    for temperature in temperatures:
        prices = entropic_prices(distances, prices, temperature * scale, rounds)
    nearest = _nearest(distances, prices)
    capacity = 2 * size + 16
    sizes = jnp.bincount(nearest, length=num_clusters)
    tolerance = 1e-6 * jnp.max(jnp.abs(distances))
    start = jax.lax.cond(jnp.max(sizes) <= capacity, lambda: nearest, lambda: fallback(distances + prices))
    state = _repair(distances, start, capacity, tolerance)
    assignment = jax.lax.cond(
        state.failed,
        lambda: fallback(distances + prices),
        lambda: _assignment_of(state.members[:, :size], num_vectors),
    )
    potentials = _potentials(_move_costs(distances, _members(assignment, num_clusters, size))[0], tolerance)
    cost = jnp.take_along_axis(distances, assignment[:, None], axis=1)[:, 0]
    # Summed as differences, which are small: the sums themselves would round away the gap.
    chosen = cost - potentials[assignment]
    gap = jnp.sum(chosen - jnp.min(distances - potentials, axis=1))
    return BalancedAssignment(assignment, -potentials, gap)


def mean_smallest(distances: Float[Array, "N n"]) -> Float[Array, ""]:
    """Mean over the vectors of their smallest distance, never zero: the scale of temperatures."""
    return jnp.maximum(jnp.mean(jnp.min(distances, axis=1)), 1e-12)


def entropic_prices(
    distances: Float[Array, "N n"], prices: Float[Array, " n"], temperature: Float[Array, ""], rounds: int
) -> Float[Array, " n"]:
    """Prices after `rounds` of Sinkhorn scaling towards equal cluster sizes."""
    num_vectors, num_clusters = distances.shape

    def scale(_, prices):
        popularity = jnp.sum(jax.nn.softmax(-(distances + prices) / temperature, axis=1), axis=0)
        share = popularity * (num_clusters / num_vectors)
        return prices + temperature * jnp.log(jnp.maximum(share, 1e-6))

    return jax.lax.fori_loop(0, rounds, scale, prices)


def _nearest(distances: Float[Array, "N n"], prices: Float[Array, " n"]) -> Int[Array, " N"]:
    return jnp.argmin(distances + prices, axis=1).astype(jnp.int32)


def _members(assignment: Int[Array, " N"], num_clusters: int, capacity: int) -> Int[Array, "n cap"]:
    num_vectors = assignment.shape[0]
    order = jnp.argsort(assignment, stable=True).astype(jnp.int32)
    sizes = jnp.bincount(assignment, length=num_clusters)
    place = jnp.arange(num_vectors) - (jnp.cumsum(sizes) - sizes)[assignment[order]]
    nobody = jnp.full((num_clusters, capacity), num_vectors, jnp.int32)
    return nobody.at[assignment[order], place].set(order, mode="drop")


def _assignment_of(members: Int[Array, "n m"], num_vectors: int) -> Int[Array, " N"]:
    clusters = jnp.broadcast_to(jnp.arange(members.shape[0], dtype=jnp.int32)[:, None], members.shape)
    return jnp.zeros(num_vectors, jnp.int32).at[members.reshape(-1)].set(clusters.reshape(-1), mode="drop")


def _moves_from(
    distances: Float[Array, "N n"], members: Int[Array, " cap"], cluster: Int[Array, ""]
) -> tuple[Float[Array, " n"], Int[Array, " n"]]:
    """Cost of the cheapest move from a cluster to each other one, and the slot of the member that moves."""
    there = (members < distances.shape[0])[:, None]
    rows = distances[jnp.minimum(members, distances.shape[0] - 1)]
    costs = jnp.where(there, rows - jnp.take(rows, cluster, axis=1)[:, None], jnp.inf)
    slots = jnp.argmin(costs, axis=0).astype(jnp.int32)
    return jnp.min(costs, axis=0).at[cluster].set(jnp.inf), slots


def _move_costs(
    distances: Float[Array, "N n"], members: Int[Array, "n cap"]
) -> tuple[Float[Array, "n n"], Int[Array, "n n"]]:
    clusters = jnp.arange(members.shape[0], dtype=jnp.int32)
    return jax.lax.map(lambda pair: _moves_from(distances, *pair), (members, clusters))


def _repair(
    distances: Float[Array, "N n"], start: Int[Array, " N"], capacity: int, tolerance: Float[Array, ""]
) -> _Repair:
    num_vectors, num_clusters = distances.shape
    size = num_vectors // num_clusters
    members = _members(start, num_clusters, capacity)
    sizes = jnp.bincount(start, length=num_clusters).astype(jnp.int32)

    def unbalanced(state):
        return (jnp.max(state.sizes) > size) & ~state.failed

    def move_one(state):
        cost, before = _shortest_paths(state.move_cost, state.sizes > size, tolerance)
        end = jnp.argmin(jnp.where(state.sizes < size, cost, jnp.inf)).astype(jnp.int32)

        def on_the_way(walk):
            cluster, _, _, _, length = walk
            return (before[cluster] >= 0) & (length < num_clusters)

        def step_back(walk):
            # The member that leaves `source` for `cluster` takes the slot that is free there, and leaves its own.
            cluster, free, members, path, length = walk
            source = before[cluster]
            slot = state.mover[source, cluster]
            members = members.at[cluster, free].set(members[source, slot])
            return source, slot, members, path.at[length].set(cluster), length + 1

        path = jnp.zeros(num_clusters + 1, jnp.int32)
        first, free, members, path, length = jax.lax.while_loop(
            on_the_way, step_back, (end, state.sizes[end], state.members, path, jnp.int32(0))
        )
        last = state.sizes[first] - 1
        members = members.at[first, free].set(members[first, last]).at[first, last].set(num_vectors)
        path = path.at[length].set(first)

        def update(i, tables):
            move_cost, mover = tables
            costs, slots = _moves_from(distances, members[path[i]], path[i])
            return move_cost.at[path[i]].set(costs), mover.at[path[i]].set(slots)

        move_cost, mover = jax.lax.fori_loop(0, length + 1, update, (state.move_cost, state.mover))
        sizes = state.sizes.at[first].add(-1).at[end].add(1)
        # Rounding can make a cycle of predecessors, and only that: then nothing of this state can be trusted.
        return _Repair(members, sizes, move_cost, mover, (length >= num_clusters) | ~jnp.isfinite(cost[end]))

    move_cost, mover = _move_costs(distances, members)
    return jax.lax.while_loop(unbalanced, move_one, _Repair(members, sizes, move_cost, mover, jnp.bool_(False)))


def _shortest_paths(
    move_cost: Float[Array, "n n"], sources: Bool[Array, " n"], tolerance: Float[Array, ""]
) -> tuple[Float[Array, " n"], Int[Array, " n"]]:
    """Costs of the cheapest paths from any source, and each cluster's predecessor, -1 at sources (Bellman-Ford).

    Each step costs the tolerance on top, so that neither ties nor rounding make a cycle of predecessors.
    """
    step_cost = move_cost + tolerance

    def relax(state):
        cost, _, rounds = state
        best = jnp.minimum(cost, jnp.min(cost[:, None] + step_cost, axis=0))
        return best, jnp.any(best < cost), rounds + 1

    cost = jnp.where(sources, 0.0, jnp.inf)
    cost, _, _ = jax.lax.while_loop(lambda s: s[1] & (s[2] < cost.shape[0]), relax, (cost, jnp.bool_(True), 0))
    through = cost[:, None] + step_cost
    before = jnp.argmin(through, axis=0).astype(jnp.int32)
    # Where nothing changes any more the cheapest way in costs exactly what the cluster does, but for sources.
    return cost, jnp.where(jnp.min(through, axis=0) <= cost, before, -1)


def _potentials(move_cost: Float[Array, "n n"], tolerance: Float[Array, ""]) -> Float[Array, " n"]:
    """Potentials p with p_b <= p_a + move_cost_ab; minus a potential is a dual price."""
    everywhere = jnp.ones(move_cost.shape[0], bool)
    return _shortest_paths(move_cost, everywhere, 1e-3 * tolerance)[0]
