"""Tries every fault and prints what came of it.

python -m tests.faults                  20 kills at random moments, and all other faults (about 15 minutes)
python -m tests.faults --kills=4 --only=lock
"""

import argparse
import os
import pathlib
import shutil
import sys
import tempfile
import time
import traceback

from tests.faults.faults import NotTried, all_faults, undisturbed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="a part of the faults' titles")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        path = pathlib.Path(name)
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(path / "compiled"))
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
        reference = undisturbed(path / "undisturbed")
        tried = survived = steps = lost = 0
        print(f"{'fault':58}{'outcome':24}{'steps again':>12}{'examples lost':>15}")
        for title, fault in all_faults(reference, path, arguments.kills, arguments.seed):
            if arguments.only not in title:
                continue
            started = time.monotonic()
            again = gone = 0
            try:
                same, again, gone = fault()
                verdict = "same in the end" if same else "DIFFERENT"
                tried, survived, steps, lost = tried + 1, survived + same, steps + again, lost + gone
            except NotTried as reason:
                verdict = f"not tried: {reason}"
            except Exception:
                traceback.print_exc()
                tried, verdict = tried + 1, "FAILED"
            seconds = time.monotonic() - started
            print(f"{title:58}{verdict:24}{again:12}{gone:15}   {seconds:4.0f} s", flush=True)
            for child in path.iterdir():
                if child not in (reference, path / "compiled"):
                    shutil.rmtree(child, ignore_errors=True)
        print(f"\n{tried} faults tried, {survived} survived; {lost} examples lost, {steps} steps run again")
        sys.exit(0 if survived == tried else 1)


if __name__ == "__main__":
    main()
