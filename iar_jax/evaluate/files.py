"""Sets of images scored by the protocol of the ADM suite, and references made of them."""

from typing import Any

import numpy as np
from etils import epath

from iar_jax.data.array_files import read_array
from iar_jax.data.image_streams import FolderStream
from iar_jax.interop import downloads, inception
from iar_jax.metrics import adm_suite
from iar_jax.metrics.adm_suite import ImageSet, Network, Reference
from iar_jax.runtime import artifacts, lock
from iar_jax.runtime.files import write_json
from iar_jax.runtime.progress import say


def inception_network(given: str) -> Network:
    """The network with the weights of a file, or of one in the cache directory, or fetched.

    Raises:
        UserError: they are not found, or are not such weights.
    """
    path = downloads.find(given, downloads.INCEPTION, "Inception weights")
    return Network(*inception.load(path), path.name, artifacts.sha256_of(path))


def open_set(path: epath.Path, kind: str) -> ImageSet:
    """The images of a .npz or .npy file, or the pictures in a folder; labels from labels.npy beside a file.

    Raises:
        UserError: no such images.
    """
    if path.is_dir():
        found = FolderStream(path)
        adm_suite.check_count(path, found.shape[0])
        images = ImageSet(found, path.name, found.sha256(), kind, lossy=found.lossy())
    else:
        images = ImageSet(adm_suite.open_images(path), path.name, artifacts.sha256_of(path), kind, labels_beside(path))
        if images.labels is not None and images.labels.shape != images.rows.shape[:1]:
            images = images._replace(labels=None)  # of another file
    if adm_suite.seems_unscaled(images.rows):
        say(f"WARNING: {path}: {adm_suite.UNSCALED}")
        images = images._replace(unscaled=True)
    return images


def labels_beside(path: epath.Path) -> np.ndarray | None:
    """labels.npy beside a file of images, where it holds numbers of classes."""
    labels_path = path.parent / "labels.npy"
    labels = read_array(labels_path) if labels_path.exists() else None
    whole = labels is not None and labels.dtype.kind in "iu" and labels.size and labels.min() >= 0
    return labels if whole else None


def load_reference(
    path: epath.Path, network: Network, kept: epath.Path, batch_size: int, split: str | None = None
) -> Reference:
    """What others are compared with: a file of statistics or images, or a folder of pictures.

    Args:
        split: of a folder's pictures, where that is known.

    Raises:
        UserError: see `adm_suite.load_reference` and `open_set`.
    """
    if path.is_dir():
        return adm_suite.reference_of(open_set(path, "real"), split, network, kept, batch_size)
    return adm_suite.load_reference(path, network, kept, batch_size)


def sha256_of_reference(path: epath.Path) -> str:
    """Of a file, or of the names and contents of a folder's pictures."""
    return FolderStream(path).sha256() if path.is_dir() else artifacts.sha256_of(path)


def score(
    images: ImageSet, reference: Reference, network: Network, output: epath.Path, kept: epath.Path, batch_size: int
) -> dict[str, Any]:
    """Scores a set, says what they depend on, and leaves scores.json in `output`; returns its content.

    Features of the set lie in `kept` while they are made.
    """
    with lock.hold(output):
        scores = adm_suite.score(adm_suite.features_of(images, network, kept, batch_size), reference)
        content = scored(images, scores, reference, network)
        write_json(output / "scores.json", content)
    adm_suite.forget(images, network, kept)
    announce(content)
    say(f"scores            {output / 'scores.json'}")
    return content


def scored(images: ImageSet, scores: dict[str, float | None], reference: Reference, network: Network) -> dict[str, Any]:
    """Scores of a set with all that they depend on."""
    return {
        "scores": scores,
        "samples": {"name": images.name, "sha256": images.sha256, "images": images.rows.shape[0], "kind": images.kind},
        "labels": adm_suite.label_protocol(images.labels),
        "reference": reference.about,
        "weights": {"name": network.name, "sha256": network.sha256},
        "deviations": adm_suite.deviations(images, reference.about),
    }


def announce(content: dict[str, Any]) -> None:
    """Scores of a set, and all that they depend on, on the terminal."""
    for name, value in content["scores"].items():
        say(f"{name:16}{'–' if value is None else f'{value:.4f}':>12}")
    reference, weights, samples = content["reference"], content["weights"], content["samples"]
    say(f"{samples['kind']:18}{samples['name']}, {samples['images']:,} images")
    say(f"labels            {content['labels']}")
    say(f"reference         {describe(reference)}")
    say(f"Inception weights {weights['name']} ({weights['sha256'][:12]})")
    for deviation in content["deviations"]:
        say(f"DEVIATES          {deviation}")


def describe(reference: dict[str, Any]) -> str:
    """A reference in one line: name, hash, split, counts."""
    parts = [f"{reference['split']} split" if reference["split"] else "split not known"]
    if reference["statistics_of"]:
        parts.append(f"statistics of {reference['statistics_of']:,} images")
    if reference["images"]:
        parts.append(f"{reference['images']:,} images for precision and recall")
    return f"{reference['name']} ({reference['sha256'][:12]}), {', '.join(parts)}"


def make_reference(
    target: epath.Path, images: ImageSet, split: str | None, network: Network, kept: epath.Path, batch_size: int
) -> None:
    """Writes a reference file of a set of images."""
    with lock.hold(kept):
        about = adm_suite.make_reference(target, images, split, network, kept, batch_size)
    say(f"reference {target}: {describe(about)}")
