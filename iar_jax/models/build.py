"""From a config section to a module, and from a finished artifact to a module with its weights."""

import dataclasses
import hashlib
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh

from iar_jax.models.transformer import Transformer, swiglu_hidden_dim
from iar_jax.models.vqgan import VQModel
from iar_jax.runtime import artifacts, checkpoint, sharding
from iar_jax.runtime.compiled_cost import transformer_flops
from iar_jax.runtime.errors import UserError, brief


def build_tokenizer(section: dict[str, Any]) -> VQModel:
    """The tokenizer of config.tokenizer."""
    fields = dict(section)
    return VQModel(
        **fields | {"channel_multipliers": tuple(fields["channel_multipliers"]), "dtype": jnp.dtype(fields["dtype"])}
    )


def build_transformer(
    section: dict[str, Any], *, vocab_size: int, num_classes: int, grid_size: int, num_kv_heads: int | None = None
) -> Transformer:
    """The transformer of config.model for a codebook, a number of classes and a grid."""
    fields = dict(section)
    hidden_dim = fields.pop("hidden_dim") or swiglu_hidden_dim(fields["dim"])
    return Transformer(
        vocab_size=vocab_size,
        num_classes=num_classes,
        grid_size=grid_size,
        hidden_dim=hidden_dim,
        num_kv_heads=num_kv_heads,
        **fields | {"dtype": jnp.dtype(fields["dtype"])},
    )


def transformer_facts(model: Transformer) -> dict[str, int | None]:
    """What a transformer's config section does not say of it; kept in its metadata."""
    return {
        "vocab_size": model.vocab_size,
        "num_classes": model.num_classes,
        "grid_size": model.grid_size,
        "num_kv_heads": model.num_kv_heads,
    }


def train_step_flops(model: Transformer, batch_size: int) -> float:
    """FLOPs of one training step of a model; see `transformer_flops` for what is counted."""
    return transformer_flops(
        num_layers=model.num_layers,
        dim=model.dim,
        hidden_dim=model.hidden_dim,
        vocab_size=model.vocab_size,
        num_tokens=model.num_tokens,
        batch_size=batch_size,
    )


def load_tokenizer(directory: epath.Path, mesh: Mesh) -> tuple[VQModel, Any, artifacts.Metadata]:
    """A finished tokenizer artifact: module, averaged weights on every device, metadata."""
    metadata = artifacts.require(directory, "train_tokenizer")
    model = build_tokenizer(metadata.config["tokenizer"])
    resolution = metadata.config["data"]["resolution"]
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, resolution, resolution, 3)))["params"])
    abstract = checkpoint.abstract_tree(shapes, jax.tree.map(lambda _: sharding.replicated(mesh), shapes))
    params, _ = checkpoint.restore_params(directory / "checkpoints", abstract)
    return model, params, metadata


def transformer_at(directory: epath.Path, step: int) -> artifacts.Metadata:
    """Metadata of a transformer: of the finished one where step is 0, else as if it had been finished at that step.

    Raises:
        UserError: it is not finished, or has no whole checkpoint of that step.
    """
    if not step:
        return artifacts.require(directory, "train")
    found = artifacts.read_metadata(directory)
    steps = checkpoint.steps_in(directory / "checkpoints")
    if found is None or step not in steps:
        raise UserError(f"{directory} has no checkpoint of step {step}; there are {steps or 'none'}")
    try:
        checksum = checkpoint.read_info(directory / "checkpoints", step).get("ema_checksum")
    except Exception as error:  # damaged, or removed just now
        raise UserError(f"{directory}: the checkpoint of step {step} cannot be read ({brief(error)})") from error
    fingerprint = hashlib.sha256(f"{step} {checksum} {sorted(found.inputs.items())}".encode()).hexdigest()
    return dataclasses.replace(found, fingerprint=fingerprint, figures=found.figures | {"step": step})


def load_transformer(
    directory: epath.Path, mesh: Mesh, step: int = 0
) -> tuple[Transformer, Any, int, artifacts.Metadata]:
    """A transformer artifact: module, averaged weights sharded by the rules, step, metadata; see `transformer_at`."""
    metadata = transformer_at(directory, step)
    model = build_transformer(
        metadata.config["model"] | {"scan_unroll": 1, "remat": "none"}, **metadata.figures["facts"]
    )
    labels, codes = jnp.zeros((1,), jnp.int32), jnp.zeros((1, model.num_tokens), jnp.int32)
    boxed = jax.eval_shape(lambda: model.init(jax.random.key(0), labels, codes)["params"])
    abstract = checkpoint.abstract_tree(sharding.unbox(boxed), sharding.tree_shardings(mesh, boxed))
    params, step = checkpoint.restore_params(directory / "checkpoints", abstract, step or None)
    return model, params, step, metadata
