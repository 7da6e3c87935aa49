"""One self-contained HTML page about an experiment: pictures, curves, figures, config."""

import base64
import dataclasses
import html
import io
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float, UInt8

from iar_jax.data.image_grids import png_bytes

matplotlib.use("Agg")
import matplotlib.pyplot as plt

STYLE = """
:root { --ink: #1d2733; --soft: #5b6b7b; --line: #dfe5ec; --accent: #0b6bcb; --paper: #fff; --tint: #f5f7fa; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--tint); color: var(--ink); font: 15px/1.55 system-ui, "Segoe UI", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 28px; margin: 0 0 4px; } h2 { font-size: 19px; margin: 0 0 10px; }
p { margin: 0 0 12px; } .soft { color: var(--soft); }
section { background: var(--paper); border: 1px solid var(--line); border-radius: 10px; }
section { padding: 20px 22px; margin-top: 20px; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(170px, 1fr)); gap: 12px; margin-top: 20px; }
.card { background: var(--paper); border: 1px solid var(--line); border-radius: 10px; padding: 14px 16px; }
.card b { display: block; font-size: 24px; color: var(--accent); font-variant-numeric: tabular-nums; }
.card span { color: var(--soft); font-size: 13px; }
.row { display: grid; grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); gap: 18px; align-items: start; }
.charts { grid-template-columns: repeat(auto-fit, minmax(420px, 1fr)); }
figure { margin: 0; } figcaption { color: var(--soft); font-size: 13px; margin-top: 6px; }
img { max-width: 100%; height: auto; display: block; border-radius: 4px; }
img.pixels { image-rendering: pixelated; width: 100%; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: right; padding: 7px 10px; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child, .sentences * { text-align: left; } td { font-variant-numeric: tabular-nums; }
thead th { color: var(--soft); font-weight: 600; }
pre { background: var(--tint); border: 1px solid var(--line); border-radius: 6px; padding: 12px; }
pre { overflow: auto; font-size: 12.5px; max-height: 460px; }
"""


@dataclasses.dataclass(frozen=True)
class Figure:
    """A picture with what it shows: PNG bytes, caption, and whether pixels should stay sharp when enlarged."""

    png: bytes
    caption: str
    pixels: bool = False


def picture(pixels: UInt8[np.ndarray, "Y X 3"], caption: str) -> Figure:
    return Figure(png_bytes(pixels), caption, pixels=True)


