"""If these fail, artifacts that don't belong together are mixed, or half an artifact is taken for a whole one."""

import json

import numpy as np
import pytest
from etils import epath

from iar_jax.config.fields import default_config
from iar_jax.runtime import artifacts
from iar_jax.runtime.errors import UserError

CONFIG = {"training": {"num_steps": 3, "rates": [1, 2], "schedule": "cosine", "log_every": 1}}


def made(tmp_path, config=CONFIG, inputs=None):
    directory = epath.Path(tmp_path) / "train"
    artifacts.begin(directory, "train", config, inputs or {"codes": "a" * 64})
    return directory


def test_an_artifact_is_there_when_it_is_finished_and_not_before(tmp_path):
    directory = made(tmp_path)
    with pytest.raises(UserError, match=r"train is not finished; run python -m iar_jax.train first"):
        artifacts.require(directory, "train")
    artifacts.finish(directory, "f", {"loss": 1.0})
    assert artifacts.require(directory, "train").figures == {"loss": 1.0}
    assert artifacts.begin(directory, "train", CONFIG, {"codes": "a" * 64}).fingerprint == "f"
    with pytest.raises(UserError, match="was made by the stage train; one made by sample is needed"):
        artifacts.require(directory, "sample")
    with pytest.raises(UserError, match="is not there"):
        artifacts.require(directory / "nowhere", "train")


@pytest.mark.parametrize("finish", [False, True])
def test_a_config_that_changed_is_refused_with_the_differences(tmp_path, finish):
    directory = made(tmp_path)
    if finish:
        artifacts.finish(directory, "f", {})
    changed = {"training": CONFIG["training"] | {"num_steps": 4}}
    with pytest.raises(UserError, match=r"config.training.num_steps was 3, now 4"):
        artifacts.begin(directory, "train", changed, {"codes": "a" * 64})


def test_other_inputs_are_refused(tmp_path):
    directory = made(tmp_path)
    with pytest.raises(UserError, match=r"was made from another codes \(aaaaaaaaaaaa\) than .* \(bbbbbbbbbbbb\)"):
        artifacts.begin(directory, "train", CONFIG, {"codes": "b" * 64})


@pytest.mark.parametrize("finish", [False, True])
def test_fields_that_make_no_difference_may_change_and_that_is_noted(tmp_path, capsys, finish):
    directory = made(tmp_path)
    if finish:
        artifacts.finish(directory, "f", {})
    changed = {"training": CONFIG["training"] | {"log_every": 7}}
    assert bool(artifacts.begin(directory, "train", changed, {})) == finish
    noted = "train: noted, config.training.log_every was 1, now 7" in capsys.readouterr().out
    assert noted != finish


def test_every_immaterial_field_is_one_of_the_config():
    config = default_config()
    for field in artifacts.IMMATERIAL_FIELDS:
        section, name = field.split(".")
        assert name in config[section], field


def test_with_constant_schedules_a_run_may_get_longer(tmp_path, capsys):
    constant = {"training": CONFIG["training"] | {"schedule": "constant"}}
    directory = made(tmp_path, constant)
    for num_steps in (5, 4):  # while it runs, also shorter
        changed = {"training": constant["training"] | {"num_steps": num_steps}}
        assert artifacts.begin(directory, "train", changed, {}) is None
        assert f"now {num_steps}" in capsys.readouterr().out
    artifacts.finish(directory, "f", {})
    with pytest.raises(UserError, match="num_steps was 4, now 3"):
        artifacts.begin(directory, "train", constant, {})
    assert artifacts.begin(directory, "train", {"training": constant["training"] | {"num_steps": 9}}, {}) is None
    with pytest.raises(UserError, match="is not finished"):
        artifacts.require(directory, "train")


def test_damaged_metadata_and_later_formats_are_refused(tmp_path):
    directory = made(tmp_path)
    path = directory / "metadata.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"format_version": 99}))
    with pytest.raises(UserError, match="has format version 99; this program reads 1"):
        artifacts.read_metadata(directory)
    path.write_text(path.read_text()[:40])
    with pytest.raises(UserError, match="is damaged"):
        artifacts.read_metadata(directory)


def test_fingerprints_see_values_shapes_and_names():
    base = {"a": np.arange(6, dtype=np.float32)}
    same = artifacts.fingerprint_arrays({"a": np.arange(6, dtype=np.float32)})
    assert artifacts.fingerprint_arrays(base) == same
    others = [{"b": base["a"]}, {"a": base["a"].reshape(2, 3)}, {"a": base["a"].astype("f8")}, {"a": base["a"] + 1e-6}]
    assert same not in {artifacts.fingerprint_arrays(other) for other in others}
