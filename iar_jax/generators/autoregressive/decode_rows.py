"""One step of decoding, laid out for TPUs and GPUs; `decode_step` is the same step for CPUs.

Activations are rows [B, D]. Keys and values lie as the products leave them, [B, T, all heads], so that a position is
written in one place and nothing is padded where heads are narrow. Attention's sums are products: queries of all heads
stand in a matrix whose other entries are zero, which a matrix unit multiplies in the time that it takes to read the
keys.
"""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from iar_jax.generators.autoregressive.transformer import Transformer
from iar_jax.models import attention_decode
from iar_jax.models.rope import rope_table, turning_tables
from iar_jax.runtime import sharding


class LayerWeights(NamedTuple):
    """Weights of one layer; H query heads and KV heads of keys and values, of K dimensions."""

    attention_norm: Float[Array, " D"]
    qkv: Float[Array, "D all_heads"]  # of queries and keys, then of what each of their dimensions is turned with
    out: Float[Array, "H_K D"]
    ffn_norm: Float[Array, " D"]
    gate: Float[Array, "D F"]
    up: Float[Array, "D F"]
    down: Float[Array, "F D"]


class DecodeWeights(NamedTuple):
    """What a step reads. `cos` and `sin` are `rope.turning_tables` of all heads of queries and keys."""

    layers: list[LayerWeights]
    tokens: Float[Array, "V D"]
    norm: Float[Array, " D"]
    head: Float[Array, "D V"]
    cos: Float[Array, "L turned"]
    sin: Float[Array, "L turned"]


class LayerCache(NamedTuple):
    """Keys and values of one layer, the class token first."""

    keys: Float[Array, "B T KV_K"]
    values: Float[Array, "B T KV_K"]


