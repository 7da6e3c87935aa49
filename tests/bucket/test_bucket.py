"""If these fail, a workdir in a bucket loses files or lines, costs the square of what is logged, or is used by two."""

import contextlib
import dataclasses
import json
import threading
import time
import types

import numpy as np
import pytest
from etils import epath

from iar_jax.data import codes
from iar_jax.runtime import artifacts, bucket, files, lock
from iar_jax.runtime.errors import UserError
from iar_jax.runtime.files import Log, read_log
from tests.bucket.server import serving


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    with serving() as (store, environment), pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        patch.setenv("IAR_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield store


@pytest.fixture
def store(served):
    yield served
    served.make_trouble()
    served.remove_tree("run")


RUN = epath.Path("gs://bucket/run")


def test_a_file_is_one_upload_and_whole_or_not_there(store):
    files.write_bytes(RUN / "a.txt", b"content")
    assert store.objects["run/a.txt"].content == b"content"
    fail_half_way(RUN / "b.txt")
    assert store.names("run/") == ["run/a.txt"]
    assert files.read_bytes(RUN / "none") is None


def fail_half_way(path):
    with contextlib.suppress(ZeroDivisionError), files.writing(path) as local:
        local.write_bytes(b"half")
        raise ZeroDivisionError


def uploaded_by(store, path, lines):
    """Bytes that go to the bucket for a log of so many lines, each of them flushed."""
    before = store.bytes_in
    log = Log(path)
    for step in range(lines):
        log.append({"step": step, "loss": 0.123456789, "more": "x" * 150})
        log.flush()
    log.close()
    return store.bytes_in - before


@pytest.mark.slow
def test_a_log_costs_what_is_logged_and_not_its_square(store, monkeypatch):
    monkeypatch.setattr(files, "SEGMENT_BYTES", 600)
    few, many = uploaded_by(store, RUN / "few.jsonl", 15), uploaded_by(store, RUN / "many.jsonl", 60)
    assert many < 4.5 * few
    assert [line["step"] for line in read_log(RUN / "many.jsonl")] == list(range(60))
    assert len(store.names("run/many.jsonl")) > 10


@pytest.mark.parametrize("first", [0, 1, 9, 10, 37, 200])
def test_a_log_goes_on_behind_the_lines_that_stay(store, monkeypatch, first):
    monkeypatch.setattr(files, "SEGMENT_BYTES", 300)
    path = RUN / "log.jsonl"
    log = Log(path)
    for step in range(40):
        log.append({"step": step, "text": "x" * 20})
    log.close()
    log = Log(path, keep=lambda line: line["step"] < first)
    log.append({"step": 1000})
    log.close()
    assert [line["step"] for line in read_log(path)] == [*range(min(first, 40)), 1000]


def test_of_writes_under_a_condition_one_counts(store):
    path = RUN / "object"
    first = bucket.write(path, b"first", 0)
    assert first
    assert bucket.write(path, b"second", 0) is None
    assert bucket.read(path) == (b"first", first)
    second = bucket.write(path, b"second", first)
    bucket.remove(path, first)
    assert bucket.read(path) == (b"second", second)
    bucket.remove(path, second)
    assert bucket.read(path) == (b"", 0)


def test_of_many_that_start_at_once_one_holds_the_lock(store):
    held, refused = [], []
    started, ended = threading.Barrier(6), threading.Event()

    def contend():
        started.wait()
        try:
            keeper = lock.Keeper(RUN)
        except UserError as error:
            refused.append(str(error))
            return
        held.append(keeper.holder.token)
        ended.wait(20)
        keeper.release()

    with pytest.MonkeyPatch.context() as patch:
        # As runs of other machines, which cannot be asked whether they live.
        patch.setattr(lock, "gone", lambda holder: False)
        patch.setattr(lock, "HEARTBEAT_SECONDS", 0.2)
        patch.setattr(lock, "DEAD_AFTER_SECONDS", 5.0)
        threads = [threading.Thread(target=contend) for _ in range(6)]
        for thread in threads:
            thread.start()
        end = time.monotonic() + 20
        while len(held) + len(refused) < 6 and time.monotonic() < end:
            time.sleep(0.05)
        assert len(held) == 1, (held, refused)
        assert len(refused) == 5
        assert all("is in use by process" in message for message in refused)
        assert json.loads(store.objects["run/lock.json"].content)["token"] == held[0]
        ended.set()
        for thread in threads:
            thread.join()
    assert store.names("run/") == []


def test_a_lock_whose_upload_was_not_answered_is_held_all_the_same(store):
    store.make_trouble(broken=1.0, only="POST .*upload", at_most=1)
    place = lock.InBucket(RUN)
    place.read()
    holder = lock.Holder("mine", "here", 1, "machine", "now")
    with pytest.raises(OSError, match="lock"):
        place.write(holder)
    assert place.write(holder)
    other = lock.InBucket(RUN)
    assert other.read() == holder
    assert not lock.InBucket(RUN).write(dataclasses.replace(holder, token="other"))
    assert place.there()
    store.remove_tree("run")
    assert not place.there()


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("s3://bucket/run", "it may be a directory, or gs://BUCKET/NAME"),
        ("gs://bucket", "give a name inside of the bucket, as gs://bucket/NAME"),
        ("gs://bucket/", "give a name inside of the bucket"),
    ],
)
def test_addresses_that_cannot_be_are_refused(store, address, message):
    with pytest.raises(UserError, match=message):
        bucket.check(epath.Path(address), "--workdir")


