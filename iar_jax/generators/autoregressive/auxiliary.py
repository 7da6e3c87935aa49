"""What hidden states are held to besides the next code: small heads that training alone has.

Two losses of cosine distances, d(a, b) = 1 − cos(a, b), each a mean over positions:

* regression, of reAR (arXiv 2510.04450): a head on the embedded inputs is held to the tokenizer's vector of the input
  code, and one on the states at three quarters of the depth to that of the code to be predicted. The inputs may be
  noisy; the vectors are of the true codes. (Whether reAR's sum is divided by the number of positions is not known.)
* look-ahead, Mirai-E (arXiv 2601.14671): states at two thirds of the depth, through one head for each of three cells,
  are held to the averaged model's states at that depth of the same cell, the one to its right and the one below. (The
  paper takes the three cells nearest on the grid; how it breaks ties is not known, and cells to come are what is to be
  looked ahead to.) The averaged model reads the true codes, without dropout, and gets no gradient; running two thirds
  of it forward is 2/9 of a step's FLOPs in its layers.

Heads are two layers with SiLU between; 2,048 wide in reAR, at a width of 768. The published shapes of Mirai's heads are
not known.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from iar_jax.generators.autoregressive.transformer import Transformer
from iar_jax.models.layers import partitioned, swiglu_hidden_dim

HEAD_WIDTH = 2048
REGRESSION_DEPTH, LOOKAHEAD_DEPTH = 3 / 4, 2 / 3

# Cells that are looked ahead to: rows and columns from the state's own.
CELLS = ((0, 0), (0, 1), (1, 0))

States = Float[Array, "B L D"]


def layers_at(depth: float, num_layers: int) -> int:
    """How many layers a share of the depth is; one at least, and one less than all at most."""
    return max(1, min(num_layers - 1, round(depth * num_layers)))


def head_width(dim: int) -> int:
    """That of the feed-forward blocks, but reAR's 2,048 at most, which it is at a width of 768."""
    return min(HEAD_WIDTH, swiglu_hidden_dim(dim))


class Head(nn.Module):
    """States [B, L, D] to vectors [B, L, out], float32."""

    out: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, states: States) -> Float[Array, "B L out"]:
        dim = states.shape[-1]
        init = nn.initializers.lecun_normal()
        first = self.param("first", partitioned(init, "embed", "hidden"), (dim, head_width(dim)))
        second = self.param("second", partitioned(init, "hidden", None), (head_width(dim), self.out))
        hidden = nn.silu(states @ first.astype(self.dtype))
        return jnp.einsum("blh,ho->blo", hidden, second.astype(self.dtype), preferred_element_type=jnp.float32)


def new_heads(key: Any, dim: int, vector_dim: int, regression: bool, lookahead: bool) -> dict[str, Any]:
    """Fresh parameters of the heads that are asked for.

    Args:
        vector_dim: of the tokenizer's vectors.
    """
    outs = {"this": vector_dim, "next": vector_dim} if regression else {}
    outs |= {f"cell{i}": dim for i in range(len(CELLS))} if lookahead else {}
    states = jnp.zeros((1, 1, dim))
    keys = jax.random.split(key, max(1, len(outs)))
    return {
        name: Head(out, jnp.float32).init(own, states)["params"]
        for own, (name, out) in zip(keys, outs.items(), strict=False)
    }


def cosine_distance(ours: Float[Array, "... d"], theirs: Float[Array, "... d"]) -> Float[Array, "..."]:
    """1 − cos, in float32."""
    ours, theirs = ours.astype(jnp.float32), theirs.astype(jnp.float32)
    norms = jnp.sum(jnp.square(ours), axis=-1) * jnp.sum(jnp.square(theirs), axis=-1)
    return 1.0 - jnp.sum(ours * theirs, axis=-1) * jax.lax.rsqrt(norms + 1e-12)


def regression_loss(
    heads: dict[str, Any],
    embedded: States,
    deep: States,
    codes: Int[Array, "B L"],
    vectors: Float[np.ndarray, "N d"],
    dtype: DTypeLike,
) -> Float[Array, ""]:
    """The distances to this code's vector and to the next one's, added.

    Args:
        embedded: of the inputs: the class, and the codes but the last.
        deep: states at REGRESSION_DEPTH.
        codes: the true ones.
    """
    wanted = jnp.asarray(vectors)[codes]

    def head(name, states):
        return Head(wanted.shape[-1], dtype).apply({"params": heads[name]}, states)

    this = cosine_distance(head("this", embedded[:, 1:]), wanted[:, :-1])
    return jnp.mean(this) + jnp.mean(cosine_distance(head("next", deep), wanted))


def lookahead_loss(
    heads: dict[str, Any], states: States, teacher: States, grid_size: int, dtype: DTypeLike
) -> Float[Array, ""]:
    """The mean distance to the teacher's states at CELLS, over all pairs inside of the grid."""
    batch, _, dim = states.shape
    grid = jax.lax.stop_gradient(teacher).reshape(batch, grid_size, grid_size, dim)
    total, count = jnp.float32(0.0), 0
    for i, (down, right) in enumerate(CELLS):
        found = Head(dim, dtype).apply({"params": heads[f"cell{i}"]}, states).reshape(batch, grid_size, grid_size, dim)
        inside = found[:, : grid_size - down, : grid_size - right]
        distances = cosine_distance(inside, grid[:, down:, right:])
        total, count = total + jnp.sum(distances), count + distances.size
    return total / count


def states_at(
    network: Transformer,
    params: Any,
    labels: Int[Array, " B"],
    codes: Int[Array, "B L"],
    depths: Sequence[int],
    key: Any = None,
) -> tuple[States, list[States], States]:
    """The embedded inputs, the states behind so many layers, and what the head is applied to.

    Args:
        depths: numbers of layers, in their order, none of them all; see `layers_at`.
        key: of the dropouts; None is without.
    """
    bounds = (0, *depths, network.num_layers)
    states = _embedded(network, params, labels, codes, key)
    embedded, kept = states, []
    for start, end in itertools.pairwise(bounds):
        states = _through(network, params, states, start, end, key)
        kept.append(states)
    return embedded, kept[:-1], network.apply({"params": params}, states, method="normed")


def teacher_states(
    network: Transformer, params: Any, labels: Int[Array, " B"], codes: Int[Array, "B L"], depth: int
) -> States:
    """States behind so many layers of the averaged model; those above do not run."""
    return _through(network, params, _embedded(network, params, labels, codes, None), 0, depth, None)


def _embedded(network, params, labels, codes, key):
    return network.apply({"params": params}, labels, codes, method="embedded", rngs=_rngs(key, 0))


def _through(network, params, states, start, end, key):
    """States through the layers start .. end − 1."""
    if start == end:
        return states
    part = network.clone(num_layers=end - start, scan_unroll=min(network.scan_unroll, end - start))
    layers = jax.tree.map(lambda stacked: stacked[start:end], params["layers"])
    variables = {"params": params | {"layers": layers}}
    return part.apply(variables, states, method="through", rngs=_rngs(key, 1 + start))


def _rngs(key, part):
    return {} if key is None else {"dropout": jax.random.fold_in(key, part)}
