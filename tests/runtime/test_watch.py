"""If these fail, the processes of a run wait for ever for one that is gone, or name another."""

import threading
import time
import types

import pytest

from iar_jax.runtime import watch
from iar_jax.runtime.watch import Watch


class Store:
    """What JAX's coordinator keeps for all processes; it may stop to answer."""

    def __init__(self):
        self.values, self.answers = {}, True

    def key_value_set(self, key, value, allow_overwrite=False):
        self.asked()
        assert allow_overwrite
        self.values[key] = value

    def key_value_dir_get(self, key):
        self.asked()
        return [(name, value) for name, value in self.values.items() if name.startswith(key + "/")]

    def asked(self):
        if not self.answers:
            raise RuntimeError("UNAVAILABLE: Socket closed")


class Beating(Store):
    """Each answer has a new sign of life of the first process: the last one is never older than the last answer,
    however busy the machine."""

    def key_value_dir_get(self, key):
        self.asked()
        beats = int(self.values.get("iar_jax/alive/0", "0 first-host").split()[0])
        self.values["iar_jax/alive/0"] = f"{beats + 1} first-host"
        return super().key_value_dir_get(key)


@pytest.fixture
def end(monkeypatch, capsys):
    """Waits until a watch ends its process, and gives what it says."""
    ended, over = threading.Event(), threading.Event()

    def sleep(seconds):
        time.sleep(seconds)
        if over.is_set():  # the threads of a watch live as long as their process, which here is that of all tests
            raise SystemExit

    def leave(code):
        assert code == 1
        ended.set()
        raise SystemExit

    monkeypatch.setattr(watch, "os", types.SimpleNamespace(_exit=leave))
    monkeypatch.setattr(watch, "time", types.SimpleNamespace(sleep=sleep, monotonic=time.monotonic))
    monkeypatch.setattr(watch, "SECONDS_BETWEEN", 0.05)
    monkeypatch.setattr(watch, "SILENT_SECONDS", 0.6)
    monkeypatch.setattr(watch, "SECONDS_FOR_OWN_WORDS", 0.0)
    monkeypatch.setattr(watch, "SECONDS_TO_LOOK", 0.05)
    # The handler of aborts is the process' own.
    monkeypatch.setattr(Watch, "_explain_aborts", lambda self: None)
    monkeypatch.setattr(threading, "excepthook", lambda arguments: None)

    def wait():
        assert ended.wait(10)
        time.sleep(0.1)
        return capsys.readouterr().err

    yield wait
    over.set()
    time.sleep(0.3)


def peer(store, index, beats, host="elsewhere"):
    """Another process that shows so many signs of life."""

    def live():
        for number in range(beats):
            store.values[f"iar_jax/alive/{index}"] = f"{number} {host}"
            time.sleep(0.05)

    threading.Thread(target=live, daemon=True).start()


def test_a_process_that_falls_silent_is_named_with_its_host_and_for_how_long(end):
    store = Store()
    peer(store, 1, 10_000, "sound")
    peer(store, 2, 5, "host-of-2")
    Watch(store, 0, 3)
    said = end()
    assert "process 0 of 3 stops: process 2 of 3 (host-of-2) has not been heard of for" in said
    assert "run the same command on all hosts to go on" in said


def test_a_coordinator_that_does_not_answer_is_named(end):
    store = Beating()
    Watch(store, 1, 2)
    time.sleep(0.3)
    store.answers = False
    assert "process 0 of 2 (first-host), at which all meet, has not answered for" in end()


def test_the_last_words_of_a_process_are_passed_on(end):
    store = Store()
    peer(store, 0, 10_000, "first-host")
    Watch(store, 1, 2)
    time.sleep(0.2)
    store.values["iar_jax/ended/0"] = "no space left on the disk"
    assert "process 1 of 2 stops: process 0 of 2 (first-host) has ended: no space left on the disk" in end()


def test_processes_that_live_let_each_other_be(end):
    store = Store()
    watches = [Watch(store, index, 2) for index in range(2)]
    time.sleep(1.5)
    assert [found.missing() for found in watches] == ["", ""]
