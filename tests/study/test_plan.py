"""If these fail, arms that cannot be compared are compared, or a changed arm takes another's runs for its own."""

import pathlib

import pytest
from etils import epath

from iar_jax.config.field import leaves
from iar_jax.config.fields import SECTIONS
from iar_jax.config.files import config_at, config_beside
from iar_jax.runtime.errors import UserError
from iar_jax.study.drive import pieces_of
from iar_jax.study.plan import comparison_runs, lowest, plan_of, tuning_runs, twin_of

BASELINE = ("baseline", "training.cluster_weights=(0.0,)")
IAR = ("iar", "training.cluster_weights=(1.0,)")


@pytest.fixture
def config():
    config = config_beside("configs/studies/any.py", "mnist")
    config.study.arms = (BASELINE, IAR)
    config.study.learning_rates, config.study.cfg_scales = (), ()
    return config


def names(config, tmp_path):
    return [piece.name for piece in pieces_of(plan_of(config), epath.Path(tmp_path))]


STUDIES = sorted((pathlib.Path(__file__).parents[2] / "configs" / "studies").glob("*.py"))


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_shipped_studies_can_be_made(path, tmp_path):
    plan = plan_of(config_at(path, "mnist"))
    pieces = [piece.name for piece in pieces_of(plan, epath.Path(tmp_path))]
    assert all(f"{arm.name}/0" in pieces for arm in plan.arms)


def test_the_pieces_of_a_study(config, tmp_path):
    config.study.seeds, config.study.learning_rates = (0, 1), (1e-3, 2e-3)
    config.study.cfg_scales = (1.0, 2.0)
    assert names(config, tmp_path) == [
        "baseline/shared",
        "baseline/tuning-0.001-1000",
        "baseline/tuning-0.002-1000",
        "iar/tuning-0.001-1000",
        "iar/tuning-0.002-1000",
        "baseline/guidance",
        "iar/guidance",
        "baseline/0",
        "iar/0",
        "baseline/1",
        "iar/1",
    ]


def test_an_arm_that_trains_as_another_one_is_run_once(config, tmp_path):
    config.study.arms = (BASELINE, IAR, ("again", "training.cluster_weights=(0.0,)"))
    config.study.seeds, config.study.learning_rates = (3, 4), (1e-3, 2e-3)
    plan = plan_of(config)
    assert twin_of(plan, plan.arm("again")) == plan.arm("baseline")
    assert twin_of(plan, plan.arm("iar")) is None
    pieces = pieces_of(plan, epath.Path(tmp_path))
    assert [piece.name for piece in pieces if piece.name.startswith("again")] == ["again/3"]
    needs = next(piece.needs for piece in pieces if piece.name == "again/3")
    assert needs == ("baseline/tuning-0.001-1000", "baseline/tuning-0.002-1000")


def test_an_arm_that_is_only_sampled_otherwise_is_not_trained_again(config, tmp_path):
    other = "sampling.cfg_schedule=linear"
    config.study.arms = (
        BASELINE,
        IAR,
        ("linear", IAR[1], other),
        ("again", IAR[1], other),
        ("longer", IAR[1], "training.b2=0.9"),
    )
    config.study.seeds, config.study.cfg_scales = (0,), (1.0, 2.0)
    plan = plan_of(config)
    assert [arm.trained_as for arm in plan.arms] == ["baseline", "iar", "iar", "again", "longer"]
    (own,), (linear,) = (comparison_runs(plan, plan.arm(name), 1e-3, 1.5) for name in ("iar", "linear"))
    assert own.place == linear.place
    pieces = {piece.name: piece.needs for piece in pieces_of(plan, epath.Path(tmp_path))}
    assert not any(name.startswith("linear/tuning") for name in pieces)
    assert pieces["linear/guidance"] == pieces["iar/guidance"]
    assert pieces["linear/0"] == ("linear/guidance", "iar/0")


def test_another_partition_is_shared_by_those_that_have_it(config, tmp_path):
    config.study.arms = (
        BASELINE,
        IAR,
        ("random", "codebook.assignment=random"),
        ("large", "codebook.cluster_sizes=(32,)"),
    )
    assert [name for name in names(config, tmp_path) if name.endswith("shared")] == [
        "baseline/shared",
        "random/shared",
        "large/shared",
    ]


