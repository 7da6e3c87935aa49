"""Soft neighbours: a cross-entropy to the codes nearest to the target beside that to the target itself.

With shares w_j of the k codes n_j(y) that lie nearest to code y, itself among them,

    neighbour_loss = − Σ_j w_j log p(n_j(y)) = lse − Σ_j w_j Y[n_j(y)]

which is DIST2Loss's divergence (arXiv 2503.02379) up to the entropy of the shares, cut to k codes, for its weights are
nearly nothing beyond. `codebook.neighbours` makes the table.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from iar_jax.losses.codes_part import CodesPart


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
    part: CodesPart,
) -> tuple[Float[Array, " P"], Float[Array, "A B"]]:
    """Σ_j w_j Y[n_j] of each position over all codes, and w of the codes here, as a matrix like the logits.

    Args:
        logits: positions by codes.
        targets: ids of the positions' codes.
    """
    code, each = part.places(logits) + part.first, part.each
    ids, shares = jnp.asarray(neighbours.ids)[targets], jnp.asarray(neighbours.shares)[targets]
    matrix = jnp.zeros(logits.shape, jnp.float32)
    # Comparisons that are fused with what the loss does to every logit anyhow: TPUs scatter slowly.
    for j in range(ids.shape[1]):
        matrix += jnp.where(code == each(ids[:, j]), each(shares[:, j]), 0.0)
    return part.everywhere(jnp.sum(matrix * logits, axis=part.axis)), matrix
