"""What the runs of a study show together, as plain data: the content of study.json."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from iar_jax.study import make
from iar_jax.study.judge import SCORES
from iar_jax.study.plan import Arm, Plan, comparison_runs, twin_of
from iar_jax.study.statistics import CONFIDENCE, SIGNIFICANT, holm, interval, ratio_interval, steps_ratio

# Sums that other numbers of cores share end in other bits, which a training of some thousand steps makes larger.
ROUNDING = 1e-4

Results = dict[int, dict[str, Any]]


def answer(plan: Plan, workdir: epath.Path) -> dict[str, Any]:
    """Every arm with its curves, scores and cost, beside the baseline of its group. Runs that are not finished are left
    out; pairs are of the seeds that both arms have."""
    results = {arm.name: results_of(plan, arm, workdir) for arm in plan.arms}
    section = plan.arms[0].config.study
    arms = {arm.name: told(plan, arm, results, workdir) for arm in plan.arms}
    for group in plan.baselines:
        correct([arms[arm.name] for arm in plan.arms if arm.group == group])
    for arm in plan.arms:
        arms[arm.name]["verdict"] = verdict(arms[arm.name], section.criterion, plan.baselines[arm.group])
    return {
        "criterion": section.criterion,
        "confidence": CONFIDENCE,
        "seeds": list(section.seeds),
        "tuning_seeds": list(section.tuning_seeds),
        "learning_rates": list(section.learning_rates),
        "cfg_scales": list(section.cfg_scales),
        "baselines": plan.baselines,
        "arms": arms,
        "perturbed": perturbed(plan, workdir),
        "machine_seconds": sum(arm["seconds"] for arm in arms.values()),
        "config": plan.arms[0].config.to_dict(),
    }


def perturbed(plan: Plan, workdir: epath.Path) -> dict[str, Any]:
    """What replaced codes cost, by the first arm that has a partition."""
    found: dict[str, Any] = {}
    seen = set()
    for arm in plan.arms:
        path, rows = make.perturbed_path(arm.config, workdir), make.perturbed_of(arm.config, workdir)
        if rows is not None and path not in seen:
            found[arm.name] = rows
        seen.add(path)
    return found


def results_of(plan: Plan, arm: Arm, workdir: epath.Path) -> Results:
    """What was measured of the finished runs of an arm, by seed."""
    try:
        found = make.tuned(twin_of(plan, arm) or arm, workdir)
    except make.Unfinished:
        return {}
    runs = comparison_runs(plan, arm, found.learning_rate, found.cfg_scale)
    measured = {run.seed: make.result_of(run, workdir) for run in runs}
    return {seed: result for seed, result in measured.items() if result is not None}


def told(plan: Plan, arm: Arm, results: dict[str, Results], workdir: epath.Path) -> dict[str, Any]:
    """An arm by itself and against its baseline."""
    own, others = results[arm.name], results[plan.baselines[arm.group]]
    criterion = arm.config.study.criterion
    twin = twin_of(plan, arm)
    content: dict[str, Any] = {
        "name": arm.name,
        "overrides": list(arm.overrides),
        "trained_as": arm.trained_as,
        "seeds": sorted(own),
        "chosen": chosen(twin or arm, workdir),
        "seconds": seconds_of(arm, own, workdir),
        "steps_ratio": None,
        "curves": {},
        "scores": {},
    }
    if not own:
        return content
    first = own[min(own)]
    content |= {
        "num_params": first["num_params"],
        "training_seconds": float(np.mean([result["training_seconds"] for result in own.values()])),
        "grid": first["grid"],
        "curves": curves(own, others, comparable(plan, arm)),
        "scores": scores(own, others),
        "runs": {str(seed): without_grid(result) for seed, result in own.items()},
    }
    if twin is not None:
        difference = largest_difference(own, results[twin.name])
        content["equal_to"] = {"arm": twin.name, "largest_difference": difference}
    elif others and arm.trained_as != plan.baselines[arm.group]:
        content["steps_ratio"] = ratio(own, others, criterion)
    return content


def comparable(plan: Plan, arm: Arm) -> bool:
    """Whether cluster losses of an arm are of its baseline's clusters."""
    baseline = plan.arm(plan.baselines[arm.group])
    return arm.config.codebook.to_dict() == baseline.config.codebook.to_dict()


def without_grid(result: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in result.items() if name != "grid"}


def seconds_of(arm: Arm, own: Results, workdir: epath.Path) -> float:
    """Of training and measuring, with the runs that tuned; what another arm trained is that one's."""
    try:
        tuning = make.tuned(arm, workdir).seconds
    except make.Unfinished:
        tuning = 0.0
    training = sum(result["training_seconds"] for result in own.values()) if arm.trained_as == arm.name else 0.0
    return tuning + training + sum(result["measuring_seconds"] for result in own.values())


def chosen(arm: Arm, workdir: epath.Path) -> dict[str, Any] | None:
    """Rate and guidance of an arm, and what they were chosen from (None where a run diverged); None before they are."""
    try:
        found = make.tuned(arm, workdir)
    except make.Unfinished:
        return None
    rates = [(rate, seed, value if math.isfinite(value) else None) for rate, seed, value in found.rates]
    return {**found._asdict(), "rates": rates, "rate_at_edge": found.at_edge()}


def largest_difference(own: Results, others: Results) -> float | None:
    """Between figures of runs with equal seeds, as a share of them; None where there is no such pair."""
    both = own.keys() & others.keys()
    pairs = [(own[seed][name], others[seed][name]) for seed in both for name in ("validation", "samples", "scores")]
    return max((apart(*pair) for pair in pairs), default=None)


