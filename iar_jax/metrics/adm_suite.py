"""FID, sFID, Inception score, precision, recall and KID of sets of images, by the protocol of the ADM suite.

The protocol (openai/guided-diffusion, evaluations/evaluator.py): InceptionV3 of 2015-12-05 on images resized as
TensorFlow 1 did; statistics of pool_3 and of the first 7 channels of mixed_6/conv; the Inception score in splits of
5,000 in file order; precision and recall of manifolds of 3 neighbours, with the reference's images (10,000 of them)
against all samples. A reference file has `mu`, `sigma`, `mu_s`, `sigma_s` and some images, `arr_0`.
"""

import hashlib
import json
import math
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from iar_jax.data.array_files import RowReader, array_names, read_array, write_npz
from iar_jax.data.array_parts import ArrayParts
from iar_jax.data.image_streams import ImageStream
from iar_jax.metrics.features import inception_features
from iar_jax.metrics.frechet import FeatureStatistics, RunningStatistics, frechet_distance
from iar_jax.metrics.inception_score import inception_score
from iar_jax.metrics.kernel_distance import kernel_distance
from iar_jax.metrics.precision_recall import precision_recall
from iar_jax.models.inception import InceptionV3
from iar_jax.runtime import distributed
from iar_jax.runtime.artifacts import sha256_of
from iar_jax.runtime.errors import UserError, brief
from iar_jax.runtime.interruption import catch_stop_signals
from iar_jax.runtime.progress import progress

SPLIT_SIZE = 5000
NEIGHBOURS = 3
# What the protocol's figures are made from.
NUM_SAMPLES, NUM_REFERENCE_IMAGES = 50_000, 10_000
POOL, SPATIAL, LOGITS = "pool", "spatial", "logits"
DIMENSIONS = {POOL: 2048, SPATIAL: 2023, LOGITS: 1008}
# Images whose features are kept together: what a killed evaluation loses at most.
PART = 1000
MOST_PART_BYTES = 1 << 28

# ADM-G and ADM-U samples against VIRTUAL_imagenet256_labeled.npz, as guided-diffusion's README has them; and how far a
# faithful evaluation may be off: FID by the resize and rounding of another backend, the others by float16 distances.
PUBLISHED = {
    "inception_score": (215.8370361328125, 0.5),
    "fid": (3.942562, 0.01),
    "sfid": (6.140433, 0.05),
    "precision": (0.8265, 0.005),
    "recall": (0.5309, 0.005),
}


# What is not compared in publications: (kind of images, split of the reference).
UNUSUAL = {
    ("samples", "val"): "gFID against a val split: published ones are against the training set",
    ("reconstructions", "train"): (
        "rFID against the training set: published ones are against the val images (the same tokenizer has 2.70 "
        "against VIRTUAL_imagenet256_labeled.npz and 0.92 against val)"
    ),
}


UNSCALED = "all pixels are 0 or 1, as of images in [0, 1] that were made uint8 as they are; save np.round(255 * images)"


class Network(NamedTuple):
    """The feature network, and what its weights are."""

    module: InceptionV3
    params: Any
    name: str
    sha256: str


class ImageSet(NamedTuple):
    """Images to score, or to make a reference of, and what is known of them.

    Attributes:
        rows: the images.
        name, sha256: for people, and so that features of others are not taken for theirs.
        kind: "samples" of a model, "reconstructions" of a tokenizer, or "real" images.
        labels: int [N] in the order of the images, where known.
        lossy: some were stored as JPEG or lossy WebP.
        unscaled: see `seems_unscaled`.
    """

    rows: ImageStream
    name: str
    sha256: str
    kind: str = "samples"
    labels: np.ndarray | None = None
    lossy: bool = False
    unscaled: bool = False


class Features(NamedTuple):
    """Features of a set of images: statistics of all, and what must be kept whole."""

    num_images: int
    pool_statistics: FeatureStatistics
    spatial_statistics: FeatureStatistics
    pool: np.ndarray
    logits: np.ndarray


class Reference(NamedTuple):
    """Statistics to compare with, and features of some of the images that they are of; None where there are none."""

    about: dict[str, Any]
    pool_statistics: FeatureStatistics
    spatial_statistics: FeatureStatistics | None
    pool: np.ndarray | None


