"""Scores of a run's samples, beside real val images and reconstructions, and its report."""

import functools
import hashlib
import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from iar_jax import sample
from iar_jax.codebook.permutation import Permutation
from iar_jax.config import command_line
from iar_jax.config.relevance import relevant
from iar_jax.data import image_grids
from iar_jax.data.array_files import read_array
from iar_jax.data.codes import code_usage, read_permutation
from iar_jax.data.images import ImageDataset, open_images
from iar_jax.evaluate import reconstruction
from iar_jax.evaluate.scorers import REAL, RECONSTRUCTED, SAMPLED, SCORERS, Cards
from iar_jax.generators.settings import samples_name
from iar_jax.metrics import adm_suite, report
from iar_jax.metrics.adm_suite import ImageSet
from iar_jax.models.quantizer import normalize
from iar_jax.models.tokenizer import LoadedTokenizer, load_tokenizer
from iar_jax.runtime import artifacts, lock, metric_log, sharding
from iar_jax.runtime.artifacts import Artifact
from iar_jax.runtime.errors import UserError, refusal
from iar_jax.runtime.files import json_bytes, read_bytes, write_bytes, write_json
from iar_jax.runtime.progress import say

READS = ("seed", "inputs", "mesh", "data", "tokenizer_training", "sampling", "evaluation")

# Figures as they are shown, in their order.
SHOWN = {
    "count": ("images", "d"),
    "frechet_distance": ("Fréchet", ".2f"),
    "fid": ("FID", ".2f"),
    "sfid": ("sFID", ".2f"),
    "inception_score": ("Inception score", ".2f"),
    "precision": ("precision", ".3f"),
    "recall": ("recall", ".3f"),
    "kid": ("KID", ".4f"),
    "class_accuracy": ("class", ".1%"),
}


def run(config: ConfigDict, workdir: epath.Path) -> dict[str, Any]:
    """Scores the samples of config.sampling in the features of config.evaluation, and leaves STEP-SETTINGS.json and
    report.html in workdir/evaluation; returns the content of the first."""
    directory, section = workdir / "evaluation", config.evaluation
    inputs = sample.open_inputs(config.inputs, workdir, config.sampling.step)
    name = samples_name(config.sampling, inputs["transformer"].metadata.figures["step"])
    samples = Artifact(workdir / "samples" / name, artifacts.require(workdir / "samples" / name, "sample"))
    artifacts.check_made_from(samples, inputs)
    given = {"samples": samples.fingerprint, **SCORERS[section.features].inputs(section)}
    made_by = relevant(config, ("seed", "data", "evaluation"))

    def contents() -> dict[str, str]:
        return {"images": open_images(config.data).fingerprint, **SCORERS[section.features].contents(section)}

    done = artifacts.finished(directory / name, made_by, given, contents)
    if done and written(directory, name, done):
        say(f"evaluate: done, in {directory}")
        announce(done.figures["scores"], samples.directory, directory, name)
        return done.figures["scores"]
    with lock.hold(directory / name):
        command_line.save_config(config, workdir)
        artifacts.begin(directory / name, "evaluate", made_by, given, contents())
        content = measured(config, workdir, inputs | {"samples": samples}, name)
    announce(content, samples.directory, directory, name)
    return content


def written(directory: epath.Path, name: str, done: artifacts.Metadata) -> bool:
    """Whether the files of a finished evaluation are what they were: the scores, and a whole report of some scores."""
    scores, page = read_bytes(directory / f"{name}.json"), read_bytes(directory / "report.html")
    sound = scores == json_bytes(done.figures["scores"]) and page is not None and page.rstrip().endswith(b"</html>")
    if not sound:
        say(f"WARNING: the files of {name} in {directory} are gone or damaged; they are made again")
    return sound


