"""The jitted steps of tokenizer training, and the care of its codebook: seeding from data, reviving dead codes."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key

from iar_jax.codebook.balanced_kmeans import plus_plus_seeds
from iar_jax.losses import tokenizer_losses
from iar_jax.models.discriminator import PatchDiscriminator
from iar_jax.models.quantizer import nearest_codes, normalize
from iar_jax.models.vqgan import VQModel
from iar_jax.training.optimizer import averaged, updated
from iar_jax.training.state import DiscriminatorState, TokenizerState

Metrics = dict[str, Float[Array, "..."]]


class TokenizerLossWeights(NamedTuple):
    """Weights of the terms of the tokenizer's loss; a term of weight 0 is not computed."""

    l1: float
    l2: float
    perceptual: float
    codebook: float
    commitment: float
    entropy: float
    adversarial: float


def init_tokenizer_state(
    key: Key[Array, ""],
    model: VQModel,
    discriminator: PatchDiscriminator | None,
    optimizer: optax.GradientTransformation,
    resolution: int,
) -> TokenizerState:
    """A fresh state; `discriminator` is None where the adversarial loss is off."""
    images = jnp.zeros((1, resolution, resolution, 3))
    params = model.init(key, images)["params"]
    discriminator_state = None
    if discriminator is not None:
        variables = discriminator.init(jax.random.fold_in(key, 1), images, train=False)
        discriminator_state = DiscriminatorState(
            variables["params"], variables["batch_stats"], optimizer.init(variables["params"])
        )
    return TokenizerState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        ema_params=params,
        code_usage=jnp.ones((model.codebook_size,)),
        discriminator=discriminator_state,
    )


def make_tokenizer_train_step(
    model: VQModel,
    discriminator: PatchDiscriminator | None,
    optimizer: optax.GradientTransformation,
    weights: TokenizerLossWeights,
    *,
    perceptual_distance: Callable[[Array, Array], Array] | None,
    ema_decay: float,
    usage_decay: float,
    quantize_from_step: int,
    adversarial: bool,
) -> Callable[[TokenizerState, Float[Array, "B H W 3"]], tuple[TokenizerState, Metrics]]:
    """A step of the tokenizer and, with `adversarial`, of the discriminator after it.

    Args:
        perceptual_distance: distance of two batches [B, H, W, 3] -> [B]; needed where weights.perceptual > 0.
        quantize_from_step: before it the decoder sees encoder outputs as they are.
        adversarial: whether the discriminator takes part; a run switches from one compiled step to the other.
    """

    def tokenizer_loss(params, state, images):
        quantize = state.step >= quantize_from_step
        reconstructions, quantized = model.apply({"params": params}, images, quantize)
        reconstruction = tokenizer_losses.reconstruction_loss(reconstructions, images, weights.l1, weights.l2)
        loss = reconstruction + quantize * (
            weights.codebook * quantized.codebook_loss + weights.commitment * quantized.commitment_loss
        )
        metrics = {
            "reconstruction_loss": reconstruction,
            "codebook_loss": quantized.codebook_loss,
            "commitment_loss": quantized.commitment_loss,
            "psnr": jnp.mean(tokenizer_losses.psnr(reconstructions, images)),
        }
        if weights.perceptual > 0.0:
            metrics["perceptual_loss"] = jnp.mean(perceptual_distance(reconstructions, images))
            loss += weights.perceptual * metrics["perceptual_loss"]
        if weights.entropy > 0.0:
            metrics["entropy_loss"] = tokenizer_losses.entropy_loss(
                quantized.unit_encoded, normalize(params["quantizer"]["codebook"])
            )
            loss += quantize * weights.entropy * metrics["entropy_loss"]
        if adversarial:
            fake_logits, _ = discriminator.apply(
                {"params": state.discriminator.params, "batch_stats": state.discriminator.batch_stats},
                reconstructions,
                train=True,
                mutable=["batch_stats"],
            )
            metrics["generator_loss"] = tokenizer_losses.generator_hinge_loss(fake_logits)
            loss += weights.adversarial * metrics["generator_loss"]
        return loss, (metrics, reconstructions, quantized.codes)

    def discriminator_loss(params, batch_stats, images, reconstructions):
        variables = {"params": params, "batch_stats": batch_stats}
        real_logits, updated = discriminator.apply(variables, images, train=True, mutable=["batch_stats"])
        variables = {"params": params, "batch_stats": updated["batch_stats"]}
        fake_logits, updated = discriminator.apply(variables, reconstructions, train=True, mutable=["batch_stats"])
        return tokenizer_losses.discriminator_hinge_loss(real_logits, fake_logits), updated["batch_stats"]

    def update_discriminator(old, images, reconstructions):
        (loss, batch_stats), grads = jax.value_and_grad(discriminator_loss, has_aux=True)(
            old.params, old.batch_stats, images, jax.lax.stop_gradient(reconstructions)
        )
        params, opt_state = updated(optimizer, old, grads)
        return DiscriminatorState(params, batch_stats, opt_state), loss

    def train_step(state, images):
        (loss, (metrics, reconstructions, codes)), grads = jax.value_and_grad(tokenizer_loss, has_aux=True)(
            state.params, state, images
        )
        metrics |= {"loss": loss, "grad_norm": optax.global_norm(grads)}
        params, opt_state = updated(optimizer, state, grads)
        counts = jnp.zeros_like(state.code_usage).at[codes.reshape(-1)].add(1.0)
        share = counts * (state.code_usage.size / codes.size)
        code_usage = usage_decay * state.code_usage + (1.0 - usage_decay) * share
        new_discriminator = state.discriminator
        if adversarial:
            new_discriminator, metrics["discriminator_loss"] = update_discriminator(
                state.discriminator, images, reconstructions
            )
        state = TokenizerState(
            step=state.step + 1,
            params=params,
            opt_state=opt_state,
            ema_params=averaged(state, params, ema_decay),
            code_usage=code_usage,
            discriminator=new_discriminator,
        )
        return state, metrics

    return train_step


