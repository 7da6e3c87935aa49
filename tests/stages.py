"""Stages as the child processes that they are for a user, at a size where all of them together take a minute."""

import json
import os
import pathlib
import re
import subprocess
import sys
import time

import numpy as np

ROOT = pathlib.Path(__file__).parents[1]

TINY = [
    "--config.tokenizer.channels=16",
    "--config.tokenizer.codebook_size=64",
    "--config.tokenizer_training.num_steps=30",
    "--config.tokenizer_training.quantize_from_step=10",
    "--config.tokenizer_training.eval_every=20",
    "--config.tokenizer_training.checkpoint_every=15",
    "--config.codebook.cluster_sizes=(8,)",
    "--config.codebook.order=path",
    "--config.model.dim=32",
    "--config.model.num_layers=2",
    "--config.model.scan_unroll=2",
    "--config.training.num_steps=24",
    "--config.training.eval_every=10",
    "--config.training.checkpoint_every=10",
    "--config.training.log_every=2",
    "--config.sampling.num_images=20",
    "--config.sampling.batch_size=8",
    "--config.evaluation.classifier_steps=20",
]


def command(stage, workdir, *arguments, config="configs/mnist.py"):
    return [sys.executable, "-m", f"iar_jax.{stage}", f"--config={config}", f"--workdir={workdir}", *arguments]


def environment(devices=1, **more):
    return {**os.environ, "JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu", **more}


def call(stage, workdir, *arguments, config="configs/mnist.py", devices=1, check=True, **variables):
    """Runs a stage to its end."""
    done = subprocess.run(
        command(stage, workdir, *arguments, config=config),
        cwd=ROOT,
        env=environment(devices, **variables),
        capture_output=True,
        text=True,
        check=False,
    )
    if check:
        assert done.returncode == 0, done.stdout + done.stderr
    return done


def without_pictures(page):
    """A page's text without the letters of the pictures in it, which may spell anything."""
    return re.sub(r"base64,[A-Za-z0-9+/=]*", "", page)


def start(stage, workdir, *arguments, devices=1, **variables):
    """Starts a stage and returns its process; both outputs come from its pipe."""
    return subprocess.Popen(
        command(stage, workdir, *arguments),
        cwd=ROOT,
        env=environment(devices, **variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def start_processes(count, devices, workdir, *arguments, stage="train", **variables):
    """A stage as several processes, started."""
    launcher = ["bash", "launch/local_processes.sh", str(count), str(devices)]
    return subprocess.Popen(
        [*launcher, *command(stage, workdir, *arguments)],
        cwd=ROOT,
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def children(process):
    """Process numbers of the training processes that a launcher has started, and that run."""
    assert process.poll() is None, process.communicate()[0]
    return [int(pid) for pid in pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def inputs_of(path):
    return [f"--config.inputs.{name}={path / name}" for name in ("tokenizer", "codebook", "codes")]


def metrics_text(path, stage="train"):
    return (path / stage / "metrics.jsonl").read_text()


def fingerprint(directory):
    metadata = json.loads((directory / "metadata.json").read_text())
    assert metadata["finished"]
    return metadata["fingerprint"]


def wait_until(condition, seconds=180, pause=0.2):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(pause)


def assert_same_metrics(run, reference, stage="train", rtol=1e-4):
    """Line by line, to the rounding of sums over devices or parts of a batch that are added in another order. An
    accuracy is a share of some thousands of guesses, of which rounding may turn a few that are nearly even."""
    found, expected = (
        [json.loads(line) for line in metrics_text(path, stage).splitlines()] for path in (run, reference)
    )
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    for ours, theirs in zip(found, expected, strict=True):
        for name, value in theirs.items():
            few = 1e-3 if name.endswith("accuracy") else 1e-5
            np.testing.assert_allclose(ours[name], value, rtol=rtol, atol=few, err_msg=name)
