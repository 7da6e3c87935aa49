"""Workdirs of stages under test, on a disk or in a bucket, and what their stages leave in them."""

import json
import os
import pathlib
import shutil
import tempfile
from typing import NamedTuple

import numpy as np
from grain.sources import ArrayRecordDataSource

from configs.mnist import get_config
from tests.bucket.server import NAME, Bucket
from tests.stages import TINY, call, start

# Artifacts that a stage makes, below the workdir; a run of the stage is disturbed with them, and all after them, gone.
STAGES = {
    "train_tokenizer": ("tokenizer",),
    "rearrange_codebook": ("codebook",),
    "extract_codes": ("codes",),
    "train": ("train",),
    "sample": ("samples",),
    "evaluate": ("evaluation",),
}
# Every step leaves its loss; five files of records, five parts of samples.
OPTIONS = [
    *TINY,
    "--config.tokenizer_training.log_every=1",
    "--config.training.log_every=1",
    "--config.codes.images_per_shard=1000",
    "--config.sampling.batch_size=4",
]


# Other trainings in the place of the plain one. 64 positions of a masked generator are set in 5 steps.
MASKED = ("--config.model.kind=masked", "--config.sampling.mask_steps=5")
VARIANTS = (
    "--config.training.neighbour_weight=0.3",
    "--config.training.context_noise=1.0",
    "--config.training.regression_weight=1.0",
    "--config.training.lookahead_weight=2.0",
)
OTHERS = {"masked": MASKED, "variants": VARIANTS}


class NotTried(Exception):
    """This machine does not allow the fault."""


class Outcome(NamedTuple):
    """What a fault did.

    Attributes:
        same: whether everything ended bit for bit as in the undisturbed run.
        steps_again: training steps that were run twice.
        examples_lost: training examples, records or samples that are missing or others than in the undisturbed run.
        said: the line that a person read of it.
    """

    same: bool = True
    steps_again: int = 0
    examples_lost: int = 0
    said: str = ""


class OnDisk:
    """A workdir in a directory, whose stages run with some options more."""

    def __init__(self, path: pathlib.Path, options: tuple[str, ...] = ()):
        self.path, self.address, self.environment, self.options = path, str(path), {}, options

    def take(self, reference: pathlib.Path) -> None:
        shutil.copytree(reference, self.path)

    def names(self) -> list[str]:
        found = (os.path.join(parent, name) for parent, _, names in os.walk(self.path) for name in names)
        return sorted(os.path.relpath(name, self.path) for name in found)

    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()

    def write(self, name: str, content: bytes) -> None:
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    def remove(self, name: str) -> None:
        path = self.path / name
        if path.is_dir():
            shutil.rmtree(path)
        elif path.exists():
            path.unlink()

    def move(self, name: str, other: str) -> None:
        (self.path / name).rename(self.path / other)

    def here(self) -> pathlib.Path:
        """A local directory with all of it."""
        return self.path


class InBucket:
    """A workdir in the bucket of tests.bucket."""

    def __init__(self, bucket: Bucket, environment: dict[str, str], name: str):
        self.bucket, self.name, self.options = bucket, name, ()
        self.address, self.environment = f"gs://{NAME}/{name}", environment
        self.copy: tempfile.TemporaryDirectory | None = None

    def take(self, reference: pathlib.Path) -> None:
        self.bucket.load_tree(reference, self.name)

    def names(self) -> list[str]:
        names = (name.removeprefix(f"{self.name}/") for name in self.bucket.names(f"{self.name}/"))
        return [name for name in names if name and not name.endswith("/")]

    def read(self, name: str) -> bytes:
        return self.bucket.objects[f"{self.name}/{name}"].content

    def write(self, name: str, content: bytes) -> None:
        self.bucket.put(f"{self.name}/{name}", content)

    def remove(self, name: str) -> None:
        self.bucket.remove_tree(f"{self.name}/{name}")
        if f"{self.name}/{name}" in self.bucket.objects:
            self.bucket.delete(f"{self.name}/{name}")

    def move(self, name: str, other: str) -> None:
        self.bucket.copy_tree(f"{self.name}/{name}", f"{self.name}/{other}")
        self.remove(name)

    def here(self) -> pathlib.Path:
        self.copy = tempfile.TemporaryDirectory()
        self.bucket.save_tree(self.name, pathlib.Path(self.copy.name))
        return pathlib.Path(self.copy.name)


