"""Schedules of the learning rate and of λ, by name."""

from collections.abc import Callable

import numpy as np
import optax

from iar_jax.runtime.section import Section


def stable_then_down(peak: float, steps: int, decay: int) -> optax.Schedule:
    """Constant, then linear down to zero in the last `decay` steps (with a warm-up: warm-up, stable, decay)."""
    return optax.linear_schedule(peak, 0.0, decay, max(0, steps - decay))


# config.training.schedule: (peak, steps after the warm-up, steps in which it may decay) -> what follows the warm-up.
SCHEDULES: dict[str, Callable[[float, int, int], optax.Schedule]] = {
    "constant": lambda peak, steps, decay: optax.constant_schedule(peak),
    "cosine": lambda peak, steps, decay: optax.cosine_decay_schedule(peak, max(1, steps)),
    "linear": lambda peak, steps, decay: optax.linear_schedule(peak, 0.0, max(1, steps)),
    "wsd": lambda peak, steps, decay: stable_then_down(peak, steps, decay or max(1, steps // 10)),
}

# config.training.cluster_weight_schedule: (first, last, steps) -> λ.
WEIGHT_SCHEDULES: dict[str, Callable[[float, float, int], optax.Schedule]] = {
    "constant": lambda first, last, steps: optax.constant_schedule(first),
    "linear": optax.linear_schedule,
    "cosine": lambda first, last, steps: (
        lambda step: last + (first - last) * optax.cosine_decay_schedule(1.0, steps)(step)
    ),
}


def learning_rate_schedule(
    kind: str, peak: float, warmup_steps: int, num_steps: int, decay_steps: int = 0
) -> optax.Schedule:
    """A linear warm-up from 0 to `peak` in warmup_steps, then the schedule `kind` of SCHEDULES up to num_steps.

    wsd falls in the last decay_steps; 0 is a tenth of the steps after the warm-up.
    """
    after = SCHEDULES[kind](peak, num_steps - warmup_steps, decay_steps)
    return optax.join_schedules([optax.linear_schedule(0.0, peak, max(1, warmup_steps)), after], [warmup_steps])


def learning_rate_of(section: Section) -> optax.Schedule:
    """The schedule that config.training or config.tokenizer_training describes."""
    return learning_rate_schedule(
        section["schedule"],
        section["learning_rate"],
        section["warmup_steps"],
        section["num_steps"],
        section["decay_steps"],
    )


def cluster_weights_of(section: Section) -> list[optax.Schedule]:
    """λ of each level over the steps, as config.training describes it."""
    first = section["cluster_weights"]
    last = section["cluster_weights_end"] or (0.0,) * len(first)
    make = WEIGHT_SCHEDULES[section["cluster_weight_schedule"]]
    return [make(a, b, section["num_steps"]) for a, b in zip(first, last, strict=True)]


def lookahead_weight_of(section: Section) -> optax.Schedule | None:
    """The weight of the look-ahead: nothing in the first twentieth of the training, where the average has little to
    say, config.training's up to half of it, and half as much from there (Mirai-E: 2, then 1, on from 15 of 300
    epochs); None where there is none."""
    weight, steps = section["lookahead_weight"], section["num_steps"]
    if not weight:
        return None
    return lambda step: weight * ((step >= steps // 20) * 1.0 - (step >= steps // 2) * 0.5)


def differs_so_far(old: Section, new: Section, steps_done: int | None) -> bool:
    """Whether any of the steps done so far would have had another rate, or another λ, with the new section.

    A new end before the steps that are done is a difference, too.

    Args:
        steps_done: None is all steps of the old section.
    """
    if steps_done is None:
        steps_done = old["num_steps"]
    if new["num_steps"] < steps_done:
        return True
    for field, known in (("schedule", SCHEDULES), ("cluster_weight_schedule", WEIGHT_SCHEDULES)):
        if any(section[field] not in known for section in (old, new) if field in section):
            return True  # one that was added elsewhere, and is not known here
    steps = np.arange(steps_done)

    def values(section):
        found = [learning_rate_of(section)]
        if "cluster_weights" in section:
            found += cluster_weights_of(section)
        return [np.broadcast_to(schedule(steps), steps.shape) for schedule in found]

    before, after = values(old), values(new)
    return len(before) != len(after) or not all(map(np.array_equal, before, after))
