"""If these fail, a slice that is there is deleted, or a preempted run is not made again."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "launch" / "tpu_pod.sh"

# A stand-in for gcloud: notes each call, and answers `describe`, `create` and `ssh` by the next line of a file of
# answers: a state, or what an error says.
GCLOUD = r"""#!/bin/bash
echo "$*" >>"$CALLS"
case "$*" in
*" describe "*) kind=describe ;;
*" create "*) kind=create ;;
*" ssh "*"iar_jax.train"*) kind=ssh ;;
*) exit 0 ;;
esac
answer=$(head -n 1 "$ANSWERS/$kind")
[ "$(wc -l <"$ANSWERS/$kind")" -le 1 ] || sed -i 1d "$ANSWERS/$kind"
case "$answer" in
ERROR*) echo "$answer" >&2; exit 1 ;;
*) [ "$kind" = create ] || echo "$answer" ;;
esac
"""


@pytest.fixture
def pod(tmp_path):
    """Runs the script with answers of a stand-in gcloud: (exit code, its calls, what it said)."""

    def run(*arguments, describe=("READY",), create=("made",), ssh=("ran",), **environment):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / "gcloud").write_text(GCLOUD)
        (tmp_path / "bin" / "gcloud").chmod(0o755)
        for kind, lines in {"describe": describe, "create": create, "ssh": ssh}.items():
            (tmp_path / kind).write_text("\n".join(lines) + "\n")
        calls = tmp_path / "calls"
        calls.write_text("")
        done = subprocess.run(
            ["bash", str(SCRIPT), *arguments],
            env={
                **os.environ,
                "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
                "CALLS": str(calls),
                "ANSWERS": str(tmp_path),
                "PAUSE": "0",
                **environment,
            },
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        return done.returncode, calls.read_text().splitlines(), done.stdout + done.stderr

    return run


KEEP = ("keep", "slice", "zone", "v5litepod-16", "python", "-m", "iar_jax.train")
NO_ANSWER = "ERROR: (gcloud) Could not reach the server: connection reset"
NOT_FOUND = "ERROR: (gcloud) NOT_FOUND: Requested entity was not found."
NO_CAPACITY = "ERROR: (gcloud) code 8: There is no more capacity in the zone"


def of(calls, word):
    return [call for call in calls if f" {word} " in call]


def test_a_slice_that_is_ready_is_used_and_its_failed_run_not_repeated(pod):
    code, calls, _ = pod(*KEEP, ssh=("ERROR: it ended",))
    assert code == 1
    assert len(of(calls, "ssh")) == 1
    assert not of(calls, "delete")
    assert not of(calls, "create")


def test_while_gcloud_does_not_answer_nothing_is_deleted(pod):
    code, calls, said = pod(*KEEP, describe=(NO_ANSWER, NO_ANSWER, "READY"))
    assert code == 0
    assert not of(calls, "delete")
    assert not of(calls, "create")
    assert "whether slice is there is not known" in said


def test_after_a_preemption_the_slice_is_made_again(pod):
    states = ("READY", NO_ANSWER, "PREEMPTED", "READY")
    code, calls, _ = pod(*KEEP, describe=states, ssh=("ERROR: connection closed", "ran"))
    assert code == 0
    assert len(of(calls, "delete")) == len(of(calls, "create")) == 1
    assert calls.index(of(calls, "delete")[0]) < calls.index(of(calls, "create")[0])
    assert len([call for call in of(calls, "ssh") if "iar_jax.train" in call]) == 2


def test_a_slice_that_is_not_there_is_made_without_deleting(pod):
    code, calls, _ = pod(*KEEP, describe=(NOT_FOUND, "READY"))
    assert code == 0
    assert not of(calls, "delete")
    assert len(of(calls, "create")) == 1


def test_without_capacity_creation_is_tried_again(pod):
    code, calls, said = pod("create", "slice", "zone", "v5litepod-16", create=(NO_CAPACITY, NO_CAPACITY, "made"))
    assert code == 0
    assert len(of(calls, "create")) == 3
    assert "trying again in 0 s" in said


def test_what_no_patience_helps_against_ends_it(pod):
    code, calls, said = pod("create", "slice", "zone", "v9", create=("ERROR: INVALID_ARGUMENT: no such type",))
    assert code == 1
    assert len(of(calls, "create")) == 1
    assert "no such type" in said


def test_a_queued_resource_is_waited_for(pod):
    states = ("WAITING_FOR_RESOURCES", "state=PROVISIONING;", NO_ANSWER, "ACTIVE")
    code, calls, _ = pod("create", "slice", "zone", "v5litepod-16", describe=states, QUEUED="1", SPOT="1")
    assert code == 0
    assert "queued-resources create slice --node-id=slice" in of(calls, "create")[0]
    assert "--spot" in of(calls, "create")[0]
    assert len(of(calls, "describe")) == 4


def test_a_queued_resource_that_fails_is_told(pod):
    code, _, said = pod("create", "slice", "zone", "v5litepod-16", describe=("FAILED",), QUEUED="1")
    assert code == 1
    assert "the queued resource slice is FAILED" in said


def test_a_dry_run_asks_nobody(pod):
    code, calls, said = pod(*KEEP, DRY_RUN="1")
    assert code == 0
    assert calls == []
    assert said.count("gcloud") >= 4
