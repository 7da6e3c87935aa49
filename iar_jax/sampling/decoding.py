"""Autoregressive decoding: one compiled program with a static KV cache."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from iar_jax.models.transformer import Block, LayerCache, Transformer
from iar_jax.sampling import guidance


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
) -> Int[Array, "B L"]:
    """Codes of one image for each label, [B, L] int32, in the ids that the model was trained on.

    Image i depends on labels[i] and keys[i] alone: the draw at position t uses fold_in(keys[i], t).

    Args:
        module, params: the transformer; its dtype is that of the computation and of the KV cache.
        labels: int32 in [0, num_classes).
        keys: one random key for each image.
        cfg_scale: scale of classifier-free guidance; 1 turns it off and halves the work.
        temperature: divides the guided logits; positive.
        top_k, top_p: restrict the draw; 0 and 1 leave it alone.
        greedy: take the most probable code instead of drawing.

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
        jnp.float32(cfg_scale),
        jnp.float32(temperature),
        guided=cfg_scale != 1.0,
        top_k=top_k,
        top_p=top_p,
        greedy=greedy,
    )


def empty_cache(module: Transformer, batch_size: int) -> list[LayerCache]:
    """Zeros for the keys and values of every layer."""
    kv_heads = module.block_fields()["num_kv_heads"]
    shape = (batch_size, module.num_tokens, kv_heads, module.dim // module.num_heads)
    return [
        LayerCache(jnp.zeros(shape, module.dtype), jnp.zeros(shape, module.dtype)) for _ in range(module.num_layers)
    ]


def decode_step(
    module: Transformer,
    params: Any,
    layers: list[Any],
    x: Float[Array, "B 1 D"],
    position: Int[Array, ""],
    cache: list[LayerCache],
) -> tuple[Float[Array, "B V"], list[LayerCache]]:
    """Logits for the code at `position` from its input embedding, and the cache with that input written in.

    Args:
        layers: the parameters of each layer, unstacked.
    """
    block = Block(**module.block_fields())
    rope = jax.lax.dynamic_slice_in_dim(module.rope(), position, 1)
    new_cache = []
    for layer_params, layer_cache in zip(layers, cache, strict=True):
        x, layer_cache = block.apply({"params": layer_params}, x, rope, layer_cache, position)
        new_cache.append(layer_cache)
    return module.apply({"params": params}, x, method="logits")[:, 0], new_cache


@functools.partial(jax.jit, static_argnames=("module", "guided", "top_k", "top_p", "greedy"))
def _generate(module, params, labels, keys, cfg_scale, temperature, *, guided, top_k, top_p, greedy):
    layers = [jax.tree.map(lambda p, i=i: p[i], params["layers"]) for i in range(module.num_layers)]
    variables = {"params": params}
    if guided:
        labels = jnp.concatenate([labels, jnp.full_like(labels, module.null_class)])

    def choose(logits, position):
        logits = logits.astype(jnp.float32)
        if guided:
            logits = guidance.guide(logits, cfg_scale)
        if greedy:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        logits = guidance.keep_top_p(guidance.keep_top_k(logits / temperature, top_k), top_p)
        step_keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, position)
        return jax.vmap(jax.random.categorical)(step_keys, logits).astype(jnp.int32)

    def step(carry, position):
        x, cache = carry
        logits, cache = decode_step(module, params, layers, x, position, cache)
        codes = choose(logits, position)
        inputs = jnp.concatenate([codes, codes]) if guided else codes
        return (module.apply(variables, inputs[:, None], method="embed_codes"), cache), codes

    start = module.apply(variables, labels, method="embed_labels")
    cache = empty_cache(module, labels.shape[0])
    _, codes = jax.lax.scan(step, (start, cache), jnp.arange(module.num_tokens))
    return codes.T
