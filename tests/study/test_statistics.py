"""If these fail, a study's intervals are too narrow, equal arms are called different, or steps are counted wrongly."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from iar_jax.study.statistics import holm, interval, ratio_interval, steps_ratio, steps_to_reach

STEPS = np.arange(50.0, 1001.0, 50.0)


def loss_curve(steps, rng, noise, speed=1.0):
    """A loss that falls as those of trainings do, `speed` times as fast; every run is a little off, as a whole and at
    each point."""
    return (
        3.0 + 4.0 * (1.0 + steps * speed / 100.0) ** -0.7 + noise * (rng.normal() + 0.3 * rng.normal(size=len(steps)))
    )


def ratios_of(rng, speed, seeds, noise):
    pairs = [(loss_curve(STEPS, rng, noise), loss_curve(STEPS, rng, noise, speed)) for _ in range(seeds)]
    return np.array([steps_ratio(STEPS, *pair) for pair in pairs])


@pytest.mark.parametrize("seeds", [3, 5])
def test_the_interval_holds_a_true_ratio_in_19_of_20_studies(seeds):
    rng, inside, studies = np.random.default_rng(0), 0, 200
    for _ in range(studies):
        found = ratio_interval(ratios_of(rng, 1.0 / 0.7, seeds, 0.003))
        inside += found.low <= 0.7 <= found.high
    # Binomial: 95 % of 200 less two standard deviations of 3.1.
    assert inside >= 0.95 * studies - 2 * 3.1


def test_equal_arms_are_called_different_in_one_study_of_20():
    rng, wrong, studies, arms = np.random.default_rng(1), 0, 200, 3
    for _ in range(studies):
        baseline = [loss_curve(STEPS, rng, 0.003) for _ in range(5)]
        p_values = []
        for _ in range(arms):
            curves = [loss_curve(STEPS, rng, 0.003) for _ in range(5)]
            ratios = np.array([steps_ratio(STEPS, *pair) for pair in zip(baseline, curves, strict=True)])
            p_values.append(ratio_interval(ratios).p)
        wrong += min(holm(p_values)) < 0.05
    assert wrong <= 0.05 * studies + 2 * 3.1


def test_an_interval_is_students():
    values = np.array([0.2, -0.1, 0.4, 0.3])
    found = interval(values)
    reference = stats.ttest_1samp(values, 0.0)
    low, high = reference.confidence_interval(0.95)
    assert (found.mean, found.seeds, found.agree) == (pytest.approx(0.2), 4, 3)
    assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))
    assert found.p == pytest.approx(reference.pvalue)


def test_one_seed_has_no_interval():
    found = ratio_interval(np.array([0.8]))
    assert found.mean == pytest.approx(0.8)
    assert (found.low, found.high, found.p, found.seeds) == (None, None, None, 1)


def test_equal_runs_differ_by_nothing():
    curve = loss_curve(STEPS, np.random.default_rng(2), 0.0)
    found = ratio_interval(np.array([steps_ratio(STEPS, curve, curve)] * 3))
    assert (found.mean, found.low, found.high, found.p) == (1.0, 1.0, 1.0, 1.0)


def test_steps_are_counted_on_straight_lines():
    steps, values = np.array([100.0, 200.0, 300.0]), np.array([3.0, 2.0, 1.0])
    assert steps_to_reach(steps, values, 1.5) == 250.0
    assert steps_to_reach(steps, values, 2.0) == 200.0
    assert steps_to_reach(steps, values, 5.0) == 100.0
    assert steps_to_reach(steps, values, 0.5) is None
    # The first time counts, whatever comes after.
    assert steps_to_reach(steps, np.array([3.0, 1.0, 2.0]), 2.0) == 150.0


def test_a_worse_curve_takes_more_than_the_baselines_steps():
    baseline, worse = np.array([3.0, 2.0, 1.0]), np.array([3.5, 3.0, 2.0])
    steps = np.array([100.0, 200.0, 300.0])
    assert steps_ratio(steps, baseline, worse) == 300.0 / 200.0
    assert steps_ratio(steps, worse, baseline) == 200.0 / 300.0


def test_a_loss_that_turns_counts_to_its_lowest():
    """Its last value may be one that both have at the first validation."""
    steps = np.array([100.0, 200.0, 300.0, 400.0])
    baseline, better = np.array([3.0, 2.0, 1.0, 3.5]), np.array([2.0, 1.0, 0.5, 3.0])
    assert steps_ratio(steps, baseline, better) == 200.0 / 300.0
    assert steps_ratio(steps, better, baseline) == 300.0 / 200.0


def test_a_loss_that_is_no_number_has_no_ratio():
    with pytest.raises(ValueError, match="not a number"):
        steps_ratio(np.array([1.0, 2.0]), np.array([3.0, 2.0]), np.array([np.nan, np.nan]))


@given(st.integers(0, 500))
def test_exchanging_the_arms_inverts_the_ratio(seed):
    rng = np.random.default_rng(seed)
    first, second = rng.uniform(size=(2, 6))
    steps = np.arange(1.0, 7.0)
    assert steps_ratio(steps, first, second) * steps_ratio(steps, second, first) == pytest.approx(1.0)


@given(st.lists(st.floats(0.0, 1.0), min_size=1, max_size=6))
def test_holms_correction(p_values):
    corrected = holm(p_values)
    assert all(p <= c <= min(1.0, len(p_values) * p) + 1e-12 for p, c in zip(p_values, corrected, strict=True))
    assert min(corrected) == pytest.approx(min(1.0, len(p_values) * min(p_values)))
    order = np.argsort(p_values, kind="stable")
    assert np.all(np.diff(np.array(corrected)[order]) >= 0.0)


def test_values_that_are_not_known_do_not_count_in_a_correction():
    assert holm([0.01, None, 0.04]) == [pytest.approx(0.02), None, pytest.approx(0.04)]
    assert holm([]) == []
