"""If these fail, a run that diverged, or was damaged, keeps its arm from an answer."""

import json
import math

import pytest
from etils import epath

from iar_jax.config.files import config_beside
from iar_jax.config.relevance import relevant
from iar_jax.runtime import artifacts
from iar_jax.runtime.errors import UserError
from iar_jax.runtime.files import write_json
from iar_jax.study import make
from iar_jax.study.answer import chosen
from iar_jax.study.page import tuning_table
from iar_jax.study.plan import TRAINED, plan_of, tuning_runs


@pytest.fixture
def tuned_arm(tmp_path):
    """An arm with a finished tuning run of the lower rate, and one of the higher that diverged."""
    config = config_beside("configs/studies/any.py", "mnist")
    config.study.arms = (("baseline", "training.cluster_weights=(0.0,)"), ("iar", "training.cluster_weights=(1.0,)"))
    config.study.learning_rates, config.study.cfg_scales = (1e-3, 1e30), ()
    arm = plan_of(config).arms[0]
    sound, diverged = (epath.Path(tmp_path) / "runs" / run.place for run in tuning_runs(arm))
    artifacts.begin(sound / "train", "train", relevant(config, TRAINED), {})
    artifacts.finish(sound / "train", "0", {"token_loss": 1.5, "seconds": 3.0})
    write_json(diverged / make.DIVERGED_FILE, {"error": "loss not finite"})
    return arm, sound


def test_a_rate_that_diverged_is_the_worst_one(tuned_arm, tmp_path):
    arm, _ = tuned_arm
    found = make.tuned(arm, epath.Path(tmp_path))
    assert found.learning_rate == 1e-3
    assert found.seconds == 3.0
    assert [value for _, _, value in found.rates] == [1.5, math.inf]
    told = chosen(arm, epath.Path(tmp_path))
    assert json.loads(json.dumps(told, allow_nan=False))["rates"][1] == [1e30, 1000, None]
    assert tuning_table({"baseline": {"chosen": told}}).rows[0][2] == "0.001: 1.5000, 1e+30: diverged"


def test_a_rate_that_diverged_with_one_of_its_seeds_is_not_chosen(tuned_arm, tmp_path):
    arm, sound = tuned_arm
    arm.config.study.tuning_seeds = (1000, 1001)
    for run in tuning_runs(arm):
        directory = epath.Path(tmp_path) / "runs" / run.place
        if directory != sound:
            write_json(directory / make.DIVERGED_FILE, {"error": "loss not finite"})
    with pytest.raises(UserError, match=r"not finite at any of the learning rates 0\.001, 1e\+30; give lower ones"):
        make.tuned(arm, epath.Path(tmp_path))


def test_a_damaged_tuning_run_is_one_that_is_not_finished(tuned_arm, tmp_path, capsys):
    arm, sound = tuned_arm
    for name in (artifacts.METADATA_FILE, artifacts.COPY_FILE):
        (sound / "train" / name).write_text("{")
    with pytest.raises(make.Unfinished, match=r"baseline/tuning-0\.001-1000 is not finished"):
        make.tuned(arm, epath.Path(tmp_path))
    assert "is damaged" in "".join(capsys.readouterr())
