"""What a chip's own compiler expects a compiled program to take, part by part.

TPU: the cycles that the compiler writes beside each instruction, loops multiplied out, at the chip's clock. Kernels
(Pallas) come without: theirs are the instructions of their final schedule times the rounds of their grid, as the
compiler dumps it, and never less than their operands and results take at the memory's peak rate.

GPU: the time that XLA writes beside a fusion, where it does; where it does not, the bytes that the fusion reads and
writes at the memory's peak rate. Library calls (cuBLAS, cuDNN) are the larger of their bytes and their FLOPs at peak
rates. XLA's fusions come without a time, so that this is a bound by parts rather than an expectation.

Collectives that the program waits for are priced by what they send at the network's rate; those that other work goes on
beside are in no part, nor are copies that are started ahead.
"""

import collections
import dataclasses
import math
import pathlib
import re
from collections.abc import Mapping
from typing import NamedTuple

from iar_jax.runtime.chips import Chip
from launch.compiled_cost import Traffic, network_rate
from launch.compiled_text import bytes_of, computations_of, repeats_of

# Part -> what the place of an instruction in the program matches; the first part that does has it.
PARTS = {
    "what the scan keeps": r"dynamic_(update_)?index_in_dim|/while/body/(dynamic_(update_)?slice|squeeze)$",
    "optimizer": r"/optimizer/",
    "head and loss": r"cluster_loss|/head/",
    "drawing": r"/drawing/",
    "attention": r"/attention/",
    "feed-forward": r"/feed_forward/",
    "norms": r"_norm/|/norm/",
    "dropout": r"Dropout",
    "embedding": r"embed",
    "discriminator": r"[Dd]iscriminator",
    "perceptual loss": r"lpips|LPIPS",
    "quantizer": r"[Qq]uanti",
    "encoder": r"[Ee]ncoder",
    "decoder": r"[Dd]ecoder",
}
CASTS, COLLECTIVES, REST = "casts and copies", "collectives", "rest"


@dataclasses.dataclass(frozen=True)
class Expectation:
    """Seconds of a program on one device.

    Attributes:
        parts: by part, the largest first.
        kernels: of the kernels and library calls among them, by name: not the compiler's own figure.
        left_out: what is in no part: calls that nothing is known of, and how often they run.
    """

    parts: dict[str, float]
    kernels: dict[str, float]
    left_out: dict[str, int]

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())


def expected_time(text: str, chip: Chip, traffic: list[Traffic], schedules: Mapping[str, float]) -> Expectation:
    """The compiler's expectation of a program.

    Args:
        text: the optimised program's (`compiled.as_text()`).
        traffic: its collectives (`compiled_cost.collective_traffic`).
        schedules: cycles of its kernels by the name of their instruction (`kernel_schedules`).
    """
    computations = computations_of(text)
    repeats = repeats_of(computations, inside_fusions=False)
    price = tpu_seconds if chip.platform == "tpu" else gpu_seconds
    parts: dict[str, float] = collections.defaultdict(float)
    kernels: dict[str, float] = collections.defaultdict(float)
    left_out: dict[str, int] = collections.defaultdict(int)
    for name, lines in computations.items():
        if not repeats[name]:
            continue
        program = Program(computations, result_types(lines))
        for line in lines:
            called = call_name(line)
            seconds = price(line, program, chip, schedules)
            if seconds is not None:
                parts[part_of(line)] += repeats[name] * seconds
                if called:
                    kernels[called] += repeats[name] * seconds
            elif called:
                left_out[called] += repeats[name]
    for item in traffic:
        waited = item.bytes_sent - item.bytes_ahead
        if waited:
            parts[COLLECTIVES] += waited / network_rate(chip, item.group_size)
    by_size = sorted(parts.items(), key=lambda item: -item[1])
    return Expectation(dict(by_size), dict(kernels), dict(left_out))


class Program(NamedTuple):
    """Lines of all computations, and the result types of one of them by the names of its instructions."""

    computations: Mapping[str, list[str]]
    types: Mapping[str, str]


def tpu_seconds(line: str, program: Program, chip: Chip, schedules: Mapping[str, float]) -> float | None:
    """Of an instruction: the cycles beside it, or a kernel's; None where nothing is known."""
    cycles = re.search(r'"estimated_cycles":"(\d+)"', line)
    if cycles:
        return int(cycles.group(1)) / chip.clock
    called = call_name(line)
    if called not in schedules:
        return None
    # Operands and results as they lie there, rows padded to 128.
    moved = bytes_of(re.split(r", (?:frontend_attributes|metadata)=", line)[0], row=128)
    return max(schedules[called] / chip.clock, moved / chip.memory_rate)


