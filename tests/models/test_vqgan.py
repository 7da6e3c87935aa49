"""If these fail, the tokenizer is not LlamaGen's, or its patch stem loses pixels."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iar_jax.interop.llamagen import load_tokenizer
from iar_jax.models.quantizer import Quantizer, nearest_codes, normalize
from iar_jax.models.vqgan import VQModel, depth_to_space, space_to_depth


@pytest.fixture(scope="module")
def tiny(golden):
    module, params = load_tokenizer(golden("vq_tiny.pt"))
    with open(golden("vq_tiny.json")) as file:
        return module, params, dict(np.load(golden("vq_tiny.npz"))), json.load(file)


def test_the_golden_tokenizer_is_reproduced(tiny):
    module, params, expected, facts = tiny
    reconstructions, quantized = module.apply({"params": params}, expected["images"])
    features = module.apply({"params": params}, expected["images"], method="features")
    np.testing.assert_allclose(features, expected["pre_quant"], atol=1e-4)
    np.testing.assert_array_equal(quantized.codes, expected["codes"])
    np.testing.assert_allclose(reconstructions, expected["recon"], atol=1e-4)
    assert abs(float(quantized.codebook_loss) - expected["vq_loss"]) < 1e-6
    assert abs(facts["commit_beta"] * float(quantized.commitment_loss) - expected["commit_loss"]) < 1e-6


def test_encode_and_decode_are_the_halves_of_the_whole(tiny):
    module, params, expected, _ = tiny
    codes = module.apply({"params": params}, expected["images"], method="encode")
    assert codes.dtype == jnp.int32
    decoded = module.apply({"params": params}, codes, method="decode_codes")
    np.testing.assert_allclose(decoded, expected["recon"], atol=1e-4)


def test_gradients_reach_the_encoder_straight_through_and_the_codebook_by_its_own_loss():
    quantizer = Quantizer(codebook_size=8, codebook_dim=4)
    encoded = jax.random.normal(jax.random.key(1), (5, 4))
    params = quantizer.init(jax.random.key(0), encoded)

    def through(encoded):
        return jnp.sum(quantizer.apply(params, encoded).vectors * jnp.arange(4.0))

    expected = jax.grad(lambda z: jnp.sum(normalize(z) * jnp.arange(4.0)))(encoded)
    np.testing.assert_allclose(jax.grad(through)(encoded), expected, atol=1e-6)
    losses = jax.grad(lambda p, z, i: quantizer.apply(p, z)[i], argnums=(0, 1))
    codebook_grad, encoder_grad = losses(params, encoded, 3)
    assert np.abs(codebook_grad["params"]["codebook"]).max() > 0
    assert np.abs(encoder_grad).max() == 0
    codebook_grad, encoder_grad = losses(params, encoded, 4)
    assert np.abs(codebook_grad["params"]["codebook"]).max() == 0
    assert np.abs(encoder_grad).max() > 0


def test_the_nearest_code_is_the_nearest_by_brute_force_and_the_lowest_on_ties():
    rng = np.random.default_rng(0)
    vectors, codebook = (np.asarray(normalize(jnp.asarray(rng.standard_normal((n, 5))))) for n in (50, 20))
    brute = np.square(vectors[:, None].astype(np.float64) - codebook[None]).sum(axis=-1).argmin(axis=1)
    np.testing.assert_array_equal(nearest_codes(jnp.asarray(vectors), jnp.asarray(codebook)), brute)
    twice = jnp.asarray(np.concatenate([codebook, codebook]))
    np.testing.assert_array_equal(nearest_codes(jnp.asarray(vectors), twice), brute)


def test_patches_fold_and_unfold():
    images = jnp.arange(2 * 8 * 12 * 3, dtype=jnp.float32).reshape(2, 8, 12, 3)
    patches = space_to_depth(images, 4)
    assert patches.shape == (2, 2, 3, 48)
    np.testing.assert_array_equal(patches[0, 1, 2].reshape(4, 4, 3), images[0, 4:8, 8:12])
    np.testing.assert_array_equal(depth_to_space(patches, 4), images)


@pytest.mark.slow
@pytest.mark.parametrize("local_encoder", [False, True])
@pytest.mark.parametrize(("multipliers", "patch_size"), [((1,), 4), ((1, 2), 2)])
def test_small_models_have_the_shapes_they_say(local_encoder, multipliers, patch_size):
    if local_encoder and len(multipliers) > 1:
        pytest.skip("the patch encoder has one level")
    module = VQModel(24, multipliers, 1, 16, 32, 4, patch_size=patch_size, local_encoder=local_encoder)
    assert module.downsampling == 4
    images = jnp.zeros((2, 16, 16, 3))
    params = module.init(jax.random.key(0), images)
    reconstructions, quantized = module.apply(params, images)
    assert reconstructions.shape == images.shape
    assert quantized.codes.shape == (2, 4, 4)


def test_the_patch_encoder_sees_one_patch_alone():
    module = VQModel(16, (1,), 1, 16, 64, 4, patch_size=4, local_encoder=True)
    images = jax.random.uniform(jax.random.key(0), (1, 16, 16, 3), minval=-1.0)
    params = module.init(jax.random.key(1), images)
    before = module.apply(params, images, method="features")
    changed = images.at[:, 4:8, 4:8].set(0.0)
    after = module.apply(params, changed, method="features")
    differs = np.abs(np.asarray(before - after)).max(axis=-1)[0] > 0
    np.testing.assert_array_equal(differs, np.arange(16).reshape(4, 4) == 5)
