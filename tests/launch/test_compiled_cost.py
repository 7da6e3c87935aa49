"""If these fail, what a launch is said to cost is wrong."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from iar_jax.runtime import sharding
from iar_jax.runtime.chips import CHIPS
from launch.compiled_cost import Traffic, collective_traffic, step_bound

SHAPE = {"data": 2, "fsdp": 2, "tensor": 2}


def traffic_of(function, *arguments):
    with sharding.use_mesh(sharding.make_mesh(2, 2, 2)):
        text = jax.jit(function).lower(*arguments).compile().as_text()
    return {(item.kind, item.axes): item for item in collective_traffic(text, SHAPE)}


def on(spec, shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(sharding.make_mesh(2, 2, 2), spec))


def test_sums_over_an_axis_are_counted_once_a_round_of_their_loop():
    def looped(x):
        def body(total, _):
            inside = jax.shard_map(
                lambda y: jax.lax.psum(y * total[0, 0], "tensor"), in_specs=P("data"), out_specs=P("data"),
                check_vma=False,
            )  # fmt: skip
            return jnp.tanh(inside(x)), None

        return jax.lax.scan(body, x, length=5)[0]

    found = traffic_of(looped, on(P("data"), (8, 16)))
    item = found["all-reduce", ("tensor",)]
    # Each device sums its 4 x 16 floats with one other: 2 (g - 1) / g = 1 times their bytes, five times.
    assert (item.count, item.group_size, item.bytes_sent) == (5, 2, 5 * 4 * 16 * 4)


@pytest.mark.parametrize("axis", ["data", "fsdp", "tensor"])
def test_each_axis_is_told_from_the_others(axis):
    def gathered(x):
        return jax.shard_map(
            lambda y: jax.lax.all_gather(y, axis, tiled=True), in_specs=P(axis), out_specs=P(), check_vma=False
        )(x)

    found = traffic_of(gathered, on(P(axis), (8, 16)))
    assert found["all-gather", (axis,)].bytes_sent == 8 * 16 * 4 / 2


def test_sums_over_two_axes_name_both():
    def summed(x):
        return jax.shard_map(lambda y: jax.lax.psum(y, ("data", "tensor")), in_specs=P(), out_specs=P())(x)

    found = traffic_of(summed, on(P(), (8, 16)))
    assert found["all-reduce", ("data", "tensor")].bytes_sent == pytest.approx(2 * 3 / 4 * 8 * 16 * 4)


# ruff: noqa: E501
# Lines as TPU compilers write them.
TPU_PROGRAM = """HloModule step

%body.1 (p: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %g = bf16[16,8]{1,0} all-gather(%x), channel_id=7, replica_groups=mesh['axis_0'=4,'axis_1'=2], device_ids=([2,4]T(1,0)) {'axis_0'}, dimensions={0}
  %h = bf16[16,8]{1,0} all-gather(%y), channel_id=7, replica_groups=mesh['axis_0'=4,'axis_1'=2], device_ids=([2,4]T(1,0)) {'axis_0'}, dimensions={0}
}

%condition.1 (p: (s32[], bf16[4,8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(12)
}

%all-reduce-scatter.2 (input: bf16[16,8]) -> bf16[4,8] {
  %r = bf16[16,8]{1,0} all-reduce(%input), channel_id=9, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
}

ENTRY %main (a: bf16[4,8]) -> bf16[4,8] {
  %w = (s32[], bf16[4,8]) while(%t), condition=%condition.1, body=%body.1
  %f = bf16[4,8] fusion(%w), kind=kCustom, calls=%all-reduce-scatter.2
}
"""


def test_what_tpu_compilers_write_is_understood():
    found = {(item.kind, item.axes): item for item in collective_traffic(TPU_PROGRAM, {"data": 2, "fsdp": 4})}
    # One gather, written down twice, in each of twelve rounds; devices 0 to 3 are a row of fsdp.
    gathers = found["all-gather", ("fsdp",)]
    assert (gathers.count, gathers.bytes_sent) == (12, 12 * 3 / 4 * 16 * 8 * 2)
    scattered = found["reduce-scatter", ("fsdp",)]
    assert (scattered.count, scattered.bytes_sent) == (1, 3 / 4 * 16 * 8 * 2)
    assert len(found) == 2


def test_the_bound_is_its_largest_term():
    chip = CHIPS["h100"]
    near, far = Traffic("all-reduce", ("tensor",), 8, 1, 45e9), Traffic("all-reduce", ("data",), 16, 1, 5e9)
    bound = step_bound(chip, 16, model_flops=16 * 989e12, bytes_touched=3.35e11, traffic=[near, far])
    np.testing.assert_allclose([bound.compute, bound.memory, bound.network], [1.0, 0.1, 0.2])
    assert (bound.seconds, bound.bound_by) == (1.0, "compute")
