"""What is measured, and of which images.

    python -m iar_jax.evaluate --config=configs/mnist.py --workdir=runs/mnist
    python -m iar_jax.evaluate --config=configs/mnist.py --workdir=runs/mnist --what=code_distance

Scores of a run's samples, with its report; `code_distance` measures what a wrong code costs: only the tokenizer and
its clusters are needed. `reconstruction` measures the tokenizer alone: PSNR, SSIM, LPIPS and rFID on the val images.

    python -m iar_jax.evaluate --samples=samples.npz --reference=VIRTUAL_imagenet256_labeled.npz
    python -m iar_jax.evaluate --config=configs/mnist.py --workdir=runs/mnist --reference=FILE.npz
    python -m iar_jax.evaluate --samples=images.npz --make-reference=FILE.npz --split=val
    python -m iar_jax.evaluate --config=configs/mnist.py --workdir=runs/mnist --make-reference=FILE.npz --split=train
    python -m iar_jax.evaluate --config=configs/mnist.py --workdir=runs/mnist --sweep=cfg_scale=1:2:0.25
    python -m iar_jax.evaluate --config=configs/mnist.py --workdir=runs/mnist --watch

These score images (a .npz or .npy file, or a folder of pictures of one size) by the protocol of the ADM suite, and
make a reference of some, or of a data set. A sweep samples and scores at each value, a watch at each checkpoint of a
training that goes on elsewhere, with or without --reference. Inception weights are taken from --inception_weights, the
config or the cache directory, or fetched. What is kept is in SAMPLES.evaluation/, or --output.

`config.evaluation.features=classifier` needs no weights from elsewhere: a small network is trained on the real
images first, and its last hidden layer is what distances are taken in. Such figures compare runs on one data set
with each other, never with published ones. With `inception` they are the ADM suite's.
"""

from collections.abc import Callable
from typing import Any

from absl import flags
from etils import epath
from ml_collections import ConfigDict

from iar_jax import sample
from iar_jax.config import command_line
from iar_jax.data.image_streams import SourceStream
from iar_jax.data.images import open_images
from iar_jax.evaluate import code_substitution, files, reconstruction, scores, sweep, watch
from iar_jax.generators.generator import open_generator
from iar_jax.generators.settings import samples_name
from iar_jax.metrics import adm_suite
from iar_jax.runtime import artifacts
from iar_jax.runtime.errors import UserError
from iar_jax.runtime.progress import say


def run(config: ConfigDict | None, workdir: epath.Path | None) -> None:
    """What the options ask for."""
    options = flags.FLAGS
    if options.samples:
        run_on_files(path_of(options.samples))
        return
    if config is None or workdir is None:
        raise UserError("give --config=configs/FILE.py and --workdir=DIR, or --samples=FILE.npz")
    if options.self_check:
        raise UserError("--self_check needs --samples=ADM samples and --reference=VIRTUAL_imagenet256_labeled.npz")
    if options.sweep and options.watch:
        raise UserError("give one of --sweep and --watch")
    target = options["make-reference"].value
    if target:
        images, split = open_images(config.data), options.split or "train"
        rows = SourceStream(getattr(images, split))
        images_of_split = adm_suite.ImageSet(rows, f"{images.name} {split}", f"{images.fingerprint} {split}", "real")
        network = files.inception_network(weights_of(config))
        kept = workdir / "evaluation" / "features"
        files.make_reference(path_of(target), images_of_split, split, network, kept, options.batch_size)
    elif options.sweep:
        sweep.run(config, workdir, options.sweep, sample_and_score)
    elif options.watch:
        watch.run(config, workdir, options.watch_seconds, sample_and_score)
    else:
        MEASURES[options.what](config, workdir)


