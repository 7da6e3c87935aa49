"""Stage 6: samples + reference images -> metrics and the report.

    python -m iar_jax.evaluate --config=configs/mnist.py --workdir=runs/mnist
    python -m iar_jax.evaluate --config=configs/mnist.py --workdir=runs/mnist --what=code_distance

The second form measures what a wrong code costs: only the tokenizer and its clusters are needed. `reconstruction`
measures the tokenizer alone: PSNR, SSIM, LPIPS and rFID on the val images.

    python -m iar_jax.evaluate --samples=samples.npz --reference=VIRTUAL_imagenet256_labeled.npz
    python -m iar_jax.evaluate --config=configs/mnist.py --workdir=runs/mnist --reference=FILE.npz
    python -m iar_jax.evaluate --samples=images.npz --make-reference=FILE.npz
    python -m iar_jax.evaluate --config=configs/mnist.py --workdir=runs/mnist --sweep=cfg_scale=1:2:0.25
    python -m iar_jax.evaluate --config=configs/mnist.py --workdir=runs/mnist --watch

These score files of images by the protocol of the ADM suite, and make a reference of one. A sweep samples and scores at
each value, a watch at each checkpoint of a training that goes on elsewhere, with or without --reference. Inception
weights are taken from --inception_weights or the cache directory, or fetched. What is kept is in SAMPLES.evaluation/,
or --output.

`config.evaluation.features=classifier` needs no weights from elsewhere: a small network is trained on the real
images first, and its last hidden layer is what distances are taken in. Such figures compare runs on one data set
with each other, never with published ones.
"""

import functools
import json
import os
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import flags
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from iar_jax import sample
from iar_jax.codebook.code_distance import change, first_visible_rank, num_decodings, substitution_study
from iar_jax.data import loader, pictures, preprocessing
from iar_jax.data.array_parts import ArrayParts, read_array
from iar_jax.data.codes import read_permutation
from iar_jax.data.images import ImageDataset, ImageSource, open_images
from iar_jax.evaluation import adm_suite, code_distance_report, features, frechet, precision_recall, report, ssim
from iar_jax.interop import downloads, inception
from iar_jax.interop.lpips import available as lpips_available
from iar_jax.interop.lpips import load_lpips
from iar_jax.losses.tokenizer_losses import psnr
from iar_jax.models.build import load_tokenizer, transformer_at
from iar_jax.models.classifier import Classifier
from iar_jax.models.quantizer import normalize
from iar_jax.runtime import artifacts, checkpoint, command_line, lock, metric_log, sharding
from iar_jax.runtime.config import check_config
from iar_jax.runtime.errors import UserError
from iar_jax.runtime.progress import progress, say
from iar_jax.training import classifier_steps
from iar_jax.training.loop import TrainingRun
from iar_jax.training.optimizer import learning_rate_schedule, make_optimizer

SWEPT = ("cfg_scale", "temperature", "top_k", "top_p")

# The sets that are scored against the training images, in the order of the report.
REAL, RECONSTRUCTED, SAMPLED = "real val images (the floor)", "reconstructions of them", "samples"


