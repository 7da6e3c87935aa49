"""The VQ tokenizer of a config section, and of a finished artifact with its weights."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh

from iar_jax.config.fields import defaults
from iar_jax.models.vqgan import VQModel
from iar_jax.runtime import artifacts, checkpoint, sharding
from iar_jax.runtime.section import Section


def build_tokenizer(section: Section) -> VQModel:
    """The tokenizer of config.tokenizer."""
    fields = dict(section.items())
    return VQModel(
        **fields | {"channel_multipliers": tuple(fields["channel_multipliers"]), "dtype": jnp.dtype(fields["dtype"])}
    )


class LoadedTokenizer(NamedTuple):
    """A tokenizer with its averaged weights on every device, and what is known of them."""

    model: VQModel
    params: Any
    metadata: artifacts.Metadata


def load_tokenizer(directory: epath.Path, mesh: Mesh) -> LoadedTokenizer:
    """A finished tokenizer.

    Raises:
        UserError: it is not there, not finished, or its weights cannot be read.
    """
    metadata = artifacts.require(directory, "train_tokenizer")
    # A field that came with a later version was at its default before.
    model = build_tokenizer(defaults("tokenizer") | metadata.config["tokenizer"])
    resolution = metadata.config["data"]["resolution"]
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, resolution, resolution, 3)))["params"])
    abstract = checkpoint.abstract_tree(shapes, jax.tree.map(lambda _: sharding.replicated(mesh), shapes))
    params, _ = checkpoint.restore_params(directory / "checkpoints", abstract)
    return LoadedTokenizer(model, params, metadata)
