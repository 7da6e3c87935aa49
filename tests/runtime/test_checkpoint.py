"""If these fail, a resumed run is another run, or a damaged checkpoint ends one."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st

from iar_jax.runtime import checkpoint, sharding
from iar_jax.runtime.checkpoint import Retention
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
    with checkpoint.Checkpoints(directory, Retention(keep)) as checkpoints:
        for step in steps:
            checkpoints.save(step, make_state(step), {"seconds": 1.5 * step})


def test_the_latest_state_comes_back_bit_for_bit(tmp_path, mesh):
    directory = epath.Path(tmp_path) / "checkpoints"
    save(directory, (1, 2, 3))
    with checkpoint.Checkpoints(directory, Retention(2)) as checkpoints:
        state, info = checkpoints.restore_latest(abstract(make_state(0), mesh))
        assert checkpoints.manager.all_steps() == [2, 3]
    jax.tree.map(np.testing.assert_array_equal, state, make_state(3))
    assert (info["data_position"], info["seconds"]) == (3, 4.5)
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
    with checkpoint.Checkpoints(directory, Retention(2)) as checkpoints:
        state, _ = checkpoints.restore_latest(template)
    assert state.params["w"].sharding == split
    jax.tree.map(np.testing.assert_array_equal, state, make_state(1))


def test_a_damaged_checkpoint_falls_back_to_the_one_before_and_says_so(tmp_path, mesh, capsys):
    directory = epath.Path(tmp_path) / "checkpoints"
    save(directory, (1, 2))
    for path in list_files(directory / "2" / "state"):
        path.write_bytes(path.read_bytes()[: path.stat().length // 2])
    with checkpoint.Checkpoints(directory, Retention(2)) as checkpoints:
        state, info = checkpoints.restore_latest(abstract(make_state(0), mesh))
    assert info["data_position"] == 1
    jax.tree.map(np.testing.assert_array_equal, state, make_state(1))
    assert "WARNING: the checkpoint of step 2" in capsys.readouterr().out


def test_checkpoints_that_cannot_be_read_are_never_all_removed(tmp_path, mesh):
    directory = epath.Path(tmp_path) / "checkpoints"
    save(directory, (1, 2))
    other = dataclasses.replace(make_state(0), params={"another": jnp.zeros(3)})
    with checkpoint.Checkpoints(directory, Retention(2)) as checkpoints:
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


def test_one_flipped_bit_is_found(tmp_path, mesh, capsys):
    directory = epath.Path(tmp_path) / "checkpoints"
    rng = np.random.default_rng(0)
    tree = {"w": jnp.asarray(rng.standard_normal((200, 100)), jnp.float32)}  # most of its files' bytes
    state = TrainState(jnp.int32(2), tree, (), tree)
    with checkpoint.Checkpoints(directory, Retention(2)) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state, {})
    for item in ("state", "ema_params"):
        largest = max(list_files(directory / "2" / item), key=lambda path: path.stat().length)
        whole = largest.read_bytes()
        damaged = bytearray(whole)
        damaged[rng.integers(len(whole))] ^= 1 << int(rng.integers(8))
        largest.write_bytes(bytes(damaged))
        if item == "ema_params":
            with pytest.raises(UserError, match="the weights of step 2 cannot be read"):
                checkpoint.restore_params(directory, abstract(tree, mesh))
        else:
            copy = epath.Path(tmp_path) / "copy"
            shutil.copytree(directory, copy)
            with checkpoint.Checkpoints(copy, Retention(2)) as checkpoints:
                _, info = checkpoints.restore_latest(abstract(state, mesh))
            assert info["data_position"] == 1
            assert "changed since they were written" in capsys.readouterr().out
        largest.write_bytes(whole)


def test_info_is_sealed_and_that_of_older_checkpoints_is_not():
    info = {"data_position": 3, "seconds": 0.1, "ema_checksum": 5}
    assert checkpoint.opened(json.loads(json.dumps(checkpoint.sealed(info)))) == info
    with pytest.raises(ValueError, match="its info changed"):
        checkpoint.opened(checkpoint.sealed(info) | {"data_position": 2})
    with pytest.raises(ValueError, match="its info changed"):
        checkpoint.opened(info)
    older = {"data_position": 3, "seconds": 0.1}
    assert checkpoint.opened(older) == older


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2), st.integers(0, 10**6), st.integers(0, 31))
def test_every_single_bit_of_every_leaf_counts_in_the_checksum(which, place, bit):
    leaves = [np.arange(12, dtype=np.float32).reshape(3, 4), np.int32(7), np.ones((2, 3, 5), np.float32)]
    before = int(checkpoint.checksum(leaves))
    bits = np.array(leaves[which]).view(np.uint32).reshape(-1)
    bits[place % bits.size] ^= np.uint32(1 << bit)
    leaves[which] = bits.view(np.asarray(leaves[which]).dtype).reshape(np.shape(leaves[which]))
    assert int(checkpoint.checksum(leaves)) != before


def test_the_checksum_is_the_same_for_every_sharding(mesh):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((16, 8)), jnp.float32)
    for spec in (("data",), (None, "data"), ()):
        split = jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec)))
        assert int(checkpoint.checksum({"x": split})) == int(checkpoint.checksum({"x": x}))


def test_the_last_every_nth_and_the_best_checkpoints_stay(tmp_path):
    directory = epath.Path(tmp_path) / "checkpoints"
    losses = {1: 5.0, 2: 1.0, 3: 4.0, 4: 3.0, 5: 2.0, 6: 2.5, 7: 2.6}
    with checkpoint.Checkpoints(directory, Retention(2, every=3, best="token_loss")) as checkpoints:
        for step, loss in losses.items():
            checkpoints.save(step, make_state(step), {}, {"token_loss": loss})
    assert kept(directory) == [2, 3, 6, 7]
    # A stop between validations leaves a checkpoint without metrics; the highest of a metric stays.
    directory = epath.Path(tmp_path) / "highest"
    with checkpoint.Checkpoints(directory, Retention(1, best="-psnr")) as checkpoints:
        for step, psnr in {1: 20.0, 2: None, 3: 21.0, 4: None, 5: 19.0}.items():
            checkpoints.save(step, make_state(step), {}, None if psnr is None else {"psnr": psnr})
    assert kept(directory) == [3, 5]


def kept(directory):
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdigit())
