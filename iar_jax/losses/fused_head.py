"""The head and both losses at once, without ever holding the logits of a whole batch.

Positions are taken a chunk at a time. Where gradients are wanted, each chunk's are made while its logits are at hand:

    d loss / d Y_i = (1 + λ) p_i − 1[i = y] − λ 1[i ∈ c(y)] p_i / P_c(y)        (over the number of positions)

from the same exponentials as the losses, so the products are those of the plain form (one forward, two backward) and
λ costs nothing but a few additions. On a mesh, rows stay on their devices, each device holds the codes of whole
clusters (logical axis "vocab"), and what crosses the `tensor` axis are sums and maxima, one number a position, and the
gradient of `hidden`.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from iar_jax.losses.cluster_cross_entropy import TokenAndClusterLoss

BATCH_AXES, WIDTH_AXIS, VOCAB_AXIS = ("data", "fsdp"), "fsdp", "tensor"


class HeadGradients(NamedTuple):
    """Gradients of the loss by its differentiable inputs."""

    hidden: Float[Array, "B L D"]
    head: Float[Array, "D V"]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def fused_head_loss(
    hidden: Float[Array, "B L D"],
    head: Float[Array, "D V"],
    targets: Int[Array, "B L"],
    cluster_weight: Float[Array, ""] | float,
    cluster_size: int,
    num_chunks: int,
) -> tuple[Float[Array, ""], TokenAndClusterLoss]:
    """Mean of token_loss + cluster_weight * cluster_loss, and both of them with the hits of each position.

    Only the mean is differentiable, by `hidden` and `head`. Inside `sharding.use_mesh` the work is split over the mesh.

    Args:
        hidden: what the head is applied to, after the final norm; its dtype is that of the products.
        head: float32; column i gives the logit of rearranged code i.
        targets: rearranged ids in [0, V).
        cluster_size: S, a divisor of V (of the part of V on each device).
        num_chunks: parts that the positions are taken in, a divisor of L. Temporary memory falls with it.

    Raises:
        ValueError: when cluster_size or num_chunks does not divide what it splits.
    """
    _check(hidden, head, cluster_size, num_chunks)
    losses, _ = _on_mesh(hidden, head, targets, cluster_weight, cluster_size, num_chunks, with_gradients=False)
    return _mean(losses, cluster_weight), losses


def _forward(hidden, head, targets, cluster_weight, cluster_size, num_chunks):
    _check(hidden, head, cluster_size, num_chunks)
    losses, gradients = _on_mesh(hidden, head, targets, cluster_weight, cluster_size, num_chunks, with_gradients=True)
    return (_mean(losses, cluster_weight), losses), gradients


def _backward(cluster_size, num_chunks, gradients, cotangents):
    scale, _ = cotangents
    hidden, head = gradients
    return scale.astype(hidden.dtype) * hidden, scale * head, None, None


fused_head_loss.defvjp(_forward, _backward)


def _check(hidden, head, cluster_size, num_chunks):
    if head.shape[1] % cluster_size:
        raise ValueError(f"cluster_size {cluster_size} does not divide the vocabulary of {head.shape[1]}")
    if hidden.shape[1] % num_chunks:
        raise ValueError(f"num_chunks {num_chunks} does not divide the {hidden.shape[1]} positions")


def _mean(losses, cluster_weight):
    return jnp.mean(losses.token_loss) + cluster_weight * jnp.mean(losses.cluster_loss)


def _on_mesh(hidden, head, targets, cluster_weight, cluster_size, num_chunks, with_gradients):
    """Runs `_chunked` on each device's part, or on everything where there is no mesh."""
    num_positions = targets.size
    weight = jnp.asarray(cluster_weight, jnp.float32)
    mesh = jax.sharding.get_abstract_mesh()
    run = functools.partial(
        _chunked,
        cluster_size=cluster_size,
        num_chunks=num_chunks,
        num_positions=num_positions,
        with_gradients=with_gradients,
        sharded=not mesh.empty,
    )
    if mesh.empty:
        return run(hidden, head, targets, weight)
    rows = PartitionSpec(BATCH_AXES)
    losses = TokenAndClusterLoss(rows, rows, rows, rows)
    gradients = HeadGradients(rows, PartitionSpec(WIDTH_AXIS, VOCAB_AXIS)) if with_gradients else None
    return jax.shard_map(
        run,
        in_specs=(rows, PartitionSpec(None, VOCAB_AXIS), rows, PartitionSpec()),
        out_specs=(losses, gradients),
        check_vma=False,
    )(hidden, head, targets, weight)


