"""If these fail, the loss that the project exists for is wrong."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iar_jax.losses.cluster_loss import reference

compiled = jax.jit(reference, static_argnums=2)


@functools.partial(jax.jit, static_argnames="sizes")
@jax.grad
def gradient_by_logits(logits, targets, weight, sizes):
    losses = reference(logits, targets, sizes)
    return jnp.sum(losses.token_loss + weight * sum(losses.cluster_losses))


def float64_losses(logits, targets, sizes):
    """All losses by probabilities, in float64 numpy: -log p_y and, for each level, -log of the cluster's summed
    probability."""
    logits = np.asarray(logits, np.float64)
    p = np.exp(logits - logits.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    pick = lambda table, ids: np.take_along_axis(table, ids[..., None], axis=-1)[..., 0]  # noqa: E731
    clusters = [pick(p.reshape(*p.shape[:-1], -1, size).sum(axis=-1), targets // size) for size in sizes]
    return -np.log(pick(p, targets)), [-np.log(found) for found in clusters]


@st.composite
def problems(draw):
    # A few shapes, each of which is compiled once.
    sizes, vocab, rows = draw(
        st.sampled_from(
            [
                *(((1,), 1, 1), ((9,), 9, 4), ((1,), 9, 4), ((5,), 15, 4), ((2,), 4, 1), ((9,), 81, 5)),
                *(((4, 16), 32, 4), ((1, 3, 9), 27, 5), ((2, 4, 8), 8, 3)),
            ]
        )
    )
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    scale = draw(st.sampled_from([0.01, 1.0, 10.0]))
    logits = (scale * rng.standard_normal((rows, vocab))).astype(np.float32)
    return logits, rng.integers(0, vocab, rows).astype(np.int32), sizes


@settings(deadline=None, max_examples=60)
@given(problems())
def test_it_equals_float64(problem):
    logits, targets, sizes = problem
    token, clusters = float64_losses(logits, targets, sizes)
    found = compiled(jnp.asarray(logits), jnp.asarray(targets), sizes)
    # float32 logsumexp of magnitudes up to 50: a few units in the last place of 50 are 2e-5.
    np.testing.assert_allclose(found.token_loss, token, atol=3e-5)
    upper = np.asarray(found.token_loss)
    for ours, theirs in zip(found.cluster_losses, clusters, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=3e-5)
        # A coarser cluster is at least as probable as a finer one in it, and that as the code.
        assert (np.asarray(ours) >= -1e-5).all()
        assert (np.asarray(ours) <= upper + 1e-5).all()
        upper = np.asarray(ours)


@settings(deadline=None, max_examples=30)
@given(problems(), st.floats(0.0, 3.0))
def test_gradient_is_the_analytic_one(problem, weight):
    logits, targets, sizes = problem
    y = np.asarray(logits, np.float64)
    p = np.exp(y - y.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    ids = np.arange(y.shape[-1])
    expected = (1 + len(sizes) * weight) * p - (ids[None] == targets[:, None])
    for size in sizes:
        inside = ids[None] // size == targets[:, None] // size
        expected -= weight * inside * p / (p * inside).sum(axis=-1, keepdims=True)
    # Entries are at most 1 + 3 * 3 = 10 in size; float32 softmax is good to a few 1e-7 of that.
    np.testing.assert_allclose(gradient_by_logits(logits, targets, weight, sizes=sizes), expected, atol=2e-5)


def test_a_zero_head_gives_the_logarithms_of_the_counts():
    found = reference(jnp.zeros((2, 3, 16384)), jnp.zeros((2, 3), jnp.int32), (128, 1024))
    np.testing.assert_allclose(found.token_loss, 9.704061, atol=1e-5)
    np.testing.assert_allclose(found.cluster_losses[0], 4.852030, atol=1e-5)
    np.testing.assert_allclose(found.cluster_losses[1], np.log(16), atol=1e-5)


def test_permuting_inside_clusters_and_whole_clusters_changes_nothing():
    rng = np.random.default_rng(0)
    clusters, size = 8, 4
    logits = rng.standard_normal((6, clusters * size)).astype(np.float32)
    targets = rng.integers(0, clusters * size, 6)
    order = np.concatenate([c * size + rng.permutation(size) for c in rng.permutation(clusters)])
    before = reference(jnp.asarray(logits), jnp.asarray(targets), (size,))
    after = reference(jnp.asarray(logits[:, order]), jnp.asarray(np.argsort(order)[targets]), (size,))
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    # Another partition is another cluster loss, and the same token loss.
    mixed = rng.permutation(clusters * size)
    other = reference(jnp.asarray(logits[:, mixed]), jnp.asarray(np.argsort(mixed)[targets]), (size,))
    np.testing.assert_allclose(before.token_loss, other.token_loss, atol=1e-6)
    assert np.abs(before.cluster_losses[0] - other.cluster_losses[0]).max() > 0.1


def test_hits_count_the_most_probable_code_and_cluster():
    # Code 0 is the most probable one, but cluster 1 (codes 2, 3) has more probability in sum.
    logits = jnp.log(jnp.array([[0.4, 0.05, 0.3, 0.25]]))
    found = reference(logits, jnp.array([0]), (2,))
    assert (found.token_hit[0], found.cluster_hits[0][0]) == (1.0, 0.0)
    found = reference(logits, jnp.array([3]), (2,))
    assert (found.token_hit[0], found.cluster_hits[0][0]) == (0.0, 1.0)


def test_large_logits_stay_finite():
    found = reference(jnp.array([[3e4, -3e4, 0.0, 1e4]]), jnp.array([1]), (2,))
    assert np.isfinite(np.asarray(found.token_loss)).all()
    np.testing.assert_allclose(found.cluster_losses[0], 0.0, atol=1e-6)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [((3,), "cluster_size 3 does not divide the vocabulary of 16"), ((2, 3), "are not nested: 2 does not divide 3")],
)
def test_sizes_that_do_not_divide_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        reference(jnp.zeros((1, 16)), jnp.zeros((1,), jnp.int32), sizes)


def test_metrics_are_named_by_the_size_of_coarser_clusters():
    found = reference(jnp.zeros((2, 16)), jnp.zeros((2,), jnp.int32), (2, 8))
    assert list(found.named((2, 8))) == [
        "token_loss",
        "cluster_loss",
        "cluster_loss_8",
        "token_accuracy",
        "cluster_accuracy",
        "cluster_accuracy_8",
    ]