def with_codebook(params: Any, codebook: Float[Array, "N d"]) -> Any:
    """Tokenizer parameters with another codebook."""
    return params | {"quantizer": params["quantizer"] | {"codebook": codebook}}


def seed_codebook(
    model: VQModel, state: TokenizerState, images: Float[Array, "B H W 3"], key: Key[Array, ""]
) -> TokenizerState:
    """Replaces the codebook by encoder outputs picked as k-means++ picks its centres.

    So rare outputs get codes, and duplicates of a common one do not.
    """
    vectors = normalize(model.apply({"params": state.params}, images, method="features"))
    codebook = plus_plus_seeds(vectors.reshape(-1, vectors.shape[-1]), model.codebook_size, key)
    return dataclasses.replace(
        state,
        params=with_codebook(state.params, codebook),
        ema_params=with_codebook(state.ema_params, codebook),
        code_usage=jnp.ones_like(state.code_usage),
    )


def restart_dead_codes(
    model: VQModel,
    state: TokenizerState,
    images: Float[Array, "B H W 3"],
    key: Key[Array, ""],
    *,
    dead_below: float,
) -> TokenizerState:
    """Moves codes whose usage is below `dead_below` of an even share to encoder outputs that are served badly.

    The outputs are drawn with probability proportional to their squared distance from their code.
    """
    vectors = normalize(model.apply({"params": state.params}, images, method="features"))
    vectors = vectors.reshape(-1, vectors.shape[-1])
    codebook = normalize(state.params["quantizer"]["codebook"])
    error = jnp.sum(jnp.square(vectors - codebook[nearest_codes(vectors, codebook)]), axis=-1)
    picked = jax.random.categorical(key, jnp.log(error + 1e-12), shape=(codebook.shape[0],))
    dead = state.code_usage < dead_below

    def revive(params):
        old = params["quantizer"]["codebook"]
        return with_codebook(params, jnp.where(dead[:, None], vectors[picked], old))

    return dataclasses.replace(
        state,
        params=revive(state.params),
        ema_params=revive(state.ema_params),
        code_usage=jnp.where(dead, 1.0, state.code_usage),
    )


def make_tokenizer_eval_step(
    model: VQModel,
) -> Callable[[Any, Float[Array, "B H W 3"], Array], tuple[Array, Array, Array]]:
    """(params, images, valid) -> reconstructions, PSNR of each image [B] in dB, uses of each code [N] by valid ones."""

    def eval_step(params, images, valid):
        reconstructions, quantized = model.apply({"params": params}, images)
        uses = jnp.broadcast_to(valid[:, None, None], quantized.codes.shape).astype(jnp.float32)
        counts = jnp.zeros((model.codebook_size,)).at[quantized.codes.reshape(-1)].add(uses.reshape(-1))
        return reconstructions, tokenizer_losses.psnr(reconstructions, images), counts

    return eval_step
