"""If these fail, a term of the tokenizer's loss is missing, or its codebook starves."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iar_jax.models.discriminator import PatchDiscriminator
from iar_jax.models.quantizer import normalize
from iar_jax.models.vqgan import VQModel
from iar_jax.training import tokenizer_steps
from iar_jax.training.optimizer import make_optimizer

MODEL = VQModel(16, (1,), 1, 16, 32, 4, patch_size=4)
OPTIMIZER = make_optimizer(1e-3, b1=0.9, b2=0.99, weight_decay=0.0, clip_norm=1.0)
IMAGES = jax.random.uniform(jax.random.key(9), (4, 32, 32, 3), minval=-1.0)
NO_WEIGHTS = tokenizer_steps.TokenizerLossWeights(0.0, 1.0, 0.0, 1.0, 0.25, 0.0, 0.0)


def fresh(discriminator=None):
    init = functools.partial(
        tokenizer_steps.init_tokenizer_state,
        model=MODEL,
        discriminator=discriminator,
        optimizer=OPTIMIZER,
        resolution=32,
    )
    return jax.jit(init)(jax.random.key(0))


def make_step(weights, discriminator=None, adversarial=False, quantize_from_step=0, perceptual=None):
    return jax.jit(
        tokenizer_steps.make_tokenizer_train_step(
            MODEL,
            discriminator,
            OPTIMIZER,
            weights,
            perceptual_distance=perceptual,
            ema_decay=0.9,
            usage_decay=0.5,
            quantize_from_step=quantize_from_step,
            adversarial=adversarial,
        )
    )


def test_the_loss_is_the_weighted_sum_of_its_terms():
    weights = tokenizer_steps.TokenizerLossWeights(0.5, 2.0, 0.7, 0.3, 0.2, 0.1, 0.0)
    distance = lambda a, b: jnp.mean(jnp.abs(a - b), axis=(1, 2, 3))  # noqa: E731
    _, metrics = make_step(weights, perceptual=distance)(fresh(), IMAGES)
    expected = (
        metrics["reconstruction_loss"]
        + 0.7 * metrics["perceptual_loss"]
        + 0.3 * metrics["codebook_loss"]
        + 0.2 * metrics["commitment_loss"]
        + 0.1 * metrics["entropy_loss"]
    )
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)


def test_before_quantisation_starts_the_codebook_is_left_alone():
    state = fresh()
    after, metrics = make_step(NO_WEIGHTS, quantize_from_step=1)(state, IMAGES)
    np.testing.assert_allclose(metrics["loss"], metrics["reconstruction_loss"], rtol=1e-6)
    np.testing.assert_array_equal(after.params["quantizer"]["codebook"], state.params["quantizer"]["codebook"])
    later, metrics = make_step(NO_WEIGHTS, quantize_from_step=1)(after, IMAGES)
    assert metrics["loss"] > metrics["reconstruction_loss"]
    assert np.abs(later.params["quantizer"]["codebook"] - after.params["quantizer"]["codebook"]).max() > 0


@pytest.mark.slow
def test_the_discriminator_trains_only_when_it_takes_part():
    discriminator = PatchDiscriminator(channels=8, num_layers=2)
    weights = NO_WEIGHTS._replace(adversarial=0.5)
    state = fresh(discriminator)
    after, metrics = make_step(weights, discriminator)(state, IMAGES)
    assert "generator_loss" not in metrics
    jax.tree.map(np.testing.assert_array_equal, after.discriminator, state.discriminator)
    step = make_step(weights, discriminator, adversarial=True)
    losses = []
    for _ in range(15):
        state, metrics = step(state, IMAGES)
        losses.append(float(metrics["discriminator_loss"]))
    assert {"generator_loss", "discriminator_loss"} <= set(metrics)
    assert losses[-1] < losses[0]
    assert np.abs(jax.tree.leaves(state.discriminator.batch_stats)[0]).max() > 0


@pytest.mark.slow
def test_code_usage_is_a_moving_average_of_shares():
    state, _ = make_step(NO_WEIGHTS)(fresh(), IMAGES)
    np.testing.assert_allclose(jnp.mean(state.code_usage), 1.0, rtol=1e-5)
    codes = np.asarray(MODEL.apply({"params": fresh().params}, IMAGES, method="encode"))
    share = np.bincount(codes.ravel(), minlength=32) / codes.size * 32
    np.testing.assert_allclose(state.code_usage, 0.5 + 0.5 * share, rtol=1e-5)


def test_seeding_takes_codes_from_encoder_outputs_far_apart():
    seeded = tokenizer_steps.seed_codebook(MODEL, fresh(), IMAGES, jax.random.key(1))
    codebook = np.asarray(seeded.params["quantizer"]["codebook"])
    vectors = np.asarray(normalize(MODEL.apply({"params": fresh().params}, IMAGES, method="features"))).reshape(-1, 4)
    distances = np.square(codebook[:, None] - vectors[None]).sum(axis=-1)
    assert distances.min(axis=1).max() < 1e-10
    assert len(np.unique(codebook, axis=0)) == 32
    # k-means++ covers the outputs better than as many drawn at random.
    rng = np.random.default_rng(0)
    cost = lambda centres: np.square(vectors[:, None] - centres[None]).sum(axis=-1).min(axis=1).mean()  # noqa: E731
    at_random = [cost(vectors[rng.choice(len(vectors), 32, replace=False)]) for _ in range(20)]
    assert cost(codebook) < np.median(at_random)
    np.testing.assert_array_equal(seeded.ema_params["quantizer"]["codebook"], codebook)


def test_only_dead_codes_are_restarted():
    state = fresh()
    usage = jnp.where(jnp.arange(32) < 5, 0.01, 1.0)
    state = dataclasses.replace(state, code_usage=usage)
    after = tokenizer_steps.restart_dead_codes(MODEL, state, IMAGES, jax.random.key(2), dead_below=0.05)
    before, now = (s.params["quantizer"]["codebook"] for s in (state, after))
    moved = np.abs(np.asarray(now - before)).max(axis=1) > 0
    np.testing.assert_array_equal(moved, np.arange(32) < 5)
    np.testing.assert_array_equal(after.code_usage, 1.0)


def test_evaluation_counts_only_valid_images():
    evaluate = tokenizer_steps.make_tokenizer_eval_step(MODEL)
    params = fresh().params
    _, psnr, counts = evaluate(params, IMAGES, jnp.array([True, True, False, False]))
    assert psnr.shape == (4,)
    codes = np.asarray(MODEL.apply({"params": params}, IMAGES[:2], method="encode"))
    np.testing.assert_array_equal(counts, np.bincount(codes.ravel(), minlength=32))
