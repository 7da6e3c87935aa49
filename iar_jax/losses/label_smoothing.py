"""Label smoothing of the token loss and of every level's, for `losses.cluster_loss`."""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from iar_jax.losses.codes_part import CodesPart


def smoothing_term(
    logits: Float[Array, "A B"],
    targets: Int[Array, " P"],
    weights: Float[Array, " levels"],
    sizes: Sequence[int],
    epsilon: float,
    part: CodesPart,
) -> tuple[Float[Array, " P"], Float[Array, "A B"]]:
    """What label smoothing adds to the loss of each position, and to its gradient by the logits:

        ε (Y[y] − mean Y) + Σ λ ε (lse_c(y) − mean of lse_c over the level's clusters)

    Args:
        logits: positions by this device's codes.
        targets: ids counted from the device's first code: outside [0, V) where the target is on another device.
        weights, sizes: λ and cluster size of each level.
        epsilon: ε.
    """
    axis, devices = part.axis, part.everywhere(1)
    num_codes = logits.shape[axis]
    code = part.places(logits)
    value, gradient = jnp.zeros(targets.shape), jnp.zeros(logits.shape)
    for size, weight in [(1, 1.0), *zip(sizes, weights, strict=True)]:
        grouped = part.in_groups(logits, size)
        # Relative to each cluster's own highest: most are far below the highest of all.
        top = jnp.max(grouped, axis=axis + 1, keepdims=True)
        powers = jnp.exp(grouped - top)
        sums = jnp.sum(powers, axis=axis + 1, keepdims=True)
        cluster_lse = jnp.squeeze(top + jnp.log(sums), axis + 1)
        own = part.places(cluster_lse) == part.each(targets // size)
        own &= part.each((targets >= 0) & (targets < num_codes))
        number = devices * num_codes // size
        value += weight * part.everywhere(jnp.sum(jnp.where(own, cluster_lse, 0.0) - cluster_lse / number, axis=axis))
        inside = (code // size == part.each(targets // size)).astype(jnp.float32)
        gradient += weight * (powers / sums).reshape(logits.shape) * (inside - 1.0 / number)
    return epsilon * value, epsilon * gradient
