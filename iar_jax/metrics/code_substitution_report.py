"""The page and the pictures of a study of code distance."""

import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import UInt8

from iar_jax.codebook.code_distance import ANY_CODE, OWN_CLUSTER, Change, Substitution
from iar_jax.data import image_grids
from iar_jax.metrics import report

IMAGES_SHOWN = 8
SHOWN_RANKS = (1, 4, 12, 32, 64)


def verdict(visible: int | None, substitutions: list[Substitution], own_error: Change) -> str:
    """From which rank on a difference is visible, in words."""
    measure = "squared error" if own_error.lpips is None else "LPIPS"
    if visible is None:
        largest = max(found.rank for found in substitutions)
        return f"Up to rank {largest}, replaced codes change a picture less than the tokenizer itself does ({measure})."
    return (
        f"From rank {visible} on the difference is visible: replaced codes change a picture more than the tokenizer "
        f"itself does ({measure})."
    )


def figures_table(substitutions: list[Substitution], own_error: Change) -> report.Table:
    """One row for each substitution, the tokenizer's own error first."""
    rows = [("(the tokenizer's own error)", *_cells(own_error))]
    rows += [(found.title, *_cells(found.change)) for found in substitutions]
    return report.Table(("codes replaced by", "MSE", "PSNR, dB", "LPIPS"), rows)


def picture(
    originals: UInt8[np.ndarray, "n H W 3"],
    reconstructions: UInt8[np.ndarray, "n H W 3"],
    substitutions: list[Substitution],
) -> tuple[UInt8[np.ndarray, "Y X 3"], list[str]]:
    """A row of pictures for each kind of substitution, and what the rows are."""
    rows = [("original", originals), ("reconstruction", reconstructions)]
    rows += [(s.title, s.images) for s in substitutions if s.rank in SHOWN_RANKS or s.rank == 0]
    columns = min(IMAGES_SHOWN, len(originals))
    chosen = np.linspace(0, len(originals) - 1, columns).round().astype(int)
    shown = np.concatenate([images[chosen] for _, images in rows])
    grid = image_grids.image_grid(shown, columns=columns, scale=image_grids.scale_to_see(shown.shape[1]))
    return grid, [title for title, _ in rows]


def curves(substitutions: list[Substitution], own_error: Change) -> list[report.Figure]:
    """MSE, PSNR and LPIPS against the rank; the own cluster, any code and the tokenizer's own error as lines."""
    figures = []
    for name, label in (("mse", "MSE"), ("psnr", "PSNR, dB"), ("lpips", "LPIPS")):
        if getattr(own_error, name) is None:
            continue
        fig, axes = plt.subplots(figsize=(5.4, 3.6), layout="constrained")
        ranked = [s for s in substitutions if s.rank]
        axes.plot([s.rank for s in ranked], [getattr(s.change, name) for s in ranked], marker="o", label="k-th nearest")
        lines = [(s.title, s.change, "--") for s in substitutions if s.title in (OWN_CLUSTER, ANY_CODE)]
        lines.append(("the tokenizer's own error", own_error, ":"))
        for i, (title, change, style) in enumerate(lines, 1):
            axes.axhline(getattr(change, name), color=f"C{i}", linestyle=style, label=title)
        axes.set(title=label, xlabel="rank k of the neighbour that replaces each code", xscale="log")
        axes.set_xticks([s.rank for s in ranked], [str(s.rank) for s in ranked])
        axes.minorticks_off()
        if name == "mse":
            axes.set_yscale("log")
        fig.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
        figures.append(report.finish(fig, axes, f"{label} against pictures of the true codes."))
    return figures


def page(
    title: str,
    originals: UInt8[np.ndarray, "n H W 3"],
    reconstructions: UInt8[np.ndarray, "n H W 3"],
    substitutions: list[Substitution],
    own_error: Change,
    visible: int | None,
) -> str:
    """The whole page."""
    grid, rows = picture(originals, reconstructions, substitutions)
    own_cluster = next(s for s in substitutions if s.title == OWN_CLUSTER)
    anything = next(s for s in substitutions if s.title == ANY_CODE)
    return report.page(
        title,
        f"{len(originals)} validation images. Every code is replaced by one at a given distance, and the decoded "
        "pictures are compared with those of the true codes.",
        [
            (str(visible) if visible else f"> {max(s.rank for s in substitutions)}", "first visible rank"),
            (f"{own_cluster.change.psnr:.1f} dB", "PSNR with random members of the own cluster"),
            (f"{anything.change.psnr:.1f} dB", "PSNR with any codes at random"),
            (f"{own_error.psnr:.1f} dB", "PSNR of the tokenizer itself, against the originals"),
        ],
        [
            report.Section(
                "Against the rank", verdict(visible, substitutions, own_error), figures=curves(substitutions, own_error)
            ),
            report.Section(
                "Pictures",
                "From the top: " + "; ".join(rows) + ".",
                figures=[report.picture(grid, "one column an image")],
            ),
            report.Section("Figures", tables=[figures_table(substitutions, own_error)]),
        ],
    )


def _cells(change: Change) -> tuple[str, str, str]:
    return f"{change.mse:.5f}", f"{change.psnr:.2f}", "–" if change.lpips is None else f"{change.lpips:.4f}"
