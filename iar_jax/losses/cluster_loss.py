"""The cluster-oriented cross-entropy of IAR (paper section on "cluster-oriented token prediction"), over nested levels.

Logits are over the rearranged codebook, where every cluster of every level owns contiguous ids: cluster c of a level
with clusters of S codes owns [c*S, (c+1)*S). With lse = logsumexp over all logits Y and lse_c = logsumexp over those of
the target's cluster,

    token_loss = lse − Y[y]        cluster_loss = lse − lse_c        loss = token_loss + Σ_levels λ · cluster_loss

cluster_loss is −log of the probability of the target's whole cluster, and 0 ≤ cluster_loss ≤ token_loss; a coarser
level's is never above a finer one's. One level is the paper's loss. Clusters of unequal sizes are one level by their
offsets (`losses.clusters`), and a little of the target can go to codes near it (`losses.neighbours`).

`cluster_loss` is what trains: the head and the losses at once, without ever holding the logits of a whole batch.
Positions are taken a chunk at a time. Where gradients are wanted, each chunk's are made while its logits are at hand:

    d loss / d Y_i = (1 + Σ λ) p_i − 1[i = y] − Σ_levels λ 1[i ∈ c(y)] p_i / P_c(y)

from the same exponentials as the losses, so the products are those of the plain form (one forward, two backward) and
λ costs a few additions. On a mesh, rows stay on their devices, each device holds the codes of whole clusters (logical
axis "vocab"), and what crosses the `tensor` axis are sums and maxima, one number a position, and the gradient of
`hidden`. `reference` is the definition, on logits that are all there.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from iar_jax.losses.clusters import check_offsets, nested_clusters, ragged_clusters
from iar_jax.losses.codes_part import CodesPart
from iar_jax.losses.label_smoothing import smoothing_term
from iar_jax.losses.neighbours import Neighbours, expected_logits

BATCH_AXES, WIDTH_AXIS, VOCAB_AXIS = ("data", "fsdp"), "fsdp", "tensor"

# The codes of each cluster of a level; or the first id of each cluster and, last, the number of codes, where clusters
# are unequal: (0, 5, 9, 16) are clusters of 5, 4 and 7 codes.
Clusters = int | tuple[int, ...]

# (clusters, λ) of each level, from the finest to the coarsest.
Levels = Sequence[tuple[Clusters, Float[Array, ""] | float]]


class Losses(NamedTuple):
    """Losses in nats and hits in {0, 1}, one for each position.

    Attributes:
        token_loss: of the target's code.
        token_hit: the most probable code is the target.
        cluster_losses: of the target's cluster, one array for each level.
        cluster_hits: the most probable cluster is the target's, one array for each level.
        neighbour_loss: cross-entropy to the codes near the target, where it is asked for.
    """

    token_loss: Float[Array, "..."]
    token_hit: Float[Array, "..."]
    cluster_losses: tuple[Float[Array, "..."], ...]
    cluster_hits: tuple[Float[Array, "..."], ...]
    neighbour_loss: Float[Array, "..."] | None = None

    def named(self, cluster_sizes: Sequence[Clusters]) -> dict[str, Array]:
        """Losses and accuracies by the names of metrics: `cluster_loss` is the finest level's, `cluster_loss_64` that
        of a coarser level with clusters of 64 codes."""
        suffixes = ["", *(f"_{size}" for size in cluster_sizes[1:])]
        found = {"token_loss": self.token_loss}
        found |= {f"cluster_loss{s}": x for s, x in zip(suffixes, self.cluster_losses, strict=True)}
        found["token_accuracy"] = self.token_hit
        found |= {f"cluster_accuracy{s}": x for s, x in zip(suffixes, self.cluster_hits, strict=True)}
        return found if self.neighbour_loss is None else found | {"neighbour_loss": self.neighbour_loss}


def cluster_loss(
    hidden: Float[Array, "B L D"],
    head: Float[Array, "D V"],
    targets: Int[Array, "B L"],
    levels: Levels,
    *,
    bias: Float[Array, " V"] | None = None,
    other_logits: Float[Array, "B L"] | None = None,
    label_smoothing: float = 0.0,
    neighbours: Neighbours | None = None,
    neighbour_weight: float = 0.0,
    position_weights: Float[Array, "B L"] | None = None,
    mean_of_rows: bool = False,
    num_chunks: int = 1,
) -> tuple[Float[Array, ""], Losses]:
    """Mean of token_loss + Σ λ · cluster_loss + α · neighbour_loss, and the losses and hits of each position.

    Only the mean is differentiable, by `hidden`, `head`, `bias` and `other_logits`. Inside `sharding.use_mesh` the work
    is split over the mesh.

    Args:
        hidden: what the head is applied to, after the final norm; its dtype is that of the products.
        head: float32; column i gives the logit of rearranged code i.
        targets: rearranged ids in [0, V).
        levels: nested, from the finest on: each cluster size divides the next, and the last divides V (the part of V
            on each device). Clusters of unequal sizes are one level alone; a mesh may split them.
        bias: float32, of the logits.
        other_logits: float32, of one more class that is no code, such as a masked model's mask: a cluster of its own at
            every level, which no target has.
        label_smoothing: ε: the mean takes cross-entropies with the target's share 1 − ε + ε / n, and ε / n for the
            others of n codes, or of a level's n clusters. The losses of each position are without it.
        neighbours: of each code, and their shares in its neighbour_loss. None leaves that out.
        neighbour_weight: α.
        position_weights: not negative; what each position counts in the mean, 0 leaves it out. None counts all alike.
        mean_of_rows: the weighted mean of each row first, then the mean over the rows (each picture counts alike,
            however many of its positions count), in the place of one weighted mean over all positions.
        num_chunks: parts that the positions are taken in, a divisor of L. Temporary memory falls with it.

    Raises:
        ValueError: when a cluster size or num_chunks does not divide what it splits, or offsets are not those of V
            codes, or clusters of unequal sizes are to be smoothed.
    """
    sizes = tuple(size for size, _ in levels)
    check_sizes(sizes, head.shape[1])
    if label_smoothing and isinstance(sizes[0], tuple):
        raise ValueError("label_smoothing is of clusters of equal sizes")
    if hidden.shape[1] % num_chunks:
        raise ValueError(f"num_chunks {num_chunks} does not divide the {hidden.shape[1]} positions")
    weights = jnp.stack([jnp.asarray(weight, jnp.float32) for _, weight in levels])
    scale = None if position_weights is None else shares(position_weights, mean_of_rows)
    static = Static(sizes, num_chunks, label_smoothing, neighbour_weight)
    with jax.named_scope("cluster_loss"):
        inputs = Inputs(hidden, head, bias, other_logits)
        return _cluster_loss(inputs, Targets(targets, neighbours), weights, scale, static)


class Inputs(NamedTuple):
    """What the mean is differentiable by."""

    hidden: Float[Array, "B L D"]
    head: Float[Array, "D V"]
    bias: Float[Array, " V"] | None
    other_logits: Float[Array, "B L"] | None


class Targets(NamedTuple):
    """What it is measured against."""

    codes: Int[Array, "B L"]
    neighbours: Neighbours | None


class Static(NamedTuple):
    """What the loss is compiled for."""

    sizes: tuple[Clusters, ...]
    num_chunks: int
    label_smoothing: float
    neighbour_weight: float


def check_sizes(sizes: Sequence[Clusters], vocab_size: int) -> None:
    """Raises ValueError where the levels are not nested, or do not divide the vocabulary."""
    ragged = [size for size in sizes if isinstance(size, tuple)]
    equal = [size for size in sizes if isinstance(size, int)]
    if ragged and len(sizes) > 1:
        raise ValueError("clusters of unequal sizes are one level alone")
    for offsets in ragged:
        check_offsets(offsets, vocab_size)
    for finer, coarser in itertools.pairwise(equal):
        if coarser % finer or coarser == finer:
            raise ValueError(f"cluster sizes {tuple(sizes)} are not nested: {finer} does not divide {coarser}")
    for size in equal:
        if size < 1 or vocab_size % size:
            raise ValueError(f"cluster_size {size} does not divide the vocabulary of {vocab_size}")


def shares(weights: Float[Array, "B L"], mean_of_rows: bool) -> Float[Array, "B L"]:
    """What each position's loss is multiplied with in the mean; they sum to 1 (to 0 where nothing counts)."""
    weights = weights.astype(jnp.float32)
    total = jnp.sum(weights, axis=1, keepdims=True) * weights.shape[0] if mean_of_rows else jnp.sum(weights)
    return jnp.where(total > 0, weights / jnp.where(total > 0, total, 1.0), 0.0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _cluster_loss(inputs, targets, weights, scale, static):
    found, _ = _on_mesh(inputs, targets, weights, scale, static, with_gradients=False)
    return _mean(found, weights, scale, static.neighbour_weight), found[0]


def _forward(inputs, targets, weights, scale, static):
    found, gradients = _on_mesh(inputs, targets, weights, scale, static, with_gradients=True)
    return (_mean(found, weights, scale, static.neighbour_weight), found[0]), gradients


def _backward(static, gradients, cotangents):
    factor, _ = cotangents
    return jax.tree.map(lambda gradient: factor.astype(gradient.dtype) * gradient, gradients), None, None, None


_cluster_loss.defvjp(_forward, _backward)


def _mean(found, weights, scale, neighbour_weight):
    losses, smoothing = found
    mean = jnp.mean if scale is None else lambda values: jnp.sum(scale * values)
    total = mean(losses.token_loss)
    for i, values in enumerate(losses.cluster_losses):
        total += weights[i] * mean(values)
    if losses.neighbour_loss is not None:
        total += neighbour_weight * mean(losses.neighbour_loss)
    return total if smoothing is None else total + mean(smoothing)


def _on_mesh(inputs, targets, weights, scale, static, with_gradients):
    """Runs `_chunked` on each device's part, or on everything where there is no mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    run = functools.partial(
        _chunked,
        static=static,
        num_positions=targets.codes.size,
        with_gradients=with_gradients,
        sharded=not mesh.empty,
    )
    if mesh.empty:
        return run(inputs, targets, weights, scale)
    rows, levels = PartitionSpec(BATCH_AXES), len(static.sizes)

    def where_there(value, spec):
        return None if value is None else spec

    bias, other = where_there(inputs.bias, PartitionSpec(VOCAB_AXIS)), where_there(inputs.other_logits, rows)
    near = where_there(targets.neighbours, rows)
    losses = Losses(rows, rows, (rows,) * levels, (rows,) * levels, near), rows if static.label_smoothing else None
    gradients = Inputs(rows, PartitionSpec(WIDTH_AXIS, VOCAB_AXIS), bias, other) if with_gradients else None
    split = Inputs(rows, PartitionSpec(None, VOCAB_AXIS), bias, other)
    return jax.shard_map(
        run,
        in_specs=(
            split,
            Targets(rows, where_there(targets.neighbours, PartitionSpec())),
            PartitionSpec(),
            where_there(scale, rows),
        ),
        out_specs=(losses, gradients),
        check_vma=False,
    )(inputs, targets, weights, scale)


def _chunked(inputs, targets, weights, scale, *, static, num_positions, with_gradients, sharded):
    """Losses of all positions, what smoothing adds to them, and where asked for the gradients of their mean."""
    hidden, head, bias, other_logits = inputs
    batch, length, _ = hidden.shape
    num_chunks = static.num_chunks

    def split(positions):
        if positions is None:
            return None
        parts = positions.reshape(batch, num_chunks, length // num_chunks, *positions.shape[2:]).swapaxes(0, 1)
        return parts.reshape(num_chunks, -1, *positions.shape[2:])

    def joined(parts):
        parts = parts.reshape(num_chunks, batch, length // num_chunks, *parts.shape[2:]).swapaxes(0, 1)
        return parts.reshape(batch, length, *parts.shape[3:])

    # Codes lead on TPUs: clusters are then whole rows of a tile, not parts of one. CPUs want them contiguous.
    order = "VP" if _is_on_tpu() else "PV"
    columns, device_axis = head.astype(hidden.dtype), VOCAB_AXIS if sharded else None
    first = jax.lax.axis_index(VOCAB_AXIS) * head.shape[1] if sharded else 0
    part = CodesPart(order.index("V"), device_axis, first)

    def one(totals, chunk):
        rows, wanted, counts, other = chunk
        logits = jnp.einsum(f"PD,DV->{order}", rows, columns, preferred_element_type=jnp.float32)
        if bias is not None:
            logits += jnp.expand_dims(bias, 1 - part.axis)
        losses, dlogits, dother = _losses_and_gradient(logits, other, wanted, targets.neighbours, weights, static, part)
        smoothing = None
        if static.label_smoothing:
            smoothing, more = smoothing_term(
                logits, wanted - first, weights, static.sizes, static.label_smoothing, part
            )
            dlogits += more
        if not with_gradients:
            return totals, (losses, smoothing, None, None)
        shares = 1.0 / num_positions if counts is None else counts
        dlogits = dlogits / num_positions if counts is None else dlogits * part.each(counts)
        dhead, dbias = totals
        if bias is not None:
            dbias += jnp.sum(dlogits, axis=1 - part.axis)
        dlogits = dlogits.astype(hidden.dtype)
        dhead += jnp.einsum(f"PD,{order}->DV", rows, dlogits, preferred_element_type=jnp.float32)
        dhidden = jnp.einsum(f"{order},DV->PD", dlogits, columns, preferred_element_type=jnp.float32)
        if sharded:
            dhidden = jax.lax.psum(dhidden, VOCAB_AXIS)
        dother = None if other is None else dother * shares
        return (dhead, dbias), (losses, smoothing, dhidden.astype(hidden.dtype), dother)

    zeros = jnp.zeros(head.shape, jnp.float32), None if bias is None else jnp.zeros(bias.shape, jnp.float32)
    chunks = (split(hidden), split(targets.codes), split(scale), split(other_logits))
    totals, found = jax.lax.scan(one, zeros if with_gradients else (None, None), chunks)
    losses, smoothing, dhidden, dother = jax.tree.map(joined, found)
    if not with_gradients:
        return (losses, smoothing), None
    dhead, dbias = totals
    if sharded:
        dhead = jax.lax.psum_scatter(dhead, WIDTH_AXIS, scatter_dimension=0, tiled=True)
        dhead = jax.lax.psum(dhead, "data")
        dbias = None if dbias is None else jax.lax.psum(dbias, BATCH_AXES)
    return (losses, smoothing), Inputs(dhidden, dhead, dbias, dother)


def _is_on_tpu() -> bool:
    mesh = jax.sharding.get_abstract_mesh()
    return bool(mesh.abstract_device) and mesh.abstract_device.platform == "tpu"


def _losses_and_gradient(logits, other, wanted, neighbours, weights, static, part):
    """Losses of one chunk and the gradients of their weighted sum by its logits, and by `other`.

    Args:
        logits: float32, positions [P] by this device's codes [V].
        other: [P], of the class that is no code; None where there is none.
        wanted: [P], the targets' ids.
        part: how the logits lie, and which codes they are of.
    """
    targets, each = wanted - part.first, part.each  # outside [0, V) where the target is on another device
    highest = part.highest(jnp.max(logits, axis=part.axis))
    if other is not None:
        highest = jnp.maximum(highest, other)
    powers, others_power = jnp.exp(logits - each(highest)), None if other is None else jnp.exp(other - highest)
    if isinstance(static.sizes[0], tuple):
        found = ragged_clusters(logits, powers, others_power, wanted, static.sizes[0], part)
    else:
        found = nested_clusters(logits, powers, others_power, targets, static.sizes, part)
    lse = highest + jnp.log(found.total if other is None else found.total + others_power)
    token_hit = part.is_first_highest(logits, targets, found.target_logit)
    losses = Losses(
        token_loss=lse - found.target_logit,
        token_hit=token_hit if other is None else jnp.where(found.target_logit >= other, token_hit, 0.0),
        cluster_losses=tuple(lse - level.lse for level in found.levels),
        cluster_hits=tuple(level.hit for level in found.levels),
    )
    # What the probability of every code counts in the gradient.
    whole = 1.0 + jnp.sum(weights)
    shares: Any = 0.0
    if neighbours is not None:
        expected, shares = expected_logits(logits, neighbours, wanted, part)
        losses = losses._replace(neighbour_loss=lse - expected)
        whole, shares = whole + static.neighbour_weight, static.neighbour_weight * shares
    # One exponential a code: inside the target's cluster relative to the cluster's own lse, for its share of all can be
    # too small to divide by.
    base, factor = each(lse), whole
    for i in reversed(range(len(found.levels))):
        own = found.levels[i]
        pulled = sum(weights[j] * jnp.exp(own.lse - found.levels[j].lse) for j in range(i, len(found.levels)))
        share = whole * jnp.exp(own.lse - lse) - pulled
        base, factor = jnp.where(own.inside, each(own.lse), base), jnp.where(own.inside, each(share), factor)
    dlogits = jnp.exp(logits - base) * factor - (part.places(logits) == each(targets)) - shares
    return losses, dlogits, None if other is None else whole * jnp.exp(other - lse)


def reference(
    logits: Float[Array, "*B V"],
    targets: Int[Array, "*B"],
    cluster_sizes: Sequence[Clusters],
    neighbours: Neighbours | None = None,
) -> Losses:
    """The losses as the paper defines them, one cross-entropy by itself for each level.

    Logits are reshaped to (n, m), put together by logsumexp over m, and cross-entropy is taken over the n clusters.

    Args:
        logits: [..., V] in the rearranged order; computed in float32 whatever their dtype.
        targets: [...] rearranged ids in [0, V).
        cluster_sizes: m of each level, or its offsets, as in `cluster_loss`.
        neighbours: as in `cluster_loss`.

    Raises:
        ValueError: when a cluster size does not divide what it splits.
    """
    check_sizes(cluster_sizes, logits.shape[-1])
    logits = logits.astype(jnp.float32)

    def cross_entropy(scores, labels):
        found = -jnp.take_along_axis(jax.nn.log_softmax(scores, axis=-1), labels[..., None], axis=-1)[..., 0]
        return found, (jnp.argmax(scores, axis=-1) == labels).astype(jnp.float32)

    def level(clusters):
        if isinstance(clusters, int):
            return jax.nn.logsumexp(logits.reshape(*logits.shape[:-1], -1, clusters), axis=-1), targets // clusters
        parts = [logits[..., start:end] for start, end in itertools.pairwise(clusters)]
        own = jnp.searchsorted(jnp.array(clusters), targets, side="right") - 1
        return jnp.stack([jax.nn.logsumexp(part, axis=-1) for part in parts], axis=-1), own

    token_loss, token_hit = cross_entropy(logits, targets)
    levels = [cross_entropy(*level(clusters)) for clusters in cluster_sizes]
    cluster_losses, cluster_hits = (tuple(values) for values in zip(*levels, strict=True))
    found = Losses(token_loss, token_hit, cluster_losses, cluster_hits)
    if neighbours is None:
        return found
    near = jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), neighbours.ids[targets], axis=-1)
    return found._replace(neighbour_loss=-jnp.sum(neighbours.shares[targets] * near, axis=-1))