def run(config: ConfigDict, workdir: epath.Path) -> None:
    """Scores the samples of config.sampling and leaves STEP-SETTINGS.json and report.html in workdir/evaluation."""
    directory = workdir / "evaluation"
    tokenizer_directory = artifacts.input_directory(config, workdir, "tokenizer", "tokenizer")
    codebook_directory = artifacts.input_directory(config, workdir, "codebook", "codebook")
    transformer_directory = artifacts.input_directory(config, workdir, "transformer", "train")
    transformer = transformer_at(transformer_directory, config.sampling.step)
    name = artifacts.samples_name(config, transformer.figures["step"])
    samples_directory = workdir / "samples" / name
    samples = artifacts.require(samples_directory, "sample")
    inputs = {"samples": samples.fingerprint}
    relevant = artifacts.relevant_config(config, ("seed", "data", "evaluation"))
    done = artifacts.begin(directory / name, "evaluate", relevant, inputs)
    if done and (directory / "report.html").exists():
        say(f"evaluate: done, in {directory}")
        announce(done.figures["scores"], samples_directory, directory, name)
        return
    start = time.monotonic()
    mesh = sharding.make_mesh(**config.mesh)
    images = open_images(config.data)
    classifier, params, accuracy = trained_classifier(config, directory / "classifier", images, mesh)
    model, tokenizer_params, tokenizer = load_tokenizer(tokenizer_directory, mesh)
    permutation = read_permutation(codebook_directory, tokenizer, tokenizer_directory)

    train_images, _ = all_images(images.train, "reading train images")
    val_images, val_labels = all_images(images.val, "reading val images")
    reconstructions, counts = reconstruct(model, tokenizer_params, val_images, config.evaluation.batch_size)
    sampled = read_array(samples_directory / "samples.npz")
    sampled_labels = read_array(samples_directory / "labels.npy")

    judge = functools.partial(features.classifier_features, classifier, params, batch_size=config.evaluation.batch_size)
    reference = judge(train_images).features
    statistics = frechet.feature_statistics(reference)
    scores: dict[str, Any] = {}
    for title, candidates, labels in (
        (REAL, val_images, val_labels),
        (RECONSTRUCTED, reconstructions, val_labels),
        (SAMPLED, sampled, sampled_labels),
    ):
        found = judge(candidates)
        precision = recall = None  # too few images for a manifold
        if min(len(reference), len(candidates)) > config.evaluation.neighbours:
            precision, recall = precision_recall.precision_recall(
                reference, found.features, config.evaluation.neighbours
            )
        scores[title] = {
            "count": len(candidates),
            "frechet_distance": frechet.frechet_distance(*statistics, *frechet.feature_statistics(found.features)),
            "precision": precision,
            "recall": recall,
            "class_accuracy": float(np.mean(found.predictions == labels)),
        }
    content = {
        "features": config.evaluation.features,
        "classifier_val_accuracy": accuracy,
        "reference": f"{images.name}, {len(train_images)} training images",
        "labels": config.sampling.labels,
        "cfg_scale": config.sampling.cfg_scale,
        "scores": scores,
    }
    directory.mkdir(parents=True, exist_ok=True)
    artifacts.write_bytes(directory / f"{name}.json", (json.dumps(content, indent=2) + "\n").encode())
    seconds = time.monotonic() - start
    metadata = {
        "train_tokenizer": tokenizer,
        "rearrange_codebook": artifacts.require(codebook_directory, "rearrange_codebook"),
        "extract_codes": artifacts.read_metadata(
            artifacts.input_directory(config, workdir, "codes", "codes") / "train"
        ),
        "train": transformer,
        "sample": samples,
    }
    codebook_picture = report.codebook_map(
        np.asarray(normalize(tokenizer_params["quantizer"]["codebook"])),
        permutation.cluster_of_old,
        f"{len(permutation.old_to_new)} unit code vectors, one colour for each of "
        f"{len(permutation.old_to_new) // permutation.cluster_size} clusters of {permutation.cluster_size}.",
    )
    page = report.page(
        f"IAR on {images.name}",
        f"{len(train_images)} training and {len(val_images)} validation images, {len(images.class_names)} classes, "
        f"{config.data.resolution} x {config.data.resolution} pixels. Scores in the features of a classifier trained "
        "on the same data; they compare runs on this data set only.",
        cards(content, tokenizer.figures, float(np.mean(counts > 0))),
        [
            report.Section(
                "Pictures",
                "One row a class. The reconstructions are the best that any sampler of this tokenizer can reach.",
                figures=[
                    report.picture(
                        pictures.class_grid(sampled, sampled_labels), f"samples, cfg {config.sampling.cfg_scale:g}"
                    ),
                    report.picture(pictures.class_grid(val_images, val_labels), "real validation images"),
                    report.picture(pictures.class_grid(reconstructions, val_labels), "their reconstructions"),
                ],
            ),
            report.Section("Scores", "Each set against the training images.", tables=[scores_table(scores)]),
            report.Section("Transformer", figures=transformer_curves(transformer_directory) + watch_curves(directory)),
            report.Section(
                "Tokenizer and codebook",
                figures=[
                    *tokenizer_curves(tokenizer_directory),
                    report.usage_histogram(
                        counts, f"{np.mean(counts > 0):.1%} of {len(counts)} codes are used on the validation images."
                    ),
                    codebook_picture,
                ],
            ),
            report.Section("Wall time", tables=[time_table(metadata, seconds)]),
            report.Section("Config", preformatted=config.to_json_best_effort(indent=2)),
        ],
    )
    artifacts.write_bytes(directory / "report.html", page.encode())
    artifacts.finish(directory / name, artifacts.fingerprint_arrays(reference), {"scores": content, "seconds": seconds})
    announce(content, samples_directory, directory, name)


