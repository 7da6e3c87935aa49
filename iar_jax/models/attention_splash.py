"""Splash attention, JAX's own kernel for TPUs."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask
from jaxtyping import Array, Float

from iar_jax.models.remat import KEPT
from iar_jax.runtime import sharding

# The kernel reads rows of so many numbers.
LANES = 128
LARGEST_BLOCK = 512


def attend(
    q: Float[Array, "B T H K"], k: Float[Array, "B T H2 K"], v: Float[Array, "B T H2 K"], causal: bool
) -> Float[Array, "B T H K"]:
    """Attention of queries and keys that are turned already; off TPUs the kernel is interpreted.

    Lengths and heads are padded with zeros to multiples of 128: 576 positions to 640. The padding comes last, where no
    causal query sees it; elsewhere it is a segment of its own. Heads of 64 stay as they are.
    """
    _, length, num_heads, head_dim = q.shape
    more, wider = -length % LANES, -head_dim % LANES if head_dim > LANES // 2 else -head_dim % (LANES // 2)
    heads_first = [
        jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, more), (0, wider))) for x in (q * head_dim**-0.5, k, v)
    ]
    padded = length + more
    kernel = kernel_of(num_heads, padded, causal, interpret=sharding.platform() != "tpu")
    if more and not causal:
        segments = (jnp.arange(padded) >= length).astype(jnp.int32)
        kernel = functools.partial(kernel, segment_ids=splash_attention_kernel.SegmentIds(segments, segments))
    out = jax.vmap(kernel)(*heads_first)
    return out.swapaxes(1, 2)[:, :length, :, :head_dim]


def kernel_of(num_heads: int, length: int, causal: bool, *, interpret: bool):
    block = next(size for size in range(min(LARGEST_BLOCK, length), 0, -LANES) if length % size == 0)
    seen = (splash_attention_mask.CausalMask if causal else splash_attention_mask.FullMask)((length, length))
    mask = splash_attention_mask.MultiHeadMask([seen] * num_heads)
    sizes = splash_attention_kernel.BlockSizes(*(block,) * 6, use_fused_bwd_kernel=True)
    make = functools.partial(splash_attention_kernel.make_splash_mha, head_shards=1, q_seq_shards=1)
    return make(mask, block_sizes=sizes, residual_checkpoint_name=KEPT, interpret=interpret)
