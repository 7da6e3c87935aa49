"""If these fail, a run that is disturbed does not come back as the one that was not.

A short selection; `python -m tests.faults` tries them all.
"""

import signal

import pytest

from tests.bucket.server import serving
from tests.faults import damage, kills, runs, store
from tests.faults.workdirs import OPTIONS, OTHERS, InBucket, NotTried, OnDisk, reference_with
from tests.stages import call

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    path = tmp_path_factory.mktemp("faults") / "undisturbed"
    call("pipeline", path, *OPTIONS)
    return path


@pytest.fixture
def workdir(tmp_path):
    return OnDisk(tmp_path / "run")


@pytest.fixture
def in_bucket(monkeypatch, tmp_path):
    monkeypatch.setenv("IAR_JAX_CACHE", str(tmp_path / "cache"))
    with serving() as bucket:
        yield InBucket(*bucket, "run")


def assert_survived(outcome):
    assert outcome.same
    assert outcome.examples_lost == 0


def test_a_kill_at_a_rename(reference, workdir):
    assert_survived(kills.at_a_rename(reference, workdir, "sample", 3, "after"))


def test_a_stop_of_the_extraction(reference, workdir):
    assert_survived(kills.by_a_signal(reference, workdir, "extract_codes", signal.SIGTERM))


def test_a_flipped_bit_in_the_latest_checkpoint(reference, workdir):
    assert_survived(damage.of_the_latest_checkpoint(reference, workdir, "state", "flip", 0))


def test_a_kill_in_a_step_of_all_variants(reference, tmp_path):
    own = reference_with(OTHERS["variants"], reference, tmp_path / "own")
    assert_survived(kills.in_a_step(own, OnDisk(tmp_path / "killed", OTHERS["variants"]), "train", 13, 0.05))


@pytest.mark.parametrize(
    ("kind", "way"),
    [
        ("code records", "empty"),
        ("generator's weights", "flip"),
        ("labels", "empty"),
        ("generator's metadata", "cut"),
    ],
)
def test_damage_of_finished_files(reference, workdir, kind, way):
    assert_survived(damage.of_a_file(reference, workdir, kind, way, 1))


def test_a_full_disk(reference, tmp_path):
    try:
        assert_survived(runs.a_full_disk(reference, tmp_path / "disk", "train", 1500))
    except NotTried as reason:
        pytest.skip(str(reason))


def test_a_second_run_is_refused(reference, workdir):
    assert_survived(runs.a_second_run(reference, workdir, "--config.training.learning_rate=0.5"))


def test_a_directory_that_is_moved_away(reference, workdir):
    assert_survived(runs.moved_or_removed(reference, workdir, "train", True))


def test_a_kill_at_an_upload(reference, in_bucket):
    assert_survived(kills.at_an_upload(reference, in_bucket, "train", 0.6))


def test_a_store_in_trouble(reference, in_bucket):
    assert_survived(store.in_trouble(reference, in_bucket, "sample", "503", 0))


def test_two_that_start_at_once_in_a_bucket(reference, in_bucket):
    assert_survived(runs.two_at_once(reference, in_bucket, "extract_codes"))
