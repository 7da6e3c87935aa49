"""Soft neighbours: a cross-entropy to the codes nearest to the target beside that to the target itself.

With shares w_j of the k codes n_j(y) that lie nearest to code y, itself among them,

    neighbour_loss = − Σ_j w_j log p(n_j(y)) = lse − Σ_j w_j Y[n_j(y)]

which is DIST2Loss's divergence (arXiv 2503.02379) up to the entropy of the shares, cut to k codes, for its weights are
nearly nothing beyond. `codebook.neighbours` makes the table.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


class Neighbours(NamedTuple):
    """The codes near each code, by rearranged ids.

    Attributes:
        ids: int32 [N, k].
        shares: float32 [N, k], not negative; the rows sum to 1.
    """

    ids: Int[Array | np.ndarray, "N k"]
    shares: Float[Array | np.ndarray, "N k"]


def expected_logits(
    logits: Float[Array, "A B"],
    neighbours: Neighbours,
    targets: Int[Array, " P"],
    first: Int[Array, ""] | int,
    axis: int,
) -> tuple[Float[Array, " P"], Float[Array, "A B"]]:
    """Σ_j w_j Y[n_j] of each position over the codes of this device, and w as a matrix like the logits.

    Args:
        logits: positions by codes, which are the axis `axis`.
        targets: ids of the positions' codes.
        first: the id of the first code here.
    """
    code = jax.lax.broadcasted_iota(jnp.int32, logits.shape, axis) + first
    ids, shares = jnp.asarray(neighbours.ids)[targets], jnp.asarray(neighbours.shares)[targets]
    matrix = jnp.zeros(logits.shape, jnp.float32)
    # Comparisons that are fused with what the loss does to every logit anyhow: TPUs scatter slowly.
    for j in range(ids.shape[1]):
        matrix += jnp.where(code == jnp.expand_dims(ids[:, j], axis), jnp.expand_dims(shares[:, j], axis), 0.0)
    return jnp.sum(matrix * logits, axis=axis), matrix
