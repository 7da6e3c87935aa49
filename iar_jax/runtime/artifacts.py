"""What a stage leaves in the workdir: files and a metadata.json that binds them to their inputs.

An artifact is finished or it is not there. A stage refuses inputs that do not belong together and a config that
changed behind a finished stage. metadata.json has a copy beside it, from which it is read where it is damaged.
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import socket
import time
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np
from etils import epath

from iar_jax.runtime import distributed
from iar_jax.runtime.checkpoint import steps_in
from iar_jax.runtime.errors import UserError, brief
from iar_jax.runtime.files import json_bytes, read_bytes, write_bytes, write_json
from iar_jax.runtime.progress import say
from iar_jax.runtime.section import Section

# 1: one level of clusters, as numbers; the facts of a transformer named the side of its square.
FORMAT_VERSION = 2

METADATA_FILE, COPY_FILE = "metadata.json", "metadata.copy.json"

NOTHING: Mapping[str, str] = types.MappingProxyType({})

# So long other hosts may not see what the first one wrote.
SEEN_AFTER_SECONDS = 60

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
        """What differs from stored sections: what makes another artifact, and what does not. Each has a `field`, and
        as its `content` the name of the input whose fingerprint decides, "" where there is none."""


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


class Damaged(UserError):
    """Neither metadata.json nor its copy can be read."""


def read_metadata(directory: epath.Path) -> Metadata | None:
    """The metadata of an artifact, finished or not; None where there is none. See `_read`."""
    return _read(directory)[0]


def read_finished(directory: epath.Path) -> Metadata | None:
    """The metadata of a finished artifact; None where it is not there, not finished, or damaged, which is said: its
    stage makes it again.

    Raises:
        UserError: it is of a later format.
    """
    try:
        found = read_metadata(directory)
    except Damaged as error:
        say(f"WARNING: {error}; it is made again")
        return None
    return found if found is not None and found.finished else None


def _read(directory: epath.Path) -> tuple[Metadata | None, bool]:
    """The metadata of an artifact, finished or not, None where there is none; and whether it is the copy's.

    A file of the copy's length with other bytes in it is damaged, as is one that cannot be read: the copy is taken. A
    file of another length was edited by someone, and is taken as it is.

    Raises:
        Damaged: it cannot be read, and neither can its copy.
        UserError: it is of a later format.
    """
    path, spare = directory / METADATA_FILE, directory / COPY_FILE
    content = read_bytes(path)
    if content is None:
        return None, False
    copy = read_bytes(spare) or b""
    try:
        found = _parsed(path, content)
        if content == copy or len(content) != len(copy):
            return found, False
        problem = "it changed since it was written"
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        problem = brief(error)
    try:
        found = _parsed(spare, copy)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise Damaged(f"{path} is damaged ({problem})") from error
    say(f"WARNING: {path} is damaged ({problem}); its copy {spare.name} is taken")
    return found, True


def _parsed(path: epath.Path, text: bytes) -> Metadata:
    content = json.loads(text)
    version = content["format_version"]
    if version not in range(1, FORMAT_VERSION + 1):
        raise UserError(
            f"{path} has format version {version}; this program reads 1 to {FORMAT_VERSION}: update iar_jax"
        )
    found = Metadata(**(from_version_1(content) if version == 1 else content))
    for field in dataclasses.fields(Metadata):
        kind: Any = typing.get_origin(field.type) or field.type
        if not isinstance(getattr(found, field.name), kind):
            raise ValueError(f"its {field.name} is {getattr(found, field.name)!r}")
    return found


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


def finished(
    directory: epath.Path,
    config: Config,
    inputs: dict[str, str],
    contents: Callable[[], dict[str, str]] = dict,
) -> Metadata | None:
    """Metadata of an artifact that is there and whole; None where there is none, or it is to be trained for longer.
    Writes nothing but a damaged metadata.json, as its copy has it.

    Args:
        inputs: fingerprints that are known before anything is opened; others that the artifact has are not compared.
        contents: gives the fingerprints of what paths in the config name; asked for where such a path is another one
            than it was: the same content at another path is the same.

    Raises:
        UserError: what is there, finished or not, was made with another config or from other inputs.
    """
    try:
        found, copied = _read(directory)
    except Damaged as error:
        say(f"WARNING: {error}; it is made again by this config and from what else is there")
        return None
    if found is None:
        return None
    if copied:
        with contextlib.suppress(OSError):
            write_json(directory / METADATA_FILE, dataclasses.asdict(found))
    if found.figures.get("imported"):
        # How and on what it was trained is not known, and does not matter.
        config = config.restricted(found.config)
        inputs = {name: fingerprint for name, fingerprint in inputs.items() if name in found.inputs}
    immaterial = check_config(directory, found, config, contents)
    for name, fingerprint in inputs.items():
        if found.inputs.get(name) != fingerprint:
            raise UserError(
                f"{directory} was made from another {name} ({found.inputs.get(name, 'none')[:12]}) than the one "
                f"given now ({fingerprint[:12]}); use another --workdir, or move {directory} away to make it again"
            )
    longer = any(difference.field.endswith(".num_steps") for difference in immaterial)
    return found if found.finished and not longer else None


def begin(
    directory: epath.Path, stage: str, config: Config, inputs: dict[str, str], contents: Mapping[str, str] = NOTHING
) -> Metadata | None:
    """Starts or resumes an artifact, in a directory that this run holds the lock of; returns its metadata if it is
    finished already.

    Args:
        inputs: fingerprints of what it is made from.
        contents: fingerprints of what further paths in the config name.

    Raises:
        UserError: as `finished`.
    """
    known = {**inputs, **contents}
    done = finished(directory, config, inputs, lambda: known)
    try:
        found = read_metadata(directory)
    except Damaged:
        found = None
        if distributed.is_first() and not (directory / "checkpoints").exists():
            clear(directory)
    distributed.wait_for_all(f"begin {stage}")
    if found is None:
        directory.mkdir(parents=True, exist_ok=True)
        _write(directory, Metadata(stage, False, "", known, config.content, {}, _versions()))
    elif done is None:
        for difference in check_config(directory, found, config, lambda: known):
            say(f"{stage}: noted, {difference}")
        _write(directory, dataclasses.replace(found, finished=False, config=config.content))
    return done


def clear(directory: epath.Path) -> None:
    """Removes what a stage left in a directory, but for its lock."""
    for path in list(directory.iterdir()):
        if not path.name.startswith("lock.json"):
            (path.rmtree if path.is_dir() else path.unlink)()


def reopen(directory: epath.Path) -> None:
    """Marks a finished artifact, some of whose files are damaged, as one that is being made."""
    _write(directory, dataclasses.replace(_begun(directory), finished=False))


def note(directory: epath.Path, figures: dict[str, Any]) -> None:
    """Adds figures to an artifact while it is being made."""
    found = _begun(directory)
    _write(directory, dataclasses.replace(found, figures=found.figures | figures))


def finish(directory: epath.Path, fingerprint: str, figures: dict[str, Any]) -> Metadata:
    """Marks the artifact that `begin` started as whole."""
    done = dataclasses.replace(
        _begun(directory), finished=True, fingerprint=fingerprint, figures=figures, versions=_versions()
    )
    _write(directory, done)
    return done


def _begun(directory: epath.Path) -> Metadata:
    found = read_metadata(directory)
    if found is None:
        raise UserError(f"{directory} was moved or removed while its stage ran, and the stage has stopped")
    return found


def require(directory: epath.Path, stage: str) -> Metadata:
    """Metadata of a finished artifact that a later stage reads.

    Raises:
        UserError: not there, not finished, damaged, or made by another stage.
    """
    try:
        found = read_metadata(directory)
    except Damaged as error:
        raise UserError(f"{error}; python -m iar_jax.{stage} makes it again from what else is there") from error
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


def check_config(
    directory: epath.Path, found: Metadata, config: Config, contents: Callable[[], dict[str, str]] = dict
) -> list[Any]:
    """The differences between an artifact's config and this one that make no other artifact.

    Args:
        contents: as in `finished`.

    Raises:
        UserError: some do; lists them.
    """
    steps_done = None if found.finished else max(steps_in(directory / "checkpoints"), default=0)
    material, rest = config.differences(found.config, steps_done)
    if any(difference.content for difference in material):
        now = contents()
        same = [d for d in material if d.content in now and now[d.content] == found.inputs.get(d.content)]
        material, rest = [d for d in material if d not in same], rest + same
    if material:
        raise UserError(
            f"{directory} was made with another config:\n  "
            + "\n  ".join(map(str, material))
            + "\nUse another --workdir (config.inputs.* take what is finished here), or set the old values."
        )
    return rest


def _write(directory: epath.Path, metadata: Metadata) -> None:
    digest = 0
    if distributed.is_first():
        content = json_bytes(dataclasses.asdict(metadata))
        for name in (COPY_FILE, METADATA_FILE):
            write_bytes(directory / name, content)
        digest = digest_of(content)
    wait_until_seen(directory / METADATA_FILE, distributed.from_first(digest))


def wait_until_seen(path: epath.Path, digest: int) -> None:
    """Returns when this process sees the content that the first one has just written: a network file system may show
    it some seconds late.

    Raises:
        UserError: it never came.
    """
    if distributed.is_first():
        return
    for _ in range(SEEN_AFTER_SECONDS):
        content = read_bytes(path)
        if content is not None and digest_of(content) == digest:
            return
        with contextlib.suppress(OSError):
            list(path.parent.iterdir())  # asks the server anew
        time.sleep(1.0)
    raise UserError(
        f"{path}: the first process wrote it {SEEN_AFTER_SECONDS} s ago, and {socket.gethostname()} does not see it: "
        "--workdir must be on a disk that all hosts share, or in a bucket"
    )


def digest_of(content: bytes) -> int:
    """31 bits of the SHA-256."""
    return int.from_bytes(hashlib.sha256(content).digest()[:4], "little") >> 1


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


def sizes_of(paths: Iterable[epath.Path]) -> dict[str, int]:
    """Bytes of files, by their names."""
    return {path.name: path.stat().length for path in paths}


def changed_files(directory: epath.Path, found: Metadata) -> str:
    """Which of an artifact's files are gone or have another size than they were written with; "" where none is."""
    for name, size in found.figures.get("files", {}).items():
        path = directory / name
        there = path.stat().length if path.exists() else None
        if there != size:
            state = "is gone" if there is None else f"has {there} bytes, not the {size} that were written"
            return f"{path} {state}"
    return ""


def sha256_of(path: os.PathLike) -> str:
    """SHA-256 of a file."""
    with epath.Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
