"""Stage 5: transformer + tokenizer -> images.

python -m iar_jax.sample --config=configs/mnist.py --workdir=runs/mnist [--config.sampling.cfg_scale=1.5]
"""

import hashlib
import itertools
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from iar_jax.data import pictures, preprocessing
from iar_jax.data.array_parts import ArrayParts, RowReader, npy_bytes
from iar_jax.data.codes import read_permutation
from iar_jax.models.build import load_tokenizer, load_transformer, transformer_at
from iar_jax.runtime import artifacts, command_line, distributed, lock, sharding
from iar_jax.runtime.artifacts import write_bytes
from iar_jax.runtime.errors import UserError
from iar_jax.runtime.interruption import catch_stop_signals
from iar_jax.runtime.progress import progress, say
from iar_jax.sampling.decoding import generate
from iar_jax.sampling.guidance import Schedule


def run(config: ConfigDict, workdir: epath.Path) -> None:
    """Samples config.sampling.num_images images and leaves samples.npz, labels.npy and grid.png."""
    tokenizer_directory = artifacts.input_directory(config, workdir, "tokenizer", "tokenizer")
    codebook_directory = artifacts.input_directory(config, workdir, "codebook", "codebook")
    transformer_directory = artifacts.input_directory(config, workdir, "transformer", "train")
    tokenizer = artifacts.require(tokenizer_directory, "train_tokenizer")
    transformer = transformer_at(transformer_directory, config.sampling.step)
    permutation = read_permutation(codebook_directory, tokenizer, tokenizer_directory)
    codebook = artifacts.require(codebook_directory, "rearrange_codebook")
    for name, directory, metadata in (
        ("tokenizer", tokenizer_directory, tokenizer),
        ("codebook", codebook_directory, codebook),
    ):
        if transformer.inputs[name] != metadata.fingerprint:
            raise UserError(
                f"{transformer_directory} was trained with another {name} ({transformer.inputs[name][:12]}) than "
                f"{directory} ({metadata.fingerprint[:12]})"
            )
    directory = workdir / "samples" / artifacts.samples_name(config, transformer.figures["step"])
    inputs = {
        "tokenizer": tokenizer.fingerprint,
        "codebook": codebook.fingerprint,
        "transformer": transformer.fingerprint,
    }
    if artifacts.begin(directory, "sample", artifacts.relevant_config(config, ("sampling",)), inputs):
        say(f"sample: done, in {directory}")
        if distributed.is_first() and config.sampling.write_pngs:
            write_pngs(directory)
        return
    section = config.sampling
    start = time.monotonic()
    with lock.hold(directory):
        mesh = sharding.make_mesh(**config.mesh)
        sharding.check_batch_size(mesh, section.batch_size, "config.sampling.batch_size")
        model, params, _, _ = load_transformer(transformer_directory, mesh, section.step)
        if section.dtype != "model":
            model = model.clone(dtype=jnp.dtype(section.dtype))
        vq, vq_params, _ = load_tokenizer(tokenizer_directory, mesh)
        labels = choose_labels(section.labels, section.num_images, model.num_classes, section.seed)
        new_to_old = jnp.asarray(permutation.new_to_old)
        grid = (-1, model.grid_size, model.grid_size)

        @jax.jit
        def decode(params, codes):
            images = vq.apply({"params": params}, new_to_old[codes].reshape(grid), method="decode_codes")
            return preprocessing.reduced(images, section.image_size) if section.image_size else images

        def images_at(indices: np.ndarray) -> np.ndarray:
            whole = {"label": labels[indices], "index": indices.astype(np.int32)}
            batch = sharding.global_batch(mesh, sharding.part_of(mesh, whole))
            # Image i depends on (seed, i) alone, whatever its batch.
            codes = generate(
                model,
                params,
                batch["label"],
                jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(section.seed), batch["index"]),
                cfg_scale=section.cfg_scale,
                temperature=section.temperature,
                top_k=section.top_k,
                top_p=section.top_p,
                schedule=Schedule(
                    section.cfg_schedule,
                    start=section.cfg_start,
                    first=section.cfg_first,
                    last=section.cfg_last,
                    power=section.cfg_power,
                    attention_weight=section.cfg_attention_weight,
                ),
            )
            return preprocessing.to_uint8(distributed.to_host(decode(vq_params, codes)))

        # The first process has the files; the others make their rows of each batch and hand them over.
        parts = ArrayParts(directory / "parts") if distributed.is_first() else None
        with sharding.use_mesh(mesh):
            sample_all(parts, images_at, section.num_images, section.batch_size)
        if parts is None:
            artifacts.finish(directory, "", {})
            return
        write_bytes(directory / "labels.npy", npy_bytes(labels))
        shown = pictures.places_in_class_grid(labels)
        grid_of_classes = pictures.class_grid(parts.take(shown), labels[shown])
        pictures.write_png(directory / "grid.png", grid_of_classes)
        digest = parts.save_npz(directory / "samples.npz")
        seconds = time.monotonic() - start
        fingerprint = hashlib.sha256(digest.encode() + labels.tobytes()).hexdigest()
        artifacts.finish(directory, fingerprint, {"num_images": parts.done, "seconds": seconds})
        parts.remove()
        if section.write_pngs:
            write_pngs(directory)
    say(
        f"sample: {section.num_images} images with cfg {section.cfg_scale:g} in {seconds:.0f} s; grid in "
        f"{directory / 'grid.png'}"
    )


def sample_all(
    parts: ArrayParts | None, images_at: Callable[[np.ndarray], np.ndarray], num_images: int, batch_size: int
) -> None:
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


def write_pngs(directory: epath.Path) -> None:
    """Each image of samples.npz as images/000000.png and so on; those that are there are left alone."""
    (directory / "images").mkdir(exist_ok=True)
    reader = RowReader(directory / "samples.npz")
    with progress("sample: png files", reader.shape[0], "images") as shown:
        for number, image in enumerate(itertools.chain.from_iterable(reader.batches(64))):
            path = directory / "images" / f"{number:06d}.png"
            if not path.exists():
                pictures.write_png(path, image)
            shown.update()


def choose_labels(protocol: str, num_images: int, num_classes: int, seed: int) -> np.ndarray:
    """Labels int32 [num_images]: the classes in turn ("balanced"), or drawn evenly at random ("uniform")."""
    if protocol == "balanced":
        return (np.arange(num_images) % num_classes).astype(np.int32)
    return np.random.default_rng(seed).integers(0, num_classes, num_images).astype(np.int32)


if __name__ == "__main__":
    command_line.main(run)
