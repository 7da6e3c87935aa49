"""Weights from elsewhere in, as artifacts that the other stages take like our own; and ours out.

    python -m iar_jax.import_weights --config=configs/imagenet.py:B,256 --workdir=runs/llamagen \\
        --tokenizer=vq_ds16_c2i.pt --transformer=c2i_B_256.pt
    python -m iar_jax.import_weights --config=configs/imagenet.py:B,384 --workdir=runs/iar \\
        --tokenizer=vq_ds16_c2i.pt --mapping=mapping.pt --reordered_tokenizer=vq_reordered.pt --transformer=iar_B.pt
    python -m iar_jax.import_weights --config=configs/imagenet.py:B,256 --workdir=runs/rearranged \\
        --tokenizer=vq_ds16_c2i.pt --transformer=c2i_B_256.pt --rearrange
    python -m iar_jax.import_weights --config=configs/imagenet.py:B,256 --workdir=runs/mine \\
        --export=transformer.safetensors --what=transformer
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import flags
from etils import epath
from ml_collections import ConfigDict

from iar_jax import rearrange_codebook
from iar_jax.codebook.permutation import Permutation, save_permutation
from iar_jax.config import command_line
from iar_jax.config.checks import grid_size
from iar_jax.config.relevance import RelevantConfig, relevant
from iar_jax.data.codes import permutation_fingerprint, read_permutation
from iar_jax.generators.code_layout import CodeLayout
from iar_jax.generators.generator import Generator, generator_directory, load_generator
from iar_jax.generators.settings import Facts
from iar_jax.interop import llamagen, maskgit
from iar_jax.interop.torch_files import read_torch_file
from iar_jax.models.tokenizer import load_tokenizer
from iar_jax.models.vqgan import VQModel
from iar_jax.runtime import artifacts, checkpoint, lock, sharding
from iar_jax.runtime.errors import UserError
from iar_jax.runtime.files import writing
from iar_jax.runtime.progress import say

READS = ("seed", "inputs", "mesh", "data", "tokenizer", "codebook", "model")


# Weights of each kind of generator: (file, config.model, facts) -> generator and parameters; (parameters, file).
READERS: dict[str, Callable[..., tuple[Generator, Any]]] = {
    "autoregressive": llamagen.read_generator,
    "masked": maskgit.read_generator,
}
WRITERS = {"autoregressive": llamagen.save_transformer, "masked": maskgit.save_generator}


def define_flags() -> None:
    flags.DEFINE_string("tokenizer", None, "LlamaGen tokenizer, with its codebook in the original order.")
    flags.DEFINE_string("reordered_tokenizer", None, "IAR's tokenizer with the codebook in the rearranged order.")
    flags.DEFINE_string(
        "mapping", None, "IAR's mapping of original to rearranged ids; without it ids stay as they are."
    )
    flags.DEFINE_string("transformer", None, "LlamaGen, IAR or Halton-MaskGIT transformer, as config.model.kind says.")
    flags.DEFINE_boolean(
        "rearrange",
        False,
        "Cluster the codebook as rearrange_codebook does, and turn the transformer, whose ids are the original ones, "
        "into one of rearranged ids, without training.",
    )
    flags.DEFINE_string("export", None, "File to write: .safetensors, or .pt where PyTorch is installed.")
    flags.DEFINE_enum("what", "transformer", tuple(EXPORTS), "What --export writes.")


def run(config: ConfigDict, workdir: epath.Path) -> None:
    """Imports what the flags name into the workdir, or exports from it. All files are read and checked before anything
    is written; what is there already with the same content stays."""
    options = flags.FLAGS
    if options.export:
        EXPORTS[options.what](config, workdir, options.export)
        say(f"import_weights: {options.what} of {workdir} written to {options.export}")
        return
    source = options.tokenizer or options.reordered_tokenizer
    if not source:
        raise UserError("give --tokenizer=FILE (or --reordered_tokenizer=FILE with --mapping=FILE), or --export=FILE")
    if options.rearrange and (options.mapping or options.reordered_tokenizer):
        raise UserError("give --rearrange, or IAR's --mapping and --reordered_tokenizer, not both")
    module, params, permutation = read_tokenizer(
        config, options.tokenizer, options.reordered_tokenizer, options.mapping
    )
    made_by = RelevantConfig(
        {"data": {"resolution": config.data.resolution}, "tokenizer": tokenizer_section(config, module, source)}
    )
    transformer = read_transformer(config, options.transformer, module.codebook_size) if options.transformer else None

    tokenizer = save_tokenizer_artifact(workdir / "tokenizer", made_by, params)
    say(
        f"import_weights: tokenizer with {module.codebook_size} codes of {module.downsampling} x {module.downsampling} "
        f"pixels, in {workdir / 'tokenizer'}"
    )
    if options.rearrange:
        rearrange_codebook.run(config, workdir)
    else:
        save_permutation_artifact(workdir / "codebook", relevant(config, ("codebook",)), tokenizer, permutation)
    if transformer:
        save_transformer_artifact(config, workdir, *transformer, tokenizer, rearranged=options.rearrange)


def read_tokenizer(
    config: ConfigDict, path: str | None, reordered_path: str | None, mapping_path: str | None
) -> tuple[VQModel, Any, Permutation]:
    """A tokenizer with its codebook in the original order, and the mapping's permutation (of ids as they are where
    there is no mapping).

    Raises:
        UserError: the mapping is not a permutation, or does not turn the one codebook into the other.
    """
    if reordered_path and not mapping_path:
        raise UserError("--reordered_tokenizer needs --mapping, which says where its codes come from")
    module, params = llamagen.load_tokenizer(path or reordered_path or "")
    codebook = params["quantizer"]["codebook"]
    params["quantizer"] = {"codebook": codebook}  # without the buffer that counts used codes
    size, *coarser = config.codebook.cluster_sizes
    old_to_new = np.arange(len(codebook), dtype=np.int32)
    if mapping_path:
        old_to_new = read_mapping(mapping_path, len(codebook))
    try:
        permutation = Permutation(old_to_new, size, tuple(coarser))
    except ValueError as error:
        raise UserError(f"{mapping_path or 'config.codebook.cluster_sizes'}: {error}") from error
    if reordered_path:
        reordered = llamagen.load_tokenizer(reordered_path)[1]["quantizer"]["codebook"]
        if path is None:
            params["quantizer"]["codebook"] = reordered[permutation.old_to_new]
        else:
            check_mapping(codebook, reordered, permutation, mapping_path)
    return module, params, permutation


def read_transformer(config: ConfigDict, path: str, codebook_size: int) -> tuple[Generator, Any]:
    """The generator in a file, which must be the config's, and its parameters. The number of classes is the file's."""
    facts = Facts(codebook_size, 0, CodeLayout.square(grid_size(config)))
    return READERS[config.model.kind](path, config.model, facts)


def save_tokenizer_artifact(directory: epath.Path, made_by: RelevantConfig, params: Any) -> artifacts.Metadata:
    """Writes a tokenizer; returns its metadata."""
    figures = {"codebook_fingerprint": artifacts.fingerprint_arrays(params["quantizer"]["codebook"])}
    return save_artifact(
        directory,
        "train_tokenizer",
        made_by,
        {},
        artifacts.fingerprint_arrays(params),
        lambda: checkpoint.save_params(directory / "checkpoints", 0, params),
        figures,
    )


def save_permutation_artifact(
    directory: epath.Path, made_by: RelevantConfig, tokenizer: artifacts.Metadata, permutation: Permutation
) -> None:
    """Writes a mapping as the codebook that rearrange_codebook would have left."""
    codebook_fingerprint = tokenizer.figures["codebook_fingerprint"]

    def write() -> None:
        with writing(directory / "permutation.npz") as local:
            save_permutation(local, permutation, codebook_fingerprint)

    figures = {
        "codebook_fingerprint": codebook_fingerprint,
        "num_clusters": len(permutation.bounds) - 1,
    }
    inputs = {"tokenizer": tokenizer.fingerprint}
    fingerprint = permutation_fingerprint(permutation)
    save_artifact(directory, "rearrange_codebook", made_by, inputs, fingerprint, write, figures)


def save_transformer_artifact(
    config: ConfigDict,
    workdir: epath.Path,
    generator: Generator,
    params: Any,
    tokenizer: artifacts.Metadata,
    rearranged: bool,
) -> None:
    """Writes a transformer; where its ids are the original ones (`rearranged`) it becomes one of rearranged ids."""
    directory = workdir / "train"
    codebook = artifacts.require(workdir / "codebook", "rearrange_codebook")
    if rearranged:
        permutation = read_permutation(artifacts.Artifact(workdir / "codebook", codebook))
        params = generator.with_vocabulary(params, permutation.new_to_old)
    figures = {
        "facts": generator.facts.to_json(),
        "step": 0,
        "num_params": sum(leaf.size for leaf in jax.tree.leaves(params)),
    }
    save_artifact(
        directory,
        "train",
        relevant(config, ("model",)),
        {"tokenizer": tokenizer.fingerprint, "codebook": codebook.fingerprint},
        artifacts.fingerprint_arrays(params),
        lambda: checkpoint.save_params(directory / "checkpoints", 0, params),
        figures,
    )
    say(f"import_weights: transformer with {figures['num_params']:,} parameters, in {directory}")


def save_artifact(
    directory: epath.Path,
    stage: str,
    made_by: RelevantConfig,
    inputs: dict[str, str],
    fingerprint: str,
    write: Callable[[], None],
    figures: dict[str, Any],
) -> artifacts.Metadata:
    """Writes the artifact that a stage of ours would have left; one with the same content stays as it is.

    Raises:
        UserError: another one is there, or one that a stage is making.
    """
    found = artifacts.finished(directory, made_by, inputs)
    if found and found.fingerprint == fingerprint:
        return found
    check_free(directory)
    with lock.hold(directory):
        check_free(directory)  # as it is now that nobody else writes to it
        artifacts.clear(directory)
        artifacts.begin(directory, stage, made_by, inputs)
        artifacts.note(directory, {"imported": True})
        write()
        return artifacts.finish(directory, fingerprint, figures | {"imported": True})


def tokenizer_section(config: ConfigDict, module: VQModel, path: str) -> dict[str, Any]:
    """config.tokenizer as plain data; refuses a file that holds another tokenizer."""
    section = config.tokenizer.to_dict()
    for name, ours in section.items():
        theirs = getattr(module, name)
        if name != "dtype" and ours != theirs:
            raise UserError(
                f"{path}: config.tokenizer.{name} is {ours}, and the file's tokenizer has {theirs}; set "
                f"--config.tokenizer.{name}={theirs}"
            )
    return section


def read_mapping(path: str, codebook_size: int) -> np.ndarray:
    """IAR's mapping, int32 [N]: a tensor by itself in a .pt file, or the only one in a .safetensors file."""
    mapping = read_torch_file(path)
    if isinstance(mapping, dict) and len(mapping) == 1:
        mapping = next(iter(mapping.values()))
    if not isinstance(mapping, np.ndarray) or mapping.shape != (codebook_size,) or mapping.dtype.kind not in "iu":
        found = f"shape {mapping.shape}, {mapping.dtype}" if isinstance(mapping, np.ndarray) else type(mapping).__name__
        raise UserError(f"{path} does not hold a mapping of {codebook_size} ids ({found})")
    return mapping.astype(np.int32)


