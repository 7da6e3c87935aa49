"""If these fail, a resumed run is another run, or a damaged checkpoint ends one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from iar_jax.runtime import checkpoint, sharding
from iar_jax.runtime.errors import UserError
from iar_jax.training.state import TrainState


def make_state(value):
    tree = {"w": jnp.full((8, 4), float(value)), "b": jnp.arange(3.0)}
    ema = jax.tree.map(lambda x: x + 100, tree)
    return TrainState(jnp.int32(value), tree, (jnp.zeros(2), {"m": tree["w"]}), ema)


def abstract(state, mesh):
    return checkpoint.abstract_tree(state, jax.tree.map(lambda _: sharding.replicated(mesh), state))


@pytest.fixture
def mesh():
    return sharding.make_mesh(8, 1, 1)


def save(directory, steps, keep=2):
    with checkpoint.Checkpoints(directory, keep=keep) as checkpoints:
        for step in steps:
            checkpoints.save(step, make_state(step), {"seconds": 1.5 * step})


def test_the_latest_state_comes_back_bit_for_bit(tmp_path, mesh):
    directory = epath.Path(tmp_path) / "checkpoints"
    save(directory, (1, 2, 3))
    with checkpoint.Checkpoints(directory, keep=2) as checkpoints:
        state, info = checkpoints.restore_latest(abstract(make_state(0), mesh))
        assert checkpoints.manager.all_steps() == [2, 3]
    jax.tree.map(np.testing.assert_array_equal, state, make_state(3))
    assert info == {"data_position": 3, "seconds": 4.5}
    params, step = checkpoint.restore_params(directory, abstract(make_state(0).ema_params, mesh))
    assert step == 3
    jax.tree.map(np.testing.assert_array_equal, params, make_state(3).ema_params)


def test_a_checkpoint_restores_onto_another_mesh(tmp_path):
    directory = epath.Path(tmp_path) / "checkpoints"
    save(directory, (1,))
    mesh = sharding.make_mesh(2, 4, 1)
    template = abstract(make_state(0), mesh)
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    leaf = jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=split)
    template = dataclasses.replace(template, params=template.params | {"w": leaf})
    with checkpoint.Checkpoints(directory, keep=2) as checkpoints:
        state, _ = checkpoints.restore_latest(template)
    assert state.params["w"].sharding == split
    jax.tree.map(np.testing.assert_array_equal, state, make_state(1))


def test_a_damaged_checkpoint_falls_back_to_the_one_before_and_says_so(tmp_path, mesh, capsys):
    directory = epath.Path(tmp_path) / "checkpoints"
    save(directory, (1, 2))
    for path in list_files(directory / "2" / "state"):
        path.write_bytes(path.read_bytes()[: path.stat().length // 2])
    with checkpoint.Checkpoints(directory, keep=2) as checkpoints:
        state, info = checkpoints.restore_latest(abstract(make_state(0), mesh))
    assert info["data_position"] == 1
    jax.tree.map(np.testing.assert_array_equal, state, make_state(1))
    assert "WARNING: the checkpoint of step 2" in capsys.readouterr().out


def test_checkpoints_that_cannot_be_read_are_never_all_removed(tmp_path, mesh):
    directory = epath.Path(tmp_path) / "checkpoints"
    save(directory, (1, 2))
    other = dataclasses.replace(make_state(0), params={"another": jnp.zeros(3)})
    with checkpoint.Checkpoints(directory, keep=2) as checkpoints:
        with pytest.raises(UserError, match=r"none of the checkpoints of steps \[1, 2\] can be read"):
            checkpoints.restore_latest(abstract(other, mesh))
        assert checkpoints.manager.all_steps() == [1, 2]


def list_files(directory):
    for entry in directory.iterdir():
        if entry.is_dir():
            yield from list_files(entry)
        else:
            yield entry


def test_no_checkpoint_and_one_of_another_model_are_refused(tmp_path, mesh):
    directory = epath.Path(tmp_path) / "checkpoints"
    with pytest.raises(UserError, match="no checkpoint in it"):
        checkpoint.restore_params(directory, {})
    save(directory, (1,))
    other = abstract({"w": jnp.zeros((9, 4)), "b": jnp.arange(3.0)}, mesh)
    with pytest.raises(UserError, match="cannot be read into this model"):
        checkpoint.restore_params(directory, other)
