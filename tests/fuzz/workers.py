"""Odd files read in processes of their own, which may hang, crash or grow: what became of each file."""

import dataclasses
import multiprocessing
import os
import resource
import sys
import tempfile
import time
import traceback
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

# A reader that takes longer hangs; a process that is larger holds more than it should.
HANG_SECONDS, MOST_BYTES = 5.0, 2 << 30

# What starts a program, of Python's audit events.
PROGRAMS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty")


@dataclasses.dataclass
class Outcome:
    """Of the files of one format.

    Attributes:
        read, refused: how many.
        problems: (index of the file, what went wrong).
        slowest: seconds of the slowest file.
        peak: bytes of the largest process.
    """

    read: int = 0
    refused: int = 0
    problems: list[tuple[int, str]] = dataclasses.field(default_factory=list)
    slowest: float = 0.0
    peak: int = 0

    def add(self, other: "Outcome") -> None:
        self.read, self.refused = self.read + other.read, self.refused + other.refused
        self.problems += other.problems
        self.slowest, self.peak = max(self.slowest, other.slowest), max(self.peak, other.peak)


def odd_file(name: str, seed: int, index: int, sound: list[bytes]) -> bytes:
    """The content of one odd file; the same for the same seed and index."""
    from tests.fuzz.formats import FORMATS

    return FORMATS[name].make(np.random.default_rng([seed, zlib.crc32(name.encode()), index]), sound)


def read_all(name: str, seed: int, indices: range, place: Any, results: Any) -> None:
    """Reads odd files and sends their outcome. `place` (shared) is the index of the file that is being read."""
    from tests.fuzz.formats import FORMATS, REFUSALS

    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - of pictures that are passed over there is a line each
    started: list[str] = []
    sys.addaudithook(lambda event, _: started.append(event) if event in PROGRAMS else None)
    entry, outcome = FORMATS[name], Outcome()
    sound = entry.sound()
    with tempfile.TemporaryDirectory(prefix="iar_jax-fuzz-") as directory:
        path = Path(directory) / f"odd{entry.suffix}"

        def read(content: bytes) -> list[np.ndarray] | None:
            path.write_bytes(content)
            try:
                return [np.array(array) for array in entry.read(path)]
            except REFUSALS:
                return None

        before = [read(content) for content in sound]
        assert all(found is not None for found in before), "a sound file is refused"
        started.clear()
        for index in indices:
            content = odd_file(name, seed, index, sound)
            place.value, start = index, time.monotonic()
            try:
                found = read(content)
                outcome.read, outcome.refused = outcome.read + (found is not None), outcome.refused + (found is None)
            except BaseException as error:  # MemoryError and panics of other languages among them
                where = traceback.extract_tb(error.__traceback__)[-1]
                outcome.problems.append(
                    (index, f"{type(error).__name__}: {str(error)[:200]} ({where.filename}:{where.lineno})")
                )
            outcome.slowest = max(outcome.slowest, time.monotonic() - start)
            if started:
                outcome.problems.append((index, f"started a program ({started[0]})"))
                started.clear()
            outcome.peak = largest()
            if outcome.peak > MOST_BYTES:
                outcome.problems.append((index, f"the process has grown to {outcome.peak / 2**30:.1f} GB"))
                break
            if outcome.slowest > HANG_SECONDS:
                outcome.problems.append((index, f"took {outcome.slowest:.1f} s"))
                outcome.slowest = 0.0
        after = [read(content) for content in sound]
        for one, other in zip(before, after, strict=True):
            if other is None or any(not np.array_equal(*pair) for pair in zip(one or [], other, strict=True)):
                outcome.problems.append((indices[-1], "a sound file is read as another one after these"))
    results.send((index + 1, outcome))


def largest() -> int:
    """Bytes that this process has held at most. Linux' resource usage would count the process that started it too."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def survey(name: str, seed: int, indices: range, target: Callable[..., None] = read_all) -> Outcome:
    """What became of some odd files of a format; a process that hangs or ends is replaced by another one.

    Args:
        target: what a process does.
    """
    context, total, first = multiprocessing.get_context("spawn"), Outcome(), indices.start
    while first < indices.stop:
        place = context.Value("q", -1)
        ours, theirs = context.Pipe(duplex=False)
        arguments = (name, seed, range(first, indices.stop), place, theirs)
        process = context.Process(target=target, args=arguments, daemon=True)
        process.start()
        theirs.close()
        seen, since, hung = -1, time.monotonic(), False
        while not ours.poll(0.1) and process.is_alive():
            if place.value != seen:
                seen, since = place.value, time.monotonic()
            elif seen >= 0 and time.monotonic() - since > 4 * HANG_SECONDS:
                hung = True
                break
        try:
            # All is sent at the end: what a process had found before it hung or crashed is found again.
            end, outcome = ours.recv() if ours.poll() else (first, None)
        except EOFError:
            outcome = None
        if outcome is None:
            if hung:
                process.kill()
            process.join()
            at, what = place.value, "hangs" if hung else f"ended the process ({process.exitcode})"
            if at > first:
                total.add(survey(name, seed, range(first, at), target))
            total.problems.append((max(at, first), what))
            first = max(at, first) + 1
            continue
        process.join()
        total.add(outcome)
        first = end
    return total
