"""If these fail, a file is half of one after a kill or a power cut, or a log loses lines or keeps those of others."""

import contextlib
import os

from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st

from iar_jax.runtime import files
from iar_jax.runtime.files import Log, read_log


def test_a_file_is_flushed_before_it_gets_its_name_and_its_directory_after(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: seen.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda source, target: (seen.append("rename"), replace(source, target)))
    files.write_bytes(epath.Path(tmp_path) / "a" / "file", b"content")
    assert seen == [str(tmp_path / "a" / "file.partial"), "rename", str(tmp_path / "a")]
    assert (tmp_path / "a" / "file").read_bytes() == b"content"


def test_a_file_whose_writing_fails_is_the_one_that_it_was(tmp_path):
    path = epath.Path(tmp_path) / "file"
    files.write_bytes(path, b"old")
    with contextlib.suppress(ZeroDivisionError), files.writing(path) as local:
        local.write_bytes(b"half of the new")
        raise ZeroDivisionError
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_flushing_needs_no_file_system_that_can_flush_directories(tmp_path, monkeypatch):
    def refuse(_):
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(os, "fsync", refuse)
    files.flush_tree(tmp_path)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 9), st.integers(0, 9), st.sampled_from([b"", b'{"step": 7, "lo', b"\xff\xfe", b"[1]\n", b"{}\n"]))
def test_a_log_goes_on_behind_the_lines_that_stay(tmp_path_factory, count, first, torn):
    path = epath.Path(tmp_path_factory.mktemp("log")) / "log.jsonl"
    log = Log(path)
    for step in range(count):
        log.append({"step": step, "loss": step / 3})
    log.close()
    with open(path, "ab") as file:
        file.write(torn)
    log = Log(path, keep=lambda line: line["step"] < first)
    log.append({"step": 100})
    log.close()
    kept = [{"step": step, "loss": step / 3} for step in range(min(count, first))]
    assert read_log(path) == [*kept, {"step": 100}]


def test_a_line_that_a_disk_has_damaged_is_left_out(tmp_path):
    path = epath.Path(tmp_path) / "log.jsonl"
    path.write_bytes(b'{"step": 1}\n{"st\x00p": 2}\n{"step": 3}\n{"step": "x"}\n')
    assert [line["step"] for line in read_log(path)] == [1, 3]


def test_an_address_is_not_taken_for_a_relative_path(tmp_path):
    assert str(files.absolute(epath.Path("gs://bucket/run"))) == "gs://bucket/run"
    assert files.absolute(epath.Path("run")).is_absolute()
    assert files.in_bucket("gs://bucket/run")
    assert not files.in_bucket(tmp_path)


def test_the_cache_is_somewhere_without_a_home(monkeypatch):
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("IAR_JAX_CACHE", raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda _: (_ for _ in ()).throw(KeyError("no such user")))
    assert "~" not in str(files.cache_directory())
