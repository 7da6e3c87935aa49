"""If these fail, what a compiler expects of a program is told wrong: a loop counted once, a kernel for nothing."""

# ruff: noqa: E501
import pytest

from iar_jax.runtime.chips import CHIPS
from launch.compiled_cost import collective_traffic
from launch.expected_time import expected_time, kernel_schedules

# Lines as the TPU compiler writes them; the kernel's attributes hold a line break.
TPU_PROGRAM = """HloModule step

%fused.1 (p: f32[8,128]) -> f32[8,128] {
  %inner = f32[8,128]{1,0} add(%p, %p), backend_config={"estimated_cycles":"999999"}
}

%body.1 (p: (u32[], f32[8,128])) -> (u32[], f32[8,128]) {
  %a = f32[8,128]{1,0} fusion(%p), kind=kLoop, calls=%fused.1, metadata={op_name="jit(train_step)/while/body/layers/attention/mul"}, backend_config={"estimated_cycles":"3000"}
  %kernel.4 = bf16[8,64]{1,0:T(8,128)} custom-call(%a), custom_call_target="tpu_custom_call", operand_layout_constraints={f32[8,128]{1,0}}, frontend_attributes={kernel_metadata={
"blocks":"1"
}}, metadata={op_name="jit(train_step)/while/body/layers/attention/kernel"}
  %other.2 = bf16[8,64]{1,0} custom-call(%a), custom_call_target="tpu_custom_call", operand_layout_constraints={}, metadata={op_name="x"}
  %r = f32[8,128]{1,0} all-reduce(%a), channel_id=3, replica_groups={{0,1}}, to_apply=%add
}

%condition.1 (p: (u32[], f32[8,128])) -> pred[] {
  %limit = u32[]{:T(128)} constant(10)
}

ENTRY %main (x: f32[8,128]) -> f32[8,128] {
  %w = (u32[], f32[8,128]) while(%t), condition=%condition.1, body=%body.1
  %copy.3 = f32[8,128]{1,0} copy(%w), backend_config={"estimated_cycles":"600"}
  %o = f32[8,128]{1,0} fusion(%copy.3), kind=kLoop, calls=%fused.1, metadata={op_name="jit(train_step)/optimizer/add"}, backend_config={"estimated_cycles":"1500"}
}
"""

CHIP = CHIPS["v5e"]


def test_cycles_are_counted_once_a_round_and_told_by_part():
    traffic = collective_traffic(TPU_PROGRAM, {"data": 2})
    found = expected_time(TPU_PROGRAM, CHIP, traffic, {"kernel": 45_000.0})
    assert found.parts == {
        "attention": pytest.approx(10 * (3000 + 45_000) / 1.5e9),
        "optimizer": pytest.approx(1500 / 1.5e9),
        "casts and copies": pytest.approx(600 / 1.5e9),
        # 2 (g - 1) / g = 1 times 4,096 bytes, in each of ten rounds.
        "collectives": pytest.approx(10 * 4096 / CHIP.network_rate),
    }
    assert found.seconds == pytest.approx(sum(found.parts.values()))
    assert found.kernels == {"kernel": pytest.approx(10 * 45_000 / 1.5e9)}
    assert found.left_out == {"other": 10}


def test_a_kernel_takes_no_less_than_its_bytes():
    found = expected_time(TPU_PROGRAM, CHIP, [], {"kernel": 1.0})
    # A row of 64 bfloat16 lies in 128 places.
    moved = 8 * 128 * 2 + 8 * 128 * 4
    assert found.kernels["kernel"] == pytest.approx(10 * moved / CHIP.memory_rate)


def test_schedules_are_instructions_times_rounds_of_the_grid(tmp_path):
    schedule = """// header
   0x0   :  { %1 = nop }
 0x1   :  { %p = scmp.ge.s32.totalorder %s1, 34 /* loop exit test */ }
 0x2   : > { %2 = nop }
"""
    (tmp_path / "17-my_kernel.3-01-final_bundles.txt").write_text(schedule)
    (tmp_path / "17-my_kernel.3-00-schedule-analysis_final_bundles.txt").write_text("nothing")
    assert kernel_schedules(tmp_path) == {"my_kernel": 3 * 34.0}


# Lines as XLA writes them for GPUs.
GPU_PROGRAM = """HloModule step

%fused_slice (p0: bf16[12,64,32], p1: s32[]) -> bf16[64,32] {
  %p0.1 = bf16[12,64,32]{2,1,0} parameter(0)
  %p1.1 = s32[] parameter(1)
  ROOT %ds = bf16[1,64,32]{2,1,0} dynamic-slice(%p0.1, %p1.1, %p1.1, %p1.1), dynamic_slice_sizes={1,64,32}
}

ENTRY %main (x: bf16[12,64,32]) -> bf16[64,16] {
  %x = bf16[12,64,32]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %w = bf16[32,16]{1,0} parameter(2)
  %slice = bf16[64,32]{1,0} fusion(%x, %i), kind=kLoop, calls=%fused_slice, metadata={op_name="a/feed_forward/b"}
  %product.1 = (bf16[64,16]{1,0}, s8[100]{0}) custom-call(%slice, %w), custom_call_target="__cublas$lt$matmul", metadata={op_name="a/feed_forward/dot"}, backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}
  %fmha.1 = (bf16[2,4,64,32]{3,2,1,0}, f32[2,4,64]{2,1,0}) custom-call(%q, %k, %v), custom_call_target="__cudnn$fmhaSoftmax", operand_layout_constraints={bf16[2,64,4,32]{3,2,1,0}, bf16[2,64,4,32]{3,2,1,0}}, metadata={op_name="a/attention/f"}, backend_config={}
}
"""


def test_gpu_programs_are_priced_by_bytes_and_flops():
    chip = CHIPS["h100"]
    found = expected_time(GPU_PROGRAM, chip, [], {})
    sliced = (64 * 32 * 2 + 4 + 64 * 32 * 2) / chip.memory_rate  # the slice alone, its place, and what comes out
    product = (64 * 32 * 2 + 32 * 16 * 2 + 64 * 16 * 2 + 100) / chip.memory_rate  # more than its FLOPs take
    assert found.parts["feed-forward"] == pytest.approx(sliced + product)
    attention = (2 * 4 * 64 * 32 * 2 + 2 * 4 * 64 * 4) / chip.memory_rate
    assert found.kernels["__cudnn$fmhaSoftmax"] == pytest.approx(attention)
    assert found.left_out == {}
