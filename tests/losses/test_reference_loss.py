"""If these fail, the loss that the project exists for is wrong."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from iar_jax.losses.cluster_cross_entropy import reference_loss, token_and_cluster_loss


def float64_losses(logits, targets, cluster_size):
    """Both losses by probabilities, in float64 numpy: -log p_y and -log of the cluster's summed probability."""
    logits = np.asarray(logits, np.float64)
    p = np.exp(logits - logits.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    cluster_p = p.reshape(*p.shape[:-1], -1, cluster_size).sum(axis=-1)
    pick = lambda table, ids: np.take_along_axis(table, ids[..., None], axis=-1)[..., 0]  # noqa: E731
    return -np.log(pick(p, targets)), -np.log(pick(cluster_p, targets // cluster_size))


@st.composite
def problems(draw):
    # A few shapes, each of which is compiled once.
    num_clusters, cluster_size, rows = draw(
        st.sampled_from([(1, 1, 1), (1, 9, 4), (9, 1, 4), (3, 5, 4), (8, 4, 4), (2, 2, 1), (9, 9, 5)])
    )
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    scale = draw(st.sampled_from([0.01, 1.0, 10.0]))
    logits = (scale * rng.standard_normal((rows, num_clusters * cluster_size))).astype(np.float32)
    return logits, rng.integers(0, num_clusters * cluster_size, rows).astype(np.int32), cluster_size


@settings(deadline=None, max_examples=60)
@given(problems())
def test_both_forms_equal_float64(problem):
    logits, targets, cluster_size = problem
    token, cluster = float64_losses(logits, targets, cluster_size)
    found = token_and_cluster_loss(jnp.asarray(logits), jnp.asarray(targets), cluster_size)
    # float32 logsumexp of magnitudes up to 50: a few units in the last place of 50 are 2e-5.
    np.testing.assert_allclose(found.token_loss, token, atol=3e-5)
    np.testing.assert_allclose(found.cluster_loss, cluster, atol=3e-5)
    reference = reference_loss(jnp.asarray(logits), jnp.asarray(targets), cluster_size)
    np.testing.assert_allclose(reference[0], token, atol=3e-5)
    np.testing.assert_allclose(reference[1], cluster, atol=3e-5)
    assert (np.asarray(found.cluster_loss) >= -1e-5).all()
    assert (np.asarray(found.cluster_loss) <= np.asarray(found.token_loss) + 1e-5).all()


@settings(deadline=None, max_examples=30)
@given(problems(), st.floats(0.0, 3.0))
def test_gradient_is_the_analytic_one(problem, weight):
    logits, targets, cluster_size = problem

    def total(y):
        losses = token_and_cluster_loss(y, jnp.asarray(targets), cluster_size)
        return jnp.sum(losses.token_loss + weight * losses.cluster_loss)

    y = np.asarray(logits, np.float64)
    p = np.exp(y - y.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    ids = np.arange(y.shape[-1])
    in_cluster = ids[None] // cluster_size == targets[:, None] // cluster_size
    cluster_p = (p * in_cluster).sum(axis=-1, keepdims=True)
    expected = (1 + weight) * p - (ids[None] == targets[:, None]) - weight * in_cluster * p / cluster_p
    # Entries are at most 1 + weight = 4 in size; float32 softmax is good to a few 1e-7 of that.
    np.testing.assert_allclose(jax.grad(total)(jnp.asarray(logits)), expected, atol=1e-5)


def test_a_zero_head_gives_the_logarithms_of_the_counts():
    found = token_and_cluster_loss(jnp.zeros((2, 3, 16384)), jnp.zeros((2, 3), jnp.int32), 128)
    np.testing.assert_allclose(found.token_loss, 9.704061, atol=1e-5)
    np.testing.assert_allclose(found.cluster_loss, 4.852030, atol=1e-5)


def test_permuting_inside_clusters_and_whole_clusters_changes_nothing():
    rng = np.random.default_rng(0)
    clusters, size = 8, 4
    logits = rng.standard_normal((6, clusters * size)).astype(np.float32)
    targets = rng.integers(0, clusters * size, 6)
    order = np.concatenate([c * size + rng.permutation(size) for c in rng.permutation(clusters)])
    new_id = np.argsort(order)
    before = token_and_cluster_loss(jnp.asarray(logits), jnp.asarray(targets), size)
    after = token_and_cluster_loss(jnp.asarray(logits[:, order]), jnp.asarray(new_id[targets]), size)
    for a, b in zip(before, after, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    # Another partition is another cluster loss, and the same token loss.
    mixed = rng.permutation(clusters * size)
    other = token_and_cluster_loss(jnp.asarray(logits[:, mixed]), jnp.asarray(np.argsort(mixed)[targets]), size)
    np.testing.assert_allclose(before.token_loss, other.token_loss, atol=1e-6)
    assert np.abs(before.cluster_loss - other.cluster_loss).max() > 0.1


def test_hits_count_the_most_probable_code_and_cluster():
    # Code 0 is the most probable one, but cluster 1 (codes 2, 3) has more probability in sum.
    logits = jnp.log(jnp.array([[0.4, 0.05, 0.3, 0.25]]))
    found = token_and_cluster_loss(logits, jnp.array([0]), 2)
    assert found.token_hit[0] == 1.0
    assert found.cluster_hit[0] == 0.0
    found = token_and_cluster_loss(logits, jnp.array([3]), 2)
    assert found.token_hit[0] == 0.0
    assert found.cluster_hit[0] == 1.0


def test_large_logits_stay_finite():
    found = token_and_cluster_loss(jnp.array([[3e4, -3e4, 0.0, 1e4]]), jnp.array([1]), 2)
    assert np.isfinite(np.asarray(found.token_loss)).all()
    np.testing.assert_allclose(found.cluster_loss, 0.0, atol=1e-6)


def test_a_cluster_size_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match=r"cluster_size 3 does not divide the vocabulary of 16"):
        token_and_cluster_loss(jnp.zeros((1, 16)), jnp.zeros((1,), jnp.int32), 3)
