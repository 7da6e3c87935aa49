"""If these fail, a run goes on after it was told to stop, or dies where it could have stopped in order."""

import signal

import pytest

from iar_jax.runtime.interruption import Interrupted, catch_stop_signals

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def looks_after(number):
    with catch_stop_signals() as stop:
        signal.raise_signal(number)
        stop.obey("stopped after step 3")


def looks_before(number):
    with catch_stop_signals() as stop:
        stop.obey("stopped after step 3")
        signal.raise_signal(number)


def fails_after(number):
    with catch_stop_signals():
        signal.raise_signal(number)
        raise ValueError("the cause")


@pytest.mark.parametrize("number", SIGNALS)
def test_a_loop_that_looks_stops_where_it_says(number):
    with pytest.raises(Interrupted, match="stopped after step 3; run the same command") as stopped:
        looks_after(number)
    assert stopped.value.signal_number == number


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_after_the_last_look_is_not_forgotten(number):
    with pytest.raises(Interrupted, match="run the same command") as stopped:
        looks_before(number)
    assert stopped.value.signal_number == number


def test_what_fails_is_not_hidden_by_a_signal():
    with pytest.raises(ValueError, match="the cause"):
        fails_after(signal.SIGTERM)


def test_without_a_signal_nothing_is_raised_and_handlers_are_those_from_before():
    before = [signal.getsignal(number) for number in SIGNALS]
    with catch_stop_signals() as stop:
        assert [signal.getsignal(number) for number in SIGNALS] != before
        stop.obey("stopped")
    assert [signal.getsignal(number) for number in SIGNALS] == before
