"""What a compiled step costs on a chip: bytes of its collectives by mesh axis, and a lower bound of its time.

Bytes are read from the compiled program's text; the compiler's own count takes the body of a loop once.
"""

import collections
import dataclasses
import itertools
import math
import re

import numpy as np

from iar_jax.runtime.chips import Chip

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

ITEM_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "f64": 8}


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes that one device sends for one kind of collective over one set of mesh axes, in one step."""

    kind: str
    axes: tuple[str, ...]
    group_size: int
    count: int
    bytes_sent: float


def collective_traffic(text: str, mesh_shape: dict[str, int]) -> list[Traffic]:
    """All collectives of a compiled program, loops multiplied out, the largest traffic first.

    Args:
        text: of the optimised program (`compiled.as_text()`).
        mesh_shape: size of each mesh axis, the first one outermost.
    """
    computations = _computations(text)
    repeats = _repeats(computations)
    groups_by_axes = _groups(mesh_shape)
    totals: dict[tuple[str, tuple[str, ...], int], list[float]] = collections.defaultdict(lambda: [0, 0.0])
    seen: set[str] = set()
    for name, lines in computations.items():
        for line in lines:
            found = re.search(rf"= (.*?) ({'|'.join(COLLECTIVES)})(-start)?\(", line)
            if not found or not repeats[name]:
                continue
            # A collective that is spread over several fusions is written down in each of them.
            channel = re.search(r"channel_id=(\d+)", line)
            if channel and channel.group(1) in seen:
                continue
            seen |= {channel.group(1)} if channel else set()
            result, kind, started = found.groups()
            size = _largest_part(result) if started else _bytes_of(result)
            group = _first_group(line, math.prod(mesh_shape.values()))
            if len(group) < 2:
                continue
            if name.startswith("all-reduce-scatter"):  # how TPUs write it: each device keeps its slice of the sum
                kind, size = "reduce-scatter", size // len(group)
            axes = groups_by_axes.get(frozenset(group), ("?",))
            total = totals[kind, axes, len(group)]
            total[0] += repeats[name]
            total[1] += repeats[name] * _sent(kind, size, len(group))
    traffic = [Traffic(kind, axes, size, int(n), sent) for (kind, axes, size), (n, sent) in totals.items()]
    return sorted(traffic, key=lambda item: -item.bytes_sent)


def _sent(kind: str, size: int, group: int) -> float:
    """Bytes that a device sends in the best algorithm, by the size of what comes out (of the largest buffer)."""
    share = (group - 1) / group
    return {
        "all-gather": share * size,
        "all-reduce": 2 * share * size,
        "reduce-scatter": (group - 1.0) * size,
        "all-to-all": share * size,
        "collective-permute": float(size),
    }[kind]


def _computations(text: str) -> dict[str, list[str]]:
    """Lines of each computation; the entry's name is ENTRY."""
    found: dict[str, list[str]] = {}
    current: list[str] | None = None
    for line in text.splitlines():
        header = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if header:
            current = found.setdefault("ENTRY" if header.group(1) else header.group(2), [])
        elif line.startswith("}"):
            current = None
        elif current is not None:
            current.append(line)
    return found


def _repeats(computations: dict[str, list[str]]) -> dict[str, int]:
    """How often each computation runs in one run of the program; a loop of unknown length counts as one round."""
    repeats: dict[str, int] = collections.defaultdict(int)
    waiting = [("ENTRY", 1)]
    while waiting:
        name, times = waiting.pop()
        repeats[name] += times
        for line in computations.get(name, []):
            loop = re.search(r"condition=%?([\w.\-]+), body=%?([\w.\-]+)", line)
            if loop:
                waiting.append((loop.group(2), times * _trips(line, computations.get(loop.group(1), []))))
            for called in re.findall(r"(?:calls|to_apply|called_computations)=\{?%?([\w.\-]+)", line):
                if called in computations:
                    waiting.append((called, times))
            branches = re.search(r"branch_computations=\{([^}]*)\}", line)
            if branches:
                waiting += [(branch.strip().lstrip("%"), times) for branch in branches.group(1).split(",")]
    return repeats


def _trips(line: str, condition: list[str]) -> int:
    """Rounds of a loop: what the compiler notes, or else the number that its counter from 0 is compared with."""
    noted = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
    if noted:
        return int(noted.group(1))
    limits = [int(n) for text in condition for n in re.findall(r"s32\[\]\S* constant\((\d+)\)", text)]
    return max(limits, default=1)


