"""If these fail, training on a mesh is another computation than on one device, or resumes into another."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iar_jax.generators.autoregressive.transformer import Transformer
from iar_jax.runtime import sharding
from iar_jax.training.generator_steps import init_train_state, make_eval_step, make_train_step
from iar_jax.training.optimizer import cluster_weight_schedule, decay_mask, learning_rate_schedule, make_optimizer
from iar_jax.training.state import update_ema

LABELS = np.arange(8, dtype=np.int32) % 10
CODES = np.random.default_rng(0).integers(0, 64, (8, 16)).astype(np.int32)


def pieces(step_options=None, **fields):
    model = Transformer(64, 10, 4, 32, 2, 8, 64, **{"init_std": 0.2, "ffn_dropout_rate": 0.1, **fields})
    optimizer = make_optimizer(1e-2, b1=0.9, b2=0.95, weight_decay=0.05, clip_norm=1.0)
    options = {"cluster_size": 8, "cluster_weight": 1.0, "ema_decay": 0.9, "loss_chunks": 2, **(step_options or {})}
    return model, optimizer, make_train_step(model, optimizer, key=jax.random.key(5), **options)


def run(shape, num_steps=2, step_options=None, **fields):
    mesh = sharding.make_mesh(*shape) if shape else None
    model, optimizer, step = pieces(step_options, **fields)
    if mesh is None:  # one device
        mesh = jax.make_mesh(
            (1, 1, 1), sharding.MESH_AXES, devices=jax.devices()[:1], axis_types=(jax.sharding.AxisType.Auto,) * 3
        )
    with sharding.use_mesh(mesh):
        state, shardings = sharding.initialise_sharded(
            lambda key: init_train_state(key, model, optimizer), mesh, jax.random.key(0)
        )
        compiled = jax.jit(step, out_shardings=(shardings, sharding.replicated(mesh)))
        batch = sharding.global_batch(mesh, {"labels": LABELS, "codes": CODES})
        history = []
        for _ in range(num_steps):
            state, metrics = compiled(state, batch["labels"], batch["codes"])
            history.append(jax.device_get(metrics))
        return jax.device_get(state), history


@pytest.fixture(scope="module")
def one_device():
    return run(None)


@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)])
def test_two_steps_on_a_mesh_equal_those_on_one_device(one_device, shape):
    expected, expected_history = one_device
    state, history = run(shape)
    for found, wanted in zip(history, expected_history, strict=True):
        for name in wanted:
            np.testing.assert_allclose(found[name], wanted[name], rtol=2e-5, atol=1e-6, err_msg=name)
    # Adam divides by the gradient's size: where that is rounding, a step of 1e-2 keeps few digits. Nearly all keep all.
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.params):
        wanted = expected.params
        for entry in path:
            wanted = wanted[entry.key]
        difference = np.abs(leaf - wanted)
        assert np.quantile(difference, 0.99) < 1e-5, path


@pytest.mark.parametrize("shape", [None, (2, 2, 2)])
def test_accumulated_parts_equal_the_whole_batch(shape):
    # Without dropout, which each part draws for itself.
    (expected, wanted), (state, found) = (
        run(shape, step_options={"accumulation": count}, ffn_dropout_rate=0.0) for count in (1, 2)
    )
    for ours, theirs in zip(found, wanted, strict=True):
        for name in theirs:
            np.testing.assert_allclose(ours[name], theirs[name], rtol=2e-5, atol=1e-6, err_msg=name)
    for ours, theirs in zip(jax.tree.leaves(state.params), jax.tree.leaves(expected.params), strict=True):
        assert np.quantile(np.abs(ours - theirs), 0.99) < 1e-5


def test_the_cluster_loss_costs_at_most_a_hundredth():
    def cost(weight):
        model, optimizer, step = pieces({"cluster_weight": weight, "loss_chunks": 1})
        init = functools.partial(init_train_state, model=model, optimizer=optimizer)
        state = jax.eval_shape(lambda key: sharding.unbox(init(key)), jax.random.key(0))
        found = jax.jit(step).lower(state, LABELS, CODES).compile().cost_analysis()
        return found["flops"], found["bytes accessed"]

    for with_clusters, without in zip(cost(1.0), cost(0.0), strict=True):
        assert with_clusters <= 1.01 * without


def test_lambda_follows_its_schedule():
    linear = cluster_weight_schedule("linear", 1.0, 0.0, 100)
    np.testing.assert_allclose([linear(0), linear(50), linear(100)], [1.0, 0.5, 0.0])
    cosine = cluster_weight_schedule("cosine", 2.0, 1.0, 100)
    np.testing.assert_allclose([cosine(0), cosine(50), cosine(100)], [2.0, 1.5, 1.0], atol=1e-6)
    constant = cluster_weight_schedule("constant", 0.7, 0.0, 100)
    np.testing.assert_allclose([constant(0), constant(99)], [0.7, 0.7])
    _, history = run(None, 3, {"cluster_weight": cluster_weight_schedule("linear", 1.0, 0.0, 2)})
    for found, weight in zip(history, (1.0, 0.5, 0.0), strict=True):
        np.testing.assert_allclose(found["loss"], found["token_loss"] + weight * found["cluster_loss"], rtol=1e-6)


def test_the_first_loss_is_that_of_a_zero_head(one_device):
    _, history = one_device
    np.testing.assert_allclose(history[0]["token_loss"], np.log(64), rtol=1e-6)
    np.testing.assert_allclose(history[0]["cluster_loss"], np.log(8), rtol=1e-6)
    np.testing.assert_allclose(history[0]["loss"], np.log(64) + np.log(8), rtol=1e-6)


def test_randomness_is_a_function_of_the_step():
    model, optimizer, step = pieces()
    step = jax.jit(step)
    state = jax.jit(lambda key: sharding.unbox(init_train_state(key, model, optimizer)))(jax.random.key(0))
    state, _ = step(state, LABELS, CODES)  # the head is no longer zero
    again = [step(state, LABELS, CODES)[1]["loss"] for _ in range(2)]
    assert again[0] == again[1]
    later = step(dataclasses.replace(state, step=state.step + 1), LABELS, CODES)[1]["loss"]
    assert later != again[0]


def test_training_learns_and_lambda_matters():
    losses = {}
    for weight in (0.0, 1.0):
        model, optimizer, _ = pieces()
        step = jax.jit(
            make_train_step(
                model, optimizer, cluster_size=8, cluster_weight=weight, ema_decay=0.9, key=jax.random.key(5)
            )
        )
        state = jax.jit(lambda key, m=model, o=optimizer: sharding.unbox(init_train_state(key, m, o)))(
            jax.random.key(0)
        )
        for _ in range(30):
            state, metrics = step(state, LABELS, CODES)
        losses[weight] = {name: float(value) for name, value in metrics.items()}
    assert losses[1.0]["token_loss"] < 2.5  # of ln 64 = 4.16 at the start
    assert losses[0.0]["loss"] == losses[0.0]["token_loss"]
    assert losses[1.0]["cluster_loss"] < losses[0.0]["cluster_loss"]


def test_evaluation_has_no_dropout_and_leaves_the_filling_out():
    model, optimizer, _ = pieces(class_dropout_rate=0.5)
    state = jax.jit(lambda key: sharding.unbox(init_train_state(key, model, optimizer)))(jax.random.key(0))
    params = state.params | {"head": jax.random.normal(jax.random.key(1), state.params["head"].shape)}
    evaluate = jax.jit(make_eval_step(model, cluster_size=8))
    whole = evaluate(params, LABELS, CODES, np.ones(8, bool))
    again = evaluate(params, LABELS, CODES, np.ones(8, bool))
    assert whole["token_loss"] == again["token_loss"]
    first = evaluate(params, LABELS, CODES, np.arange(8) < 3)
    rest = evaluate(params, LABELS, CODES, np.arange(8) >= 3)
    assert (first["count"], rest["count"]) == (3, 5)
    np.testing.assert_allclose(first["token_loss"] + rest["token_loss"], whole["token_loss"], rtol=1e-5)


def test_weight_decay_acts_on_matrices_alone():
    model, _, _ = pieces()
    params = jax.eval_shape(
        lambda: sharding.unbox(model.init(jax.random.key(0), jnp.zeros((1,), jnp.int32), jnp.zeros((1, 16), jnp.int32)))
    )["params"]
    mask = decay_mask(params)
    assert mask["token_table"] is True
    assert mask["head"] is True
    assert mask["layers"]["attention"]["wqkv"] is True
    # Stacked over layers a norm's weight has two dimensions, but a layer's own has one.
    assert mask["layers"]["attention_norm"]["weight"] is False
    assert mask["norm"]["weight"] is False


def test_schedules():
    cosine = learning_rate_schedule("cosine", 2.0, 10, 110)
    np.testing.assert_allclose([cosine(0), cosine(5), cosine(10), cosine(60), cosine(110)], [0, 1, 2, 1, 0], atol=1e-6)
    constant = learning_rate_schedule("constant", 2.0, 0, 100)
    assert constant(0) == constant(99) == 2.0


def test_the_average_starts_near_the_newest_weights_and_ends_at_its_decay():
    early = update_ema(jnp.float32(0.0), jnp.float32(1.0), 0.99, jnp.int32(0))
    np.testing.assert_allclose(early, 0.9, rtol=1e-6)
    late = update_ema(jnp.float32(0.0), jnp.float32(1.0), 0.99, jnp.int32(10**6))
    np.testing.assert_allclose(late, 0.01, rtol=1e-5)
