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
from launch.compiled_text import array_bytes, bytes_of, computations_of, repeats_of

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes that one device sends for one kind of collective over one set of mesh axes, in one step; and how many of
    them in collectives that other work goes on beside: started ahead, or spread over fusions."""

    kind: str
    axes: tuple[str, ...]
    group_size: int
    count: int
    bytes_sent: float
    bytes_ahead: float = 0.0


def collective_traffic(text: str, mesh_shape: dict[str, int]) -> list[Traffic]:
    """All collectives of a compiled program, loops multiplied out, the largest traffic first.

    Args:
        text: of the optimised program (`compiled.as_text()`).
        mesh_shape: size of each mesh axis, the first one outermost.
    """
    computations = computations_of(text)
    repeats = repeats_of(computations, inside_fusions=True)
    waited_for = repeats_of(computations, inside_fusions=False)
    groups_by_axes = _groups(mesh_shape)
    totals: dict[tuple[str, tuple[str, ...], int], list[float]] = collections.defaultdict(lambda: [0, 0.0, 0.0])
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
            size = _largest_part(result) if started else bytes_of(result)
            group = _first_group(line, math.prod(mesh_shape.values()))
            if len(group) < 2:
                continue
            if name.startswith("all-reduce-scatter"):  # how TPUs write it: each device keeps its slice of the sum
                kind, size = "reduce-scatter", size // len(group)
            axes = groups_by_axes.get(frozenset(group), ("?",))
            total = totals[kind, axes, len(group)]
            total[0] += repeats[name]
            sent = repeats[name] * _sent(kind, size, len(group))
            total[1] += sent
            total[2] += 0.0 if waited_for[name] and not started else sent
    traffic = [Traffic(*key, int(count), sent, ahead) for key, (count, sent, ahead) in totals.items()]
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


def _largest_part(result: str) -> int:
    """Of a started collective, whose result holds its operand too, and small counters."""
    return max(array_bytes(result), default=0)


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
    network = sum(item.bytes_sent / network_rate(chip, item.group_size) for item in traffic)
    return StepBound(model_flops / num_devices / chip.flops, bytes_touched / chip.memory_rate, network)


def network_rate(chip: Chip, group_size: int) -> float:
    """Bytes a second that a device sends, one way, in a collective of so many."""
    return chip.network_rate if group_size <= chip.island else chip.outside_rate
