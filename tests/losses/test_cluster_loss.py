"""If these fail, the loss that is trained on is not the paper's, or differs from mesh to mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iar_jax.losses.cluster_loss import cluster_loss, reference
from iar_jax.runtime import sharding

LAMBDAS = (0.7, 0.4, 1.3)


def levels_of(sizes, weights=LAMBDAS):
    return list(zip(sizes, weights, strict=False))


def plain_loss(hidden, head, targets, levels, shares=None):
    """The same from logits that are all there; `shares` are what positions count in the mean."""
    losses = reference(hidden @ head, targets, [size for size, _ in levels])
    each = losses.token_loss + sum(w * found for (_, w), found in zip(levels, losses.cluster_losses, strict=True))
    return (jnp.mean(each) if shares is None else jnp.sum(shares * each)), losses


def problem(seed, batch=8, length=12, dim=16, vocab=32, scale=1.0):
    rng = np.random.default_rng(seed)
    hidden = jnp.asarray(rng.standard_normal((batch, length, dim)), jnp.float32)
    head = jnp.asarray(scale * rng.standard_normal((dim, vocab)), jnp.float32)
    return hidden, head, jnp.asarray(rng.integers(0, vocab, (batch, length)), jnp.int32)


def through(loss, hidden, head):
    return jax.value_and_grad(loss, (0, 1), has_aux=True)(hidden, head)


def check(found, expected, scale=0.1):
    """Values and gradients to float32 rounding: sums over 32 logits, relative to the largest entry.

    Rounding grows with the logits: a probability's relative error is its logit's absolute one, 4e-5 at the logits of a
    few hundred that a scale of 30 makes.
    """
    (loss, losses), grads = found
    (expected_loss, expected_losses), expected_grads = expected
    np.testing.assert_allclose(loss, expected_loss, rtol=2e-6)
    for ours, theirs in zip(jax.tree.leaves(losses), jax.tree.leaves(expected_losses), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * max(1.0, 10 * scale))
    for ours, theirs in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=3e-6 * max(1.0, scale) * np.abs(theirs).max())


@functools.partial(jax.jit, static_argnames=("sizes", "num_chunks"))
def fused_and_plain(hidden, head, targets, weight, sizes, num_chunks):
    levels = levels_of(sizes, (weight, *LAMBDAS))
    return (
        through(lambda h, w: cluster_loss(h, w, targets, levels, num_chunks=num_chunks), hidden, head),
        through(lambda h, w: plain_loss(h, w, targets, levels), hidden, head),
    )


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 1000),
    # Each pair is compiled once.
    st.sampled_from(
        [
            *((((4,), 32), 1), (((6,), 6), 12), (((1,), 6), 2), (((5,), 15), 3)),
            *((((4, 16), 32), 2), (((1, 2, 8), 16), 3), (((2, 6), 6), 1)),
        ]
    ),
    st.floats(0.0, 2.0),
    st.sampled_from([0.1, 1.0, 30.0]),
)
def test_value_and_gradients_are_those_of_the_plain_form(seed, form, weight, scale):
    # At 30 most clusters are far below the float32 range of the highest logit's exponential.
    (sizes, vocab), num_chunks = form
    check(*fused_and_plain(*problem(seed, 2, 12, 16, vocab, scale), weight, sizes, num_chunks), scale)


def float64_gradients(hidden, head, targets, levels, shares, bias=0.0, other=None, smoothing=0.0):
    """The loss and its gradients by hidden, head, bias and the other class' logit, in numpy's float64, from target
    distributions over codes and clusters that are written out."""
    hidden, head, shares, bias = (np.asarray(x, np.float64) for x in (hidden, head, shares, bias))
    logits, targets = hidden @ head + bias, np.asarray(targets)
    if other is not None:
        logits = np.concatenate([logits, np.asarray(other, np.float64)[..., None]], axis=-1)
    vocab = head.shape[1]
    p = np.exp(logits - logits.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    each, gradient = 0.0, 0.0
    for size, weight in [(1, 1.0), *levels]:
        number = vocab // size
        cluster = np.minimum(np.arange(logits.shape[-1]) // size, number)
        wanted = (1 - smoothing) * (np.arange(number) == targets[..., None] // size) + smoothing / number
        if other is not None:
            wanted = np.concatenate([wanted, np.zeros((*wanted.shape[:-1], 1))], axis=-1)
        sums = np.stack([p[..., cluster == c].sum(axis=-1) for c in range(wanted.shape[-1])], axis=-1)
        each -= weight * (wanted * np.log(sums)).sum(axis=-1)
        gradient += weight * (p - wanted[..., cluster] * p / sums[..., cluster])
    gradient *= shares[..., None]
    by_codes = gradient[..., :vocab]
    grads = by_codes @ head.T, np.einsum("bld,blv->dv", hidden, by_codes), by_codes.sum(axis=(0, 1))
    return (shares * each).sum(), *grads, gradient[..., vocab:]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("with_other", [False, True])
@pytest.mark.parametrize("sizes", [(4,), (2, 8, 16)])
@pytest.mark.parametrize("scale", [0.3, 30.0])
def test_bias_smoothing_and_a_class_that_is_no_code(smoothing, with_other, sizes, scale):
    # At 30 most clusters are far below the float32 range of the highest logit's exponential.
    hidden, head, targets = problem(5, scale=scale)
    rng = np.random.default_rng(6)
    bias = jnp.asarray(scale * rng.standard_normal(head.shape[1]), jnp.float32)
    other = jnp.asarray(3 * scale * rng.standard_normal(targets.shape), jnp.float32) if with_other else None
    weights = rng.random(targets.shape).astype(np.float32)
    levels = levels_of(sizes)

    def loss(h, w, b, o):
        return cluster_loss(
            h, w, targets, levels, bias=b, other_logits=o, label_smoothing=smoothing,
            position_weights=jnp.asarray(weights), num_chunks=3,
        )  # fmt: skip

    arguments = (0, 1, 2, 3) if with_other else (0, 1, 2)
    (found, losses), grads = jax.value_and_grad(loss, arguments, has_aux=True)(hidden, head, bias, other)
    expected, *expected_grads = float64_gradients(
        hidden, head, targets, levels, weights / weights.sum(), bias, other, smoothing
    )
    np.testing.assert_allclose(found, expected, rtol=4e-6)
    expected_grads[3] = expected_grads[3][..., 0] if with_other else None
    for ours, theirs in zip(grads, expected_grads, strict=False):
        np.testing.assert_allclose(ours, theirs, atol=3e-6 * max(1.0, scale) * np.abs(theirs).max())
    # What is measured is without smoothing, and the other class counts against a hit.
    logits = np.asarray(hidden @ head + bias)
    best = logits.argmax(axis=-1)
    hits = (best == np.asarray(targets)) & (True if other is None else logits.max(axis=-1) >= np.asarray(other))
    np.testing.assert_array_equal(losses.token_hit, hits)
    plain, *_ = float64_gradients(hidden, head, targets, [], weights / weights.sum(), bias, other)
    np.testing.assert_allclose(np.sum(weights * losses.token_loss) / weights.sum(), plain, rtol=4e-6)


@pytest.mark.parametrize("mean_of_rows", [False, True])
@pytest.mark.parametrize("sizes", [(4,), (2, 8, 16)])
def test_positions_count_as_they_are_weighted(mean_of_rows, sizes):
    hidden, head, targets = problem(3, scale=0.3)
    rng = np.random.default_rng(4)
    weights = (rng.random(targets.shape) * (rng.random(targets.shape) < 0.5)).astype(np.float32)
    weights[2] = 0.0  # a picture of which nothing counts
    counted = jnp.asarray(weights)
    total = weights.sum(axis=1, keepdims=True)
    by_rows = np.divide(weights, total, out=np.zeros_like(weights), where=total > 0) / len(weights)
    shares = by_rows if mean_of_rows else weights / weights.sum()
    levels = levels_of(sizes)

    def loss(h, w):
        return cluster_loss(h, w, targets, levels, position_weights=counted, mean_of_rows=mean_of_rows, num_chunks=3)

    (found, _), grads = through(loss, hidden, head)
    expected, *expected_grads = float64_gradients(hidden, head, targets, levels, shares)
    expected_grads = expected_grads[:2]
    np.testing.assert_allclose(found, expected, rtol=2e-6)
    for ours, theirs in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=3e-6 * np.abs(theirs).max())
    np.testing.assert_array_equal(grads[0][2], 0.0)
    # Ones are as no weights at all.
    ones = through(
        lambda h, w: cluster_loss(h, w, targets, levels, position_weights=jnp.ones(targets.shape)), hidden, head
    )
    check(ones, through(lambda h, w: cluster_loss(h, w, targets, levels), hidden, head))


def test_where_nothing_counts_the_loss_is_zero():
    hidden, head, targets = problem(0)
    for mean_of_rows in (False, True):
        (loss, _), grads = through(
            lambda h, w, rows=mean_of_rows: cluster_loss(
                h, w, targets, [(4, 1.0)], position_weights=jnp.zeros(targets.shape), mean_of_rows=rows
            ),
            hidden,
            head,
        )
        assert loss == 0.0
        assert all(np.all(np.asarray(g) == 0.0) for g in grads)


@pytest.mark.parametrize(
    "mesh_sizes", [pytest.param((8, 1, 1), marks=pytest.mark.slow), (1, 8, 1), (1, 1, 8), (2, 2, 2)]
)
@pytest.mark.parametrize("smoothing", [pytest.param(0.0, marks=pytest.mark.slow), 0.1])
def test_every_mesh_gives_the_same_with_a_bias_and_another_class(mesh_sizes, smoothing):
    hidden, head, targets = problem(0)
    rng = np.random.default_rng(2)
    bias = jnp.asarray(rng.standard_normal(head.shape[1]), jnp.float32)
    other = jnp.asarray(rng.standard_normal(targets.shape), jnp.float32)

    def loss(h, w, b, o):
        return cluster_loss(
            h, w, targets, [(2, 0.7), (4, 0.4)], bias=b, other_logits=o, label_smoothing=smoothing, num_chunks=3
        )

    step = jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True)
    alone = step(hidden, head, bias, other)
    with sharding.use_mesh(sharding.make_mesh(*mesh_sizes)):
        check(jax.jit(step)(hidden, head, bias, other), alone)


@pytest.mark.parametrize("mesh_sizes", [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)])
@pytest.mark.parametrize("weighted", [False, True])
def test_every_mesh_gives_the_same(mesh_sizes, weighted):
    # The coarsest level has 8 clusters: one for each device of the tensor axis.
    hidden, head, targets = problem(0)
    weights = jnp.asarray(np.random.default_rng(1).random(targets.shape), jnp.float32) if weighted else None
    step = jax.value_and_grad(
        lambda h, w: cluster_loss(h, w, targets, [(2, 0.7), (4, 0.4)], position_weights=weights, num_chunks=3),
        (0, 1),
        has_aux=True,
    )
    alone = step(hidden, head)
    with sharding.use_mesh(sharding.make_mesh(*mesh_sizes)):
        check(jax.jit(step)(hidden, head), alone)


def test_with_the_vocabulary_split_only_sums_and_maxima_cross_its_axis():
    hidden, head, targets = problem(0)
    mesh = sharding.make_mesh(1, 1, 8)
    with sharding.use_mesh(mesh):
        by_vocab = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "tensor"))
        step = jax.jit(
            jax.grad(
                lambda h, w: cluster_loss(h, w, targets, [(2, 0.7), (4, 0.2)], num_chunks=3), (0, 1), has_aux=True
            ),
            in_shardings=(sharding.replicated(mesh), by_vocab),
            out_shardings=((sharding.replicated(mesh), by_vocab), None),
        )
        text = step.lower(hidden, head).compile().as_text()
    assert "all-reduce" in text
    assert not any(name in text for name in ("all-gather", "all-to-all", "collective-permute"))


def test_at_a_zero_head_ties_go_to_the_first_code_and_losses_to_the_logarithms():
    hidden, head, targets = problem(0)
    for mesh_sizes in (None, (1, 1, 8)):
        run = jax.jit(lambda: cluster_loss(hidden, 0.0 * head, targets, [(4, 1.0)], num_chunks=2)[1])
        if mesh_sizes is None:
            losses = run()
        else:
            with sharding.use_mesh(sharding.make_mesh(*mesh_sizes)):
                losses = run()
        np.testing.assert_allclose(losses.token_loss, np.log(32), rtol=1e-6)
        np.testing.assert_allclose(losses.cluster_losses[0], np.log(8), rtol=1e-6)
        np.testing.assert_array_equal(losses.token_hit, targets == 0)
        np.testing.assert_array_equal(losses.cluster_hits[0], targets // 4 == 0)


def test_temporary_memory_is_an_eighth_of_the_plain_form_at_16384_codes():
    hidden = jax.ShapeDtypeStruct((32, 256, 768), jnp.float32)
    head = jax.ShapeDtypeStruct((768, 16384), jnp.float32)
    targets = jax.ShapeDtypeStruct((32, 256), jnp.int32)

    def temporaries(loss):
        def step(h, w, y):
            return jax.grad(lambda *args: loss(*args, y)[0], (0, 1))(h, w)

        return jax.jit(step).lower(hidden, head, targets).compile().memory_analysis().temp_size_in_bytes

    fused = temporaries(lambda h, w, y: cluster_loss(h, w, y, [(128, 1.0)], num_chunks=32))
    plain = temporaries(lambda h, w, y: plain_loss(h, w, y, [(128, 1.0)]))
    assert fused <= plain / 8


@pytest.mark.parametrize(
    ("sizes", "num_chunks", "message"),
    [
        ((5,), 1, "cluster_size 5 does not divide the vocabulary of 32"),
        ((4, 6), 1, r"cluster sizes \(4, 6\) are not nested: 4 does not divide 6"),
        ((4, 4), 1, "are not nested"),
        ((4,), 5, "num_chunks 5 does not divide the 12"),
    ],
)
def test_what_does_not_divide_is_refused(sizes, num_chunks, message):
    hidden, head, targets = problem(0)
    with pytest.raises(ValueError, match=message):
        cluster_loss(hidden, head, targets, levels_of(sizes), num_chunks=num_chunks)
