"""Autoregressive decoding: one compiled program, from class labels to codes, with a static KV cache."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from iar_jax.generators import guidance
from iar_jax.generators.autoregressive import decode_rows, decode_step
from iar_jax.generators.autoregressive.decode_step import block_length
from iar_jax.generators.autoregressive.transformer import Transformer
from iar_jax.generators.guidance import CONSTANT, Schedule
from iar_jax.runtime import sharding

# The cache grows this many times on the way, so that a step reads few positions that hold nothing yet; each time costs
# a compilation of the step. Short sequences do without.
NUM_PARTS = 8
SHORT = 128


def generate(
    module: Transformer,
    params: Any,
    labels: Int[Array | np.ndarray, " B"],
    keys: Key[Array, " B"],
    *,
    cfg_scale: float,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    greedy: bool = False,
    schedule: Schedule = CONSTANT,
) -> Int[Array, "B L"]:
    """Codes of one image for each label, [B, L] int32, in the ids that the model was trained on.

    Image i depends on labels[i] and keys[i] alone: the draw at position t uses fold_in(keys[i], t). In float32 the
    codes are the same for any batch; products in bfloat16 round differently from batch size to batch size, and now and
    then that turns a draw.

    Args:
        module, params: the transformer; its dtype is that of the computation and of the KV cache.
        labels: int32 in [0, num_classes).
        keys: one random key for each image.
        cfg_scale: scale of classifier-free guidance; 1 turns it off and halves the work.
        temperature: divides the guided logits; positive.
        top_k, top_p: restrict the draw; 0 and 1 leave it alone; see `guidance.draw`.
        greedy: take the most probable code instead of drawing.
        schedule: how the scale changes from the first code to the last.

    Raises:
        ValueError: a temperature or top_p out of range.
    """
    if temperature <= 0.0:
        raise ValueError(
            f"temperature is {temperature}; it must be positive (greedy=True takes the most probable code)"
        )
    if not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p is {top_p}; it must be in (0, 1]")
    return _generate(
        module,
        params,
        jnp.asarray(labels, jnp.int32),
        keys,
        np.float32(cfg_scale),
        np.float32(temperature),
        guided=guidance.is_guided(schedule, cfg_scale),
        top_k=top_k,
        top_p=top_p,
        greedy=greedy,
        schedule=schedule,
    )


def part_ends(module: Transformer) -> list[int]:
    """Positions up to which the cache has room, one part of the decoding after the other: whole blocks."""
    block = block_length(module)
    num_blocks = module.num_tokens // block
    num_parts = NUM_PARTS if module.num_tokens > SHORT else 1
    return sorted({block * -(-num_blocks * part // num_parts) for part in range(1, num_parts + 1)})


@functools.partial(jax.jit, static_argnames=("module", "guided", "top_k", "top_p", "greedy", "schedule"))
def _generate(module, params, labels, keys, cfg_scale, temperature, *, guided, top_k, top_p, greedy, schedule):
    # What reads well on a CPU is not what a matrix unit wants.
    layout = decode_step if sharding.platform() == "cpu" else decode_rows
    weights = layout.decode_weights(module, params)
    block = block_length(module)
    if guided:
        labels = layout.both(labels, jnp.full_like(labels, module.null_class))

    def choose(logits: Float[Array, "V B"], to_class, position):
        logits = logits.astype(jnp.float32)
        if guided:
            logits, to_class = layout.conditional_first(logits), layout.conditional_first(to_class)
            scale = guidance.scale_at(schedule, cfg_scale, position, module.num_tokens, jnp.split(to_class, 2)[0])
            logits = guidance.guide(logits, scale)
        if greedy:
            return jnp.argmax(logits, axis=0).astype(jnp.int32)
        step_keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, position)
        uniform = jax.vmap(jax.random.uniform)(step_keys)
        return guidance.draw(logits, uniform, temperature, top_k=top_k, top_p=top_p)

    def decode_block(carry, start):
        def step(carry, position):
            x, cache = carry
            logits, cache, to_class = layout.decode_step(module, weights, x, position, cache)
            with jax.named_scope("drawing"):
                codes = choose(logits, to_class, position)
            inputs = layout.both(codes, codes) if guided else codes
            return (layout.embed(weights, inputs), cache), codes

        (x, cache), codes = jax.lax.scan(step, carry, start + jnp.arange(block))
        return (x, layout.moved(cache, start)), codes

    x = module.apply({"params": params}, labels, method="embed_labels")[:, 0]
    x = x.T if layout is decode_step else x
    cache, found, begin = layout.empty_cache(module, labels.shape[0], 0), [], 0
    for end in part_ends(module):
        (x, cache), codes = jax.lax.scan(decode_block, (x, layout.grown(cache, end)), jnp.arange(begin, end, block))
        found.append(codes.reshape(end - begin, -1))
        begin = end
    return jnp.concatenate(found).T