def _array_bytes(result: str) -> list[int]:
    arrays = re.findall(r"(\w+)\[([\d,]*)\]", result)
    return [ITEM_BYTES.get(kind, 4) * math.prod(int(n) for n in dims.split(",") if n) for kind, dims in arrays]


def _bytes_of(result: str) -> int:
    return sum(_array_bytes(result))


def _largest_part(result: str) -> int:
    """Of a started collective, whose result holds its operand too, and small counters."""
    return max(_array_bytes(result), default=0)


def _first_group(line: str, num_devices: int) -> tuple[int, ...]:
    """The devices that the first group of a collective binds together."""
    pairs = re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", line)
    if pairs:
        return int(pairs.group(1)), int(pairs.group(2))
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
    if listed:
        return tuple(int(n) for n in listed.group(1).split(","))
    named = re.search(r"replica_groups=mesh\[([^\]]*)\].*? \{([^}]*)\}", line)
    if named:
        axes = dict(re.findall(r"'(\w+)'=(\d+)", named.group(1)))
        inside = [list(axes).index(name) for name in re.findall(r"'(\w+)'", named.group(2))]
        devices = _ordered(re.search(r"device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\)", line), num_devices)
        devices = devices.reshape([int(size) for size in axes.values()])
        outside = [i for i in range(len(axes)) if i not in inside]
        return tuple(devices.transpose(*outside, *inside).reshape(-1, _product(axes, inside))[0].tolist())
    compact = re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", line)
    if compact:
        shape = [int(n) for n in compact.group(1).split(",")]
        layout = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", compact.group(2))
        return tuple(_ordered(layout, num_devices).reshape(shape)[0].tolist())
    return tuple(range(num_devices))


def _ordered(layout: re.Match | None, num_devices: int) -> np.ndarray:
    """Devices in the order of a layout [sizes]T(axes), or of their numbers where there is none."""
    if layout is None:
        return np.arange(num_devices)
    sizes, order = ([int(n) for n in part.split(",")] if part else None for part in layout.groups())
    return np.arange(num_devices).reshape(sizes).transpose(order).ravel()


def _product(axes: dict[str, str], chosen: list[int]) -> int:
    return math.prod(int(list(axes.values())[i]) for i in chosen)


def _groups(mesh_shape: dict[str, int]) -> dict[frozenset[int], tuple[str, ...]]:
    """Names of the axes whose devices form a group, for every group of every set of axes."""
    devices = np.arange(math.prod(mesh_shape.values())).reshape(tuple(mesh_shape.values()))
    names = list(mesh_shape)
    found: dict[frozenset[int], tuple[str, ...]] = {}
    wide = [i for i, size in enumerate(mesh_shape.values()) if size > 1]
    for count in range(len(wide), 0, -1):
        for axes in itertools.combinations(wide, count):
            rest = [i for i in range(len(names)) if i not in axes]
            rows = devices.transpose(*rest, *axes).reshape(-1, math.prod(devices.shape[i] for i in axes))
            for row in rows.tolist():
                found[frozenset(row)] = tuple(names[i] for i in axes)
    # A permutation binds pairs along an axis.
    for i in wide:
        lines = np.moveaxis(devices, i, -1).reshape(-1, devices.shape[i])
        for line in lines.tolist():
            for pair in itertools.combinations(line, 2):
                found.setdefault(frozenset(pair), (names[i],))
    return found


@dataclasses.dataclass(frozen=True)
class StepBound:
    """Seconds that a step takes at least, by what bounds it; they may overlap, so the bound is the largest."""

    compute: float
    memory: float
    network: float

    @property
    def seconds(self) -> float:
        return max(self.compute, self.memory, self.network)

    @property
    def bound_by(self) -> str:
        return max(("compute", "memory", "network"), key=lambda name: getattr(self, name))


def step_bound(
    chip: Chip, num_devices: int, *, model_flops: float, bytes_touched: float, traffic: list[Traffic]
) -> StepBound:
    """At peak rates: the model's FLOPs over all chips, what a device must read and write, what it must send."""
    inside = sum(item.bytes_sent for item in traffic if item.group_size <= chip.island)
    outside = sum(item.bytes_sent for item in traffic if item.group_size > chip.island)
    network = inside / chip.network_rate + (outside / chip.outside_rate if outside else 0.0)
    return StepBound(model_flops / num_devices / chip.flops, bytes_touched / chip.memory_rate, network)
