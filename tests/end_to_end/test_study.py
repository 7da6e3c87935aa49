"""If these fail, a study loses runs, makes some twice, or says what its runs do not show."""

import html
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess

import pytest

from tests.stages import ROOT, TINY, call, command, environment, wait_until, without_pictures

CONFIG = "configs/studies/ablation.py:mnist"
ARMS = (
    ("baseline", "training.cluster_weights=(0.0,)"),
    ("iar", "training.cluster_weights=(1.0,)"),
    ("again", "training.cluster_weights=(0.0,)"),
    ("linear", "training.cluster_weights=(1.0,)", "sampling.cfg_schedule=linear"),
)
OPTIONS = [
    *TINY,
    f"--config.study.arms={ARMS}",
    "--config.study.seeds=(0,1)",
    "--config.study.learning_rates=()",
    "--config.study.cfg_scales=()",
    "--config.study.sample_every=10",
    "--config.study.curve_images=10",
]
RUNS = ["baseline/0", "iar/0", "again/0", "linear/0", "baseline/1", "iar/1", "linear/1"]


def study(workdir, *arguments, **options):
    return call("study", workdir, *OPTIONS, *arguments, config=CONFIG, **options)


def content_of(path):
    """The answer, without what differs from one making to the next: times, and where things lie."""

    def without(tree):
        if not isinstance(tree, dict):
            return tree
        return {k: without(v) for k, v in tree.items() if "seconds" not in k and k not in ("grid", "inputs", "runs")}

    content = json.loads((path / "study.json").read_text())
    found = without(content["arms"])
    for name, arm in content["arms"].items():
        found[name]["runs"] = {seed: without(run) for seed, run in arm["runs"].items()}
    return found


@pytest.fixture(scope="module", autouse=True)
def one_core():
    """The last bits of sums depend on how many cores share them: all runs have one."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    yield
    os.sched_setaffinity(0, before)


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A study whose processes were killed at once in the midst of its runs, and that was started again."""
    path = tmp_path_factory.mktemp("study") / "killed"
    process = subprocess.Popen(
        command("study", path, *OPTIONS, "--workers=2", config=CONFIG),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    wait_until(lambda: list(path.glob("runs/iar/*/train/checkpoints/10")) or process.poll() is not None, 300)
    assert process.poll() is None
    pieces = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()
    for piece in pieces:
        os.kill(int(piece), signal.SIGKILL)
    process.communicate()
    assert not (path / "study.json").exists()
    return path, study(path).stdout


@pytest.mark.slow
def test_a_killed_study_goes_on_and_answers(killed):
    path, output = killed
    assert "baseline/shared in" not in output
    assert "ends as baseline does, to the last bit" in output
    content = json.loads((path / "study.json").read_text())
    arms = content["arms"]
    seeds = {name: arm["seeds"] for name, arm in arms.items()}
    assert seeds == {"baseline": [0, 1], "iar": [0, 1], "again": [0], "linear": [0, 1]}
    ratio = arms["iar"]["steps_ratio"]
    assert ratio["seeds"] == 2
    assert ratio["low"] < ratio["mean"] < ratio["high"]
    assert arms["baseline"]["steps_ratio"] is None
    assert arms["again"]["equal_to"] == {"arm": "baseline", "largest_difference": 0.0}
    assert not (path / "runs" / "linear").exists()
    assert arms["linear"]["runs"]["0"]["validation"] == arms["iar"]["runs"]["0"]["validation"]
    assert arms["linear"]["runs"]["0"]["scores"] != arms["iar"]["runs"]["0"]["scores"]
    assert arms["iar"]["curves"]["token_loss"]["steps"] == [10, 20, 24]
    assert arms["iar"]["curves"]["frechet_distance"]["steps"] == [10, 20, 24]
    assert arms["iar"]["scores"]["mind"]["seeds"] == 2
    report = (path / "report.html").read_text()
    assert all(html.escape(arm["verdict"]) in report for arm in arms.values())
    assert "http" not in without_pictures(report)


@pytest.mark.slow
def test_slices_in_any_order_end_as_one(killed, tmp_path):
    reference, path = killed[0], tmp_path / "copy"
    shutil.copytree(reference, path)
    shared = ("shared/tokens-*/partition-*", "shared/judge-*", "shared/perturbed-*")
    for pattern in (*shared, "runs/again/*", "runs/iar/*-1-*", "compiled"):
        for gone in path.glob(pattern):
            shutil.rmtree(gone)
    assert study(path, "--list").stdout.split() == ["baseline/shared", *RUNS]
    assert study(path, "--nomake").stdout.count("not finished") == 1
    # Two at once, the last first, both in need of what is shared.
    slices = [
        subprocess.Popen(
            command("study", path, *OPTIONS, f"--run={name}", config=CONFIG),
            cwd=ROOT,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for name in ("again/0", "linear/1")
    ]
    for process in slices:
        output, _ = process.communicate()
        assert process.returncode == 0, output
    assert "0 of them to be made" in study(path).stdout
    assert content_of(path) == content_of(reference)


@pytest.mark.slow
def test_a_damaged_run_is_named_and_made_again(killed, tmp_path):
    shutil.copytree(killed[0], tmp_path / "copy")
    path = tmp_path / "copy"
    (run,), (partition,) = path.glob("runs/baseline/*-1-*/result-*"), path.glob("shared/*/partition-*/codebook")
    for damaged in (run, partition):
        for name in ("metadata.json", "metadata.copy.json"):
            (damaged / name).write_text("{")
    output = study(path).stdout
    assert all(f"{damaged}/metadata.json is damaged" in output for damaged in (run, partition))
    assert re.findall(r"study: (\S+) in ", output) == ["baseline/shared", "baseline/1"]
    assert content_of(path) == content_of(killed[0])


@pytest.mark.slow
def test_a_rate_at_which_the_loss_is_not_finite_is_told(killed, tmp_path):
    path = tmp_path / "copy"
    shutil.copytree(killed[0], path)
    rates = "--config.study.learning_rates=(1e30,)"
    assert "the rate counts as the worst" in study(path, rates, "--run=baseline/tuning-1e+30-1000").stdout
    done = study(path, rates, "--nomake", check=False)
    assert done.returncode == 2
    assert "baseline: the loss is not finite at any of the learning rates 1e+30; give lower ones" in done.stderr


@pytest.mark.slow
def test_a_signal_stops_a_study_and_its_processes(tmp_path):
    long = "--config.tokenizer_training.num_steps=100000"
    process = subprocess.Popen(
        command("study", tmp_path, *OPTIONS, long, config=CONFIG),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    log = tmp_path / "logs" / "baseline" / "shared.txt"
    wait_until(lambda: log.exists() and "train_tokenizer" in log.read_text(), 120)
    process.terminate()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, output
    assert "study stopped with 1 pieces under way" in output
    assert "run the same command to go on" in log.read_text()


def test_no_such_piece(tmp_path):
    done = study(tmp_path, "--run=iar/9", check=False)
    assert done.returncode == 2
    assert "study: --run=iar/9: the study has no such piece; --list shows all, such as linear/1" in done.stderr
