"""If these fail, two runs write into one directory, or a dead one keeps it for ever."""

import dataclasses
import json
import os
import subprocess
import sys
import threading

import pytest
from etils import epath

from iar_jax.runtime import lock
from iar_jax.runtime.errors import UserError


@pytest.fixture
def directory(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "HEARTBEAT_SECONDS", 0.1)
    monkeypatch.setattr(lock, "DEAD_AFTER_SECONDS", 1.0)
    return epath.Path(tmp_path) / "train"


def leave_lock(directory, **fields):
    holder = lock.Holder("token", "elsewhere", 1, "another machine", "2026-01-01 00:00:00 UTC", 3)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / lock.LOCK_FILE).write_text(json.dumps(dataclasses.asdict(dataclasses.replace(holder, **fields))))


def test_a_second_run_is_refused_with_the_name_of_the_first_and_the_lock_is_gone_after(directory):
    with lock.hold(directory):
        own = os.getpid()
        with pytest.MonkeyPatch.context() as patch:
            # As another process of this machine: its id is another one.
            patch.setattr(lock.os, "getpid", lambda: 1)
            with pytest.raises(UserError, match=f"is in use by process {own} on .*, since 2.* UTC"):
                lock.Keeper(directory)
        assert (directory / lock.LOCK_FILE).exists()
    assert not (directory / lock.LOCK_FILE).exists()
    assert not list(directory.iterdir())


def test_a_holder_elsewhere_without_a_heartbeat_is_taken_over_and_that_is_said(directory, capsys):
    leave_lock(directory)
    with lock.hold(directory):
        assert lock.read(directory / lock.LOCK_FILE).process == os.getpid()
    assert "no heartbeat of process 1 on elsewhere" in capsys.readouterr().out


def test_a_holder_elsewhere_with_a_heartbeat_is_left_alone(directory):
    leave_lock(directory)
    beat = threading.Timer(0.3, lambda: leave_lock(directory, heartbeats=4))
    beat.start()
    with pytest.raises(UserError, match="is in use by process 1 on elsewhere"), lock.hold(directory):
        pass
    beat.join()
    assert lock.read(directory / lock.LOCK_FILE).heartbeats == 4


def test_a_dead_process_of_this_machine_is_known_at_once(directory, capsys, monkeypatch):
    monkeypatch.setattr(lock, "DEAD_AFTER_SECONDS", 3600.0)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    leave_lock(directory, machine=lock.machine(), process=dead.pid)
    with lock.hold(directory):
        pass
    assert "is gone; taking over" in capsys.readouterr().out


@pytest.mark.parametrize("content", ["", "{", "[]", '{"token": 1}', '{"another": 1}'])
def test_a_file_that_is_no_lock_does_not_keep_anyone_out(directory, content):
    directory.mkdir(parents=True)
    (directory / lock.LOCK_FILE).write_text(content)
    with lock.hold(directory):
        pass


def test_the_later_of_two_that_start_at_once_wins(directory, monkeypatch):
    # The other one's write comes between this one's write and its second look.
    monkeypatch.setattr(lock.time, "sleep", lambda _: leave_lock(directory, token="the other"))
    with pytest.raises(UserError, match="is in use by process 1 on elsewhere"), lock.hold(directory):
        pass


@pytest.mark.parametrize("made_again", [False, True])
def test_a_run_whose_directory_is_gone_is_told_in_the_place_of_what_failed(directory, made_again):
    def run():
        with lock.hold(directory) as check:
            directory.rmtree()
            if made_again:  # by the run itself, as a second tree
                directory.mkdir()
            with pytest.raises(UserError, match="was moved or removed while this run was in it"):
                check()
            raise FileNotFoundError("some file of it")

    # The heartbeat, which would end this process, waits.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lock, "HEARTBEAT_SECONDS", 60.0)
        patch.setattr(lock, "LOOK_SECONDS", 60.0)
        with pytest.raises(UserError, match="its new place as --workdir"):
            run()


def test_a_run_whose_directory_is_moved_ends_within_a_second(tmp_path):
    program = (
        "import sys, time; from etils import epath; from iar_jax.runtime import lock\n"
        "with lock.hold(epath.Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(30)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "run")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "held\n"
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    _, said = process.communicate(timeout=10)
    assert process.returncode == 2
    assert "was moved or removed" in said
    assert not (tmp_path / "run").exists()
