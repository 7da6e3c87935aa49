"""One level of clusters of unequal sizes, for `losses.cluster_loss`."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int


class RaggedLevel(NamedTuple):
    """What a level is of some positions [P].

    Attributes:
        clusters: the target's.
        own_lse: logsumexp over the target's cluster, wherever its codes are.
        inside: which logits belong to the target's cluster, of this device's.
        sums: of the exponentials of each of the n clusters, over all devices; n is the axis of the codes.
    """

    clusters: Int[Array, " P"]
    own_lse: Float[Array, " P"]
    inside: Bool[Array, "A B"]
    sums: Float[Array, "C D"]


def check_offsets(offsets: Sequence[int], vocab_size: int) -> None:
    """Raises ValueError where offsets are not 0, the first ids of further clusters that are not empty, and N."""
    if len(offsets) < 2 or offsets[0] != 0 or offsets[-1] != vocab_size:
        raise ValueError(f"offsets of clusters go from 0 to the number of codes, {vocab_size}")
    for start, end in itertools.pairwise(offsets):
        if start >= end:
            raise ValueError(f"offsets of clusters rise; {start} is followed by {end}")


def ragged_level(
    logits: Float[Array, "A B"],
    powers: Float[Array, "A B"],
    targets: Int[Array, " P"],
    offsets: Sequence[int],
    first: Int[Array, ""] | int,
    axis: int,
    device_axis: str | None,
) -> RaggedLevel:
    """The level of a chunk of positions.

    Args:
        logits: positions by this device's codes, which are the axis `axis`.
        powers: exp(logits − the position's highest of all).
        targets: ids.
        first: the id of this device's first code; clusters may go on at the next device.
        device_axis: of the mesh, along which the codes are split; None where they are not.
    """

    def each(positions):
        return jnp.expand_dims(positions, axis)

    bounds = np.asarray(offsets, np.int32)
    clusters = jnp.searchsorted(bounds, targets, side="right").astype(jnp.int32) - 1
    code = jax.lax.broadcasted_iota(jnp.int32, logits.shape, axis) + first
    inside = (code >= each(jnp.asarray(bounds)[clusters])) & (code < each(jnp.asarray(bounds)[clusters + 1]))
    own = jnp.where(inside, logits, -jnp.inf)
    top = jnp.max(own, axis=axis)
    top = top if device_axis is None else jax.lax.pmax(top, device_axis)
    total = jnp.sum(jnp.exp(own - each(top)), axis=axis)

    # A cluster's sum is a difference of running sums.
    running = jnp.cumsum(powers, axis=axis)
    running = jnp.concatenate([jnp.zeros_like(jnp.take(running, jnp.array([0]), axis=axis)), running], axis=axis)
    places = jnp.clip(jnp.asarray(bounds) - first, 0, logits.shape[axis])
    sums = jnp.diff(jnp.take(running, places, axis=axis), axis=axis)
    if device_axis is not None:
        total, sums = jax.lax.psum((total, sums), device_axis)
    return RaggedLevel(clusters, top + jnp.log(total), inside, sums)
