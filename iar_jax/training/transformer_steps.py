"""The jitted train and eval steps of the transformer."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key

from iar_jax.losses.cluster_cross_entropy import token_and_cluster_loss
from iar_jax.models.transformer import Transformer
from iar_jax.training.state import TrainState, update_ema

Metrics = dict[str, Float[Array, ""]]


def init_train_state(key: Key[Array, ""], model: Transformer, optimizer: optax.GradientTransformation) -> TrainState:
    """A fresh state whose leaves carry their logical axes (flax boxes)."""
    params = model.init(key, jnp.zeros((1,), jnp.int32), jnp.zeros((1, model.num_tokens), jnp.int32))["params"]
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), ema_params=params)


def make_train_step(
    model: Transformer,
    optimizer: optax.GradientTransformation,
    *,
    cluster_size: int,
    cluster_weight: float,
    ema_decay: float,
    key: Key[Array, ""],
) -> Callable[[TrainState, Int[Array, " B"], Int[Array, "B L"]], tuple[TrainState, Metrics]]:
    """One optimizer step on token_loss + cluster_weight * cluster_loss.

    The step's randomness is fold_in(key, step), so a resumed run draws what an undisturbed one would have drawn.
    Codes are rearranged ids. Losses are in nats a code, accuracies in [0, 1].
    """

    def loss_fn(params, labels, codes, dropout_key):
        logits = model.apply({"params": params}, labels, codes, rngs={"dropout": dropout_key})
        metrics = mean_metrics(token_and_cluster_loss(logits, codes, cluster_size))
        return metrics["token_loss"] + cluster_weight * metrics["cluster_loss"], metrics

    def train_step(state, labels, codes):
        dropout_key = jax.random.fold_in(key, state.step)
        (loss, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params, labels, codes, dropout_key)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema_params = update_ema(state.ema_params, params, ema_decay, state.step)
        metrics |= {"loss": loss, "grad_norm": optax.global_norm(grads)}
        return TrainState(state.step + 1, params, opt_state, ema_params), metrics

    return train_step


def make_eval_step(
    model: Transformer, *, cluster_size: int
) -> Callable[[Any, Int[Array, " B"], Int[Array, "B L"], Array], Metrics]:
    """(params, labels, codes, valid) -> sums over the valid rows of each metric's mean, and their "count".

    No dropout of any kind is on.
    """

    def eval_step(params, labels, codes, valid):
        logits = model.apply({"params": params}, labels, codes)
        per_row = jax.tree.map(lambda x: jnp.mean(x, axis=-1), token_and_cluster_loss(logits, codes, cluster_size))
        sums = {name: jnp.sum(jnp.where(valid, values, 0.0)) for name, values in named_metrics(per_row).items()}
        return sums | {"count": jnp.sum(valid.astype(jnp.float32))}

    return eval_step


def named_metrics(losses) -> dict[str, Array]:
    return {
        "token_loss": losses.token_loss,
        "cluster_loss": losses.cluster_loss,
        "token_accuracy": losses.token_hit,
        "cluster_accuracy": losses.cluster_hit,
    }


def mean_metrics(losses) -> Metrics:
    return {name: jnp.mean(values) for name, values in named_metrics(losses).items()}
