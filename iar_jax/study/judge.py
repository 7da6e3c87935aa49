"""Scores of samples in features that all runs of a study share."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from iar_jax.data.array_files import read_array, write_npz
from iar_jax.data.image_streams import ImageStream, SourceStream
from iar_jax.data.images import open_images
from iar_jax.evaluate import classifier, files
from iar_jax.metrics import frechet, precision_recall
from iar_jax.metrics.features import ClassifierFeatures, inception_features
from iar_jax.metrics.mind import mind, random_directions
from iar_jax.runtime import sharding

SCORES = ("frechet_distance", "mind", "precision", "recall", "class_accuracy")

# Features of images, and the classes that they are taken for where there is a classifier.
FeaturesOf = Callable[[ImageStream], ClassifierFeatures]


class Judge(NamedTuple):
    """What takes features of images, and those of the training images.

    Attributes:
        statistics: of the reference.
        neighbours: k of precision and recall.
        about: what is known of it.
    """

    features_of: FeaturesOf
    reference: np.ndarray
    statistics: frechet.FeatureStatistics
    neighbours: int
    about: dict[str, Any]


def judge_of(config: ConfigDict, directory: epath.Path) -> Judge:
    """The judge of config.evaluation, made in a directory where it is not there yet."""
    images, section = open_images(config.data), config.evaluation
    mesh = sharding.make_mesh(**config.mesh)
    if section.features == "classifier":
        judge = classifier.trained(config, directory / "classifier", images, mesh)
        features_of: FeaturesOf = functools.partial(classifier.judged, judge, "samples", batch_size=section.batch_size)
        about = {"features": "classifier", "val_accuracy": judge.val_accuracy}
    else:
        network = files.inception_network(section.inception_weights)

        def features_of(rows: ImageStream) -> ClassifierFeatures:
            batches = rows.batches(section.batch_size)
            found = [inception_features(network.module, network.params, batch)["pool"] for batch in batches]
            return ClassifierFeatures(np.concatenate(found), np.full(rows.shape[0], -1))

        about = {"features": "inception", "weights": network.sha256}
    kept = directory / "train-features.npz"
    if not kept.exists():
        write_npz(kept, {"features": features_of(SourceStream(images.train)).features})
    reference = read_array(kept, "features")
    return Judge(features_of, reference, frechet.feature_statistics(reference), section.neighbours, about)


def scores(judge: Judge, samples: ClassifierFeatures, labels: np.ndarray) -> dict[str, float | int | None]:
    """Scores of samples against the training images; precision and recall against as many of these as there are
    samples, from all over the set; `class_accuracy` is None without a classifier."""
    reference, found = judge.reference, samples.features
    places = np.linspace(0, len(reference) - 1, min(len(found), len(reference))).round().astype(int)
    precision = recall = None  # too few images for a manifold
    if len(places) > judge.neighbours:
        precision, recall = precision_recall.precision_recall(reference[places], found, judge.neighbours)
    known = judge.about["features"] == "classifier"
    return {
        "count": len(found),
        "frechet_distance": frechet_distance(judge, samples),
        "mind": mind(reference, found, random_directions(reference.shape[1])),
        "precision": precision,
        "recall": recall,
        "class_accuracy": float(np.mean(samples.predictions == labels)) if known else None,
    }


def frechet_distance(judge: Judge, samples: ClassifierFeatures) -> float:
    """Of some samples to the training images."""
    return frechet.frechet_distance(*judge.statistics, *frechet.feature_statistics(samples.features))
