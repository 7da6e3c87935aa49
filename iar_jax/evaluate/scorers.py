"""The ways in which samples are scored: what each needs, gives, and is told as."""

from collections.abc import Callable
from typing import Any, NamedTuple

from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from iar_jax.data.image_streams import SourceStream
from iar_jax.data.images import ImageDataset
from iar_jax.evaluate import classifier, files
from iar_jax.interop import downloads
from iar_jax.metrics import adm_suite
from iar_jax.metrics.adm_suite import ImageSet
from iar_jax.runtime import artifacts, distributed, lock
from iar_jax.runtime.errors import UserError
from iar_jax.runtime.section import Section

# (figure, what it is).
Cards = list[tuple[str, str]]

# The sets that are scored against the training images, in the order of the report.
REAL, RECONSTRUCTED, SAMPLED = "real val images (the floor)", "reconstructions of them", "samples"


def classifier_scores(
    config: ConfigDict, directory: epath.Path, images: ImageDataset, sets: dict[str, ImageSet], mesh: Mesh
) -> dict[str, Any]:
    """Scores of each set in the features of a classifier that is trained on the same data set."""
    judge = classifier.trained(config, directory / "classifier", images, mesh)
    return {
        "features": "classifier",
        "classifier_val_accuracy": judge.val_accuracy,
        "reference": f"{images.name}, {len(images.train)} training images",
        "scores": classifier.scores(judge, images, sets, config.evaluation),
    }


def reference_file(section: Section) -> epath.Path:
    """config.evaluation.reference as a path.

    Raises:
        UserError: it is not there.
    """
    path = epath.Path(section["reference"]).expanduser()
    if not path.exists():
        raise UserError(f"config.evaluation.reference is {path}, which is not there")
    return path


def inception_scores(
    config: ConfigDict, directory: epath.Path, images: ImageDataset, sets: dict[str, ImageSet], mesh: Mesh
) -> dict[str, Any]:
    """Scores of each set by the protocol of the ADM suite, against config.evaluation.reference or the training
    images. Features of real images and reconstructions are kept for other samples, the samples' own are not."""
    network = files.inception_network(config.evaluation.inception_weights)
    kept, batch_size = directory / "features", config.evaluation.batch_size
    with lock.hold(kept):
        if config.evaluation.reference:
            path = reference_file(config.evaluation)
        else:
            path = directory / f"reference-{images.fingerprint[:8]}-{network.sha256[:8]}.npz"
            train = ImageSet(SourceStream(images.train), f"{images.name} train", f"{images.fingerprint} train", "real")
            if not distributed.from_first(path.exists()):
                adm_suite.make_reference(path, train, "train", network, kept, batch_size)
        reference = files.load_reference(path, network, kept, batch_size)
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


def classifier_cards(content: dict[str, Any], sampled: dict[str, Any], reconstructed: dict[str, Any]) -> Cards:
    """Of the scores of samples and reconstructions, and of the classifier."""
    distance = sampled["frechet_distance"]
    ratio = f"{distance / reconstructed['frechet_distance']:.1f} x the reconstructions'"
    return [
        (f"{sampled['class_accuracy']:.1%}", "samples recognised as the class asked for"),
        (f"{distance:.2f}", f"Fréchet distance of samples, {ratio}"),
        (f"{content['classifier_val_accuracy']:.1%}", "of real val images the classifier gets right"),
    ]


def inception_cards(content: dict[str, Any], sampled: dict[str, Any], reconstructed: dict[str, Any]) -> Cards:
    """Of the scores of samples and reconstructions."""
    ratio = f"{sampled['fid'] / reconstructed['fid']:.1f} x the reconstructions'"
    return [
        (f"{sampled['fid']:.2f}", f"FID of samples, {ratio}"),
        (f"{sampled['inception_score']:.1f}", "Inception score of samples"),
    ]


def classifier_meaning(content: dict[str, Any]) -> str:
    """That the scores hold on this data set alone."""
    return "Scores in the features of a classifier trained on the same data; they compare runs on this data set only."


def inception_meaning(content: dict[str, Any]) -> str:
    """Reference, weights and choice of labels."""
    weights = content["weights"]
    return (
        f"Scores by the protocol of the ADM suite against {files.describe(content['reference'])}; Inception weights "
        f"{weights['name']} ({weights['sha256'][:12]}); labels {content['label_protocol']}."
    )


def given_reference(section: Section) -> dict[str, str]:
    """The fingerprint of config.evaluation.reference, where it is set."""
    return {"reference": files.sha256_of_reference(reference_file(section))} if section["reference"] else {}


def given_weights(section: Section) -> dict[str, str]:
    """The fingerprint of config.evaluation.inception_weights, where it is set."""
    given = section["inception_weights"]
    path = downloads.find(given, downloads.INCEPTION, "Inception weights") if given else None
    return {"inception_weights": artifacts.sha256_of(path)} if path else {}


class Scorer(NamedTuple):
    """How samples are scored, and how that is told.

    Attributes:
        inputs: fingerprints of files that config.evaluation names, and which are known before anything is opened.
        contents: of the others.
        score: the content of the scores' file.
        meaning: what the scores can be compared with.
        cards: the figures at the top of the report.
        headline: what is said before the table on the terminal.
    """

    inputs: Callable[[Section], dict[str, str]]
    contents: Callable[[Section], dict[str, str]]
    score: Callable[..., dict[str, Any]]
    meaning: Callable[[dict[str, Any]], str]
    cards: Callable[[dict[str, Any], dict[str, Any], dict[str, Any]], Cards]
    headline: Callable[[dict[str, Any]], str]


# config.evaluation.features.
SCORERS = {
    "classifier": Scorer(
        lambda section: {},
        lambda section: {},
        classifier_scores,
        classifier_meaning,
        classifier_cards,
        lambda content: f"classifier: {content['classifier_val_accuracy']:.1%} of the real val images right",
    ),
    "inception": Scorer(
        given_reference,
        given_weights,
        inception_scores,
        inception_meaning,
        inception_cards,
        lambda content: f"against {files.describe(content['reference'])}",
    ),
}
