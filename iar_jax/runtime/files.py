"""The two ways in which files are written, on a disk or in a bucket: whole, or as a log that grows.

A whole file appears under its name when all its bytes are safe. On a disk it is written beside, flushed, renamed, and
its directory flushed, so that a power cut leaves the old one or the new one; in a bucket it is one upload. A log keeps
what came before; in a bucket, where nothing can be appended to, it is several objects of a bounded size.
"""

import contextlib
import errno
import json
import os
import pathlib
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

from etils import epath

from iar_jax.runtime import distributed

# Of a log's objects in a bucket: the open one is uploaded anew, and a full one never again.
SEGMENT_BYTES = 1 << 16
# A log in a bucket is uploaded so often, and when `flush` is called.
SECONDS_BETWEEN_UPLOADS = 20.0


def in_bucket(path: os.PathLike | str) -> bool:
    """Whether a path is an address as gs://bucket/name."""
    return "://" in os.fspath(path)


def absolute(path: epath.Path) -> epath.Path:
    """The path from the root; an address is one already (`resolve` would take it for a relative path)."""
    return path if in_bucket(path) else path.resolve()


def flush(path: os.PathLike | str) -> None:
    """Returns when what was written to a local file or directory is on its disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems cannot flush a directory.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


def flush_tree(directory: os.PathLike[str] | str) -> None:
    """`flush` of everything below a local directory, and of itself."""
    for parent, _, names in os.walk(directory):
        for name in names:
            flush(os.path.join(parent, name))
        flush(parent)


def leftover(head: bytes) -> str:
    """What a file is that a download left under another's name, and what to do; "" where its first bytes do not tell.

    Args:
        head: the first 512 bytes, or all.
    """
    text = head.lstrip().lower()
    if not head:
        return "is empty; download it again"
    if head.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer and not the file that it stands for: run git lfs pull there"
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<body")):
        return "is a web page (of an error, or of a login); download the file itself"
    if head.startswith(b"\x1f\x8b"):
        return "is compressed with gzip; unpack it first (gunzip, or tar xzf)"
    if all(byte in b"\t\r\n" or 32 <= byte < 127 for byte in head):
        return f"is a text; it begins: {' '.join(head.decode().split())[:80]}"
    return ""


def cache_directory() -> epath.Path:
    """Of this machine, for what can be had again: IAR_JAX_CACHE, or ~/.cache/iar_jax."""
    path = os.path.expanduser(os.environ.get("IAR_JAX_CACHE") or "~/.cache/iar_jax")
    # Without a home there is nothing to expand to.
    return epath.Path(tempfile.gettempdir()) / "iar_jax" if path.startswith("~") else epath.Path(path)


@contextlib.contextmanager
def local_copy(path: epath.Path) -> Iterator[epath.Path]:
    """The file itself, or a copy of an object of a bucket, which many small reads would cost a request each."""
    if not in_bucket(path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="iar_jax-") as directory:
        local = epath.Path(directory) / path.name
        download(path, local)
        yield local


def download(path: epath.Path, target: epath.Path) -> None:
    """Copies an object of a bucket to a local file."""
    with path.open("rb") as source, open(target, "wb") as file:
        shutil.copyfileobj(source, file, 1 << 22)


@contextlib.contextmanager
def writing(path: epath.Path) -> Iterator[pathlib.Path]:
    """A local file to write, which becomes `path` at the end, whole, or not at all where the block raises."""
    if in_bucket(path):
        with tempfile.TemporaryDirectory(prefix="iar_jax-") as directory:
            local = pathlib.Path(directory) / path.name
            yield local
            with local.open("rb") as source, path.open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 22)
        return
    partial = pathlib.Path(path.parent) / f"{path.name}.partial"
    try:
        yield partial
        flush(partial)
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    flush(path.parent)


def write_bytes(path: epath.Path, content: bytes) -> None:
    """Writes a file, and its directory, so that it is whole or not there. Of several processes the first one does."""
    if not distributed.is_first():
        return
    if in_bucket(path):
        path.write_bytes(content)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing(path) as local:
        local.write_bytes(content)


def read_bytes(path: epath.Path) -> bytes | None:
    """A file's content; None where there is none."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def write_json(path: epath.Path, content: Any) -> None:
    """As `write_bytes`, of JSON."""
    write_bytes(path, json_bytes(content))


def json_bytes(content: Any) -> bytes:
    """A JSON file's content."""
    return (json.dumps(content, indent=2) + "\n").encode()


class Log:
    """Lines of JSON that are added one by one, each with a "step".

    What is there stays, but for lines that are not whole and for those at the end that `keep` drops. On a disk a line
    is in the file at once, and survives a power cut after `flush`; in a bucket lines are uploaded after some seconds,
    and by `flush` and `close`. Of several processes the first one writes.
    """

    def __init__(self, path: epath.Path, keep: Callable[[dict[str, Any]], bool] = lambda line: True):
        self.path, self.file = path, None  # type: epath.Path, Any
        self.uploaded = time.monotonic()
        self.waiting, self.content, self.number = False, b"", 0
        if not distributed.is_first():
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        segments = segments_of(path)
        # From the last segment back: each change leaves a log that is whole.
        for place, segment in reversed(list(enumerate(segments))):
            content = segment.read_bytes()
            kept = [line for line in parsed(content) if keep(line)]
            whole = b"".join(map(line_of, kept))
            if place and not kept:
                segment.unlink()
                segments.pop()
                continue
            if whole != content:
                write_bytes(segment, whole)
            if kept:
                break
        self.number = max(len(segments) - 1, 0)
        if in_bucket(path):
            self.content = segments[-1].read_bytes() if segments else b""
        else:
            self.file = open(path, "ab")  # noqa: SIM115

    def append(self, line: dict[str, Any]) -> None:
        """Adds a line."""
        if not distributed.is_first():
            return
        if self.file is not None:
            self.file.write(line_of(line))
            self.file.flush()
            return
        self.content += line_of(line)
        self.waiting = True
        if len(self.content) >= SEGMENT_BYTES:
            self.flush()
            self.number, self.content = self.number + 1, b""
        elif time.monotonic() - self.uploaded > SECONDS_BETWEEN_UPLOADS:
            self.flush()

    def flush(self) -> None:
        """Returns when all lines are safe."""
        if self.file is not None:
            os.fsync(self.file.fileno())
        elif self.waiting:
            write_bytes(segment_path(self.path, self.number), self.content)
            self.uploaded, self.waiting = time.monotonic(), False

    def close(self) -> None:
        """The last `flush`."""
        self.flush()
        if self.file is not None:
            self.file.close()


def read_log(path: epath.Path) -> list[dict[str, Any]]:
    """All whole lines of a `Log`."""
    return [line for segment in segments_of(path) for line in parsed(segment.read_bytes())]


def segment_path(path: epath.Path, number: int) -> epath.Path:
    return path if number == 0 else path.parent / f"{path.name}-{number:05d}"


def segments_of(path: epath.Path) -> list[epath.Path]:
    """The files of a log in their order; a log on a disk has one."""
    if not in_bucket(path):
        return [path] if path.exists() else []
    return sorted(path.parent.glob(f"{path.name}*")) if path.parent.exists() else []


def parsed(content: bytes) -> list[dict[str, Any]]:
    """The lines that are whole: a killed run may leave half of the last one, and a disk lose any."""
    lines = []
    for line in content.splitlines():
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict) and isinstance(found.get("step"), int):
            lines.append(found)
    return lines


def line_of(line: dict[str, Any]) -> bytes:
    return json.dumps(line).encode() + b"\n"
