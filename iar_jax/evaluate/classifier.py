"""Scores without weights from elsewhere: in the features of a small classifier that is trained on the same images."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from iar_jax.config.relevance import relevant
from iar_jax.data import loader, preprocessing
from iar_jax.data.image_streams import ImageStream, SourceStream
from iar_jax.data.images import ImageDataset
from iar_jax.metrics import features, frechet, precision_recall
from iar_jax.metrics.adm_suite import ImageSet
from iar_jax.models.classifier import Classifier
from iar_jax.runtime import artifacts, checkpoint, distributed, sharding
from iar_jax.runtime.progress import progress
from iar_jax.training import classifier_steps
from iar_jax.training.loop import TrainingRun
from iar_jax.training.optimizer import make_optimizer
from iar_jax.training.schedules import learning_rate_schedule
from iar_jax.training.state import state_shardings


class Judge(NamedTuple):
    """The classifier, the devices that it runs on, and the share of the val images that it gets right."""

    model: Classifier
    params: Any
    mesh: Mesh
    val_accuracy: float


def scores(
    judge: Judge, images: ImageDataset, sets: dict[str, ImageSet], section: ConfigDict
) -> dict[str, dict[str, Any]]:
    """Figures of each set of labelled images, by title, against the training images."""
    reference, _ = judged(judge, "train images", SourceStream(images.train), section.batch_size)
    statistics = frechet.feature_statistics(reference)
    found = {}
    for title, candidates in sets.items():
        inside, predictions = judged(judge, title, candidates.rows, section.batch_size)
        precision = recall = None  # too few images for a manifold
        if min(len(reference), len(inside)) > section.neighbours:
            precision, recall = precision_recall.precision_recall(reference, inside, section.neighbours)
        found[title] = {
            "count": len(inside),
            "frechet_distance": frechet.frechet_distance(*statistics, *frechet.feature_statistics(inside)),
            "precision": precision,
            "recall": recall,
            "class_accuracy": float(np.mean(predictions == candidates.labels)),
        }
    return found


def judged(judge: Judge, title: str, rows: ImageStream, batch_size: int) -> features.ClassifierFeatures:
    """Features and predictions of all rows."""
    parts = []
    with progress(f"features of {title}", rows.shape[0], "images") as shown:
        for batch in rows.batches(batch_size):
            parts.append(features.classifier_features(judge.model, judge.params, batch, batch_size, judge.mesh))
            shown.update(len(batch))
    return features.ClassifierFeatures(*(np.concatenate(part) for part in zip(*parts, strict=True)))


def trained(config: ConfigDict, directory: epath.Path, images: ImageDataset, mesh: Mesh) -> Judge:
    """The classifier of this data set, trained unless it is there."""
    section = config.evaluation
    made_by, given = relevant(config, ("seed", "data", "evaluation")), {"images": images.fingerprint}
    if artifacts.finished(directory, made_by, given, lambda: given):
        return restored(config, directory, len(images.class_names), mesh)
    model = Classifier(num_classes=len(images.class_names), resolution=config.data.resolution)
    optimizer = make_optimizer(
        learning_rate_schedule("cosine", section.classifier_learning_rate, 20, section.classifier_steps),
        b1=0.9,
        b2=0.99,
        weight_decay=1e-2,
        clip_norm=1.0,
    )
    init = functools.partial(classifier_steps.init_classifier_state, model=model, optimizer=optimizer)
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
        artifacts.begin(directory, "evaluate", made_by, given)
        params = train(config, training, images, mesh, model, optimizer, init)
        judge = Judge(model, params, mesh, 0.0)
        _, predictions = judged(judge, "val images", SourceStream(images.val), section.batch_size)
        accuracy = float(np.mean(predictions == images.val.labels))
        training.wait_until_saved()
        fingerprint = artifacts.fingerprint_arrays(distributed.to_host(params))
        artifacts.finish(directory, fingerprint, {"val_accuracy": accuracy})
    return judge._replace(val_accuracy=accuracy)


def restored(config: ConfigDict, directory: epath.Path, num_classes: int, mesh: Mesh) -> Judge:
    """A classifier that was trained before; no picture is opened.

    Raises:
        UserError: it is not finished, or damaged.
    """
    done = artifacts.require(directory, "evaluate")
    model = Classifier(num_classes=num_classes, resolution=config.data.resolution)
    init = functools.partial(classifier_steps.init_classifier_params, model=model)
    shapes = jax.eval_shape(init, jax.random.key(config.seed))
    abstract = checkpoint.abstract_tree(shapes, jax.tree.map(lambda _: sharding.replicated(mesh), shapes))
    params, _ = checkpoint.restore_params(directory / "checkpoints", abstract)
    return Judge(model, params, mesh, done.figures["val_accuracy"])


def train(
    config: ConfigDict,
    training: TrainingRun,
    images: ImageDataset,
    mesh: Mesh,
    model: Classifier,
    optimizer: optax.GradientTransformation,
    init: Callable[[Any], Any],
) -> Any:
    """Trains the classifier, or goes on; returns its averaged weights."""
    key = jax.random.key(config.seed)
    state, shardings = sharding.initialise_sharded(init, mesh, key, shardings_of=state_shardings)
    state = training.resume(state, checkpoint.abstract_tree(state, shardings))
    train_step = jax.jit(
        classifier_steps.make_classifier_train_step(model, optimizer, ema_decay=0.99, key=jax.random.fold_in(key, 1)),
        donate_argnums=0,
        out_shardings=(shardings, sharding.replicated(mesh)),
    )
    part, num_parts = sharding.local_part(mesh)
    batches = loader.train_batches(
        images.train,
        functools.partial(augment, config.data),
        seed=config.seed,
        batch_size=training.batch_size,
        first_step=training.step,
        part=part,
        num_parts=num_parts,
    )
    for _ in training.steps():
        batch = sharding.global_batch(mesh, training.next_batch(batches))
        state, metrics = train_step(state, batch["image"], batch["label"])
        training.finished_step(state, metrics)
    return state.ema_params


def augment(section: ConfigDict, record: dict, rng: np.random.Generator) -> dict:
    """A training picture of the classifier in [-1, 1], moved by up to two pixels, cropped where the config says so."""
    pixels = preprocessing.random_shift(record["image"], 2, rng)
    pixels = preprocessing.AUGMENTATIONS[section.augmentation].of_classifier(pixels, section, rng)
    return {"image": preprocessing.to_unit_range(pixels), "label": record["label"], "image_id": record["image_id"]}
