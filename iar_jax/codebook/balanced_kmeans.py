"""Balanced k-means as one jitted program: Algorithm 1 of the IAR paper, or with an optimal assignment step.

Every cluster gets exactly N/n vectors, so that the rearranged codebook splits into equal contiguous blocks.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Key

from iar_jax.codebook.annealing import anneal
from iar_jax.codebook.distances import Costs, in_chunks, smallest, squared_distances
from iar_jax.codebook.optimal_assignment import BalancedAssignment, optimal_assignment

# The prices of an optimal assignment start from those of the step before: temperatures, as shares of the mean least
# distance, and rounds of Sinkhorn's scaling at each, at most.
TEMPERATURES, ROUNDS = (0.1, 0.03), 30

UNCONSTRAINED_ITERATIONS = 100


class BalancedClustering(NamedTuple):
    """A partition of N vectors into n clusters of N/n (or of other sizes, where `clustering_of` says what it is).

    Attributes:
        assignment: cluster of each vector, int32 [N] in [0, n).
        centroids: means of the clusters, float32 [n, d].
        inertia: within-cluster sum of squared distances to those means.
        inertia_history: inertia after each iteration, [max_iterations]; NaN past the last one.
        num_iterations: how many ran.
        converged: whether the centroids stood still before max_iterations.
        gap: of the last assignment step: by how much an assignment to the same centroids could be cheaper at most;
            NaN for the greedy step, which has no bound.
    """

    assignment: Int[Array, " N"]
    centroids: Float[Array, "n d"]
    inertia: Float[Array, ""]
    inertia_history: Float[Array, " iterations"]
    num_iterations: Int[Array, ""]
    converged: Bool[Array, ""]
    gap: Float[Array, ""]


def balanced_kmeans(
    vectors: Float[Array | np.ndarray, "N d"],
    num_clusters: int,
    *,
    initial_centroids: Float[Array | np.ndarray, "n d"] | None = None,
    key: Key[Array, ""] | None = None,
    assignment: str = "greedy",
    max_iterations: int = 100,
    num_restarts: int = 1,
) -> BalancedClustering:
    """Clusters vectors into equal parts; the best of `num_restarts` runs by inertia.

    One iteration assigns the vectors and moves the centroids to the means. The "greedy" assignment visits the vectors
    in the order of their distance to the nearest centroid (the lower index first on ties) and puts each into the
    nearest cluster that still has room (Algorithm 1 of the IAR paper); the "optimal" one is the cheapest there is
    (`optimal_assignment`), and its iterations begin where `anneal` ends, which is far better a place than where it
    began. It stops when no coordinate of a centroid moves by more than 1e-8 + 1e-5 of its size, as the IAR code does.

    Distances are made a chunk of vectors at a time, each chunk spread over this process's devices.

    Args:
        vectors: [N, d], finite. IAR clusters L2-normalised codes: normalise before.
        num_clusters: n, a divisor of N.
        initial_centroids: [n, d] to start from; allowed with one restart only.
        key: draws the first centroids of each restart where none are given, as k-means++ does (the paper draws them
            evenly, which ends worse): each next one with probability proportional to the squared distance to those
            already there.
        assignment: a key of ASSIGNMENTS.
        num_restarts: runs side by side, but for the exact iterations of optimal ones. The lowest inertia wins.

    Raises:
        ValueError: non-finite vectors, n that is not in [1, N] or does not divide N, wrong centroids, or neither or
            both of key and centroids.
    """
    num_vectors, dim = vectors.shape
    if not 1 <= num_clusters <= num_vectors:
        raise ValueError(f"num_clusters is {num_clusters}; with {num_vectors} vectors it must be in [1, {num_vectors}]")
    if num_vectors % num_clusters:
        raise ValueError(f"num_clusters {num_clusters} does not divide the number of vectors, {num_vectors}")
    if not np.isfinite(np.asarray(vectors)).all():
        bad = int(np.flatnonzero(~np.isfinite(np.asarray(vectors)).all(axis=1))[0])
        raise ValueError(f"vectors must be finite; the first that is not is vector {bad}")
    if max_iterations < 1 or num_restarts < 1:
        raise ValueError(f"max_iterations ({max_iterations}) and num_restarts ({num_restarts}) must be positive")
    if initial_centroids is not None and key is not None:
        raise ValueError("give either initial_centroids or a key to draw them with, not both")
    if initial_centroids is not None:
        if num_restarts != 1:
            raise ValueError("restarts from the same initial_centroids are all the same; give a key instead")
        if initial_centroids.shape != (num_clusters, dim) or not np.isfinite(np.asarray(initial_centroids)).all():
            raise ValueError(
                f"initial_centroids must be finite and of shape {(num_clusters, dim)}; got {initial_centroids.shape}"
            )
        starts = jnp.asarray(initial_centroids, jnp.float32)[None]
    elif key is not None:
        starts = jax.jit(jax.vmap(plus_plus_seeds, (None, None, 0)), static_argnums=1)(
            jnp.asarray(vectors, jnp.float32), num_clusters, jax.random.split(key, num_restarts)
        )
    else:
        raise ValueError("give initial_centroids, or a key to draw them with")
    return _best_run(
        np.asarray(vectors, np.float32), np.asarray(starts), assignment, max_iterations, _mesh(num_vectors)
    )


def nested_clusters(
    vectors: Float[Array | np.ndarray, "N d"], cluster_sizes: Sequence[int], *, key: Key[Array, ""], **options: Any
) -> list[BalancedClustering]:
    """Nested levels of balanced clusters: of the vectors, then of the centroids of the level before.

    Args:
        cluster_sizes: vectors of a cluster, for each level from the finest on; each divides the next.
        key: of the first level; further ones fold their number in.
        options: as in `balanced_kmeans`, for all levels.

    Raises:
        ValueError: as `balanced_kmeans`.
    """
    levels: list[BalancedClustering] = []
    for number, size in enumerate(cluster_sizes):
        members = np.asarray(levels[-1].centroids) if levels else vectors
        level_key = jax.random.fold_in(key, number) if number else key
        levels.append(balanced_kmeans(members, vectors.shape[0] // size, key=level_key, **options))
    return levels


def clustering_of(vectors: Float[np.ndarray, "N d"], assignment: Int[np.ndarray, " N"]) -> BalancedClustering:
    """What `balanced_kmeans` says of its own clusters, of any that are there already; sums are in float64.

    Args:
        assignment: cluster of each vector; none is empty.
    """
    exact = np.asarray(vectors, np.float64)
    sums = np.zeros((int(assignment.max()) + 1, exact.shape[1]))
    np.add.at(sums, assignment, exact)
    means = sums / np.bincount(assignment)[:, None]
    inertia = jnp.float32(np.sum(np.square(exact - means[assignment])))
    centroids = jnp.asarray(means, jnp.float32)
    found = jnp.asarray(assignment, jnp.int32)
    return BalancedClustering(
        found, centroids, inertia, inertia[None], jnp.int32(1), jnp.bool_(True), jnp.float32(jnp.nan)
    )


def _mesh(num_vectors: int) -> Mesh:
    """This process's devices in a row, as many of them as divide the vectors."""
    devices = jax.local_devices()
    count = next(k for k in range(len(devices), 0, -1) if num_vectors % k == 0)
    return Mesh(np.asarray(devices[:count]), ("vectors",))


