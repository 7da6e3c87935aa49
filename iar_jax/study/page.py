"""The page of a study: its verdicts, curves with bands, tables, sample grids side by side, and what it cost."""

from typing import Any

import matplotlib
from etils import epath

from iar_jax.metrics import report
from iar_jax.study.drive import duration
from iar_jax.study.judge import SCORES
from iar_jax.study.statistics import SIGNIFICANT

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FORMATS = {
    "frechet_distance": ".2f",
    "mind": ".2f",
    "precision": ".3f",
    "recall": ".3f",
    "class_accuracy": ".1%",
    "token_loss": ".4f",
}


def page(title: str, content: dict[str, Any], workdir: epath.Path) -> str:
    """The page of an answer; grids of samples are read from the workdir."""
    arms = {name: arm for name, arm in content["arms"].items() if arm["seeds"]}
    counts = sorted({len(arm["seeds"]) for arm in arms.values() if "equal_to" not in arm}) or [0]
    finished = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    cards = [(str(len(arms)), "arms"), (finished, f"of {len(content['seeds'])} seeds of each")]
    cards += [
        (f"{arm['steps_ratio']['mean']:.2f}", f"of the baseline's steps: {name}")
        for name, arm in arms.items()
        if arm["steps_ratio"]
    ]
    cards.append((duration(content["machine_seconds"]), "of processes together"))
    sections = [
        report.Section("What is shown", method(content), tables=[verdicts(content)]),
        report.Section(
            "Curves",
            f"Means over seeds on val, with {content['confidence']:.0%} intervals of Student's t; below, differences "
            "to the baseline, seed by seed.",
            figures=[figure for name in curve_names(arms) for figure in curve_figures(name, arms)],
        ),
        report.Section(
            "Scores at the last step",
            "Mean and interval, and the difference to the baseline.",
            tables=[scores_table(arms)],
        ),
        report.Section("Learning rates and guidance", tuning_text(content), tables=[tuning_table(content["arms"])]),
        report.Section("Samples", "Of the first seed of each arm, one row a class.", figures=grids(arms, workdir)),
        report.Section(
            "Replaced codes",
            "Fréchet distance of the val images' reconstructions when a share of the codes is replaced: what an error "
            "of a generator costs.",
            tables=[perturbed_table(content["perturbed"])],
        ),
        report.Section("Cost", tables=[cost_table(arms)]),
    ]
    return report.page(title, "Arms against the baseline of their group, paired by seed.", cards, sections)


def method(content: dict[str, Any]) -> str:
    """How the verdicts come about."""
    what = content["criterion"].replace("_", " ")
    return (
        f"The ratio is the steps that an arm takes to the baseline's lowest {what} on val, over the baseline's own, by "
        "straight lines between validations; where an arm does not come so low, to the arm's lowest. Its interval is "
        f"Student's, of logarithms over seeds, at {content['confidence']:.0%}. A difference counts as shown where its "
        "p-value, corrected for the number of arms by Holm's method, is below "
        f"{SIGNIFICANT:.2f}."
    )


def verdicts(content: dict[str, Any]) -> report.Table:
    rows = [(name, " ".join(arm["overrides"]) or "–", arm["verdict"]) for name, arm in content["arms"].items()]
    return report.Table(("arm", "overrides", "verdict"), rows, sentences=True)


def curve_names(arms: dict[str, Any]) -> list[str]:
    """What there are curves of, in the order of the first arm that has them."""
    return list(dict.fromkeys(name for arm in arms.values() for name in arm["curves"]))


