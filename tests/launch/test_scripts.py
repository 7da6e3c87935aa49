"""If these fail, a launch runs without its flags, or cannot be had without them."""

import subprocess
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "launch"


def with_flags(platform, **environment):
    """What a command finds in its environment under the flags of a platform."""
    command = f'source launch/xla_flags.sh {platform}; echo "$LIBTPU_INIT_ARGS|$XLA_FLAGS"'
    result = subprocess.run(
        ["bash", "-euc", command], cwd=LAUNCH.parent, env={"PATH": "/usr/bin:/bin", **environment},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return result.stdout.strip().split("|")


def test_each_flag_has_a_reason():
    for path in LAUNCH.glob("xla_flags_*.txt"):
        for line in path.read_text().splitlines():
            flag, _, reason = line.partition("#")
            assert reason.strip(), line
            assert not flag.strip() or flag.startswith("--xla_"), line


@pytest.mark.parametrize(("platform", "place"), [("tpu", 0), ("gpu", 1)])
def test_flags_come_before_the_user_s_own_which_win(platform, place):
    own = {"LIBTPU_INIT_ARGS": "--mine=1", "XLA_FLAGS": "--mine=1"}
    found = with_flags(platform, **own)
    assert found[place].startswith("--xla_")
    assert "#" not in found[place]
    assert found[place].endswith(" --mine=1")
    assert found[1 - place] == "--mine=1"


def test_they_can_be_turned_off():
    assert with_flags("tpu", IAR_JAX_XLA_FLAGS="off") == ["", ""]
