"""Balanced clusters by deterministic annealing: a start for k-means that hardly depends on where it began.

At a temperature T every vector belongs to every cluster with weight softmax(-(squared distance + price) / T). Prices
are moved until all clusters weigh the same (Sinkhorn's scaling), centroids to the weighted means, and T falls slowly:
clusters settle together, before any vector has to choose. (Rose, Gurewitz and Fox, 1990, with equal weights.)
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from iar_jax.codebook.distances import Costs, over_chunks, smallest, squared_distances

# Temperatures, as shares of the mean squared distance to the nearest of the first centroids, and how many.
HOTTEST, COLDEST, STEPS = 0.3, 0.03, 200

EVEN_ENOUGH = 0.05


class SoftClusters(NamedTuple):
    """What one pass over the vectors gives: the weight of each cluster and the weighted sum of its vectors."""

    weights: Float[Array, " n"]
    sums: Float[Array, "n d"]


def soft_clusters(
    chunks: Float[Array, "chunks rows d"], costs: Costs, prices: Float[Array, " n"], temperature: Float[Array, ""]
) -> SoftClusters:
    """The soft assignment at a temperature."""

    def chunk(part):
        scaled = (costs(part) + prices) * (1.0 / temperature)
        share = jnp.exp(jnp.min(scaled, axis=1, keepdims=True) - scaled)
        # Shares are normalised on the small side of the product, which spares a pass over all of them.
        padded = jnp.pad(part, ((0, 0), (0, 1)), constant_values=1.0)
        return jnp.matmul((padded / jnp.sum(share, axis=1, keepdims=True)).T, share, precision="highest")

    sums = jnp.sum(over_chunks(chunk, chunks), axis=0)
    return SoftClusters(sums[-1], sums[:-1].T)


def moved_prices(
    prices: Float[Array, " n"], weights: Float[Array, " n"], temperature: Float[Array, ""]
) -> Float[Array, " n"]:
    """Sinkhorn's step: clusters that weigh more than their share become dearer."""
    share = weights / jnp.mean(weights)
    return prices + temperature * jnp.log(jnp.maximum(share, 1e-6))


def entropic_prices(
    chunks: Float[Array, "chunks rows d"],
    costs: Costs,
    prices: Float[Array, " n"],
    temperature: Float[Array, ""],
    rounds: int,
) -> Float[Array, " n"]:
    """Prices after Sinkhorn's scaling: until no cluster weighs more than 5 % off its share, or for `rounds` rounds."""

    def unequal(state):
        _, weights, done = state
        return (done < rounds) & (jnp.max(jnp.abs(weights / jnp.mean(weights) - 1.0)) > EVEN_ENOUGH)

    def scale(state):
        prices, weights, done = state
        prices = moved_prices(prices, weights, temperature)
        return prices, soft_clusters(chunks, costs, prices, temperature).weights, done + 1

    start = (prices, soft_clusters(chunks, costs, prices, temperature).weights, 0)
    return jax.lax.while_loop(unequal, scale, start)[0]


def mean_smallest(chunks: Float[Array, "chunks rows d"], costs: Costs, num_clusters: int) -> Float[Array, ""]:
    """Mean over the vectors of their least cost, never zero: the scale of temperatures."""
    return jnp.maximum(jnp.mean(smallest(chunks, costs, jnp.zeros(num_clusters))[0]), 1e-12)


def anneal(
    chunks: Float[Array, "chunks rows d"], centroids: Float[Array, "n d"]
) -> tuple[Float[Array, "n d"], Float[Array, " n"]]:
    """Centroids [n, d] and prices [n] at the end of the cooling."""
    num_clusters = centroids.shape[0]
    scale = mean_smallest(chunks, functools.partial(squared_distances, centroids=centroids), num_clusters)

    def cool(state, temperature):
        centroids, prices = state
        soft = soft_clusters(chunks, functools.partial(squared_distances, centroids=centroids), prices, temperature)
        means = soft.sums / jnp.maximum(soft.weights, 1e-6)[:, None]
        # A cluster that weighs nothing keeps its place until its price has fallen.
        centroids = jnp.where(soft.weights[:, None] > 1e-6, means, centroids)
        return (centroids, moved_prices(prices, soft.weights, temperature)), None

    temperatures = scale * jnp.geomspace(HOTTEST, COLDEST, STEPS)
    return jax.lax.scan(cool, (centroids, jnp.zeros(num_clusters)), temperatures)[0]