def measured(config: ConfigDict, workdir: epath.Path, inputs: dict[str, Artifact], name: str) -> dict[str, Any]:
    """Scores finished samples, writes what `run` leaves, and returns the scores' content."""
    directory, section, samples = workdir / "evaluation", config.evaluation, inputs["samples"]
    start = time.monotonic()
    problem = refusal(lambda: sample.check_samples(samples.directory, samples.metadata))
    if problem:
        raise UserError(f"{problem}; python -m iar_jax.sample with the same config makes them again")
    mesh = sharding.make_mesh(**config.mesh)
    images = open_images(config.data)
    tokenizer = load_tokenizer(inputs["tokenizer"].directory, mesh)
    reconstruct = functools.partial(
        reconstruction.through_tokenizer, tokenizer.model, tokenizer.params, batch_size=section.batch_size, mesh=mesh
    )
    originals, reconstructions = reconstruction.val_sets(images, reconstruct, tokenizer.metadata)
    labels = read_array(samples.directory / "labels.npy")
    stream = adm_suite.open_images(samples.directory / "samples.npz")
    sets = {
        REAL: originals,
        RECONSTRUCTED: reconstructions,
        SAMPLED: ImageSet(stream, name, samples.fingerprint, "samples", labels),
    }
    content = SCORERS[section.features].score(config, directory, images, sets, mesh)
    content |= {"labels": config.sampling.labels, "cfg_scale": config.sampling.cfg_scale}
    seconds = time.monotonic() - start
    page = page_of(config, workdir, inputs, tokenizer, images, reconstruct, content, seconds)
    write_json(directory / f"{name}.json", content)
    write_bytes(directory / "report.html", page.encode(errors="replace"))
    fingerprint = hashlib.sha256(json.dumps(content["scores"]).encode()).hexdigest()
    artifacts.finish(directory / name, fingerprint, {"scores": content, "seconds": seconds})
    return content


def page_of(
    config: ConfigDict,
    workdir: epath.Path,
    inputs: dict[str, Artifact],
    tokenizer: LoadedTokenizer,
    images: ImageDataset,
    reconstruct: Callable[[np.ndarray], np.ndarray],
    content: dict[str, Any],
    seconds: float,
) -> str:
    """The report: pictures, scores, curves, the codebook, times and the config."""
    directory = workdir / "evaluation"
    codes = {name: artifacts.locate(config.inputs, workdir, name) for name in ("codes", "val_codes")}
    stages = {
        "train_tokenizer": tokenizer.metadata,
        "rearrange_codebook": inputs["codebook"].metadata,
        "extract_codes": artifacts.read_metadata(codes["codes"]),
        "train": inputs["transformer"].metadata,
        "sample": inputs["samples"].metadata,
    }
    usage = code_usage(codes["val_codes"], tokenizer.model.codebook_size)
    samples_title = f"samples, cfg {config.sampling.cfg_scale:g}"
    return report.page(
        f"IAR on {images.name}",
        f"{len(images.train)} training and {len(images.val)} validation images, {len(images.class_names)} classes, "
        f"{config.data.resolution} x {config.data.resolution} pixels. {SCORERS[content['features']].meaning(content)}",
        cards(content, tokenizer.metadata.figures, usage),
        [
            report.Section(
                "Pictures",
                "One row a class. The reconstructions are the best that any sampler of this tokenizer can reach.",
                figures=grids(images, reconstruct, inputs["samples"].directory, samples_title),
            ),
            report.Section(
                "Scores",
                "Each set against the reference." + "".join(f" Deviates: {d}." for d in content.get("deviations", [])),
                tables=[scores_table(content["scores"])],
            ),
            report.Section(
                "Generator",
                figures=generator_curves(inputs["transformer"].directory) + watch_curves(directory),
            ),
            report.Section(
                "Tokenizer and codebook",
                figures=[
                    *tokenizer_curves(inputs["tokenizer"].directory),
                    *codebook_figures(tokenizer, read_permutation(inputs["codebook"]), usage),
                ],
            ),
            report.Section("Wall time", tables=[time_table(stages, seconds)]),
            report.Section("Config", preformatted=config.to_json_best_effort(indent=2)),
        ],
    )


def codebook_figures(
    tokenizer: LoadedTokenizer, permutation: Permutation, usage: np.ndarray | None
) -> list[report.Figure]:
    """How often codes are used on the val images, where that is known, and the codebook by cluster."""
    codes = len(permutation.old_to_new)
    found = [
        report.codebook_map(
            np.asarray(normalize(tokenizer.params["quantizer"]["codebook"])),
            permutation.cluster_of_old,
            f"{codes} unit code vectors, one colour for each cluster: {permutation.said()}.",
        )
    ]
    if usage is not None:
        caption = (
            f"{np.mean(usage > 0):.1%} of {len(usage)} codes are used on the validation images; the cluster of a code "
            f"that is used has {permutation.usage_weighted_size(usage):.1f} codes on the mean."
        )
        found.insert(0, report.usage_histogram(usage, caption))
    return found


