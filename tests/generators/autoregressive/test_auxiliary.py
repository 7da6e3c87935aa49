"""If these fail, hidden states are held to something else than reAR's vectors or Mirai's states to come, or what
training alone needs gets into what is sampled from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iar_jax.generators.autoregressive import auxiliary
from iar_jax.generators.autoregressive.generator import Autoregressive
from iar_jax.generators.autoregressive.transformer import Transformer
from iar_jax.generators.settings import AUXILIARY, Objective, Weights
from iar_jax.runtime import sharding
from iar_jax.training.generator_steps import lasting

SIDE, VOCAB, DIM = 4, 64, 32
VECTORS = np.random.default_rng(2).standard_normal((VOCAB, 5)).astype(np.float32)
VECTORS /= np.linalg.norm(VECTORS, axis=1, keepdims=True)
LABELS = jnp.arange(6) % 3
CODES = jnp.asarray(np.random.default_rng(0).integers(0, VOCAB, (6, SIDE**2)), jnp.int32)
CONTEXT = jnp.asarray(np.random.default_rng(1).integers(0, VOCAB, (6, SIDE**2)), jnp.int32)
BATCH = {"label": LABELS, "codes": CODES, "context": CONTEXT}
WEIGHTS = Weights(jnp.array([0.0]), jnp.float32(2.0))


def built(regression=0.0, lookahead=0.0, num_layers=8, **fields):
    network = Transformer(VOCAB, 3, SIDE, DIM, num_layers, 4, 64, init_std=0.2, **fields)
    objective = Objective((8,), regression_weight=regression, lookahead_weight=lookahead, vectors=VECTORS)
    generator = Autoregressive(network, objective)
    params = sharding.unbox(generator.init(jax.random.key(0)))
    # The head starts at zero.
    return generator, params | {"head": 0.1 * jax.random.normal(jax.random.key(1), params["head"].shape)}


def test_layers_in_parts_are_the_layers():
    generator, params = built()
    network = generator.network
    embedded, kept, hidden = auxiliary.states_at(network, params, LABELS, CODES, (2, 5))
    whole = network.apply({"params": params}, LABELS, CODES, method="hidden")
    np.testing.assert_allclose(hidden, whole, atol=1e-6)
    np.testing.assert_allclose(embedded, network.apply({"params": params}, LABELS, CODES, method="embedded"), atol=0)
    for depth, states in zip((2, 5), kept, strict=True):
        np.testing.assert_allclose(states, auxiliary.teacher_states(network, params, LABELS, CODES, depth), atol=1e-6)


def test_parts_draw_other_dropouts():
    generator, params = built(residual_dropout_rate=0.5, num_layers=2)
    layers = jax.tree.map(lambda x: jnp.stack([x[0], x[0]]), params["layers"])
    same = params | {"layers": layers}
    states = jnp.ones((1, SIDE**2, DIM))
    key = jax.random.key(0)
    first = auxiliary._through(generator.network, same, states, 0, 1, key)
    second = auxiliary._through(generator.network, same, states, 1, 2, key)
    assert not np.allclose(first, second)


def cosine(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return 1.0 - (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


def head(params, name, states):
    weights = jax.tree.map(lambda x: np.asarray(x, np.float64), params[AUXILIARY][name])
    hidden = np.asarray(states, np.float64) @ weights["first"]
    return (hidden / (1.0 + np.exp(-hidden))) @ weights["second"]


def test_losses_are_their_definitions_in_float64():
    generator, params = built(regression=0.5, lookahead=2.0)
    teacher = jax.tree.map(lambda x: 1.1 * x, lasting(params))
    loss, metrics = generator.loss(params, BATCH, jax.random.key(3), WEIGHTS, teacher)
    network = generator.network
    # Two thirds and three quarters of eight layers; no dropout is on, so the key does not matter.
    embedded, (five, six), _ = auxiliary.states_at(network, params, LABELS, CONTEXT, (5, 6))
    wanted = VECTORS[np.asarray(CODES)]
    regression = cosine(head(params, "this", embedded[:, 1:]), wanted[:, :-1]).mean()
    regression += cosine(head(params, "next", six), wanted).mean()
    np.testing.assert_allclose(metrics["regression_loss"], regression, rtol=1e-5)
    # The averaged model reads the true codes.
    goal = np.asarray(auxiliary.teacher_states(network, teacher, LABELS, CODES, 5)).reshape(6, SIDE, SIDE, DIM)
    distances = []
    for i, (down, right) in enumerate([(0, 0), (0, 1), (1, 0)]):
        ours = head(params, f"cell{i}", five).reshape(6, SIDE, SIDE, DIM)
        for row in range(SIDE - down):
            for column in range(SIDE - right):
                distances.append(cosine(ours[:, row, column], goal[:, row + down, column + right]))
    np.testing.assert_allclose(metrics["lookahead_loss"], np.mean(distances), rtol=1e-5)
    plain = Autoregressive(network, Objective((8,)))
    alone, _ = plain.loss(lasting(params), BATCH, jax.random.key(3), Weights(jnp.array([0.0])))
    np.testing.assert_allclose(loss, alone + 0.5 * regression + 2.0 * np.mean(distances), rtol=1e-5)


def test_targets_are_the_true_codes_and_inputs_are_not():
    generator, params = built()
    noisy, _ = generator.loss(params, BATCH, jax.random.key(0), WEIGHTS)
    logits = generator.network.apply({"params": params}, LABELS, CONTEXT)
    expected = -np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), np.asarray(CODES)[..., None], -1).mean()
    np.testing.assert_allclose(noisy, expected, rtol=1e-5)


def test_the_averaged_model_gets_no_gradient_and_has_no_heads():
    generator, params = built(lookahead=2.0)
    teacher = lasting(params)
    assert AUXILIARY in params
    assert AUXILIARY not in teacher
    gradient = jax.grad(lambda t: generator.loss(params, BATCH, jax.random.key(0), WEIGHTS, t)[0])(teacher)
    assert all(np.all(np.asarray(leaf) == 0.0) for leaf in jax.tree.leaves(gradient))
    # Validation works without heads.
    assert set(generator.score(teacher, {"label": LABELS, "codes": CODES})) >= {"token_loss", "cluster_loss"}


@pytest.mark.parametrize(
    ("depth", "num_layers", "layers"), [(2 / 3, 12, 8), (3 / 4, 20, 15), (3 / 4, 24, 18), (2 / 3, 2, 1)]
)
def test_depths_are_the_published_ones(depth, num_layers, layers):
    assert auxiliary.layers_at(depth, num_layers) == layers
