"""One line that says how far a loop is, how fast, and how long it still takes."""

import contextlib
import sys
import time
from collections.abc import Iterator

from tqdm import tqdm

from iar_jax.runtime import distributed

SECONDS_BETWEEN_LINES = 10.0
SECONDS_WORTH_A_LINE = 2.0


class Progress:
    """A bar on a terminal; elsewhere a plain line every ten seconds and at the end."""

    def __init__(self, name: str, total: int, first: int, unit: str):
        self.name, self.total, self.first, self.unit = name, total, first, unit
        self.done, self.start, self.note = first, time.monotonic(), ""
        self.printed, self.printed_done = self.start, -1
        self.bar = None
        self.silent = not distributed.is_first()
        if sys.stderr.isatty() and not self.silent:
            self.bar = tqdm(desc=name, total=total, initial=first, unit=f" {unit}", dynamic_ncols=True)

    def update(self, count: int = 1, note: str | None = None) -> None:
        """Counts finished items; `note` is shown at the end of the line until the next one."""
        self.done += count
        self.note = self.note if note is None else note
        if self.bar is not None:
            if note is not None:
                self.bar.set_postfix_str(note, refresh=False)
            self.bar.update(count)
        elif time.monotonic() - self.printed > SECONDS_BETWEEN_LINES:
            self.line()

    def line(self) -> None:
        if self.silent:
            return
        self.printed, self.printed_done = time.monotonic(), self.done
        rate = (self.done - self.first) / max(self.printed - self.start, 1e-9)
        left = (self.total - self.done) / rate if rate else 0.0
        print(
            f"{self.name}: {self.done}/{self.total} {self.unit}, {rate:.1f} a second, {left:.0f} s left"
            + (f", {self.note}" if self.note else ""),
            flush=True,
        )


@contextlib.contextmanager
def progress(name: str, total: int, unit: str, first: int = 0) -> Iterator[Progress]:
    """A `Progress` from item `first` on, closed at the end."""
    tracker = Progress(name, total, first, unit)
    try:
        yield tracker
    finally:
        if tracker.bar is not None:
            tracker.bar.close()
        elif tracker.done != tracker.printed_done and time.monotonic() - tracker.start > SECONDS_WORTH_A_LINE:
            tracker.line()


def say(message: str) -> None:
    """A line for the person at the terminal; of several processes the first one speaks."""
    if not distributed.is_first():
        return
    tqdm.write(message, file=sys.stdout)
    sys.stdout.flush()
