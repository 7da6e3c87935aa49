"""Stage 5: generator + tokenizer -> images.

python -m iar_jax.sample --config=configs/mnist.py --workdir=runs/mnist [--config.sampling.cfg_scale=1.5]
"""

import functools
import hashlib
import itertools
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from iar_jax.config import command_line
from iar_jax.config.relevance import relevant
from iar_jax.data import image_grids, preprocessing
from iar_jax.data.array_files import RowReader, npy_bytes, read_array
from iar_jax.data.array_parts import ArrayParts
from iar_jax.data.codes import read_permutation
from iar_jax.data.labels import PROTOCOLS
from iar_jax.generators.generator import Loaded, load_generator, open_generator
from iar_jax.generators.settings import SamplingSettings, samples_name
from iar_jax.models.tokenizer import LoadedTokenizer, load_tokenizer
from iar_jax.runtime import artifacts, distributed, lock, sharding
from iar_jax.runtime.artifacts import Artifact
from iar_jax.runtime.errors import UserError, refusal
from iar_jax.runtime.files import write_bytes
from iar_jax.runtime.interruption import catch_stop_signals
from iar_jax.runtime.progress import progress, say
from iar_jax.runtime.section import Section

READS = ("inputs", "mesh", "sampling")

FILES = ("samples.npz", "labels.npy", "grid.png")

# uint8 images [B, R, R, 3] of some indices, int [B].
ImagesAt = Callable[[np.ndarray], np.ndarray]


def run(config: ConfigDict, workdir: epath.Path, thorough: bool = False) -> None:
    """Samples config.sampling.num_images images and leaves samples.npz, labels.npy and grid.png.

    Damaged files of finished samples are made again; damage that leaves their sizes is looked for where a thorough run
    is asked for.
    """
    section = config.sampling
    inputs = open_inputs(config.inputs, workdir, section.step)
    directory = workdir / "samples" / samples_name(section, inputs["transformer"].metadata.figures["step"])
    made_by, given = relevant(config, ("sampling",)), artifacts.fingerprints(inputs)
    found = artifacts.finished(directory, made_by, given)
    if found and whole(directory, found, thorough):
        say(f"sample: done, in {directory}")
        if distributed.is_first() and section.write_pngs:
            write_pngs(directory)
        return
    start = time.monotonic()
    with lock.hold(directory):
        command_line.save_config(config, workdir)
        if artifacts.begin(directory, "sample", made_by, given):
            artifacts.reopen(directory)
        mesh = sharding.make_mesh(**config.mesh)
        sharding.check_batch_size(mesh, section.batch_size, "config.sampling.batch_size")
        loaded = load_generator(inputs["transformer"].directory, mesh, section.step)
        tokenizer = load_tokenizer(inputs["tokenizer"].directory, mesh)
        labels = PROTOCOLS[section.labels](section.num_images, loaded.generator.facts.num_classes, section.seed)
        new_to_old = read_permutation(inputs["codebook"]).new_to_old
        images_at = image_maker(loaded, tokenizer, new_to_old, labels, section, mesh)
        # The first process has the files; the others make their rows of each batch and hand them over.
        parts = ArrayParts(directory / "parts") if distributed.is_first() else None
        with sharding.use_mesh(mesh):
            sample_all(parts, images_at, section.num_images, section.batch_size)
        if parts is None:
            artifacts.finish(directory, "", {})
            return
        fingerprint = write_samples(directory, parts, labels)
        seconds = time.monotonic() - start
        sizes = artifacts.sizes_of(directory / name for name in FILES)
        artifacts.finish(directory, fingerprint, {"num_images": parts.done, "seconds": seconds, "files": sizes})
        parts.remove()
        if section.write_pngs:
            write_pngs(directory)
    say(
        f"sample: {section.num_images} images with cfg {section.cfg_scale:g} in {seconds:.0f} s; grid in "
        f"{directory / 'grid.png'}"
    )


def whole(directory: epath.Path, found: artifacts.Metadata, thorough: bool) -> bool:
    """Whether the files of finished samples are those that were written; says where they are not."""
    problem = artifacts.changed_files(directory, found)
    if thorough and not problem:
        problem = refusal(lambda: check_samples(directory, found))
    if problem:
        say(f"WARNING: {problem}; the samples are made again")
    return not problem


