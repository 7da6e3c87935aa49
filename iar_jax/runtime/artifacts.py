"""What a stage leaves in the workdir: files and a metadata.json that binds them to their inputs.

An artifact is finished or it is not there. A stage refuses inputs that do not belong together and a config that
changed behind a finished stage.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from iar_jax.runtime import distributed
from iar_jax.runtime.default_config import default_config
from iar_jax.runtime.errors import UserError
from iar_jax.runtime.progress import say

FORMAT_VERSION = 1

VERSIONED_PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "numpy")

# Fields that change how a stage runs but not what it makes: they may change from one part of a run to the next.
IMMATERIAL_FIELDS = {
    *(
        f"{section}.{field}"
        for section in ("tokenizer_training", "training")
        for field in (
            "log_every",
            "eval_every",
            "checkpoint_every",
            "keep_checkpoints",
            "keep_every",
            "keep_best",
            "max_skipped_steps",
        )
    ),
    "training.accumulation",
    "training.loss_chunks",
    "model.attention_block",
    "model.scan_unroll",
    "model.remat",
    "data.tfds_dir",
    "codes.batch_size",
    "sampling.batch_size",
    "sampling.write_pngs",
    "evaluation.batch_size",
}


@dataclasses.dataclass(frozen=True)
class Metadata:
    """The content of metadata.json.

    Attributes:
        stage: which stage made it.
        finished: false while it is being made.
        fingerprint: of the artifact's content; empty while it is being made.
        inputs: fingerprints of what it was made from, by name.
        config: the sections of the config that matter for it.
        figures: what the stage measured, for people and the report.
        versions: of the software that made it.
    """

    stage: str
    finished: bool
    fingerprint: str
    inputs: dict[str, str]
    config: dict[str, Any]
    figures: dict[str, Any]
    versions: dict[str, str]
    format_version: int = FORMAT_VERSION


def relevant_config(config: ConfigDict, sections: tuple[str, ...]) -> dict[str, Any]:
    """The named sections (or single fields) as plain data."""
    chosen = {name: config[name] for name in sections}
    return {name: value.to_dict() if isinstance(value, ConfigDict) else value for name, value in chosen.items()}


def read_metadata(directory: epath.Path) -> Metadata | None:
    """The metadata of an artifact, finished or not; None where there is none.

    Raises:
        UserError: unreadable, or of a later format.
    """
    path = directory / "metadata.json"
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text())
        version = content["format_version"]
        if version != FORMAT_VERSION:
            raise UserError(f"{path} has format version {version}; this program reads {FORMAT_VERSION}: update iar_jax")
        return Metadata(**content)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is damaged ({error!r}); delete {directory} and run its stage again") from error


def finished(directory: epath.Path, config: dict[str, Any], inputs: dict[str, str]) -> Metadata | None:
    """Metadata of an artifact that is there and whole; None where there is none, or it is to be trained for longer.

    Args:
        inputs: fingerprints that are known before anything is opened; others that the artifact has are not compared.

    Raises:
        UserError: what is there, finished or not, was made with another config or from other inputs.
    """
    found = read_metadata(directory)
    if found is None:
        return None
    if found.figures.get("imported"):
        # How and on what it was trained is not known, and does not matter.
        config = _restricted(config, found.config)
        inputs = {name: fingerprint for name, fingerprint in inputs.items() if name in found.inputs}
    immaterial = check_config(directory, found, config)
    for name, fingerprint in inputs.items():
        if found.inputs.get(name) != fingerprint:
            raise UserError(
                f"{directory} was made from another {name} ({found.inputs.get(name, 'none')[:12]}) than the one "
                f"given now ({fingerprint[:12]}); delete {directory} to make it again, or use another --workdir"
            )
    longer = any(difference.field.endswith(".num_steps") for difference in immaterial)
    return found if found.finished and not longer else None


def begin(directory: epath.Path, stage: str, config: dict[str, Any], inputs: dict[str, str]) -> Metadata | None:
    """Starts or resumes an artifact; returns its metadata if it is finished already.

    Raises:
        UserError: as `finished`.
    """
    done = finished(directory, config, inputs)
    found = read_metadata(directory)
    distributed.wait_for_all(f"begin {stage}")
    if found is None:
        directory.mkdir(parents=True, exist_ok=True)
        _write(directory, Metadata(stage, False, "", inputs, config, {}, _versions()))
    elif done is None:
        for difference in check_config(directory, found, config):
            say(f"{stage}: noted, {difference}")
        _write(directory, dataclasses.replace(found, finished=False, config=config))
    return done


def note(directory: epath.Path, figures: dict[str, Any]) -> None:
    """Adds figures to an artifact while it is being made."""
    found = read_metadata(directory)
    if found is None:
        raise FileNotFoundError(f"{directory} was removed while its stage ran")
    _write(directory, dataclasses.replace(found, figures=found.figures | figures))


def finish(directory: epath.Path, fingerprint: str, figures: dict[str, Any]) -> Metadata:
    """Marks the artifact that `begin` started as whole."""
    found = read_metadata(directory)
    if found is None:
        raise FileNotFoundError(f"{directory} was removed while its stage ran")
    done = dataclasses.replace(found, finished=True, fingerprint=fingerprint, figures=figures, versions=_versions())
    _write(directory, done)
    return done


def require(directory: epath.Path, stage: str) -> Metadata:
    """Metadata of a finished artifact that a later stage reads.

    Raises:
        UserError: not there, not finished, or made by another stage.
    """
    found = read_metadata(directory)
    if found is None or not found.finished:
        state = "is not there" if found is None else "is not finished"
        raise UserError(f"{directory} {state}; run python -m iar_jax.{stage} first (or python -m iar_jax.pipeline)")
    if found.stage != stage:
        raise UserError(f"{directory} was made by the stage {found.stage}; one made by {stage} is needed here")
    return found


def input_directory(config: ConfigDict, workdir: epath.Path, name: str, default: str) -> epath.Path:
    """Where an input artifact lies: config.inputs.<name>, or its place in the workdir."""
    return epath.Path(config.inputs[name]).expanduser() if config.inputs[name] else workdir / default


def samples_name(config: ConfigDict, step: int) -> str:
    """STEP-SETTINGS, the name of the samples of config.sampling from the checkpoint of a step, and of their scores;
    "checkpoint-" before it where config.sampling.step asks for one."""
    s = config.sampling
    settings = f"cfg{s.cfg_scale:g}-t{s.temperature:g}-k{s.top_k}-p{s.top_p:g}-{s.labels}-n{s.num_images}-seed{s.seed}"
    schedules = {
        "constant": "",
        "interval": f"-interval{s.cfg_first}to{s.cfg_last}",
        "linear": f"-linear{s.cfg_start:g}",
        "power_cosine": f"-powercosine{s.cfg_power:g}",
        "iar2": f"-iar2from{s.cfg_start:g}a{s.cfg_attention_weight:g}",
    }
    settings += schedules[s.cfg_schedule]
    settings += f"-{s.dtype}" if s.dtype != "model" else ""
    settings += f"-{s.image_size}px" if s.image_size else ""
    return f"{'checkpoint-' if s.step else ''}{step:07d}-{settings}"


class Difference(NamedTuple):
    """A field of the config that is not what it was."""

    field: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.field} was {self.old!r}, now {self.new!r}"


def check_config(directory: epath.Path, found: Metadata, config: dict[str, Any]) -> list[Difference]:
    """The differences between an artifact's config and this one that do not matter.

    The number of steps does not where all schedules are constant, so that no step before would have been another; a
    finished run can only get longer.

    Raises:
        UserError: some do matter; lists them.
    """
    as_stored = json.loads(json.dumps(config))

    def matters(difference: Difference) -> bool:
        section, _, name = difference.field.removeprefix("config.").rpartition(".")
        if name == "num_steps":
            schedules = [value for field, value in found.config[section].items() if field.endswith("schedule")]
            return any(value != "constant" for value in schedules) or (
                found.finished and difference.new < difference.old
            )
        return f"{section}.{name}" not in IMMATERIAL_FIELDS

    # A field that came with a later version was at its default before.
    defaults = {d.field: d.new for d in _differences({}, json.loads(default_config().to_json()), "config")}
    differences = [
        difference
        for difference in _differences(found.config, as_stored, "config")
        if difference.old is not None or defaults.get(difference.field) != difference.new
    ]
    material = [str(difference) for difference in differences if matters(difference)]
    if material:
        raise UserError(
            f"{directory} was made with another config:\n  "
            + "\n  ".join(material)
            + f"\nUse another --workdir, set the old values, or delete {directory} and what was made from it."
        )
    return differences


def _restricted(config: Any, known: Any) -> Any:
    """The parts of a config that `known` has too."""
    if isinstance(config, dict) and isinstance(known, dict):
        return {key: _restricted(config[key], value) for key, value in known.items() if key in config}
    return config


def _differences(old: Any, new: Any, field: str) -> Iterator[Difference]:
    if isinstance(new, dict) and isinstance(old, dict | None):
        old = old or {}
        for key in sorted(old.keys() | new.keys()):
            yield from _differences(old.get(key), new.get(key), f"{field}.{key}")
    elif old != new:
        yield Difference(field, old, new)


def _write(directory: epath.Path, metadata: Metadata) -> None:
    if distributed.is_first():
        partial = directory / "metadata.json.partial"
        partial.write_text(json.dumps(dataclasses.asdict(metadata), indent=2) + "\n")
        partial.replace(directory / "metadata.json")
    distributed.wait_for_all(f"metadata of {directory.name}")


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in VERSIONED_PACKAGES}


def fingerprint_arrays(tree: Any) -> str:
    """SHA-256 over names, shapes, dtypes and bytes of a tree of arrays."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.shape} {array.dtype}\n".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def sha256_of(path: os.PathLike) -> str:
    """SHA-256 of a file."""
    with epath.Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_bytes(path: epath.Path, content: bytes) -> None:
    """Writes a file so that it is whole or not there."""
    partial = path.parent / (path.name + ".partial")
    partial.write_bytes(content)
    partial.replace(path)
