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
from iar_jax.runtime import artifacts, sharding

SCORES = ("frechet_distance", "mind", "precision", "recall", "class_accuracy")

FEATURES_FILE = "train-features.npz"

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


def is_made(config: ConfigDict, directory: epath.Path) -> bool:
    """Whether `make_judge` has left a judge in a directory; one whose classifier is damaged has to be made again."""
    if not (directory / FEATURES_FILE).exists():
        return False
    if not judges_by_classifier(config):
        return True
    return artifacts.read_finished(directory / "classifier") is not None


def make_judge(config: ConfigDict, directory: epath.Path) -> None:
    """Leaves the judge of config.evaluation in a directory: a classifier of the pictures, where one judges, and the
    features of the training images."""
    images = open_images(config.data)
    if judges_by_classifier(config):
        classifier.trained(config, directory / "classifier", images, sharding.make_mesh(**config.mesh))
    features_of, _ = network_of(config, directory, len(images.class_names))
    write_npz(directory / FEATURES_FILE, {"features": features_of(SourceStream(images.train)).features})


def read_judge(config: ConfigDict, directory: epath.Path, num_classes: int) -> Judge:
    """The judge that `make_judge` left; no picture is opened, which of many files takes as long as to score samples.

    Raises:
        UserError: it is not there, or damaged.
    """
    features_of, about = network_of(config, directory, num_classes)
    reference = read_array(directory / FEATURES_FILE, "features")
    return Judge(features_of, reference, frechet.feature_statistics(reference), config.evaluation.neighbours, about)


def judges_by_classifier(config: ConfigDict) -> bool:
    """Whether features are a classifier's, and not Inception's."""
    return config.evaluation.features == "classifier"


def network_of(config: ConfigDict, directory: epath.Path, num_classes: int) -> tuple[FeaturesOf, dict[str, Any]]:
    """What takes features, and what is known of it.

    Raises:
        UserError: the classifier is not finished or damaged, or there are no Inception weights.
    """
    section = config.evaluation
    if judges_by_classifier(config):
        judge = classifier.restored(config, directory / "classifier", num_classes, sharding.make_mesh(**config.mesh))
        features_of = functools.partial(classifier.judged, judge, "samples", batch_size=section.batch_size)
        return features_of, {"features": "classifier", "val_accuracy": judge.val_accuracy}
    network = files.inception_network(section.inception_weights)

    def inception_features_of(rows: ImageStream) -> ClassifierFeatures:
        found = [
            inception_features(network.module, network.params, batch, section.batch_size)["pool"]
            for batch in rows.batches(section.batch_size)
        ]
        return ClassifierFeatures(np.concatenate(found), np.full(rows.shape[0], -1))

    return inception_features_of, {"features": "inception", "weights": network.sha256}


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
