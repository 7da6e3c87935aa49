"""What the tokenizer does to the val images: PSNR, SSIM, and LPIPS and rFID where their weights are given."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from iar_jax.data import image_grids, preprocessing
from iar_jax.data.array_parts import ArrayParts
from iar_jax.data.image_streams import MappedStream, SourceStream
from iar_jax.data.images import ImageDataset, open_images
from iar_jax.evaluate import files
from iar_jax.interop import downloads
from iar_jax.interop.lpips import available as lpips_available
from iar_jax.interop.lpips import load_lpips
from iar_jax.losses.tokenizer_losses import psnr
from iar_jax.metrics import adm_suite, features, ssim
from iar_jax.metrics.adm_suite import ImageSet
from iar_jax.models.tokenizer import load_tokenizer
from iar_jax.runtime import artifacts, distributed, lock, sharding
from iar_jax.runtime.files import write_json
from iar_jax.runtime.progress import progress, say


def run(
    config: ConfigDict, workdir: epath.Path, weights: str, reference_path: epath.Path | None, batch_size: int
) -> None:
    """Leaves figures.json, both sets as .npz and pairs.png in workdir/evaluation/reconstruction; with Inception weights
    scores.json, against the val images themselves or the reference that is given."""
    directory = workdir / "evaluation" / "reconstruction"
    tokenizer_directory = artifacts.locate(config.inputs, workdir, "tokenizer")
    mesh = sharding.make_mesh(**config.mesh)
    model, params, tokenizer = load_tokenizer(tokenizer_directory, mesh)
    images = open_images(config.data)
    size = config.evaluation.batch_size
    reconstruct = functools.partial(through_tokenizer, model, params, batch_size=size, mesh=mesh)
    originals, reconstructions = val_sets(images, reconstruct, tokenizer)
    measures: dict[str, Callable] = {"psnr": psnr_of_bytes, "ssim": ssim.ssim}
    section = config.tokenizer_training
    if lpips_available(section.vgg_weights, section.lpips_weights):
        lpips = jax.jit(load_lpips(section.vgg_weights, section.lpips_weights))
        measures["lpips"] = lambda *pair: np.ravel(lpips(*map(preprocessing.to_unit_range, pair)))
    values: dict[str, list[np.ndarray]] = {name: [] for name in measures}
    with lock.hold(directory), progress("reconstructing", len(images.val), "images") as shown:
        names = ("originals", "reconstructions") if distributed.is_first() else ()
        sets = {name: ArrayParts(directory / f"{name}-parts") for name in names}
        for part in sets.values():
            part.clear()
        for batch in originals.rows.batches(size):
            pair = batch, reconstruct(batch)
            for name, measure in measures.items():

                def of_pairs(both, measure=measure):
                    return np.asarray(measure(both[:, 0], both[:, 1]))

                values[name].append(features.in_batches(of_pairs, np.stack(pair, axis=1), size))
            for part, rows in zip(sets.values(), pair, strict=False):
                part.append(rows)
            shown.update(len(batch))
        if sets:
            write_sets(directory, sets, config.data.resolution)
    figures: dict[str, Any] = {name: float(np.concatenate(found).mean()) for name, found in values.items()}
    figures = {"images": len(images.val), "tokenizer": tokenizer.fingerprint, **figures}
    write_json(directory / "figures.json", figures)
    for name in measures:
        say(f"{name:16}{figures[name]:>12.4f}")
    say(f"pictures          {directory / 'pairs.png'} (above: originals)")
    if not weights and not downloads.here(downloads.INCEPTION):
        say("rFID              not without Inception weights: give --inception_weights=FILE")
        return
    network, kept = files.inception_network(weights), workdir / "evaluation" / "features"
    if reference_path is None:
        say("\nrFID and others, of the reconstructions against the val images themselves")
        reference = adm_suite.reference_of(originals, "val", network, kept, batch_size)
    else:
        reference = files.load_reference(reference_path, network, kept, batch_size)
    files.score(reconstructions, reference, network, directory, kept, batch_size)


def write_sets(directory: epath.Path, sets: dict[str, ArrayParts], resolution: int) -> None:
    """Originals and reconstructions as .npz files, and some pairs as a picture."""
    count = min(part.done for part in sets.values())
    some = np.linspace(0, count - 1, min(10, count)).round().astype(int)
    pairs = np.concatenate([part.take(some) for part in sets.values()])
    scale = image_grids.scale_to_see(resolution)
    image_grids.write_png(directory / "pairs.png", image_grids.image_grid(pairs, columns=len(some), scale=scale))
    for name, part in sets.items():
        part.save_npz(directory / f"{name}.npz")
        part.remove()


def val_sets(
    images: ImageDataset, reconstruct: Callable[[np.ndarray], np.ndarray], tokenizer: artifacts.Metadata
) -> tuple[ImageSet, ImageSet]:
    """The val images, and their reconstructions, which are made as they are read."""
    rows = SourceStream(images.val)
    originals = ImageSet(rows, f"{images.name} val", f"{images.fingerprint} val", "real", images.val.labels)
    return originals, ImageSet(
        MappedStream(rows, reconstruct),
        f"{images.name} val, reconstructed",
        f"{images.fingerprint} val {tokenizer.fingerprint}",
        "reconstructions",
        images.val.labels,
    )


def through_tokenizer(model: Any, params: Any, images: np.ndarray, batch_size: int, mesh: Mesh) -> np.ndarray:
    """uint8 images after the tokenizer, over the devices of a mesh."""
    found = features.over_mesh(
        lambda batch: apply_tokenizer(model, params, batch), images, batch_size, mesh, preprocessing.to_unit_range
    )
    return preprocessing.to_uint8(found)


@functools.partial(jax.jit, static_argnums=0)
def apply_tokenizer(model, params, batch):
    """A batch of images in [-1, 1] after the tokenizer."""
    return model.apply({"params": params}, batch)[0]


def psnr_of_bytes(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """PSNR of each of some uint8 images, in dB."""
    return np.asarray(psnr(*(jax.numpy.asarray(preprocessing.to_unit_range(images)) for images in (first, second))))
