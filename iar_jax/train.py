"""Stage 4: codes + permutation -> transformer, trained on token_loss + lambda * cluster_loss.

python -m iar_jax.train --config=configs/mnist.py --workdir=runs/mnist
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from iar_jax.data import loader
from iar_jax.data.codes import CodeSource, FirstCrop, random_crop_codes, read_permutation
from iar_jax.models.build import build_transformer, load_transformer, train_step_flops, transformer_facts
from iar_jax.models.transformer import Transformer
from iar_jax.runtime import artifacts, checkpoint, command_line, distributed, sharding
from iar_jax.runtime.errors import UserError
from iar_jax.runtime.progress import say
from iar_jax.training import transformer_steps
from iar_jax.training.loop import TrainingRun
from iar_jax.training.optimizer import cluster_weight_schedule, learning_rate_of, optimizer_of
from iar_jax.training.state import TrainState, skip_unless_finite


def run(config: ConfigDict, workdir: epath.Path) -> None:
    """Trains the transformer of config.model on the rearranged codes and leaves it in workdir/train."""
    directory = workdir / "train"
    tokenizer_directory = artifacts.input_directory(config, workdir, "tokenizer", "tokenizer")
    codebook_directory = artifacts.input_directory(config, workdir, "codebook", "codebook")
    codes_directory = artifacts.input_directory(config, workdir, "codes", "codes")
    tokenizer = artifacts.require(tokenizer_directory, "train_tokenizer")
    permutation = read_permutation(codebook_directory, tokenizer, tokenizer_directory)
    train_codes = read_codes_metadata(codes_directory / "train", tokenizer, tokenizer_directory)
    val_codes = read_codes_metadata(codes_directory / "val", tokenizer, tokenizer_directory)
    inputs = {
        "tokenizer": tokenizer.fingerprint,
        "codebook": artifacts.require(codebook_directory, "rearrange_codebook").fingerprint,
        "codes": train_codes.fingerprint,
        "val_codes": val_codes.fingerprint,
    }
    initial_directory = epath.Path(config.inputs.transformer).expanduser() if config.inputs.transformer else None
    if initial_directory:
        initial = artifacts.require(initial_directory, "train")
        if initial.inputs["codebook"] != inputs["codebook"]:
            raise UserError(
                f"{initial_directory} was trained with another codebook ({initial.inputs['codebook'][:12]}) than "
                f"{codebook_directory} ({inputs['codebook'][:12]}): its ids mean other codes (import_weights "
                "--rearrange turns a file of weights with original ids into a transformer of rearranged ones)"
            )
        inputs["transformer"] = initial.fingerprint
    if artifacts.begin(directory, "train", artifacts.relevant_config(config, ("seed", "model", "training")), inputs):
        say(f"train: done, in {directory}")
        return
    section = config.training
    mesh = sharding.make_mesh(**config.mesh)
    sharding.check_batch_size(mesh, section.batch_size, "config.training.batch_size", section.accumulation)

    num_classes = len(train_codes.figures["class_names"])
    source = CodeSource(codes_directory / "train", permutation, num_classes)
    val_source = FirstCrop(CodeSource(codes_directory / "val", permutation, num_classes))
    num_tokens = source[0]["codes"].shape[1]
    grid_size = round(num_tokens**0.5)
    if grid_size**2 != num_tokens:
        raise UserError(f"{codes_directory} has {num_tokens} codes an image, which is no square grid")

    model, init, train_step = make_step(
        config,
        mesh,
        vocab_size=len(permutation.old_to_new),
        cluster_size=permutation.cluster_size,
        num_classes=num_classes,
        grid_size=grid_size,
    )
    # What a checkpoint is read by while training goes on.
    facts = transformer_facts(model)
    artifacts.note(directory, {"facts": facts})
    key = jax.random.key(config.seed)
    eval_step = jax.jit(
        transformer_steps.make_eval_step(model, cluster_size=permutation.cluster_size, loss_chunks=section.loss_chunks),
        out_shardings=sharding.replicated(mesh),
    )

    with (
        sharding.use_mesh(mesh),
        TrainingRun.of(
            section, directory, "train", flops_per_step=train_step_flops(model, section.batch_size)
        ) as training,
    ):
        state, shardings = sharding.initialise_sharded(init, mesh, key)
        if initial_directory:
            state = with_initial_weights(state, initial_directory, model, mesh)
        state = training.resume(state, checkpoint.abstract_tree(state, shardings))
        step_fn = jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, sharding.replicated(mesh)))
        part, num_parts = sharding.local_part(mesh)
        batches = loader.train_batches(
            source,
            random_crop_codes,
            seed=config.seed,
            batch_size=section.batch_size,
            first_step=training.step,
            part=part,
            num_parts=num_parts,
        )

        def validated(state: TrainState) -> dict[str, float]:
            return validate(eval_step, state.ema_params, val_source, mesh, section.batch_size)

        for _ in training.steps():
            batch = sharding.global_batch(mesh, training.next_batch(batches))
            state, metrics = step_fn(state, batch["label"], batch["codes"])
            training.finished_step(state, metrics, validated)
        figures = training.log_validation(validated(state))
        seconds = training.seconds

    fingerprint = artifacts.fingerprint_arrays(distributed.to_host(state.ema_params))
    num_params = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    artifacts.finish(
        directory,
        fingerprint,
        figures | {"facts": facts, "step": section.num_steps, "num_params": num_params, "seconds": seconds},
    )
    say(
        f"train: {num_params:,} parameters; on val token loss {figures['token_loss']:.3f}, cluster loss "
        f"{figures['cluster_loss']:.3f}, token accuracy {figures['token_accuracy']:.1%}, cluster accuracy "
        f"{figures['cluster_accuracy']:.1%}"
    )


def make_step(
    config: ConfigDict, mesh: Mesh, *, vocab_size: int, cluster_size: int, num_classes: int, grid_size: int
) -> tuple[Transformer, Callable[[Any], TrainState], Callable[..., tuple[TrainState, transformer_steps.Metrics]]]:
    """The model of a config, how its state begins (a function of a key), and its train step.

    Raises:
        UserError: the mesh does not divide the model.
    """
    section = config.training
    model = build_transformer(config.model, vocab_size=vocab_size, num_classes=num_classes, grid_size=grid_size)
    sharding.check_divides(
        mesh,
        {
            "width of the model": (model.dim, "fsdp"),
            "heads": (model.num_heads, "tensor"),
            "hidden units": (model.hidden_dim, "tensor"),
            "clusters of codes": (model.vocab_size // cluster_size, "tensor"),
        },
    )
    optimizer = optimizer_of(section)
    train_step = transformer_steps.make_train_step(
        model,
        optimizer,
        cluster_size=cluster_size,
        cluster_weight=cluster_weight_schedule(
            section.cluster_weight_schedule, section.cluster_weight, section.cluster_weight_end, section.num_steps
        ),
        ema_decay=section.ema_decay,
        key=jax.random.fold_in(jax.random.key(config.seed), 1),
        accumulation=section.accumulation,
        loss_chunks=section.loss_chunks,
        learning_rate=learning_rate_of(section),
    )
    if section.max_skipped_steps:
        train_step = skip_unless_finite(train_step)
    init = functools.partial(transformer_steps.init_train_state, model=model, optimizer=optimizer)
    return model, init, train_step


def read_codes_metadata(
    directory: epath.Path, tokenizer: artifacts.Metadata, tokenizer_directory: epath.Path
) -> artifacts.Metadata:
    """Metadata of a split's codes; refuses codes of another tokenizer."""
    metadata = artifacts.require(directory, "extract_codes")
    if metadata.inputs["tokenizer"] != tokenizer.fingerprint:
        raise UserError(
            f"{directory} holds codes of another tokenizer ({metadata.inputs['tokenizer'][:12]}) than "
            f"{tokenizer_directory} ({tokenizer.fingerprint[:12]}); run python -m iar_jax.extract_codes for this one"
        )
    return metadata


