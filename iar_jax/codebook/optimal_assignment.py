"""The cheapest assignment of N vectors to n clusters of exactly N/n, with a proof of how cheap it is.

This is a transport problem with a dual of one price per cluster. Three steps, all of them small dense operations:

1. Prices. A few rounds of entropic scaling (Sinkhorn) make the clusters nearly equally popular when every vector
   goes where distance + price is least.
2. Repair. That assignment is optimal for the cluster sizes it happens to have. Each round moves units from overfull
   to underfull clusters along shortest paths in the graph of clusters, whose edge a -> b is the cheapest move of a
   member of a to b (successive shortest paths). Optimality is kept, so balanced sizes end at the optimum. The paths of
   one round start at different overfull clusters of one shortest-path forest: they do not share a cluster, and all of
   their edges are tight for the same potentials, so together they keep optimality as one does.
3. Proof. Shortest-path potentials are dual prices; cost minus dual value bounds how far the optimum can be.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from iar_jax.codebook.annealing import entropic_prices, mean_smallest
from iar_jax.codebook.distances import Costs, over_chunks, smallest


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
    chunks: Float[Array, "chunks rows d"],
    costs: Costs,
    prices: Float[Array, " n"],
    temperatures: tuple[float, ...],
    rounds: int,
    fallback,
) -> BalancedAssignment:
    """Solves the balanced assignment.

    Args:
        chunks: N vectors (`in_chunks`); n divides N.
        costs: finite costs of vectors, one for each cluster. They are computed anew wherever they are needed.
        prices: a first guess, zeros if there is none.
        temperatures: of the entropic scaling, as shares of the mean of the least costs; `rounds` at each.
        fallback: makes a balanced assignment [N] of (chunks, costs, prices), for problems whose ties leave one cluster
            with more than twice its share. Its result is returned with the gap that it has.
    """
    vectors = chunks.reshape(-1, chunks.shape[-1])
    num_vectors, num_clusters = vectors.shape[0], prices.shape[0]
    size = num_vectors // num_clusters
    scale = mean_smallest(chunks, costs, num_clusters)
    for temperature in temperatures:
        prices = entropic_prices(chunks, costs, prices, temperature * scale, rounds)
    _, nearest = smallest(chunks, costs, prices)
    capacity = 2 * size + 16
    sizes = jnp.bincount(nearest, length=num_clusters)
    tolerance = 1e-6 * jnp.max(over_chunks(lambda part: jnp.max(jnp.abs(costs(part))), chunks))
    start = jax.lax.cond(jnp.max(sizes) <= capacity, lambda: nearest, lambda: fallback(chunks, costs, prices))
    state = _repair(vectors, costs, start, num_clusters, capacity, tolerance)
    assignment = jax.lax.cond(
        state.failed,
        lambda: fallback(chunks, costs, prices),
        lambda: _assignment_of(state.members[:, :size], num_vectors),
    )
    members = _members(assignment, num_clusters, size)
    potentials = _potentials(_move_costs(vectors, costs, members)[0], tolerance)

    def regret(part):
        # Summed as differences, which are small: the sums themselves would round away the gap.
        rows, chosen = part
        cost = costs(rows)
        own = jnp.take_along_axis(cost, chosen[:, None], axis=1)[:, 0]
        return own - potentials[chosen] - jnp.min(cost - potentials, axis=1)

    gap = jnp.sum(over_chunks(regret, (chunks, assignment.reshape(chunks.shape[:2]))))
    return BalancedAssignment(assignment, -potentials, gap)


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
    vectors: Float[Array, "N d"], costs: Costs, members: Int[Array, " cap"], cluster: Int[Array, ""]
) -> tuple[Float[Array, " n"], Int[Array, " n"]]:
    """Cost of the cheapest move from a cluster to each other one, and the slot of the member that moves."""
    there = (members < vectors.shape[0])[:, None]
    rows = costs(vectors[jnp.minimum(members, vectors.shape[0] - 1)])
    moves = jnp.where(there, rows - jnp.take(rows, cluster, axis=1)[:, None], jnp.inf)
    slots = jnp.argmin(moves, axis=0).astype(jnp.int32)
    return jnp.min(moves, axis=0).at[cluster].set(jnp.inf), slots


def _move_costs(
    vectors: Float[Array, "N d"], costs: Costs, members: Int[Array, "n cap"]
) -> tuple[Float[Array, "n n"], Int[Array, "n n"]]:
    clusters = jnp.arange(members.shape[0], dtype=jnp.int32)
    return jax.lax.map(lambda pair: _moves_from(vectors, costs, *pair), (members, clusters))


def _repair(
    vectors: Float[Array, "N d"],
    costs: Costs,
    start: Int[Array, " N"],
    num_clusters: int,
    capacity: int,
    tolerance: Float[Array, ""],
) -> _Repair:
    num_vectors = vectors.shape[0]
    size = num_vectors // num_clusters
    members = _members(start, num_clusters, capacity)
    sizes = jnp.bincount(start, length=num_clusters).astype(jnp.int32)

    def unbalanced(state):
        return (jnp.max(state.sizes) > size) & ~state.failed

    def move_along_forest(state):
        cost, before = _shortest_paths(state.move_cost, state.sizes > size, tolerance)
        root = _roots(before)

        def cheapest_end(state, free_trees):
            allowed = (state.sizes < size) & free_trees[root]
            price = jnp.where(allowed, cost, jnp.inf)
            end = jnp.argmin(price).astype(jnp.int32)
            return end, jnp.isfinite(price[end])

        def another_path(walk):
            state, free_trees = walk
            return cheapest_end(state, free_trees)[1] & ~state.failed

        def follow(walk):
            state, free_trees = walk
            end, _ = cheapest_end(state, free_trees)
            return move_one(state, before, end), free_trees.at[root[end]].set(False)

        stuck = ~cheapest_end(state, jnp.ones(num_clusters, bool))[1]
        state, _ = jax.lax.while_loop(another_path, follow, (state, jnp.ones(num_clusters, bool)))
        return state._replace(failed=state.failed | stuck)

    def move_one(state, before, end):
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
            moves, slots = _moves_from(vectors, costs, members[path[i]], path[i])
            return move_cost.at[path[i]].set(moves), mover.at[path[i]].set(slots)

        move_cost, mover = jax.lax.fori_loop(0, length + 1, update, (state.move_cost, state.mover))
        sizes = state.sizes.at[first].add(-1).at[end].add(1)
        # Rounding can make a cycle of predecessors, and only that: then nothing of this state can be trusted.
        return _Repair(members, sizes, move_cost, mover, length >= num_clusters)

    move_cost, mover = _move_costs(vectors, costs, members)
    return jax.lax.while_loop(
        unbalanced, move_along_forest, _Repair(members, sizes, move_cost, mover, jnp.bool_(False))
    )


def _roots(before: Int[Array, " n"]) -> Int[Array, " n"]:
    """The first cluster on the path to each, by doubling."""
    upwards = jnp.where(before < 0, jnp.arange(before.shape[0], dtype=jnp.int32), before)
    return jax.lax.fori_loop(0, before.shape[0].bit_length(), lambda _, up: up[up], upwards)


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
