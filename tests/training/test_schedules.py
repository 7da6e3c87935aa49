"""If these fail, a rate is another than the config says, or a run goes on where it must not."""

import numpy as np
import pytest

from iar_jax.config.fields import defaults
from iar_jax.training.schedules import SCHEDULES, WEIGHT_SCHEDULES, differs_so_far, learning_rate_schedule


def test_rates_after_a_warm_up():
    cosine = learning_rate_schedule("cosine", 2.0, 10, 110)
    np.testing.assert_allclose([cosine(0), cosine(5), cosine(10), cosine(60), cosine(110)], [0, 1, 2, 1, 0], atol=1e-6)
    linear = learning_rate_schedule("linear", 2.0, 10, 110)
    np.testing.assert_allclose([linear(5), linear(10), linear(60), linear(110)], [1, 2, 1, 0], atol=1e-6)
    constant = learning_rate_schedule("constant", 2.0, 0, 100)
    assert constant(0) == constant(99) == 2.0
    wsd = learning_rate_schedule("wsd", 2.0, 10, 110, 40)
    np.testing.assert_allclose([wsd(s) for s in (5, 10, 70, 80, 90, 110)], [1, 2, 2, 1.5, 1, 0], atol=1e-6)


def test_lambda_over_the_steps():
    linear = WEIGHT_SCHEDULES["linear"](1.0, 0.0, 100)
    np.testing.assert_allclose([linear(0), linear(50), linear(100)], [1.0, 0.5, 0.0])
    cosine = WEIGHT_SCHEDULES["cosine"](2.0, 1.0, 100)
    np.testing.assert_allclose([cosine(0), cosine(50), cosine(100)], [2.0, 1.5, 1.0], atol=1e-6)
    constant = WEIGHT_SCHEDULES["constant"](0.7, 0.0, 100)
    np.testing.assert_allclose([constant(0), constant(99)], [0.7, 0.7])


def section(**fields):
    return defaults("training") | {"num_steps": 100, "warmup_steps": 10, **fields}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_run_gets_longer_where_no_step_so_far_would_have_been_another(schedule):
    old = section(schedule=schedule, decay_steps=20)
    longer = old | {"num_steps": 200}
    # wsd is stable up to step 80; the others but the constant one fall from the warm-up on.
    same_until = {"constant": 100, "wsd": 81, "cosine": 11, "linear": 11}[schedule]
    assert not differs_so_far(old, longer, same_until)
    if same_until < 100:
        assert differs_so_far(old, longer, same_until + 1)
        assert differs_so_far(old, longer, None)
    assert differs_so_far(old, old | {"num_steps": 60}, 70)


def test_a_stable_run_may_begin_to_decay_and_lambda_may_not_have_been_another():
    stable = section()
    assert not differs_so_far(stable, stable | {"schedule": "wsd", "decay_steps": 20}, 70)
    assert differs_so_far(stable, stable | {"schedule": "wsd", "decay_steps": 20}, 90)
    assert differs_so_far(stable, stable | {"cluster_weight_schedule": "linear"}, 5)
    assert not differs_so_far(stable, stable | {"cluster_weight_schedule": "linear"}, 1)


@pytest.mark.parametrize("field", ["schedule", "cluster_weight_schedule"])
def test_a_schedule_that_is_not_known_here_is_a_difference(field):
    assert differs_so_far(section(**{field: "of_another_config"}), section(), 5)
