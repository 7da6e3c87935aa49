"""All faults: (title, function of a scratch directory that gives an Outcome)."""

import pathlib
import random
import signal
from collections.abc import Callable, Iterator
from typing import NamedTuple

from tests.bucket.server import Bucket
from tests.faults import damage, kills, processes, runs, store
from tests.faults.workdirs import OTHERS, STAGES, InBucket, OnDisk, Outcome, reference_with

LONG = ("train_tokenizer", "extract_codes", "train", "sample", "evaluate")


class Fault(NamedTuple):
    """A fault by its title; `alone` where its timing wants the machine for itself."""

    title: str
    run: Callable[[pathlib.Path], Outcome]
    alone: bool = False


def all_faults(
    reference: pathlib.Path, bucket: tuple[Bucket, dict[str, str]] | None, scratch: pathlib.Path, seed: int
) -> Iterator[Fault]:
    """Every fault, those of a bucket where one is given."""
    rng = random.Random(seed)
    yield from on_a_disk(reference, scratch, rng)
    for name, options in OTHERS.items():
        yield from of_another_training(name, reference_with(options, reference, scratch / name), scratch, rng)
    if bucket is not None:
        yield from in_a_bucket(reference, bucket, rng)


def disk(function, *arguments):
    """A fault whose workdir is a directory."""
    reference, *rest = arguments
    return lambda path: function(reference, OnDisk(path / "run"), *rest)


def on_a_disk(reference: pathlib.Path, scratch: pathlib.Path, rng: random.Random) -> Iterator[Fault]:
    for stage, count in zip(STAGES, (6, 4, 8, 10, 8, 6), strict=True):
        total = kills.renames(reference, OnDisk(scratch / f"count-{stage}"), stage, scratch / f"renames-{stage}")
        for number in sorted(rng.sample(range(total), min(count, total))):
            moment = rng.choice(("before", "after"))
            title = f"{stage}: SIGKILL {moment} rename {number + 1} of {total}"
            yield Fault(title, disk(kills.at_a_rename, reference, stage, number, moment))
    for stage in ("train", "train_tokenizer"):
        for _ in range(4):
            step, delay = rng.randrange(1, 24), rng.random() * 0.2
            title = f"{stage}: SIGKILL {delay * 1000:.0f} ms after step {step}"
            yield Fault(title, disk(kills.in_a_step, reference, stage, step, delay))
    for stage in LONG:
        for name in ("SIGTERM", "SIGINT"):
            yield Fault(f"{stage}: {name}", disk(kills.by_a_signal, reference, stage, getattr(signal, name)))
    yield Fault("train: SIGTERM, then SIGINT at once", disk(kills.by_two_signals, reference))
    yield Fault("evaluate: SIGKILL of a watch", disk(kills.of_a_watch, reference))

    for kind in damage.FILES:
        for way in damage.WAYS:
            yield Fault(f"{way}: {kind}", disk(damage.of_a_file, reference, kind, way, rng.random()))
    for way in damage.WAYS:
        for item in ("state", "ema_params", "info"):
            function = disk(damage.of_the_latest_checkpoint, reference, item, way, rng.random())
            yield Fault(f"{way}: the latest checkpoint's {item}", function)
        yield Fault(f"{way}: a part of samples", disk(damage.of_parts, reference, way, rng.random()))
        yield Fault(f"{way}: a stopped run's log", disk(damage.of_the_log, reference, way, rng.random()))
    for artifact, stage in (("train", "train"), ("codes/train", "extract_codes"), ("codebook", "rearrange_codebook")):
        yield Fault(
            f"{artifact}: metadata.json and its copy", disk(damage.of_both_metadata, reference, artifact, stage)
        )

    rooms = {
        "train_tokenizer": (60, 900),
        "rearrange_codebook": (12, 40),
        "extract_codes": (80, 400),
        "train": (300, 1500),
        "sample": (24, 60),
        "evaluate": (40, 200),
    }
    for stage, sizes in rooms.items():
        for room in sizes:
            yield Fault(
                f"{stage}: disk of {room} KiB",
                lambda path, s=stage, r=room: runs.a_full_disk(reference, path / "disk", s, r),
            )
    yield Fault(
        "train: checkpoints become immutable",
        lambda path: runs.a_disk_that_becomes_read_only(reference, path / "disk"),
    )
    yield Fault(
        "pipeline: finished, on a read-only disk",
        lambda path: runs.finished_on_a_read_only_disk(reference, path / "disk"),
    )
    for stage in ("rearrange_codebook", "extract_codes", "sample"):
        yield Fault(
            f"{stage}: flushed before it is renamed",
            lambda path, s=stage: runs.flushed_before_it_is_renamed(reference, OnDisk(path / "run"), s, path / "trace"),
        )

    for stage in LONG[:4]:
        for moved in (True, False):
            title = f"{stage}: its directory is {'moved' if moved else 'removed'}"
            yield Fault(title, disk(runs.moved_or_removed, reference, stage, moved))
    yield Fault(
        "train: killed, and its workdir moved",
        lambda path: runs.a_workdir_at_another_place(reference, OnDisk(path / "run"), path / "elsewhere"),
    )
    yield Fault("pipeline: pictures at another place", runs.pictures_at_another_place)
    yield Fault("train: a second run", disk(runs.a_second_run, reference))
    other = "--config.training.learning_rate=0.5"
    yield Fault("train: a second run with another config", disk(runs.a_second_run, reference, other))
    for stage in LONG[:4]:
        yield Fault(f"{stage}: two at once", disk(runs.two_at_once, reference, stage))
    yield Fault("train: the lock of a dead machine", disk(runs.the_lock_of_a_dead_machine, reference))
    for name, content in (("empty", b""), ("cut", b'{"token": "x", "ho'), ("of another kind", b"[]")):
        yield Fault(f"train: a lock that is {name}", disk(runs.a_damaged_lock, reference, content))

    for which in range(2):
        for number in (signal.SIGKILL, signal.SIGSTOP):
            for stage in ("train", "train_tokenizer") if number == signal.SIGKILL else ("train",):
                title = f"{stage}: {number.name} of process {which} of two"
                yield Fault(title, disk(processes.one_is_lost, reference, stage, which, number))
        title = f"train: SIGTERM of process {which} of two"
        yield Fault(title, disk(processes.stopped_by_a_signal, reference, which))
    for stage in ("extract_codes", "sample", "evaluate"):
        title = f"{stage}: SIGKILL of process 1 of two"
        yield Fault(title, disk(processes.one_is_lost, reference, stage, 1, signal.SIGKILL))
    yield Fault("pipeline: two processes with two devices each", disk(processes.all_stages, reference))
    yield Fault("train: other devices for a while", lambda path: runs.other_devices(reference, path))
    yield Fault("train: gradients in parts for a while", lambda path: runs.other_parts(reference, path))


