"""The jitted train and eval steps of the transformer."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key

from iar_jax.losses.fused_head import fused_head_loss
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
    cluster_weight: float | optax.Schedule,
    ema_decay: float,
    key: Key[Array, ""],
    accumulation: int = 1,
    loss_chunks: int = 1,
    learning_rate: optax.Schedule | None = None,
) -> Callable[[TrainState, Int[Array, " B"], Int[Array, "B L"]], tuple[TrainState, Metrics]]:
    """One optimizer step on token_loss + cluster_weight * cluster_loss.

    The step's randomness is fold_in(key, step), so a resumed run draws what an undisturbed one would have drawn.
    Codes are rearranged ids. Losses are in nats a code, accuracies in [0, 1].

    Args:
        cluster_weight: lambda, or a schedule of it over the steps.
        accumulation: parts that the batch is taken in, one after the other; their mean gradient is the batch's. Each
            part draws its own dropout.
        loss_chunks: see `fused_head_loss`.
        learning_rate: the optimizer's schedule, to be among the metrics.
    """

    def loss_fn(params, labels, codes, dropout_key, weight):
        hidden = model.apply({"params": params}, labels, codes, method="hidden", rngs={"dropout": dropout_key})
        loss, losses = fused_head_loss(hidden, params["head"], codes, weight, cluster_size, loss_chunks)
        return loss, mean_metrics(losses) | {"loss": loss}

    def mean_gradient(params, labels, codes, dropout_key, weight):
        gradient = jax.grad(loss_fn, has_aux=True)
        if accumulation == 1:
            return gradient(params, labels, codes, dropout_key, weight)

        def one(total, part):
            index, labels, codes = part
            found = gradient(params, labels, codes, jax.random.fold_in(dropout_key, index), weight)
            return jax.tree.map(jnp.add, total, found), None

        shapes = jax.eval_shape(gradient, params, labels, codes, dropout_key, weight)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        parts = jnp.arange(accumulation), in_parts(labels, accumulation), in_parts(codes, accumulation)
        total, _ = jax.lax.scan(one, zeros, parts)
        return jax.tree.map(lambda leaf: leaf / accumulation, total)

    def train_step(state, labels, codes):
        dropout_key = jax.random.fold_in(key, state.step)
        weight = cluster_weight(state.step) if callable(cluster_weight) else cluster_weight
        grads, metrics = mean_gradient(state.params, labels, codes, dropout_key, weight)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema_params = update_ema(state.ema_params, params, ema_decay, state.step)
        metrics |= {"grad_norm": optax.global_norm(grads)}
        if learning_rate is not None:
            metrics |= {"learning_rate": learning_rate(state.step)}
        return TrainState(state.step + 1, params, opt_state, ema_params), metrics

    return train_step


def in_parts(rows: Array, count: int) -> Array:
    """Rows [B, ...] as [count, B / count, ...]: part i has the rows i, i + count, ..., so none leaves its device."""
    parts = rows.reshape(rows.shape[0] // count, count, *rows.shape[1:])
    return parts.swapaxes(0, 1)


def make_eval_step(
    model: Transformer, *, cluster_size: int, loss_chunks: int = 1
) -> Callable[[Any, Int[Array, " B"], Int[Array, "B L"], Array], Metrics]:
    """(params, labels, codes, valid) -> sums over the valid rows of each metric's mean, and their "count".

    No dropout of any kind is on.
    """

    def eval_step(params, labels, codes, valid):
        hidden = model.apply({"params": params}, labels, codes, method="hidden")
        _, losses = fused_head_loss(hidden, params["head"], codes, 0.0, cluster_size, loss_chunks)
        per_row = jax.tree.map(lambda x: jnp.mean(x, axis=-1), losses)
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
