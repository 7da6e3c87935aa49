"""The jitted train and eval steps, of any generator."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key

from iar_jax.generators.generator import Batch, Generator
from iar_jax.generators.settings import AUXILIARY, Weights
from iar_jax.training.optimizer import averaged, updated
from iar_jax.training.state import TrainState

# Of the key of a step's noise; parts of an accumulated batch have the numbers from 0 on.
NOISE = 2**31 - 1

Metrics = dict[str, Float[Array, ""]]


def init_train_state(key: Key[Array, ""], generator: Generator, optimizer: optax.GradientTransformation) -> TrainState:
    """A fresh state whose leaves carry their logical axes (flax boxes)."""
    params = generator.init(key)
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), ema_params=lasting(params))


def lasting(params: Any) -> Any:
    """Parameters of a generator without what training alone needs."""
    return {name: part for name, part in params.items() if name != AUXILIARY} if AUXILIARY in params else params


def make_train_step(
    generator: Generator,
    optimizer: optax.GradientTransformation,
    *,
    cluster_weights: Sequence[float | optax.Schedule],
    lookahead_weight: optax.Schedule | None = None,
    noise: Callable[[Key[Array, ""], Int[Array, "B L"], Int[Array, ""]], Int[Array, "B L"]] | None = None,
    ema_decay: float,
    key: Key[Array, ""],
    accumulation: int = 1,
    learning_rate: optax.Schedule | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """One optimizer step on the generator's loss.

    The step's randomness is fold_in(key, step), so a resumed run draws what an undisturbed one would have drawn.

    Args:
        cluster_weights: λ of each level, or a schedule of it over the steps.
        lookahead_weight: of the generator's look-ahead; None where it has none.
        noise: (key, codes, step) -> the codes that the generator reads; None are the codes themselves.
        accumulation: parts that the batch is taken in, one after the other; their mean gradient is the batch's. Each
            part draws its own randomness.
        learning_rate: the optimizer's schedule, to be among the metrics.
    """

    def loss_fn(params, batch, step_key, weights, teacher):
        loss, metrics = generator.loss(params, batch, step_key, weights, teacher)
        return loss, metrics | {"loss": loss}

    gradient = jax.grad(loss_fn, has_aux=True)

    def mean_gradient(params, batch, step_key, weights, teacher):
        if accumulation == 1:
            return gradient(params, batch, step_key, weights, teacher)

        def one(total, part):
            index, rows = part
            found = gradient(params, rows, jax.random.fold_in(step_key, index), weights, teacher)
            return jax.tree.map(jnp.add, total, found), None

        shapes = jax.eval_shape(gradient, params, batch, step_key, weights, teacher)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        parts = jnp.arange(accumulation), jax.tree.map(lambda rows: in_parts(rows, accumulation), batch)
        total, _ = jax.lax.scan(one, zeros, parts)
        return jax.tree.map(lambda leaf: leaf / accumulation, total)

    def train_step(state, batch):
        step_key = jax.random.fold_in(key, state.step)
        weights = Weights(
            jnp.stack([jnp.float32(w(state.step) if callable(w) else w) for w in cluster_weights]),
            None if lookahead_weight is None else jnp.float32(lookahead_weight(state.step)),
        )
        if noise is not None:
            # Of a key that no dropout has.
            noise_key = jax.random.fold_in(step_key, NOISE)
            batch = {**batch, "context": noise(noise_key, batch["codes"], state.step)}
        grads, metrics = mean_gradient(state.params, batch, step_key, weights, state.ema_params)
        params, opt_state = updated(optimizer, state, grads, jax.eval_shape(generator.init, key))
        metrics |= {"grad_norm": optax.global_norm(grads)}
        if learning_rate is not None:
            metrics |= {"learning_rate": learning_rate(state.step)}
        return TrainState(state.step + 1, params, opt_state, averaged(state, lasting(params), ema_decay)), metrics

    return train_step


def in_parts(rows: Array, count: int) -> Array:
    """Rows [B, ...] as [count, B / count, ...]: part i has the rows i, i + count, ..., so none leaves its device."""
    parts = rows.reshape(rows.shape[0] // count, count, *rows.shape[1:])
    return parts.swapaxes(0, 1)


def make_eval_step(generator: Generator) -> Callable[[Any, Batch, Array], Metrics]:
    """(params, batch, valid) -> sums over the valid rows of each metric, and their "count"."""

    def eval_step(params, batch, valid):
        rows = generator.score(params, batch)
        sums = {name: jnp.sum(jnp.where(valid, values, 0.0)) for name, values in rows.items()}
        return sums | {"count": jnp.sum(valid.astype(jnp.float32))}

    return eval_step
