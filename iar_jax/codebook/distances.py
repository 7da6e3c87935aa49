"""Distances of vectors to centroids, a chunk of vectors at a time, so that [N, n] of them need never exist."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

# Distances of one chunk: 16 MiB in float32.
MAX_ENTRIES = 2**22

# The costs of some vectors [k, d], one for each cluster: [k, n].
Costs = Callable[[Float[Array, "k d"]], Float[Array, "k n"]]


def squared_distances(vectors: Float[Array, "N d"], centroids: Float[Array, "n d"]) -> Float[Array, "N n"]:
    """Squared Euclidean distances; not negative."""
    cross = jnp.matmul(vectors, centroids.T, precision="highest")
    norms = jnp.sum(jnp.square(vectors), axis=1)[:, None] + jnp.sum(jnp.square(centroids), axis=1)
    return jnp.maximum(norms - 2.0 * cross, 0.0)


def in_chunks(
    vectors: Float[Array | np.ndarray, "N d"], num_columns: int, num_devices: int = 1
) -> Float[Array | np.ndarray, "chunks rows d"]:
    """The vectors as the fewest equal chunks whose distances to `num_columns` others stay within 16 MiB a device.

    The rows of each chunk can be split evenly over the devices, whose number must divide N.
    """
    num_vectors = vectors.shape[0]
    fewest = -(-num_vectors * num_columns // (MAX_ENTRIES * num_devices))
    chunks = next(k for k in range(max(fewest, 1), num_vectors + 1) if num_vectors % (k * num_devices) == 0)
    return vectors.reshape(chunks, num_vectors // chunks, vectors.shape[1])


def smallest(
    chunks: Float[Array, "chunks rows d"], costs: Costs, prices: Float[Array, " n"]
) -> tuple[Float[Array, " N"], Int[Array, " N"]]:
    """The least of cost + price over the clusters for each vector, and which cluster that is (the first on ties)."""

    def chunk(part):
        total = costs(part) + prices
        return jnp.min(total, axis=1), jnp.argmin(total, axis=1).astype(jnp.int32)

    return jax.tree.map(jnp.ravel, over_chunks(chunk, chunks))


def over_chunks(function: Callable, chunks: Any) -> Any:
    """function of each chunk, stacked. A single one is spared the loop, inside which CPUs are slower."""
    if jax.tree.leaves(chunks)[0].shape[0] > 1:
        return jax.lax.map(function, chunks)
    return jax.tree.map(lambda x: x[None], function(jax.tree.map(lambda x: x[0], chunks)))


def nearest_neighbours(
    vectors: Float[Array | np.ndarray, "N d"], count: int, groups: Int[Array | np.ndarray, " N"] | None = None
) -> tuple[Int[Array, "N k"], Float[Array, "N k"]]:
    """The nearest other vectors of each, nearest first, and their squared distances.

    Args:
        count: k, at most N - 1, or with `groups` the size of the smallest group less one.
        groups: where given, neighbours are of a vector's own group.
    """
    vectors = jnp.asarray(vectors, jnp.float32)
    num_vectors = vectors.shape[0]
    labels = jnp.zeros(num_vectors, jnp.int32) if groups is None else jnp.asarray(groups)
    chunks = in_chunks(vectors, num_vectors)
    places = jnp.arange(num_vectors, dtype=jnp.int32).reshape(chunks.shape[:2])

    def chunk(part):
        rows, own = part
        distances = squared_distances(rows, vectors)
        allowed = (labels[own][:, None] == labels) & (own[:, None] != jnp.arange(num_vectors))
        found, neighbours = jax.lax.top_k(jnp.where(allowed, -distances, -jnp.inf), count)
        return neighbours.astype(jnp.int32), -found

    neighbours, distances = over_chunks(chunk, (chunks, places))
    return neighbours.reshape(num_vectors, count), distances.reshape(num_vectors, count)