def open_images(path: epath.Path) -> RowReader:
    """A file of images; refuses what is not uint8 [N, H, W, 3]."""
    reader = RowReader(path)
    if len(reader.shape) != 4 or reader.shape[3] != 3 or reader.dtype != np.uint8:
        floats = reader.dtype.kind == "f" and reader.shape[3:] == (3,)
        advice = " (of numbers in [0, 1]: np.round(255 * images).astype(np.uint8))" if floats else ""
        raise UserError(f"{path}: arr_0 is {reader.dtype} {list(reader.shape)}; images are uint8 [N, H, W, 3]{advice}")
    check_count(path, reader.shape[0])
    if not 0 < math.prod(reader.shape[1:]) <= MOST_PART_BYTES:
        raise UserError(f"{path}: images of {reader.shape[2]} x {reader.shape[1]} pixels are not scored")
    return reader


def check_count(path: epath.Path, count: int) -> None:
    """Raises UserError where a set has too few images for statistics."""
    if count < 2:
        raise UserError(f"{path}: {count} image{'' if count == 1 else 's'}; two are the least that have statistics")


def rows_of_a_part(images: ImageStream) -> int:
    """Images that are in memory together, with features that are kept together."""
    return max(1, min(PART, MOST_PART_BYTES // math.prod(images.shape[1:])))


def seems_unscaled(images: ImageStream) -> bool:
    """Whether the first images have no pixel above 1: images in [0, 1] that became uint8 without a factor of 255."""
    return bool(next(images.batches(rows_of_a_part(images))).max() <= 1)


def features_of(images: ImageSet, network: Network, directory: epath.Path, batch_size: int) -> Features:
    """Features of a set of images. They are kept in `directory` part by part, so that a killed run goes on; `forget`
    deletes them.

    Raises:
        Interrupted: a signal asked for a stop.
    """
    count, kept = images.rows.shape[0], kept_features(images, network, directory)
    # Every process makes its share of each batch and gets all features; the first one keeps them.
    parts = {name: ArrayParts(kept / name) for name in DIMENSIONS} if distributed.is_first() else {}
    first = distributed.from_first(min((part.done for part in parts.values()), default=0))
    with catch_stop_signals() as stop, progress(f"features of {images.name}", count, "images", first=first) as shown:
        for batch in images.rows.batches(rows_of_a_part(images.rows), first):
            found = inception_features(network.module, network.params, batch, batch_size)
            for name, part in parts.items():
                if part.done == first:  # not kept yet when the run before was killed
                    part.append(found[name])
            first += len(batch)
            shown.update(len(batch))
            stop.obey(f"evaluate stopped after image {first} of {count}, whose features are kept")
    distributed.wait_for_all("features")
    if not parts:
        parts = {name: ArrayParts.made_elsewhere(kept / name, count) for name in DIMENSIONS}
    statistics = {}
    for name in (POOL, SPATIAL):
        running = RunningStatistics(DIMENSIONS[name])
        for rows in parts[name].batches():
            running.update(rows)
        statistics[name] = running.result()
    pool, logits = (np.concatenate(list(parts[name].batches())) for name in (POOL, LOGITS))
    return Features(count, statistics[POOL], statistics[SPATIAL], pool, logits)


def kept_features(images: ImageSet, network: Network, directory: epath.Path) -> epath.Path:
    """Where the features of a set by a network are kept."""
    key = hashlib.sha256(f"{images.sha256} {network.sha256} {network.module.dtype}".encode()).hexdigest()[:16]
    return directory / key


def forget(images: ImageSet, network: Network, directory: epath.Path) -> None:
    """Deletes the kept features of a set: 20 KB an image."""
    distributed.wait_for_all("features are read")
    kept = kept_features(images, network, directory)
    if distributed.is_first() and kept.exists():
        kept.rmtree()


def reference_of(
    images: ImageSet, split: str | None, network: Network, directory: epath.Path, batch_size: int
) -> Reference:
    """A set of images as what others are compared with: statistics and manifold of all of them."""
    found = features_of(images, network, directory, batch_size)
    about = {
        "name": images.name,
        "sha256": images.sha256,
        "split": split,
        "images": found.num_images,
        "statistics_of": found.num_images,
        "resolution": list(images.rows.shape[1:3]),
        "lossy": images.lossy,
    }
    return Reference(about, found.pool_statistics, found.spatial_statistics, found.pool)


def load_reference(path: epath.Path, network: Network, directory: epath.Path, batch_size: int) -> Reference:
    """A reference file: statistics, images, or both; statistics that it does not have are made from its images. What is
    in it is looked at before the network runs.

    Raises:
        UserError: it has neither, they are not what they should be, or it was made with other weights.
    """
    names = array_names(path)
    pairs = {POOL: ("mu", "sigma"), SPATIAL: ("mu_s", "sigma_s")}
    statistics = {
        name: read_statistics(path, pair, DIMENSIONS[name]) for name, pair in pairs.items() if names.issuperset(pair)
    }
    if POOL not in statistics and "arr_0" not in names:
        there = ", ".join(sorted(names)[:10]) or "nothing"
        raise UserError(
            f"{path} has {there}; a reference has mu and sigma (for FID), mu_s and sigma_s (for sFID), or images in "
            "arr_0, or all"
        )
    sha256 = sha256_of(path)
    about: dict[str, Any] = {
        "name": path.name,
        "sha256": sha256,
        "split": "train" if path.name.startswith("VIRTUAL_") else None,
        "images": None,
        "statistics_of": None,
    }
    if "about" in names:
        about |= read_about(path, network)
    about["spatial"] = SPATIAL in statistics or POOL not in statistics
    if "arr_0" not in names:
        return Reference(about, statistics[POOL], statistics.get(SPATIAL), None)
    images = ImageSet(open_images(path), path.name, sha256)
    if POOL in names and POOL in statistics:
        pool = read_array(path, POOL)
        if pool.ndim != 2 or pool.shape[1] != DIMENSIONS[POOL] or not np.isfinite(pool).all():
            raise UserError(f"{path}: {POOL} has shape {pool.shape}; it is [N, {DIMENSIONS[POOL]}], of finite numbers")
        about |= {"images": len(pool), "resolution": list(images.rows.shape[1:3])}
        return Reference(about, statistics[POOL], statistics.get(SPATIAL), pool)
    found = reference_of(images, about["split"], network, directory, batch_size)
    if POOL not in statistics:
        return found
    about |= {name: found.about[name] for name in ("images", "resolution")}
    return Reference(about, statistics[POOL], statistics.get(SPATIAL), found.pool)


def read_statistics(path: epath.Path, names: tuple[str, str], dimension: int) -> FeatureStatistics:
    """Mean and covariance of a reference file; raises UserError where they are not of features of this dimension."""
    shapes = ((dimension,), (dimension, dimension))
    found = [read_array(path, name) for name in names]
    for name, array, shape in zip(names, found, shapes, strict=True):
        if array.shape != shape or array.dtype.kind not in "fiu":
            raise UserError(f"{path}: {name} is {array.dtype} {list(array.shape)}; it should be float {list(shape)}")
        if not np.isfinite(array).all():
            raise UserError(f"{path}: {name} has entries that are not finite")
    return FeatureStatistics(*(np.asarray(array, np.float64) for array in found))


def read_about(path: epath.Path, network: Network) -> dict[str, Any]:
    """What a reference of ours was made from; raises UserError where that were other weights."""
    try:
        about = json.loads(str(read_array(path, "about")))
        weights = about.get("weights_sha256")
    except (ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: about is damaged ({brief(error)})") from error
    if weights and weights != network.sha256:
        raise UserError(
            f"{path} was made with the weights {weights[:12]}, and these are {network.sha256[:12]}: distances "
            "between the two mean nothing"
        )
    return about


def score(samples: Features, reference: Reference) -> dict[str, float | None]:
    """All figures; None for those that need what the reference does not have."""
    spatial = reference.spatial_statistics
    scores: dict[str, float | None] = {
        "fid": frechet_distance(*reference.pool_statistics, *samples.pool_statistics),
        "sfid": None if spatial is None else frechet_distance(*spatial, *samples.spatial_statistics),
        "inception_score": inception_score(samples.logits, SPLIT_SIZE),
        "precision": None,
        "recall": None,
        "kid": None,
    }
    if reference.pool is not None:
        if min(len(reference.pool), samples.num_images) > NEIGHBOURS:
            scores["precision"], scores["recall"] = precision_recall(reference.pool, samples.pool, NEIGHBOURS)
        # The estimate supposes that the two sets were drawn independently.
        same = np.array_equal(reference.pool, samples.pool)
        scores["kid"] = 0.0 if same else kernel_distance(reference.pool, samples.pool)[0]
    return scores


def deviations(images: ImageSet, about: dict[str, Any]) -> list[str]:
    """What keeps the figures of a set against a reference from being compared with published ones, for printing beside
    them.

    Args:
        about: of the reference.
    """
    found = []
    count = images.rows.shape[0]
    if count != NUM_SAMPLES:
        found.append(f"{count:,} {images.kind} instead of {NUM_SAMPLES:,}: FID falls with their number")
    if count <= DIMENSIONS[POOL]:
        found.append(
            f"no more images than feature dimensions ({DIMENSIONS[POOL]:,}): their covariance is singular, and FID "
            "far too high (its bias falls as 1 / images); KID has none"
        )
    if (images.kind, about["split"]) in UNUSUAL:
        found.append(UNUSUAL[images.kind, about["split"]])
    if about["split"] is None:
        found.append("which split the reference is of is not known (--make-reference with --split says it)")
    if about["statistics_of"] is not None:
        found.append(
            f"the reference's statistics are of {about['statistics_of']:,} images of {about['name']}, not those that "
            "published figures are against"
        )
    if not about.get("spatial", True):
        found.append("the reference has no mu_s and sigma_s: no sFID")
    if about["images"] is None:
        found.append("the reference has no images: no precision, recall and KID")
    elif about["images"] != NUM_REFERENCE_IMAGES:
        found.append(
            f"{about['images']:,} reference images for precision and recall instead of {NUM_REFERENCE_IMAGES:,}"
        )
    if about.get("resolution") and list(images.rows.shape[1:3]) != about["resolution"]:
        found.append(f"images of {list(images.rows.shape[1:3])} pixels against a reference of {about['resolution']}")
    labels = images.labels
    if labels is not None and len(labels) > 1 and (np.diff(labels) >= 0).all() and labels[0] != labels[-1]:
        found.append("images are sorted by class: the Inception score of consecutive splits is far too low")
    if images.lossy:
        found.append(
            "images were stored as JPEG or lossy WebP, whose losses are part of every figure; PNG and .npz have none"
        )
    if about.get("lossy"):
        found.append("the reference was made of images stored as JPEG or lossy WebP")
    if images.unscaled:
        found.append(UNSCALED)
    return found


def label_protocol(labels: np.ndarray | None) -> str:
    """How the samples' labels were chosen, as far as they tell."""
    if labels is None:
        return "unknown (no labels.npy beside the samples)"
    counts = np.bincount(labels)
    if counts.min() == counts.max():
        return f"balanced, {counts[0]} a class"
    return f"not balanced, {counts.min()} to {counts.max()} a class, as drawn at random"


def make_reference(
    path: epath.Path, images: ImageSet, split: str | None, network: Network, directory: epath.Path, batch_size: int
) -> dict[str, Any]:
    """Writes a reference file of a set of images: statistics of all, 10,000 of the images at even distances with their
    features, and what it was made from; returns the last."""
    found = reference_of(images, split, network, directory, batch_size)
    spatial = found.spatial_statistics
    assert spatial is not None  # of images there are always both
    count = images.rows.shape[0]
    chosen = np.linspace(0, count - 1, min(NUM_REFERENCE_IMAGES, count)).round().astype(int)
    kept, start = [], 0
    for rows in images.rows.batches(rows_of_a_part(images.rows)):
        kept.append(rows[chosen[(chosen >= start) & (chosen < start + len(rows))] - start])
        start += len(rows)
    about = found.about | {"images": len(chosen), "weights_sha256": network.sha256}
    arrays = {
        "arr_0": np.concatenate(kept),
        "mu": found.pool_statistics.mean,
        "sigma": found.pool_statistics.covariance,
        "mu_s": spatial.mean,
        "sigma_s": spatial.covariance,
        POOL: np.asarray(found.pool)[chosen],
        "about": np.array(json.dumps(about)),
    }
    if distributed.is_first():
        write_npz(path, arrays)
    distributed.wait_for_all("reference")
    forget(images, network, directory)
    return about


def self_check(scores: dict[str, float | None]) -> list[str]:
    """One line for each published figure of the ADM-G + ADM-U samples: whether this evaluation gives it."""
    lines = []
    for name, (expected, tolerance) in PUBLISHED.items():
        value = scores[name]
        holds = value is not None and abs(value - expected) <= tolerance
        shown = "none" if value is None else f"{value:.4f}"
        lines.append(f"{name:16}{shown:>12}{expected:>12.4f}  {'holds' if holds else 'DOES NOT HOLD'} (+- {tolerance})")
    return lines
