"""How many positions are masked, and which: schedules, draws for training, counts of each step of sampling.

A schedule gives the share that is masked at a progress r from 0 (all) to 1 (nothing); in training r is drawn evenly.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

# (progress in [0, 1], number of positions, numpy or jax.numpy) -> share.
Share = Callable[..., Array]

# config.training.mask_schedule and config.sampling.mask_schedule. MaskGIT's (cosine is what it was trained with), and
# arccos, of Halton-MaskGIT and TiTok.
SCHEDULES: dict[str, Share] = {
    "arccos": lambda r, count, np: np.arccos(r) / np.float32(math.pi / 2),
    "cosine": lambda r, count, np: np.cos(np.float32(math.pi / 2) * r),
    "linear": lambda r, count, np: 1 - r,
    "square": lambda r, count, np: 1 - r**2,
    "cubic": lambda r, count, np: 1 - r**3,
    "root": lambda r, count, np: 1 - np.sqrt(r),
    "log": lambda r, count, np: -np.log2(np.maximum(r, 1e-6)) / math.log2(max(count, 2)),
    "exp": lambda r, count, np: 1 - 2.0 ** (-math.log2(max(count, 2)) * (1 - r)),
}


def independent(key: Key[Array, ""], share: Float[Array, ""], length: int) -> Bool[Array, " L"]:
    """Each position by itself, with the share as its probability (Halton-MaskGIT); there may be none."""
    return jax.random.uniform(key, (length,)) < share


def counted(key: Key[Array, ""], share: Float[Array, ""], length: int) -> Bool[Array, " L"]:
    """As many as the share says, rounded, one at least, anywhere (MaskGIT, TiTok)."""
    places = jnp.argsort(jnp.argsort(jax.random.uniform(key, (length,))))
    return places < jnp.maximum(jnp.round(share * length), 1)


# config.training.mask_draw.
DRAWS = {"independent": independent, "counted": counted}


def draw_masks(
    keys: Key[Array, " B"], length: int, schedule: str, draw: str, at_least_one: bool = False
) -> Bool[Array, "B L"]:
    """Masks of some pictures, each from its own key and its own evenly drawn progress.

    Args:
        at_least_one: masks the first position where nothing would be masked.
    """

    def one(key):
        progress_key, places_key = jax.random.split(key)
        share = SCHEDULES[schedule](jax.random.uniform(progress_key), length, jnp)
        masked = DRAWS[draw](places_key, jnp.clip(share, 1e-6, 1.0), length)
        return masked.at[0].set(masked[0] | ~masked.any()) if at_least_one else masked

    return jax.vmap(one)(keys)


def masked_after_steps(schedule: str, length: int, num_steps: int) -> Int[np.ndarray, " steps"]:
    """How many of `length` positions are still masked after each step: MaskGIT's floor of the share, in float32 (a tie
    falls as in its own code), fewer than before, one at least for each step that is left, and none after the last.

    Raises:
        ValueError: more steps than positions.
    """
    if not 1 <= num_steps <= length:
        raise ValueError(f"{num_steps} steps for {length} positions")
    found, before = [], length
    for step in range(1, num_steps):
        progress = np.float32(step) / np.float32(num_steps)
        share = np.clip(np.float32(SCHEDULES[schedule](progress, length, np)), np.float32(1e-6), np.float32(1.0))
        before = max(num_steps - step, min(int(np.floor(np.float32(length) * share)), before - 1))
        found.append(before)
    return np.array([*found, 0], np.int32)


def set_after_steps(schedule: str, length: int, num_steps: int) -> Int[np.ndarray, " steps"]:
    """How many positions of an order are set after each step, as Halton-MaskGIT counts: the whole part of what the
    share leaves, in float32, and step t + 1 at least.

    Raises:
        ValueError: more steps than positions.
    """
    if not 1 <= num_steps <= length:
        raise ValueError(f"{num_steps} steps for {length} positions")
    progress = (np.arange(1, num_steps + 1) / num_steps).astype(np.float32)
    shares = np.float32(1.0) - SCHEDULES[schedule](progress, length, np).astype(np.float32)
    counts = np.maximum((shares * np.float32(length)).astype(np.int32), np.arange(1, num_steps + 1))
    counts[-1] = length
    return counts.astype(np.int32)


def halton_order(side: int) -> Int[np.ndarray, " L"]:
    """Positions of a square of codes in the order of the two-dimensional Halton sequence: base 2 down, base 3 across;
    those that come again are left out. Neighbours in it lie far apart."""
    found: dict[int, None] = {}
    index = 0
    while len(found) < side**2:
        row, column = (int(radical_inverse(base, index) * side) for base in (2, 3))
        found.setdefault(row * side + column)
        index += 1
    return np.array(list(found), np.int32)


def radical_inverse(base: int, index: int) -> float:
    """The digits of index + 1 behind the point, in the opposite order."""
    numerator, denominator, rest = 0, 1, index + 1
    while rest:
        rest, digit = divmod(rest, base)
        numerator, denominator = numerator * base + digit, denominator * base
    return numerator / denominator
