"""All pieces of a study, each as a process of its own, so many at once as are asked for."""

import itertools
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import NamedTuple

from etils import epath

from iar_jax.runtime.errors import UserError
from iar_jax.runtime.files import in_bucket, write_bytes
from iar_jax.runtime.interruption import StopRequest, catch_stop_signals
from iar_jax.runtime.progress import say
from iar_jax.study import make
from iar_jax.study.plan import Arm, Plan, Run, comparison_runs, digest, tuning_runs, twin_of

LOOK_SECONDS, LINE_SECONDS = 1.0, 60.0


class Piece(NamedTuple):
    """What one process makes.

    Attributes:
        name: what --list shows and --run takes.
        kind: "shared", "tuning", "guidance" or "run".
        needs: names of pieces that are finished before it.
    """

    name: str
    kind: str
    needs: tuple[str, ...]
    finished: Callable[[], bool]
    make: Callable[[], None]


def pieces_of(plan: Plan, workdir: epath.Path) -> list[Piece]:
    """All pieces of a study in an order in which each comes after what it needs; the runs of one seed come before
    those of the next, so that what is finished early can be compared."""
    shared, tuning, guidance = [], [], []  # type: list[Piece], list[Piece], list[Piece]
    runs: dict[int, list[Piece]] = {}
    makers: dict[str, str] = {}
    for arm in plan.arms:
        own = digest(arm.config, "seed", "data", "tokenizer", "tokenizer_training", "codes", "codebook", "evaluation")
        if own not in makers:
            makers[own] = f"{arm.name}/shared"
            shared.append(shared_piece(arm, workdir))
        # What an arm before has tuned, or trained, is not tuned or trained again.
        source = twin_of(plan, arm) or arm
        trainer = plan.arm(source.trained_as)
        own_tuning = [tuning_piece(run, makers[own], workdir) for run in tuning_runs(trainer)]
        needs = tuple(piece.name for piece in own_tuning) or (makers[own],)
        if trainer is arm:
            tuning += own_tuning
        if len(arm.config.study.cfg_scales) > 1:
            if source is arm:
                guidance.append(guidance_piece(arm, needs, workdir))
            needs = (f"{source.name}/guidance",)
        # The names of its runs do not depend on what is chosen for them.
        for run in comparison_runs(plan, arm, 1.0, 1.0):
            trained = (f"{arm.trained_as}/{run.seed}",) if arm.trained_as != arm.name else ()
            runs.setdefault(run.seed, []).append(run_piece(plan, arm, run.seed, needs + trained, workdir))
    return shared + tuning + guidance + list(itertools.chain(*runs.values()))


def shared_piece(arm: Arm, workdir: epath.Path) -> Piece:
    return Piece(
        f"{arm.name}/shared",
        "shared",
        (),
        lambda: make.shared_finished(arm, workdir),
        lambda: make.make_shared(arm, workdir),
    )


def tuning_piece(run: Run, shared: str, workdir: epath.Path) -> Piece:
    return Piece(
        run.name,
        "tuning",
        (shared,),
        lambda: make.tuning_value(run, workdir) is not None,
        lambda: make.make_tuning_run(run, workdir),
    )


def guidance_piece(arm: Arm, needs: tuple[str, ...], workdir: epath.Path) -> Piece:
    def finished() -> bool:
        return make.artifact_of(make.guidance_directory(arm, workdir)) is not None

    return Piece(f"{arm.name}/guidance", "guidance", needs, finished, lambda: make.make_guidance(arm, workdir))


def run_piece(plan: Plan, arm: Arm, seed: int, needs: tuple[str, ...], workdir: epath.Path) -> Piece:
    def run() -> Run:
        return make.run_of(plan, arm, seed, workdir)

    return Piece(
        f"{arm.name}/{seed}",
        "run",
        needs,
        lambda: make.result_of(run(), workdir) is not None,
        lambda: make.make_run(run(), workdir),
    )


def make_piece(pieces: list[Piece], name: str) -> None:
    """Makes one piece, and before it what it needs and what is not there.

    Raises:
        UserError: no such piece.
    """
    by_name = {piece.name: piece for piece in pieces}
    if name not in by_name:
        raise UserError(f"--run={name}: the study has no such piece; --list shows all, such as {pieces[-1].name}")
    piece = by_name[name]
    for needed in piece.needs:
        make_piece(pieces, needed)
    if not piece.finished():
        piece.make()