@dataclasses.dataclass(frozen=True)
class Table:
    """Head and rows, as text: figures behind a name, or sentences."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    sentences: bool = False


@dataclasses.dataclass(frozen=True)
class Section:
    """A titled part of the page: a paragraph, tables, figures side by side, and preformatted text."""

    title: str
    text: str = ""
    tables: Sequence[Table] = ()
    figures: Sequence[Figure] = ()
    preformatted: str = ""


def page(title: str, subtitle: str, cards: Sequence[tuple[str, str]], sections: Sequence[Section]) -> str:
    """The whole page. `cards` are (figure, what it is), the first things to see."""
    body = [f"<h1>{html.escape(title)}</h1><p class='soft'>{html.escape(subtitle)}</p>"]
    body.append("<div class='cards'>")
    body += [f"<div class='card'><b>{html.escape(n)}</b><span>{html.escape(what)}</span></div>" for n, what in cards]
    body.append("</div>")
    body += [_section(section) for section in sections]
    return (
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{html.escape(title)}</title>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<style>{STYLE}</style></head><body><main>{''.join(body)}</main></body></html>\n"
    )


def _section(section: Section) -> str:
    parts = [f"<h2>{html.escape(section.title)}</h2>"]
    if section.text:
        parts.append(f"<p class='soft'>{html.escape(section.text)}</p>")
    for table in section.tables:
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in table.head)
        rows = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in table.rows)
        kind = " class='sentences'" if table.sentences else ""
        parts.append(f"<table{kind}><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>")
    if section.figures:
        wide = "" if all(figure.pixels for figure in section.figures) else " charts"
        parts.append(f"<div class='row{wide}'>" + "".join(_figure(figure) for figure in section.figures) + "</div>")
    if section.preformatted:
        parts.append(f"<pre>{html.escape(section.preformatted)}</pre>")
    return "<section>" + "".join(parts) + "</section>"


def _figure(figure: Figure) -> str:
    data = base64.b64encode(figure.png).decode()
    sharp = " class='pixels'" if figure.pixels else ""
    caption = html.escape(figure.caption)
    image = f"<img{sharp} alt='{caption}' src='data:image/png;base64,{data}'>"
    return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"


def curves(metrics: list[dict[str, Any]], names: Sequence[str], title: str, caption: str) -> Figure | None:
    """Train and val curves of metrics of a JSONL log against the step; None where the log has none of them."""
    fig, axes = plt.subplots(figsize=(5.4, 3.3), layout="constrained")
    for i, name in enumerate(names):
        for split, style in (
            ("train", {"alpha": 0.45, "linewidth": 1.2}),
            ("val", {"linewidth": 2, "marker": "o", "markersize": 3}),
        ):
            points = [(line["step"], line[f"{split}/{name}"]) for line in metrics if f"{split}/{name}" in line]
            if points:
                label = f"{name.replace('_', ' ')} ({split})"
                axes.plot(*zip(*points, strict=True), color=f"C{i}", label=label, **style)
    axes.set(title=title, xlabel="step")
    if not axes.lines:
        plt.close(fig)
        return None
    fig.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    return finish(fig, axes, caption)


def sweep_plot(field: str, rows: list[dict[str, float | None]], caption: str) -> Figure:
    """Each score against the swept field, one above the other."""
    names = [name for name in rows[0] if name != field and all(row[name] is not None for row in rows)]
    size = (5.4, 1.9 * len(names))
    fig, axes = plt.subplots(len(names), figsize=size, layout="constrained", sharex=True, squeeze=False)
    for i, name in enumerate(names):
        place = axes[i, 0]
        place.plot([row[field] for row in rows], [row[name] for row in rows], "o-", color=f"C{i}")
        place.set(ylabel=name.replace("_", " "))
        place.grid(alpha=0.25)
        place.spines[["top", "right"]].set_visible(False)
    axes[-1, 0].set(xlabel=field)
    fig.suptitle(caption, fontsize=10)
    return finish(fig, axes[0, 0], caption)


def usage_histogram(counts: Float[np.ndarray, " N"], caption: str) -> Figure:
    """How often each code is used, from the most to the least used, on a logarithmic scale."""
    fig, axes = plt.subplots(figsize=(5.4, 3.3), layout="constrained")
    share = np.sort(counts)[::-1] / counts.sum()
    axes.step(np.arange(1, len(share) + 1), np.where(share > 0, share, np.nan), where="mid")
    axes.set(title="codebook usage", xlabel="codes, most used first", ylabel="share of all codes", yscale="log")
    return finish(fig, axes, caption)


def codebook_map(codebook: Float[np.ndarray, "N d"], clusters: np.ndarray, caption: str) -> Figure:
    """The codebook on its two main axes, a colour for each cluster."""
    centred = codebook - codebook.mean(axis=0)
    axes_of_variance = np.linalg.svd(centred, full_matrices=False)[2][:2]
    points = centred @ axes_of_variance.T
    fig, axes = plt.subplots(figsize=(5.4, 4.2), layout="constrained")
    shuffled = np.random.default_rng(0).permutation(clusters.max() + 1)
    axes.scatter(
        points[:, 0], points[:, 1], c=shuffled[clusters], cmap="hsv", s=14 if len(points) < 4000 else 4, linewidths=0
    )
    axes.set(title="codebook by cluster", xlabel="first principal axis", ylabel="second principal axis")
    return finish(fig, axes, caption)


def finish(fig, axes, caption: str) -> Figure:
    """The figure as PNG, in the page's style."""
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", dpi=150)
    plt.close(fig)
    return Figure(buffer.getvalue(), caption)