def check_samples(directory: epath.Path, found: artifacts.Metadata) -> None:
    """Raises UserError where the images or labels of finished samples are not those that were made."""
    digest = hashlib.sha256()
    for rows in RowReader(directory / "samples.npz").batches(256):
        digest.update(np.ascontiguousarray(rows).data)
    if fingerprint_of(digest.hexdigest(), read_array(directory / "labels.npy")) != found.fingerprint:
        raise UserError(f"{directory}: samples.npz and labels.npy are not those that were made together")


def fingerprint_of(digest: str, labels: np.ndarray) -> str:
    """Of samples: of the SHA-256 of the images, and the labels."""
    return hashlib.sha256(digest.encode() + labels.tobytes()).hexdigest()


def open_inputs(section: Section, workdir: epath.Path, step: int) -> dict[str, Artifact]:
    """Tokenizer, codebook and generator, the last one at a checkpoint where a step is given.

    Args:
        section: config.inputs.
    """
    inputs = artifacts.open_inputs(section, workdir, "tokenizer", "codebook")
    generator = open_generator(section, workdir, step)
    artifacts.check_made_from(generator, inputs)
    return inputs | {"transformer": generator}


def image_maker(
    loaded: Loaded,
    tokenizer: LoadedTokenizer,
    new_to_old: np.ndarray,
    labels: np.ndarray,
    section: ConfigDict,
    mesh: Mesh,
) -> ImagesAt:
    """What samples and decodes the images of some indices. Image i depends on (seed, i) alone, whatever its batch.

    Args:
        new_to_old: original ids of rearranged ones.
        labels: of all images.
        section: config.sampling.
    """
    generator, settings = loaded.generator, SamplingSettings.of(section)
    original_ids = jnp.asarray(new_to_old)

    @jax.jit
    def decode(params, codes):
        images = tokenizer.model.apply({"params": params}, original_ids[codes], method="decode_positions")
        return preprocessing.reduced(images, section.image_size) if section.image_size else images

    def images_at(indices: np.ndarray) -> np.ndarray:
        whole = {"label": labels[indices], "index": indices.astype(np.int32)}
        batch = sharding.global_batch(mesh, sharding.part_of(mesh, whole))
        keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(section.seed), batch["index"])
        codes = generator.sample(loaded.params, batch["label"], keys, settings)
        return preprocessing.to_uint8(distributed.to_host(decode(tokenizer.params, codes)))

    return images_at


def sample_all(parts: ArrayParts | None, images_at: ImagesAt, num_images: int, batch_size: int) -> None:
    """Appends the images that are not there yet, a part for each batch.

    `images_at` makes the images of some indices, always batch_size of them: the filling of the last batch is thrown
    away.

    Args:
        parts: None on all processes but the first.

    Raises:
        Interrupted: a signal asked for a stop; what is done is kept.
    """
    done = distributed.from_first(parts.done if parts is not None else 0)
    with (
        catch_stop_signals() as stop,
        progress("sample", num_images, "images", first=done) as shown,
    ):
        while done < num_images:
            indices = np.arange(done, done + batch_size)
            images = images_at(np.minimum(indices, num_images - 1))[: num_images - done]
            if parts is not None:
                parts.append(images)
            done += len(images)
            shown.update(len(images))
            stop.obey(f"sample stopped after image {done} of {num_images}, which are kept")


def write_samples(directory: epath.Path, parts: ArrayParts, labels: np.ndarray) -> str:
    """labels.npy, grid.png and samples.npz of all images; returns the fingerprint of images and labels."""
    write_bytes(directory / "labels.npy", npy_bytes(labels))
    shown = image_grids.places_in_class_grid(labels)
    image_grids.write_png(directory / "grid.png", image_grids.class_grid(parts.take(shown), labels[shown]))
    digest = parts.save_npz(directory / "samples.npz")
    return fingerprint_of(digest, labels)


def write_pngs(directory: epath.Path) -> None:
    """Each image of samples.npz as images/000000.png and so on; those that are there are left alone."""
    (directory / "images").mkdir(exist_ok=True)
    reader = RowReader(directory / "samples.npz")
    with progress("sample: png files", reader.shape[0], "images") as shown:
        for number, image in enumerate(itertools.chain.from_iterable(reader.batches(64))):
            path = directory / "images" / f"{number:06d}.png"
            if not path.exists():
                image_grids.write_png(path, image)
            shown.update()


if __name__ == "__main__":
    command_line.main(functools.partial(run, thorough=True), READS)
