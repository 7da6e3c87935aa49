"""Codes of pictures in a few passes: all positions begin masked, and each pass sets some of them.

Orders in which they are set:

* halton: along the Halton sequence, whose neighbours lie far apart; each pass draws anew what was set before
  (Halton-MaskGIT). halton_rolled begins at a place of the sequence that is drawn for each picture.
* confidence: those whose drawn codes are most probable, with Gumbel noise that fades; what is set stays (MaskGIT).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from iar_jax.generators.guidance import draw, guided, is_guided, scale_at
from iar_jax.generators.masked.masking import halton_order, masked_after_steps, set_after_steps
from iar_jax.generators.masked.transformer import MaskedTransformer
from iar_jax.generators.settings import SamplingSettings

# Logits that are there at once.
MOST_LOGITS = 1 << 26


class Drawn(NamedTuple):
    """A code for each position, and the log-probability that it was drawn with."""

    codes: Int[Array, "B L"]
    log_probability: Float[Array, "B L"]


class Numbers(NamedTuple):
    """Settings that a compiled program takes, each float32 []."""

    cfg_scale: Float[Array, ""]
    temperature: Float[Array, ""]
    temperature_end: Float[Array, ""]
    noise: Float[Array, ""]


class Static(NamedTuple):
    """Settings that a program is compiled for."""

    guided: bool
    schedule: Any
    top_k: int
    top_p: float
    steps: int
    order: str
    mask_schedule: str


def sample_codes(
    network: MaskedTransformer,
    params: Any,
    labels: Int[Array, " B"],
    keys: Key[Array, " B"],
    settings: SamplingSettings,
) -> Int[Array, "B L"]:
    """Rearranged ids; row i depends on labels[i] and keys[i] alone.

    Raises:
        ValueError: more steps than positions.
    """
    numbers = Numbers(
        *(
            jnp.float32(value)
            for value in (
                settings.cfg_scale,
                settings.temperature,
                settings.mask_temperature_end or settings.temperature,
                settings.mask_noise,
            )
        )
    )
    static = Static(
        is_guided(settings.schedule, settings.cfg_scale),
        settings.schedule,
        settings.top_k,
        settings.top_p,
        settings.mask_steps,
        settings.mask_order,
        settings.mask_schedule,
    )
    return states(network, params, labels, keys, numbers, static)[-1]


@functools.partial(jax.jit, static_argnums=(0, 5))
def states(
    network: MaskedTransformer,
    params: Any,
    labels: Int[Array, " B"],
    keys: Key[Array, " B"],
    numbers: Numbers,
    static: Static,
) -> Int[Array, "steps B L"]:
    """The codes after each step, `network.mask` where nothing is set yet."""
    length, steps = network.num_tokens, static.steps
    order = ORDERS[static.order](network, keys, numbers, static)

    def step(codes, t):
        progress = t / max(steps - 1, 1)
        # Halton-MaskGIT multiplies logits by a number that goes evenly: the temperature's reciprocal does.
        start, end = 1.0 / numbers.temperature, 1.0 / numbers.temperature_end
        temperature = 1.0 / (start + (end - start) * progress)
        scale = scale_at(static.schedule, numbers.cfg_scale, t, steps, jnp.zeros(labels.shape[0]))
        step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, t)
        drawn = drawn_codes(network, params, labels, codes, step_keys, scale, temperature, static)
        codes = order(codes, drawn, step_keys, t)
        # Published heads have the mask among their classes; what draws it at the end gets the last code.
        return codes, jnp.where(t == steps - 1, jnp.minimum(codes, network.vocab_size - 1), codes)

    masked = jnp.full((labels.shape[0], length), network.mask, jnp.int32)
    return jax.lax.scan(step, masked, jnp.arange(steps))[1]


def drawn_codes(network, params, labels, codes, keys, scale, temperature, static: Static) -> Drawn:
    """A code for every position from the model's prediction, the head and the draw a few positions at a time."""
    batch, length = codes.shape
    halves = 2 if static.guided else 1
    if static.guided:
        # A picture's two rows beside each other, so that a mesh has both on one device.
        labels = jnp.stack([labels, jnp.full_like(labels, network.null_class)], axis=1).reshape(-1)
        codes = jnp.repeat(codes, 2, axis=0)
    hidden = network.apply({"params": params}, labels, codes, method="hidden")
    hidden = hidden.reshape(batch, halves, length, -1)
    uniform = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, 0), (length,)))(keys)
    chunk = next(
        size
        for size in range(length, 0, -1)
        if length % size == 0 and (size == 1 or size * batch * halves * network.vocab_size <= MOST_LOGITS)
    )

    def part(start):
        rows = jax.lax.dynamic_slice_in_dim(hidden, start, chunk, axis=2).reshape(batch, halves * chunk, -1)
        logits = network.apply({"params": params}, rows, method="logits").astype(jnp.float32)
        logits = logits.reshape(batch, halves, chunk, -1)
        conditional, unconditional = logits[:, 0], logits[:, -1]
        if static.guided:
            conditional = guided(conditional, unconditional, jnp.reshape(scale, (-1, 1, 1)))
        tempered = conditional.reshape(batch * chunk, -1) / temperature
        draws = jax.lax.dynamic_slice_in_dim(uniform, start, chunk, axis=1).reshape(-1)
        found = draw(tempered.T, draws, jnp.float32(1.0), top_k=static.top_k, top_p=static.top_p)
        chosen = jnp.take_along_axis(tempered, found[:, None], axis=-1)[:, 0]
        return Drawn(*(x.reshape(batch, chunk) for x in (found, chosen - jax.nn.logsumexp(tempered, axis=-1))))

    parts = jax.lax.map(part, jnp.arange(0, length, chunk))
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(batch, length), parts)


