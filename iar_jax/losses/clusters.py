"""What `losses.cluster_loss` needs to know of the clusters, of a chunk of positions: of nested levels with clusters of
equal sizes, or of one level of unequal ones."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from iar_jax.losses.codes_part import CodesPart

Logits = Float[Array, "A B"]


class Level(NamedTuple):
    """A level, by the targets of some positions [P].

    Attributes:
        lse: logsumexp over the target's cluster, wherever its codes are.
        inside: which logits here are of the target's cluster.
        hit: 1 where no cluster is more probable than the target's.
    """

    lse: Float[Array, " P"]
    inside: Bool[Array, "A B"]
    hit: Float[Array, " P"]


class Clusters(NamedTuple):
    """All levels, and what comes of the same sums.

    Attributes:
        total: the sum of the powers of all codes.
    """

    total: Float[Array, " P"]
    target_logit: Float[Array, " P"]
    levels: list[Level]


def nested_clusters(
    logits: Logits,
    powers: Logits,
    others_power: Float[Array, " P"] | None,
    targets: Int[Array, " P"],
    sizes: Sequence[int],
    part: CodesPart,
) -> Clusters:
    """Of levels with clusters of equal sizes.

    Args:
        powers: exp(logits − the position's highest of all).
        others_power: of the class that is no code, where there is one.
        targets: ids counted from the first code here: outside of it where the target is on another device.
        sizes: from the finest on; each divides the next.
    """
    axis = part.axis
    here = (targets >= 0) & (targets < logits.shape[axis])
    sums = [powers]
    for finer, size in itertools.pairwise((1, *sizes)):
        # A coarser cluster's sum is that of the finer ones in it.
        sums.append(jnp.sum(part.in_groups(sums[-1], size // finer), axis=axis + 1))
    # The target's coarsest cluster by itself, and the finer ones in it: their sums can be too small beside the highest
    # logit of all.
    own, within = part.taken(logits, targets // sizes[-1], sizes[-1]), targets % sizes[-1]
    levels = []
    for size, values in zip(sizes, sums[1:], strict=True):
        cluster = targets // size
        lse = jax.nn.logsumexp(part.taken(own, within // size, size), axis=axis)
        own_sum = jnp.squeeze(part.taken(values, cluster, 1), axis)
        own_sum = part.everywhere(jnp.where(here, own_sum, 0.0))
        hit = part.is_first_highest(values, cluster, own_sum)
        if others_power is not None:
            hit = jnp.where(own_sum >= others_power, hit, 0.0)
        inside = part.places(logits) // size == part.each(cluster)
        levels.append(Level(part.everywhere(jnp.where(here, lse, 0.0)), inside, hit))
    target_logit = jnp.where(here, jnp.squeeze(part.taken(own, within, 1), axis), 0.0)
    return Clusters(part.everywhere(jnp.sum(sums[1], axis=axis)), part.everywhere(target_logit), levels)


def ragged_clusters(
    logits: Logits,
    powers: Logits,
    others_power: Float[Array, " P"] | None,
    targets: Int[Array, " P"],
    offsets: Sequence[int],
    part: CodesPart,
) -> Clusters:
    """Of one level with clusters of unequal sizes, which may lie on several devices.

    Args:
        powers, others_power: as in `nested_clusters`.
        targets: ids.
        offsets: first ids of the clusters, and last the number of all codes.
    """
    axis, bounds = part.axis, np.asarray(offsets, np.int32)
    clusters = jnp.searchsorted(bounds, targets, side="right").astype(jnp.int32) - 1
    code = part.places(logits) + part.first
    inside = code >= part.each(jnp.asarray(bounds)[clusters])
    inside &= code < part.each(jnp.asarray(bounds)[clusters + 1])
    own = jnp.where(inside, logits, -jnp.inf)
    top = part.highest(jnp.max(own, axis=axis))
    lse = top + jnp.log(part.everywhere(jnp.sum(jnp.exp(own - part.each(top)), axis=axis)))

    # Sums as a product, which chips are made for: running sums and their differences take TPUs as long as all of
    # attention.
    ids = part.first + jnp.arange(logits.shape[axis])[:, None]
    belongs = ((ids >= bounds[:-1]) & (ids < bounds[1:])).astype(powers.dtype)
    order = ("VP,VC->CP", "PV,VC->PC")[axis]
    sums = part.everywhere(jnp.einsum(order, powers, belongs, precision=jax.lax.Precision.HIGH))
    hit = (clusters == jnp.argmax(sums, axis=axis)).astype(jnp.float32)
    if others_power is not None:
        hit = jnp.where(jnp.max(sums, axis=axis) >= others_power, hit, 0.0)
    total = part.everywhere(jnp.sum(powers, axis=axis))
    target_logit = part.everywhere(jnp.sum(jnp.where(code == part.each(targets), logits, 0.0), axis=axis))
    return Clusters(total, target_logit, [Level(lse, inside, hit)])


def check_offsets(offsets: Sequence[int], vocab_size: int) -> None:
    """Raises ValueError where offsets are not 0, the first ids of further clusters that are not empty, and N."""
    if len(offsets) < 2 or offsets[0] != 0 or offsets[-1] != vocab_size:
        raise ValueError(f"offsets of clusters go from 0 to the number of codes, {vocab_size}")
    for start, end in itertools.pairwise(offsets):
        if start >= end:
            raise ValueError(f"offsets of clusters rise; {start} is followed by {end}")