def with_initial_weights(state: TrainState, directory: epath.Path, model: Transformer, mesh: Mesh) -> TrainState:
    """A fresh state that starts from a finished transformer's averaged weights."""
    initial_model, params, _, _ = load_transformer(directory, mesh)
    if jax.tree.map(jnp.shape, params) != jax.tree.map(jnp.shape, state.params):
        raise UserError(
            f"{directory} is another model ({transformer_facts(initial_model)}, width {initial_model.dim}, "
            f"{initial_model.num_layers} layers) than the config's ({transformer_facts(model)}, width {model.dim}, "
            f"{model.num_layers} layers)"
        )
    # Two copies: the step gives its state's buffers away.
    return dataclasses.replace(state, params=params, ema_params=jax.tree.map(jnp.copy, params))


def validate(eval_step, params, source: FirstCrop, mesh: Mesh, batch_size: int) -> dict[str, float]:
    """Losses and accuracies over the val split, without dropout of any kind."""
    sums: dict[str, float] = {}
    for batch in loader.eval_batches(source, batch_size):
        inputs = sharding.global_batch(mesh, sharding.part_of(mesh, batch))
        found = jax.device_get(eval_step(params, inputs["label"], inputs["codes"], inputs["valid"]))
        sums = {name: sums.get(name, 0.0) + float(value) for name, value in found.items()}
    count = sums.pop("count")
    return {name: float(np.float64(value) / count) for name, value in sums.items()}


if __name__ == "__main__":
    command_line.main(run)
