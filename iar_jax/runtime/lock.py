"""One run at a time in a directory: a lock file that its holder keeps alive.

The file names the holder and counts heartbeats. A holder on this machine that is gone is known at once; any other is
watched for as long as a live one takes to show a heartbeat, so that nothing depends on clocks that agree. Only plain
reads, writes and renames are needed, which every file system of `epath` has.
"""

import contextlib
import dataclasses
import datetime
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator

from etils import epath

from iar_jax.runtime import distributed
from iar_jax.runtime.errors import UserError
from iar_jax.runtime.progress import say

LOCK_FILE = "lock.json"

# A holder counts up this often; one that has not for so long is taken for dead. Shared file systems may show a write
# some seconds late.
HEARTBEAT_SECONDS = 5.0
DEAD_AFTER_SECONDS = 45.0
# Two that start at once both see no lock; the later write is the one that both find a moment after.
SETTLE_SECONDS = 0.2


@dataclasses.dataclass(frozen=True)
class Holder:
    """The content of a lock file.

    Attributes:
        token: random; tells whose file it is.
        host, process: for people; where process ids mean the same, `machine` is equal.
        machine: boot and process-id namespace.
        since: when the run began, UTC.
        heartbeats: counted up while the holder lives.
    """

    token: str
    host: str
    process: int
    machine: str
    since: str
    heartbeats: int = 0

    def __str__(self) -> str:
        return f"process {self.process} on {self.host}, since {self.since}"


@contextlib.contextmanager
def hold(directory: epath.Path) -> Iterator[None]:
    """Keeps every other run out of a directory, which is made where it is not there. Of several processes the first
    one holds the lock for all.

    Raises:
        UserError: another run is in it; named.
    """
    problem = ""
    keeper = None
    if distributed.is_first():
        try:
            keeper = Keeper(directory)
        except UserError as error:
            problem = str(error)
    if distributed.any_process(bool(problem)):
        raise UserError(problem or f"{directory} is in use, says the first process of this run")
    try:
        yield
    finally:
        if keeper is not None:
            keeper.release()


class Keeper:
    """Takes the lock and keeps its heartbeat in a thread until released."""

    def __init__(self, directory: epath.Path):
        self.path = directory / LOCK_FILE
        directory.mkdir(parents=True, exist_ok=True)
        since = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        self.holder = Holder(secrets.token_hex(8), socket.gethostname(), os.getpid(), machine(), since)
        other = read(self.path)
        if other is not None:
            self._outlive(other)
        self._write()
        time.sleep(SETTLE_SECONDS)
        self._check_ours()
        self.released = threading.Event()
        self.thread = threading.Thread(target=self._beat, name="lock heartbeat", daemon=True)
        self.thread.start()

    def _outlive(self, other: Holder) -> None:
        """Returns once the other holder is known to be dead."""
        if gone(other):
            say(f"{self.path}: its holder ({other}) is gone; taking over")
            return
        say(f"{self.path}: waiting for a sign of life of {other}")
        watched_since = time.monotonic()
        while time.monotonic() - watched_since < DEAD_AFTER_SECONDS:
            time.sleep(HEARTBEAT_SECONDS / 5)
            seen = read(self.path)
            if seen is None:
                return
            if seen != other:
                raise UserError(in_use(self.path, seen))
        say(f"{self.path}: no heartbeat of {other} for {DEAD_AFTER_SECONDS:.0f} s; taking over")

    def _beat(self) -> None:
        while not self.released.wait(HEARTBEAT_SECONDS):
            try:
                self._check_ours()
                self.holder = dataclasses.replace(self.holder, heartbeats=self.holder.heartbeats + 1)
                self._write()
            except UserError as error:
                # Another run writes here now; this one must not write a byte more.
                print(f"\n{error}", file=sys.stderr, flush=True)
                distributed.leave(2)
            except OSError:
                continue  # a full disk or a lost mount: the run itself will say so

    def _check_ours(self) -> None:
        seen = read(self.path)
        if seen is not None and seen.token != self.holder.token:
            raise UserError(in_use(self.path, seen))

    def _write(self) -> None:
        partial = self.path.parent / f"{LOCK_FILE}.{self.holder.token}.partial"
        partial.write_text(json.dumps(dataclasses.asdict(self.holder)) + "\n")
        partial.replace(self.path)

    def release(self) -> None:
        self.released.set()
        self.thread.join()
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)


def in_use(path: epath.Path, holder: Holder) -> str:
    return (
        f"{path.parent} is in use by {holder}. Wait for it, stop it, or use another --workdir. If that run is surely "
        f"dead, its lock is taken over {DEAD_AFTER_SECONDS:.0f} seconds after its last heartbeat"
    )


def read(path: epath.Path) -> Holder | None:
    """Who holds a lock; None where there is none. A file that is not a lock counts as none."""
    try:
        return Holder(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def machine() -> str:
    """What is the same for two processes whose ids mean the same; unique where the system does not tell."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return secrets.token_hex(8)


def gone(holder: Holder) -> bool:
    """Whether a holder is known not to run any more; False where that cannot be known."""
    if holder.machine != machine():
        return False
    if holder.process == os.getpid():
        return True  # an id used again
    try:
        os.kill(holder.process, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False
