"""Images to the features that distances between image sets are taken in."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, UInt8

from iar_jax.data.preprocessing import to_unit_range
from iar_jax.models.classifier import Classifier
from iar_jax.models.inception import SIZE, InceptionV3, legacy_resize
from iar_jax.runtime import distributed, sharding


class ClassifierFeatures(NamedTuple):
    """Features of the last hidden layer and the class that the classifier gives each image."""

    features: Float[np.ndarray, "N F"]
    predictions: np.ndarray


def classifier_features(
    model: Classifier, params: Any, images: UInt8[np.ndarray, "N R R 3"], batch_size: int, mesh: Mesh
) -> ClassifierFeatures:
    """Features and predictions of uint8 images, batch by batch over the devices of a mesh."""
    found, logits = over_mesh(
        lambda batch: classifier_outputs(model, params, batch), images, batch_size, mesh, to_unit_range
    )
    return ClassifierFeatures(found, logits.argmax(axis=-1))


@functools.partial(jax.jit, static_argnums=0)
def classifier_outputs(model: Classifier, params: Any, images: Any):
    """Features and logits of a batch of images in [-1, 1]."""
    return model.apply({"params": params}, images)


def in_batches(function: Callable[[np.ndarray], Any], array: np.ndarray, batch_size: int) -> Any:
    """Results of function for all entries, from batches of one shape: the last is filled up with copies of its last
    entry, whose results are left out."""
    found = []
    for start in range(0, len(array), batch_size):
        batch = array[start : start + batch_size]
        filled = np.concatenate([batch, np.repeat(batch[-1:], batch_size - len(batch), axis=0)])
        found.append(jax.device_get(function(filled)))
    return jax.tree.map(lambda *parts: np.concatenate(parts)[: len(array)], *found)


def over_mesh(
    function: Callable[[Any], Any],
    array: np.ndarray,
    batch_size: int,
    mesh: Mesh,
    prepare: Callable[[np.ndarray], np.ndarray] = lambda rows: rows,
) -> Any:
    """`in_batches` with each batch, of `batch_size` entries rounded up, split over the devices of all processes. Every
    process has the whole array, prepares its part of it, and gets all results.

    Args:
        function: of a device array, traced or not.
        prepare: what becomes of a process' entries before they go to its devices.
    """
    shards = sharding.num_batch_shards(mesh)

    def split(batch: np.ndarray) -> Any:
        return distributed.to_host(function(sharding.global_batch(mesh, prepare(sharding.part_of(mesh, batch)))))

    return in_batches(split, array, -(-batch_size // shards) * shards)


def inception_features(
    module: InceptionV3, params: Any, images: UInt8[np.ndarray, "N H W 3"], batch_size: int
) -> dict[str, Float[np.ndarray, "N D"]]:
    """What the ADM suite takes from InceptionV3, for uint8 images of any size.

    Images are resized as TensorFlow 1 did, then (pixel - 128) / 128. Batches are spread over all devices.

    Args:
        module, params: of `interop.inception.load`.

    Returns:
        "pool" [N, 2048], "spatial" [N, 2023] and "logits" [N, 1008], float32.
    """
    mesh = sharding.make_mesh(data=-1, fsdp=1, tensor=1)
    params = jax.device_put(params, sharding.replicated(mesh))
    found = over_mesh(lambda batch: inception_outputs(module, params, batch), images, batch_size, mesh)
    return found._asdict()


@functools.partial(jax.jit, static_argnums=0)
def inception_outputs(module: InceptionV3, params: Any, images: Any):
    """Outputs of the network for one batch of uint8 images."""
    resized = legacy_resize(images.astype(jnp.float32), SIZE)
    return module.apply({"params": params}, (resized - 128.0) / 128.0)
