"""Stage 4: codes + permutation -> a generator, trained on token_loss + lambda * cluster_loss.

    python -m iar_jax.train --config=configs/mnist.py --workdir=runs/mnist

config.inputs.transformer names a finished transformer whose averaged weights training starts from; with
config.inputs.step it goes on from that checkpoint instead, optimizer, step and all (a decay that branches off a run at
a constant rate).
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh
from jaxtyping import Float
from ml_collections import ConfigDict

from iar_jax.config import command_line
from iar_jax.config.relevance import RelevantConfig, relevant
from iar_jax.data import loader
from iar_jax.data.codes import CodeSource, FirstCrop, random_crop_codes, read_permutation
from iar_jax.generators.code_layout import layout_of
from iar_jax.generators.generator import KINDS, Generator, build_generator, generator_at, load_generator
from iar_jax.generators.settings import Facts, Objective, needs_vectors
from iar_jax.losses.cluster_loss import Clusters
from iar_jax.models.quantizer import normalize
from iar_jax.models.tokenizer import load_tokenizer
from iar_jax.runtime import artifacts, checkpoint, distributed, sharding
from iar_jax.runtime.artifacts import Artifact
from iar_jax.runtime.errors import UserError, refusal
from iar_jax.runtime.progress import say
from iar_jax.runtime.section import Section
from iar_jax.training import generator_steps
from iar_jax.training.context_noise import noise_of
from iar_jax.training.loop import TrainingRun
from iar_jax.training.optimizer import optimizer_of
from iar_jax.training.schedules import cluster_weights_of, learning_rate_of, lookahead_weight_of
from iar_jax.training.state import TrainState, skip_unless_finite, state_shardings

READS = ("seed", "inputs", "mesh", "data", "model", "training")


def run(config: ConfigDict, workdir: epath.Path, thorough: bool = False) -> None:
    """Trains the generator of config.model on the rearranged codes and leaves it in workdir/train.

    A thorough run reads a finished one's weights, and trains on from the checkpoint before where they are damaged.
    """
    directory, section = workdir / "train", config.training
    inputs = open_inputs(config.inputs, workdir)
    made_by = relevant(config, ("seed", "model", "training"))
    given = artifacts.fingerprints(inputs)
    mesh = sharding.make_mesh(**config.mesh)
    if artifacts.finished(directory, made_by, given):
        problem = refusal(lambda: load_generator(directory, mesh)) if thorough else ""
        if not problem:
            say(f"train: done, in {directory}")
            return
        say(f"WARNING: {problem}")
    sharding.check_batch_size(mesh, section.batch_size, "config.training.batch_size", section.accumulation)
    codes = open_codes(inputs, config.data.cache_dir)
    vectors = code_vectors(inputs, mesh) if needs_vectors(section) else None
    generator, init, train_step = make_step(config, mesh, codes.facts, codes.cluster_sizes, vectors)
    facts = generator.facts.to_json()
    eval_step = jax.jit(generator_steps.make_eval_step(generator), out_shardings=sharding.replicated(mesh))

    with (
        sharding.use_mesh(mesh),
        TrainingRun.of(section, directory, "train", flops_per_step=generator.flops(section.batch_size)) as training,
    ):
        command_line.save_config(config, workdir)
        if artifacts.begin(directory, "train", made_by, given):
            artifacts.reopen(directory)
        # What a checkpoint is read by while training goes on.
        artifacts.note(directory, {"facts": facts})
        if runs := KINDS[config.model.kind].implementation(config.model, generator.facts, sharding.platform()):
            say(f"train: {runs}")
        key = jax.random.key(config.seed)
        state, shardings = sharding.initialise_sharded(init, mesh, key, shardings_of=state_shardings)
        abstract = checkpoint.abstract_tree(state, shardings)
        initial = inputs.get("transformer")
        if initial and config.inputs.step:
            state = training.resume(state, abstract, branched_from=(initial.directory, config.inputs.step))
        else:
            state = with_weights_of(initial, state, config.model, mesh) if initial else state
            state = training.resume(state, abstract)
        step_fn = jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, sharding.replicated(mesh)))
        part, num_parts = sharding.local_part(mesh)
        batches = loader.train_batches(
            codes.train,
            random_crop_codes,
            seed=config.seed,
            batch_size=section.batch_size,
            first_step=training.step,
            part=part,
            num_parts=num_parts,
        )

        def validated(state: TrainState) -> dict[str, float]:
            return validate(eval_step, state.ema_params, codes.val, mesh, section.batch_size)

        for _ in training.steps():
            batch = sharding.global_batch(mesh, training.next_batch(batches))
            state, metrics = step_fn(state, batch)
            training.finished_step(state, metrics, validated)
        figures = training.log_validation(validated(state))
        fingerprint = artifacts.fingerprint_arrays(distributed.to_host(state.ema_params))
        num_params = sum(leaf.size for leaf in jax.tree.leaves(state.ema_params))
        about = {"facts": facts, "step": section.num_steps, "num_params": num_params, "seconds": training.seconds}
        training.wait_until_saved()
        artifacts.finish(directory, fingerprint, figures | about)
    say(f"train: {num_params:,} parameters; on val {summary(figures)}")


def open_inputs(section: Section, workdir: epath.Path) -> dict[str, Artifact]:
    """What training reads: artifacts that belong together; also a "transformer" to start from, where one is given.

    Args:
        section: config.inputs.
    """
    inputs = artifacts.open_inputs(section, workdir, "tokenizer", "codebook", "codes", "val_codes")
    if section["transformer"]:
        initial, codebook = open_initial(section, workdir), inputs["codebook"]
        if initial.metadata.inputs["codebook"] != codebook.fingerprint:
            raise UserError(
                f"{initial.directory} was trained with another codebook "
                f"({initial.metadata.inputs['codebook'][:12]}) than {codebook.directory} "
                f"({codebook.fingerprint[:12]}): its ids mean other codes (import_weights "
                "--rearrange turns a file of weights with original ids into a transformer of rearranged ones)"
            )
        inputs["transformer"] = initial
    elif section["step"]:
        raise UserError("config.inputs.step is set, and config.inputs.transformer, the run of that step, is not")
    return inputs


def open_initial(section: Section, workdir: epath.Path) -> Artifact:
    """What training starts from: config.inputs.transformer, at a checkpoint where config.inputs.step asks for one.

    A run that has begun needs that checkpoint no more, which may be gone by now.
    """
    directory, step = artifacts.locate(section, workdir, "transformer"), section["step"]
    begun, source = artifacts.read_metadata(workdir / "train"), artifacts.read_metadata(directory)
    gone = step and step not in checkpoint.steps_in(directory / "checkpoints")
    if (
        gone
        and begun
        and source
        and "transformer" in begun.inputs
        and checkpoint.steps_in(workdir / "train/checkpoints")
    ):
        return Artifact(directory, dataclasses.replace(source, fingerprint=begun.inputs["transformer"]))
    return Artifact(directory, generator_at(directory, step))


class Codes(NamedTuple):
    """Codes to train on and to validate with, as rearranged ids, and what they say of a generator."""

    train: CodeSource
    val: FirstCrop
    facts: Facts
    cluster_sizes: tuple[Clusters, ...]


def open_codes(inputs: Mapping[str, Artifact], cache_dir: str) -> Codes:
    """The codes of both splits, in the rearranged order.

    Args:
        cache_dir: config.data.cache_dir.
    """
    permutation = read_permutation(inputs["codebook"])
    directory, num_classes = inputs["codes"].directory, len(inputs["codes"].metadata.figures["class_names"])
    train = CodeSource(directory, permutation, num_classes, cache_dir)
    val = FirstCrop(CodeSource(inputs["val_codes"].directory, permutation, num_classes, cache_dir))
    layout = layout_of(inputs["codes"], train[0]["codes"].shape[1])
    return Codes(train, val, Facts(len(permutation.old_to_new), num_classes, layout), permutation.levels)


def code_vectors(inputs: Mapping[str, Artifact], mesh: Mesh) -> Float[np.ndarray, "N d"]:
    """Unit vectors of the tokenizer's codes, in the rearranged order."""
    tokenizer = load_tokenizer(inputs["tokenizer"].directory, mesh)
    vectors = np.asarray(normalize(tokenizer.params["quantizer"]["codebook"]))
    return np.asarray(read_permutation(inputs["codebook"]).rearrange_codebook(vectors))