Workdir = OnDisk | InBucket


def before(workdir: Workdir, reference: pathlib.Path, stage: str) -> Workdir:
    """A copy of the reference where a stage is the next to run."""
    workdir.take(reference)
    for name in STAGES[stage]:
        workdir.remove(name)
    return workdir


def reference_with(options: tuple[str, ...], reference: pathlib.Path, path: pathlib.Path) -> pathlib.Path:
    """An undisturbed training with other options, and its samples, from the codes of another run."""
    if not path.exists():
        workdir = before(OnDisk(path, options), reference, "train")
        for name in (*STAGES["sample"], *STAGES["evaluate"]):
            workdir.remove(name)
        for stage in ("train", "sample"):
            run(stage, workdir)
    return path


def run(stage, workdir, *options, check=True, **more):
    """Runs a stage in a workdir to its end."""
    arguments = [*OPTIONS, *workdir.options, *options]
    return call(stage, workdir.address, *arguments, check=check, **workdir.environment, **more)


def begin(stage, workdir, *options, **more):
    """Starts a stage in a workdir."""
    return start(stage, workdir.address, *OPTIONS, *workdir.options, *options, **workdir.environment, **more)


def said_last(text: str) -> str:
    """The last line that a person reads."""
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip() if lines else ""


def assert_refused(done, *messages, code=2):
    """A stage ended with a code and said something, in sentences; returns them."""
    assert done.returncode == code, f"{done.returncode} {done.stdout}{done.stderr}"
    for message in messages:
        assert message.lower() in done.stderr.lower(), done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    assert "delete" not in done.stderr.lower(), done.stderr
    return said_last(done.stderr)


def log_lines(path: pathlib.Path) -> list[dict]:
    """The lines of a log, from one file or from the objects that it is in a bucket."""
    text = b"".join(file.read_bytes() for file in sorted(path.parent.glob(f"{path.name}*")))
    return [json.loads(line) for line in text.splitlines()]


def fingerprint(directory: pathlib.Path) -> str:
    metadata = json.loads((directory / "metadata.json").read_text())
    assert metadata["finished"]
    return metadata["fingerprint"]


def content(path: pathlib.Path, stage: str):
    """What must be the same at the end: metrics, fingerprints, samples, scores."""
    if stage in ("train", "train_tokenizer"):
        directory = STAGES[stage][0]
        return log_lines(path / directory / "metrics.jsonl"), fingerprint(path / directory)
    if stage == "rearrange_codebook":
        return fingerprint(path / "codebook"), sorted(np.load(path / "codebook" / "permutation.npz")["old_to_new"])
    if stage == "extract_codes":
        return fingerprint(path / "codes" / "train"), fingerprint(path / "codes" / "val")
    if stage == "sample":
        (samples,) = (path / "samples").iterdir()
        return fingerprint(samples), (samples / "samples.npz").read_bytes(), (samples / "labels.npy").read_bytes()
    (scores,) = (path / "evaluation").glob("*.json")
    assert (path / "evaluation" / "report.html").read_text().rstrip().endswith("</html>")
    return fingerprint(path / "evaluation" / scores.stem), json.loads(scores.read_text())


def examples(path: pathlib.Path, stage: str) -> dict:
    """What a stage did to each of its examples: for training, one entry a step (its loss, of so many examples)."""
    if stage in ("train", "train_tokenizer"):
        lines = log_lines(path / STAGES[stage][0] / "metrics.jsonl")
        return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}
    if stage == "extract_codes":
        source = ArrayRecordDataSource(sorted(str(file) for file in path.glob("codes/*/*.array_record")))
        return {index: source[index] for index in range(len(source))}
    if stage == "sample":
        (samples,) = path.glob("samples/*/samples.npz")
        return dict(enumerate(image.tobytes() for image in np.load(samples)["arr_0"]))
    return {}


def compared(reference: pathlib.Path, workdir: Workdir, stage: str, steps_again: int = 0, said: str = "") -> Outcome:
    """The outcome of a stage that has ended."""
    path = workdir.here()
    found, expected = examples(path, stage), examples(reference, stage)
    others = sum(found.get(key) != expected.get(key) for key in found.keys() | expected.keys())
    section = {"train": "training", "train_tokenizer": "tokenizer_training"}.get(stage)
    each = get_config()[section].batch_size if section else 1
    return Outcome(content(path, stage) == content(reference, stage), steps_again, others * each, said)