def decode_weights(module: Transformer, params: Any) -> DecodeWeights:
    """A transformer's parameters as a step wants them, in the module's dtype."""
    dim = module.dim

    def layer(p):
        wqkv, w13 = p["attention"]["wqkv"], p["feed_forward"]["w13"]
        q, k, v = wqkv[:, :, :-2].reshape(dim, -1), wqkv[:, :, -2].reshape(dim, -1), wqkv[:, :, -1].reshape(dim, -1)
        qk = jnp.concatenate([q, k], axis=1)
        return LayerWeights(
            p["attention_norm"]["weight"],
            jnp.concatenate([qk, qk.reshape(dim, -1, 2)[..., ::-1].reshape(qk.shape), v], axis=1),
            nn.with_logical_constraint(p["attention"]["wo"].reshape(-1, dim), ("heads", None)),
            p["ffn_norm"]["weight"],
            nn.with_logical_constraint(w13[:, 0], (None, "hidden")),
            nn.with_logical_constraint(w13[:, 1], (None, "hidden")),
            nn.with_logical_constraint(p["feed_forward"]["w2"], ("hidden", None)),
        )

    table = rope_table(module.grid_size, dim // module.num_heads, module.rope_base)[: module.num_tokens]
    cos, sin = turning_tables(jnp.asarray(table), module.num_heads + module.block_fields()["num_kv_heads"])
    weights = DecodeWeights(
        [layer(jax.tree.map(lambda p, i=i: p[i], params["layers"])) for i in range(module.num_layers)],
        nn.with_logical_constraint(params["token_table"], ("vocab", None)),
        params["norm"]["weight"],
        nn.with_logical_constraint(params["head"], (None, "vocab")),
        cos,
        sin,
    )
    cast = jax.tree.map(lambda w: w.astype(module.dtype), weights)
    return cast._replace(cos=cos, sin=sin)


def both(conditional: Int[Array, " B"], unconditional: Int[Array, " B"]) -> Int[Array, " both"]:
    """Labels or codes of guidance's two rows of each image, beside each other, so that a mesh leaves them on one
    device."""
    return jnp.stack([conditional, unconditional], axis=1).reshape(-1)


def conditional_first(rows: Float[Array, "... both"]) -> Float[Array, "... both"]:
    """All conditional rows, then all unconditional ones, from the order of `both`."""
    return jnp.concatenate([rows[..., ::2], rows[..., 1::2]], axis=-1)


def empty_cache(module: Transformer, batch_size: int, length: int) -> list[LayerCache]:
    """Zeros for the keys and values of every layer at `length` positions, sharded over rows and heads."""
    width = module.block_fields()["num_kv_heads"] * (module.dim // module.num_heads)

    def zeros():
        return nn.with_logical_constraint(
            jnp.zeros((batch_size, length, width), module.dtype), ("batch", None, "heads")
        )

    return [LayerCache(zeros(), zeros()) for _ in range(module.num_layers)]


def grown(cache: list[LayerCache], length: int) -> list[LayerCache]:
    """The cache with room for `length` positions."""
    more = length - cache[0].keys.shape[1]
    return jax.tree.map(lambda array: jnp.pad(array, ((0, 0), (0, more), (0, 0))), cache)


def moved(cache: list[LayerCache], start: Int[Array, ""]) -> list[LayerCache]:
    """Called after every block, as `decode_step.moved`: here each key is where it belongs."""
    return cache


def decode_step(
    module: Transformer,
    weights: DecodeWeights,
    x: Float[Array, "B D"],
    position: Int[Array, ""],
    cache: list[LayerCache],
) -> tuple[Float[Array, "V B"], list[LayerCache], Float[Array, " B"]]:
    """Logits for the code at `position` from its input embedding, the cache with that input written in, and the last
    layer's attention to the class token, the mean over heads."""
    cos, sin = (jax.lax.dynamic_slice_in_dim(table, position, 1) for table in (weights.cos, weights.sin))
    head_dim, width = module.dim // module.num_heads, cos.shape[1]
    to_class = jnp.zeros(x.shape[0])
    new_cache = []
    for layer, layer_cache in zip(weights.layers, cache, strict=True):
        with jax.named_scope("attention"):
            projected = rms_norm(x, layer.attention_norm, module.norm_eps) @ layer.qkv
            qk, partners, v = jnp.split(projected, [width, 2 * width], axis=1)
            qk = (qk.astype(jnp.float32) * cos + partners.astype(jnp.float32) * sin).astype(x.dtype)
            layer_cache = LayerCache(
                *(
                    jax.lax.dynamic_update_slice_in_dim(array, row[:, None], position, axis=1)
                    for array, row in zip(layer_cache, (qk[:, module.dim :], v), strict=True)
                )
            )
            out, to_class = attend(qk[:, : module.dim] * head_dim**-0.5, position, layer_cache, head_dim)
            x = x + out @ layer.out
        with jax.named_scope("feed_forward"):
            normed = rms_norm(x, layer.ffn_norm, module.norm_eps)
            x = x + (nn.silu(normed @ layer.gate) * (normed @ layer.up)) @ layer.down
        new_cache.append(layer_cache)
    with jax.named_scope("head"):
        logits = rms_norm(x, weights.norm, module.norm_eps) @ weights.head
    return nn.with_logical_constraint(logits, ("batch", "vocab")).T, new_cache, to_class


def attend(
    q: Float[Array, "B H_K"], position: Int[Array, ""], cache: LayerCache, head_dim: int
) -> tuple[Float[Array, "B H_K"], Float[Array, " B"]]:
    """Attention of one query a head, scaled, to all positions so far; and how much of it the class token gets."""
    if sharding.platform() == "tpu" and q.shape[1] == cache.keys.shape[2]:
        kernel = functools.partial(attention_decode.attend, head_dim=head_dim)
        mesh = jax.sharding.get_abstract_mesh()
        if not mesh.empty:
            rows = sharding.BATCH_SPEC[0]
            line, whole = PartitionSpec(rows, "tensor"), PartitionSpec(rows, None, "tensor")
            kernel = jax.shard_map(
                kernel, in_specs=(line, whole, whole, PartitionSpec()), out_specs=(line, line), check_vma=False
            )
        out, to_class = kernel(q, cache.keys, cache.values, position)
        return out, jnp.mean(to_class, axis=1)
    return attend_by_products(q.reshape(q.shape[0], -1, head_dim), position, cache)


def attend_by_products(
    q: Float[Array, "B H K"], position: Int[Array, ""], cache: LayerCache
) -> tuple[Float[Array, "B H_K"], Float[Array, " B"]]:
    """As `attend`, where there is no kernel, or heads share keys."""
    num_rows, num_heads, head_dim = q.shape
    kv_heads = cache.keys.shape[2] // head_dim
    own = jnp.arange(num_heads)[:, None] // (num_heads // kv_heads) == jnp.arange(kv_heads)
    spread = jnp.where(own[..., None], q[:, :, None], jnp.zeros((), q.dtype)).reshape(num_rows, num_heads, -1)
    scores = jnp.einsum("bhd,btd->bht", spread, cache.keys, preferred_element_type=jnp.float32)
    scores = jnp.where(jnp.arange(cache.keys.shape[1]) <= position, scores, -jnp.inf)
    weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    mixed = jnp.einsum("bht,btd->bhd", weights.astype(q.dtype), cache.values, preferred_element_type=jnp.float32)
    mixed = (mixed / total).reshape(num_rows, num_heads, kv_heads, head_dim)
    out = jnp.sum(jnp.where(own[..., None], mixed, 0.0), axis=2).astype(q.dtype)
    return out.reshape(num_rows, -1), jnp.mean(weights[..., 0] / total[..., 0], axis=1)


def embed(weights: DecodeWeights, codes: Int[Array, " B"]) -> Float[Array, "B D"]:
    """The inputs that codes become."""
    return nn.with_logical_constraint(weights.tokens[codes], ("batch", None))


def rms_norm(x: Float[Array, "B D"], weight: Float[Array, " D"], epsilon: float) -> Float[Array, "B D"]:
    """As `transformer.RMSNorm`."""
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + epsilon)
    return normed.astype(x.dtype) * weight