def make_all(pieces: list[Piece], workdir: epath.Path, workers: int) -> None:
    """Makes every piece that is not finished, `workers` of them at once.

    Raises:
        UserError: some failed; the others are finished.
        Interrupted: a signal asked for a stop; the processes were told, and what they have done is kept.
    """
    done = finished_names(pieces)
    waiting = [piece for piece in pieces if piece.name not in done]
    say(f"study: {len(pieces)} pieces, {len(waiting)} of them to be made; logs in {workdir / 'logs'}")
    running: dict[int, Process] = {}
    failed: dict[str, str] = {}
    seconds: dict[str, list[float]] = {}
    said = time.monotonic()
    with catch_stop_signals() as stop:
        while waiting or running:
            for slot in sorted(set(range(workers)) - running.keys()):
                piece = next_piece(waiting, done)
                if piece is None:
                    break
                # What is shared comes first, and has all cores.
                running[slot] = Process(piece, workdir, (slot, workers) if piece.kind != "shared" else None)
            time.sleep(LOOK_SECONDS)
            for slot, process in list(running.items()):
                if not process.ended():
                    continue
                del running[slot]
                piece, took = process.piece, time.monotonic() - process.started
                if process.child.returncode == 0 and piece.finished():
                    done.add(piece.name)
                    seconds.setdefault(piece.kind, []).append(took)
                    say(f"study: {piece.name} in {duration(took)}; {left(waiting, running, seconds, workers)}")
                elif stop.signal_number is None:
                    failed[piece.name] = process.last_words()
                    lost = [other for other in waiting if depends(pieces, other, piece.name)]
                    waiting = [other for other in waiting if other not in lost]
                    say(f"study: {piece.name} FAILED: {failed[piece.name]}")
            if stop.signal_number is not None:
                end(running, stop)
            if time.monotonic() - said > LINE_SECONDS and running:
                said, states = time.monotonic(), ", ".join(process.state() for process in running.values())
                say(f"study: {states}; {left(waiting, running, seconds, workers)}")
    if failed:
        shown = "\n  ".join(f"{name}: {words}" for name, words in failed.items())
        raise UserError(
            f"{len(failed)} pieces of the study failed, {len(done)} of {len(pieces)} are finished:\n  {shown}\nWith "
            "that put right, the same command goes on"
        )


def next_piece(waiting: list[Piece], done: set[str]) -> Piece | None:
    """Takes the next piece that can be made, if any. One that is finished already, such as a run whose shared files had
    to be made again, is done instead."""
    while (piece := next((piece for piece in waiting if done.issuperset(piece.needs)), None)) is not None:
        waiting.remove(piece)
        if not piece.finished():
            return piece
        done.add(piece.name)
    return None


def finished_names(pieces: list[Piece]) -> set[str]:
    """The pieces that are finished with all that they need; what is chosen for one is not known before."""
    done: set[str] = set()
    for piece in pieces:
        if done.issuperset(piece.needs) and piece.finished():
            done.add(piece.name)
    return done


def depends(pieces: list[Piece], piece: Piece, name: str) -> bool:
    """Whether a piece needs another one, at any remove."""
    needed = [other for other in pieces if other.name in piece.needs]
    return name in piece.needs or any(depends(pieces, other, name) for other in needed)


class Process:
    """A piece that is being made by a process of its own, on its share of the cores."""

    def __init__(self, piece: Piece, workdir: epath.Path, share: tuple[int, int] | None):
        self.piece, self.started = piece, time.monotonic()
        self.place = workdir / "logs" / f"{piece.name}.txt"
        # Logs cannot grow in a bucket: there they are put when they are whole.
        local = tempfile.mkdtemp(prefix="iar_jax-") if in_bucket(workdir) else os.fspath(self.place.parent)
        self.log = pathlib.Path(local, self.place.name)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        # Large pages are an eighth of a CPU's time; and the pieces compile the same programs.
        preset = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
        if not in_bucket(workdir):
            preset["JAX_COMPILATION_CACHE_DIR"] = os.path.abspath(workdir / "compiled")
        command = [sys.executable, "-m", "iar_jax.study", *sys.argv[1:], f"--run={piece.name}"]
        own = sorted(os.sched_getaffinity(0))
        slot, workers = share or (0, 1)
        cores = own[slot::workers] or own
        with open(self.log, "ab") as output:
            # A child has the cores of the thread that makes it.
            os.sched_setaffinity(0, cores)
            try:
                self.child = subprocess.Popen(
                    command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True, env=preset | os.environ
                )
            finally:
                os.sched_setaffinity(0, own)

    def ended(self) -> bool:
        """Whether it is over; its log is then where it belongs."""
        if self.child.poll() is None:
            return False
        if in_bucket(self.place):
            write_bytes(self.place, self.log.read_bytes())
        return True

    def lines(self) -> list[str]:
        return [line for line in self.log.read_bytes().decode(errors="replace").splitlines() if line.strip()]

    def last_words(self) -> str:
        """The end of its log."""
        return (self.lines() or ["it said nothing"])[-1].strip()

    def state(self) -> str:
        """Its name, and how far it says it is."""
        steps = [line for line in self.lines()[-3:] if " left" in line]
        return f"{self.piece.name} ({steps[-1].partition(', ')[0]})" if steps else self.piece.name


def end(running: dict[int, Process], stop: StopRequest) -> None:
    """Tells all processes to stop, waits for them, and stops."""
    for process in running.values():
        process.child.send_signal(stop.signal_number or 0)
    for process in running.values():
        process.child.wait()
    stop.obey(f"study stopped with {len(running)} pieces under way, which are kept as far as they are")


def left(waiting: list[Piece], running: dict[int, Process], seconds: dict[str, list[float]], workers: int) -> str:
    """How many pieces are left, and for how long, from what others of their kind took."""
    pieces = waiting + [process.piece for process in running.values()]
    count = len(pieces)
    known = {kind: sum(found) / len(found) for kind, found in seconds.items()}
    # A run takes as long as one of tuning at least.
    known.setdefault("run", known.get("tuning", 0.0))
    if count and not any(known.get(piece.kind) for piece in pieces):
        return f"{count} left"
    total = sum(known.get(piece.kind, 0.0) for piece in waiting)
    for process in running.values():
        total += max(0.0, known.get(process.piece.kind, 0.0) - (time.monotonic() - process.started))
    return f"{count} left, about {duration(total / max(1, min(workers, count)))}"


def duration(seconds: float) -> str:
    """A time for people."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
