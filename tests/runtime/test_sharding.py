"""If these fail, parameters lie where they should not, or a wrong mesh is found out by a crash."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iar_jax.generators.autoregressive.generator import Autoregressive
from iar_jax.generators.autoregressive.transformer import Transformer
from iar_jax.runtime import sharding
from iar_jax.runtime.errors import UserError
from iar_jax.training.generator_steps import init_train_state
from iar_jax.training.optimizer import make_optimizer
from iar_jax.training.state import state_shardings


def test_the_rest_of_the_devices_is_worked_out():
    assert sharding.mesh_shape(-1, 1, 1, 8) == (8, 1, 1)
    assert sharding.mesh_shape(2, -1, 2, 8) == (2, 2, 2)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((3, 1, 1), "data 3 x fsdp 1 x tensor 1, which does not multiply up to the 8 devices"),
        ((3, -1, 1), "does not multiply up to the 8 devices"),
        ((-1, -1, 1), "one at most is -1"),
        ((0, 1, 8), "sizes are positive"),
    ],
)
def test_a_wrong_mesh_is_refused_with_the_arithmetic(sizes, message):
    with pytest.raises(UserError, match=message):
        sharding.mesh_shape(*sizes, 8)


def test_every_large_leaf_of_the_state_is_split_and_none_is_ever_whole_on_a_device():
    mesh = sharding.make_mesh(2, 2, 2)
    model = Autoregressive(Transformer(64, 10, 4, 32, 2, 4, 64))
    optimizer = make_optimizer(1e-3, b1=0.9, b2=0.95, weight_decay=0.05, clip_norm=1.0)
    state, shardings = sharding.initialise_sharded(
        lambda key: init_train_state(key, model, optimizer), mesh, jax.random.key(0)
    )
    parts = {
        "wqkv": 4,  # width over fsdp, heads over tensor
        "wo": 4,
        "w13": 4,
        "w2": 4,
        "token_table": 4,
        "head": 4,
        "class_table": 2,  # width over fsdp
    }
    for tree in (state.params, state.ema_params, state.opt_state):
        seen = set()
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            name = getattr(path[-1], "key", None)
            if name in parts:
                seen.add(name)
                assert leaf.addressable_shards[0].data.size * parts[name] == leaf.size, path
        assert seen == set(parts)
    for leaf, expected in zip(jax.tree.leaves(state), jax.tree.leaves(shardings), strict=True):
        assert leaf.sharding.is_equivalent_to(expected, leaf.ndim)


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2), (4, 1, 2)])
def test_optimizer_state_and_averages_are_split_over_data_too(shape):
    mesh = sharding.make_mesh(*shape)
    model = Autoregressive(Transformer(64, 10, 4, 32, 2, 4, 64))
    optimizer = make_optimizer(1e-3, b1=0.9, b2=0.95, weight_decay=0.05, clip_norm=1.0)
    state, _ = sharding.initialise_sharded(
        lambda key: init_train_state(key, model, optimizer), mesh, jax.random.key(0), shardings_of=state_shardings
    )
    own = jax.tree.map(lambda leaf: leaf.addressable_shards[0].data.size, state.params)
    names = {"wqkv", "wo", "w13", "w2", "token_table", "head", "class_table"}
    for tree in (state.ema_params, *moments_of(state.opt_state)):
        for (path, leaf), size in zip(jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(own), strict=True):
            if getattr(path[-1], "key", None) in names:
                assert leaf.addressable_shards[0].data.size * shape[0] == size, path
                # Every number is there once among the devices that the split is over.
                assert len({str(shard.index) for shard in leaf.addressable_shards}) >= shape[0]


def moments_of(opt_state):
    """The trees of AdamW's moments, which are like the parameters."""
    found = []
    for part in jax.tree.leaves(opt_state, is_leaf=lambda leaf: hasattr(leaf, "mu")):
        if hasattr(part, "mu"):
            found += [part.mu, part.nu]
    assert len(found) == 2
    return found


def test_initial_values_do_not_depend_on_the_mesh():
    model = Autoregressive(Transformer(64, 10, 4, 32, 2, 4, 64))
    optimizer = make_optimizer(1e-3, b1=0.9, b2=0.95, weight_decay=0.05, clip_norm=1.0)
    states = [
        sharding.initialise_sharded(
            lambda key: init_train_state(key, model, optimizer), sharding.make_mesh(*shape), jax.random.key(3)
        )[0]
        for shape in ((8, 1, 1), (1, 4, 2))
    ]
    jax.tree.map(np.testing.assert_array_equal, *states)


def test_sizes_that_an_axis_does_not_divide_are_refused():
    mesh = sharding.make_mesh(2, 1, 4)
    sharding.check_divides(mesh, {"heads": (12, "tensor"), "width": (7, "fsdp")})
    with pytest.raises(UserError, match=r"config\.mesh\.tensor is 4, and 6 heads divided by it leave 2"):
        sharding.check_divides(mesh, {"heads": (6, "tensor")})


def test_batches_are_split_over_data_and_fsdp():
    mesh = sharding.make_mesh(2, 2, 2)
    batch = sharding.global_batch(mesh, {"x": np.arange(8)})
    assert {tuple(shard.data.tolist()) for shard in batch["x"].addressable_shards} == {(0, 1), (2, 3), (4, 5), (6, 7)}
    np.testing.assert_array_equal(batch["x"], jnp.arange(8))
    sharding.check_batch_size(mesh, 8, "config.training.batch_size")
    with pytest.raises(
        UserError, match=r"config.training.batch_size is 6; it must be a multiple of data 2 x fsdp 2 = 4"
    ):
        sharding.check_batch_size(mesh, 6, "config.training.batch_size")


class FakeTpu:
    """A device of a multi-slice TPU, as far as meshes look at it."""

    platform, device_kind, core_on_chip = "tpu", "TPU v5 lite", 0

    def __init__(self, number, slice_index, coords):
        self.id, self.slice_index, self.coords = number, slice_index, coords
        self.process_index = slice_index

    def __repr__(self):
        return f"tpu {self.id}"


def two_slices():
    return [FakeTpu(4 * s + i, s, [i % 2, i // 2, 0]) for s in range(2) for i in range(4)]


@pytest.mark.parametrize("shape", [(2, 2, 2), (2, 4, 1), (4, 2, 1), (8, 1, 1)])
def test_only_the_data_axis_crosses_slices(shape):
    mesh = sharding.mesh_of(two_slices(), shape)
    assert mesh.devices.shape == shape
    for row in mesh.devices:
        assert len({device.slice_index for device in row.ravel()}) == 1
    slices = [row.ravel()[0].slice_index for row in mesh.devices]
    assert slices == sorted(slices)


def test_a_data_axis_that_slices_do_not_divide_is_refused():
    with pytest.raises(UserError, match=r"config\.mesh\.data is 1, and there are 2 slices"):
        sharding.mesh_of(two_slices(), (1, 4, 2))


def test_parts_of_a_batch_follow_the_devices_of_a_process():
    assert sharding.local_part(sharding.make_mesh(2, 2, 2)) == (0, 1)
    batch = {"x": np.arange(8)}
    np.testing.assert_array_equal(sharding.part_of(sharding.make_mesh(8, 1, 1), batch)["x"], np.arange(8))
