"""Two-dimensional rotary position embedding, as LlamaGen computes it."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def rope_table(grid_size: int, head_dim: int, base: float = 10000.0) -> Float[np.ndarray, "L half 2"]:
    """cos and sin for the class token and a grid of codes, [1 + grid_size**2, head_dim / 2, 2] float32.

    The first quarter of the head's dimensions (as pairs) turns with the row, the second with the column. The class
    token's entry is all zeros, not a rotation by zero: its queries and keys vanish, and LlamaGen's weights are made
    for that.
    """
    half = head_dim // 2
    frequencies = 1.0 / base ** (np.arange(0, half, 2)[: half // 2].astype(np.float32) / half)
    angles = np.outer(np.arange(grid_size, dtype=np.float32), frequencies)
    rows = np.repeat(angles[:, None], grid_size, axis=1)
    columns = np.repeat(angles[None, :], grid_size, axis=0)
    grid = np.concatenate([rows, columns], axis=-1).reshape(grid_size**2, half)
    table = np.stack([np.cos(grid), np.sin(grid)], axis=-1)
    return np.concatenate([np.zeros((1, half, 2)), table]).astype(np.float32)


def turning_tables(
    rope: Float[Array, "L half 2"], num_heads: int
) -> tuple[Float[Array, "L width"], Float[Array, "L width"]]:
    """cos and sin for each dimension of `num_heads` heads side by side, sin with the sign that it has in the turn.

    x * cos + partner * sin is `apply_rope`, where a dimension's partner is the other one of its pair.
    """
    cos, sin = (jnp.repeat(rope[..., i], 2, axis=-1) for i in range(2))
    sign = jnp.where(jnp.arange(sin.shape[-1]) % 2 == 0, -1.0, 1.0)
    return jnp.tile(cos, (1, num_heads)), jnp.tile(sin * sign, (1, num_heads))


def apply_rope(x: Float[Array, "B L H K"], table: Float[Array, "L half 2"]) -> Float[Array, "B L H K"]:
    """Turns the pairs (2i, 2i + 1) of each head by the table's angles; float32 inside, the input's dtype outside."""
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    cos, sin = table[:, None, :, 0], table[:, None, :, 1]
    first, second = pairs[..., 0], pairs[..., 1]
    turned = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)
