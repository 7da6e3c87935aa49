"""Scores of a run's samples, beside real val images and reconstructions, and its report."""

import functools
import hashlib
import json
import time
from typing import Any

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from iar_jax.data import pictures
from iar_jax.data.array_parts import read_array
from iar_jax.data.codes import code_usage, read_permutation
from iar_jax.data.images import ImageDataset, open_images
from iar_jax.data.rows import SourceRows
from iar_jax.evaluate import classifier, files, reconstruction
from iar_jax.evaluation import adm_suite, report
from iar_jax.evaluation.adm_suite import ImageSet
from iar_jax.models.build import load_tokenizer, transformer_at
from iar_jax.models.quantizer import normalize
from iar_jax.runtime import artifacts, lock, metric_log, sharding
from iar_jax.runtime.progress import say

# The sets that are scored against the training images, in the order of the report.
REAL, RECONSTRUCTED, SAMPLED = "real val images (the floor)", "reconstructions of them", "samples"

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
    directory = workdir / "evaluation"
    tokenizer_directory = artifacts.input_directory(config, workdir, "tokenizer", "tokenizer")
    transformer_directory = artifacts.input_directory(config, workdir, "transformer", "train")
    transformer = transformer_at(transformer_directory, config.sampling.step)
    name = artifacts.samples_name(config, transformer.figures["step"])
    samples_directory = workdir / "samples" / name
    samples = artifacts.require(samples_directory, "sample")
    inputs = {"samples": samples.fingerprint}
    if config.evaluation.features == "inception" and config.evaluation.reference:
        inputs["reference"] = artifacts.sha256_of(reference_file(config))
    relevant = artifacts.relevant_config(config, ("seed", "data", "evaluation"))
    done = artifacts.begin(directory / name, "evaluate", relevant, inputs)
    if done and (directory / "report.html").exists():
        say(f"evaluate: done, in {directory}")
        announce(done.figures["scores"], samples_directory, directory, name)
        return done.figures["scores"]
    start = time.monotonic()
    mesh = sharding.make_mesh(**config.mesh)
    images = open_images(config.data)
    model, tokenizer_params, tokenizer = load_tokenizer(tokenizer_directory, mesh)
    reconstruct = functools.partial(
        reconstruction.through_tokenizer, model, tokenizer_params, batch_size=config.evaluation.batch_size
    )
    labels = read_array(samples_directory / "labels.npy")
    rows = adm_suite.open_images(samples_directory / "samples.npz")
    originals, reconstructions = reconstruction.val_sets(images, reconstruct, tokenizer)
    sets = {
        REAL: originals,
        RECONSTRUCTED: reconstructions,
        SAMPLED: ImageSet(rows, name, samples.fingerprint, "samples", labels),
    }
    if config.evaluation.features == "classifier":
        judge = classifier.trained(config, directory / "classifier", images, mesh)
        content: dict[str, Any] = {
            "features": "classifier",
            "classifier_val_accuracy": judge.val_accuracy,
            "reference": f"{images.name}, {len(images.train)} training images",
            "scores": classifier.scores(judge, images, sets, config.evaluation),
        }
    else:
        with lock.hold(directory / "features"):
            content = inception_scores(config, directory, images, sets)
    content |= {"labels": config.sampling.labels, "cfg_scale": config.sampling.cfg_scale}
    artifacts.write_bytes(directory / f"{name}.json", (json.dumps(content, indent=2) + "\n").encode())
    seconds = time.monotonic() - start

    codes_directory = artifacts.input_directory(config, workdir, "codes", "codes")
    codebook_directory = artifacts.input_directory(config, workdir, "codebook", "codebook")
    permutation = read_permutation(codebook_directory, tokenizer, tokenizer_directory)
    stages = {
        "train_tokenizer": tokenizer,
        "rearrange_codebook": artifacts.require(codebook_directory, "rearrange_codebook"),
        "extract_codes": artifacts.read_metadata(codes_directory / "train"),
        "train": transformer,
        "sample": samples,
    }
    usage = code_usage(codes_directory / "val", model.codebook_size)
    codebook_figures = [
        report.codebook_map(
            np.asarray(normalize(tokenizer_params["quantizer"]["codebook"])),
            permutation.cluster_of_old,
            f"{len(permutation.old_to_new)} unit code vectors, one colour for each of "
            f"{len(permutation.old_to_new) // permutation.cluster_size} clusters of {permutation.cluster_size}.",
        )
    ]
    if usage is not None:
        caption = f"{np.mean(usage > 0):.1%} of {len(usage)} codes are used on the validation images."
        codebook_figures.insert(0, report.usage_histogram(usage, caption))
    page = report.page(
        f"IAR on {images.name}",
        f"{len(images.train)} training and {len(images.val)} validation images, {len(images.class_names)} classes, "
        f"{config.data.resolution} x {config.data.resolution} pixels. {meaning(content)}",
        cards(content, tokenizer.figures, usage),
        [
            report.Section(
                "Pictures",
                "One row a class. The reconstructions are the best that any sampler of this tokenizer can reach.",
                figures=grids(images, reconstruct, samples_directory, f"samples, cfg {config.sampling.cfg_scale:g}"),
            ),
            report.Section(
                "Scores",
                "Each set against the reference." + "".join(f" Deviates: {d}." for d in content.get("deviations", [])),
                tables=[scores_table(content["scores"])],
            ),
            report.Section("Transformer", figures=transformer_curves(transformer_directory) + watch_curves(directory)),
            report.Section(
                "Tokenizer and codebook", figures=[*tokenizer_curves(tokenizer_directory), *codebook_figures]
            ),
            report.Section("Wall time", tables=[time_table(stages, seconds)]),
            report.Section("Config", preformatted=config.to_json_best_effort(indent=2)),
        ],
    )
    artifacts.write_bytes(directory / "report.html", page.encode())
    fingerprint = hashlib.sha256(json.dumps(content["scores"]).encode()).hexdigest()
    artifacts.finish(directory / name, fingerprint, {"scores": content, "seconds": seconds})
    announce(content, samples_directory, directory, name)
    return content


