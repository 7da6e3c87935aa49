"""If these fail, the stages don't fit together, don't resume, or mix what doesn't belong together."""

import dataclasses
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from etils import epath
from PIL import Image
from safetensors.numpy import save_file

from configs import mnist
from iar_jax import extract_codes
from iar_jax.data import codes, preprocessing
from iar_jax.evaluate.sweep import values_of
from iar_jax.runtime.errors import UserError
from tests import random_inception
from tests.stages import (
    ROOT,
    TINY,
    assert_same_metrics,
    call,
    children,
    fingerprint,
    inputs_of,
    metrics_text,
    start,
    start_processes,
    wait_until,
    without_pictures,
)


@dataclasses.dataclass(frozen=True)
class Finished:
    path: pathlib.Path
    output: str


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "mnist"
    return Finished(path, call("pipeline", path, *TINY).stdout)


@pytest.fixture
def copy(finished, tmp_path):
    shutil.copytree(finished.path, tmp_path / "copy")
    return tmp_path / "copy"


def test_every_stage_leaves_what_the_contract_says(finished):
    path = finished.path
    (samples,) = (path / "samples").iterdir()
    for directory in (
        "tokenizer",
        "codebook",
        "codes/train",
        "codes/val",
        "train",
        f"samples/{samples.name}",
        f"evaluation/{samples.name}",
        "evaluation/classifier",
    ):
        metadata = json.loads((path / directory / "metadata.json").read_text())
        assert metadata["finished"], directory
        assert len(metadata["fingerprint"]) == 64
    images = np.load(samples / "samples.npz", allow_pickle=False)["arr_0"]
    assert images.shape == (20, 32, 32, 3)
    assert images.dtype == np.uint8
    np.testing.assert_array_equal(np.load(samples / "labels.npy"), np.arange(20) % 10)
    for picture in (samples / "grid.png", path / "codebook" / "clusters.png"):
        Image.open(picture).verify()
    scores = json.loads((path / "evaluation" / f"{samples.name}.json").read_text())["scores"]
    assert [row["count"] for row in scores.values()] == [500, 500, 20]
    report = (path / "evaluation" / "report.html").read_text()
    assert "http" not in without_pictures(report).replace("http-equiv", "")
    assert json.loads((path / "config.json").read_text())["model"]["dim"] == 32
    assert not list(path.rglob("*.partial"))
    for last in ("grid of samples", "scores", "report"):
        assert last in finished.output


def test_the_metrics_are_there_line_by_line(finished):
    lines = [json.loads(line) for line in (finished.path / "train" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "train/loss" in line] == list(range(2, 25, 2))
    assert [line["step"] for line in lines if "val/token_loss" in line] == [10, 20, 24]
    for line in lines:
        if "train/loss" in line:
            total = line["train/token_loss"] + line["train/cluster_loss"]
            np.testing.assert_allclose(line["train/loss"], total, rtol=1e-5)
    assert list((finished.path / "train").glob("events.out.tfevents.*"))


def test_a_finished_run_says_so_and_changes_nothing(finished):
    before = {p: p.stat().st_mtime_ns for p in finished.path.rglob("*") if p.is_file() and p.name != "config.json"}
    output = call("pipeline", finished.path, *TINY).stdout
    for stage in ("train_tokenizer", "rearrange_codebook", "extract_codes", "train", "sample", "evaluate"):
        assert f"{stage}: done" in output
    after = {p: p.stat().st_mtime_ns for p in finished.path.rglob("*") if p.is_file() and p.name != "config.json"}
    assert before == after


def test_rearranging_does_not_touch_the_reconstructions(finished):
    import jax
    import jax.numpy as jnp
    from etils import epath

    from iar_jax.codebook.permutation import load_permutation
    from iar_jax.config.fields import defaults
    from iar_jax.data.images import open_images
    from iar_jax.data.preprocessing import to_unit_range
    from iar_jax.models.tokenizer import load_tokenizer
    from iar_jax.runtime import sharding

    mesh = sharding.make_mesh(-1, 1, 1)
    model, params, _ = load_tokenizer(epath.Path(finished.path / "tokenizer"), mesh)
    images = open_images(defaults("data"))
    permutation, _ = load_permutation(epath.Path(finished.path / "codebook" / "permutation.npz"))
    images = jnp.asarray(to_unit_range(np.stack([images.val[i]["image"] for i in range(4)])))
    codes = np.asarray(model.apply({"params": params}, images, method="encode"))
    plain = model.apply({"params": params}, jnp.asarray(codes), method="decode_codes")
    # The same through the rearranged ids and a codebook in the new order.
    rearranged = params | {"quantizer": {"codebook": params["quantizer"]["codebook"][permutation.new_to_old]}}
    through = model.apply({"params": rearranged}, jnp.asarray(permutation.old_to_new[codes]), method="decode_codes")
    jax.tree.map(np.testing.assert_array_equal, plain, through)


def test_codes_are_replaced_and_what_that_does_is_told(copy):
    options = [*TINY, "--config.evaluation.code_distance_images=5", "--config.evaluation.batch_size=4"]
    done = call("evaluate", copy, *options, "--what=code_distance")
    figures = json.loads((copy / "code_distance" / "figures.json").read_text())
    assert figures["images"] == 5
    assert [row["rank"] for row in figures["substitutions"]] == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 0, 0]
    assert "visible" in done.stdout or "less than the tokenizer" in done.stdout
    assert Image.open(copy / "code_distance" / "pictures.png").height > 0
    assert "data:image/png" in (copy / "code_distance" / "report.html").read_text()


