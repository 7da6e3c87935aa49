"""Reading a compiled program's text (`compiled.as_text()`)."""

import collections
import math
import re

ITEM_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "f64": 8}


def computations_of(text: str) -> dict[str, list[str]]:
    """Lines of each computation; the entry's name is ENTRY."""
    found: dict[str, list[str]] = {}
    current: list[str] | None = None
    for line in text.splitlines():
        header = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if header:
            current = found.setdefault("ENTRY" if header.group(1) else header.group(2), [])
        elif line.startswith("}") and not line.startswith("}}"):
            current = None
        elif current is not None and re.match(r"\s+(ROOT )?%?[\w.\-]+ = ", line):
            current.append(line)
        elif current:  # attributes of kernels hold line breaks
            current[-1] += line
    return found


def repeats_of(computations: dict[str, list[str]], *, inside_fusions: bool) -> dict[str, int]:
    """How often each computation runs in one run of the program; a loop of unknown length counts as one round.

    With `inside_fusions` also those that a single instruction stands for.
    """
    repeats: dict[str, int] = collections.defaultdict(int)
    waiting = [("ENTRY", 1)]
    while waiting:
        name, times = waiting.pop()
        repeats[name] += times
        for line in computations.get(name, []):
            loop = re.search(r"condition=%?([\w.\-]+), body=%?([\w.\-]+)", line)
            if loop:
                waiting.append((loop.group(2), times * trips_of(line, computations.get(loop.group(1), []))))
            for called in re.findall(r"(?:calls|to_apply|called_computations)=\{?%?([\w.\-]+)", line):
                if called in computations and (inside_fusions or re.search(r" (call|async-start)\(", line)):
                    waiting.append((called, times))
            branches = re.search(r"branch_computations=\{([^}]*)\}", line)
            if branches:
                waiting += [(branch.strip().lstrip("%"), times) for branch in branches.group(1).split(",")]
    return repeats


def trips_of(line: str, condition: list[str]) -> int:
    """Rounds of a loop: what the compiler notes, or else the number that its counter from 0 is compared with."""
    noted = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
    if noted:
        return int(noted.group(1))
    limits = [int(n) for text in condition for n in re.findall(r"[su]32\[\]\S* constant\((\d+)\)", text)]
    return max(limits, default=1)


def array_bytes(result: str, row: int = 1) -> list[int]:
    """Of each array in a text; with `row`, where its last axis is padded to multiples of so many."""
    sizes = []
    for kind, dims in re.findall(r"(\w+)\[([\d,]*)\]", result):
        shape = [int(n) for n in dims.split(",") if n]
        padded = [*shape[:-1], -(-shape[-1] // row) * row] if shape else []
        sizes.append(ITEM_BYTES.get(kind, 4) * math.prod(padded))
    return sizes


def bytes_of(result: str, row: int = 1) -> int:
    return sum(array_bytes(result, row))
