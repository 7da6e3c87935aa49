"""If these fail, users see stack traces, or scripts can't tell a mistake from a crash."""

import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]


def call(*arguments, workdir):
    return subprocess.run(
        [sys.executable, "-m", "iar_jax.train", f"--workdir={workdir}", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.model.dmi=3"], "config.model.dmi: no such field; did you mean 'dim'?"),
        (["--config.sampling.clusterweight=1"], "did you mean 'config.training.cluster_weights'?"),
        (["--config.model.dim=wide"], "config.model.dim is 'wide'; allowed is an integer, such as 768"),
        (
            ["--config.model=3"],
            "config.model is a section; set one of its fields: attention, attention_block, class_dropout_rate, ",
        ),
        (["--config.model.remat=perhaps"], "config.model.remat is 'perhaps'; allowed are 'none', 'layer', 'dots'"),
        (["--config.codebook.cluster_sizes=(100,)"], "config.codebook.cluster_sizes is (100,): 100 does not divide"),
        (["--config.codebook.cluster_size=16"], "cluster_size: no such field; did you mean 'cluster_sizes'?"),
        (["--nonsense=3"], "nonsense"),
        (["--config.model.dim", "wide"], "config.model.dim is 'wide'; allowed is an integer, such as 768"),
        (["--config.seed", "4294967296"], "config.seed is 4294967296; allowed are integers from 0 to 4294967295"),
        ([f"--config.sampling.seed={2**63}"], f"config.sampling.seed is {2**63}; allowed are integers from 0 to"),
        ([f"--config.training.num_steps={2**63}"], f"is {2**63}; allowed are integers from 1 on (below 2^31)"),
        (["--config.seed", "4294967295"], "tokenizer is not there; run python -m iar_jax.train_tokenizer first"),
        (["stray"], "'stray' is not an option"),
        ([], "tokenizer is not there; run python -m iar_jax.train_tokenizer first"),
    ],
)
def test_mistakes_get_one_message_and_exit_code_2(tmp_path, arguments, message):
    done = call("--config=configs/mnist.py", *arguments, workdir=tmp_path)
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_options_and_values_may_be_words_of_their_own(tmp_path):
    command = [sys.executable, "-m", "iar_jax.train", "--config", "configs/mnist.py", "--workdir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert f"{tmp_path}/tokenizer is not there" in done.stderr
    assert done.returncode == 2


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("configs/mnist.py:basline", "the argument can be 'baseline'"),
        ("configs/nowhere.py", "configs/nowhere.py"),
        ("configs/folder.py", "configs/folder.py:/path/to/images"),
    ],
)
def test_wrong_configs_get_one_message(tmp_path, config, message):
    done = call(f"--config={config}", workdir=tmp_path)
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.returncode == 2


def test_the_resolved_config_is_written(tmp_path):
    call("--config=configs/mnist.py", "--config.model.dim=64", workdir=tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model"]["dim"] == 64


def test_a_workdir_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    done = call("--config=configs/mnist.py", workdir=tmp_path / "file" / "run")
    assert "cannot be written" in done.stderr
    assert done.returncode == 2


def test_of_two_overrides_of_a_field_the_last_one_holds(tmp_path):
    both = ("--config.codebook.cluster_sizes=4", "--config.codebook.cluster_sizes=8", "--config.model.dim=64")
    call("--config=configs/mnist.py", *both, "--config.model.dim=32", workdir=tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert (written["codebook"]["cluster_sizes"], written["model"]["dim"]) == ([8], 32)


def test_help_lists_the_fields_that_a_stage_reads(tmp_path):
    done = call("--help", workdir=tmp_path)
    assert done.returncode == 0
    assert "config.inputs.transformer names a finished transformer" in done.stdout
    assert "--config.training.schedule=constant" in done.stdout
    assert "Allowed: 'constant', 'cosine', 'linear', 'wsd'." in " ".join(done.stdout.split())
    assert "--config.codebook." not in done.stdout
    assert "--config.sampling." not in done.stdout
    assert not list(tmp_path.iterdir())
