"""Metrics to TensorBoard and to a JSONL file, with rates, and a stop when the loss is no longer a number."""

import json
import math
import os
import time
from typing import Any

import jax
from etils import epath

from iar_jax.runtime import distributed
from iar_jax.runtime.errors import UserError

METRICS_FILE = "metrics.jsonl"


class MetricLog:
    """The metrics of one run, written by its first process.

    After a resume, lines of steps that will run again are dropped first.
    """

    def __init__(self, directory: epath.Path, first_step: int):
        from clu import metric_writers  # imports TensorFlow, which takes seconds

        self.file: Any = None
        self.tensorboard: Any = None
        self.rate_step, self.rate_time = first_step, time.monotonic()
        if not distributed.is_first():
            return
        directory.mkdir(parents=True, exist_ok=True)
        self.path = directory / METRICS_FILE
        lines = [json.dumps(line) + "\n" for line in read_metrics(directory) if line["step"] <= first_step]
        partial = directory / (METRICS_FILE + ".partial")
        partial.write_text("".join(lines))
        partial.replace(self.path)
        self.file = self.path.open("a")
        self.tensorboard = metric_writers.AsyncMultiWriter([metric_writers.SummaryWriter(os.fspath(directory))])

    def __enter__(self) -> "MetricLog":
        return self

    def __exit__(self, *_: object) -> None:
        if self.file is not None:
            self.file.close()
            self.tensorboard.close()

    def write(self, step: int, metrics: dict[str, Any], prefix: str) -> dict[str, float]:
        """Writes the metrics of a step as prefix/name and returns them as numbers.

        Raises:
            UserError: one of them is not finite.
        """
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        named = {f"{prefix}/{name}": value for name, value in values.items()}
        bad = [name for name, value in named.items() if not math.isfinite(value)]
        if self.file is not None:
            self.file.write(json.dumps({"step": step, **named}) + "\n")
            self.file.flush()
            self.tensorboard.write_scalars(step, named)
        if bad:
            raise UserError(
                f"step {step}: {', '.join(bad)} is not finite. The last checkpoint is kept; a lower learning rate or "
                "clip_norm usually helps"
            )
        return values

    def write_rate(self, step: int, items_per_step: int, name: str) -> None:
        """Writes the rate since the last call, name per second, to TensorBoard (it is no part of what must repeat)."""
        now = time.monotonic()
        rate = (step - self.rate_step) * items_per_step / max(now - self.rate_time, 1e-9)
        if self.tensorboard is not None:
            self.tensorboard.write_scalars(step, {f"{name}_per_second": rate})
        self.rate_step, self.rate_time = step, now


def read_metrics(directory: epath.Path) -> list[dict[str, Any]]:
    """All whole lines of a run's JSONL file; a torn last line is left out."""
    path = directory / METRICS_FILE
    lines = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                lines.append(json.loads(line))
            except ValueError:
                break
    return lines
