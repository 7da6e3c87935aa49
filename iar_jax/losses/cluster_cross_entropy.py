"""The cluster-oriented cross-entropy of IAR (paper section on "cluster-oriented token prediction").

Logits are over the rearranged codebook: cluster c owns the contiguous ids [c*S, (c+1)*S). With
lse = logsumexp over all V logits and lse_c = logsumexp over the S logits of the target's cluster,

    token_loss = lse - Y[y]        cluster_loss = lse - lse_c        loss = token_loss + weight * cluster_loss

so one pass of exponentials serves both. cluster_loss is -log of the probability of the target's whole cluster,
and 0 <= cluster_loss <= token_loss.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class TokenAndClusterLoss(NamedTuple):
    """Losses in nats and hits in {0, 1}, one for each position.

    `token_hit`: the most probable code is the target. `cluster_hit`: the most probable cluster is the target's.
    """

    token_loss: Float[Array, "..."]
    cluster_loss: Float[Array, "..."]
    token_hit: Float[Array, "..."]
    cluster_hit: Float[Array, "..."]


def token_and_cluster_loss(
    logits: Float[Array, "*B V"], targets: Int[Array, "*B"], cluster_size: int
) -> TokenAndClusterLoss:
    """Token and cluster cross-entropy from one logsumexp.

    Args:
        logits: [..., V] in the rearranged order; computed in float32 whatever their dtype.
        targets: [...] rearranged ids in [0, V).
        cluster_size: S, a divisor of V.

    Raises:
        ValueError: when cluster_size does not divide V.
    """
    vocab_size = logits.shape[-1]
    if vocab_size % cluster_size:
        raise ValueError(f"cluster_size {cluster_size} does not divide the vocabulary of {vocab_size}")
    logits = logits.astype(jnp.float32)
    grouped = logits.reshape(*logits.shape[:-1], vocab_size // cluster_size, cluster_size)
    cluster_lse = jax.nn.logsumexp(grouped, axis=-1)
    lse = jax.nn.logsumexp(cluster_lse, axis=-1)
    target_clusters = targets // cluster_size
    target_logit = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    target_cluster_lse = jnp.take_along_axis(cluster_lse, target_clusters[..., None], axis=-1)[..., 0]
    return TokenAndClusterLoss(
        token_loss=lse - target_logit,
        cluster_loss=lse - target_cluster_lse,
        token_hit=(jnp.argmax(logits, axis=-1) == targets).astype(jnp.float32),
        cluster_hit=(jnp.argmax(cluster_lse, axis=-1) == target_clusters).astype(jnp.float32),
    )


def reference_loss(
    logits: Float[Array, "*B V"], targets: Int[Array, "*B"], cluster_size: int
) -> tuple[Float[Array, "*B"], Float[Array, "*B"]]:
    """Token and cluster loss written as the paper defines them: two separate cross-entropies.

    The definition that `token_and_cluster_loss` is held to; same arguments.
    """

    def cross_entropy(scores, labels):
        return -jnp.take_along_axis(jax.nn.log_softmax(scores, axis=-1), labels[..., None], axis=-1)[..., 0]

    grouped = logits.reshape(*logits.shape[:-1], -1, cluster_size)
    cluster_logits = jnp.log(jnp.sum(jnp.exp(grouped), axis=-1))
    return cross_entropy(logits, targets), cross_entropy(cluster_logits, targets // cluster_size)
