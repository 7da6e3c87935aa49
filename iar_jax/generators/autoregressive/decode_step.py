"""One step of decoding on CPUs: the transformer for a single position of each row, with its keys and values kept.
`decode_rows` is the same step for TPUs and GPUs, by the same names.

The same function as `Transformer`, laid out for what a step costs, which is reading weights and cache: weights lie
[out, in] and activations [D, B], so that products take weights as they lie; they are cast and padded once before the
first step. Keys lie [K, T] and values [T, K], so that sums over both run along contiguous rows. A key written there
touches as many cache lines as it has numbers, so the last few keys lie by themselves, [R, K], and are moved together.
The cache has room for the positions of a part of the decoding alone, and grows from part to part.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from iar_jax.generators.autoregressive.transformer import Transformer
from iar_jax.models.rope import rope_table

# Heads are padded with zeros to a multiple of so many dimensions, for aligned reads: 3B's have 100.
HEAD_DIM_MULTIPLE = 8
# Positions whose keys are moved to where the others lie together.
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
    """Keys and values of one layer, the class token first; keys of the block of R positions that is being decoded lie
    in `recent_keys` until the block is done."""

    keys: Float[Array, "B KV K T"]
    recent_keys: Float[Array, "B KV R K"]
    values: Float[Array, "B KV T K"]


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


def both(conditional: Int[Array, " B"], unconditional: Int[Array, " B"]) -> Int[Array, " both"]:
    """Labels or codes of guidance's two rows of each image: the conditional ones, then the others."""
    return jnp.concatenate([conditional, unconditional])


def conditional_first(rows: Float[Array, "... both"]) -> Float[Array, "... both"]:
    """As `decode_rows.conditional_first`: here they are."""
    return rows


def empty_cache(module: Transformer, batch_size: int, length: int) -> list[LayerCache]:
    """Zeros for the keys and values of every layer at `length` positions, sharded over rows and heads."""
    kv_heads, head_dim = module.block_fields()["num_kv_heads"], padded_head_dim(module)

    def zeros(*shape):
        return nn.with_logical_constraint(jnp.zeros(shape, module.dtype), ("batch", "heads", None, None))

    return [
        LayerCache(
            keys=zeros(batch_size, kv_heads, head_dim, length),
            recent_keys=zeros(batch_size, kv_heads, block_length(module), head_dim),
            values=zeros(batch_size, kv_heads, length, head_dim),
        )
        for _ in range(module.num_layers)
    ]


def grown(cache: list[LayerCache], length: int) -> list[LayerCache]:
    """The cache with room for `length` positions."""
    more = length - cache[0].keys.shape[-1]
    return [
        layer._replace(
            keys=jnp.pad(layer.keys, ((0, 0), (0, 0), (0, 0), (0, more))),
            values=jnp.pad(layer.values, ((0, 0), (0, 0), (0, more), (0, 0))),
        )
        for layer in cache
    ]


def moved(cache: list[LayerCache], start: Int[Array, ""]) -> list[LayerCache]:
    """The cache with the recent keys, the first of which belongs to position `start`, among the others."""
    return [
        layer._replace(
            keys=jax.lax.dynamic_update_slice_in_dim(layer.keys, layer.recent_keys.swapaxes(2, 3), start, axis=3)
        )
        for layer in cache
    ]


