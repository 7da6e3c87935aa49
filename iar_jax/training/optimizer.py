"""AdamW with LlamaGen's decay groups, global-norm clipping, and the learning-rate schedules."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict


def decay_mask(params: Any) -> Any:
    """True for the leaves that weight decay acts on: matrices and larger (LlamaGen's groups: two dimensions or more).

    Leaves below a "layers" key have a leading layer axis, which does not count.
    """

    def decays(path, leaf):
        stacked = any(getattr(entry, "key", None) == "layers" for entry in path)
        return leaf.ndim - stacked >= 2

    return jax.tree_util.tree_map_with_path(decays, params)


def learning_rate_schedule(kind: str, peak: float, warmup_steps: int, num_steps: int) -> optax.Schedule:
    """Linear warm-up from 0, then "constant", or "cosine" down to 0 at num_steps."""
    if kind == "constant":
        after = optax.constant_schedule(peak)
    else:
        after = optax.cosine_decay_schedule(peak, max(1, num_steps - warmup_steps))
    return optax.join_schedules([optax.linear_schedule(0.0, peak, max(1, warmup_steps)), after], [warmup_steps])


def cluster_weight_schedule(kind: str, first: float, last: float, num_steps: int) -> optax.Schedule:
    """Lambda over the steps: "constant" at `first`, or "linear" or "cosine" from `first` to `last` at num_steps."""
    if kind == "linear":
        return optax.linear_schedule(first, last, num_steps)
    if kind == "cosine":
        return lambda step: last + (first - last) * optax.cosine_decay_schedule(1.0, num_steps)(step)
    return optax.constant_schedule(first)


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
    learning_rate: optax.ScalarOrSchedule, *, b1: float, b2: float, weight_decay: float, clip_norm: float
) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW."""
    return optax.chain(
        clip_by_global_norm(clip_norm),
        optax.adamw(learning_rate, b1=b1, b2=b2, weight_decay=weight_decay, mask=decay_mask),
    )


def learning_rate_of(section: ConfigDict) -> optax.Schedule:
    """The schedule that config.training or config.tokenizer_training describes."""
    return learning_rate_schedule(section.schedule, section.learning_rate, section.warmup_steps, section.num_steps)


def optimizer_of(section: ConfigDict) -> optax.GradientTransformation:
    """The optimizer that config.training or config.tokenizer_training describes."""
    return make_optimizer(
        learning_rate_of(section),
        b1=section.b1,
        b2=section.b2,
        weight_decay=section.weight_decay,
        clip_norm=section.clip_norm,
    )
