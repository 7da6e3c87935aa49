"""Balanced k-means as one jitted program: Algorithm 1 of the IAR paper, or with an optimal assignment step.

Every cluster gets exactly N/n vectors, so that the rearranged codebook splits into equal contiguous blocks.
"""

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from iar_jax.codebook.optimal_assignment import BalancedAssignment, entropic_prices, mean_smallest, optimal_assignment

# Temperatures of the entropic prices, as shares of the mean smallest distance, and rounds at each: for the first
# iteration, and for those after it, whose prices start from the one before.
COLD_TEMPERATURES, COLD_ROUNDS = (1.0, 0.3, 0.1), 15
WARM_TEMPERATURES, WARM_ROUNDS = (0.03,), 8


class BalancedClustering(NamedTuple):
    """A partition of N vectors into n clusters of N/n.

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
    assignment: Literal["greedy", "optimal"] = "greedy",
    max_iterations: int = 100,
    num_restarts: int = 1,
) -> BalancedClustering:
    """Clusters vectors into equal parts; the best of `num_restarts` runs by inertia.

    One iteration assigns the vectors and moves the centroids to the means. The "greedy" assignment visits the vectors
    in the order of their distance to the nearest centroid (the lower index first on ties) and puts each into the
    nearest cluster that still has room; the "optimal" one is the cheapest there is (`optimal_assignment`). It stops
    when no coordinate of a centroid moves by more than 1e-8 + 1e-5 of its size, as the IAR code does.

    Args:
        vectors: [N, d], finite. IAR clusters L2-normalised codes: normalise before.
        num_clusters: n, a divisor of N.
        initial_centroids: [n, d] to start from; allowed with one restart only.
        key: draws the first centroids of each restart where none are given, as k-means++ does (the paper draws them
            evenly, which ends worse): each next one with probability proportional to the squared distance to those
            already there.

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
        seed = functools.partial(plus_plus_seeds, jnp.asarray(vectors, jnp.float32), num_clusters)
        starts = jax.vmap(seed)(jax.random.split(key, num_restarts))
    else:
        raise ValueError("give initial_centroids, or a key to draw them with")
    return _best_run(jnp.asarray(vectors, jnp.float32), starts, assignment, max_iterations)


def plus_plus_seeds(vectors: Float[Array, "N d"], num_seeds: int, key: Key[Array, ""]) -> Float[Array, "n d"]:
    """Vectors far apart: each drawn with probability proportional to its squared distance to those before."""

    def pick(distance, step_key):
        # Where all vectors are taken, duplicates are as good as any.
        chosen = vectors[jax.random.categorical(step_key, jnp.log(distance + 1e-30))]
        return jnp.minimum(distance, jnp.sum(jnp.square(vectors - chosen), axis=-1)), chosen

    return jax.lax.scan(pick, jnp.ones(vectors.shape[0]), jax.random.split(key, num_seeds))[1]


@functools.partial(jax.jit, static_argnames=("assignment", "max_iterations"))
def _best_run(vectors, starts, assignment, max_iterations):
    # One after the other: side by side, every run would pay for the slowest assignment of all.
    runs = jax.lax.map(lambda start: _run(vectors, start, assignment, max_iterations), starts)
    best = jnp.argmin(runs.inertia)
    return jax.tree.map(lambda x: x[best], runs)


def _run(
    vectors: Float[Array, "N d"], start: Float[Array, "n d"], kind: str, max_iterations: int
) -> BalancedClustering:
    def unfinished(carry):
        clustering, _ = carry
        return ~clustering.converged & (clustering.num_iterations < max_iterations)

    def assign(distances, prices):
        if kind == "greedy":
            return BalancedAssignment(greedy_assignment(distances), prices, jnp.float32(jnp.nan))
        return optimal_assignment(distances, prices, WARM_TEMPERATURES, WARM_ROUNDS, fallback=greedy_assignment)

    def iterate(carry):
        clustering, prices = carry
        assignment, prices, gap = assign(squared_distances(vectors, clustering.centroids), prices)
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
    prices = jnp.zeros(start.shape[0])
    if kind == "optimal":
        distances = squared_distances(vectors, start)
        for temperature in COLD_TEMPERATURES:
            prices = entropic_prices(distances, prices, temperature * mean_smallest(distances), COLD_ROUNDS)
    return jax.lax.while_loop(unfinished, iterate, (nothing, prices))[0]


def squared_distances(vectors: Float[Array, "N d"], centroids: Float[Array, "n d"]) -> Float[Array, "N n"]:
    """Squared Euclidean distances; not negative."""
    cross = jnp.matmul(vectors, centroids.T, precision="highest")
    norms = jnp.sum(jnp.square(vectors), axis=1)[:, None] + jnp.sum(jnp.square(centroids), axis=1)
    return jnp.maximum(norms - 2.0 * cross, 0.0)


def greedy_assignment(distances: Float[Array, "N n"]) -> Int[Array, " N"]:
    """The E-step of Algorithm 1: nearest first, each into the nearest cluster with room; lowest index on ties."""
    num_vectors, num_clusters = distances.shape
    visit = jnp.argsort(jnp.min(distances, axis=1), stable=True)

    def place(room, row):
        cluster = jnp.argmin(jnp.where(room > 0, row, jnp.inf)).astype(jnp.int32)
        return room.at[cluster].add(-1), cluster

    room = jnp.full(num_clusters, num_vectors // num_clusters, jnp.int32)
    _, clusters = jax.lax.scan(place, room, distances[visit])
    return jnp.zeros(num_vectors, jnp.int32).at[visit].set(clusters)


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
