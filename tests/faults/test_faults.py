"""If these fail, a run that is disturbed does not come back as the one that was not.

A short selection; `python -m tests.faults` tries them all.
"""

import random
import signal

import pytest

from tests.faults import faults


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return faults.undisturbed(tmp_path_factory.mktemp("faults") / "undisturbed")


def assert_survived(outcome):
    assert outcome.same
    assert outcome.examples_lost == 0


@pytest.mark.parametrize(("stage", "number", "moment"), [("train", 5, "before"), ("sample", 3, "after")])
def test_a_kill_at_a_rename(reference, tmp_path, stage, number, moment):
    assert_survived(faults.killed_at_a_rename(reference, tmp_path / "run", stage, number, moment))


def test_a_stop_of_the_extraction(reference, tmp_path):
    assert_survived(faults.stopped_by_a_signal(reference, tmp_path / "run", "extract_codes", signal.SIGTERM))


def test_a_flipped_bit_in_the_latest_checkpoint(reference, tmp_path):
    assert_survived(faults.damaged_checkpoint(reference, tmp_path / "run", random.Random(0), "state", "flip"))


@pytest.mark.slow
def test_flipped_bits_in_records_and_samples(reference, tmp_path):
    assert_survived(faults.damaged_records(reference, tmp_path / "records", random.Random(1), "flip"))
    assert_survived(faults.damaged_samples(reference, tmp_path / "samples", random.Random(2), "flip"))


@pytest.mark.slow
def test_a_full_disk(reference, tmp_path):
    try:
        assert_survived(faults.full_disk(reference, tmp_path / "run", 1500))
    except faults.NotTried as reason:
        pytest.skip(str(reason))


def test_a_second_run_is_refused(reference, tmp_path):
    assert_survived(faults.second_run(reference, tmp_path / "run"))
