"""What every training loop does besides its step: resume, log, checkpoint, stop when asked to."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from iar_jax.runtime import distributed, lock
from iar_jax.runtime.checkpoint import Checkpoints, Retention, restore_state
from iar_jax.runtime.errors import UserError
from iar_jax.runtime.files import write_json
from iar_jax.runtime.interruption import Interrupted, catch_stop_signals
from iar_jax.runtime.metric_log import MetricLog
from iar_jax.runtime.progress import progress, say


class Diverged(UserError):
    """A loss or gradient that is not finite, more often than config.training.max_skipped_steps lets pass."""


class TrainingRun:
    """One run of num_steps steps in a directory, as a context: `resume` the state, then `finished_step` for each of
    `steps`.

    Metrics of a step are fetched while the next one runs, so that the devices never wait for the log.
    """

    def __init__(
        self,
        directory: epath.Path,
        name: str,
        *,
        num_steps: int,
        batch_size: int,
        log_every: int,
        eval_every: int = 0,
        checkpoint_every: int,
        retention: Retention,
        max_skipped_steps: int = 0,
        flops_per_step: float = 0.0,
    ):
        self.directory, self.name = directory, name
        self.num_steps, self.batch_size = num_steps, batch_size
        self.log_every, self.eval_every, self.checkpoint_every = log_every, eval_every, checkpoint_every
        self.retention = retention
        self.max_skipped_steps, self.skipped_steps = max_skipped_steps, 0
        self.step = 0
        self.seconds_before, self.started = 0.0, time.monotonic()
        self.pending: Pending | None = None
        self.record_ids: np.ndarray | None = None
        self.validation: dict[str, float] | None = None
        self.flops_per_step = flops_per_step
        self.waited = 0.0

    @classmethod
    def of(cls, section: ConfigDict, directory: epath.Path, name: str, *, flops_per_step: float = 0.0) -> "TrainingRun":
        """The run that config.training or config.tokenizer_training describes."""
        return cls(
            directory,
            name,
            num_steps=section.num_steps,
            batch_size=section.batch_size,
            log_every=section.log_every,
            eval_every=section.eval_every,
            checkpoint_every=section.checkpoint_every,
            retention=Retention(section.keep_checkpoints, section.keep_every, section.keep_best),
            max_skipped_steps=section.max_skipped_steps,
            flops_per_step=flops_per_step,
        )

    def __enter__(self) -> "TrainingRun":
        with contextlib.ExitStack() as stack:
            self.check_place = stack.enter_context(lock.hold(self.directory))
            self.checkpoints = stack.enter_context(Checkpoints(self.directory / "checkpoints", self.retention))
            self.stop = stack.enter_context(catch_stop_signals())
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def resume(self, state: Any, abstract_state: Any, branched_from: tuple[epath.Path, int] | None = None) -> Any:
        """The state of the latest checkpoint; else that of another run's checkpoint, where a directory and a step are
        given; else the given fresh one. Opens the log at its step."""
        found, where = self.checkpoints.restore_latest(abstract_state), "the checkpoint"
        if found is None and branched_from is not None:
            directory, step = branched_from
            found = restore_state(directory / "checkpoints", abstract_state, step)
            where = f"{directory}, its checkpoint"
        if found is not None:
            state, info = found
            self.step, self.seconds_before = int(info["data_position"]), float(info["seconds"])
            self.skipped_steps = int(info.get("skipped_steps", 0))
            if self.step > self.num_steps:
                raise UserError(
                    f"{self.directory} is at step {self.step}; num_steps is {self.num_steps}, and must not be less"
                )
            say(f"{self.name}: going on from {where} of step {self.step}")
        self.log = self._stack.enter_context(MetricLog(self.directory, self.step, self.step == self.num_steps))
        return state

    @property
    def seconds(self) -> float:
        """Time spent on this run so far, in all its parts."""
        return self.seconds_before + time.monotonic() - self.started

    def steps(self) -> Iterator[int]:
        """Numbers of the steps still to run, from the one resumed at; shows the progress."""
        with progress(self.name, self.num_steps, "steps", first=self.step) as self.progress:
            while self.step < self.num_steps:
                yield self.step

    def next_batch(self, batches: Iterator[Any]) -> Any:
        """The next batch, without its "image_id"s, which are kept for a message about it; the time that the loop waits
        for it is logged."""
        start = time.monotonic()
        batch = next(batches)
        self.waited += time.monotonic() - start
        self.record_ids = batch["image_id"]
        return {name: value for name, value in batch.items() if name != "image_id"}

    def finished_step(self, state: Any, metrics: Any, validate: Callable[[Any], dict[str, Any]] | None = None) -> None:
        """Checks, logs, validates and saves where due.

        `validate` gives metrics of the validation set for a state; the last step's are left to the caller.

        Raises:
            Interrupted: a stop was asked for, and the state is saved.
            Diverged: metrics are not finite, more often than may be; no such state is ever saved.
        """
        self._settle_pending()
        self.step += 1
        self.pending = Pending(self.step, metrics, self.record_ids)
        self.validation = None
        self.progress.update()
        if validate is not None and self.step % self.eval_every == 0 and self.step < self.num_steps:
            self.validation = self.log_validation(validate(state))
        signal_number = distributed.asked_to_stop(self.step, self.stop.signal_number)
        if signal_number is not None:
            self.save(state)
            self.checkpoints.wait_until_finished()
            raise Interrupted(
                f"{self.name} stopped after step {self.step} of {self.num_steps}, which is saved; run the same "
                "command to go on",
                signal_number,
            )
        if self.step % self.checkpoint_every == 0 or self.step == self.num_steps:
            self.save(state)

    def save(self, state: Any) -> None:
        """Starts writing a checkpoint of the current step, which is known to be sound; the log is complete up to it."""
        self._settle_pending()
        self.check_place()
        self.log.flush()
        info = {"seconds": self.seconds, "skipped_steps": self.skipped_steps}
        self.checkpoints.save(self.step, state, info, self.validation)

    def wait_until_saved(self) -> None:
        """Returns when all checkpoints and the log are safe."""
        self.log.flush()
        self.checkpoints.wait_until_finished()

    def log_validation(self, metrics: dict[str, Any]) -> dict[str, float]:
        """Writes metrics of the validation set at the current step and shows them beside the progress."""
        self._settle_pending()
        values = to_numbers(metrics)
        self.log.write(self.step, finite_part(values), "val")
        bad = not_finite(values)
        if bad:
            raise Diverged(f"{self.name}, step {self.step}: {', '.join(bad)} of the validation set is not finite")
        return values

    def _settle_pending(self) -> None:
        """Checks and logs the step before the one that runs: its metrics are there, or nearly."""
        if self.pending is None:
            return
        step, metrics, record_ids = self.pending
        self.pending = None
        values = to_numbers(metrics)
        bad = not_finite(values)
        if bad:
            self.skipped_steps += 1
        due = step % self.log_every == 0 or step == self.num_steps
        if due or bad:
            skips = {"skipped_steps": self.skipped_steps} if self.skipped_steps else {}
            self.log.write(step, finite_part(values) | skips, "train")
        if due:
            self.log.write_speed(step, self.batch_size, self.waited, self.flops_per_step)
            self.waited = 0.0
            self.progress.update(0, note=f"loss {values['loss']:.4f}")
        if bad:
            self._report_not_finite(step, bad, record_ids)

    def _report_not_finite(self, step: int, bad: list[str], record_ids: np.ndarray) -> None:
        path = self.directory / f"not-finite-step-{step:07d}.json"
        write_json(path, {"step": step, "not_finite": bad, "image_ids": record_ids.tolist()})
        found = f"{self.name}, step {step}: {', '.join(bad)} not finite (image ids of its batch in {path})"
        if self.skipped_steps <= self.max_skipped_steps:
            say(f"WARNING: {found}; skipped, {self.skipped_steps} of at most {self.max_skipped_steps}")
            return
        last = self.checkpoints.manager.latest_step()
        raise Diverged(
            f"{found}. The last checkpoint is that of step {last or 0}, and sound. A lower learning rate or clip_norm "
            "usually helps; max_skipped_steps lets so many steps pass"
        )


class Pending(NamedTuple):
    """A step whose metrics have not been looked at yet."""

    step: int
    metrics: Any
    record_ids: Any


def to_numbers(metrics: dict[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in jax.device_get(metrics).items()}


def not_finite(values: dict[str, float]) -> list[str]:
    return [name for name, value in values.items() if not math.isfinite(value)]


def finite_part(values: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in values.items() if math.isfinite(value)}