def check_mapping(codebook: np.ndarray, reordered: np.ndarray, permutation: Permutation, path: str | None) -> None:
    """Refuses a mapping that does not put each code of the one codebook at its place in the other."""
    if reordered.shape != codebook.shape:
        raise UserError(f"--reordered_tokenizer has a codebook of {reordered.shape}, --tokenizer of {codebook.shape}")
    wrong = np.flatnonzero(np.any(reordered[permutation.old_to_new] != codebook, axis=1))
    if len(wrong):
        old = int(wrong[0])
        raise UserError(
            f"{path}: the mapping does not turn --tokenizer's codebook into --reordered_tokenizer's: code {old} should "
            f"be code {permutation.old_to_new[old]} there, and is another vector ({len(wrong)} of {len(codebook)} are "
            "wrong)"
        )


def check_free(directory: epath.Path) -> None:
    """Raises UserError where an artifact is there, or one with checkpoints is being made; what a killed import left is
    nothing."""
    begun = artifacts.read_metadata(directory)
    if begun is None or (not begun.finished and begun.figures.get("imported")):
        return
    if begun.finished or (directory / "checkpoints").exists():
        raise UserError(f"another {directory} is there already; give another --workdir, or move it away")


def export_transformer(config: ConfigDict, workdir: epath.Path, path: str) -> None:
    """Writes a transformer as the code that it is from loads it. One of ours predicts rearranged ids: it goes with the
    rearranged tokenizer."""
    directory = generator_directory(config.inputs, workdir)
    loaded = load_generator(directory, sharding.make_mesh(**config.mesh))
    WRITERS[loaded.metadata.config["model"].get("kind", config.model.kind)](jax.device_get(loaded.params), path)