def reference_file(config: ConfigDict) -> epath.Path:
    """config.evaluation.reference as a path.

    Raises:
        UserError: it is not there.
    """
    path = epath.Path(config.evaluation.reference).expanduser()
    if not path.exists():
        raise UserError(f"config.evaluation.reference is {path}, which is not there")
    return path


def inception_scores(
    config: ConfigDict, directory: epath.Path, images: ImageDataset, sets: dict[str, ImageSet]
) -> dict[str, Any]:
    """Scores of each set by the protocol of the ADM suite, against config.evaluation.reference or the training
    images. Features of real images and reconstructions are kept for other samples, the samples' own are not."""
    network = files.inception_network(config.evaluation.inception_weights)
    kept, batch_size = directory / "features", config.evaluation.batch_size
    if config.evaluation.reference:
        path = reference_file(config)
    else:
        path = directory / f"reference-{images.fingerprint[:8]}-{network.sha256[:8]}.npz"
        train = ImageSet(SourceRows(images.train), f"{images.name} train", f"{images.fingerprint} train", "real")
        if not path.exists():
            adm_suite.make_reference(path, train, "train", network, kept, batch_size)
    reference = adm_suite.load_reference(path, network, kept, batch_size)
    scores = {}
    for title, images_of_set in sets.items():
        found = adm_suite.features_of(images_of_set, network, kept, batch_size)
        scores[title] = {"count": found.num_images, **adm_suite.score(found, reference)}
    adm_suite.forget(sets[SAMPLED], network, kept)
    about = files.scored(sets[SAMPLED], {}, reference, network)
    return {
        "features": "inception",
        "scores": scores,
        "label_protocol": about["labels"],
        **{name: about[name] for name in ("reference", "weights", "deviations")},
    }


def meaning(content: dict[str, Any]) -> str:
    """What the scores can be compared with."""
    if content["features"] == "classifier":
        return (
            "Scores in the features of a classifier trained on the same data; they compare runs on this data set only."
        )
    weights = content["weights"]
    return (
        f"Scores by the protocol of the ADM suite against {files.describe(content['reference'])}; Inception weights "
        f"{weights['name']} ({weights['sha256'][:12]}); labels {content['label_protocol']}."
    )


def grids(images: ImageDataset, reconstruct: Any, samples_directory: epath.Path, title: str) -> list[report.Figure]:
    """Samples, real images and their reconstructions, one row a class."""
    places = pictures.places_in_class_grid(images.val.labels)
    real, labels = np.stack([images.val[int(i)]["image"] for i in places]), images.val.labels[places]
    return [
        report.Figure((samples_directory / "grid.png").read_bytes(), title, pixels=True),
        report.picture(pictures.class_grid(real, labels), "real validation images"),
        report.picture(pictures.class_grid(reconstruct(real), labels), "their reconstructions"),
    ]


def cards(content: dict[str, Any], tokenizer: dict[str, Any], usage: np.ndarray | None) -> list[tuple[str, str]]:
    """The figures at the top of the report."""
    sampled, reconstructed = content["scores"][SAMPLED], content["scores"][RECONSTRUCTED]
    name = "frechet_distance" if content["features"] == "classifier" else "fid"
    ratio = f"{sampled[name] / reconstructed[name]:.1f} x the reconstructions'"
    if content["features"] == "classifier":
        found = [
            (f"{sampled['class_accuracy']:.1%}", "samples recognised as the class asked for"),
            (f"{sampled[name]:.2f}", f"Fréchet distance of samples, {ratio}"),
            (f"{content['classifier_val_accuracy']:.1%}", "of real val images the classifier gets right"),
        ]
    else:
        found = [
            (f"{sampled[name]:.2f}", f"FID of samples, {ratio}"),
            (f"{sampled['inception_score']:.1f}", "Inception score of samples"),
        ]
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


def transformer_curves(directory: epath.Path) -> list[report.Figure]:
    metrics = metric_log.read_metrics(directory)
    figures = [
        report.curves(
            metrics, ("token_loss", "cluster_loss"), "losses", "Nats a code; train with dropout, val without."
        ),
        report.curves(
            metrics,
            ("token_accuracy", "cluster_accuracy"),
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
    if content["features"] == "classifier":
        say(f"\nclassifier: {content['classifier_val_accuracy']:.1%} of the real val images right")
    else:
        say(f"\nagainst {files.describe(content['reference'])}")
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