def plus_plus_seeds(vectors: Float[Array, "N d"], num_seeds: int, key: Key[Array, ""]) -> Float[Array, "n d"]:
    """Vectors far apart: each drawn with probability proportional to its squared distance to those before."""

    def pick(distance, step_key):
        # Where all vectors are taken, duplicates are as good as any.
        chosen = vectors[jax.random.categorical(step_key, jnp.log(distance + 1e-30))]
        return jnp.minimum(distance, jnp.sum(jnp.square(vectors - chosen), axis=-1)), chosen

    return jax.lax.scan(pick, jnp.ones(vectors.shape[0]), jax.random.split(key, num_seeds))[1]


@functools.partial(jax.jit, static_argnames=("assignment", "max_iterations", "mesh"))
def _best_run(vectors, starts, assignment, max_iterations, mesh):
    chunks = in_chunks(vectors, starts.shape[0] * starts.shape[1], mesh.size)
    chunks = jax.lax.with_sharding_constraint(chunks, NamedSharding(mesh, PartitionSpec(None, "vectors")))
    runs = ASSIGNMENTS[assignment](chunks, starts, max_iterations)
    best = jnp.argmin(runs.inertia)
    return jax.tree.map(lambda x: x[best], runs)


def _run(
    chunks: Float[Array, "chunks rows d"],
    start: Float[Array, "n d"],
    prices: Float[Array, " n"],
    assign: Callable[[Any, Costs, Any], BalancedAssignment],
    max_iterations: int,
) -> BalancedClustering:
    vectors = chunks.reshape(-1, chunks.shape[-1])

    def unfinished(carry):
        clustering, _ = carry
        return ~clustering.converged & (clustering.num_iterations < max_iterations)

    def iterate(carry):
        clustering, prices = carry
        costs = functools.partial(squared_distances, centroids=clustering.centroids)
        assignment, prices, gap = assign(chunks, costs, prices)
        centroids, inertia = means_and_inertia(vectors, assignment, start.shape[0])
        still = jnp.all(jnp.abs(centroids - clustering.centroids) <= 1e-8 + 1e-5 * jnp.abs(clustering.centroids))
        clustering = BalancedClustering(
            assignment,
            centroids,
            inertia,
            clustering.inertia_history.at[clustering.num_iterations].set(inertia),
            clustering.num_iterations + 1,
            still,
            gap,
        )
        return clustering, prices

    nothing = BalancedClustering(
        jnp.zeros(vectors.shape[0], jnp.int32),
        start,
        jnp.float32(jnp.inf),
        jnp.full(max_iterations, jnp.nan),
        jnp.int32(0),
        jnp.bool_(False),
        jnp.float32(jnp.nan),
    )
    return jax.lax.while_loop(unfinished, iterate, (nothing, prices))[0]


