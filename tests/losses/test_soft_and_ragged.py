"""If these fail, soft neighbours or clusters of unequal sizes train something else than their definitions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import logsumexp

from iar_jax.losses.cluster_loss import cluster_loss, reference
from iar_jax.losses.neighbours import Neighbours
from iar_jax.runtime import sharding

VOCAB, ALPHA = 32, 0.3
OFFSETS = (0, 1, 8, 9, 20, 32)


def problem(seed, scale=1.0, other=False):
    rng = np.random.default_rng(seed)
    hidden = jnp.asarray(rng.standard_normal((8, 6, 16)), jnp.float32)
    head = jnp.asarray(scale * rng.standard_normal((16, VOCAB)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, VOCAB, (8, 6)), jnp.int32)
    other_logits = jnp.asarray(3 * scale * rng.standard_normal((8, 6)), jnp.float32) if other else None
    return hidden, head, targets, other_logits


def neighbours_of(seed, count):
    rng = np.random.default_rng(seed)
    ids = np.stack([rng.permutation(VOCAB)[:count] for _ in range(VOCAB)]).astype(np.int32)
    shares = rng.random(ids.shape)
    return Neighbours(ids, (shares / shares.sum(axis=1, keepdims=True)).astype(np.float32))


def expected(hidden, head, targets, other, offsets, weight, neighbours, alpha):
    """The loss and its gradients in float64, from distributions over codes and clusters that are written out."""
    hidden, head, targets = np.asarray(hidden, np.float64), np.asarray(head, np.float64), np.asarray(targets)
    logits = hidden @ head
    if other is not None:
        logits = np.concatenate([logits, np.asarray(other, np.float64)[..., None]], axis=-1)
    log_p = logits - logsumexp(logits, axis=-1, keepdims=True)
    p = np.exp(log_p)
    one_hot = np.arange(p.shape[-1]) == targets[..., None]
    cluster = np.searchsorted(offsets, np.arange(p.shape[-1]), side="right") - 1
    inside = cluster == cluster[targets][..., None]
    own = logsumexp(np.where(inside, log_p, -np.inf), axis=-1, keepdims=True)
    losses = [-log_p[one_hot].reshape(targets.shape), -own[..., 0]]
    gradient = p - one_hot + weight * (p - np.exp(np.where(inside, log_p - own, -np.inf)))
    each = losses[0] + weight * losses[1]
    if neighbours is not None:
        soft = np.zeros_like(p)
        for j in range(neighbours.ids.shape[1]):
            soft += neighbours.shares[targets, j][..., None] * (
                np.arange(p.shape[-1]) == neighbours.ids[targets, j][..., None]
            )
        losses.append(-(soft * log_p).sum(axis=-1))
        each = each + alpha * losses[-1]
        gradient += alpha * (p - soft)
    gradient /= targets.size
    by_codes = gradient[..., :VOCAB]
    return each.mean(), losses, (by_codes @ head.T, np.einsum("bld,blv->dv", hidden, by_codes), gradient[..., VOCAB:])


def check(found, wanted, scale=1.0):
    """To float32 rounding, which grows with the logits: a loss is a difference of two numbers of their size, and a
    probability near 1 is off by 1e-7 even where it leaves next to no gradient."""
    (loss, losses), grads = found
    expected_loss, expected_losses, expected_grads = wanted
    np.testing.assert_allclose(loss, expected_loss, rtol=4e-6, atol=1e-6 * max(1.0, scale))
    near = [] if losses.neighbour_loss is None else [losses.neighbour_loss]
    for ours, theirs in zip([losses.token_loss, *losses.cluster_losses, *near], expected_losses, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * max(1.0, 10 * scale))
    for ours, theirs in zip(grads, expected_grads, strict=False):
        theirs = theirs[..., 0] if theirs.shape[-1] == 1 else theirs
        np.testing.assert_allclose(ours, theirs, atol=max(1.0, scale) * (4e-6 * np.abs(theirs).max() + 1e-7))


@functools.partial(jax.jit, static_argnames="offsets")
def fused(hidden, head, targets, other, neighbours, weight, offsets):
    def loss(h, w, o):
        options = {"neighbours": neighbours, "neighbour_weight": ALPHA, "num_chunks": 3}
        return cluster_loss(h, w, targets, [(offsets, weight)], other_logits=o, **options)

    return jax.value_and_grad(loss, (0, 1) if other is None else (0, 1, 2), has_aux=True)(hidden, head, other)


@settings(deadline=None, max_examples=50)
@given(
    st.integers(0, 1000),
    # Each is compiled once.
    st.sampled_from(
        [
            *((OFFSETS, None, False), (OFFSETS, 5, True), ((0, 32), 1, False), ((0, 32), None, True)),
            *((tuple(range(33)), 5, False), (tuple(range(33)), None, True), ((0, 31, 32), 1, True)),
        ]
    ),
    st.floats(0.0, 2.0),
    st.sampled_from([0.1, 1.0, 30.0]),
)
def test_they_are_their_definitions(seed, form, weight, scale):
    # At 30 most clusters are far below the float32 range of the highest logit's exponential.
    offsets, count, with_other = form
    hidden, head, targets, other = problem(seed, scale, with_other)
    neighbours = None if count is None else neighbours_of(seed, count)
    found = fused(hidden, head, targets, other, neighbours, weight, offsets=offsets)
    check(found, expected(hidden, head, targets, other, offsets, weight, neighbours, ALPHA), scale)


def test_neighbours_go_with_nested_levels():
    hidden, head, targets, _ = problem(0)
    neighbours, levels = neighbours_of(0, 4), [(2, 0.7), (8, 0.4)]

    def fused(h, w):
        return cluster_loss(h, w, targets, levels, neighbours=neighbours, neighbour_weight=ALPHA)

    def plain(h, w):
        found = reference(h @ w, targets, (2, 8), neighbours)
        each = found.token_loss + 0.7 * found.cluster_losses[0] + 0.4 * found.cluster_losses[1]
        return jnp.mean(each + ALPHA * found.neighbour_loss), found

    (loss, losses), grads = jax.value_and_grad(fused, (0, 1), has_aux=True)(hidden, head)
    (plain_loss, plain_losses), plain_grads = jax.value_and_grad(plain, (0, 1), has_aux=True)(hidden, head)
    np.testing.assert_allclose(loss, plain_loss, rtol=2e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), losses, plain_losses)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), grads, plain_grads)


def test_equal_clusters_by_their_offsets_are_those_by_their_size():
    hidden, head, targets, other = problem(3, other=True)
    by_size = cluster_loss(hidden, head, targets, [(8, 0.7)], other_logits=other)
    by_offsets = cluster_loss(hidden, head, targets, [((0, 8, 16, 24, 32), 0.7)], other_logits=other)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), by_size, by_offsets)
    plain = reference(hidden @ head, targets, [OFFSETS])
    hits = cluster_loss(hidden, head, targets, [(OFFSETS, 0.7)])[1].cluster_hits
    np.testing.assert_array_equal(hits[0], plain.cluster_hits[0])
    assert 0 < np.mean(hits[0]) < 1


# Offsets that are no multiples of 4 or 16: with 8 and with 2 devices on the axis, clusters lie on several.
@pytest.mark.parametrize("mesh_sizes", [(8, 1, 1), (1, 1, 8), (2, 2, 2)])
def test_every_mesh_gives_the_same(mesh_sizes):
    hidden, head, targets, other = problem(0, other=True)
    neighbours = neighbours_of(1, 5)

    def loss(h, w, o):
        return cluster_loss(
            h, w, targets, [(OFFSETS, 0.7)], other_logits=o, neighbours=neighbours, neighbour_weight=ALPHA, num_chunks=3
        )

    step = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)
    wanted = expected(hidden, head, targets, other, OFFSETS, 0.7, neighbours, ALPHA)
    _, alone = step(hidden, head, other)[0]
    with sharding.use_mesh(sharding.make_mesh(*mesh_sizes)):
        found = jax.jit(step)(hidden, head, other)
    check(found, wanted)
    np.testing.assert_array_equal(found[0][1].cluster_hits[0], alone.cluster_hits[0])


@pytest.mark.parametrize(
    ("levels", "smoothing", "message"),
    [
        ([((0, 4, 4, 32), 1.0)], 0.0, "offsets of clusters rise; 4 is followed by 4"),
        ([((0, 4, 31), 1.0)], 0.0, "go from 0 to the number of codes, 32"),
        ([((1, 4, 32), 1.0)], 0.0, "go from 0"),
        ([(OFFSETS, 1.0), (8, 1.0)], 0.0, "one level alone"),
        ([(OFFSETS, 1.0)], 0.1, "label_smoothing is of clusters of equal sizes"),
    ],
)
def test_what_is_no_partition_is_refused(levels, smoothing, message):
    hidden, head, targets, _ = problem(0)
    with pytest.raises(ValueError, match=message):
        cluster_loss(hidden, head, targets, levels, label_smoothing=smoothing)
