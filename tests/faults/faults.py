"""Faults that stages must survive, one function each.

Each takes a finished, undisturbed run and a directory of its own, disturbs a copy, lets it go on, and compares what
comes of it with the undisturbed run: metrics line by line, parameters, records and images bit for bit. What the stage
must say is asserted.
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from typing import NamedTuple

import numpy as np
from grain.sources import ArrayRecordDataSource

from configs.mnist import get_config
from tests.stages import (
    ROOT,
    TINY,
    assert_same_metrics,
    call,
    children,
    fingerprint,
    inputs_of,
    metrics_text,
    start,
    start_processes,
    wait_until,
)

# Artifacts that a stage makes, below the workdir; a run of the stage is disturbed with them, and all after them, gone.
STAGES = {
    "train_tokenizer": ("tokenizer",),
    "extract_codes": ("codes",),
    "train": ("train",),
    "sample": ("samples",),
}
HOOK = str(ROOT / "tests" / "faults" / "hook")
# Every step leaves its loss; five files of records, five parts of samples.
OPTIONS = [
    *TINY,
    "--config.tokenizer_training.log_every=1",
    "--config.training.log_every=1",
    "--config.codes.images_per_shard=1000",
    "--config.sampling.batch_size=4",
]


class Outcome(NamedTuple):
    """What a fault did.

    Attributes:
        same: whether everything ended bit for bit as in the undisturbed run.
        steps_again: training steps that were run twice.
        examples_lost: training examples, records or samples that are missing or others than in the undisturbed run.
    """

    same: bool = True
    steps_again: int = 0
    examples_lost: int = 0


def undisturbed(path):
    """The run that all others are compared with."""
    call("pipeline", path, *OPTIONS)
    return path


def copy_without(reference, path, stage):
    """A workdir where a stage is the next to run."""
    shutil.copytree(reference, path)
    for name in STAGES[stage]:
        shutil.rmtree(path / name)
    return path


def content(path, stage):
    """What must be the same at the end: metrics as text, fingerprints, samples."""
    if stage in ("train", "train_tokenizer"):
        directory = STAGES[stage][0]
        return metrics_text(path, directory), fingerprint(path / directory)
    if stage == "extract_codes":
        return fingerprint(path / "codes" / "train"), fingerprint(path / "codes" / "val")
    (samples,) = (path / "samples").iterdir()
    return fingerprint(samples), (samples / "samples.npz").read_bytes(), (samples / "labels.npy").read_bytes()


def examples(path, stage):
    """What a stage did to each of its examples: for training, one entry a step (its loss, of so many examples)."""
    if stage in ("train", "train_tokenizer"):
        lines = map(json.loads, metrics_text(path, STAGES[stage][0]).splitlines())
        return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}
    if stage == "extract_codes":
        files = sorted(str(file) for file in path.glob("codes/*/*.array_record"))
        source = ArrayRecordDataSource(files)
        return {index: source[index] for index in range(len(source))}
    (samples,) = path.glob("samples/*/samples.npz")
    return dict(enumerate(image.tobytes() for image in np.load(samples)["arr_0"]))


def compared(reference, path, stage, steps_again=0):
    """The outcome of a stage that has ended."""
    found, expected = examples(path, stage), examples(reference, stage)
    others = sum(found.get(key) != expected.get(key) for key in found.keys() | expected.keys())
    section = {"train": "training", "train_tokenizer": "tokenizer_training"}.get(stage)
    each = get_config()[section].batch_size if section else 1
    return Outcome(content(path, stage) == content(reference, stage), steps_again, others * each)


def goes_on(reference, path, stage, last_step=0):
    """Runs a disturbed stage to its end and compares. `last_step` is the last one that it had logged."""
    output = call(stage, path, *OPTIONS).stdout
    done = f"{stage}: done, in" in output
    return compared(reference, path, stage, 0 if done else max(0, last_step - resumed_at(output)))


def resumed_at(output):
    """The step that a run went on from, by what it said."""
    said = re.search(r"going on from the checkpoint of step (\d+)", output)
    return int(said[1]) if said else 0


def steps_done(path, stage):
    """The last step that a killed run has logged."""
    file = path / STAGES[stage][0] / "metrics.jsonl"
    steps = re.findall(r'"step": (\d+)', file.read_text()) if file.exists() else ["0"]
    return max(map(int, steps), default=0)


def wait_for_step(process, path, stage, step):
    """Returns when a step is logged, or the process has ended."""
    wait_until(lambda: steps_done(path, stage) >= step or process.poll() is not None, pause=0.002)


def renames(reference, path, stage):
    """How often an undisturbed run of a stage renames a file."""
    workdir = copy_without(reference, path, stage)
    call(stage, workdir, *OPTIONS, PYTHONPATH=HOOK, FAULT_COUNT=str(path / "count"))
    return int((path / "count").read_text())


def killed_at_a_rename(reference, path, stage, number, moment):
    workdir = copy_without(reference, path, stage)
    done = call(stage, workdir, *OPTIONS, check=False, PYTHONPATH=HOOK, FAULT_RENAME=f"{number}:{moment}")
    assert done.returncode == -signal.SIGKILL, f"rename {number} did not come: {done.stdout}{done.stderr}"
    return goes_on(reference, workdir, stage, steps_done(workdir, stage))


def killed_in_a_step(reference, path, stage, step, delay):
    """SIGKILL a moment after a step is logged."""
    workdir = copy_without(reference, path, stage)
    process = start(stage, workdir, *OPTIONS)
    wait_for_step(process, workdir, stage, step)
    time.sleep(delay)
    process.kill()
    process.communicate()
    return goes_on(reference, workdir, stage, steps_done(workdir, stage))


def stopped_by_a_signal(reference, path, stage, number):
    """A signal as soon as the stage has something to keep; it says so and ends with 128 + the signal."""
    workdir = copy_without(reference, path, stage)
    more = []
    if stage == "extract_codes":
        more = ["--config.codes.batch_size=16"]
    process = start(stage, workdir, *OPTIONS, *more)

    def has_begun():
        return (
            process.poll() is not None
            or any(workdir.glob("samples/*/parts/*.npy"))
            or (stage == "extract_codes" and any(workdir.glob("codes/train/*.array_record")))
            or (stage.startswith("train") and steps_done(workdir, stage) >= 2)
        )

    wait_until(has_begun, pause=0.002)
    process.send_signal(number)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + number, output
    assert "run the same command to go on" in output, output
    assert "Traceback" not in output, output
    return goes_on(reference, workdir, stage, steps_done(workdir, stage))


def stopped_twice(reference, path):
    """The second signal ends the process at once, in the middle of whatever the first one made it do."""
    workdir = copy_without(reference, path, "train")
    process = start("train", workdir, *OPTIONS)
    wait_for_step(process, workdir, "train", 2)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode in (128 + signal.SIGINT, 128 + signal.SIGTERM)
    return goes_on(reference, workdir, "train", steps_done(workdir, "train"))


# Schedules that depend on the number of steps would make another run of a shorter one.
CONSTANT = ["--config.training.schedule=constant", "--config.training.warmup_steps=0"]


def damaged_checkpoint(reference, path, rng, item, damage):
    """The latest checkpoint is damaged: the one before it is gone on from, and that is said."""
    workdir = copy_without(reference, path, "train")
    process = start("train", workdir, *OPTIONS)
    wait_until(lambda: (workdir / "train" / "checkpoints" / "20").exists() or process.poll() is not None, pause=0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    latest = workdir / "train" / "checkpoints" / "20"
    assert latest.exists()
    files = [file for file in (latest / item).rglob("*") if file.is_file() and file.stat().st_size > 0]
    hit(max(files, key=lambda file: file.stat().st_size), rng, damage)
    process = start("train", workdir, *OPTIONS)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert "WARNING: the checkpoint of step 20" in output, output
    assert "going on from the checkpoint of step 10" in output, output
    return compared(reference, workdir, "train", 10)


def hit(file, rng, damage, flips=1):
    """Flips bits of a file, or cuts it."""
    whole = bytearray(file.read_bytes())
    if damage == "flip":
        for _ in range(flips):
            whole[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
    else:
        del whole[rng.randrange(len(whole)) :]
    file.write_bytes(bytes(whole))


def damaged_records(reference, path, rng, damage):
    """Codes that are no longer those that were extracted: training refuses them by the file's name, or, where the
    damage is in no byte that means anything, trains as before."""
    workdir = copy_without(reference, path, "train")
    # Training reads a third of the records: many bits, so that it meets one.
    hit(rng.choice(sorted((workdir / "codes" / "train").glob("*.array_record"))), rng, damage, flips=30)
    done = call("train", workdir, *OPTIONS, check=False)
    if done.returncode == 0:
        return compared(reference, workdir, "train")
    assert_said(done, 2, str(workdir / "codes" / "train"))
    shutil.rmtree(workdir / "codes")
    shutil.rmtree(workdir / "train")
    call("extract_codes", workdir, *OPTIONS)
    return goes_on(reference, workdir, "train")


def damaged_samples(reference, path, rng, damage):
    """Evaluation refuses a damaged samples.npz by its name."""
    workdir = path
    shutil.copytree(reference, workdir)
    (samples,) = (workdir / "samples").iterdir()
    shutil.rmtree(workdir / "evaluation" / samples.name)
    hit(samples / "samples.npz", rng, damage)
    assert_said(call("evaluate", workdir, *OPTIONS, check=False), 2, "samples.npz")
    return Outcome()


def assert_said(done, code, message):
    assert done.returncode == code, f"{done.returncode} {done.stdout}{done.stderr}"
    assert message.lower() in done.stderr.lower(), done.stderr
    assert "Traceback" not in done.stderr, done.stderr


def full_disk(reference, path, room):
    """A disk with too little room: the stage says so; with more room it goes on."""
    with mounted(path, f"size={room}k"):
        workdir = path / "run"
        options = [*OPTIONS, *inputs_of(reference)]
        done = call("train", workdir, *options, check=False)
        assert_said(done, 2, "no space left")
        checkpoints = sorted((workdir / "train" / "checkpoints").glob("[0-9]*"))
        subprocess.run(["mount", "-o", "remount,size=400m", str(path)], check=True)
        output = call("train", workdir, *options).stdout
        assert not checkpoints or "going on from the checkpoint of step" in output, output
        return compared(reference, workdir, "train")


def read_only_disk(reference, path):
    """The right to write goes away while a stage runs."""
    with mounted(path, "size=400m"):
        workdir = path / "run"
        options = [*OPTIONS, *inputs_of(reference)]
        process = start("train", workdir, *options)
        wait_until(
            lambda: (workdir / "train" / "checkpoints" / "10").exists() or process.poll() is not None, pause=0.002
        )
        # Files that are open for writing keep a mount from becoming read-only; those of a frozen process do not close.
        done = subprocess.run(
            ["chattr", "-R", "+i", str(workdir / "train" / "checkpoints")], check=False, capture_output=True
        )
        if done.returncode:
            process.kill()
            process.communicate()
            raise NotTried("this file system has no immutable files")
        output, _ = process.communicate(timeout=120)
        subprocess.run(["chattr", "-R", "-i", str(workdir / "train" / "checkpoints")], check=True)
        assert process.returncode == 2, output
        assert "not permitted" in output or "denied" in output, output
        assert "Traceback" not in output, output
        call("train", workdir, *options)
        return compared(reference, workdir, "train")


class NotTried(Exception):
    """This machine does not allow the fault."""


class mounted:
    """A file system of its own in memory, where this process may mount one."""

    def __init__(self, path, options):
        self.path, self.options = path, options

    def __enter__(self):
        self.path.mkdir()
        if os.geteuid() != 0:
            raise NotTried("only root may mount")
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", self.options, "tmpfs", str(self.path)], check=False, capture_output=True
        )
        if done.returncode:
            raise NotTried("mounting is not allowed here")

    def __exit__(self, *_):
        subprocess.run(["umount", "-l", str(self.path)], check=False)


def one_of_two_processes_killed(reference, path):
    """The other one ends too; one process alone goes on, with the same batches and dropout."""
    options = [*OPTIONS, *inputs_of(reference)]
    process = start_processes(2, 1, path, *options)
    wait_for_step(process, path, "train", 14)
    os.kill(children(process)[-1], signal.SIGKILL)
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0, output
    last = steps_done(path, "train")
    output = call("train", path, *options).stdout
    assert_same_metrics(path, reference)
    return Outcome(steps_again=last - resumed_at(output))


MESH = ["--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.mesh.tensor=2"]


def other_devices(reference, path):
    """Begun on one device, gone on with on eight in another mesh, ended on one: the same batches and dropout."""
    output = stopped_and_moved(path, "run", [*OPTIONS, *inputs_of(reference)], MESH)
    assert_same_metrics(path / "run", reference)
    assert "going on from the checkpoint of step" in output
    return Outcome()


def other_parts(reference, path):
    """Gradients in two parts for a while, without dropout, whose draws belong to the parts: the same losses."""
    still = [f"--config.model.{name}_dropout_rate=0.0" for name in ("token", "residual", "ffn", "class")]
    options = [*OPTIONS, *inputs_of(reference), *still]
    call("train", path / "one", *options)
    output = stopped_and_moved(path, "run", options, [*MESH, "--config.training.accumulation=2"])
    assert "noted, config.training.accumulation was 2, now 1" in output, output
    assert_same_metrics(path / "run", path / "one")
    return Outcome()


def stopped_and_moved(path, name, options, elsewhere):
    """A training run in three pieces, the middle one on eight devices with the options `elsewhere`."""
    for last, devices, more in ((6, 1, []), (14, 8, elsewhere)):
        process = start("train", path / name, *options, *more, devices=devices)
        wait_for_step(process, path / name, "train", last)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 143, output
    return call("train", path / name, *options).stdout


def second_run(reference, path):
    """A second run in the same workdir refuses, and the first one does not notice."""
    workdir = copy_without(reference, path, "train")
    first = start("train", workdir, *OPTIONS, "--config.training.num_steps=2400", *CONSTANT)
    wait_for_step(first, workdir, "train", 2)
    done = call("train", workdir, *OPTIONS, "--config.training.num_steps=2400", *CONSTANT, check=False)
    assert_said(done, 2, f"is in use by process {first.pid} on ")
    assert first.poll() is None
    first.send_signal(signal.SIGTERM)
    output, _ = first.communicate(timeout=60)
    assert first.returncode == 143, output
    assert not (workdir / "train" / "lock.json").exists()
    return Outcome()


def lock_of_a_dead_machine(reference, path):
    """A lock whose holder cannot be asked, and whose heartbeat has stopped, is taken over, and that is said."""
    workdir = copy_without(reference, path, "train")
    (workdir / "train").mkdir()
    holder = {
        "token": "x",
        "host": "elsewhere",
        "process": 1,
        "machine": "another",
        "since": "2026-01-01",
        "heartbeats": 9,
    }
    (workdir / "train" / "lock.json").write_text(json.dumps(holder))
    output = call("train", workdir, *OPTIONS).stdout
    assert "no heartbeat of process 1 on elsewhere" in output, output
    assert "taking over" in output
    return compared(reference, workdir, "train")


def random_kills(reference, path, count, rng):
    """(title, function) of kills at random moments of every stage, half of them at renames."""
    totals = {}
    for number in range(count):
        stage = list(STAGES)[number % len(STAGES)]
        directory = path / f"kill-{number}"
        if stage.startswith("train") and (number // len(STAGES)) % 2:
            step, delay = rng.randrange(1, 24), rng.random() * 0.2
            title = f"{stage}: SIGKILL {delay * 1000:.0f} ms after step {step}"
            yield title, lambda s=stage, d=directory, t=step, w=delay: killed_in_a_step(reference, d, s, t, w)
            continue
        if stage not in totals:
            totals[stage] = renames(reference, path / f"count-{stage}", stage)
        place, moment = rng.randrange(totals[stage]), rng.choice(("before", "after"))
        title = f"{stage}: SIGKILL {moment} rename {place + 1} of {totals[stage]}"
        yield title, lambda s=stage, d=directory, p=place, m=moment: killed_at_a_rename(reference, d, s, p, m)


def all_faults(reference, path, kills, seed):
    """(title, function) of everything."""
    rng = random.Random(seed)
    yield from random_kills(reference, path, kills, rng)
    for stage in STAGES:
        for name in ("SIGTERM", "SIGINT"):
            directory = path / f"{name}-{stage}"
            yield (
                f"{stage}: {name}",
                lambda s=stage, d=directory, n=name: stopped_by_a_signal(reference, d, s, getattr(signal, n)),
            )
    yield "train: SIGTERM, then SIGINT at once", lambda: stopped_twice(reference, path / "twice")
    for damage in ("flip", "cut"):
        for item in ("state", "ema_params", "info"):
            directory = path / f"{damage}-{item}"
            yield (
                f"train: {damage} in the latest checkpoint's {item}",
                lambda d=directory, i=item, w=damage: damaged_checkpoint(reference, d, rng, i, w),
            )
        for number in range(3):
            directory = path / f"{damage}-records-{number}"
            yield (
                f"train: {damage} in code records",
                lambda d=directory, w=damage: damaged_records(reference, d, rng, w),
            )
        directory = path / f"{damage}-samples"
        yield f"evaluate: {damage} in samples.npz", lambda d=directory, w=damage: damaged_samples(reference, d, rng, w)
    for room in (300, 1500):
        directory = path / f"full-{room}"
        yield f"train: disk of {room} KiB", lambda d=directory, r=room: full_disk(reference, d, r)
    yield "train: checkpoints become immutable", lambda: read_only_disk(reference, path / "readonly")
    yield "train: one of two processes killed", lambda: one_of_two_processes_killed(reference, path / "two")
    yield "train: other devices for a while", lambda: other_devices(reference, path / "devices")
    yield "train: gradients in parts for a while", lambda: other_parts(reference, path / "parts")
    yield "train: a second run", lambda: second_run(reference, path / "second")
    yield "train: the lock of a dead machine", lambda: lock_of_a_dead_machine(reference, path / "dead")
