"""If these fail, a loss that is not a number is saved, passes unseen, or stops a run that may leave it out."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from iar_jax.runtime import checkpoint, sharding
from iar_jax.runtime.checkpoint import Retention
from iar_jax.runtime.errors import UserError
from iar_jax.training.loop import TrainingRun
from iar_jax.training.state import TrainState, skip_unless_finite


@jax.jit
def plain_step(state, x):
    """Parameters that sum up what they see; a gradient of infinity where x is -1."""
    gradient = jnp.where(x < 0, jnp.inf, x)
    params = {"w": state.params["w"] + gradient}
    return TrainState(state.step + 1, params, (), params), {"loss": x, "grad_norm": gradient}


def fresh():
    params = {"w": jnp.zeros(3)}
    return TrainState(jnp.int32(0), params, (), params)


def run(tmp_path, values, *, step=plain_step, num_steps=None, log_every=100, checkpoint_every=2, max_skipped_steps=0):
    """Trains on one value a step; the final state."""
    directory = epath.Path(tmp_path) / "train"
    mesh = sharding.make_mesh(-1, 1, 1)
    with TrainingRun(
        directory,
        "train",
        num_steps=num_steps or len(values),
        batch_size=2,
        log_every=log_every,
        checkpoint_every=checkpoint_every,
        retention=Retention(2),
        max_skipped_steps=max_skipped_steps,
    ) as training:
        state = fresh()
        shardings = jax.tree.map(lambda _: sharding.replicated(mesh), state)
        state = training.resume(jax.device_put(state, shardings), checkpoint.abstract_tree(state, shardings))
        batches = ({"x": v, "image_id": np.array([10 * i, 10 * i + 1])} for i, v in enumerate(values))
        for _ in range(training.step):
            next(batches)
        for _ in training.steps():
            state, metrics = step(state, jnp.float32(training.next_batch(batches)["x"]))
            training.finished_step(state, metrics)
    return state


def lines(tmp_path):
    return [json.loads(line) for line in (tmp_path / "train" / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("bad", "last_sound"), [(2, 2), (3, 2), (4, 4)])
def test_a_step_that_is_not_finite_stops_the_run_and_is_never_saved(tmp_path, bad, last_sound):
    values = [1.0] * 8
    values[bad] = -1.0
    with pytest.raises(UserError) as stop:
        run(tmp_path, values)
    message = str(stop.value)
    assert f"step {bad + 1}: grad_norm not finite" in message
    assert f"The last checkpoint is that of step {last_sound}" in message
    named = json.loads((tmp_path / "train" / f"not-finite-step-{bad + 1:07d}.json").read_text())
    assert named["image_ids"] == [10 * bad, 10 * bad + 1]
    # It was between two lines of the log, and has one of its own, which is JSON.
    assert lines(tmp_path)[-1] == {"step": bad + 1, "train/loss": -1.0, "train/skipped_steps": 1}
    # What can be gone on from is sound.
    values[bad] = 1.0
    assert run(tmp_path, values).params["w"].tolist() == [8.0] * 3


def test_so_many_steps_as_allowed_are_left_out_also_over_a_resume(tmp_path, capsys):
    step = jax.jit(skip_unless_finite(plain_step))
    values = [1.0, -1.0, 1.0, 1.0, -1.0, 1.0]
    state = run(tmp_path, values[:3], step=step, max_skipped_steps=2)
    state = run(tmp_path, values, step=step, max_skipped_steps=2)
    assert state.params["w"].tolist() == [4.0] * 3
    assert int(state.step) == 6
    said = capsys.readouterr().out
    assert "step 2: grad_norm not finite" in said
    assert "skipped, 2 of at most 2" in said
    with pytest.raises(UserError, match="step 7: grad_norm not finite"):
        run(tmp_path, [*values, -1.0, 1.0], step=step, max_skipped_steps=2)


def test_a_run_does_not_get_shorter_than_it_is(tmp_path):
    run(tmp_path, [1.0] * 4)
    with pytest.raises(UserError, match="is at step 4; num_steps is 3"):
        run(tmp_path, [1.0] * 3)
