"""Samples and scores along one field of config.sampling: the curve from which a guidance scale is chosen."""

from collections.abc import Callable

from etils import epath
from ml_collections import ConfigDict

from iar_jax.config.checks import check_config
from iar_jax.metrics import report
from iar_jax.runtime.errors import UserError
from iar_jax.runtime.files import write_bytes, write_json
from iar_jax.runtime.progress import say

SWEPT = ("cfg_scale", "temperature", "top_k", "top_p")

# Samples with a config, scores them, returns the figures.
Score = Callable[[ConfigDict, epath.Path], dict[str, float | None]]


def run(config: ConfigDict, workdir: epath.Path, sweep: str, score: Score) -> None:
    """Samples and scores along one field of config.sampling, the same labels and seeds at each point, and leaves
    sweep-FIELD.json and sweep-FIELD.png in workdir/evaluation."""
    field, values = values_of(sweep, config)
    points = []
    for value in values:
        point = config.copy_and_resolve_references()
        point.sampling[field] = value
        check_config(point)
        points.append(point)
    rows = []
    for value, point in zip(values, points, strict=True):
        say(f"\n{field} {value:g}")
        rows.append({field: value, **score(point, workdir)})
    directory = workdir / "evaluation"
    content = {"field": field, "labels": config.sampling.labels, "seed": config.sampling.seed, "points": rows}
    write_json(directory / f"sweep-{field}.json", content)
    plot = report.sweep_plot(field, rows, f"{config.sampling.num_images} samples at each point.")
    write_bytes(directory / f"sweep-{field}.png", plot.png)
    names = list(rows[0])
    say("\n" + "".join(f"{name:>20}" for name in names))
    for row in rows:
        say("".join(f"{'–' if row[name] is None else f'{row[name]:.4g}':>20}" for name in names))
    say(f"curve             {directory / f'sweep-{field}.png'}")


def values_of(sweep: str, config: ConfigDict) -> tuple[str, list[float | int]]:
    """Field and values of FIRST:LAST:STEP, both ends included.

    Raises:
        UserError: another field than cfg_scale, temperature, top_k and top_p, or no such range.
    """
    field, _, text = sweep.partition("=")
    if field not in SWEPT:
        raise UserError(f"--sweep={sweep}: {field!r} is not one of {', '.join(SWEPT)}")
    kind = type(config.sampling[field])
    try:
        first, last, step = (kind(part) for part in text.split(":"))
    except ValueError as error:
        raise UserError(f"--sweep={sweep}: a range is FIRST:LAST:STEP, as cfg_scale=1.5:2.5:0.25") from error
    if step <= 0 or last < first:
        raise UserError(f"--sweep={sweep}: the step must be positive and the last value not below the first")
    count = int((last - first) / step + 1e-9) + 1
    return field, [kind(round(first + i * step, 9)) for i in range(count)]
