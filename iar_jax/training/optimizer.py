"""AdamW with decay groups and global-norm clipping."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from iar_jax.runtime import sharding
from iar_jax.runtime.section import Section
from iar_jax.training.schedules import learning_rate_of
from iar_jax.training.state import update_ema


def matrices(params: Any) -> Any:
    """True for the leaves that weight decay acts on by default: those of two dimensions or more."""
    return jax.tree.map(lambda leaf: leaf.ndim >= 2, params)


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """Scales gradients whose global norm is above `max_norm` down to it, by one product a leaf.

    optax's divides each leaf by the norm, and XLA keeps the results of divisions in memory of their own instead of
    fusing them into what reads them: a pass over all gradients more.
    """

    def update(updates, state, params=None):
        scale = jnp.minimum(1.0, max_norm / optax.global_norm(updates))
        return jax.tree.map(lambda leaf: leaf * scale, updates), state

    return optax.GradientTransformation(optax.init_empty_state, update)


def make_optimizer(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: float,
    b2: float,
    weight_decay: float,
    clip_norm: float,
    decays: Callable[[Any], Any] = matrices,
) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW; `decays` says which leaves of the parameters weight decay acts on."""
    return optax.chain(
        clip_by_global_norm(clip_norm),
        optax.adamw(learning_rate, b1=b1, b2=b2, weight_decay=weight_decay, mask=decays),
    )


def optimizer_of(section: Section, decays: Callable[[Any], Any] = matrices) -> optax.GradientTransformation:
    """The optimizer that config.training or config.tokenizer_training describes."""
    return make_optimizer(
        learning_rate_of(section),
        b1=section["b1"],
        b2=section["b2"],
        weight_decay=section["weight_decay"],
        clip_norm=section["clip_norm"],
        decays=decays,
    )


def updated(optimizer: optax.GradientTransformation, state: Any, grads: Any, boxed: Any = None) -> tuple[Any, Any]:
    """Parameters and optimizer state after one step.

    On a mesh each device works on its own share of all leaves, over the data axis too (`sharding.spread`).

    Args:
        state: has `params` and `opt_state`.
        boxed: shapes of the parameters with their logical axes; None where they have none.
    """
    names = state.params if boxed is None else boxed
    with jax.named_scope("optimizer"):
        grads, params = sharding.spread(grads, names), sharding.spread(state.params, names)
        updates, opt_state = optimizer.update(grads, state.opt_state, params)
        return optax.apply_updates(params, updates), opt_state


def averaged(state: Any, params: Any, decay: float) -> Any:
    """The averaged weights of a state (`ema_params`, `step`) after a step that led to `params`."""
    with jax.named_scope("optimizer"):
        return update_ema(state.ema_params, params, decay, state.step)
