"""One run at a time in a directory: a lock file that its holder keeps alive.

The file names the holder and counts heartbeats. A holder on this machine that is gone is known at once; any other is
watched for as long as a live one takes to show a heartbeat, so that nothing depends on clocks that agree. On a disk
only plain reads, writes and renames are needed, which every file system has; in a bucket each write holds under the
condition that the object is the one that was seen, so that of two that start at once one is told.
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
from collections.abc import Callable, Iterator
from typing import Protocol

from etils import epath

from iar_jax.runtime import bucket, distributed
from iar_jax.runtime.errors import UserError
from iar_jax.runtime.files import in_bucket
from iar_jax.runtime.progress import say

LOCK_FILE = "lock.json"

# A holder counts up this often; one that has not for so long is taken for dead. Shared file systems may show a write
# some seconds late.
HEARTBEAT_SECONDS = 5.0
DEAD_AFTER_SECONDS = 45.0
# A holder that cannot write to its bucket for so long stops: others will take it for dead.
SILENT_AT_MOST_SECONDS = 35.0
# So often a holder looks whether its directory is still where it was.
LOOK_SECONDS = 1.0
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


class InUse(UserError):
    """Another run is in a directory."""


@contextlib.contextmanager
def hold(directory: epath.Path) -> Iterator[Callable[[], None]]:
    """Keeps every other run out of a directory, which is made where it is not there. Of several processes the first
    one holds the lock for all. A run whose directory is moved or removed ends at once.

    Yields:
        What raises UserError where the directory is gone: to ask before much is written.

    Raises:
        InUse: another run is in it, named.
        UserError: it cannot be written; or, in place of what the block raises, the directory is gone.
    """
    problem: UserError | None = None
    keeper = None
    if distributed.is_first():
        try:
            keeper = Keeper(directory)
        except UserError as error:
            problem = error
    if distributed.any_process(problem is not None):
        raise problem or InUse(f"{directory} is in use, says the first process of this run")
    try:
        yield keeper.check_place if keeper else lambda: None
    except Exception as error:
        if keeper is not None:
            # What removes a tree begins with the files in it.
            for _ in range(20 if isinstance(error, FileNotFoundError) else 1):
                try:
                    keeper.check_place()
                except UserError as gone_away:
                    raise gone_away from error
                time.sleep(LOOK_SECONDS / 10)
        raise
    finally:
        if keeper is not None:
            keeper.release()


class Place(Protocol):
    """Where a lock lies. `write` may be refused since another run has written there."""

    def read(self) -> Holder | None: ...

    def write(self, holder: Holder) -> bool: ...

    def remove(self) -> None: ...

    def there(self) -> bool:
        """Whether the directory is the one that it was."""

    def close(self) -> None: ...


class OnDisk:
    """A lock on a file system."""

    def __init__(self, directory: epath.Path):
        self.path = directory / LOCK_FILE
        directory.mkdir(parents=True, exist_ok=True)
        # Open, so that no other directory gets its number while this one is held.
        self.descriptor = os.open(directory, os.O_RDONLY)

    def read(self) -> Holder | None:
        return read(self.path)

    def write(self, holder: Holder) -> bool:
        partial = self.path.parent / f"{LOCK_FILE}.{holder.token}.partial"
        partial.write_text(json.dumps(dataclasses.asdict(holder)) + "\n")
        partial.replace(self.path)
        return True

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)

    def there(self) -> bool:
        try:
            return os.path.samestat(os.stat(self.path.parent), os.fstat(self.descriptor))
        except FileNotFoundError:
            return False

    def close(self) -> None:
        os.close(self.descriptor)


class InBucket:
    """A lock in a bucket; `generation` is the version that this process saw last."""

    def __init__(self, directory: epath.Path):
        self.path = directory / LOCK_FILE
        self.generation = 0
        self.written = False

    def read(self) -> Holder | None:
        content, self.generation = bucket.read(self.path)
        return parsed(content)

    def write(self, holder: Holder) -> bool:
        content = (json.dumps(dataclasses.asdict(holder)) + "\n").encode()
        generation = bucket.write(self.path, content, self.generation)
        if generation is None:
            # An upload whose answer was lost is there all the same.
            seen = self.read()
            if seen is None or seen.token != holder.token:
                return False
            generation = bucket.write(self.path, content, self.generation)
        if generation is not None:
            self.generation, self.written = generation, True
        return generation is not None

    def remove(self) -> None:
        bucket.remove(self.path, self.generation)

    def there(self) -> bool:
        return not self.written or bucket.read(self.path).generation != 0

    def close(self) -> None:
        pass


class Keeper:
    """Takes the lock and keeps its heartbeat in a thread until released."""

    def __init__(self, directory: epath.Path):
        self.directory = directory
        self.place: Place = InBucket(directory) if in_bucket(directory) else OnDisk(directory)
        since = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        self.holder = Holder(secrets.token_hex(8), socket.gethostname(), os.getpid(), machine(), since)
        try:
            self._take()
        except BaseException:
            self.place.close()
            raise
        self.released = threading.Event()
        self.thread = threading.Thread(target=self._beat, name="lock heartbeat", daemon=True)
        self.thread.start()

    def _take(self) -> None:
        if not in_bucket(self.directory):
            self._take_once()
            time.sleep(SETTLE_SECONDS)
            self._check_ours()
            return
        since, taken = time.monotonic(), False
        while not taken:
            try:
                self._take_once()
                taken = True
            except OSError as error:
                if time.monotonic() - since > SILENT_AT_MOST_SECONDS:
                    path = self.directory / LOCK_FILE
                    raise UserError(f"{path} cannot be written ({error}); run the same command again") from error
                time.sleep(HEARTBEAT_SECONDS / 5)

    def _take_once(self) -> None:
        other = self.place.read()
        if other is not None and other.token != self.holder.token:
            self._outlive(other)
        if not self.place.write(self.holder):
            raise InUse(in_use(self.directory / LOCK_FILE, self.place.read()))

    def _outlive(self, other: Holder) -> None:
        """Returns once the other holder is known to be dead."""
        path = self.directory / LOCK_FILE
        if gone(other):
            say(f"{path}: its holder ({other}) is gone; taking over")
            return
        say(f"{path}: waiting for a sign of life of {other}")
        watched_since = time.monotonic()
        while time.monotonic() - watched_since < DEAD_AFTER_SECONDS:
            time.sleep(HEARTBEAT_SECONDS / 5)
            seen = self.place.read()
            if seen is None:
                return
            if seen != other:
                raise InUse(in_use(path, seen))
        say(f"{path}: no heartbeat of {other} for {DEAD_AFTER_SECONDS:.0f} s; taking over")

    def _beat(self) -> None:
        beaten = heard = time.monotonic()
        pause = HEARTBEAT_SECONDS if in_bucket(self.directory) else min(LOOK_SECONDS, HEARTBEAT_SECONDS)
        while not self.released.wait(pause):
            try:
                if not in_bucket(self.directory):
                    self.check_place()
                if time.monotonic() - beaten < HEARTBEAT_SECONDS - pause / 2:
                    continue
                self._check_ours()
                self.holder = dataclasses.replace(self.holder, heartbeats=self.holder.heartbeats + 1)
                if not self.place.write(self.holder):
                    raise UserError(in_use(self.directory / LOCK_FILE, self.place.read()))
                beaten = heard = time.monotonic()
            except UserError as error:
                # Another run writes here now, or nobody can; this one must not write a byte more.
                self._leave(str(error))
            except OSError as error:
                # A full disk or a lost mount: the run itself will say so. Not so in a bucket, which others can reach.
                if in_bucket(self.directory) and time.monotonic() - heard > SILENT_AT_MOST_SECONDS:
                    self._leave(
                        f"{self.directory} has not answered for {time.monotonic() - heard:.0f} s ({error}). What was "
                        "finished is whole; run the same command to go on"
                    )

    def _leave(self, message: str) -> None:
        if not self.released.is_set():
            print(f"\n{message}", file=sys.stderr, flush=True)
            distributed.leave(2)

    def check_place(self) -> None:
        """Raises UserError where the directory is not the one that the lock was taken in."""
        with contextlib.suppress(PermissionError):
            if not self.place.there():
                raise UserError(moved(self.directory))

    def _check_ours(self) -> None:
        seen = self.place.read()
        if seen is not None and seen.token != self.holder.token:
            raise InUse(in_use(self.directory / LOCK_FILE, seen))
        if seen is None and in_bucket(self.directory):
            raise UserError(moved(self.directory))

    def release(self) -> None:
        self.released.set()
        self.thread.join()
        with contextlib.suppress(OSError, UserError):
            if self.place.there():
                self.place.remove()
        self.place.close()


def moved(directory: epath.Path) -> str:
    return (
        f"{directory} was moved or removed while this run was in it, and the run has stopped. Where it was moved, give "
        "its new place as --workdir to go on"
    )


def in_use(path: epath.Path, holder: Holder | None) -> str:
    return (
        f"{path.parent} is in use by {holder or 'another run'}. Wait for it, stop it, or use another --workdir. If "
        f"that run is surely dead, its lock is taken over {DEAD_AFTER_SECONDS:.0f} seconds after its last heartbeat"
    )


def read(path: epath.Path) -> Holder | None:
    """Who holds a lock; None where there is none. A file that is not a lock counts as none."""
    try:
        return parsed(path.read_bytes())
    except OSError:
        return None


def parsed(content: bytes) -> Holder | None:
    try:
        return Holder(**json.loads(content))
    except (ValueError, TypeError):
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
