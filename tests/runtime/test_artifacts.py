"""If these fail, artifacts that don't belong together are mixed, or half an artifact is taken for a whole one."""

import json

import numpy as np
import pytest
from etils import epath
from ml_collections import ConfigDict

from iar_jax.config.fields import defaults
from iar_jax.config.relevance import RelevantConfig, relevant
from iar_jax.runtime import artifacts
from iar_jax.runtime.errors import UserError

CONFIG = {"training": defaults("training") | {"num_steps": 3, "schedule": "cosine", "log_every": 1}}


def changed(**fields):
    return {"training": CONFIG["training"] | fields}


def begin(directory, config=CONFIG, inputs=None):
    return artifacts.begin(
        directory,
        "train",
        relevant(ConfigDict(config), ("training",)),
        {"codes": "a" * 64} if inputs is None else inputs,
    )


def made(tmp_path, config=CONFIG, steps_done=0):
    """An artifact that is begun, with a checkpoint at the steps that are done."""
    directory = epath.Path(tmp_path) / "train"
    begin(directory, config)
    if steps_done:
        (directory / "checkpoints" / str(steps_done)).mkdir(parents=True)
    return directory


def test_an_artifact_is_there_when_it_is_finished_and_not_before(tmp_path):
    directory = made(tmp_path)
    with pytest.raises(UserError, match=r"train is not finished; run python -m iar_jax.train first"):
        artifacts.require(directory, "train")
    artifacts.finish(directory, "f", {"loss": 1.0})
    assert artifacts.require(directory, "train").figures == {"loss": 1.0}
    assert begin(directory).fingerprint == "f"
    with pytest.raises(UserError, match="was made by the stage train; one made by sample is needed"):
        artifacts.require(directory, "sample")
    with pytest.raises(UserError, match="is not there"):
        artifacts.require(directory / "nowhere", "train")


@pytest.mark.parametrize("finish", [False, True])
def test_a_config_that_changed_is_refused_with_the_differences(tmp_path, finish):
    directory = made(tmp_path, steps_done=2)
    if finish:
        artifacts.finish(directory, "f", {})
    with pytest.raises(UserError, match=r"config.training.num_steps was 3, now 4\n"):
        begin(directory, changed(num_steps=4))
    with pytest.raises(UserError, match=r"config.training.weight_decay was 0.05, now 0.1\n"):
        begin(directory, changed(weight_decay=0.1))


def test_other_inputs_are_refused(tmp_path):
    directory = made(tmp_path)
    with pytest.raises(UserError, match=r"was made from another codes \(aaaaaaaaaaaa\) than .* \(bbbbbbbbbbbb\)"):
        begin(directory, inputs={"codes": "b" * 64})


@pytest.mark.parametrize("finish", [False, True])
def test_fields_that_make_no_difference_may_change_and_that_is_noted(tmp_path, capsys, finish):
    directory = made(tmp_path)
    if finish:
        artifacts.finish(directory, "f", {})
    assert bool(begin(directory, changed(log_every=7), {})) == finish
    noted = "train: noted, config.training.log_every was 1, now 7" in capsys.readouterr().out
    assert noted != finish


def test_a_field_that_came_with_a_later_version_was_at_its_default(tmp_path):
    directory = made(tmp_path, steps_done=2)
    path = directory / "metadata.json"
    content = json.loads(path.read_text())
    del content["config"]["training"]["decay_steps"], content["config"]["training"]["b2"]
    path.write_text(json.dumps(content))
    assert begin(directory) is None
    del content["config"]["training"]["b1"]
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"config.training.b1 was 0.9, now 0.8"):
        begin(directory, changed(b1=0.8))


