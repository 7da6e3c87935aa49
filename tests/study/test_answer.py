"""If these fail, a study says of an arm what its runs do not show."""

from iar_jax.study.answer import verdict

NOTHING_TO_COMPARE = {"seeds": [0], "steps_ratio": None, "scores": {"frechet_distance": {"mean": 3.0}}}


def test_an_arm_whose_baseline_is_not_finished_is_not_called_the_baseline():
    assert verdict(NOTHING_TO_COMPARE | {"name": "baseline"}, "token_loss", "baseline") == "the baseline"
    assert verdict(NOTHING_TO_COMPARE | {"name": "iar"}, "token_loss", "baseline") == "to be compared with baseline"


def test_an_arm_that_is_only_sampled_otherwise_is_told_by_its_samples():
    difference = {"mean": -1.5, "low": -2.0, "high": -1.0, "seeds": 5, "agree": 5, "corrected_p": 0.01}
    arm = {
        "name": "linear",
        "seeds": [0],
        "steps_ratio": None,
        "scores": {"frechet_distance": {"difference": difference}},
    }
    said = verdict(arm, "token_loss", "iar")
    assert said == "-1.50 (-2.00 to -1.00) to the Fréchet distance of the baseline's samples, on 5 of 5 seeds"
