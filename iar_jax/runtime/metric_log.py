"""Metrics to TensorBoard and to JSONL files, and the rates of a run."""

import json
import os
import time
from typing import Any

import jax
from etils import epath

from iar_jax.runtime import distributed
from iar_jax.runtime.chips import peak_flops

METRICS_FILE = "metrics.jsonl"
SPEED_FILE = "speed.jsonl"


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
        self.speed_file = (directory / SPEED_FILE).open("a")
        self.tensorboard = metric_writers.AsyncMultiWriter([metric_writers.SummaryWriter(os.fspath(directory))])

    def __enter__(self) -> "MetricLog":
        return self

    def __exit__(self, *_: object) -> None:
        if self.file is not None:
            self.file.close()
            self.speed_file.close()
            self.tensorboard.close()

    def write(self, step: int, values: dict[str, float], prefix: str) -> None:
        """Writes the metrics of a step as prefix/name."""
        named = {f"{prefix}/{name}": value for name, value in values.items()}
        if self.file is not None:
            self.file.write(json.dumps({"step": step, **named}) + "\n")
            self.file.flush()
            self.tensorboard.write_scalars(step, named)

    def write_speed(self, step: int, images_per_step: int, waited: float, flops_per_step: float) -> None:
        """Writes the speed since the last call to TensorBoard and to speed.jsonl: no part of what must repeat.

        Seconds a step, in all and those spent waiting for data; images a second; the share of the devices' peak rate
        (MFU, with the model's FLOPs) where it is known; the most memory that a device has used, in bytes.
        """
        now = time.monotonic()
        steps = max(step - self.rate_step, 1)
        seconds = max(now - self.rate_time, 1e-9) / steps
        self.rate_step, self.rate_time = step, now
        if self.tensorboard is None:
            return
        speed = {
            "images_per_second": images_per_step / seconds,
            "step_seconds": seconds,
            "data_wait_seconds": waited / steps,
        }
        device = jax.local_devices()[0]
        peak_rate = peak_flops(device.device_kind)
        if peak_rate and flops_per_step:
            speed["mfu"] = flops_per_step / seconds / (jax.device_count() * peak_rate)
        memory = device.memory_stats() or {}
        if "peak_bytes_in_use" in memory:
            speed["peak_memory_bytes"] = memory["peak_bytes_in_use"]
        self.speed_file.write(json.dumps({"step": step, **speed}) + "\n")
        self.speed_file.flush()
        self.tensorboard.write_scalars(step, speed)


def read_metrics(directory: epath.Path, name: str = METRICS_FILE) -> list[dict[str, Any]]:
    """All whole lines of a run's JSONL file; a torn last line is left out."""
    path = directory / name
    lines = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                lines.append(json.loads(line))
            except ValueError:
                break
    return lines