@pytest.mark.slow
def test_a_watch_scores_each_checkpoint_of_a_training_that_goes_on(finished, copy):
    shutil.rmtree(copy / "train")
    options = [*TINY, "--config.training.checkpoint_every=6"]
    training = start("train", copy, *options)
    wait_until(lambda: (copy / "train" / "checkpoints" / "6").exists() or training.poll() is not None, pause=0.01)
    watching = call("evaluate", copy, *options, "--watch", "--watch_seconds=0.2")
    training.communicate(timeout=60)
    assert training.returncode == 0
    found = [json.loads(line) for line in (copy / "evaluation" / "watch.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in found]
    assert steps == sorted(set(steps))
    assert set(steps) <= {6, 12, 18, 24}
    assert {18, 24} <= set(steps)  # the two that retention keeps
    assert all(np.isfinite(line["frechet_distance"]) for line in found)
    assert "the training is finished" in watching.stdout
    assert list((copy / "evaluation").glob("events.out.tfevents*"))
    # The finished transformer's own samples are others than its last checkpoint's only by name.
    call("sample", copy, *options)
    names = [path.name for path in (copy / "samples").glob("*0000024*")]
    images = [np.load(copy / "samples" / name / "samples.npz")["arr_0"] for name in names]
    assert len(images) == 2
    np.testing.assert_array_equal(*images)
    # A second watch has nothing to do.
    assert "2 checkpoints scored before" in call("evaluate", copy, *options, "--watch").stdout or len(steps) > 2


@pytest.mark.slow
def test_a_sweep_samples_and_scores_every_value(copy):
    done = call("evaluate", copy, *TINY, "--sweep=cfg_scale=1:1.5:0.25")
    found = json.loads((copy / "evaluation" / "sweep-cfg_scale.json").read_text())
    assert [point["cfg_scale"] for point in found["points"]] == [1.0, 1.25, 1.5]
    assert all(np.isfinite(point["frechet_distance"]) for point in found["points"])
    assert Image.open(copy / "evaluation" / "sweep-cfg_scale.png").height > 0
    assert len(list((copy / "samples").iterdir())) == 3
    assert "curve" in done.stdout


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ("seed=1:2:1", "'seed' is not one of cfg_scale, temperature, top_k, top_p"),
        ("cfg_scale=1:2", "a range is FIRST:LAST:STEP"),
        ("top_k=1:8:0.5", "a range is FIRST:LAST:STEP"),
        ("cfg_scale=2:1:0.5", "not below the first"),
    ],
)
def test_a_sweep_of_nothing_is_refused(sweep, message):
    with pytest.raises(UserError, match=message):
        values_of(sweep, mnist.get_config())


def test_a_sweep_over_values_that_are_none_is_refused_before_it_begins(finished):
    done = call("evaluate", finished.path, *TINY, "--sweep=top_p=0.5:1.5:0.5", check=False)
    assert "config.sampling.top_p is 1.5" in done.stderr
    assert done.returncode == 2


