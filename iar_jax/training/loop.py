"""What every training loop does besides its step: resume, log, checkpoint, stop when asked to."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

from etils import epath

from iar_jax.runtime import distributed
from iar_jax.runtime.checkpoint import Checkpoints
from iar_jax.runtime.interruption import Interrupted, catch_stop_signals
from iar_jax.runtime.metric_log import MetricLog
from iar_jax.runtime.progress import progress, say


class TrainingRun:
    """One run of num_steps steps in a directory.

        with TrainingRun(...) as run:
            state = run.resume(state)
            for step in run.steps():
                state, metrics = train_step(state, ...)
                run.finished_step(state, metrics)

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
        keep_checkpoints: int,
        flops_per_step: float = 0.0,
    ):
        self.directory, self.name = directory, name
        self.num_steps, self.batch_size = num_steps, batch_size
        self.log_every, self.eval_every, self.checkpoint_every = log_every, eval_every, checkpoint_every
        self.keep_checkpoints = keep_checkpoints
        self.step = 0
        self.seconds_before, self.started = 0.0, time.monotonic()
        self.pending: tuple[int, Any] | None = None
        self.flops_per_step = flops_per_step
        self.waited = 0.0

    def __enter__(self) -> "TrainingRun":
        with contextlib.ExitStack() as stack:
            self.checkpoints = stack.enter_context(Checkpoints(self.directory / "checkpoints", self.keep_checkpoints))
            self.stop = stack.enter_context(catch_stop_signals())
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def resume(self, state: Any, abstract_state: Any) -> Any:
        """The state of the latest checkpoint, or the given fresh one; opens the log at its step."""
        found = self.checkpoints.restore_latest(abstract_state)
        if found is not None:
            state, info = found
            self.step, self.seconds_before = int(info["data_position"]), float(info["seconds"])
            say(f"{self.name}: going on from the checkpoint of step {self.step}")
        self.log = self._stack.enter_context(MetricLog(self.directory, self.step))
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
        """The next batch; the time that the loop waits for it is logged."""
        start = time.monotonic()
        batch = next(batches)
        self.waited += time.monotonic() - start
        return batch

    def finished_step(self, state: Any, metrics: Any, validate: Callable[[Any], dict[str, Any]] | None = None) -> None:
        """Logs, validates and saves where due. Raises Interrupted, with the state saved, where a stop was asked for.

        `validate` gives metrics of the validation set for a state; the last step's are left to the caller.
        """
        self._write_pending()
        self.step += 1
        if self.step % self.log_every == 0 or self.step == self.num_steps:
            self.pending = (self.step, metrics)
        self.progress.update()
        if validate is not None and self.step % self.eval_every == 0 and self.step < self.num_steps:
            self.log_validation(validate(state))
        signal_number = distributed.asked_to_stop(self.step, self.stop.signal_number)
        if signal_number is not None:
            self.save(state)
            self.checkpoints.manager.wait_until_finished()
            raise Interrupted(
                f"{self.name} stopped after step {self.step} of {self.num_steps}, which is saved; run the same "
                "command to go on",
                signal_number,
            )
        if self.step % self.checkpoint_every == 0 or self.step == self.num_steps:
            self.save(state)

    def save(self, state: Any) -> None:
        """Starts writing a checkpoint of the current step; the log is complete up to it."""
        self._write_pending()
        self.checkpoints.save(self.step, state, {"seconds": self.seconds})

    def log_validation(self, metrics: dict[str, Any]) -> dict[str, float]:
        """Writes metrics of the validation set at the current step and shows them beside the progress."""
        self._write_pending()
        return self.log.write(self.step, metrics, "val")

    def _write_pending(self) -> None:
        if self.pending is None:
            return
        step, metrics = self.pending
        self.pending = None
        values = self.log.write(step, metrics, "train")
        self.log.write_speed(step, self.batch_size, self.waited, self.flops_per_step)
        self.waited = 0.0
        self.progress.update(0, note=f"loss {values['loss']:.4f}")
