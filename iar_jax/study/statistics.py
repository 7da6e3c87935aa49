"""What curves of several seeds say: intervals, pairs, and steps to reach a value. Pure functions of arrays."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import stats

CONFIDENCE = 0.95
SIGNIFICANT = 0.05


class Interval(NamedTuple):
    """A mean with its interval over seeds, which is None where there is one seed.

    Attributes:
        seeds: how many.
        agree: how many lie on the mean's side of no difference.
        p: of no difference, two-sided; None where there is one seed.
    """

    mean: float
    low: float | None
    high: float | None
    seeds: int
    agree: int
    p: float | None


def interval(values: Float[np.ndarray, " seeds"]) -> Interval:
    """The mean of values, one a seed, with Student's interval, and the test that it is 0.

    A percentile bootstrap over so few seeds is too narrow: of five normal values it holds the true mean in 84 % of the
    cases, of three in 76 %; this one in 95 %.
    """
    values = np.asarray(values, np.float64)
    mean, count = float(np.mean(values)), len(values)
    agree = int(np.sum(np.sign(values) == np.sign(mean)))
    if count < 2:
        return Interval(mean, None, None, count, agree, None)
    error = float(np.std(values, ddof=1)) / np.sqrt(count)
    half = float(stats.t.ppf(0.5 + CONFIDENCE / 2, count - 1)) * error
    if error:
        p = float(2 * stats.t.sf(abs(mean) / error, count - 1))
    else:
        p = 1.0 if mean == 0.0 else 0.0
    return Interval(mean, mean - half, mean + half, count, agree, p)


def ratio_interval(ratios: Float[np.ndarray, " seeds"]) -> Interval:
    """As `interval`, of positive ratios: of their logarithms, and back. No difference is 1."""
    found = interval(np.log(ratios))
    low, high = (None if end is None else float(np.exp(end)) for end in (found.low, found.high))
    return found._replace(mean=float(np.exp(found.mean)), low=low, high=high)


def steps_to_reach(
    steps: Float[np.ndarray, " points"], values: Float[np.ndarray, " points"], target: float
) -> float | None:
    """The step at which a curve of losses first comes down to a value, on straight lines between its points; the first
    point's step where it begins below, and None where it never comes there."""
    below = np.flatnonzero(np.asarray(values) <= target)
    if not len(below):
        return None
    last = int(below[0])
    if last == 0:
        return float(steps[0])
    share = (values[last - 1] - target) / (values[last - 1] - values[last])
    return float(steps[last - 1] + share * (steps[last] - steps[last - 1]))


def steps_ratio(
    steps: Float[np.ndarray, " points"],
    baseline: Float[np.ndarray, " points"],
    curve: Float[np.ndarray, " points"],
) -> float:
    """Steps that a curve takes to the baseline's lowest value, over the baseline's own. That is its last value unless
    its loss turns, as it does after many epochs.

    A curve that never comes down so far does not say when it would have. Both are then counted to that curve's own
    lowest value, and the ratio is above 1.

    Raises:
        ValueError: a value is not a number.
    """
    target = max(float(np.min(baseline)), float(np.min(curve)))
    reached, own = steps_to_reach(steps, curve, target), steps_to_reach(steps, baseline, target)
    if reached is None or own is None:
        raise ValueError("a loss is not a number")
    return reached / own


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """p-values corrected for how many there are (Holm's method); those that are None do not count."""
    known = sorted((p, place) for place, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    least = 0.0
    for rank, (p, place) in enumerate(known):
        least = max(least, min(1.0, (len(known) - rank) * p))
        corrected[place] = least
    return corrected