def _chunked(hidden, head, targets, weight, *, cluster_size, num_chunks, num_positions, with_gradients, sharded):
    batch, length, dim = hidden.shape
    chunks = (
        hidden.reshape(batch, num_chunks, length // num_chunks, dim).swapaxes(0, 1),
        targets.reshape(batch, num_chunks, length // num_chunks).swapaxes(0, 1),
    )
    columns = head.astype(hidden.dtype)
    first = jax.lax.axis_index(VOCAB_AXIS) * head.shape[1] if sharded else 0

    def one(total, chunk):
        rows, wanted = chunk
        logits = jnp.einsum("BLD,DV->BLV", rows, columns, preferred_element_type=jnp.float32)
        losses, dlogits = _losses_and_gradient(logits, wanted - first, weight, cluster_size, sharded)
        if not with_gradients:
            return total, (losses, None)
        dlogits = (dlogits / num_positions).astype(hidden.dtype)
        total += jnp.einsum("BLD,BLV->DV", rows, dlogits, preferred_element_type=jnp.float32)
        dhidden = jnp.einsum("BLV,DV->BLD", dlogits, columns, preferred_element_type=jnp.float32)
        if sharded:
            dhidden = jax.lax.psum(dhidden, VOCAB_AXIS)
        return total, (losses, dhidden.astype(hidden.dtype))

    total = jnp.zeros(head.shape, jnp.float32) if with_gradients else None
    dhead, (losses, dhidden) = jax.lax.scan(one, total, chunks)

    def joined(parts):
        return parts.swapaxes(0, 1).reshape(batch, length, *parts.shape[3:])

    losses = jax.tree.map(joined, losses)
    if not with_gradients:
        return losses, None
    if sharded:
        dhead = jax.lax.psum_scatter(dhead, WIDTH_AXIS, scatter_dimension=0, tiled=True)
        dhead = jax.lax.psum(dhead, "data")
    return losses, HeadGradients(joined(dhidden), dhead)


def _losses_and_gradient(logits, targets, weight, cluster_size, sharded):
    """Losses of one chunk and the gradient of token_loss + weight * cluster_loss by its logits.

    Args:
        logits: float32 [B, l, V] of this device's codes.
        targets: ids counted from the device's first code: outside [0, V) where the target is on another device.
    """
    everywhere = functools.partial(jax.lax.psum, axis_name=VOCAB_AXIS) if sharded else lambda x: x

    def is_first_highest(values, places, wanted):
        """1 where no value is above the wanted one, nor equal to it at a lower place, else 0."""
        # Comparisons and a sum: an argmax is ten times slower on CPUs, and here would need to know its device.
        before = jnp.arange(values.shape[-1]) < places[..., None]
        ahead = (values > wanted[..., None]) | ((values == wanted[..., None]) & before)
        return (everywhere(jnp.sum(ahead, axis=-1)) == 0).astype(jnp.float32)

    clusters = targets // cluster_size
    here = (targets >= 0) & (targets < logits.shape[-1])
    grouped = logits.reshape(*logits.shape[:-1], -1, cluster_size)
    # The target's cluster by itself: its sum can be too small beside the highest logit of all.
    place = jnp.clip(clusters, 0, grouped.shape[-2] - 1)[..., None, None]
    own = jnp.take_along_axis(grouped, place, axis=-2)[..., 0, :]
    own_lse = jax.nn.logsumexp(own, axis=-1)
    target_logit = jnp.take_along_axis(own, (targets % cluster_size)[..., None], axis=-1)[..., 0]
    own_lse_everywhere, target_logit = (everywhere(jnp.where(here, x, 0.0)) for x in (own_lse, target_logit))

    highest = jnp.max(logits, axis=-1)
    if sharded:
        highest = jax.lax.pmax(highest, VOCAB_AXIS)
    exponentials = jnp.exp(grouped - highest[..., None, None])
    cluster_sums = jnp.sum(exponentials, axis=-1)
    own_sum = everywhere(jnp.where(here, jnp.take_along_axis(cluster_sums, place[..., 0], axis=-1)[..., 0], 0.0))
    total = everywhere(jnp.sum(cluster_sums, axis=-1))
    lse = highest + jnp.log(total)
    losses = TokenAndClusterLoss(
        token_loss=lse - target_logit,
        cluster_loss=lse - own_lse_everywhere,
        token_hit=is_first_highest(logits, targets, target_logit),
        cluster_hit=is_first_highest(cluster_sums, clusters, own_sum),
    )
    in_cluster = (jnp.arange(grouped.shape[-2]) == jnp.where(here, clusters, -1)[..., None])[..., None]
    in_token = jnp.arange(cluster_size) == (targets % cluster_size)[..., None]
    pulled = weight * jnp.exp(own - own_lse[..., None]) + in_token
    gradient = exponentials * ((1.0 + weight) / total)[..., None, None]
    gradient -= jnp.where(in_cluster, pulled[..., None, :], 0.0)
    return losses, gradient.reshape(logits.shape)