def of_another_training(
    name: str, reference: pathlib.Path, scratch: pathlib.Path, rng: random.Random
) -> Iterator[Fault]:
    """The stages that run it, disturbed."""
    options = OTHERS[name]

    def other(function, *arguments):
        return lambda path: function(reference, OnDisk(path / "run", options), *arguments)

    for stage in ("train", "sample"):
        count_in = scratch / f"{name}-renames-{stage}"
        total = kills.renames(reference, OnDisk(scratch / f"{name}-count-{stage}", options), stage, count_in)
        for number in sorted(rng.sample(range(total), min(3, total))):
            moment = rng.choice(("before", "after"))
            title = f"{name} {stage}: SIGKILL {moment} rename {number + 1} of {total}"
            yield Fault(title, other(kills.at_a_rename, stage, number, moment))
        yield Fault(f"{name} {stage}: SIGTERM", other(kills.by_a_signal, stage, signal.SIGTERM))
    for _ in range(3):
        step, delay = rng.randrange(1, 24), rng.random() * 0.2
        title = f"{name} train: SIGKILL {delay * 1000:.0f} ms after step {step}"
        yield Fault(title, other(kills.in_a_step, "train", step, delay))
    yield Fault(f"{name} train: another mesh for a while", lambda path: runs.other_devices(reference, path, options))


def in_a_bucket(reference: pathlib.Path, bucket: tuple[Bucket, dict[str, str]], rng: random.Random) -> Iterator[Fault]:
    def of(function, *arguments):
        return lambda path: function(reference, InBucket(*bucket, path.name), *arguments)

    for stage, count in zip(STAGES, (3, 2, 4, 5, 4, 2), strict=True):
        for _ in range(count):
            share = rng.random()
            yield Fault(f"{stage}, bucket: SIGKILL at {share:.0%} of its uploads", of(kills.at_an_upload, stage, share))
    for stage in LONG:
        yield Fault(f"{stage}, bucket: SIGTERM", of(kills.by_a_signal, stage, signal.SIGTERM))
    for stage in ("train_tokenizer", "extract_codes", "train", "sample"):
        for trouble in store.TROUBLES:
            # What a store does strikes all that run: one at a time.
            yield Fault(f"{stage}, bucket: {trouble}", of(store.in_trouble, stage, trouble, rng.random()), alone=True)
    for stage in ("train", "sample"):
        yield Fault(f"{stage}, bucket: no answer any more", of(store.gone, stage), alone=True)
    yield Fault("bucket: addresses that are none", of(store.not_there))
    yield Fault("bucket: no credentials", of(store.without_credentials))
    for kind in ("permutation", "code records", "generator's weights", "generator's metadata", "samples", "labels"):
        way = rng.choice(damage.WAYS)
        yield Fault(f"bucket, {way}: {kind}", of(damage.of_a_file, kind, way, rng.random()))
    for item in ("state", "info"):
        title = f"bucket, flip: the latest checkpoint's {item}"
        yield Fault(title, of(damage.of_the_latest_checkpoint, item, "flip", rng.random()))
    yield Fault("bucket, empty: a stopped run's log", of(damage.of_the_log, "empty", rng.random()))
    for stage in ("train", "extract_codes"):
        yield Fault(f"{stage}, bucket: its directory is removed", of(runs.moved_or_removed, stage, False))
        yield Fault(f"{stage}, bucket: two at once", of(runs.two_at_once, stage))
    yield Fault("train, bucket: a second run", of(runs.a_second_run))
    yield Fault("train, bucket: the lock of a dead machine", of(runs.the_lock_of_a_dead_machine))
    for which in range(2):
        title = f"train, bucket: SIGKILL of process {which} of two"
        yield Fault(title, of(processes.one_is_lost, "train", which, signal.SIGKILL))
    yield Fault("pipeline, bucket: two processes with two devices each", of(processes.all_stages))