def run_code_distance(config: ConfigDict, workdir: epath.Path) -> None:
    """Replaces codes of val images by others, and leaves report.html, pictures.png and figures.json in
    workdir/code_distance."""
    directory = workdir / "code_distance"
    tokenizer_directory = artifacts.input_directory(config, workdir, "tokenizer", "tokenizer")
    codebook_directory = artifacts.input_directory(config, workdir, "codebook", "codebook")
    model, params, tokenizer = load_tokenizer(tokenizer_directory, sharding.make_mesh(**config.mesh))
    permutation = read_permutation(codebook_directory, tokenizer, tokenizer_directory)
    images = open_images(config.data)
    count = min(config.evaluation.code_distance_images, len(images.val))
    # From all over the split, which may be sorted by class.
    chosen = np.linspace(0, len(images.val) - 1, count).round().astype(int)
    originals = np.stack([images.val[i]["image"] for i in chosen.tolist()])

    batch_size = min(config.evaluation.batch_size, count)
    encode = jax.jit(lambda batch: model.apply({"params": params}, batch, method="encode"))
    decode = jax.jit(lambda codes: model.apply({"params": params}, codes, method="decode_codes"))
    perceptual_distance = None
    weights = config.tokenizer_training
    if lpips_available(weights.vgg_weights, weights.lpips_weights):
        lpips = jax.jit(load_lpips(weights.vgg_weights, weights.lpips_weights))

        def perceptual_distance(first, second):
            def of_pairs(pairs):
                return np.ravel(lpips(*(preprocessing.to_unit_range(pairs[:, i]) for i in range(2))))

            return float(np.mean(features.in_batches(of_pairs, np.stack([first, second], axis=1), batch_size)))

    with progress("replacing codes", count * num_decodings(model.codebook_size), "pictures") as shown:

        def decoded(codes):
            found = features.in_batches(lambda part: preprocessing.to_uint8(decode(part)), codes, batch_size)
            shown.update(count)
            return found

        codes = features.in_batches(lambda part: encode(preprocessing.to_unit_range(part)), originals, batch_size)
        reconstructions = decoded(codes)
        codebook = np.asarray(normalize(params["quantizer"]["codebook"]))
        rng = np.random.default_rng(config.seed)
        substitutions = substitution_study(
            codes, reconstructions, codebook, permutation, decoded, perceptual_distance, rng
        )
    own_error = change(originals, reconstructions, perceptual_distance)
    visible = first_visible_rank(substitutions, own_error)

    directory.mkdir(parents=True, exist_ok=True)
    table = code_distance_report.figures_table(substitutions, own_error)
    figures = {
        "images": count,
        "first_visible_rank": visible,
        "tokenizer": own_error._asdict(),
        "substitutions": [{"rank": s.rank, "title": s.title, **s.change._asdict()} for s in substitutions],
    }
    title = f"Code distance on {images.name}"
    page = code_distance_report.page(title, originals, reconstructions, substitutions, own_error, visible)
    grid, rows = code_distance_report.picture(originals, reconstructions, substitutions)
    pictures.write_png(directory / "pictures.png", grid)
    artifacts.write_bytes(directory / "figures.json", (json.dumps(figures, indent=2) + "\n").encode())
    artifacts.write_bytes(directory / "report.html", page.encode())
    say(f"{table.head[0]:32}" + "".join(f"{cell:>10}" for cell in table.head[1:]))
    for row in table.rows:
        say(f"{row[0]:32}" + "".join(f"{cell:>10}" for cell in row[1:]))
    say(code_distance_report.verdict(visible, substitutions, own_error))
    say(f"pictures  {directory / 'pictures.png'} (from the top: {'; '.join(rows)})")
    say(f"report    {directory / 'report.html'}")