def test_with_constant_schedules_a_run_may_get_longer(tmp_path, capsys):
    constant = CONFIG["training"] | {"schedule": "constant"}
    directory = made(tmp_path, {"training": constant}, steps_done=2)
    for num_steps in (5, 4):  # while it runs, also shorter
        assert begin(directory, {"training": constant | {"num_steps": num_steps}}) is None
        assert f"now {num_steps}" in capsys.readouterr().out
    with pytest.raises(UserError, match="num_steps was 4, now 1"):
        begin(directory, {"training": constant | {"num_steps": 1}})
    artifacts.finish(directory, "f", {})
    with pytest.raises(UserError, match="num_steps was 4, now 3"):
        begin(directory, {"training": constant})
    assert begin(directory, {"training": constant | {"num_steps": 9}}) is None
    with pytest.raises(UserError, match="is not finished"):
        artifacts.require(directory, "train")


def test_a_stable_run_may_be_lengthened_until_it_decays(tmp_path):
    stable = CONFIG["training"] | {"schedule": "wsd", "num_steps": 10, "decay_steps": 4}
    assert begin(made(tmp_path / "a", {"training": stable}, 6), {"training": stable | {"num_steps": 20}}) is None
    with pytest.raises(UserError, match="num_steps was 10, now 20"):
        begin(made(tmp_path / "b", {"training": stable}, 8), {"training": stable | {"num_steps": 20}})


def test_inputs_are_opened_where_they_lie_and_must_belong_together(tmp_path):
    workdir, other = epath.Path(tmp_path) / "run", epath.Path(tmp_path) / "other"

    def leave(directory, stage, fingerprint, **inputs):
        artifacts.begin(directory, stage, RelevantConfig({}), inputs)
        artifacts.finish(directory, fingerprint, {})

    given = dict.fromkeys(("tokenizer", "codebook", "codes", "transformer"), "")
    leave(workdir / "tokenizer", "train_tokenizer", "t1")
    with pytest.raises(UserError, match=r"codebook is not there; run python -m iar_jax\.rearrange_codebook first"):
        artifacts.open_inputs(given, workdir, "tokenizer", "codebook")
    leave(workdir / "codebook", "rearrange_codebook", "c1", tokenizer="t1")
    leave(other / "train", "extract_codes", "x1", tokenizer="t1", images="i")
    leave(other / "val", "extract_codes", "x2", tokenizer="t2", images="i")
    given["codes"] = str(other)
    found = artifacts.open_inputs(given, workdir, "tokenizer", "codebook", "codes")
    assert artifacts.fingerprints(found) == {"tokenizer": "t1", "codebook": "c1", "codes": "x1"}
    assert found["codes"].directory == other / "train"
    with pytest.raises(UserError, match=r"val was made from another tokenizer \(t2\) than .*tokenizer \(t1\); run"):
        artifacts.open_inputs(given, workdir, "tokenizer", "codes", "val_codes")


def test_metadata_of_the_first_format_is_read(tmp_path):
    content = {
        "format_version": 1,
        "stage": "train",
        "finished": True,
        "fingerprint": "f",
        "inputs": {},
        "config": {
            "model": {"dim": 8},
            "training": {"cluster_weight": 0.5, "cluster_weight_end": 0.0, "num_steps": 3},
        },
        "figures": {"facts": {"vocab_size": 64, "num_classes": 10, "grid_size": 8, "num_kv_heads": None}},
        "versions": {},
    }
    (tmp_path / "metadata.json").write_text(json.dumps(content))
    found = artifacts.read_metadata(epath.Path(tmp_path))
    assert found.figures["facts"] == {"vocab_size": 64, "num_classes": 10, "layout": [8]}
    assert found.config["model"] == {"dim": 8, "num_kv_heads": 0}
    assert found.config["training"] == {"cluster_weights": [0.5], "cluster_weights_end": [], "num_steps": 3}


def test_damaged_metadata_and_later_formats_are_refused(tmp_path):
    directory = made(tmp_path)
    path = directory / "metadata.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"format_version": 99}))
    with pytest.raises(UserError, match="has format version 99; this program reads 1 to 2"):
        artifacts.read_metadata(directory)
    path.write_text(path.read_text()[:40])
    (directory / "metadata.copy.json").unlink()
    with pytest.raises(UserError, match="is damaged"):
        artifacts.read_metadata(directory)
    with pytest.raises(
        UserError, match=r"is damaged .*; python -m iar_jax\.train makes it again from what else is there"
    ):
        artifacts.require(directory, "train")


