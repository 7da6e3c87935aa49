"""Balanced k-means (Algorithm 1 of the IAR paper) as one jitted program.

Every cluster gets exactly N/n vectors, so that the rearranged codebook splits into equal contiguous blocks.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key


class BalancedClustering(NamedTuple):
    """A partition of N vectors into n clusters of N/n.

    Attributes:
        assignment: cluster of each vector, int32 [N] in [0, n).
        centroids: means of the clusters, float32 [n, d].
        inertia: within-cluster sum of squared distances to those means.
        inertia_history: inertia after each iteration, [max_iterations]; NaN past the last one.
        num_iterations: how many ran.
        converged: whether the centroids stood still before max_iterations.
    """

    assignment: Int[Array, " N"]
    centroids: Float[Array, "n d"]
    inertia: Float[Array, ""]
    inertia_history: Float[Array, " iterations"]
    num_iterations: Int[Array, ""]
    converged: Bool[Array, ""]


def balanced_kmeans(
    vectors: Float[Array | np.ndarray, "N d"],
    num_clusters: int,
    *,
    initial_centroids: Float[Array | np.ndarray, "n d"] | None = None,
    key: Key[Array, ""] | None = None,
    max_iterations: int = 100,
    num_restarts: int = 1,
) -> BalancedClustering:
    """Clusters vectors into equal parts; the best of `num_restarts` runs by inertia.

    One iteration visits the vectors in the order of their distance to the nearest centroid (the lower index first on
    ties) and puts each into the nearest cluster that still has room, then moves the centroids to the means. It stops
    when no coordinate of a centroid moves by more than 1e-8 + 1e-5 of its size, as the IAR code does.

    Args:
        vectors: [N, d], finite. IAR clusters L2-normalised codes: normalise before.
        num_clusters: n, a divisor of N.
        initial_centroids: [n, d] to start from; allowed with one restart only.
        key: draws n distinct vectors as the first centroids of each restart, where none are given.

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
        picks = jax.vmap(lambda k: jax.random.permutation(k, num_vectors)[:num_clusters])(
            jax.random.split(key, num_restarts)
        )
        starts = jnp.asarray(vectors, jnp.float32)[picks]
    else:
        raise ValueError("give initial_centroids, or a key to draw them with")
    return _best_run(jnp.asarray(vectors, jnp.float32), starts, max_iterations)


@functools.partial(jax.jit, static_argnames="max_iterations")
def _best_run(vectors, starts, max_iterations):
    runs = jax.vmap(lambda start: _run(vectors, start, max_iterations))(starts)
    best = jnp.argmin(runs.inertia)
    return jax.tree.map(lambda x: x[best], runs)


def _run(vectors: Float[Array, "N d"], start: Float[Array, "n d"], max_iterations: int) -> BalancedClustering:
    def unfinished(clustering):
        return ~clustering.converged & (clustering.num_iterations < max_iterations)

    def iterate(clustering):
        assignment = greedy_assignment(squared_distances(vectors, clustering.centroids))
        centroids, inertia = means_and_inertia(vectors, assignment, start.shape[0])
        still = jnp.all(jnp.abs(centroids - clustering.centroids) <= 1e-8 + 1e-5 * jnp.abs(clustering.centroids))
        return BalancedClustering(
            assignment,
            centroids,
            inertia,
            clustering.inertia_history.at[clustering.num_iterations].set(inertia),
            clustering.num_iterations + 1,
            still,
        )

    nothing = BalancedClustering(
        jnp.zeros(vectors.shape[0], jnp.int32),
        start,
        jnp.float32(jnp.inf),
        jnp.full(max_iterations, jnp.nan),
        jnp.int32(0),
        jnp.bool_(False),
    )
    return jax.lax.while_loop(unfinished, iterate, nothing)


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