def test_reconstructions_are_measured(finished, copy):
    done = call("evaluate", copy, *TINY, "--what=reconstruction", IAR_JAX_CACHE=str(copy / "no weights"))
    directory = copy / "evaluation" / "reconstruction"
    figures = json.loads((directory / "figures.json").read_text())
    assert figures["images"] == 500
    originals, reconstructions = (np.load(directory / f"{n}.npz")["arr_0"] for n in ("originals", "reconstructions"))
    errors = np.square(originals.astype(np.float64) - reconstructions).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(figures["psnr"], np.mean(10 * np.log10(255**2 / errors)), rtol=1e-4)
    assert 0 < figures["ssim"] < 1
    assert "rFID              not without Inception weights" in done.stdout
    assert not list(directory.glob("*-parts"))


@pytest.mark.slow
def test_a_run_that_was_interrupted_ends_as_the_one_that_was_not(finished, copy):
    shutil.rmtree(copy / "train")
    process = start("train", copy, *TINY)
    log = copy / "train" / "metrics.jsonl"
    wait_until(lambda: log.exists() and len(log.read_text().splitlines()) >= 2, pause=0.01)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT, output
    assert "which is saved; run the same command to go on" in output
    assert "Traceback" not in output
    output = call("train", copy, *TINY).stdout
    assert "going on from the checkpoint of step" in output
    assert metrics_text(copy) == metrics_text(finished.path)
    assert fingerprint(copy / "train") == fingerprint(finished.path / "train")


@pytest.mark.slow
def test_two_processes_train_as_one_and_a_stopped_run_goes_on_with_one(finished, tmp_path):
    mesh = [
        "--config.mesh.data=1",
        "--config.mesh.fsdp=2",
        "--config.mesh.tensor=2",
        "--config.training.accumulation=2",
    ]
    options = [*inputs_of(finished.path), *mesh]
    call("train", tmp_path / "one", *TINY, *options, devices=4)
    started = start_processes(2, 2, tmp_path / "two", *TINY, *options)
    log = tmp_path / "two" / "train" / "metrics.jsonl"
    while started.poll() is None and not (log.exists() and '"step": 6,' in log.read_text()):
        time.sleep(0.05)
    os.kill(children(started)[-1], signal.SIGTERM)  # one of them
    output, _ = started.communicate(timeout=120)
    assert started.returncode == 143, output
    assert "which is saved" in output
    call("train", tmp_path / "two", *TINY, *options, devices=4)
    assert_same_metrics(tmp_path / "two", tmp_path / "one")


def slurm_is_running():
    return (
        shutil.which("sinfo") is not None
        and subprocess.run(["sinfo"], capture_output=True, check=False).returncode == 0
    )


