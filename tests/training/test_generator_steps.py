"""If these fail, training on a mesh is another computation than on one device, or resumes into another."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iar_jax.codebook.neighbours import near_codes
from iar_jax.generators.autoregressive.generator import Autoregressive
from iar_jax.generators.autoregressive.transformer import Transformer
from iar_jax.generators.settings import Objective
from iar_jax.losses.neighbours import Neighbours
from iar_jax.runtime import sharding
from iar_jax.training.context_noise import noise_of
from iar_jax.training.generator_steps import init_train_state, make_eval_step, make_train_step
from iar_jax.training.optimizer import make_optimizer
from iar_jax.training.schedules import WEIGHT_SCHEDULES
from iar_jax.training.state import update_ema

LABELS = np.arange(8, dtype=np.int32) % 10
CODES = np.random.default_rng(0).integers(0, 64, (8, 16)).astype(np.int32)
BATCH = {"label": LABELS, "codes": CODES}


def pieces(step_options=None, cluster_sizes=(8,), loss_chunks=2, objective=None, **fields):
    defaults = {"num_layers": 2, "init_std": 0.2, "ffn_dropout_rate": 0.1}
    network = Transformer(64, 10, 4, 32, num_heads=8, hidden_dim=64, **{**defaults, **fields})
    generator = Autoregressive(network, objective or Objective(cluster_sizes, loss_chunks))
    optimizer = make_optimizer(1e-2, b1=0.9, b2=0.95, weight_decay=0.05, clip_norm=1.0, decays=generator.decays)
    options = {"cluster_weights": (1.0,) * len(cluster_sizes), "ema_decay": 0.9, **(step_options or {})}
    return generator, optimizer, make_train_step(generator, optimizer, key=jax.random.key(5), **options)


def run(shape, num_steps=2, step_options=None, **fields):
    mesh = sharding.make_mesh(*shape) if shape else None
    generator, optimizer, step = pieces(step_options, **fields)
    if mesh is None:  # one device
        mesh = jax.make_mesh(
            (1, 1, 1), sharding.MESH_AXES, devices=jax.devices()[:1], axis_types=(jax.sharding.AxisType.Auto,) * 3
        )
    with sharding.use_mesh(mesh):
        state, shardings = sharding.initialise_sharded(
            lambda key: init_train_state(key, generator, optimizer), mesh, jax.random.key(0)
        )
        compiled = jax.jit(step, out_shardings=(shardings, sharding.replicated(mesh)))
        batch = sharding.global_batch(mesh, BATCH)
        history = []
        for _ in range(num_steps):
            state, metrics = compiled(state, batch)
            history.append(jax.device_get(metrics))
        return jax.device_get(state), history


@pytest.fixture(scope="module")
def one_device():
    return run(None)


@pytest.mark.parametrize(
    "shape", [(2, 2, 2), *(pytest.param(shape, marks=pytest.mark.slow) for shape in [(8, 1, 1), (1, 8, 1), (1, 1, 8)])]
)
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


def all_variants():
    """An objective with all that can be added to the loss, unequal clusters, and options of a step with noise."""
    vectors = np.random.default_rng(3).standard_normal((64, 8)).astype(np.float32)
    objective = Objective(
        ((0, 3, 10, 41, 64),),
        neighbour_weight=0.3,
        regression_weight=0.5,
        lookahead_weight=2.0,
        vectors=vectors,
        neighbours=Neighbours(*near_codes(vectors, 5)),
    )
    section = {"context_noise": 1.0, "context_noise_end": 1.0, "num_steps": 4, "context_noise_draw": "neighbours"}
    options = {"lookahead_weight": lambda step: 2.0 - step, "noise": noise_of(section, objective, 64)}
    return {"objective": objective, "step_options": {"cluster_weights": (1.0,), **options}, "num_layers": 3}


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2)])
def test_all_variants_on_a_mesh_equal_those_on_one_device(shape):
    expected, expected_history = run(None, **all_variants())
    state, history = run(shape, **all_variants())
    assert {"neighbour_loss", "regression_loss", "lookahead_loss"} < history[0].keys()
    for found, wanted in zip(history, expected_history, strict=True):
        for name in wanted:
            np.testing.assert_allclose(found[name], wanted[name], rtol=3e-5, atol=1e-6, err_msg=name)
    parts = [
        found[f"{name}_loss"] * weight
        for found, lookahead in zip(history, (2.0, 1.0), strict=True)
        for name, weight in {
            "token": 1,
            "cluster": 1,
            "neighbour": 0.3,
            "regression": 0.5,
            "lookahead": lookahead,
        }.items()
    ]
    np.testing.assert_allclose(sum(parts), sum(found["loss"] for found in history), rtol=1e-5)
    for ours, theirs in zip(jax.tree.leaves(state.params), jax.tree.leaves(expected.params), strict=True):
        assert np.quantile(np.abs(ours - theirs), 0.99) < 1e-5
    assert "auxiliary" in state.params
    assert "auxiliary" not in state.ema_params


@pytest.mark.slow
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


@pytest.mark.parametrize(("sizes", "share"), [((128,), 0.01), ((32, 128, 512), 0.02)])
def test_lambda_costs_at_most_a_hundredth_and_three_levels_two(sizes, share):
    # At LlamaGen's width and codebook, two layers deep: the head's share of a step is larger than in any of its models.
    network = Transformer(16384, 1000, 16, 768, 2, 12, 2048, scan_unroll=2)
    batch = {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name, shape in (("label", (4,)), ("codes", (4, 256)))}

    def cost(sizes, weights):
        generator = Autoregressive(network, Objective(sizes))
        optimizer = make_optimizer(1e-4, b1=0.9, b2=0.95, weight_decay=0.05, clip_norm=1.0, decays=generator.decays)
        step = make_train_step(generator, optimizer, cluster_weights=weights, ema_decay=0.9, key=jax.random.key(0))
        init = functools.partial(init_train_state, generator=generator, optimizer=optimizer)
        state = jax.eval_shape(lambda key: sharding.unbox(init(key)), jax.random.key(0))
        found = jax.jit(step).lower(state, batch).compile().cost_analysis()
        return found["flops"], found["bytes accessed"]

    for with_clusters, without in zip(cost(sizes, (1.0,) * len(sizes)), cost((128,), (0.0,)), strict=True):
        assert with_clusters <= (1 + share) * without


def test_lambda_follows_its_schedule():
    weights = [WEIGHT_SCHEDULES["linear"](1.0, 0.0, 2), WEIGHT_SCHEDULES["cosine"](0.0, 1.0, 2)]
    _, history = run(None, 3, {"cluster_weights": weights}, cluster_sizes=(4, 16))
    for found, first, second in zip(history, (1.0, 0.5, 0.0), (0.0, 0.5, 1.0), strict=True):
        expected = found["token_loss"] + first * found["cluster_loss"] + second * found["cluster_loss_16"]
        np.testing.assert_allclose(found["loss"], expected, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 1, 4), (2, 2, 2)])
def test_levels_on_a_mesh_equal_those_on_one_device(shape):
    options = {"cluster_sizes": (2, 8, 16), "step_options": {"cluster_weights": (1.0, 0.5, 0.25)}}
    (_, expected), (_, found) = run(None, **options), run(shape if np.prod(shape) == 8 else (2, 1, 4), **options)
    for ours, theirs in zip(found, expected, strict=True):
        assert {"cluster_loss", "cluster_loss_8", "cluster_loss_16", "cluster_accuracy_16"} <= ours.keys()
        for name in theirs:
            np.testing.assert_allclose(ours[name], theirs[name], rtol=2e-5, atol=1e-6, err_msg=name)


def test_the_first_loss_is_that_of_a_zero_head(one_device):
    _, history = one_device
    np.testing.assert_allclose(history[0]["token_loss"], np.log(64), rtol=1e-6)
    np.testing.assert_allclose(history[0]["cluster_loss"], np.log(8), rtol=1e-6)
    np.testing.assert_allclose(history[0]["loss"], np.log(64) + np.log(8), rtol=1e-6)


def fresh(generator, optimizer):
    return jax.jit(lambda key: sharding.unbox(init_train_state(key, generator, optimizer)))(jax.random.key(0))


def test_randomness_is_a_function_of_the_step():
    generator, optimizer, step = pieces()
    step = jax.jit(step)
    state, _ = step(fresh(generator, optimizer), BATCH)  # the head is no longer zero
    again = [step(state, BATCH)[1]["loss"] for _ in range(2)]
    assert again[0] == again[1]
    later = step(dataclasses.replace(state, step=state.step + 1), BATCH)[1]["loss"]
    assert later != again[0]


def test_training_learns_and_lambda_matters():
    losses = {}
    for weight in (0.0, 1.0):
        generator, optimizer, step = pieces({"cluster_weights": (weight,)}, loss_chunks=1)
        step, state = jax.jit(step), fresh(generator, optimizer)
        for _ in range(30):
            state, metrics = step(state, BATCH)
        losses[weight] = {name: float(value) for name, value in metrics.items()}
    assert losses[1.0]["token_loss"] < 2.5  # of ln 64 = 4.16 at the start
    assert losses[0.0]["loss"] == losses[0.0]["token_loss"]
    assert losses[1.0]["cluster_loss"] < losses[0.0]["cluster_loss"]


def test_evaluation_has_no_dropout_and_leaves_the_filling_out():
    generator, optimizer, _ = pieces(class_dropout_rate=0.5)
    state = fresh(generator, optimizer)
    params = state.params | {"head": jax.random.normal(jax.random.key(1), state.params["head"].shape)}
    evaluate = jax.jit(make_eval_step(generator))
    whole = evaluate(params, BATCH, np.ones(8, bool))
    again = evaluate(params, BATCH, np.ones(8, bool))
    assert whole["token_loss"] == again["token_loss"]
    first = evaluate(params, BATCH, np.arange(8) < 3)
    rest = evaluate(params, BATCH, np.arange(8) >= 3)
    assert (first["count"], rest["count"]) == (3, 5)
    np.testing.assert_allclose(first["token_loss"] + rest["token_loss"], whole["token_loss"], rtol=1e-5)


def test_weight_decay_acts_on_matrices_alone():
    generator, _, _ = pieces()
    mask = generator.decays(jax.eval_shape(lambda: sharding.unbox(generator.init(jax.random.key(0)))))
    assert mask["token_table"] is True
    assert mask["head"] is True
    assert mask["layers"]["attention"]["wqkv"] is True
    # Stacked over layers a norm's weight has two dimensions, but a layer's own has one.
    assert mask["layers"]["attention_norm"]["weight"] is False
    assert mask["norm"]["weight"] is False


@pytest.mark.slow
def test_a_grouped_model_learns_on_a_mesh_as_on_one_device():
    (_, expected), (_, found) = run(None, num_kv_heads=2), run((2, 2, 2), num_kv_heads=2)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours["loss"], theirs["loss"], rtol=2e-5)


def test_the_average_starts_near_the_newest_weights_and_ends_at_its_decay():
    early = update_ema(jnp.float32(0.0), jnp.float32(1.0), 0.99, jnp.int32(0))
    np.testing.assert_allclose(early, 0.9, rtol=1e-6)
    late = update_ema(jnp.float32(0.0), jnp.float32(1.0), 0.99, jnp.int32(10**6))
    np.testing.assert_allclose(late, 0.01, rtol=1e-5)