def trained_classifier(
    config: ConfigDict, directory: epath.Path, images: ImageDataset, mesh: Mesh
) -> tuple[Classifier, Any, float]:
    """The feature classifier of this data set, trained unless it is there, and its accuracy on the val split."""
    section = config.evaluation
    model = Classifier(num_classes=len(images.class_names), resolution=config.data.resolution)
    relevant = artifacts.relevant_config(config, ("seed", "data", "evaluation"))
    done = artifacts.begin(directory, "evaluate", relevant, {"images": images.fingerprint})
    optimizer = make_optimizer(
        learning_rate_schedule("cosine", section.classifier_learning_rate, 20, section.classifier_steps),
        b1=0.9,
        b2=0.99,
        weight_decay=1e-2,
        clip_norm=1.0,
    )
    init = functools.partial(classifier_steps.init_classifier_state, model=model, optimizer=optimizer)
    key = jax.random.key(config.seed)
    if done:
        shapes = jax.eval_shape(init, key).ema_params
        abstract = checkpoint.abstract_tree(shapes, jax.tree.map(lambda _: sharding.replicated(mesh), shapes))
        params, _ = checkpoint.restore_params(directory / "checkpoints", abstract)
        return model, params, done.figures["val_accuracy"]
    sharding.check_batch_size(mesh, section.classifier_batch_size, "config.evaluation.classifier_batch_size")
    with (
        sharding.use_mesh(mesh),
        TrainingRun(
            directory,
            "evaluate: classifier",
            num_steps=section.classifier_steps,
            batch_size=section.classifier_batch_size,
            log_every=50,
            checkpoint_every=500,
            retention=checkpoint.Retention(latest=1),
        ) as training,
    ):
        state, shardings = sharding.initialise_sharded(init, mesh, key)
        state = training.resume(state, checkpoint.abstract_tree(state, shardings))
        train_step = jax.jit(
            classifier_steps.make_classifier_train_step(
                model, optimizer, ema_decay=0.99, key=jax.random.fold_in(key, 1)
            ),
            donate_argnums=0,
            out_shardings=(shardings, sharding.replicated(mesh)),
        )
        batches = loader.train_batches(
            images.train,
            functools.partial(augment, config.data),
            seed=config.seed,
            batch_size=section.classifier_batch_size,
            first_step=training.step,
            part=0,
            num_parts=1,
        )
        for _ in training.steps():
            batch = sharding.global_batch(mesh, training.next_batch(batches))
            state, metrics = train_step(state, batch["image"], batch["label"])
            training.finished_step(state, metrics)
    params = state.ema_params
    val_images, val_labels = all_images(images.val, "reading val images")
    found = features.classifier_features(model, params, val_images, section.batch_size)
    accuracy = float(np.mean(found.predictions == val_labels))
    artifacts.finish(directory, artifacts.fingerprint_arrays(jax.device_get(params)), {"val_accuracy": accuracy})
    return model, params, accuracy


def augment(section: ConfigDict, record: dict, rng: np.random.Generator) -> dict:
    """A training picture of the classifier in [-1, 1], moved by up to two pixels, cropped where the config says so."""
    pixels = preprocessing.random_shift(record["image"], 2, rng)
    if section.augmentation == "crop_flip":
        pixels = preprocessing.random_crop_flip(pixels, section.smallest_crop, rng)
    return {"image": preprocessing.to_unit_range(pixels), "label": record["label"], "image_id": record["image_id"]}


def all_images(source: ImageSource, title: str) -> tuple[np.ndarray, np.ndarray]:
    """All pictures of a split and their labels."""
    records = []
    with progress(title, len(source), "images") as shown:
        for i in range(len(source)):
            records.append(source[i])
            shown.update()
    return np.stack([r["image"] for r in records]), np.array([r["label"] for r in records])


