"""If these fail, an odd file ends in a stack trace, a hang, a crash, or a program that is started; or none is told.

Some files of each format; `python -m tests.fuzz` reads 70,000.
"""

import os
import subprocess
import sys
import time

import pytest

from tests.fuzz import workers
from tests.fuzz.changes import changed
from tests.fuzz.formats import FORMATS, Format
from tests.stages import ROOT


@pytest.mark.slow
def test_odd_files_are_read_or_refused_by_name():
    command = [sys.executable, "-m", "tests.fuzz", "--share=0.05", "--seed=1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3,500 files, 0 defects" in done.stdout


def test_the_same_seed_makes_the_same_files():
    for name in ("png", "npz", "pb"):
        sound = FORMATS[name].sound()
        assert workers.odd_file(name, 3, 5, sound) == workers.odd_file(name, 3, 5, sound)
        assert workers.odd_file(name, 3, 5, sound) != workers.odd_file(name, 4, 5, sound)


def misread(path):
    """Fails in every way, by what the file says."""
    what = path.read_bytes()
    if what == b"raise":
        raise KeyError("of no kind that is known")
    if what == b"end":
        os._exit(11)
    if what == b"start":
        os.system("true")
    if what == b"wait":
        time.sleep(1.0)
    return []


def misreading(name, *arguments):
    """A process that reads files of a format of its own, of which the one with index 1 says what goes wrong."""
    FORMATS[name] = Format(3, ".bin", lambda: [b"sound"], changed, misread)
    workers.odd_file = lambda name, seed, index, sound: name.encode() if index == 1 else b"sound"
    workers.HANG_SECONDS = 0.5
    workers.read_all(name, *arguments)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("raise", "KeyError: 'of no kind"),
        ("end", "ended the process (11)"),
        ("start", "started a program (os.system)"),
        ("wait", "took 1."),
    ],
)
def test_what_goes_wrong_is_told(name, said):
    found = workers.survey(name, 0, range(3), misreading)
    assert [index for index, _ in found.problems] == [1]
    assert said in found.problems[0][1]
    assert found.read + found.refused + (name in ("raise", "end")) == 3
