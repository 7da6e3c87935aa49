"""From logits to the next code: classifier-free guidance and its schedules, temperature, top-k, top-p, the draw."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Schedule(NamedTuple):
    """How the scale of guidance goes from the first code to the last.

    Attributes:
        kind: a key of GUIDANCE.
        start: the scale that linear and iar2 begin with.
        first, last: codes of the interval; a last of 0 is the end.
    """

    kind: str = "constant"
    start: float = 1.0
    first: int = 0
    last: int = 0
    power: float = 1.0
    attention_weight: float = 0.05


CONSTANT = Schedule()


class Progress(NamedTuple):
    """Where decoding is: the code at `position` of `num_tokens` is next, and the last layer's attention to the class
    token, the mean over heads of the conditional row, is `to_class`."""

    position: Int[Array, ""]
    num_tokens: int
    to_class: Float[Array, " B"]

    @property
    def last(self) -> int:
        """The last position; 1 where there is but one, to divide by."""
        return max(self.num_tokens - 1, 1)


def constant(schedule: Schedule, cfg_scale: Float[Array, ""], at: Progress) -> Float[Array, ""]:
    """The scale itself."""
    return cfg_scale


def interval(schedule: Schedule, cfg_scale: Float[Array, ""], at: Progress) -> Float[Array, ""]:
    """The scale for first <= t < last, and no guidance elsewhere (LlamaGen's cfg_interval is `last`)."""
    inside = (at.position >= schedule.first) & (at.position < (schedule.last or at.num_tokens))
    return jnp.where(inside, cfg_scale, 1.0)


def linear(schedule: Schedule, cfg_scale: Float[Array, ""], at: Progress) -> Float[Array, ""]:
    """From `start` at the first code to the scale at the last."""
    return schedule.start + (cfg_scale - schedule.start) * at.position / at.last


def power_cosine(schedule: Schedule, cfg_scale: Float[Array, ""], at: Progress) -> Float[Array, ""]:
    """1 + (s - 1) (1 - cos(pi (t / L) ** power)) / 2 for a scale of s, as RAR."""
    rise = (1.0 - jnp.cos(jnp.pi * (at.position / at.num_tokens) ** schedule.power)) / 2.0
    return 1.0 + (cfg_scale - 1.0) * rise


def iar2(schedule: Schedule, cfg_scale: Float[Array, ""], at: Progress) -> Float[Array, " B"]:
    """start + (s - start) w with w = t / (L - 1) + attention_weight * the attention to the class token (IAR2's
    adaptive scale)."""
    weight = at.position / at.last + schedule.attention_weight * at.to_class
    return schedule.start + (cfg_scale - schedule.start) * weight


class Guidance(NamedTuple):
    """A schedule of guidance.

    Attributes:
        scale: the scale for the code that is next, for all images or each.
        from_start: whether it begins at Schedule.start, so that a scale of 1 can be guidance too.
        label: what it adds to the name of samples.
    """

    scale: Callable[[Schedule, Float[Array, ""], Progress], Float[Array, "*B"]]
    from_start: bool
    label: Callable[[Schedule], str]


GUIDANCE: dict[str, Guidance] = {
    "constant": Guidance(constant, False, lambda s: ""),
    "interval": Guidance(interval, False, lambda s: f"-interval{s.first}to{s.last}"),
    "linear": Guidance(linear, True, lambda s: f"-linear{s.start:g}"),
    "power_cosine": Guidance(power_cosine, False, lambda s: f"-powercosine{s.power:g}"),
    "iar2": Guidance(iar2, True, lambda s: f"-iar2from{s.start:g}a{s.attention_weight:g}"),
}


def is_guided(schedule: Schedule, cfg_scale: float) -> bool:
    """Whether any code's scale is other than 1."""
    return cfg_scale != 1.0 or (GUIDANCE[schedule.kind].from_start and schedule.start != 1.0)


def scale_at(
    schedule: Schedule,
    cfg_scale: Float[Array, ""],
    position: Int[Array, ""],
    num_tokens: int,
    to_class: Float[Array, " B"],
) -> Float[Array, "*B"]:
    """The scale for the code at `position`, for all images or each."""
    return GUIDANCE[schedule.kind].scale(schedule, cfg_scale, Progress(position, num_tokens, to_class))


def guide(logits: Float[Array, "V both"], cfg_scale: Float[Array, "*B"]) -> Float[Array, "V B"]:
    """Classifier-free guidance, u + s * (c - u).

    Args:
        logits: those of conditional rows c first, then of as many unconditional rows u.
        cfg_scale: s, one or one for each image; 1 is no guidance.
    """
    conditional, unconditional = jnp.split(logits, 2, axis=1)
    return guided(conditional, unconditional, cfg_scale)


def guided(
    conditional: Float[Array, "..."], unconditional: Float[Array, "..."], cfg_scale: Float[Array, "..."]
) -> Float[Array, "..."]:
    """u + s * (c - u) of logits c and u of the same codes; s has a shape that goes with theirs."""
    return unconditional + cfg_scale * (conditional - unconditional)


def draw(
    logits: Float[Array, "V B"],
    uniform: Float[Array, " B"],
    temperature: Float[Array, ""],
    *,
    top_k: int,
    top_p: float,
) -> Int[Array, " B"]:
    """The code at which the distribution's sum passes `uniform`, for each row.

    Nothing is sorted unless top_p asks for it, and then only the top_k largest where k is given.

    Args:
        uniform: in [0, 1).
        top_k: draw among the k largest logits alone (of equal ones at the end, those with lower ids); 0 is all.
        top_p: draw among the smallest set of codes whose probabilities, after top_k, add up to at least p; the most
            probable one is always in it; 1 is all.
    """
    vocab_size = logits.shape[0]
    # Divided first: XLA's CPU would draw a transposition of bare logits into the head's product, which takes four times
    # as long then.
    logits = (logits / temperature).T
    top_k = min(top_k, vocab_size) or vocab_size
    if top_k == vocab_size and top_p >= 1.0:
        return pick(jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True)), uniform)
    values, ids = jax.lax.top_k(logits, top_k)
    probabilities = jax.nn.softmax(values, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    probabilities = jnp.where(before < top_p, probabilities, 0.0)
    return jnp.take_along_axis(ids, pick(probabilities, uniform)[:, None], axis=-1)[:, 0]


def pick(weights: Float[Array, "B V"], uniform: Float[Array, " B"]) -> Int[Array, " B"]:
    """Where the running sum of weights, which need not add up to one, passes uniform * their sum.

    In two steps, over blocks of the row and inside one: a running sum over a whole vocabulary takes many passes.
    """
    rows, size = weights.shape
    block = next((block for block in (128, 64, 32) if size % block == 0 and size > block), size)
    blocks = weights.reshape(rows, -1, block)
    sums = jnp.cumsum(jnp.sum(blocks, axis=-1), axis=-1)
    target = uniform * sums[:, -1]
    chosen = passed(sums, target)
    before = jnp.where(chosen > 0, jnp.take_along_axis(sums, jnp.maximum(chosen - 1, 0)[:, None], axis=-1)[:, 0], 0.0)
    inside = jnp.cumsum(jnp.take_along_axis(blocks, chosen[:, None, None], axis=1)[:, 0], axis=-1)
    return (chosen * block + passed(inside, target - before)).astype(jnp.int32)


def passed(sums: Float[Array, "B N"], target: Float[Array, " B"]) -> Int[Array, " B"]:
    """The first place whose running sum is above the target; where rounding leaves none, the last with any weight."""
    first = jnp.sum(sums <= target[:, None], axis=-1)
    return jnp.minimum(first, jnp.sum(sums < sums[:, -1:], axis=-1))
