"""Everything that a training run carries from step to step, as pytrees.

The fields are typed Any because the same trees also hold shapes, shardings and partition specs.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Int

from iar_jax.runtime import sharding


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """State of a generator's training (and of the feature classifier's).

    Attributes:
        step: number of finished steps, int32 [].
        params: float32 parameters.
        opt_state: of optax.
        ema_params: exponential moving average of the parameters.
    """

    step: Any
    params: Any
    opt_state: Any
    ema_params: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DiscriminatorState:
    """Parameters, batch statistics and optimizer of the tokenizer's discriminator."""

    params: Any
    batch_stats: Any
    opt_state: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenizerState:
    """State of the tokenizer's training.

    Attributes:
        step, params, opt_state, ema_params: as in TrainState.
        code_usage: moving average of how often each code is chosen, times N, float32 [N]: 1 is an even share.
        discriminator: a DiscriminatorState; None where the adversarial loss is off.
    """

    step: Any
    params: Any
    opt_state: Any
    ema_params: Any
    code_usage: Any
    discriminator: Any


def state_shardings(mesh: Mesh, boxed: Any) -> Any:
    """Of a state whose leaves carry their logical axes: parameters as the rules say, optimizer state and averaged
    weights split over the data axis as well."""

    def chosen(path, own, wide):
        return wide if {"opt_state", "ema_params"} & {getattr(entry, "name", None) for entry in path} else own

    own, wide = sharding.tree_shardings(mesh, boxed), sharding.spread_shardings(mesh, boxed)
    return jax.tree_util.tree_map_with_path(chosen, own, wide)


def skip_unless_finite(train_step: Callable) -> Callable:
    """The same step, (state, *batch) -> (state, metrics), but one that only counts where a metric is not finite."""

    def step(state, *batch):
        new, metrics = train_step(state, *batch)
        sound = jax.tree.reduce(jnp.logical_and, jax.tree.map(jnp.isfinite, metrics))
        kept = jax.tree.map(lambda after, before: jnp.where(sound, after, before), new, state)
        return dataclasses.replace(kept, step=new.step), metrics

    return step


def update_ema(ema: Any, params: Any, decay: float, step: Int[Array, ""]) -> Any:
    """Moves the average towards the parameters.

    The decay starts at 0.1 and rises as (1 + step) / (10 + step) up to `decay`, so that a short run's average is not
    made of its random start.
    """
    rate = 1.0 - jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda average, new: average + rate * (new - average), ema, params)