def apart(first: Any, second: Any) -> float:
    """The largest difference between the numbers of two trees of equal shape, as a share; infinite for other shapes."""
    if isinstance(first, dict) and isinstance(second, dict) and first.keys() == second.keys():
        return max((apart(first[key], second[key]) for key in first), default=0.0)
    if isinstance(first, list) and isinstance(second, list) and len(first) == len(second):
        return max((apart(*pair) for pair in zip(first, second, strict=True)), default=0.0)
    if first == second:
        return 0.0
    if isinstance(first, (int, float)) and isinstance(second, (int, float)):
        return abs(first - second) / max(abs(first), abs(second))
    return float("inf")


def points(results: Sequence[dict[str, Any]], name: str) -> tuple[list[int], np.ndarray] | None:
    """Steps and values [seeds, steps] of a curve on val, or of the samples' scores; None where a run has none."""
    kind = "samples" if name in SCORES else "validation"
    rows = [[line for line in result[kind] if line.get(name) is not None] for result in results]
    steps = [[int(line["step"]) for line in row] for row in rows]
    if not steps or not steps[0] or any(other != steps[0] for other in steps):
        return None
    return steps[0], np.array([[float(line[name]) for line in row] for row in rows])


def curves(own: Results, others: Results, same_clusters: bool) -> dict[str, Any]:
    """Mean and interval over seeds at each step; and of the differences to the baseline, seed by seed."""
    found: dict[str, Any] = {}
    losses = [name for name in own[min(own)]["validation"][-1] if "_loss" in name]
    for name in (*losses, *SCORES):
        curve = points(list(own.values()), name)
        if curve is None:
            continue
        steps, values = curve
        found[name] = {"steps": steps, **bands(values)}
        both = sorted(own.keys() & others.keys()) if same_clusters or "cluster_loss" not in name else []
        pair = [points([results[seed] for seed in both], name) for results in (own, others)]
        if both and own is not others and pair[0] is not None and pair[1] is not None and pair[0][0] == pair[1][0]:
            found[name]["difference"] = bands(pair[0][1] - pair[1][1])
    return found


def bands(values: np.ndarray) -> dict[str, list[float | None]]:
    """Intervals over seeds [seeds, steps], as columns."""
    found = [interval(column) for column in values.T]
    return {
        "mean": [point.mean for point in found],
        "low": [point.low for point in found],
        "high": [point.high for point in found],
    }


def ratio(own: Results, others: Results, criterion: str) -> dict[str, Any] | None:
    """Steps to the baseline's lowest value of the criterion, over the baseline's, seed by seed."""
    both = sorted(own.keys() & others.keys())
    curve, baseline = (points([results[seed] for seed in both], criterion) for results in (own, others))
    if not both or curve is None or baseline is None:
        return None
    steps = np.array(curve[0], float)
    ratios = np.array([steps_ratio(steps, *rows) for rows in zip(baseline[1], curve[1], strict=True)])
    return ratio_interval(ratios)._asdict() | {"of_seeds": ratios.tolist()}


def scores(own: Results, others: Results) -> dict[str, Any]:
    """The last scores and losses, and their differences to the baseline's, seed by seed."""
    found = {}
    for name in (*SCORES, "token_loss"):
        values = {seed: last(result, name) for seed, result in own.items()}
        if any(value is None for value in values.values()):
            continue
        found[name] = interval(np.array([values[seed] for seed in sorted(values)]))._asdict()
        del found[name]["p"], found[name]["agree"]
        both = sorted(own.keys() & others.keys())
        differences = [values[seed] - last(others[seed], name) for seed in both]
        if both and own is not others:
            found[name]["difference"] = interval(np.array(differences))._asdict()
    return found


def last(result: dict[str, Any], name: str) -> Any:
    """The last value of a score, or of a curve on val."""
    return result["scores"][name] if name in SCORES else result["validation"][-1][name]


def correct(arms: list[dict[str, Any]]) -> None:
    """Adds p-values corrected for the number of arms that are compared with one baseline, for each thing compared."""
    ratios = [arm["steps_ratio"] for arm in arms if arm["steps_ratio"]]
    named = [[arm["scores"].get(name, {}).get("difference") for arm in arms] for name in (*SCORES, "token_loss")]
    for row in (ratios, *([found for found in differences if found] for differences in named)):
        for found, p in zip(row, holm([found["p"] for found in row]), strict=True):
            found["corrected_p"] = p


def verdict(arm: dict[str, Any], criterion: str, baseline: str) -> str:
    """What is shown of an arm, in a sentence; `baseline` is the name of the one that it is compared with."""
    if not arm["seeds"]:
        return "not finished"
    if "equal_to" in arm:
        other, difference = arm["equal_to"]["arm"], arm["equal_to"]["largest_difference"]
        if difference is None:
            return f"to be compared with {other}"
        if difference == 0.0:
            return f"ends as {other} does, to the last bit"
        if difference < ROUNDING:
            return f"ends as {other} does, to {difference:.0e} (to the last bit only on the same number of cores)"
        return f"DIFFERS from {other}, which trains the same, by {difference:.1%}"
    found, of = arm["steps_ratio"], f"of the baseline's steps to its lowest {criterion.replace('_', ' ')}"
    if found is None and (found := arm["scores"]["frechet_distance"].get("difference")) is not None:
        of = "to the Fréchet distance of the baseline's samples"
    if found is None:
        return "the baseline" if arm["name"] == baseline else f"to be compared with {baseline}"
    if found["low"] is None:
        return f"{found['mean']:.2f} {of}; one seed shows no difference"
    agree = f"on {found['agree']} of {found['seeds']} seeds"
    said = f"{found['mean']:.2f} ({found['low']:.2f} to {found['high']:.2f}) {of}, {agree}"
    shown = found["corrected_p"] is not None and found["corrected_p"] < SIGNIFICANT
    return said if shown else f"{said}: no difference shown"
