"""The train step of the feature classifier."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key

from iar_jax.models.classifier import Classifier
from iar_jax.training.optimizer import averaged, updated
from iar_jax.training.state import TrainState


def init_classifier_params(key: Key[Array, ""], model: Classifier) -> Any:
    """Fresh weights."""
    return model.init(key, jnp.zeros((1, model.resolution, model.resolution, 3)))["params"]


def init_classifier_state(
    key: Key[Array, ""], model: Classifier, optimizer: optax.GradientTransformation
) -> TrainState:
    """A fresh state."""
    params = init_classifier_params(key, model)
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), ema_params=params)


def make_classifier_train_step(
    model: Classifier, optimizer: optax.GradientTransformation, *, ema_decay: float, key: Key[Array, ""]
) -> Callable[[TrainState, Float[Array, "B R R 3"], Int[Array, " B"]], tuple[TrainState, Any]]:
    """One step on the cross-entropy of the labels, with label smoothing 0.05."""

    def loss_fn(params, images, labels, dropout_key):
        _, logits = model.apply({"params": params}, images, rngs={"dropout": dropout_key})
        targets = optax.smooth_labels(jax.nn.one_hot(labels, model.num_classes), 0.05)
        return jnp.mean(optax.softmax_cross_entropy(logits, targets))

    def train_step(state, images, labels):
        loss, grads = jax.value_and_grad(loss_fn)(state.params, images, labels, jax.random.fold_in(key, state.step))
        params, opt_state = updated(optimizer, state, grads)
        return TrainState(state.step + 1, params, opt_state, averaged(state, params, ema_decay)), {"loss": loss}

    return train_step