@pytest.mark.skipif(not slurm_is_running(), reason="no SLURM here")
def test_a_slurm_job_that_is_requeued_goes_on(finished, tmp_path):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}
    options = [*inputs_of(finished.path), "--config.mesh.fsdp=2", "--config.training.num_steps=60"]
    command = [sys.executable, "-m", "iar_jax.train", "--config=configs/mnist.py", f"--workdir={tmp_path / 'run'}"]
    job = subprocess.run(
        ["sbatch", "--parsable", f"--output={tmp_path / 'log'}", "--ntasks=2", "--cpus-per-task=1", "--export=ALL",
         "launch/slurm.sbatch", *command, *TINY, *options],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    log = tmp_path / "run" / "train" / "metrics.jsonl"
    wait_until(lambda: log.exists() and '"step": 10,' in log.read_text())
    subprocess.run(["scontrol", "requeue", job], check=True)
    wait_until(lambda: "which is saved" in (tmp_path / "log").read_text())

    def started_again():
        # SLURM holds a requeued job back for two minutes, unless told otherwise.
        subprocess.run(["scontrol", "update", f"jobid={job}", "StartTime=now"], check=False, capture_output=True)
        return "start 1" in (tmp_path / "log").read_text()

    wait_until(started_again)
    wait_until((tmp_path / "run" / "train" / "metadata.json").exists)
    wait_until(lambda: json.loads((tmp_path / "run" / "train" / "metadata.json").read_text())["finished"])
    assert "going on from the checkpoint" in (tmp_path / "log").read_text()
    call("train", tmp_path / "one", *TINY, *options, devices=4)
    assert_same_metrics(tmp_path / "run", tmp_path / "one")


@pytest.mark.slow
def test_when_one_process_is_killed_none_of_them_hangs(finished, tmp_path):
    started = start_processes(
        2, 1, tmp_path / "run", *TINY, *inputs_of(finished.path), "--config.training.num_steps=100000"
    )
    log = tmp_path / "run" / "train" / "metrics.jsonl"
    while started.poll() is None and not log.exists():
        time.sleep(0.05)
    os.kill(children(started)[-1], signal.SIGKILL)
    started.communicate(timeout=60)
    assert started.returncode != 0


@pytest.mark.slow
def test_two_processes_extract_and_sample_as_one(finished, tmp_path):
    inputs = [f"--config.inputs.{name}={finished.path / name}" for name in ("tokenizer", "codebook")]
    inputs.append(f"--config.inputs.transformer={finished.path / 'train'}")
    for stage in ("extract_codes", "sample"):
        started = start_processes(2, 2, tmp_path, *TINY, *inputs, stage=stage)
        output, _ = started.communicate(timeout=180)
        assert started.returncode == 0, output
    for split in ("train", "val"):
        assert fingerprint(tmp_path / "codes" / split) == fingerprint(finished.path / "codes" / split)
        figures = json.loads((tmp_path / "codes" / split / "metadata.json").read_text())["figures"]
        assert figures["images_per_second"] > 0
        assert 0 <= figures["device_wait"] <= 1
    (ours,), (theirs,) = (list((path / "samples").iterdir()) for path in (tmp_path, finished.path))
    images, expected = (np.load(path / "samples.npz")["arr_0"] for path in (ours, theirs))
    # Rounding differs from batch to batch of the decoder, by a step of 255 at most.
    assert np.abs(images.astype(int) - expected).max() <= 1
    np.testing.assert_array_equal(np.load(ours / "labels.npy"), np.load(theirs / "labels.npy"))


def test_extracted_codes_are_held_against_their_images(copy, monkeypatch, capsys):
    config = mnist.get_config("")
    for option in TINY:
        section, field = option.split("=")[0].removeprefix("--config.").split(".")
        config[section][field] = type(config[section][field])(option.split("=")[1])
    # Its tokenizer is hardly trained, which a check tells too: few reconstructions are nearest to their own original.
    workdir = epath.Path(copy)
    with pytest.raises(UserError, match=r"train: these records are not what .*\(90% at least\)"):
        extract_codes.run_check(config, workdir)
    monkeypatch.setattr(extract_codes, "RECOGNISED", 0.05)
    capsys.readouterr()
    extract_codes.run_check(config, workdir)
    output = capsys.readouterr().out
    for split, count in (("train", "4,500"), ("val", "500")):
        (line,) = (line for line in output.splitlines() if line.startswith(split))
        assert f"{count} records" in line
        assert float(line.split("of 64: ")[1].split("%")[0]) > 99
    assert Image.open(copy / "codes" / "check.png").height > 0
    # Codes of other images under the right names, as after a shuffle that forgot the labels' order.
    (shard,) = (workdir / "codes" / "val").glob("*.array_record")
    records = codes.RawRecords(workdir / "codes" / "val", 64)
    everyone = [records[i] for i in range(len(records))]
    moved = [dataclasses.replace(r, codes=everyone[i - 1].codes) for i, r in enumerate(everyone)]
    codes.write_shard(shard, [codes.pack(record, 64) for record in moved])
    with pytest.raises(UserError, match=r"val: these records are not what"):
        extract_codes.run_check(config, workdir)
    moved = [dataclasses.replace(r, label=(r.label + 1) % 10) for r in everyone]
    codes.write_shard(shard, [codes.pack(record, 64) for record in moved])
    with pytest.raises(UserError, match=r"val: record \d+ is of image \d+, label \d; mnist5k has"):
        extract_codes.run_check(config, workdir)
    beyond = [dataclasses.replace(r, codes=np.full_like(r.codes, 64)) for r in everyone]
    codes.write_shard(shard, [codes.pack(record, 65) for record in beyond])
    with pytest.raises(UserError, match=r"has the code 64; the codebook has 64: these codes are of another tokenizer"):
        extract_codes.run_check(config, workdir)


def test_images_are_reduced_and_written_one_by_one_on_request(finished, copy):
    (whole,) = (finished.path / "samples").iterdir()
    # An interval of all codes changes nothing.
    options = ["--config.sampling.image_size=16", "--config.sampling.cfg_schedule=interval"]
    call("sample", copy, *TINY, *options, "--config.sampling.write_pngs=True")
    (reduced,) = (copy / "samples").glob("*-interval0to0-16px")
    images = np.load(reduced / "samples.npz")["arr_0"]
    originals = np.load(whole / "samples.npz")["arr_0"]
    assert images.shape == (len(originals), 16, 16, 3)
    # Of the images as they were kept, cut to whole numbers: off by 1 at most, times the filter's sum of 1.9, and cut;
    # more where pixels near black or white were clamped before.
    expected = preprocessing.to_uint8(preprocessing.reduced(preprocessing.to_unit_range(originals), 16))
    clamped = ((originals == 0) | (originals == 255)).reshape(-1, 16, 2, 16, 2, 3).any((2, 4))
    near_clamped = clamped.copy()
    for axis in (1, 2):
        near_clamped |= np.roll(near_clamped, 1, axis) | np.roll(near_clamped, -1, axis)
    assert not near_clamped.all()
    assert np.abs(images.astype(int) - expected)[~near_clamped].max() <= 3
    assert not (whole / "images").exists()
    files = sorted((reduced / "images").iterdir())
    assert [path.name for path in files[:2]] == ["000000.png", "000001.png"]
    np.testing.assert_array_equal(np.stack([np.asarray(Image.open(path)) for path in files]), images)


@pytest.mark.slow
def test_a_kind_of_generator_from_outside_trains_samples_and_is_scored(finished, tmp_path):
    config, inputs = "tests/end_to_end/neighbour_kind.py", inputs_of(finished.path)
    options = [*TINY, *inputs, "--config.training.num_steps=30"]
    done = call("pipeline", tmp_path / "run", *options, config=config)
    assert "grid of samples" in done.stdout
    lines = [json.loads(line) for line in metrics_text(tmp_path / "run").splitlines()]
    val = [line["val/token_loss"] for line in lines if "val/token_loss" in line]
    assert val[-1] < val[0] < np.log(64)
    (samples,) = (tmp_path / "run" / "samples").iterdir()
    images = np.load(samples / "samples.npz")["arr_0"]
    assert len(np.unique(images.reshape(20, -1), axis=0)) > 10
    # Image i depends on (seed, i) alone; a mesh makes the same ones, to the decoder's rounding.
    shutil.rmtree(samples)
    mesh = ["--config.mesh.fsdp=2", "--config.mesh.tensor=2", "--config.sampling.batch_size=4"]
    call("sample", tmp_path / "run", *options, *mesh, config=config, devices=4)
    assert np.abs(np.load(samples / "samples.npz")["arr_0"].astype(int) - images).max() <= 1
    # Where the kind is not known, it is named with those that are.
    refused = call("sample", tmp_path / "run", *TINY, *inputs, "--config.sampling.seed=1", check=False)
    assert "train is of the kind 'neighbour'; known here are autoregressive" in refused.stderr
    assert refused.returncode == 2


@pytest.mark.slow
def test_two_levels_of_clusters_are_a_value_in_the_config(finished, tmp_path):
    levels = ["--config.codebook.cluster_sizes=(4,16)", "--config.training.cluster_weights=(1.0,0.5)"]
    inputs = [f"--config.inputs.{name}={finished.path / name}" for name in ("tokenizer", "codes")]
    options = [*TINY, *inputs, *levels]
    call("pipeline", tmp_path / "run", *options)
    with np.load(tmp_path / "run" / "codebook" / "permutation.npz") as file:
        assert (int(file["cluster_size"]), file["coarser_sizes"].tolist()) == (4, [16])
    lines = [json.loads(line) for line in metrics_text(tmp_path / "run").splitlines()]
    for line in lines:
        if "train/loss" in line:
            total = line["train/token_loss"] + line["train/cluster_loss"] + 0.5 * line["train/cluster_loss_16"]
            np.testing.assert_allclose(line["train/loss"], total, rtol=1e-5)
            assert line["train/cluster_loss_16"] <= line["train/cluster_loss"]
    assert {"val/cluster_loss_16", "val/cluster_accuracy_16"} <= lines[-1].keys()
    # λ for each level of the codebook that is there.
    one = call("train", tmp_path / "other", *TINY, *inputs, f"--config.inputs.codebook={tmp_path / 'run' / 'codebook'}",
               check=False)  # fmt: skip
    assert "the codebook has 2 levels of clusters: give one weight for each" in one.stderr
    assert one.returncode == 2


@pytest.mark.slow
def test_a_decay_branches_off_a_stable_run_with_its_optimizer(finished, tmp_path):
    inputs = inputs_of(finished.path)
    stable = [*TINY, *inputs, "--config.training.schedule=constant", "--config.training.keep_checkpoints=9"]
    # The same in one go: constant for 10 steps, then down to zero in 6.
    decay = [
        *("--config.training.schedule=wsd", "--config.training.num_steps=16", "--config.training.decay_steps=6"),
        "--config.training.warmup_steps=5",
    ]
    warm = [*stable, "--config.training.warmup_steps=5"]
    call("train", tmp_path / "warm", *warm)
    call("train", tmp_path / "whole", *TINY, *inputs, *decay)
    branch = [f"--config.inputs.transformer={tmp_path / 'warm' / 'train'}", "--config.inputs.step=10"]
    output = call("train", tmp_path / "branch", *TINY, *inputs, *decay, *branch).stdout
    assert "its checkpoint of step 10" in output
    assert fingerprint(tmp_path / "branch" / "train") == fingerprint(tmp_path / "whole" / "train")
    ours = [line for line in metrics_text(tmp_path / "branch").splitlines() if '"step": 1' in line]
    assert ours == metrics_text(tmp_path / "whole").splitlines()[-len(ours) :]
    assert len(ours) >= 4
    # The branch is finished, and its source may lose the checkpoint.
    shutil.rmtree(tmp_path / "warm" / "train" / "checkpoints" / "10")
    assert "train: done" in call("train", tmp_path / "branch", *TINY, *inputs, *decay, *branch).stdout
    sampled = call("sample", tmp_path / "branch", *TINY, *inputs, *decay, *branch).stdout
    assert "0000016-" in sampled
    for step, message in ((7, "has no checkpoint of step 7; there are [20, 24]"), (24, "num_steps is 16")):
        refused = call("train", tmp_path / f"not-{step}", *TINY, *inputs, *decay, branch[0],
                       f"--config.inputs.step={step}", check=False)  # fmt: skip
        assert message in refused.stderr
        assert refused.returncode == 2
    refused = call("train", tmp_path / "nothing", *TINY, *inputs, branch[1], check=False)
    assert "config.inputs.step is set, and config.inputs.transformer, the run of that step, is not" in refused.stderr


@pytest.mark.slow
def test_processes_refuse_a_wrong_mesh_together(finished, tmp_path):
    started = start_processes(2, 1, tmp_path / "run", *TINY, *inputs_of(finished.path), "--config.mesh.fsdp=3")
    output, _ = started.communicate(timeout=60)
    assert started.returncode == 2, output
    assert "does not multiply up to the 2 devices" in output


def test_extraction_keeps_whole_shards_and_makes_the_others_again(finished, copy):
    directory = copy / "codes" / "train"
    shards = sorted(directory.glob("*.array_record"))
    kept = shards[0].stat().st_mtime_ns
    shards[2].rename(str(shards[2]) + ".partial")  # as a killed run leaves it
    metadata = json.loads((directory / "metadata.json").read_text())
    (directory / "metadata.json").write_text(json.dumps(metadata | {"finished": False, "fingerprint": ""}))
    call("extract_codes", copy, *TINY)
    assert shards[0].stat().st_mtime_ns == kept
    assert json.loads((directory / "metadata.json").read_text())["fingerprint"] == metadata["fingerprint"]


def test_samples_do_not_depend_on_the_batch_or_the_devices(finished, copy):
    (samples,) = (copy / "samples").iterdir()
    shutil.rmtree(samples)
    call("sample", copy, *TINY, "--config.sampling.batch_size=20", devices=4)
    expected = np.load(finished.path / "samples" / samples.name / "samples.npz")["arr_0"]
    # Codes are the same; the decoder's float32 convolutions may round another way and move a value by one.
    found = np.load(samples / "samples.npz")["arr_0"]
    assert np.abs(found.astype(int) - expected).max() <= 1


@pytest.mark.parametrize(
    ("stage", "override", "message"),
    [
        ("train_tokenizer", "--config.tokenizer_training.learning_rate=0.1", "learning_rate was 0.004, now 0.1"),
        ("train", "--config.training.cluster_weights=(0.5,)", "config.training.cluster_weights was [1.0], now [0.5]"),
        ("extract_codes", "--config.codes.crops=shifts", "config.codes.crops was 'center', now 'shifts'"),
    ],
)
def test_a_config_that_changed_behind_a_finished_stage_is_refused(finished, stage, override, message):
    done = call(stage, finished.path, *TINY, override, check=False)
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.returncode == 2


def test_artifacts_that_do_not_belong_together_are_refused(finished, copy, tmp_path):
    shutil.copytree(copy / "tokenizer", tmp_path / "other")
    path = tmp_path / "other" / "metadata.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"fingerprint": "0" * 64}))
    inputs = f"--config.inputs.tokenizer={tmp_path / 'other'}"
    shutil.rmtree(copy / "train")
    done = call("train", copy, *TINY, inputs, check=False)
    assert "was made from another tokenizer" in done.stderr
    assert done.returncode == 2
    done = call("rearrange_codebook", copy, *TINY, inputs, check=False)
    assert "was made from another tokenizer" in done.stderr


@pytest.mark.slow
def test_one_extraction_serves_another_run(finished, tmp_path):
    inputs = [f"--config.inputs.{name}={finished.path / name}" for name in ("tokenizer", "codebook", "codes")]
    call("train", tmp_path / "second", *TINY, *inputs, "--config.training.num_steps=2")
    assert not (tmp_path / "second" / "codes").exists()
    assert json.loads((tmp_path / "second" / "train" / "metadata.json").read_text())["finished"]


@pytest.mark.slow
def test_a_folder_of_pictures_of_all_kinds_goes_through_the_pipeline_on_a_mesh(tmp_path, golden):
    save_file(random_inception.state_dict(golden("inception_shapes.json")), tmp_path / "inception.safetensors")
    rng = np.random.default_rng(0)
    for name, mode in (("red", "RGB"), ("grey", "L"), ("clear", "RGBA")):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(8):
            size = (20 + i, 25)
            shape = (*size[::-1], {"RGB": 3, "RGBA": 4}.get(mode, 1))
            pixels = rng.integers(0, 256, shape, dtype=np.uint8).squeeze()
            suffix = ("png", "webp")[i % 2] if mode != "L" else ("png", "jpg")[i % 2]
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{i}.{suffix}")
    (tmp_path / "images" / "red" / "broken.jpg").write_bytes(b"\xff\xd8 broken")
    options = [o for o in TINY if not o.startswith(("--config.tokenizer.channels", "--config.sampling"))]
    done = call(
        "pipeline",
        tmp_path / "run",
        *options,
        "--config.data.resolution=16",
        "--config.tokenizer.channels=16",
        "--config.tokenizer_training.adversarial_weight=0.1",
        "--config.tokenizer_training.num_steps=18",
        "--config.tokenizer_training.batch_size=16",
        "--config.tokenizer_training.adversarial_from_step=16",
        "--config.tokenizer_training.discriminator_layers=2",
        "--config.tokenizer_training.discriminator_channels=16",
        "--config.training.num_steps=12",
        "--config.training.batch_size=16",
        "--config.evaluation.features=inception",
        f"--config.evaluation.inception_weights={tmp_path / 'inception.safetensors'}",
        "--config.tokenizer_training.entropy_weight=0.01",
        "--config.sampling.num_images=6",
        "--config.sampling.batch_size=8",
        "--config.evaluation.batch_size=8",
        "--config.mesh.fsdp=2",
        "--config.mesh.tensor=2",
        config=f"configs/folder.py:{tmp_path / 'images'}",
        devices=8,
    )
    assert "left out, not readable" in done.stdout
    assert "broken.jpg" in done.stdout
    assert "6 samples instead of 50,000" in done.stdout
    (scores,) = (tmp_path / "run" / "evaluation").glob("*.json")
    found = json.loads(scores.read_text())
    assert found["reference"]["split"] == "train"
    assert found["reference"]["statistics_of"] == 21
    assert set(found["scores"]) == {"real val images (the floor)", "reconstructions of them", "samples"}
    for figures in found["scores"].values():
        assert all(np.isfinite(figures[name]) for name in ("fid", "sfid", "inception_score", "kid"))