def gpu_seconds(line: str, program: Program, chip: Chip, schedules: Mapping[str, float]) -> float | None:
    """Of an instruction: what XLA notes, or its bytes and FLOPs at peak rates; None where nothing is known."""
    noted = re.search(r'"exec_time_us":([\d.e+\-]+)', line)
    if noted:
        return float(noted.group(1)) * 1e-6
    found = re.match(r"\s+(?:ROOT )?%?[\w.\-]+ = (.*?) ([\w\-]+)\(([^)]*)\)", line)
    if not found:
        return None
    result, opcode, operands = found.groups()
    shapes = [program.types.get(name.strip().lstrip("%"), "") for name in operands.split(",")]
    moved = bytes_of(result) + sum(map(bytes_of, shapes))
    if opcode == "custom-call":
        flops = library_flops(line, result, shapes)
        return None if flops is None else max(flops / chip.flops, moved / chip.memory_rate)
    if opcode == "fusion":
        body = program.computations.get(first(r"calls=%?([\w.\-]+)", line), [])
        return fusion_bytes(body, result, shapes) / chip.memory_rate
    return moved / chip.memory_rate if opcode in ("copy", "transpose", "reduce", "sort", "scatter", "gather") else None


def fusion_bytes(body: list[str], result: str, operands: list[str]) -> float:
    """What a fusion reads and writes; of what it slices, or writes into in place, the part that it touches."""
    types = result_types(body)
    total = 0.0
    for number, operand in enumerate(operands):
        name = next((instruction_name(line) for line in body if f" parameter({number})" in line), "")
        users = [line for line in body if re.search(rf"%{re.escape(name)}[,)]", line.partition(" = ")[2])]
        touched = [touched_bytes(line, name, types) for line in users]
        total += bytes_of(operand) if None in touched else sum(part for part in touched if part)
    root = next((line for line in body if "ROOT" in line), "")
    in_place = touched_bytes(root, "", types) if "dynamic-update-slice(" in root else None
    return total + (bytes_of(result) if in_place is None else in_place)


def touched_bytes(line: str, name: str, types: Mapping[str, str]) -> float | None:
    """What an instruction reads of `name`, or writes; None where it is all of it."""
    found = re.search(r" dynamic-(update-)?slice\(([^)]*)\)", line)
    if not found:
        return None
    whole, second = (operand.strip().lstrip("%") for operand in found.group(2).split(",")[:2])
    if name not in ("", whole):
        return None
    return bytes_of(types[second if found.group(1) else instruction_name(line)])


def library_flops(line: str, result: str, operands: list[str]) -> float | None:
    """FLOPs of a product by cuBLAS, or of cuDNN's causal attention: half of two products forward, of five backward."""
    if "gemm_backend_config" in line:
        contracted = first(r'"lhs_contracting_dimensions":\["([\d",]+)"\]', line).split('","')
        left = dims_of(operands[0])
        return 2.0 * math.prod(dims_of(result)) * math.prod(left[int(axis)] for axis in contracted)
    if "__cudnn$fmha" in line:
        batch, length, heads, head_dim = dims_of(first(r"operand_layout_constraints=\{([^}]*\})", line))
        return (5 if "Backward" in line else 2) * batch * heads * length**2 * head_dim
    return None


def dims_of(array: str) -> list[int]:
    """Of the first array in a text."""
    return [int(size) for size in first(r"\w+\[([\d,]*)\]", array).split(",") if size]


def result_types(lines: list[str]) -> dict[str, str]:
    found = (re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ", line) for line in lines)
    return {match.group(1): match.group(2) for match in found if match}


def part_of(line: str) -> str:
    place = re.search(r'op_name="([^"]*)"', line)
    if not place:
        return CASTS
    return next((part for part, pattern in PARTS.items() if re.search(pattern, place.group(1))), REST)


def call_name(line: str) -> str:
    """A kernel's instruction without its number, or the library's routine; "" for other instructions."""
    target = re.search(r'custom_call_target="(tpu_custom_call|__cu[^"]*|__triton[^"]*)"', line)
    if not target:
        return ""
    name = instruction_name(line) if target.group(1) == "tpu_custom_call" else target.group(1)
    return re.sub(r"(\.\d+)+$", "", name)


def instruction_name(line: str) -> str:
    return first(r"^\s+(?:ROOT )?%?([\w.\-]+) = ", line)


def first(pattern: str, text: str) -> str:
    """The first group of the first match; raises ValueError where a program's text is not what this file knows."""
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"nothing like {pattern} in {text[:200]}")
    return found.group(1)


def dump_flags(directory: pathlib.Path) -> list[str]:
    """Flags of libtpu that make it put the final schedules of kernels there."""
    return [
        f"--xla_jf_dump_to={directory}",
        "--xla_jf_dump_llo_text=true",
        "--xla_jf_dump_llo_pass_label_regex=final_bundles",
    ]


def kernel_schedules(directory: pathlib.Path) -> dict[str, float]:
    """Cycles of each kernel that a TPU's compiler dumped, by the name of its instruction.

    The instructions of a schedule, one a cycle, times the rounds of its longest loop, which is the grid's; of rounds
    that skip their work as if they did it.
    """
    found: dict[str, float] = {}
    for path in sorted(directory.glob("*final_bundles.txt")):
        name = re.match(r"\d+-(.*)-\d+-final_bundles\.txt", path.name)
        if name:
            text = path.read_text()
            bundles = len(re.findall(r"^ *0x[0-9a-f]+ ", text, re.MULTILINE))
            rounds = re.findall(r"totalorder \S+, (\d+) /\* loop exit test", text)
            kernel = re.sub(r"(\.\d+)+$", "", name.group(1))
            found[kernel] = max(found.get(kernel, 0.0), float(bundles * max(map(int, rounds), default=1)))
    return found
