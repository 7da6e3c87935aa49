"""From class names to pictures, in one call: for notebooks and scripts; `python -m iar_jax.sample` is the stage."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from PIL import Image

from iar_jax.data import preprocessing
from iar_jax.data.imagenet import class_index
from iar_jax.generators.generator import Generator
from iar_jax.generators.settings import SamplingSettings
from iar_jax.models.vqgan import VQModel


def sample_pictures(
    generator: Generator,
    params: Any,
    tokenizer: tuple[VQModel, Any],
    classes: Sequence[str | int],
    *,
    cfg_scale: float = 2.0,
    seed: int = 0,
    **settings: Any,
) -> list[Image.Image]:
    """One picture for each class.

    Args:
        generator, params: of any kind; its codes are those of the tokenizer (an IAR model goes with its reordered
            tokenizer).
        tokenizer: (module, params), as `interop.llamagen` loads it.
        classes: labels, or names of ImageNet's classes such as "golden retriever".
        seed: picture i depends on the seed, i and its class alone.
        settings: more of `SamplingSettings`, such as temperature, top_k, top_p.

    Raises:
        UserError: no such class; names the nearest.
        ValueError: a label out of range.
    """
    num_classes = generator.facts.num_classes
    labels = [class_index(c) if isinstance(c, str) else c for c in classes]
    if not all(0 <= label < num_classes for label in labels):
        raise ValueError(f"labels are {labels}; the model has {num_classes} classes")
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(seed), jnp.arange(len(labels)))
    codes = generator.sample(params, jnp.array(labels), keys, SamplingSettings(cfg_scale=cfg_scale, **settings))
    vq, vq_params = tokenizer
    pixels = preprocessing.to_uint8(vq.apply({"params": vq_params}, codes, method="decode_positions"))
    return [Image.fromarray(image) for image in pixels]
