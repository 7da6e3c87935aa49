"""The implementations of attention, by name, and which of them a platform runs.

Each takes queries, keys and values that are not turned yet, the rotary table of their positions (None turns nothing), a
block size, and whether a position sees those up to its own or all, and gives softmax(q k^T / sqrt(K)) v over what it
sees, in the dtype of the queries. Scores are float32 everywhere. Kernels run under `shard_map`, each device with its
rows and heads.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from iar_jax.models import attention_fused, attention_splash
from iar_jax.models.attention_blocks import attention_in_blocks
from iar_jax.models.rope import apply_rope
from iar_jax.runtime import sharding
from iar_jax.runtime.errors import UserError

Attend = Callable[
    [
        Float[Array, "B T H K"],
        Float[Array, "B T H2 K"],
        Float[Array, "B T H2 K"],
        Float[Array, "T half 2"] | None,
        int,
        bool,
    ],
    Float[Array, "B T H K"],
]


class Case(NamedTuple):
    """What decides whether an implementation can run: JAX's name of the platform (cpu, tpu, gpu), dtype, dimensions of
    a head, positions."""

    platform: str
    dtype: DTypeLike
    head_dim: int
    length: int


class Attention(NamedTuple):
    """An implementation.

    Attributes:
        attend: (q, k, v, rope, block_size, causal) -> output; H is a multiple of H2, and consecutive query heads share
            a head of keys and values.
        platform: the only one that it is for; "" is any.
        why_not: what keeps it from running in a case of its platform; None where it can.
    """

    attend: Attend
    platform: str = ""
    why_not: Callable[[Case], str | None] = lambda case: None


def blocks(q, k, v, rope, block_size, causal):
    return attention_in_blocks(*turned(q, k, rope), v, block_size, causal)


def splash(q, k, v, rope, block_size, causal):
    return on_mesh(functools.partial(attention_splash.attend, causal=causal), *turned(q, k, rope), v)


def cudnn(q, k, v, rope, block_size, causal):
    head_dim = q.shape[-1]
    padding = -head_dim % 8

    def attend(*arrays):
        # Causal by name: with a mask, cuDNN's gradients are wrong at some lengths.
        out = jax.nn.dot_product_attention(
            *(jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, padding))) for x in arrays),
            is_causal=causal,
            scale=head_dim**-0.5,
            implementation="cudnn",
        )
        return out[..., :head_dim]

    return on_mesh(attend, *turned(q, k, rope), v)


def fused(q, k, v, rope, block_size, causal):
    def attend(*arrays):
        return attention_fused.attend(*arrays, rope, block_size, causal)

    return on_mesh(attend, q, k, v)


def turned(q, k, rope):
    """Queries and keys after the rotary embedding, where there is one."""
    return (q, k) if rope is None else (apply_rope(q, rope), apply_rope(k, rope))


def on_mesh(attend: Callable, *arrays: Float[Array, "B T _ K"]) -> Float[Array, "B T H K"]:
    """Runs a function of queries, keys and values on each device's rows and heads."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return attend(*arrays)
    # A model's initialisation has one row.
    shared = arrays[0].shape[0] % (mesh.shape["data"] * mesh.shape["fsdp"]) == 0
    spec = PartitionSpec(sharding.BATCH_SPEC[0] if shared else None, None, "tensor", None)
    return jax.shard_map(attend, in_specs=(spec,) * len(arrays), out_specs=spec, check_vma=False)(*arrays)


def half_precision(case: Case) -> str | None:
    if jnp.dtype(case.dtype) in (jnp.bfloat16, jnp.float16):
        return None
    return f"takes bfloat16, not {jnp.dtype(case.dtype).name} (config.model.dtype)"


def why_not_cudnn(case: Case) -> str | None:
    return half_precision(case) or ("takes heads of 128 dimensions at most" if case.head_dim > 128 else None)


def why_not_fused(case: Case) -> str | None:
    longest = attention_fused.LONGEST
    too_long = f"keeps all keys on the chip, of {longest} positions at most" if case.length > longest else None
    return half_precision(case) or too_long


AUTO = "auto"
# config.model.attention. auto takes the first that can run, in this order.
ATTENTIONS: dict[str, Attention | None] = {
    AUTO: None,
    "fused": Attention(fused, "tpu", why_not_fused),
    "splash": Attention(splash, "tpu", half_precision),
    "cudnn": Attention(cudnn, "gpu", why_not_cudnn),
    "blocks": Attention(blocks),
}
PLATFORMS = {"tpu": "TPUs", "gpu": "GPUs", "cpu": "CPUs"}


class Choice(NamedTuple):
    """The name of what runs, and why faster ones of this platform do not, "" where there are none."""

    name: str
    reason: str


def choose(kind: str, case: Case) -> Choice:
    """What `kind` means in a case.

    Raises:
        UserError: it cannot run there.
    """
    named = {name: found for name, found in ATTENTIONS.items() if found}
    reasons = {
        name: found.why_not(case) if found.platform in ("", case.platform) else f"is for {PLATFORMS[found.platform]}"
        for name, found in named.items()
    }
    able = [name for name, reason in reasons.items() if reason is None]
    if kind != AUTO:
        if reasons[kind]:
            raise UserError(
                f"config.model.attention is {kind}, which {reasons[kind]}; on this platform ({case.platform}, "
                f"{jnp.dtype(case.dtype).name}, heads of {case.head_dim}) there are {AUTO}, {', '.join(able)}"
            )
        return Choice(kind, "")
    passed = list(named)[: list(named).index(able[0])]
    told = [f"{name} {reasons[name]}" for name in passed if named[name].platform == case.platform]
    return Choice(able[0], "; ".join(told))


def attend(kind: str, q, k, v, rope, block_size: int, *, causal: bool) -> Float[Array, "B T H K"]:
    """Attention by the implementation that `kind` means on the platform of the mesh in force."""
    case = Case(sharding.platform(), q.dtype, q.shape[-1], q.shape[1])
    chosen = ATTENTIONS[choose(kind, case).name]
    assert chosen is not None
    return chosen.attend(q, k, v, rope, block_size, causal)


def announced(kind: str, case: Case) -> str:
    """What runs in a case, and why faster ones of its platform do not, for the first line of a training."""
    chosen = choose(kind, case)
    return f"attention: {chosen.name}" + (f" ({chosen.reason})" if chosen.reason else "")