def run_on_files(path: epath.Path) -> None:
    """Scores --samples, or makes a reference of them."""
    options = flags.FLAGS
    target = options["make-reference"].value
    if bool(options.reference) == bool(target):
        raise UserError("with --samples, give one of --reference=FILE.npz and --make-reference=FILE.npz")
    if options.self_check and not options.reference:
        raise UserError("--self_check needs --samples=ADM samples and --reference=VIRTUAL_imagenet256_labeled.npz")
    output = path_of(options.output) if options.output else path.parent / f"{path.name}.evaluation"
    images = files.open_set(path, options.kind)
    network = files.inception_network(options.inception_weights)
    if target:
        files.make_reference(path_of(target), images, options.split, network, output, options.batch_size)
        return
    reference = files.load_reference(path_of(options.reference), network, output, options.batch_size, options.split)
    content = files.score(images, reference, network, output, output, options.batch_size)
    if options.self_check:
        say("\nADM-G + ADM-U against VIRTUAL_imagenet256_labeled.npz, here and as published")
        for line in adm_suite.self_check(content["scores"]):
            say(line)


def score(config: ConfigDict, workdir: epath.Path) -> dict[str, float | None]:
    """Scores the samples of config.sampling; returns their figures."""
    options = flags.FLAGS
    if not options.reference:
        found = scores.run(config, workdir)["scores"][scores.SAMPLED]
        return {name: value for name, value in found.items() if name != "count"}
    transformer = open_generator(config.inputs, workdir, config.sampling.step).metadata
    name = samples_name(config.sampling, transformer.figures["step"])
    artifacts.require(workdir / "samples" / name, "sample")
    network, kept = files.inception_network(weights_of(config)), workdir / "evaluation" / "features"
    reference = files.load_reference(path_of(options.reference), network, kept, options.batch_size, options.split)
    images = files.open_set(workdir / "samples" / name / "samples.npz", "samples")
    output = workdir / "evaluation" / f"{name}-inception"
    return files.score(images, reference, network, output, kept, options.batch_size)["scores"]


def measure_reconstruction(config: ConfigDict, workdir: epath.Path) -> None:
    """What the tokenizer does to the val images."""
    options = flags.FLAGS
    reference = path_of(options.reference) if options.reference else None
    reconstruction.run(config, workdir, weights_of(config), reference, options.batch_size)


# --what.
MEASURES: dict[str, Callable[[ConfigDict, epath.Path], Any]] = {
    "scores": score,
    "code_distance": code_substitution.run,
    "reconstruction": measure_reconstruction,
}


def sample_and_score(config: ConfigDict, workdir: epath.Path) -> dict[str, float | None]:
    """Samples what config.sampling asks for, and scores it."""
    sample.run(config, workdir)
    return score(config, workdir)


def weights_of(config: ConfigDict) -> str:
    return flags.FLAGS.inception_weights or config.evaluation.inception_weights


def path_of(text: str) -> epath.Path:
    return epath.Path(text).expanduser()


if __name__ == "__main__":
    flags.DEFINE_enum("what", "scores", tuple(MEASURES), "What is measured.")
    flags.DEFINE_string(
        "samples", None, "Images to score: a .npz with arr_0, or a .npy, uint8 [N, H, W, 3], or a folder of pictures."
    )
    flags.DEFINE_enum("kind", "samples", ("samples", "reconstructions"), "What --samples are.")
    flags.DEFINE_string(
        "reference",
        None,
        "What to compare with: a .npz with mu, sigma, mu_s, sigma_s, or arr_0, or all; or a folder.",
    )
    flags.DEFINE_string("make-reference", None, "Where to write a reference made of --samples, or of the data set.")
    flags.DEFINE_enum("split", None, ("train", "val"), "The split that a reference is made of.")
    flags.DEFINE_string("inception_weights", "", "File of the Inception network's weights.")
    flags.DEFINE_string("output", None, "Directory for scores.json and what a killed run goes on from.")
    flags.DEFINE_integer("batch_size", 64, "Images that pass the Inception network together.", lower_bound=1)
    flags.DEFINE_bool("self_check", False, "Compare the scores with those published for ADM-G + ADM-U's samples.")
    flags.DEFINE_string("sweep", None, "FIELD=FIRST:LAST:STEP of config.sampling: sample and score at each value.")
    flags.DEFINE_bool("watch", False, "Score each checkpoint of a training that may be running, until it is finished.")
    flags.DEFINE_float("watch_seconds", 30.0, "How often --watch looks for a new checkpoint.", lower_bound=0.1)
    command_line.main(run, scores.READS, needs_config=lambda: not flags.FLAGS.samples)