def make_step(
    config: ConfigDict,
    mesh: Mesh,
    facts: Facts,
    cluster_sizes: tuple[Clusters, ...],
    vectors: Float[np.ndarray, "N d"] | None = None,
) -> tuple[Generator, Callable[[Any], TrainState], Callable[..., tuple[TrainState, generator_steps.Metrics]]]:
    """The generator of a config, how its state begins (a function of a key), and its train step.

    Args:
        vectors: of the rearranged codes, where config.training asks for them (`settings.needs_vectors`).

    Raises:
        UserError: the mesh does not divide the generator, or λ is not given for each level of clusters.
    """
    section = config.training
    if len(section.cluster_weights) != len(cluster_sizes):
        raise UserError(
            f"config.training.cluster_weights is {tuple(section.cluster_weights)}, and the codebook has "
            f"{len(cluster_sizes)} levels of clusters: give one weight for each"
        )
    objective = Objective.of(section, cluster_sizes, vectors)
    generator = build_generator(config.model, facts, objective)
    sharding.check_divides(mesh, generator.splits)
    optimizer = optimizer_of(section, generator.decays)
    train_step = generator_steps.make_train_step(
        generator,
        optimizer,
        cluster_weights=cluster_weights_of(section),
        lookahead_weight=lookahead_weight_of(section),
        noise=noise_of(section, objective, facts.vocab_size),
        ema_decay=section.ema_decay,
        key=jax.random.fold_in(jax.random.key(config.seed), 1),
        accumulation=section.accumulation,
        learning_rate=learning_rate_of(section),
    )
    if section.max_skipped_steps:
        train_step = skip_unless_finite(train_step)
    init = functools.partial(generator_steps.init_train_state, generator=generator, optimizer=optimizer)
    return generator, init, train_step


