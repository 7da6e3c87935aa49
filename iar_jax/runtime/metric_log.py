"""Metrics to TensorBoard and to JSONL files, and the rates of a run."""

import os
import tempfile
import time
from typing import Any

import jax
from etils import epath

from iar_jax.runtime import distributed
from iar_jax.runtime.chips import peak_flops
from iar_jax.runtime.files import Log, in_bucket, read_log, write_bytes

METRICS_FILE = "metrics.jsonl"
SPEED_FILE = "speed.jsonl"


class MetricLog:
    """The metrics of one run, written by its first process.

    After a resume, lines of what will be done again are dropped first: of later steps, and of the validation at the
    step itself where `ended` says that it was the last one.
    """

    def __init__(self, directory: epath.Path, first_step: int, ended: bool = False):
        self.rate_step, self.rate_time = first_step, time.monotonic()

        def keep(line: dict[str, Any]) -> bool:
            again = ended and any(name.startswith("val/") for name in line)
            return line["step"] < first_step + (not again)

        self.log = Log(directory / METRICS_FILE, keep=keep)
        self.speed_log = Log(directory / SPEED_FILE)
        self.tensorboard = TensorBoard(directory)

    def __enter__(self) -> "MetricLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.log.close()
        self.speed_log.close()
        self.tensorboard.close()

    def flush(self) -> None:
        """Returns when what was written is safe: before the checkpoint that it leads up to."""
        self.log.flush()
        self.speed_log.flush()
        self.tensorboard.flush()

    def write(self, step: int, values: dict[str, float], prefix: str) -> None:
        """Writes the metrics of a step as prefix/name."""
        named = {f"{prefix}/{name}": value for name, value in values.items()}
        self.log.append({"step": step, **named})
        self.tensorboard.write(step, named)

    def write_speed(self, step: int, images_per_step: int, waited: float, flops_per_step: float) -> None:
        """Writes the speed since the last call to TensorBoard and to speed.jsonl: no part of what must repeat.

        Seconds a step, in all and those spent waiting for data; images a second; the share of the devices' peak rate
        (MFU, with the model's FLOPs) where it is known; the most memory that a device has used, in bytes.
        """
        now = time.monotonic()
        steps = max(step - self.rate_step, 1)
        seconds = max(now - self.rate_time, 1e-9) / steps
        self.rate_step, self.rate_time = step, now
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
        self.speed_log.append({"step": step, **speed})
        self.tensorboard.write(step, speed)


class TensorBoard:
    """Scalars for TensorBoard, of the first process. Its files cannot grow in a bucket: there each `flush` leaves
    one of its own."""

    def __init__(self, directory: epath.Path):
        self.directory = directory
        self.made_in = tempfile.TemporaryDirectory(prefix="iar_jax-") if in_bucket(directory) else None
        self.writer: Any = None

    def write(self, step: int, values: dict[str, float]) -> None:
        """Adds the values of a step, by name."""
        if not distributed.is_first():
            return
        if self.writer is None:
            from clu import metric_writers  # imports TensorFlow, which takes seconds

            place = self.made_in.name if self.made_in else os.fspath(self.directory)
            self.writer = metric_writers.AsyncMultiWriter([metric_writers.SummaryWriter(place)])
        self.writer.write_scalars(step, values)

    def flush(self) -> None:
        """Hands over what was written."""
        if self.made_in is None:
            if self.writer is not None:
                self.writer.flush()
            return
        self._end()
        for path in sorted(epath.Path(self.made_in.name).iterdir()):
            write_bytes(self.directory / path.name, path.read_bytes())
            path.unlink()

    def close(self) -> None:
        """The last `flush`."""
        self.flush()
        self._end()
        if self.made_in is not None:
            self.made_in.cleanup()

    def _end(self) -> None:
        if self.writer is not None:
            self.writer.close()
        self.writer = None


def read_metrics(directory: epath.Path, name: str = METRICS_FILE) -> list[dict[str, Any]]:
    """All whole lines of a run's log; a torn last line is left out."""
    return read_log(directory / name)
