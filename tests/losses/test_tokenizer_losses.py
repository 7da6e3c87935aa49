"""If these fail, the tokenizer is trained on something else than LlamaGen's losses."""

import jax.numpy as jnp
import numpy as np

from iar_jax.losses import tokenizer_losses as losses


def test_reconstruction_is_the_weighted_sum_of_both_errors():
    images = jnp.zeros((1, 2, 2, 3))
    assert losses.reconstruction_loss(images + 0.5, images, l1_weight=2.0, l2_weight=4.0) == 2.0 * 0.5 + 4.0 * 0.25


def test_hinge_losses():
    real, fake = jnp.array([2.0, 0.0]), jnp.array([-2.0, 0.5])
    assert losses.discriminator_hinge_loss(real, fake) == 0.5 * (0.5 + 0.75)
    assert losses.generator_hinge_loss(fake) == 0.75


def test_entropy_loss_is_lowest_for_sure_and_even_use():
    codebook = jnp.eye(4)
    even = losses.entropy_loss(codebook, codebook)
    np.testing.assert_allclose(even, -np.log(4), atol=1e-4)  # sure of each code, all used alike
    collapsed = losses.entropy_loss(jnp.tile(codebook[:1], (4, 1)), codebook)
    np.testing.assert_allclose(collapsed, 0.0, atol=1e-4)
    unsure = losses.entropy_loss(jnp.full((4, 4), 0.5), codebook)
    np.testing.assert_allclose(unsure, 0.0, atol=1e-4)


def test_psnr_has_a_peak_of_two():
    images = jnp.zeros((2, 4, 4, 3))
    np.testing.assert_allclose(losses.psnr(images + 0.2, images), 20.0, atol=1e-4)
