"""Losses of the VQ tokenizer, as LlamaGen trains it: reconstruction, adversarial, codebook usage.

Codebook and commitment losses come from the quantizer, the perceptual one from `models/lpips.py`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def reconstruction_loss(
    reconstructions: Float[Array, "B H W C"],
    images: Float[Array, "B H W C"],
    l1_weight: float,
    l2_weight: float,
) -> Float[Array, ""]:
    """Weighted sum of mean absolute and mean squared error; images in [-1, 1]."""
    error = reconstructions - images
    return l1_weight * jnp.mean(jnp.abs(error)) + l2_weight * jnp.mean(jnp.square(error))


def discriminator_hinge_loss(real_logits: Float[Array, "..."], fake_logits: Float[Array, "..."]) -> Float[Array, ""]:
    """Hinge loss of the discriminator: real patches above 1, fake ones below -1."""
    return 0.5 * (jnp.mean(jax.nn.relu(1.0 - real_logits)) + jnp.mean(jax.nn.relu(1.0 + fake_logits)))


def generator_hinge_loss(fake_logits: Float[Array, "..."]) -> Float[Array, ""]:
    """Adversarial loss of the tokenizer."""
    return -jnp.mean(fake_logits)


def entropy_loss(
    unit_encoded: Float[Array, "*B d"], unit_codebook: Float[Array, "N d"], temperature: float = 0.01
) -> Float[Array, ""]:
    """Mean entropy of each position's soft assignment minus the entropy of the mean assignment, in nats.

    Low when every position is sure of its code and all codes are used. Soft assignments are
    softmax(-squared distance / temperature); both arguments have unit rows.
    """
    flat = unit_encoded.reshape(-1, unit_encoded.shape[-1])
    # |z - e|^2 = 2 - 2 z.e for unit vectors, and softmax drops the constant.
    log_probability = jax.nn.log_softmax(2.0 * flat @ unit_codebook.T / temperature, axis=-1)
    probability = jnp.exp(log_probability)
    position_entropy = -jnp.mean(jnp.sum(probability * log_probability, axis=-1))
    mean_probability = jnp.mean(probability, axis=0)
    code_entropy = -jnp.sum(mean_probability * jnp.log(mean_probability + 1e-10))
    return position_entropy - code_entropy


def psnr(reconstructions: Float[Array, "B H W C"], images: Float[Array, "B H W C"]) -> Float[Array, " B"]:
    """Peak signal-to-noise ratio of each image in dB; images in [-1, 1], so the peak is 2."""
    mean_squared_error = jnp.mean(jnp.square(reconstructions - images), axis=(1, 2, 3))
    return 10.0 * jnp.log10(4.0 / jnp.maximum(mean_squared_error, 1e-12))
