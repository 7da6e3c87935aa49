"""Noise on the codes that a generator reads while it trains, and not on those that it is to predict.

When it samples, a generator reads its own codes, which are wrong at times; trained on true ones alone it has never seen
such a context. reAR (arXiv 2510.04450) replaces each input code with probability ε by any code, ε drawn for each
picture from [0, f(t)] at a share t of the training, f(t) = max(0, 1 − 4t/3). That is context_noise = 1 and
context_noise_end = 0.75 with the draw `uniform`; draws of codes that look alike are ours.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key

from iar_jax.generators.settings import Objective
from iar_jax.runtime.section import Section

Codes = Int[Array, "B L"]


def any_code(key: Key[Array, ""], codes: Codes, objective: Objective, vocab_size: int) -> Codes:
    """Each code alike."""
    return jax.random.randint(key, codes.shape, 0, vocab_size, jnp.int32)


def code_of_cluster(key: Key[Array, ""], codes: Codes, objective: Objective, vocab_size: int) -> Codes:
    """Each code of the code's own cluster alike, of the finest level."""
    clusters = objective.cluster_sizes[0]
    if isinstance(clusters, tuple):
        bounds = np.asarray(clusters, np.int32)
        own = jnp.searchsorted(bounds, codes, side="right") - 1
        first, size = jnp.asarray(bounds)[own], jnp.asarray(np.diff(bounds))[own]
    else:
        first, size = codes // clusters * clusters, jnp.int32(clusters)
    place = jnp.floor(jax.random.uniform(key, codes.shape) * size).astype(jnp.int32)
    return first + jnp.minimum(place, size - 1)


def near_code(key: Key[Array, ""], codes: Codes, objective: Objective, vocab_size: int) -> Codes:
    """Each of the code's near ones alike, itself not among them."""
    if objective.neighbours is None:
        raise ValueError("the objective has no neighbours")
    near = jnp.asarray(objective.neighbours.ids)
    place = jax.random.randint(key, codes.shape, 1, near.shape[1])
    return near[codes, place]


# config.training.context_noise_draw: what a code is replaced with.
DRAWS: dict[str, Callable[..., Codes]] = {"uniform": any_code, "cluster": code_of_cluster, "neighbours": near_code}


def highest_share(section: Section) -> optax.Schedule:
    """The largest ε at each step, by config.training."""
    steps = max(1, round(section["context_noise_end"] * section["num_steps"]))
    return optax.linear_schedule(section["context_noise"], 0.0, steps)


def noise_of(section: Section, objective: Objective, vocab_size: int) -> Callable[..., Codes] | None:
    """(key, codes, step) -> the codes that a generator reads at a step, by config.training; None where those are the
    codes themselves."""
    if not section["context_noise"]:
        return None
    highest, draw = highest_share(section), section["context_noise_draw"]
    return lambda key, codes, step: noisy(key, codes, highest(step), draw, objective, vocab_size)


def noisy(
    key: Key[Array, ""], codes: Codes, highest: Float[Array, ""], draw: str, objective: Objective, vocab_size: int
) -> Codes:
    """Codes of which a share is replaced: ε of each picture is drawn evenly from [0, highest]."""
    share_key, place_key, code_key = jax.random.split(key, 3)
    share = highest * jax.random.uniform(share_key, (codes.shape[0], 1))
    replaced = jax.random.uniform(place_key, codes.shape) < share
    return jnp.where(replaced, DRAWS[draw](code_key, codes, objective, vocab_size), codes)
