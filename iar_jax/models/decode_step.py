"""One step of decoding: the transformer for a single position of each row, with its keys and values kept.

The same function as `Transformer`, laid out for what a step costs, which is reading weights and cache: weights lie
[out, in] and are cast and padded once before the first step, keys lie [K, T] and values [T, K] so that sums over both
run along contiguous rows. A key written there touches as many cache lines as it has numbers, so the last few positions
lie by themselves, [R, K], and are moved together. The cache has room for the positions of a part of the decoding alone,
and grows from part to part.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from iar_jax.models.rope import rope_table
from iar_jax.models.transformer import Transformer

# Heads are padded with zeros to a multiple of so many dimensions, for aligned reads: 3B's have 100.
HEAD_DIM_MULTIPLE = 8
# Positions that are moved to the long cache together.
RECENT = 8


class LayerWeights(NamedTuple):
    """Weights of one layer; G query heads share one of KV heads of keys and values, and K is the padded head dim."""

    attention_norm: Float[Array, " D"]
    qkv: Float[Array, "KV group_and_2 K D"]
    out: Float[Array, "D KV G K"]
    ffn_norm: Float[Array, " D"]
    gate_and_up: Float[Array, "two F D"]
    down: Float[Array, "D F"]


class DecodeWeights(NamedTuple):
    """What a step reads. `rope` holds cos and sin of the positions."""

    layers: list[LayerWeights]
    tokens: Float[Array, "V D"]
    norm: Float[Array, " D"]
    head: Float[Array, "V D"]
    rope: Float[Array, "L half 2"]


class LayerCache(NamedTuple):
    """Keys and values of one layer at whole blocks of R positions, the class token first."""

    keys: Float[Array, "B KV K T"]
    values: Float[Array, "B KV T K"]


class RecentCache(NamedTuple):
    """Keys and values of one layer in the block of R positions that is being decoded."""

    keys: Float[Array, "B KV R K"]
    values: Float[Array, "B KV R K"]


def block_length(module: Transformer) -> int:
    """R: the largest divisor of the number of codes that is not above RECENT."""
    return max(length for length in range(1, RECENT + 1) if module.num_tokens % length == 0)


def padded_head_dim(module: Transformer) -> int:
    return -(-module.dim // module.num_heads // HEAD_DIM_MULTIPLE) * HEAD_DIM_MULTIPLE


def decode_weights(module: Transformer, params: Any) -> DecodeWeights:
    """A transformer's parameters as a step wants them, in the module's dtype."""
    head_dim = module.dim // module.num_heads
    padding = padded_head_dim(module) - head_dim
    kv_heads = module.block_fields()["num_kv_heads"]

    def layer(p):
        qkv = jnp.pad(jnp.moveaxis(p["attention"]["wqkv"], 0, -1), ((0, 0), (0, 0), (0, padding), (0, 0)))
        out = jnp.pad(jnp.moveaxis(p["attention"]["wo"], -1, 0), ((0, 0), (0, 0), (0, padding)))
        out = out.reshape(module.dim, kv_heads, -1, out.shape[-1])
        return LayerWeights(
            p["attention_norm"]["weight"],
            nn.with_logical_constraint(qkv, ("heads", None, None, None)),
            nn.with_logical_constraint(out, (None, "heads", None, None)),
            p["ffn_norm"]["weight"],
            nn.with_logical_constraint(jnp.moveaxis(p["feed_forward"]["w13"], 0, -1), (None, "hidden", None)),
            nn.with_logical_constraint(p["feed_forward"]["w2"].T, (None, "hidden")),
        )

    table = rope_table(module.grid_size, head_dim, module.rope_base)[: module.num_tokens]
    weights = DecodeWeights(
        [layer(jax.tree.map(lambda p, i=i: p[i], params["layers"])) for i in range(module.num_layers)],
        nn.with_logical_constraint(params["token_table"], ("vocab", None)),
        params["norm"]["weight"],
        nn.with_logical_constraint(params["head"].T, ("vocab", None)),
        jnp.asarray(np.pad(table, ((0, 0), (0, padding // 2), (0, 0)))),
    )
    cast = jax.tree.map(lambda w: w.astype(module.dtype), weights)
    return cast._replace(rope=weights.rope)


def empty_cache(module: Transformer, batch_size: int, length: int) -> list[LayerCache]:
    """Zeros for the keys and values of every layer at `length` positions, sharded over rows and heads."""
    kv_heads, head_dim = module.block_fields()["num_kv_heads"], padded_head_dim(module)

    def zeros(*shape):
        return nn.with_logical_constraint(jnp.zeros(shape, module.dtype), ("batch", "heads", None, None))

    return [
        LayerCache(zeros(batch_size, kv_heads, head_dim, length), zeros(batch_size, kv_heads, length, head_dim))
        for _ in range(module.num_layers)
    ]


def empty_recent(module: Transformer, batch_size: int) -> list[RecentCache]:
    """Zeros for the block that is being decoded, of every layer."""
    shape = (batch_size, module.block_fields()["num_kv_heads"], block_length(module), padded_head_dim(module))
    zeros = nn.with_logical_constraint(jnp.zeros(shape, module.dtype), ("batch", "heads", None, None))
    return [RecentCache(zeros, zeros) for _ in range(module.num_layers)]


def grown(cache: list[LayerCache], length: int) -> list[LayerCache]:
    """The cache with room for `length` positions."""
    more = length - cache[0].keys.shape[-1]
    return [
        LayerCache(
            jnp.pad(layer.keys, ((0, 0), (0, 0), (0, 0), (0, more))),
            jnp.pad(layer.values, ((0, 0), (0, 0), (0, more), (0, 0))),
        )
        for layer in cache
    ]


def moved(cache: list[LayerCache], recent: list[RecentCache], start: Int[Array, ""]) -> list[LayerCache]:
    """The cache with a finished block, whose first position is `start`, written in."""
    return [
        LayerCache(
            jax.lax.dynamic_update_slice_in_dim(layer.keys, block.keys.swapaxes(2, 3), start, axis=3),
            jax.lax.dynamic_update_slice_in_dim(layer.values, block.values, start, axis=2),
        )
        for layer, block in zip(cache, recent, strict=True)
    ]


def decode_step(
    module: Transformer,
    weights: DecodeWeights,
    x: Float[Array, "B D"],
    position: Int[Array, ""],
    cache: list[LayerCache],
    recent: list[RecentCache],
) -> tuple[Float[Array, "B V"], list[RecentCache], Float[Array, " B"]]:
    """Logits for the code at `position` from its input embedding, the recent block with that input written in, and the
    last layer's attention to the class token, the mean over heads.

    Args:
        cache: all blocks before the one of `position`, at least; it may have room for more.
    """
    rope = jax.lax.dynamic_slice_in_dim(weights.rope, position, 1)[0]
    to_class = jnp.zeros(x.shape[0])
    new_recent = []
    for layer, layer_cache, layer_recent in zip(weights.layers, cache, recent, strict=True):
        normed = rms_norm(x, layer.attention_norm, module.norm_eps)
        qkv = product(normed, layer.qkv.reshape(-1, module.dim)).reshape(-1, *layer.qkv.shape[:3])
        qkv = nn.with_logical_constraint(qkv, ("batch", "heads", None, None))
        qk = turn(qkv[:, :, :-1], rope)
        offset = position % block_length(module)
        layer_recent = RecentCache(
            jax.lax.dynamic_update_slice_in_dim(layer_recent.keys, qk[:, :, -1:], offset, axis=2),
            jax.lax.dynamic_update_slice_in_dim(layer_recent.values, qkv[:, :, -1:], offset, axis=2),
        )
        scale = (module.dim // module.num_heads) ** -0.5
        out, to_class = attend(qk[:, :, :-1], scale, position, layer_cache, layer_recent)
        x = x + product(out.reshape(x.shape[0], -1).astype(x.dtype), layer.out.reshape(module.dim, -1))
        normed = rms_norm(x, layer.ffn_norm, module.norm_eps)
        hidden = product(normed, layer.gate_and_up.reshape(-1, module.dim)).reshape(-1, 2, module.hidden_dim)
        hidden = nn.with_logical_constraint(hidden, ("batch", None, "hidden"))
        x = x + product(nn.silu(hidden[:, 0]) * hidden[:, 1], layer.down)
        new_recent.append(layer_recent)
    logits = product(rms_norm(x, weights.norm, module.norm_eps), weights.head)
    return nn.with_logical_constraint(logits, ("batch", "vocab")), new_recent, to_class


def attend(
    q: Float[Array, "B KV G K"], scale: float, position: Int[Array, ""], cache: LayerCache, recent: RecentCache
) -> tuple[Float[Array, "B KV G K"], Float[Array, " B"]]:
    """Attention of one query a head to all positions so far, in float32; and how much of it the class token gets.

    Products are sums of elementwise products: with one query there is nothing to gain from a matrix unit, and the cache
    is read once, as it lies. Queries that share keys go one after the other, and scores are scaled after the sum: XLA's
    CPU loops over five axes are ten times slower, those that scale queries inside the sum a third.
    """
    keys, values, near_keys, near_values = (
        array.astype(jnp.float32) for array in (cache.keys, cache.values, recent.keys, recent.values)
    )
    offset = position % near_keys.shape[2]
    before = jnp.arange(keys.shape[3]) < position - offset
    within = jnp.arange(near_keys.shape[2]) <= offset

    def one(query):
        query = query.astype(jnp.float32)
        far = jnp.where(before, scale * jnp.sum(query[..., None] * keys, axis=2), -jnp.inf)
        near = jnp.where(within, scale * jnp.sum(query[:, :, None] * near_keys, axis=3), -jnp.inf)
        largest = jnp.maximum(jnp.max(far, axis=-1), jnp.max(near, axis=-1))[..., None]
        far, near = jnp.exp(far - largest), jnp.exp(near - largest)
        total = jnp.sum(far, axis=-1) + jnp.sum(near, axis=-1)
        out = jnp.sum(far[..., None] * values, axis=2) + jnp.sum(near[..., None] * near_values, axis=2)
        first = jnp.where(position < near_keys.shape[2], near[..., 0], far[..., 0])
        return out / total[..., None], first / total

    out, to_class = zip(*(one(q[:, :, g]) for g in range(q.shape[2])), strict=True)
    return jnp.stack(out, axis=2), jnp.mean(jnp.stack(to_class), axis=(0, 2))


def embed(weights: DecodeWeights, codes: Int[Array, " B"]) -> Float[Array, "B D"]:
    """The inputs that codes become."""
    return nn.with_logical_constraint(weights.tokens[codes], ("batch", None))


def product(x: Float[Array, "B I"], weight: Float[Array, "O I"]) -> Float[Array, "B O"]:
    """x times the transposed weight; with the weight as the left factor, which is faster where rows are few."""
    return (weight @ x.T).T


def rms_norm(x: Float[Array, "B D"], weight: Float[Array, " D"], epsilon: float) -> Float[Array, "B D"]:
    """As `transformer.RMSNorm`."""
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + epsilon)
    return normed.astype(x.dtype) * weight


def turn(x: Float[Array, "B KV G K"], rope: Float[Array, "half 2"]) -> Float[Array, "B KV G K"]:
    """As `rope.apply_rope`, at one position."""
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    cos, sin = rope[:, 0], rope[:, 1]
    first, second = pairs[..., 0], pairs[..., 1]
    turned = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)
