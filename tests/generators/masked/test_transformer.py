"""If these fail, the network is not Halton-MaskGIT's, or its predictions depend on what they must not."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from iar_jax.generators.masked.generator import Masked
from iar_jax.generators.masked.transformer import MaskedTransformer
from iar_jax.generators.settings import Objective, Weights
from iar_jax.interop import maskgit
from iar_jax.runtime import sharding


@pytest.fixture(scope="module")
def published(golden):
    module, params = maskgit.load_generator(golden("maskgit_halton_tiny.pt"), num_heads=4, grid_size=4)
    arrays = dict(np.load(golden("maskgit_halton_tiny.npz")))
    arrays |= {name: arrays[name].reshape(3, 16) for name in ("codes", "mask", "masked_codes")}
    return module, jax.tree.map(jnp.asarray, params), arrays | {"labels": arrays["labels"].astype(np.int32)}


def small(**fields):
    return MaskedTransformer(
        **{
            "vocab_size": 32,
            "num_classes": 5,
            "grid_size": 4,
            "dim": 32,
            "num_layers": 2,
            "num_heads": 4,
            "hidden_dim": 64,
            **fields,
        }
    )


def initial(module, seed=0):
    """Random parameters, also where fresh ones are zero."""
    codes = jnp.zeros((1, module.num_tokens), jnp.int32)
    params = sharding.unbox(module.init(jax.random.key(seed), jnp.zeros((1,), jnp.int32), codes))["params"]
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    noisy = [leaf + 0.1 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(structure, noisy)


def test_logits_are_the_published_network_s(published):
    module, params, arrays = published
    apply = jax.jit(lambda labels: module.apply({"params": params}, labels, arrays["masked_codes"]))
    np.testing.assert_allclose(apply(arrays["labels"]), arrays["logits"], atol=2e-5)
    np.testing.assert_allclose(apply(np.full(3, module.null_class)), arrays["logits_uncond"], atol=2e-5)


def test_loss_and_gradients_at_weight_zero_are_the_published_objective_s(published):
    module, params, arrays = published
    generator = Masked(module, Objective((8,)))
    batch = {"codes": jnp.asarray(arrays["codes"]), "label": jnp.asarray(arrays["labels"])}

    def loss(params):
        return generator._losses(params, batch, jnp.asarray(arrays["mask"]), jnp.zeros(1), {})[0]

    value, grads = jax.value_and_grad(loss)(params)
    np.testing.assert_allclose(value, arrays["loss_all_tokens"], rtol=1e-5)
    np.testing.assert_allclose(optax.global_norm(grads), arrays["grad_norm"], rtol=1e-4)
    table = np.concatenate([grads["token_table"], grads["mask_vector"]])
    for ours, theirs in ((table, arrays["grad_tok_emb"]), (grads["register_table"], arrays["grad_reg"])):
        np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max())


@pytest.mark.parametrize("mask_output", [False, True])
def test_a_position_sees_all_others_and_the_label(mask_output):
    module = small(mask_output=mask_output)
    params = initial(module)
    rng = np.random.default_rng(0)
    codes, labels = rng.integers(0, 32, (2, 16)), np.array([1, 4])
    codes[:, 3] = module.mask
    apply = jax.jit(lambda labels, codes: module.apply({"params": params}, labels, codes))
    logits = apply(labels, codes)
    assert logits.shape == (2, 16, 32 + mask_output)
    for place in (0, 15):
        other = codes.copy()
        other[:, place] = (other[:, place] + 1) % 32
        assert np.all(np.abs(apply(labels, other) - logits)[:, 3].max(axis=-1) > 1e-4)
    assert np.all(np.abs(apply(labels[::-1].copy(), codes) - logits).max(axis=(1, 2)) > 1e-4)


def test_a_fresh_network_begins_with_layers_that_do_nothing():
    module = small()
    params = sharding.unbox(module.init(jax.random.key(0), jnp.zeros((1,), jnp.int32), jnp.zeros((1, 16), jnp.int32)))
    deeper = small(num_layers=1)
    codes = np.random.default_rng(0).integers(0, 33, (2, 16))
    shallow = jax.tree.map(lambda leaf: leaf, params)
    shallow["params"]["layers"] = jax.tree.map(lambda leaf: leaf[:1], params["params"]["layers"])
    labels = np.zeros(2, np.int32)
    np.testing.assert_array_equal(module.apply(params, labels, codes), deeper.apply(shallow, labels, codes))


def test_dropout_is_on_with_a_key_alone():
    module = small(residual_dropout_rate=0.5, ffn_dropout_rate=0.5, token_dropout_rate=0.5, class_dropout_rate=0.5)
    params, codes, labels = initial(module), np.full((8, 16), 32), np.zeros(8, np.int32)

    def logits(**options):
        return module.apply({"params": params}, labels, codes, **options)

    np.testing.assert_array_equal(logits(), logits())
    one, other = (logits(rngs={"dropout": jax.random.key(i)}) for i in (0, 1))
    assert np.abs(one - other).max() > 0.01
    # Rows have draws of their own.
    assert np.abs(one[0] - one[1]).max() > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 4, 1), (1, 1, 4), (2, 2, 2)], ids=str)
def test_every_mesh_gives_the_same_loss_and_gradients(shape):
    module = small(mask_output=True)
    generator = Masked(module, Objective((4, 8), label_smoothing=0.1, unmasked_weight=0.1, mask_draw="counted"))
    rng = np.random.default_rng(0)
    batch = {"codes": rng.integers(0, 32, (8, 16)), "label": rng.integers(0, 5, 8)}
    params = initial(module)

    def step(params, batch):
        return jax.value_and_grad(
            lambda p: generator.loss(p, batch, jax.random.key(3), Weights(jnp.array([1.0, 0.5]))), has_aux=True
        )(params)

    (alone, metrics), grads = jax.jit(step)(params, jax.tree.map(jnp.asarray, batch))
    mesh = sharding.mesh_of(jax.devices()[: np.prod(shape)], shape)
    with sharding.use_mesh(mesh):
        boxed = jax.eval_shape(generator.init, jax.random.key(0))
        placed = jax.device_put(params, sharding.unbox(sharding.tree_shardings(mesh, boxed)))
        (found, their_metrics), their_grads = jax.jit(step)(placed, sharding.global_batch(mesh, batch))
    np.testing.assert_allclose(found, alone, rtol=2e-6)
    for name, value in metrics.items():
        np.testing.assert_allclose(their_metrics[name], value, rtol=1e-5, err_msg=name)
    for ours, theirs in zip(jax.tree.leaves(grads), jax.tree.leaves(their_grads), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5 * max(float(np.abs(ours).max()), 1e-3))