def along_halton(rolled: bool, network, keys, numbers: Numbers, static: Static):
    """Sets positions along the Halton sequence, and draws those that are set anew."""
    length = network.num_tokens
    places = np.empty(length, np.int32)
    places[halton_order(network.grid_size)] = np.arange(length)
    counts = jnp.asarray(set_after_steps(static.mask_schedule, length, static.steps))

    def first_place(key):
        return jax.random.randint(jax.random.fold_in(key, static.steps), (), 0, length)

    offsets = jax.vmap(first_place)(keys) if rolled else jnp.zeros(keys.shape, jnp.int32)
    place = (places[None] + offsets[:, None]) % length

    def set_some(codes, drawn: Drawn, step_keys, t):
        return jnp.where(place < counts[t], drawn.codes, codes)

    return set_some


def by_confidence(network, keys, numbers: Numbers, static: Static):
    """Sets the positions whose draws are most probable; those that are set stay."""
    length = network.num_tokens
    counts = jnp.asarray(masked_after_steps(static.mask_schedule, length, static.steps))

    def set_some(codes, drawn: Drawn, step_keys, t):
        unknown: Bool[Array, "B L"] = codes == network.mask
        noise = jax.vmap(lambda key: jax.random.gumbel(jax.random.fold_in(key, 1), (length,)))(step_keys)
        fading = numbers.noise * (1.0 - (t + 1) / static.steps)
        confidence = jnp.where(unknown, drawn.log_probability + fading * noise, jnp.inf)
        bar = jnp.take(jnp.sort(confidence, axis=1), counts[t], axis=1)[:, None]
        stays = unknown & (confidence < bar)
        # A draw of the mask itself would leave a position unknown for good.
        found = jnp.minimum(drawn.codes, network.vocab_size - 1)
        return jnp.where(unknown & ~stays, found, codes)

    return set_some


# config.sampling.mask_order.
ORDERS: dict[str, Callable[..., Callable]] = {
    "halton": functools.partial(along_halton, False),
    "halton_rolled": functools.partial(along_halton, True),
    "confidence": by_confidence,
}