def decode_step(
    module: Transformer,
    weights: DecodeWeights,
    x: Float[Array, "D B"],
    position: Int[Array, ""],
    cache: list[LayerCache],
) -> tuple[Float[Array, "V B"], list[LayerCache], Float[Array, " B"]]:
    """Logits for the code at `position` from its input embedding, the cache with that input written in, and the last
    layer's attention to the class token, the mean over heads.

    Args:
        cache: of all positions before, with room for the whole block of this one; keys of finished blocks have been
            moved.
    """
    rope = jax.lax.dynamic_slice_in_dim(weights.rope, position, 1)[0]
    offset, scale = position % block_length(module), (module.dim // module.num_heads) ** -0.5
    num_rows = x.shape[1]
    to_class = jnp.zeros(num_rows)
    new_cache = []
    for layer, layer_cache in zip(weights.layers, cache, strict=True):
        with jax.named_scope("attention"):
            normed = rms_norm(x, layer.attention_norm, module.norm_eps)
            qkv = (layer.qkv.reshape(-1, module.dim) @ normed).reshape(*layer.qkv.shape[:3], num_rows)
            qkv = nn.with_logical_constraint(qkv, ("heads", None, None, "batch"))
            qk, v = jnp.moveaxis(turn(qkv[:, :-1], rope), -1, 0), jnp.moveaxis(qkv[:, -1:], -1, 0)
            layer_cache = layer_cache._replace(
                recent_keys=jax.lax.dynamic_update_slice_in_dim(layer_cache.recent_keys, qk[:, :, -1:], offset, axis=2),
                values=jax.lax.dynamic_update_slice_in_dim(layer_cache.values, v, position, axis=2),
            )
            out, to_class = attend(qk[:, :, :-1], scale, position, layer_cache)
            x = x + layer.out.reshape(module.dim, -1) @ out.reshape(num_rows, -1).T.astype(x.dtype)
        with jax.named_scope("feed_forward"):
            normed = rms_norm(x, layer.ffn_norm, module.norm_eps)
            gate, up = (layer.gate_and_up.reshape(-1, module.dim) @ normed).reshape(2, module.hidden_dim, num_rows)
            x = x + layer.down @ nn.with_logical_constraint(nn.silu(gate) * up, ("hidden", "batch"))
        new_cache.append(layer_cache)
    with jax.named_scope("head"):
        logits = weights.head @ rms_norm(x, weights.norm, module.norm_eps)
    return nn.with_logical_constraint(logits, ("vocab", "batch")), new_cache, to_class


def attend(
    q: Float[Array, "B KV G K"], scale: float, position: Int[Array, ""], cache: LayerCache
) -> tuple[Float[Array, "B KV G K"], Float[Array, " B"]]:
    """Attention of one query a head to all positions so far, in float32; and how much of it the class token gets.

    The long products are sums of elementwise products: with one query there is nothing to gain from a matrix unit, and
    the cache is read once, as it lies. Queries that share keys go one after the other, and scores are scaled after the
    sum: XLA's CPU loops over five axes are ten times slower, those that scale queries inside the sum a third.
    """
    keys, recent_keys, values = (array.astype(jnp.float32) for array in cache)
    num_recent = recent_keys.shape[2]
    so_far = jnp.arange(keys.shape[3]) <= position

    def one(query):
        query = query.astype(jnp.float32)
        scores = scale * jnp.sum(query[..., None] * keys, axis=2)
        recent = scale * jnp.einsum("bhk,bhrk->bhr", query, recent_keys, precision="highest")
        scores = jax.lax.dynamic_update_slice_in_dim(scores, recent, position // num_recent * num_recent, axis=2)
        scores = jnp.where(so_far, scores, -jnp.inf)
        largest = jnp.max(scores, axis=-1, keepdims=True)
        weights = jnp.exp(scores - largest)
        total = jnp.sum(weights, axis=-1)
        return jnp.sum(weights[..., None] * values, axis=2) / total[..., None], weights[..., 0] / total

    out, to_class = zip(*(one(q[:, :, g]) for g in range(q.shape[2])), strict=True)
    return jnp.stack(out, axis=2), jnp.mean(jnp.stack(to_class), axis=(0, 2))


def embed(weights: DecodeWeights, codes: Int[Array, " B"]) -> Float[Array, "D B"]:
    """The inputs that codes become."""
    return nn.with_logical_constraint(weights.tokens[codes].T, (None, "batch"))


def rms_norm(x: Float[Array, "D B"], weight: Float[Array, " D"], epsilon: float) -> Float[Array, "D B"]:
    """As `transformer.RMSNorm`."""
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=0) + epsilon)
    return normed.astype(x.dtype) * weight[:, None]


def turn(x: Float[Array, "KV G K B"], rope: Float[Array, "half 2"]) -> Float[Array, "KV G K B"]:
    """As `rope.apply_rope`, at one position."""
    pairs = x.astype(jnp.float32).reshape(*x.shape[:2], -1, 2, x.shape[-1])
    cos, sin = rope[:, :1], rope[:, 1:]
    first, second = pairs[..., 0, :], pairs[..., 1, :]
    turned = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=-2)
    return turned.reshape(x.shape).astype(x.dtype)
