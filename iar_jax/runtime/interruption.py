"""Stopping a long loop between two steps when a signal asks for it."""

import contextlib
import signal
import sys
from collections.abc import Iterator
from typing import Any, NoReturn

from iar_jax.runtime import distributed


class Interrupted(Exception):
    """Raised after the state was saved; carries the signal that asked for it."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.signal_number = signal_number


class StopRequest:
    """Whether, and by which signal, a stop was asked for."""

    signal_number: int | None = None
    times_asked: int = 0

    def obey(self, what: str) -> None:
        """Raises Interrupted where a stop was asked for; `what` says where it stopped. Of several processes each calls
        it equally often, and all stop at the same call."""
        self.times_asked += 1
        signal_number = distributed.asked_to_stop(self.times_asked, self.signal_number)
        if signal_number is not None:
            raise Interrupted(f"{what}; run the same command to go on", signal_number)


def leave_at_once(number: int, _frame: Any) -> NoReturn:
    """A signal handler that ends the process, and says that what is finished is kept."""
    print("\nstopped at once; what was finished is kept, and the same command goes on", file=sys.stderr, flush=True)
    distributed.leave(128 + number)


@contextlib.contextmanager
def catch_stop_signals() -> Iterator[StopRequest]:
    """Turns the first SIGINT or SIGTERM into a request that the loop looks at; the second acts at once.

    With several processes SIGTERM is left to JAX, which tells all of them (`distributed.asked_to_stop`).

    Raises:
        Interrupted: at the end, where a stop was asked for and the loop did not look again.
    """
    request = StopRequest()
    before: dict[signal.Signals, Any] = {}

    def handle(number, _frame):
        request.signal_number = number
        for name in before:
            signal.signal(name, leave_at_once)

    for name in (signal.SIGINT,) if distributed.joined() else (signal.SIGINT, signal.SIGTERM):
        before[name] = signal.signal(name, handle)
    try:
        yield request
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)
    if request.signal_number is not None and not distributed.joined():
        raise Interrupted("stopped; run the same command to go on", request.signal_number)
