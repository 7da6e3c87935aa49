"""Odd files of every format that is read, by the program's own readers.

    python -m tests.fuzz
    python -m tests.fuzz --only=png,pt --share=0.1 --seed=7
    python -m tests.fuzz --only=pt --keep=DIR

70,000 files and about ten minutes on two cores. Each must be read or refused by name: a stack trace, more than 5 s, a
process that ends or grows beyond 2 GB, and a program that is started are defects, and the exit code is 1. With --keep
the files that led to one are written to a directory.
"""

import argparse
import concurrent.futures
import os
import sys
import time
from pathlib import Path

from tests.fuzz.formats import FORMATS
from tests.fuzz.workers import Outcome, odd_file, survey

# Files that a process reads: few enough that a crash costs little.
CHUNK = 2500


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.split("\n")[0])
    parser.add_argument("--only", default=",".join(FORMATS), help="formats, separated by commas")
    parser.add_argument("--share", type=float, default=1.0, help="of the files of a whole run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--keep", type=Path, help="directory for the files that led to a defect")
    options = parser.parse_args()
    names = options.only.split(",")
    unknown = set(names) - set(FORMATS)
    if unknown:
        parser.error(f"{', '.join(sorted(unknown))}: no such format; there are {', '.join(FORMATS)}")
    start, outcomes = time.monotonic(), {name: Outcome() for name in names}
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        work = {}
        for name in names:
            count = max(1, round(FORMATS[name].count * options.share))
            for first in range(0, count, CHUNK):
                part = range(first, min(first + CHUNK, count))
                work[pool.submit(survey, name, options.seed, part)] = name
        for done in concurrent.futures.as_completed(work):
            outcomes[work[done]].add(done.result())
    print(f"{'format':14}{'read':>8}{'refused':>9}{'defects':>9}{'slowest':>9}{'memory':>9}")
    for name, found in outcomes.items():
        print(
            f"{name:14}{found.read:8,}{found.refused:9,}{len(found.problems):9}{found.slowest:7.2f} s"
            f"{found.peak / 1e6:6.0f} MB"
        )
    defects = [(name, index, what) for name, found in outcomes.items() for index, what in found.problems]
    for name, index, what in defects:
        print(f"DEFECT {name} {index}: {what}")
        if options.keep:
            options.keep.mkdir(parents=True, exist_ok=True)
            content = odd_file(name, options.seed, index, FORMATS[name].sound())
            (options.keep / f"{name}-{index}{FORMATS[name].suffix}").write_bytes(content)
    files = sum(found.read + found.refused for found in outcomes.values())
    print(f"{files:,} files, {len(defects)} defects, {time.monotonic() - start:.0f} s, seed {options.seed}")
    return 1 if defects else 0


if __name__ == "__main__":
    sys.exit(main())