def grids(images: ImageDataset, reconstruct: Any, samples_directory: epath.Path, title: str) -> list[report.Figure]:
    """Samples, real images and their reconstructions, one row a class."""
    places = image_grids.places_in_class_grid(images.val.labels)
    real, labels = np.stack([images.val[int(i)]["image"] for i in places]), images.val.labels[places]
    return [
        report.Figure((samples_directory / "grid.png").read_bytes(), title, pixels=True),
        report.picture(image_grids.class_grid(real, labels), "real validation images"),
        report.picture(image_grids.class_grid(reconstruct(real), labels), "their reconstructions"),
    ]


def cards(content: dict[str, Any], tokenizer: dict[str, Any], usage: np.ndarray | None) -> Cards:
    """The figures at the top of the report."""
    sampled, reconstructed = content["scores"][SAMPLED], content["scores"][RECONSTRUCTED]
    found = SCORERS[content["features"]].cards(content, sampled, reconstructed)
    if usage is not None:
        found.append((f"{np.mean(usage > 0):.1%}", "of the codebook used on val"))
    if "psnr" in tokenizer:
        found.append((f"{tokenizer['psnr']:.1f} dB", "PSNR of reconstructions"))
    return found


def cell(name: str, value: float | None) -> str:
    """A figure as it is shown."""
    return "–" if value is None else format(value, SHOWN[name][1])


def scores_table(scores: dict[str, Any]) -> report.Table:
    names = list(scores[SAMPLED])
    rows = [(title, *(cell(name, row[name]) for name in names)) for title, row in scores.items()]
    return report.Table(("set", *(SHOWN[name][0] for name in names)), rows)


def time_table(metadata: dict[str, artifacts.Metadata | None], evaluate_seconds: float) -> report.Table:
    # Imported artifacts took no time of ours.
    seconds = {
        stage: found.figures["seconds"] for stage, found in metadata.items() if found and "seconds" in found.figures
    }
    seconds["evaluate"] = evaluate_seconds
    rows = [(stage, f"{value:.1f} s") for stage, value in seconds.items()]
    return report.Table(("stage", "time"), [*rows, ("together", f"{sum(seconds.values()):.1f} s")])


def watch_curves(directory: epath.Path) -> list[report.Figure]:
    """Scores of the checkpoints that a watch has found so far."""
    rows = metric_log.read_metrics(directory, "watch.jsonl")
    names = set.intersection(*({*row} for row in rows)) if rows else set()
    if len(rows) < 2 or len(names) < 2:
        return []
    rows = [{name: row[name] for name in row if name in names} for row in sorted(rows, key=lambda row: row["step"])]
    return [report.sweep_plot("step", rows, "Scores of the samples of each checkpoint.")]


def generator_curves(directory: epath.Path) -> list[report.Figure]:
    """Losses and accuracies of codes, and of their clusters at each level."""
    metrics = metric_log.read_metrics(directory)
    logged = dict.fromkeys(name.partition("/")[2] for line in metrics for name in line)

    def names(ending):
        return tuple(n for kind in ("token", "cluster") for n in logged if n.startswith(kind + ending))

    figures = [
        report.curves(metrics, names("_loss"), "losses", "Nats a code; train with dropout, val without."),
        report.curves(
            metrics,
            names("_accuracy"),
            "accuracies",
            "Share of codes, and of their clusters, guessed right.",
        ),
    ]
    return [figure for figure in figures if figure]


def tokenizer_curves(directory: epath.Path) -> list[report.Figure]:
    metrics = metric_log.read_metrics(directory)
    figures = [
        report.curves(
            metrics, ("loss", "reconstruction_loss"), "tokenizer losses", "Weighted sum, and reconstruction alone."
        ),
        report.curves(metrics, ("psnr",), "PSNR", "dB, of reconstructions."),
    ]
    return [figure for figure in figures if figure]


def announce(content: dict[str, Any], samples_directory: epath.Path, directory: epath.Path, name: str) -> None:
    """The last lines on the terminal: scores and where everything is."""
    say(f"\n{SCORERS[content['features']].headline(content)}")
    table = scores_table(content["scores"])
    lines = [("", *table.head[1:]), *table.rows]
    widths = [max(8, 2 + max(map(len, column))) for column in zip(*lines, strict=True)][1:]
    for row in lines:
        say(f"{row[0]:32}" + "".join(f"{value:>{width}}" for value, width in zip(row[1:], widths, strict=True)))
    for deviation in content.get("deviations", []):
        say(f"DEVIATES          {deviation}")
    say(f"grid of samples   {samples_directory / 'grid.png'}")
    say(f"scores            {directory / (name + '.json')}")
    say(f"report            {directory / 'report.html'}")