def reconstruct(model, params, images: np.ndarray, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Pictures after the tokenizer, uint8, and how often each code was used."""

    def pictures_and_codes(batch):
        found, codes = through_tokenizer(model, params, preprocessing.to_unit_range(batch))
        return preprocessing.to_uint8(found), codes

    reconstructions, codes = features.in_batches(pictures_and_codes, images, batch_size)
    return reconstructions, np.bincount(codes.ravel(), minlength=model.codebook_size)


@functools.partial(jax.jit, static_argnums=0)
def through_tokenizer(model, params, batch):
    """A batch of images in [-1, 1] after the tokenizer, and its codes."""
    reconstructions, quantized = model.apply({"params": params}, batch)
    return reconstructions, quantized.codes


def cards(content: dict[str, Any], tokenizer: dict[str, Any], usage: float) -> list[tuple[str, str]]:
    """The figures at the top of the report."""
    scores = content["scores"]
    ratio = scores[SAMPLED]["frechet_distance"] / scores[RECONSTRUCTED]["frechet_distance"]
    return [
        (f"{scores[SAMPLED]['class_accuracy']:.1%}", "samples recognised as the class asked for"),
        (
            f"{scores[SAMPLED]['frechet_distance']:.2f}",
            f"Fréchet distance of samples, {ratio:.1f} x the reconstructions'",
        ),
        (f"{content['classifier_val_accuracy']:.1%}", "of real val images the classifier gets right"),
        (f"{usage:.1%}", "of the codebook used on val"),
        *([(f"{tokenizer['psnr']:.1f} dB", "PSNR of reconstructions")] if "psnr" in tokenizer else []),
    ]


def share(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def scores_table(scores: dict[str, Any]) -> report.Table:
    head = ("set", "images", "Fréchet distance", "precision", "recall", "recognised as its class")
    rows = [
        (
            title,
            f"{row['count']}",
            f"{row['frechet_distance']:.2f}",
            share(row["precision"]),
            share(row["recall"]),
            f"{row['class_accuracy']:.1%}",
        )
        for title, row in scores.items()
    ]
    return report.Table(head, rows)


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
    say(f"\nclassifier: {content['classifier_val_accuracy']:.1%} of the real val images right")
    say(f"{'':32}{'images':>8}{'Fréchet':>10}{'precision':>11}{'recall':>8}{'class':>8}")
    for title, row in content["scores"].items():
        say(
            f"{title:32}{row['count']:>8}{row['frechet_distance']:>10.2f}{share(row['precision']):>11}"
            f"{share(row['recall']):>8}{row['class_accuracy']:>8.1%}"
        )
    say(f"grid of samples   {samples_directory / 'grid.png'}")
    say(f"scores            {directory / (name + '.json')}")
    say(f"report            {directory / 'report.html'}")


def run_reconstruction(config: ConfigDict, workdir: epath.Path) -> None:
    """What the tokenizer does to the val images: PSNR, SSIM, LPIPS where its weights are given, rFID where Inception
    weights are; leaves figures.json, both sets as .npz and pairs.png in workdir/evaluation/reconstruction."""
    directory = workdir / "evaluation" / "reconstruction"
    tokenizer_directory = artifacts.input_directory(config, workdir, "tokenizer", "tokenizer")
    model, params, tokenizer = load_tokenizer(tokenizer_directory, sharding.make_mesh(**config.mesh))
    images = open_images(config.data)
    measures: dict[str, Callable] = {"psnr": psnr_of_bytes, "ssim": ssim.ssim}
    section = config.tokenizer_training
    if lpips_available(section.vgg_weights, section.lpips_weights):
        lpips = jax.jit(load_lpips(section.vgg_weights, section.lpips_weights))
        measures["lpips"] = lambda *pair: np.ravel(lpips(*map(preprocessing.to_unit_range, pair)))
    values: dict[str, list[np.ndarray]] = {name: [] for name in measures}
    with lock.hold(directory), progress("reconstructing", len(images.val), "images") as shown:
        sets = {name: ArrayParts(directory / f"{name}-parts") for name in ("originals", "reconstructions")}
        for part in sets.values():
            part.clear()
        for batch in loader.eval_batches(images.val, config.evaluation.batch_size):
            found, _ = reconstruct(model, params, batch["image"], config.evaluation.batch_size)
            pair = [batch["image"][batch["valid"]], found[batch["valid"]]]
            for name, measure in measures.items():
                values[name].append(np.asarray(measure(batch["image"], found))[batch["valid"]])
            for part, rows in zip(sets.values(), pair, strict=True):
                part.append(rows)
            shown.update(len(pair[0]))
        some = np.linspace(0, len(images.val) - 1, min(10, len(images.val))).round().astype(int)
        pairs = np.concatenate([part.take(some) for part in sets.values()])
        scale = pictures.scale_to_see(config.data.resolution)
        pictures.write_png(directory / "pairs.png", pictures.image_grid(pairs, columns=len(some), scale=scale))
        for name, part in sets.items():
            part.save_npz(directory / f"{name}.npz")
            part.remove()
    figures: dict[str, Any] = {name: float(np.concatenate(found).mean()) for name, found in values.items()}
    figures = {"images": len(images.val), "tokenizer": tokenizer.fingerprint, **figures}
    artifacts.write_bytes(directory / "figures.json", (json.dumps(figures, indent=2) + "\n").encode())
    for name in measures:
        say(f"{name:16}{figures[name]:>12.4f}")
    say(f"pictures          {directory / 'pairs.png'} (above: originals)")
    if not flags.FLAGS.inception_weights and not downloads.here(downloads.INCEPTION):
        say("rFID              not without Inception weights: give --inception_weights=FILE")
        return
    say("\nrFID and others, of the reconstructions against the val images themselves")
    run_files(directory / "reconstructions.npz", directory / "inception", directory / "originals.npz")


def psnr_of_bytes(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """PSNR of each of some uint8 images, in dB."""
    return np.asarray(psnr(*(jax.numpy.asarray(preprocessing.to_unit_range(images)) for images in (first, second))))


def run_files(samples: epath.Path, output: epath.Path, reference_path: epath.Path | None) -> None:
    """Scores a file of images against a reference, or makes --make-reference of it where there is none; leaves
    scores.json in `output`."""
    options = flags.FLAGS
    adm_suite.open_images(samples)
    weights = downloads.find(options.inception_weights, downloads.INCEPTION, "Inception weights")
    network = adm_suite.Network(*inception.load(weights), downloads.sha256_of(weights))
    with lock.hold(output):
        sha256 = downloads.sha256_of(samples)
        if reference_path is None:
            target = epath.Path(options["make-reference"].value).expanduser()
            about = {"name": samples.name, "sha256": sha256}
            about = adm_suite.make_reference(target, samples, network, output, about, options.batch_size)
            say(f"reference {target}: {about['statistics_of']:,} images of {about['name']} ({sha256[:12]})")
            return
        reference = adm_suite.load_reference(
            reference_path, downloads.sha256_of(reference_path), network, output, options.batch_size
        )
        found = adm_suite.features_of(samples, sha256, network, output, options.batch_size)
        labels_path = samples.parent / "labels.npy"
        labels = read_array(labels_path) if labels_path.exists() else None
        scores = adm_suite.score(found, reference)
        content = {
            "scores": scores,
            "samples": {"name": samples.name, "sha256": sha256, "images": found.num_images},
            "labels": adm_suite.label_protocol(labels),
            "reference": reference.about,
            "weights": {"name": weights.name, "sha256": network.sha256},
            "deviations": adm_suite.deviations(adm_suite.open_images(samples).shape, found, reference, labels),
        }
        artifacts.write_bytes(output / "scores.json", (json.dumps(content, indent=2) + "\n").encode())
    announce_files(content)
    say(f"scores            {output / 'scores.json'}")
    if options.self_check:
        say("\nADM-G + ADM-U against VIRTUAL_imagenet256_labeled.npz, here and as published")
        for line in adm_suite.self_check(scores):
            say(line)


def run_sweep(config: ConfigDict, workdir: epath.Path, sweep: str) -> None:
    """Samples and scores along one field of config.sampling, the same labels and seeds at each point, and leaves
    sweep-FIELD.json and sweep-FIELD.png in workdir/evaluation."""
    field, values = sweep_values(sweep, config)
    points = []
    for value in values:
        point = config.copy_and_resolve_references()
        point.sampling[field] = value
        check_config(point)
        points.append(point)
    rows = []
    for value, point in zip(values, points, strict=True):
        say(f"\n{field} {value:g}")
        sample.run(point, workdir)
        run_chosen(point, workdir)
        rows.append({field: value, **scores_of(point, workdir)})
    directory = workdir / "evaluation"
    content = {"field": field, "labels": config.sampling.labels, "seed": config.sampling.seed, "points": rows}
    artifacts.write_bytes(directory / f"sweep-{field}.json", (json.dumps(content, indent=2) + "\n").encode())
    plot = report.sweep_plot(field, rows, f"{config.sampling.num_images} samples at each point.")
    artifacts.write_bytes(directory / f"sweep-{field}.png", plot.png)
    names = list(rows[0])
    say("\n" + "".join(f"{name:>20}" for name in names))
    for row in rows:
        say("".join(f"{'–' if row[name] is None else f'{row[name]:.4g}':>20}" for name in names))
    say(f"curve             {directory / f'sweep-{field}.png'}")


def run_watch(config: ConfigDict, workdir: epath.Path, pause: float) -> None:
    """Scores each checkpoint of a training, which may be running elsewhere, once: in order, until the training is
    finished and all are scored. Leaves watch.jsonl and TensorBoard events in workdir/evaluation."""
    from clu import metric_writers  # imports TensorFlow, which takes seconds

    transformer_directory = artifacts.input_directory(config, workdir, "transformer", "train")
    directory = workdir / "evaluation"
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "watch.jsonl"
    scored = {line["step"] for line in metric_log.read_metrics(directory, path.name)}
    board = metric_writers.SummaryWriter(os.fspath(directory))
    say(f"watching {transformer_directory}: {len(scored)} checkpoints scored before")
    while True:
        training = artifacts.read_metadata(transformer_directory)
        new = [step for step in checkpoint.steps_in(transformer_directory / "checkpoints") if step not in scored]
        for step in new:
            point = config.copy_and_resolve_references()
            point.sampling.step = step
            scored.add(step)
            say(f"\nstep {step}")
            try:
                sample.run(point, workdir)
                run_chosen(point, workdir)
            except UserError as error:
                if step in checkpoint.steps_in(transformer_directory / "checkpoints"):
                    raise
                say(f"the checkpoint of step {step} was removed before it was scored ({error})")
                continue
            found = {name: value for name, value in scores_of(point, workdir).items() if value is not None}
            with path.open("a") as file:
                file.write(json.dumps({"step": step, **found}) + "\n")
            board.write_scalars(step, {f"evaluation/{name}": value for name, value in found.items()})
            board.flush()
        if not new and training is not None and training.finished:
            say(f"watch: the training is finished, {len(scored)} checkpoints are scored, in {path}")
            return
        if not new:
            time.sleep(pause)


def sweep_values(sweep: str, config: ConfigDict) -> tuple[str, list[float | int]]:
    """Field and values of FIRST:LAST:STEP, both ends included.

    Raises:
        UserError: another field than cfg_scale, temperature, top_k and top_p, or no such range.
    """
    field, _, text = sweep.partition("=")
    if field not in SWEPT:
        raise UserError(f"--sweep={sweep}: {field!r} is none of {', '.join(SWEPT)}")
    kind = type(config.sampling[field])
    try:
        first, last, step = (kind(part) for part in text.split(":"))
    except ValueError as error:
        raise UserError(f"--sweep={sweep}: a range is FIRST:LAST:STEP, as cfg_scale=1.5:2.5:0.25") from error
    if step <= 0 or last < first:
        raise UserError(f"--sweep={sweep}: the step must be positive and the last value not below the first")
    count = int((last - first) / step + 1e-9) + 1
    return field, [kind(round(first + i * step, 9)) for i in range(count)]


def name_of_samples(config: ConfigDict, workdir: epath.Path) -> str:
    """Name of the samples that config.sampling asks for; raises UserError where their transformer is not there."""
    directory = artifacts.input_directory(config, workdir, "transformer", "train")
    return artifacts.samples_name(config, transformer_at(directory, config.sampling.step).figures["step"])


def scores_of(config: ConfigDict, workdir: epath.Path) -> dict[str, float | None]:
    """The scores that an evaluation of config.sampling has left."""
    name = name_of_samples(config, workdir)
    if flags.FLAGS.reference:
        found = json.loads((workdir / "evaluation" / f"{name}-inception" / "scores.json").read_text())
        return found["scores"]
    found = json.loads((workdir / "evaluation" / f"{name}.json").read_text())["scores"][SAMPLED]
    return {key: value for key, value in found.items() if key != "count"}


def announce_files(content: dict[str, Any]) -> None:
    """Scores of files of images, and all that they depend on."""
    for name, value in content["scores"].items():
        say(f"{name:16}{'–' if value is None else f'{value:.4f}':>12}")
    reference, weights = content["reference"], content["weights"]
    say(f"samples           {content['samples']['name']}, {content['samples']['images']:,} images")
    say(f"labels            {content['labels']}")
    say(f"reference         {reference['name']} ({reference['sha256'][:12]})")
    say(f"Inception weights {weights['name']} ({weights['sha256'][:12]})")
    for deviation in content["deviations"]:
        say(f"DEVIATES          {deviation}")


def run_chosen(config: ConfigDict | None, workdir: epath.Path | None) -> None:
    """What the options ask for."""
    options = flags.FLAGS
    reference = epath.Path(options.reference).expanduser() if options.reference else None
    if options.self_check and not (options.samples and options.reference):
        raise UserError("--self_check needs --samples=ADM samples and --reference=VIRTUAL_imagenet256_labeled.npz")
    if options.samples:
        if bool(options.reference) == bool(options["make-reference"].value):
            raise UserError("with --samples, give one of --reference=FILE.npz and --make-reference=FILE.npz")
        samples = epath.Path(options.samples).expanduser()
        beside = samples.parent / f"{samples.name}.evaluation"
        run_files(samples, epath.Path(options.output).expanduser() if options.output else beside, reference)
    elif config is None or workdir is None:
        raise UserError("give --config=configs/FILE.py and --workdir=DIR, or --samples=FILE.npz")
    elif options["make-reference"].value:
        raise UserError("--make-reference=FILE.npz is made of --samples=FILE.npz")
    elif reference is not None:
        name = name_of_samples(config, workdir)
        artifacts.require(workdir / "samples" / name, "sample")
        run_files(workdir / "samples" / name / "samples.npz", workdir / "evaluation" / f"{name}-inception", reference)
    else:
        jobs = {"scores": run, "code_distance": run_code_distance, "reconstruction": run_reconstruction}
        jobs[options.what](config, workdir)


def run_point_or_sweep(config: ConfigDict | None, workdir: epath.Path | None) -> None:
    """The whole command."""
    options = flags.FLAGS
    if not options.sweep and not options.watch:
        run_chosen(config, workdir)
    elif config is None or workdir is None or (options.sweep and options.watch):
        raise UserError("--sweep and --watch need --config=configs/FILE.py and --workdir=DIR, and not each other")
    elif options.sweep:
        run_sweep(config, workdir, options.sweep)
    else:
        run_watch(config, workdir, options.watch_seconds)


if __name__ == "__main__":
    flags.DEFINE_enum("what", "scores", ("scores", "code_distance", "reconstruction"), "What is measured.")
    flags.DEFINE_string("samples", None, "Images to score: a .npz with arr_0, uint8 [N, H, W, 3].")
    flags.DEFINE_string(
        "reference", None, "What to compare with: a .npz with mu, sigma, mu_s, sigma_s, or arr_0, or all."
    )
    flags.DEFINE_string("make-reference", None, "Where to write a reference made of --samples.")
    flags.DEFINE_string("inception_weights", "", "File of the Inception network's weights.")
    flags.DEFINE_string("output", None, "Directory for scores.json and what a killed run goes on from.")
    flags.DEFINE_integer("batch_size", 64, "Images that pass the Inception network together.", lower_bound=1)
    flags.DEFINE_bool("self_check", False, "Compare the scores with those published for ADM-G + ADM-U's samples.")
    flags.DEFINE_string("sweep", None, "FIELD=FIRST:LAST:STEP of config.sampling: sample and score at each value.")
    flags.DEFINE_bool("watch", False, "Score each checkpoint of a training that may be running, until it is finished.")
    flags.DEFINE_float("watch_seconds", 30.0, "How often --watch looks for a new checkpoint.", lower_bound=0.1)
    command_line.main(run_point_or_sweep, needs_config=lambda: not flags.FLAGS.samples)