def test_a_changed_arm_has_other_runs_and_the_others_keep_theirs(config):
    def places(config):
        plan = plan_of(config)
        return {arm.name: comparison_runs(plan, arm, 1e-3, 1.5)[0].place for arm in plan.arms}

    before = places(config)
    config.study.arms = (BASELINE, ("iar", "training.cluster_weights=(0.5,)"))
    after = places(config)
    assert before["baseline"] == after["baseline"]
    assert before["iar"] != after["iar"]
    # What does not change the weights does not change the place.
    config.training.log_every, config.sampling.num_images = 7, 11
    assert places(config) == after


def test_a_field_that_a_later_version_adds_moves_no_run(config, monkeypatch):
    def place():
        (run, *_) = comparison_runs(plan_of(config), plan_of(config).arm("iar"), 1e-3, 1.5)
        return run.place

    now, fields = place(), list(leaves(SECTIONS))
    before = [(name, field) for name, field in fields if name != "training.label_smoothing"]
    monkeypatch.setattr("iar_jax.study.plan.leaves", lambda sections: before)
    assert place() == now
    config.training.label_smoothing = 0.1
    monkeypatch.undo()
    assert place() != now


def test_a_runs_seed_is_of_its_training_and_its_samples(config):
    plan = plan_of(config)
    runs = comparison_runs(plan, plan.arm("iar"), 2e-3, 1.75)
    assert [run.config.seed for run in runs] == [run.config.sampling.seed for run in runs] == [0, 1, 2]
    assert {run.config.training.learning_rate for run in runs} == {2e-3}
    assert {run.config.sampling.cfg_scale for run in runs} == {1.75}
    assert runs[0].arm.config.seed == config.seed


def test_groups_have_baselines_of_their_own(config):
    config.study.arms = tuple(
        (f"{codes}/{name}", f"tokenizer.codebook_size={codes}", override)
        for codes in (256, 512)
        for name, override in (BASELINE, IAR)
    )
    plan = plan_of(config)
    assert plan.baselines == {"256": "256/baseline", "512": "512/baseline"}


@pytest.mark.parametrize(
    ("arms", "words"),
    [
        ((), "config.study.arms is empty"),
        ((BASELINE, BASELINE), "has 'baseline' twice"),
        ((IAR,), "has 'iar', and no 'baseline'"),
        ((BASELINE, ("iar", "training.cluster_wieghts=(1.0,)")), "did you mean 'cluster_weights'"),
        (
            (BASELINE, ("iar", "training.cluster_weights=1")),
            "config.training.cluster_weights is '1'; allowed is a tuple",
        ),
        ((BASELINE, ("iar", "training.num_steps=many")), "config.training.num_steps is 'many'; allowed is an integer"),
        ((BASELINE, ("iar", "training")), "'training' is not section.field=value"),
        ((BASELINE, ("iar", "training=3")), "config.training is a section"),
        ((BASELINE, ("iar", "study.seeds=(1,)")), "is of the study as a whole"),
        ((BASELINE, ("iar", "codebook.cluster_sizes=(7,)")), "'iar': config.codebook.cluster_sizes"),
        ((BASELINE, ("../iar",)), "names are letters"),
        (
            (BASELINE, ("large", "tokenizer.codebook_size=1024")),
            r"'large' differs from 'baseline' in config.tokenizer.codebook_size \(512, 1024\)",
        ),
        (
            (BASELINE, ("long", "training.num_steps=5000")),
            "'long' differs from 'baseline' in config.training.num_steps",
        ),
    ],
)
def test_refused_arms(config, arms, words):
    config.study.arms = arms
    with pytest.raises(UserError, match=words):
        plan_of(config)


def test_seeds_that_tune_are_not_compared(config):
    config.study.tuning_seeds = (2, 1000)
    with pytest.raises(UserError, match=r"tuning_seeds has 2, which is one of config\.study\.seeds"):
        plan_of(config)


def test_no_such_config():
    with pytest.raises(UserError, match=r"there is no config 'minst'; .* with one of cifar10, fashion"):
        config_beside("configs/studies/ablation.py", "minst")


def test_the_lowest_mean_wins_and_the_smaller_of_equals():
    assert lowest([(2.0, 1.0), (1.0, 3.0), (1.0, 0.0), (2.0, 1.9)]) == 2.0
    assert lowest([(2.0, 1.0), (1.0, 1.0)]) == 1.0


def test_rates_are_tuned_on_every_tuning_seed(config):
    config.study.learning_rates, config.study.tuning_seeds = (1e-3,), (7, 8)
    arm = plan_of(config).arm("iar")
    assert [(run.learning_rate, run.config.seed) for run in tuning_runs(arm)] == [(1e-3, 7), (1e-3, 8)]
