"""Loaded by the Python of a stage under test before anything else: kills it at a chosen rename.

Every file of the project becomes whole by a rename, Orbax's directories too. FAULT_RENAME is "NUMBER:before" or
"NUMBER:after": the process ends by SIGKILL just before, or just after, its rename of that number, counted from 0.
FAULT_COUNT names a file that gets the number of renames of an undisturbed run. The lock's own are not counted: their
number depends on time.
"""

import atexit
import os
import pathlib
import signal
import threading

target, _, moment = os.environ.get("FAULT_RENAME", "").partition(":")
counting = os.environ.get("FAULT_COUNT")
state = {"count": 0}
guard = threading.Lock()


def counted(rename):
    def replacement(source, destination, *arguments, **options):
        if os.path.basename(os.fspath(destination)).startswith("lock.json"):
            return rename(source, destination, *arguments, **options)
        with guard:
            number, state["count"] = state["count"], state["count"] + 1
        if target and number == int(target) and moment == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = rename(source, destination, *arguments, **options)
        if target and number == int(target):
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return replacement


if target or counting:
    os.rename, os.replace = counted(os.rename), counted(os.replace)
if counting:
    atexit.register(lambda: pathlib.Path(counting).write_text(str(state["count"])))
