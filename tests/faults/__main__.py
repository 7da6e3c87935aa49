"""Tries every fault, on a disk and in a bucket on 127.0.0.1, and prints what came of it.

python -m tests.faults                                  all of them (about an hour on two cores)
python -m tests.faults --only=lock --jobs=1             those with a text in their titles
python -m tests.faults --list
python -m tests.faults --results=faults.jsonl           leaves a line for each, and goes on where a run before ended
"""

import argparse
import concurrent.futures
import json
import os
import pathlib
import shutil
import sys
import tempfile
import threading
import time
import traceback

from tests.bucket.server import serving
from tests.faults.catalogue import Fault, all_faults
from tests.faults.workdirs import OPTIONS, NotTried
from tests.stages import call

SLOWEST = 60.0


def attempt(fault: Fault, path: pathlib.Path) -> dict:
    """Tries one, in a directory of its own."""
    started = time.monotonic()
    path.mkdir(parents=True)
    row = {"fault": fault.title, "survived": False, "steps_again": 0, "examples_lost": 0, "said": ""}
    try:
        outcome = fault.run(path)
        row |= {"survived": outcome.same and not outcome.examples_lost, "verdict": "same in the end"}
        row |= {"steps_again": outcome.steps_again, "examples_lost": outcome.examples_lost, "said": outcome.said}
        if not row["survived"]:
            row["verdict"] = "DIFFERENT"
    except NotTried as reason:
        row |= {"verdict": f"not tried: {reason}"}
    except Exception:
        row |= {"verdict": "FAILED", "error": traceback.format_exc()[-3000:]}
    shutil.rmtree(path, ignore_errors=True)
    return row | {"seconds": round(time.monotonic() - started, 1)}


def tell(row: dict) -> None:
    line = f"{row['fault']:62}{row['verdict']:18}{row['steps_again']:4}{row['examples_lost']:4}{row['seconds']:6.0f} s"
    print(f"{line}   {row['said'][:160]}", flush=True)
    if "error" in row:
        print(row["error"], flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="a part of the faults' titles")
    parser.add_argument("--jobs", type=int, default=2, help="faults that are tried at once")
    parser.add_argument("--results", default="", help="file of a line for each fault")
    parser.add_argument("--list", action="store_true", help="titles alone")
    arguments = parser.parse_args()
    results = pathlib.Path(arguments.results) if arguments.results else None
    rows = [json.loads(line) for line in results.read_text().splitlines()] if results and results.exists() else []
    with tempfile.TemporaryDirectory() as name, serving() as bucket:
        path = pathlib.Path(name)
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(path / "compiled"))
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
        os.environ["IAR_JAX_CACHE"] = str(path / "cache")
        reference = path / "undisturbed"
        call("pipeline", reference, *OPTIONS)
        done = {row["fault"] for row in rows}
        faults = [f for f in all_faults(reference, bucket, path, arguments.seed) if arguments.only in f.title]
        if arguments.list:
            print(*(fault.title for fault in faults), sep="\n")
            return
        left = [fault for fault in faults if fault.title not in done]
        print(f"{len(faults)} faults, {len(left)} to try\n{'fault':62}{'outcome':18}again lost", flush=True)
        started, guard = time.monotonic(), threading.Lock()

        def attempted(number: int, fault: Fault) -> None:
            row = attempt(fault, path / f"fault-{number}")
            with guard:
                rows.append(row)
                tell(row)
                if results:
                    with results.open("a") as file:
                        file.write(json.dumps(row) + "\n")

        for alone in (False, True):
            with concurrent.futures.ThreadPoolExecutor(1 if alone else arguments.jobs) as pool:
                chosen = [(i, fault) for i, fault in enumerate(left) if fault.alone == alone]
                list(pool.map(lambda pair: attempted(*pair), chosen))
        tried = [row for row in rows if not row["verdict"].startswith("not tried")]
        survived = sum(row["survived"] for row in tried)
        lost, again = (sum(row[name] for row in tried) for name in ("examples_lost", "steps_again"))
        print(
            f"\n{len(tried)} faults tried, {survived} survived; {lost} examples lost, {again} steps run again; "
            f"{(time.monotonic() - started) / 60:.0f} minutes"
        )
        sys.exit(0 if survived == len(tried) else 1)


if __name__ == "__main__":
    main()
