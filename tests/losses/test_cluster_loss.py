"""If these fail, the loss that is trained on is not the paper's, or differs from mesh to mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from iar_jax.losses.cluster_cross_entropy import token_and_cluster_loss
from iar_jax.losses.fused_head import fused_head_loss

from iar_jax.runtime import sharding


def plain_loss(hidden, head, targets, weight, cluster_size):
    """The same from logits that are all there."""
    losses = token_and_cluster_loss(hidden @ head, targets, cluster_size)
    return jnp.mean(losses.token_loss) + weight * jnp.mean(losses.cluster_loss), losses


def problem(seed, batch=8, length=12, dim=16, num_clusters=8, cluster_size=4, scale=1.0):
    rng = np.random.default_rng(seed)
    vocab = num_clusters * cluster_size
    hidden = jnp.asarray(rng.standard_normal((batch, length, dim)), jnp.float32)
    head = jnp.asarray(scale * rng.standard_normal((dim, vocab)), jnp.float32)
    return hidden, head, jnp.asarray(rng.integers(0, vocab, (batch, length)), jnp.int32)


def check(found, expected, scale=0.1):
    """Values and gradients to float32 rounding: sums over 32 logits, relative to the largest entry.

    Rounding grows with the logits: a probability's relative error is its logit's absolute one, 4e-5 at the logits of a
    few hundred that a scale of 30 makes.
    """
    (loss, losses), grads = found
    (expected_loss, expected_losses), expected_grads = expected
    np.testing.assert_allclose(loss, expected_loss, rtol=2e-6)
    for name, ours, theirs in zip(losses._fields, losses, expected_losses, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * max(1.0, 10 * scale), err_msg=name)
    for ours, theirs in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=3e-6 * max(1.0, scale) * np.abs(theirs).max())


@settings(deadline=None, max_examples=25)
@given(
    st.integers(0, 1000), st.sampled_from([1, 2, 3, 12]), st.sampled_from([(8, 4), (1, 6), (6, 1), (3, 5)]),
    st.floats(0.0, 2.0), st.sampled_from([0.1, 1.0, 30.0]),
)  # fmt: skip
def test_value_and_gradients_are_those_of_the_plain_form(seed, num_chunks, clusters, weight, scale):
    # At 30 most clusters are far below the float32 range of the highest logit's exponential.
    hidden, head, targets = problem(seed, 2, 12, 16, *clusters, scale)
    cluster_size = clusters[1]
    fused = jax.value_and_grad(
        lambda h, w: fused_head_loss(h, w, targets, weight, cluster_size, num_chunks), (0, 1), has_aux=True
    )
    plain = jax.value_and_grad(lambda h, w: plain_loss(h, w, targets, weight, cluster_size), (0, 1), has_aux=True)
    check(fused(hidden, head), plain(hidden, head), scale)


@pytest.mark.parametrize("mesh_sizes", [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)])
def test_every_mesh_gives_the_same(mesh_sizes):
    hidden, head, targets = problem(0)
    step = jax.value_and_grad(lambda h, w: fused_head_loss(h, w, targets, 0.7, 4, 3), (0, 1), has_aux=True)
    alone = step(hidden, head)
    with sharding.use_mesh(sharding.make_mesh(*mesh_sizes)):
        check(jax.jit(step)(hidden, head), alone)


def test_with_the_vocabulary_split_only_sums_and_maxima_cross_its_axis():
    hidden, head, targets = problem(0)
    mesh = sharding.make_mesh(1, 1, 8)
    with sharding.use_mesh(mesh):
        by_vocab = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "tensor"))
        step = jax.jit(
            jax.grad(lambda h, w: fused_head_loss(h, w, targets, 0.7, 4, 3), (0, 1), has_aux=True),
            in_shardings=(sharding.replicated(mesh), by_vocab),
            out_shardings=((sharding.replicated(mesh), by_vocab), None),
        )
        text = step.lower(hidden, head).compile().as_text()
    assert "all-reduce" in text
    assert not any(name in text for name in ("all-gather", "all-to-all", "collective-permute"))


def test_at_a_zero_head_ties_go_to_the_first_code_and_losses_to_the_logarithms():
    hidden, head, targets = problem(0)
    for mesh_sizes in (None, (1, 1, 8)):
        run = jax.jit(lambda: fused_head_loss(hidden, 0.0 * head, targets, 1.0, 4, 2)[1])
        if mesh_sizes is None:
            losses = run()
        else:
            with sharding.use_mesh(sharding.make_mesh(*mesh_sizes)):
                losses = run()
        np.testing.assert_allclose(losses.token_loss, np.log(32), rtol=1e-6)
        np.testing.assert_allclose(losses.cluster_loss, np.log(8), rtol=1e-6)
        np.testing.assert_array_equal(losses.token_hit, targets == 0)
        np.testing.assert_array_equal(losses.cluster_hit, targets // 4 == 0)


def test_temporary_memory_is_an_eighth_of_the_plain_form_at_16384_codes():
    hidden = jax.ShapeDtypeStruct((32, 256, 768), jnp.float32)
    head = jax.ShapeDtypeStruct((768, 16384), jnp.float32)
    targets = jax.ShapeDtypeStruct((32, 256), jnp.int32)

    def temporaries(loss):
        def step(h, w, y):
            return jax.grad(lambda *args: loss(*args, y)[0], (0, 1))(h, w)

        return jax.jit(step).lower(hidden, head, targets).compile().memory_analysis().temp_size_in_bytes

    fused = temporaries(lambda h, w, y: fused_head_loss(h, w, y, 1.0, 128, 32))
    plain = temporaries(lambda h, w, y: plain_loss(h, w, y, 1.0, 128))
    assert fused <= plain / 8


@pytest.mark.parametrize(
    ("cluster_size", "num_chunks", "message"),
    [(5, 1, "cluster_size 5 does not divide the vocabulary of 32"), (4, 5, "num_chunks 5 does not divide the 12")],
)
def test_what_does_not_divide_is_refused(cluster_size, num_chunks, message):
    hidden, head, targets = problem(0)
    with pytest.raises(ValueError, match=message):
        fused_head_loss(hidden, head, targets, 1.0, cluster_size, num_chunks)