def curve_figures(name: str, arms: dict[str, Any]) -> list[report.Figure]:
    """A curve of all arms that have it, and of their differences to the baseline."""
    shown = {
        # The ten colours come round again.
        arm: {"color": f"C{number}", "linestyle": ("-", "--", ":")[number // 10 % 3], **content["curves"][name]}
        for number, (arm, content) in enumerate(arms.items())
        if name in content["curves"] and "equal_to" not in content
    }
    if all(len(curve["steps"]) < 2 for curve in shown.values()):
        return []
    title = name.replace("_", " ")
    figures = [banded(shown, title, f"{title}, by step.")]
    differences = {
        arm: {key: curve[key] for key in ("color", "linestyle", "steps")} | curve["difference"]
        for arm, curve in shown.items()
        if "difference" in curve
    }
    if differences:
        figures.append(banded(differences, f"{title}: arm - baseline", "Below zero the arm's is lower.", zero=True))
    return figures


def banded(curves: dict[str, Any], title: str, caption: str, zero: bool = False) -> report.Figure:
    """Means as lines, intervals as bands."""
    fig, axes = plt.subplots(figsize=(5.4, 3.5), layout="constrained")
    for arm, curve in curves.items():
        color = curve["color"]
        style = {"color": color, "linestyle": curve["linestyle"], "marker": "o", "markersize": 3}
        axes.plot(curve["steps"], curve["mean"], label=arm, **style)
        if curve["low"][0] is not None:
            axes.fill_between(curve["steps"], curve["low"], curve["high"], color=color, alpha=0.18, linewidth=0)
    if zero:
        axes.axhline(0.0, color="black", linewidth=0.8)
    else:
        # The first validations are far above all others.
        ends = [values for curve in curves.values() for values in curve["mean"][len(curve["mean"]) // 4 :]]
        spread = max(ends) - min(ends)
        axes.set_ylim(min(ends) - 0.15 * spread - 1e-9, max(ends) + 0.15 * spread + 1e-9)
    axes.set(title=title, xlabel="step")
    fig.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return report.finish(fig, axes, caption)


def figure_of(found: dict[str, Any] | None, form: str) -> str:
    """A mean with its interval."""
    if found is None:
        return "–"
    if found["low"] is None:
        return format(found["mean"], form)
    return f"{found['mean']:{form}} ({found['low']:{form}} to {found['high']:{form}})"


def scores_table(arms: dict[str, Any]) -> report.Table:
    """Scores of each arm, with the difference to the baseline in a row below."""
    names = [name for name in ("token_loss", *SCORES) if any(name in arm["scores"] for arm in arms.values())]
    rows = []
    for arm, content in arms.items():
        found = content["scores"]
        rows.append((arm, *(figure_of(found.get(name), FORMATS[name]) for name in names)))
        if any("difference" in found.get(name, {}) for name in names):
            rows.append(("difference", *(difference_of(found.get(name, {}), FORMATS[name]) for name in names)))
    return report.Table(("arm", *(name.replace("_", " ") for name in names)), rows)


def difference_of(found: dict[str, Any], form: str) -> str:
    """A difference with its interval, marked where it is shown."""
    if "difference" not in found:
        return "–"
    p = found["difference"]["corrected_p"]
    return figure_of(found["difference"], f"+{form}") + (" *" if p is not None and p < SIGNIFICANT else "")


def tuning_text(content: dict[str, Any]) -> str:
    """How rates and guidance were chosen."""
    seeds = ", ".join(map(str, content["tuning_seeds"]))
    rates, scales = content["learning_rates"], content["cfg_scales"]
    what = content["criterion"].replace("_", " ")
    said = (
        f"The learning rate of each arm is that of the lowest last {what} on val with seeds {seeds}, which the "
        f"comparison does not use, of {', '.join(f'{rate:g}' for rate in rates)}. "
        if rates
        else "Learning rates are fixed by the config. "
    )
    if len(scales) > 1:
        said += (
            "Guidance is that of the lowest Fréchet distance, at the chosen rate and with seed "
            f"{content['tuning_seeds'][0]}, of {', '.join(map(str, scales))}."
        )
    return said


def tuning_table(arms: dict[str, Any]) -> report.Table:
    rows = []
    for name, arm in arms.items():
        if arm["chosen"] is None:
            continue
        found = arm["chosen"]
        tried = ", ".join(
            f"{rate:g}: {'diverged' if value is None else f'{value:.4f}'}" for rate, _, value in found["rates"]
        )
        edge = " (at the end of the grid)" if found["rate_at_edge"] else ""
        guided = ", ".join(f"{scale:g}: {distance:.2f}" for scale, distance in found["guidance"])
        rows.append((name, f"{found['learning_rate']:g}{edge}", tried or "–", f"{found['cfg_scale']:g}", guided or "–"))
    return report.Table(("arm", "learning rate", "tried: last value", "cfg", "tried: distance"), rows)


def perturbed_table(found: dict[str, Any]) -> report.Table:
    rows = [
        (arm, f"{row['share']:.0%}", *(f"{row[way]:.2f}" for way in ("near", "own_cluster", "any")))
        for arm, rows in found.items()
        for row in rows
    ]
    return report.Table(("partition of", "share", "by near ones", "by others of their cluster", "by any"), rows)


def cost_table(arms: dict[str, Any]) -> report.Table:
    rows = [
        (name, f"{arm['num_params']:,}", duration(arm["training_seconds"]), duration(arm["seconds"]))
        for name, arm in arms.items()
    ]
    return report.Table(("arm", "parameters", "training of one run", "all of its runs"), rows)


def grids(arms: dict[str, Any], workdir: epath.Path) -> list[report.Figure]:
    """Grids of samples that are there still."""
    found = [(name, workdir / arm["grid"]) for name, arm in arms.items()]
    return [report.Figure(path.read_bytes(), name, pixels=True) for name, path in found if path.exists()]


def figure_files(content: dict[str, Any]) -> dict[str, bytes]:
    """The curves of the criterion as PNG files, by name, for a page elsewhere."""
    arms = {name: arm for name, arm in content["arms"].items() if arm["seeds"]}
    names = ("curve", "difference")
    return {name: figure.png for name, figure in zip(names, curve_figures(content["criterion"], arms), strict=False)}


def text_table(table: report.Table) -> list[str]:
    """A table as lines for a terminal."""
    lines = [tuple(table.head), *map(tuple, table.rows)]
    widths = [max(len(str(cell)) for cell in column) for column in zip(*lines, strict=True)]
    return [
        "  ".join(str(cell).ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in lines
    ]