def test_no_bucket_no_right_and_no_answer_are_told_apart(store):
    bucket.check(RUN, "--workdir")
    for trouble, message in (("missing", "there is no bucket 'bucket'"), ("forbidden", "may not read it")):
        store.make_trouble(**{trouble: 1.0})
        with pytest.raises(UserError, match=message):
            bucket.check(RUN, "--workdir")
    store.make_trouble(unavailable=1.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bucket, "SECONDS", 0.3)
        with pytest.raises(UserError, match="does not answer"):
            bucket.check(RUN, "--workdir")


def records(count):
    rng = np.random.default_rng(0)
    return [codes.CodeRecord(rng.integers(0, 64, (2, 16)), i % 3, i) for i in range(count)]


def test_code_records_are_read_from_a_local_copy_that_stays(store, tmp_path):
    directory = RUN / "codes" / "train"
    everything = records(50)
    for shard in range(2):
        packed = [codes.pack(record, 64) for record in everything[25 * shard : 25 * (shard + 1)]]
        codes.write_shard(codes.shard_path(directory, shard, 2), packed)
    fingerprint = codes.fingerprint_records(codes.shards_in(directory))
    files.write_json(directory / "metadata.json", dataclasses.asdict(metadata(fingerprint)))
    first = codes.RawRecords(directory, 64, str(tmp_path / "copies"))
    asked = sum(store.requests.values())
    for number in (49, 3, 17):
        np.testing.assert_array_equal(first[number].codes, everything[number].codes)
    assert sum(store.requests.values()) == asked
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "copies").rglob("*.array_record")}
    codes.RawRecords(directory, 64, str(tmp_path / "copies"))
    assert {path: path.stat().st_mtime_ns for path in before} == before
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(codes.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=10))
        with pytest.raises(UserError, match=r"config.data.cache_dir=.* has 0.0 GB free"):
            codes.RawRecords(directory, 64, str(tmp_path / "small"))
        there = codes.RawRecords(directory, 64)
    assert there.paths[0].startswith("gs://")
    np.testing.assert_array_equal(there[49].codes, everything[49].codes)


def metadata(fingerprint):
    return artifacts.Metadata("extract_codes", True, fingerprint, {}, {}, {}, {})