def with_weights_of(initial: Artifact, state: TrainState, section: ConfigDict, mesh: Mesh) -> TrainState:
    """A fresh state that starts from a finished transformer's averaged weights.

    Args:
        section: config.model.

    Raises:
        UserError: the transformer is another model; names the fields of the config that differ.
    """
    params = load_generator(initial.directory, mesh).params
    if jax.tree.map(jnp.shape, params) != jax.tree.map(jnp.shape, state.ema_params):
        ours = RelevantConfig({"model": section.to_dict()})
        others = [str(d) for d in ours.differences(initial.metadata.config, None)[0]]
        facts = initial.metadata.figures["facts"]
        raise UserError(f"{initial.directory} is another model than the config's: {'; '.join(others) or facts}")
    # Two copies: the step gives its state's buffers away.
    return dataclasses.replace(state, params=state.params | params, ema_params=jax.tree.map(jnp.copy, params))


def validate(eval_step, params, source: FirstCrop, mesh: Mesh, batch_size: int) -> dict[str, float]:
    """Losses and accuracies over the val split, without dropout of any kind."""
    sums: dict[str, float] = {}
    for batch in loader.eval_batches(source, batch_size):
        rows = sharding.global_batch(mesh, sharding.part_of(mesh, batch))
        valid = rows.pop("valid")
        found = jax.device_get(eval_step(params, rows, valid))
        sums = {name: sums.get(name, 0.0) + float(value) for name, value in found.items()}
    count = sums.pop("count")
    return {name: float(np.float64(value) / count) for name, value in sums.items()}


def summary(figures: Mapping[str, float]) -> str:
    """The figures of the validation, of each level of clusters, in a line."""
    losses = [name for name in figures if "_loss" in name]
    accuracies = [name for name in figures if "_accuracy" in name]
    said = [f"{name.replace('_', ' ')} {figures[name]:.3f}" for name in losses]
    said += [f"{name.replace('_', ' ')} {figures[name]:.1%}" for name in accuracies]
    return ", ".join(said)


if __name__ == "__main__":
    command_line.main(functools.partial(run, thorough=True), READS)
