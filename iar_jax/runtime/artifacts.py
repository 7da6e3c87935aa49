"""What a stage leaves in the workdir: files and a metadata.json that binds them to their inputs.

An artifact is finished or it is not there. A stage refuses inputs that do not belong together and a config that
changed behind a finished stage.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np
from etils import epath

from iar_jax.runtime import distributed
from iar_jax.runtime.checkpoint import steps_in
from iar_jax.runtime.errors import UserError
from iar_jax.runtime.progress import say
from iar_jax.runtime.section import Section

# 1: one level of clusters, as numbers; the facts of a transformer named the side of its square.
FORMAT_VERSION = 2

VERSIONED_PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "numpy")


class Place(NamedTuple):
    """Where an input of later stages lies: made by `stage`, in config.inputs.<field> or else workdir/<field's default>,
    and there in `inside`."""

    stage: str
    field: str
    default: str
    inside: str = ""


INPUTS = {
    "tokenizer": Place("train_tokenizer", "tokenizer", "tokenizer"),
    "codebook": Place("rearrange_codebook", "codebook", "codebook"),
    "codes": Place("extract_codes", "codes", "codes", "train"),
    "val_codes": Place("extract_codes", "codes", "codes", "val"),
    "transformer": Place("train", "transformer", "train"),
}


@runtime_checkable
class Config(Protocol):
    """The part of a config that an artifact is made by; `iar_jax.config.relevance` has it."""

    @property
    def content(self) -> dict[str, Any]:
        """By section; what metadata.json keeps."""

    def restricted(self, known: dict[str, Any]) -> "Config":
        """The fields that `known` has too."""

    def differences(self, stored: dict[str, Any], steps_done: int | None) -> tuple[list[Any], list[Any]]:
        """What differs from stored sections: what makes another artifact, and what does not. Each has a `field`."""


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
        if version not in range(1, FORMAT_VERSION + 1):
            raise UserError(
                f"{path} has format version {version}; this program reads 1 to {FORMAT_VERSION}: update iar_jax"
            )
        return Metadata(**(from_version_1(content) if version == 1 else content))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is damaged ({error!r}); delete {directory} and run its stage again") from error


def from_version_1(content: dict[str, Any]) -> dict[str, Any]:
    """The content of a metadata.json of the first format, in the present one."""
    config, figures = content["config"], content["figures"]
    renamed = {
        ("codebook", "cluster_size"): "cluster_sizes",
        ("training", "cluster_weight"): "cluster_weights",
        ("training", "cluster_weight_end"): "cluster_weights_end",
    }
    for (section, old), new in renamed.items():
        if old in config.get(section, {}):
            config[section][new] = [config[section].pop(old)]
    if config.get("training", {}).get("cluster_weights_end") == [0.0]:
        config["training"]["cluster_weights_end"] = []
    if "grid_size" in figures.get("facts", {}):
        facts = figures["facts"]
        facts["layout"] = [facts.pop("grid_size")]
        config["model"]["num_kv_heads"] = facts.pop("num_kv_heads") or 0
    return content | {"format_version": FORMAT_VERSION}


def finished(directory: epath.Path, config: Config, inputs: dict[str, str]) -> Metadata | None:
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
        config = config.restricted(found.config)
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


def begin(directory: epath.Path, stage: str, config: Config, inputs: dict[str, str]) -> Metadata | None:
    """Starts or resumes an artifact; returns its metadata if it is finished already.

    Raises:
        UserError: as `finished`.
    """
    done = finished(directory, config, inputs)
    found = read_metadata(directory)
    distributed.wait_for_all(f"begin {stage}")
    if found is None:
        directory.mkdir(parents=True, exist_ok=True)
        _write(directory, Metadata(stage, False, "", inputs, config.content, {}, _versions()))
    elif done is None:
        for difference in check_config(directory, found, config):
            say(f"{stage}: noted, {difference}")
        _write(directory, dataclasses.replace(found, finished=False, config=config.content))
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
    check_stage(directory, found, stage)
    return found


def check_stage(directory: epath.Path, found: Metadata | None, stage: str) -> None:
    """Raises UserError where an artifact was made by another stage."""
    if found is not None and found.stage != stage:
        raise UserError(f"{directory} was made by the stage {found.stage}; one made by {stage} is needed here")


class Artifact(NamedTuple):
    """A finished artifact: where it lies, and its metadata."""

    directory: epath.Path
    metadata: Metadata

    @property
    def fingerprint(self) -> str:
        return self.metadata.fingerprint


def locate(section: Section, workdir: epath.Path, name: str) -> epath.Path:
    """Where an input lies: config.inputs.<name>, or its place in the workdir.

    Args:
        section: config.inputs.
        name: a key of INPUTS.
    """
    place = INPUTS[name]
    given = section[place.field]
    directory = epath.Path(given).expanduser() if given else workdir / place.default
    return directory / place.inside if place.inside else directory


def open_inputs(section: Section, workdir: epath.Path, *names: str) -> dict[str, Artifact]:
    """Finished inputs that belong together, by name.

    Args:
        section: config.inputs.
        names: keys of INPUTS.

    Raises:
        UserError: one is not there or not finished, or was made from another one of the others.
    """
    found = {}
    for name in names:
        directory = locate(section, workdir, name)
        found[name] = Artifact(directory, require(directory, INPUTS[name].stage))
    for artifact in found.values():
        check_made_from(artifact, found)
    return found


def check_made_from(artifact: Artifact, inputs: Mapping[str, Artifact]) -> None:
    """Raises UserError where an artifact was made from another one of some inputs."""
    for name, fingerprint in artifact.metadata.inputs.items():
        other = inputs.get(name)
        if other is not None and other is not artifact and other.fingerprint != fingerprint:
            raise UserError(
                f"{artifact.directory} was made from another {name} ({fingerprint[:12]}) than {other.directory} "
                f"({other.fingerprint[:12]}); run python -m iar_jax.{artifact.metadata.stage} for this one"
            )


def fingerprints(inputs: Mapping[str, Artifact]) -> dict[str, str]:
    """Of inputs, by name, as metadata keeps them."""
    return {name: artifact.fingerprint for name, artifact in inputs.items()}


def check_config(directory: epath.Path, found: Metadata, config: Config) -> list[Any]:
    """The differences between an artifact's config and this one that make no other artifact.

    Raises:
        UserError: some do; lists them.
    """
    steps_done = None if found.finished else max(steps_in(directory / "checkpoints"), default=0)
    material, rest = config.differences(found.config, steps_done)
    if material:
        raise UserError(
            f"{directory} was made with another config:\n  "
            + "\n  ".join(map(str, material))
            + f"\nUse another --workdir, set the old values, or delete {directory} and what was made from it."
        )
    return rest


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