def cut(text):
    return text[: len(text) // 2]


def flipped(text):
    return text.replace(b'"finished": false', b'"finishdd": false')


def other_value(text):
    return text.replace(b'"num_steps": 3', b'"num_steps": 7')


def without_inputs(text):
    return json.dumps({k: v for k, v in json.loads(text).items() if k != "inputs"}).encode()


def of_another_kind(text):
    return json.dumps(json.loads(text) | {"inputs": []}).encode()


@pytest.mark.parametrize(
    "damage", [cut, flipped, other_value, without_inputs, of_another_kind, lambda _: b"", lambda _: b"[]"]
)
def test_damaged_metadata_is_read_from_its_copy_and_put_back(tmp_path, capsys, damage):
    directory = made(tmp_path)
    path = directory / "metadata.json"
    whole, found = path.read_bytes(), artifacts.read_metadata(directory)
    assert damage(whole) != whole
    path.write_bytes(damage(whole))
    assert artifacts.read_metadata(directory) == found
    assert "is damaged" in capsys.readouterr().out
    assert begin(directory) is None
    assert path.read_bytes() == whole


def test_metadata_whose_copy_is_damaged_too_is_made_again_from_the_config(tmp_path, capsys):
    directory = made(tmp_path, steps_done=2)
    for name in ("metadata.json", "metadata.copy.json"):
        (directory / name).write_bytes(b"{}")
    assert begin(directory) is None
    assert "it is made again by this config" in capsys.readouterr().out
    assert artifacts.read_metadata(directory).config == json.loads(json.dumps(CONFIG))
    assert (directory / "checkpoints").exists()


def test_a_path_to_the_same_content_makes_no_other_artifact(tmp_path):
    directory, config = epath.Path(tmp_path) / "a", RelevantConfig({"data": {"source": "folder:/here"}})
    moved = RelevantConfig({"data": {"source": "folder:/there/"}})
    artifacts.begin(directory, "extract_codes", config, {"images": "abc"})
    artifacts.finish(directory, "f", {})
    assert artifacts.finished(directory, moved, {}, lambda: {"images": "abc"})
    for other in ({"images": "xyz"}, {}):
        with pytest.raises(UserError, match=r"config.data.source was 'folder:/here', now 'folder:/there/'"):
            artifacts.finished(directory, moved, {}, lambda other=other: other)


def test_what_another_host_has_written_is_waited_for(tmp_path, monkeypatch):
    path = epath.Path(tmp_path) / "metadata.json"
    monkeypatch.setattr(artifacts.distributed, "is_first", lambda: False)
    late = iter([None, None, lambda: path.write_bytes(b"old"), None, lambda: path.write_bytes(b"new")])
    monkeypatch.setattr(artifacts.time, "sleep", lambda _: (next(late) or (lambda: None))())
    artifacts.wait_until_seen(path, artifacts.digest_of(b"new"))
    assert path.read_bytes() == b"new"
    monkeypatch.setattr(artifacts.time, "sleep", lambda _: None)
    with pytest.raises(UserError, match="must be on a disk that all hosts share, or in a bucket"):
        artifacts.wait_until_seen(path, artifacts.digest_of(b"another"))


def test_fingerprints_see_values_shapes_and_names():
    base = {"a": np.arange(6, dtype=np.float32)}
    same = artifacts.fingerprint_arrays({"a": np.arange(6, dtype=np.float32)})
    assert artifacts.fingerprint_arrays(base) == same
    others = [{"b": base["a"]}, {"a": base["a"].reshape(2, 3)}, {"a": base["a"].astype("f8")}, {"a": base["a"] + 1e-6}]
    assert same not in {artifacts.fingerprint_arrays(other) for other in others}