def greedy_assignment(
    chunks: Float[Array, "chunks rows d"], costs: Costs, prices: Float[Array, " n"]
) -> Int[Array, " N"]:
    """The E-step of Algorithm 1: nearest first, each into the nearest cluster with room; lowest index on ties.

    Nearest is what has the least cost + price; the algorithm's own prices are zeros.
    """
    vectors = chunks.reshape(-1, chunks.shape[-1])
    num_vectors, num_clusters = vectors.shape[0], prices.shape[0]
    visit = jnp.argsort(smallest(chunks, costs, prices)[0], stable=True)

    def place(room, row):
        cluster = jnp.argmin(jnp.where(room > 0, row + prices, jnp.inf)).astype(jnp.int32)
        return room.at[cluster].add(-1), cluster

    def place_chunk(room, part):
        return jax.lax.scan(place, room, costs(part))

    room = jnp.full(num_clusters, num_vectors // num_clusters, jnp.int32)
    visited = vectors[visit].reshape(chunks.shape)
    _, clusters = jax.lax.scan(place_chunk, room, visited, unroll=chunks.shape[0] == 1)
    return jnp.zeros(num_vectors, jnp.int32).at[visit].set(clusters.ravel())


def greedy_runs(
    chunks: Float[Array, "chunks rows d"], starts: Float[Array, "runs n d"], max_iterations: int
) -> BalancedClustering:
    """A run of the paper's algorithm from each start."""
    prices = jnp.zeros(starts.shape[1])

    def assign(chunks, costs, prices):
        return BalancedAssignment(greedy_assignment(chunks, costs, prices), prices, jnp.float32(jnp.nan))

    def run(start):
        return _run(chunks, start, prices, assign, max_iterations)

    if starts.shape[0] == 1:  # a scatter for one run is cheaper than a batched one
        return jax.tree.map(lambda x: x[None], run(starts[0]))
    return jax.vmap(run)(starts)


def optimal_runs(
    chunks: Float[Array, "chunks rows d"], starts: Float[Array, "runs n d"], max_iterations: int
) -> BalancedClustering:
    """A run with the cheapest assignments from where annealing ends, for each start."""

    def assign(chunks, costs, prices):
        return optimal_assignment(chunks, costs, prices, TEMPERATURES, ROUNDS, fallback=greedy_assignment)

    annealed = jax.vmap(anneal, (None, 0))(chunks, starts)
    # One after the other: side by side, every run would pay for the longest repair of all.
    return jax.lax.map(lambda found: _run(chunks, found[0], found[1], assign, max_iterations), annealed)


def random_runs(
    chunks: Float[Array, "chunks rows d"], starts: Float[Array, "runs n d"], max_iterations: int
) -> BalancedClustering:
    """A partition that knows nothing of the vectors, drawn anew for other starts: the control of an experiment."""
    vectors, num_clusters = chunks.reshape(-1, chunks.shape[-1]), starts.shape[1]

    def run(start):
        bits = jax.lax.bitcast_convert_type(start, jnp.uint32).ravel()
        places = jax.random.permutation(jax.random.key(jnp.bitwise_xor.reduce(bits)), vectors.shape[0])
        assignment = (places % num_clusters).astype(jnp.int32)
        centroids, inertia = means_and_inertia(vectors, assignment, num_clusters)
        history = jnp.full(max_iterations, jnp.nan).at[0].set(inertia)
        return BalancedClustering(
            assignment, centroids, inertia, history, jnp.int32(1), jnp.bool_(True), jnp.float32(jnp.nan)
        )

    return jax.lax.map(run, starts)


# config.codebook.assignment: (chunks of vectors, starts, iterations) -> a clustering for each start.
ASSIGNMENTS: dict[str, Callable[..., BalancedClustering]] = {
    "greedy": greedy_runs,
    "optimal": optimal_runs,
    "random": random_runs,
}


@jax.jit
def unconstrained_inertia(
    vectors: Float[Array | np.ndarray, "N d"], centroids: Float[Array, "n d"]
) -> Float[Array, ""]:
    """Within-cluster error where k-means without balance ends that starts from these centroids."""
    chunks = in_chunks(jnp.asarray(vectors, jnp.float32), centroids.shape[0])
    rows = chunks.reshape(-1, chunks.shape[-1])

    def assign(centroids):
        costs = functools.partial(squared_distances, centroids=centroids)
        return smallest(chunks, costs, jnp.zeros(centroids.shape[0]))

    def iterate(_, centroids):
        _, nearest = assign(centroids)
        counts = jnp.bincount(nearest, length=centroids.shape[0])[:, None]
        sums = jax.ops.segment_sum(rows, nearest, centroids.shape[0])
        return jnp.where(counts > 0, sums / jnp.maximum(counts, 1), centroids)

    return jnp.sum(assign(jax.lax.fori_loop(0, UNCONSTRAINED_ITERATIONS, iterate, centroids))[0])


def means_and_inertia(
    vectors: Float[Array, "N d"], assignment: Int[Array, " N"], num_clusters: int
) -> tuple[Float[Array, "n d"], Float[Array, ""]]:
    """Means of equal clusters and the sum of squared distances to them.

    Sums are carried as pairs of float32 (48 bits), so they do not depend on the order of the vectors.
    """
    members = jnp.argsort(assignment, stable=True).reshape(num_clusters, -1)
    grouped = vectors[members].swapaxes(0, 1)
    high, low = _exact_sum(grouped)
    means = (high + low) / grouped.shape[0]
    high, low = _exact_sum(jnp.sum(jnp.square(grouped - means), axis=-1))
    total_high, total_low = _exact_sum(high)
    return means, total_high + (total_low + jnp.sum(low))


def _exact_sum(terms: Float[Array, "k *rest"]) -> tuple[Float[Array, "*rest"], Float[Array, "*rest"]]:
    """Sum over the first axis as an unevaluated pair high + low (Knuth's two-sum)."""

    def add(total, term):
        high, low = total
        rounded = high + term
        back = rounded - high
        return (rounded, low + ((high - (rounded - back)) + (term - back))), None

    zero = jnp.zeros(terms.shape[1:])
    return jax.lax.scan(add, (zero, zero), terms)[0]