def export_tokenizer(config: ConfigDict, workdir: epath.Path, path: str) -> None:
    """Writes a tokenizer as LlamaGen's own code loads it."""
    directory = artifacts.locate(config.inputs, workdir, "tokenizer")
    save_tokenizer(jax.device_get(load_tokenizer(directory, sharding.make_mesh(**config.mesh)).params), path)


def export_rearranged_tokenizer(config: ConfigDict, workdir: epath.Path, path: str) -> None:
    """Writes a tokenizer with its codebook in the rearranged order."""
    inputs = artifacts.open_inputs(config.inputs, workdir, "tokenizer", "codebook")
    loaded = load_tokenizer(inputs["tokenizer"].directory, sharding.make_mesh(**config.mesh))
    params = jax.device_get(loaded.params)
    codebook = read_permutation(inputs["codebook"]).rearrange_codebook(params["quantizer"]["codebook"])
    save_tokenizer(params | {"quantizer": {"codebook": codebook}}, path)


def save_tokenizer(params: Any, path: str) -> None:
    """Writes tokenizer parameters so that LlamaGen's strict loading takes them."""
    # LlamaGen's network counts used codes in a buffer that its strict loading asks for.
    quantizer = params["quantizer"] | {"codebook_used": np.zeros(65536, np.float32)}
    llamagen.save_tokenizer(params | {"quantizer": quantizer}, path)


# --what: what --export writes.
EXPORTS = {
    "transformer": export_transformer,
    "tokenizer": export_tokenizer,
    "rearranged_tokenizer": export_rearranged_tokenizer,
}


if __name__ == "__main__":
    define_flags()
    command_line.main(run, READS)
