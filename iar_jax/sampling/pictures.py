"""From class names to pictures, in one call: for notebooks and scripts; `python -m iar_jax.sample` is the stage."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from PIL import Image

from iar_jax.data import preprocessing
from iar_jax.data.imagenet import class_index
from iar_jax.models.transformer import Transformer
from iar_jax.models.vqgan import VQModel
from iar_jax.sampling.decoding import generate


def sample_pictures(
    transformer: tuple[Transformer, Any],
    tokenizer: tuple[VQModel, Any],
    classes: Sequence[str | int],
    *,
    cfg_scale: float = 2.0,
    seed: int = 0,
    **settings: Any,
) -> list[Image.Image]:
    """One picture for each class.

    Args:
        transformer, tokenizer: (module, params), as `interop.llamagen` loads them; the transformer's codes are those of
            the tokenizer (an IAR model goes with its reordered tokenizer).
        classes: labels, or names of ImageNet's classes such as "golden retriever".
        seed: picture i depends on the seed, i and its class alone.
        settings: more for `decoding.generate`, such as temperature, top_k, top_p.

    Raises:
        UserError: no such class; names the nearest.
        ValueError: a label out of range.
    """
    (module, params), (vq, vq_params) = transformer, tokenizer
    labels = [class_index(c) if isinstance(c, str) else c for c in classes]
    if not all(0 <= label < module.num_classes for label in labels):
        raise ValueError(f"labels are {labels}; the model has {module.num_classes} classes")
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(seed), jnp.arange(len(labels)))
    codes = generate(module, params, jnp.array(labels), keys, cfg_scale=cfg_scale, **settings)
    grid = codes.reshape(-1, module.grid_size, module.grid_size)
    pixels = preprocessing.to_uint8(vq.apply({"params": vq_params}, grid, method="decode_codes"))
    return [Image.fromarray(image) for image in pixels]
