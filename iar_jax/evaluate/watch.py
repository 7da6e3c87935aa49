"""Follows a training, which may be running elsewhere, and scores each of its checkpoints."""

import time

from etils import epath
from ml_collections import ConfigDict

from iar_jax.evaluate.sweep import Score
from iar_jax.generators.generator import generator_directory
from iar_jax.runtime import artifacts, checkpoint, metric_log
from iar_jax.runtime.errors import UserError
from iar_jax.runtime.files import Log, read_log
from iar_jax.runtime.progress import say


def run(config: ConfigDict, workdir: epath.Path, pause: float, score: Score) -> None:
    """Scores each checkpoint of a training, which may be running elsewhere, once: in order, until the training is
    finished and all are scored. Leaves watch.jsonl and TensorBoard events in workdir/evaluation."""
    transformer_directory = generator_directory(config.inputs, workdir)
    directory = workdir / "evaluation"
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "watch.jsonl"
    log, board = Log(path), metric_log.TensorBoard(directory)
    scored = {line["step"] for line in read_log(path)}
    say(f"watching {transformer_directory}: {len(scored)} checkpoints scored before")
    while True:
        training = artifacts.read_metadata(transformer_directory)
        new = [step for step in checkpoint.steps_in(transformer_directory / "checkpoints") if step not in scored]
        for step in new:
            point = config.copy_and_resolve_references()
            point.sampling.step = step
            scored.add(step)
            say(f"\nstep {step}")
            try:
                figures = score(point, workdir)
            except UserError as error:
                if step in checkpoint.steps_in(transformer_directory / "checkpoints"):
                    raise
                say(f"the checkpoint of step {step} was removed before it was scored ({error})")
                continue
            found = {name: value for name, value in figures.items() if value is not None}
            log.append({"step": step, **found})
            log.flush()
            board.write(step, {f"evaluation/{name}": value for name, value in found.items()})
            board.flush()
        if not new and training is not None and training.finished:
            log.close()
            board.close()
            say(f"watch: the training is finished, {len(scored)} checkpoints are scored, in {path}")
            return
        if not new:
            time.sleep(pause)
