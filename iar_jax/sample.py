"""Stage 5: transformer + tokenizer -> images.

python -m iar_jax.sample --config=configs/mnist.py --workdir=runs/mnist [--config.sampling.cfg_scale=1.5]
"""

import io
import time

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from iar_jax.data import pictures, preprocessing
from iar_jax.data.codes import read_permutation
from iar_jax.models.build import load_tokenizer, load_transformer
from iar_jax.runtime import artifacts, command_line, sharding
from iar_jax.runtime.errors import UserError
from iar_jax.runtime.progress import progress, say
from iar_jax.sampling.decoding import generate


def run(config: ConfigDict, workdir: epath.Path) -> None:
    """Samples config.sampling.num_images images and leaves samples.npz, labels.npy and grid.png."""
    tokenizer_directory = artifacts.input_directory(config, workdir, "tokenizer", "tokenizer")
    codebook_directory = artifacts.input_directory(config, workdir, "codebook", "codebook")
    transformer_directory = artifacts.input_directory(config, workdir, "transformer", "train")
    tokenizer = artifacts.require(tokenizer_directory, "train_tokenizer")
    transformer = artifacts.require(transformer_directory, "train")
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
    section = config.sampling
    directory = workdir / "samples" / artifacts.samples_name(config, transformer.figures["step"])
    inputs = {
        "tokenizer": tokenizer.fingerprint,
        "codebook": codebook.fingerprint,
        "transformer": transformer.fingerprint,
    }
    if artifacts.begin(directory, "sample", artifacts.relevant_config(config, ("sampling",)), inputs):
        say(f"sample: done, in {directory}")
        return
    if jax.process_count() > 1:
        raise UserError("sample runs as one process; give it one machine, with any number of devices")
    start = time.monotonic()
    mesh = sharding.make_mesh(**config.mesh)
    sharding.check_batch_size(mesh, section.batch_size, "config.sampling.batch_size")
    model, params, _, _ = load_transformer(transformer_directory, mesh)
    vq, vq_params, _ = load_tokenizer(tokenizer_directory, mesh)
    new_to_old = jnp.asarray(permutation.new_to_old)
    decode = jax.jit(
        lambda params, codes: vq.apply(
            {"params": params}, new_to_old[codes].reshape(-1, model.grid_size, model.grid_size), method="decode_codes"
        )
    )

    labels = choose_labels(section.labels, section.num_images, model.num_classes, section.seed)
    base_key = jax.random.key(section.seed)
    images = []
    with sharding.use_mesh(mesh), progress("sample", section.num_images, "images") as shown:
        for first in range(0, section.num_images, section.batch_size):
            # Image i depends on (seed, i) alone; the filling of the last batch is thrown away.
            indices = np.arange(first, first + section.batch_size)
            batch = sharding.global_batch(
                mesh, {"label": labels[np.minimum(indices, len(labels) - 1)], "index": indices.astype(np.int32)}
            )
            codes = generate(
                model,
                params,
                batch["label"],
                jax.vmap(jax.random.fold_in, in_axes=(None, 0))(base_key, batch["index"]),
                cfg_scale=section.cfg_scale,
                temperature=section.temperature,
                top_k=section.top_k,
                top_p=section.top_p,
            )
            images.append(preprocessing.to_uint8(decode(vq_params, codes))[: section.num_images - first])
            shown.update(len(images[-1]))
    all_images = np.concatenate(images)

    artifacts.write_bytes(directory / "samples.npz", array_bytes(np.savez, all_images))
    artifacts.write_bytes(directory / "labels.npy", array_bytes(np.save, labels))
    pictures.write_png(directory / "grid.png", pictures.class_grid(all_images, labels))
    seconds = time.monotonic() - start
    fingerprint = artifacts.fingerprint_arrays({"images": all_images, "labels": labels})
    artifacts.finish(directory, fingerprint, {"num_images": len(all_images), "seconds": seconds})
    say(
        f"sample: {len(all_images)} images with cfg {section.cfg_scale:g} in {seconds:.0f} s; grid in "
        f"{directory / 'grid.png'}"
    )


def choose_labels(protocol: str, num_images: int, num_classes: int, seed: int) -> np.ndarray:
    """Labels int32 [num_images]: the classes in turn ("balanced"), or drawn evenly at random ("uniform")."""
    if protocol == "balanced":
        return (np.arange(num_images) % num_classes).astype(np.int32)
    return np.random.default_rng(seed).integers(0, num_classes, num_images).astype(np.int32)


def array_bytes(save, array: np.ndarray) -> bytes:
    """An array as np.save or np.savez (name arr_0) writes it."""
    buffer = io.BytesIO()
    save(buffer, array)
    return buffer.getvalue()


if __name__ == "__main__":
    command_line.main(run)
