"""Images to the features that distances between image sets are taken in."""

from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, UInt8

from iar_jax.data.preprocessing import to_unit_range
from iar_jax.models.classifier import Classifier


class ClassifierFeatures(NamedTuple):
    """Features of the last hidden layer and the class that the classifier gives each image."""

    features: Float[np.ndarray, "N F"]
    predictions: np.ndarray


def classifier_features(
    model: Classifier, params: Any, images: UInt8[np.ndarray, "N R R 3"], batch_size: int
) -> ClassifierFeatures:
    """Features and predictions of uint8 images, batch by batch; the last batch is filled up, not compiled anew."""
    apply = jax.jit(lambda params, images: model.apply({"params": params}, images))
    features, predictions = [], []
    for start in range(0, len(images), batch_size):
        batch = images[start : start + batch_size]
        filled = np.concatenate([batch, np.repeat(batch[-1:], batch_size - len(batch), axis=0)])
        found, logits = apply(params, to_unit_range(filled))
        features.append(np.asarray(found)[: len(batch)])
        predictions.append(np.asarray(logits).argmax(axis=-1)[: len(batch)])
    return ClassifierFeatures(np.concatenate(features), np.concatenate(predictions))
