"""Stage 3: images + tokenizer -> code records.

python -m iar_jax.extract_codes --config=configs/mnist.py --workdir=runs/mnist
"""

import functools
import time
from collections.abc import Callable, Iterator

import grain
import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict
from PIL import Image

from iar_jax.data import codes, preprocessing
from iar_jax.data.images import ImageDataset, ImageSource, open_images
from iar_jax.models.build import load_tokenizer
from iar_jax.runtime import artifacts, command_line, lock, sharding
from iar_jax.runtime.errors import UserError
from iar_jax.runtime.interruption import StopRequest, catch_stop_signals
from iar_jax.runtime.progress import Progress, progress, say


def run(config: ConfigDict, workdir: epath.Path) -> None:
    """Encodes all crops of every picture of both splits into workdir/codes/train and workdir/codes/val."""
    tokenizer_directory = artifacts.input_directory(config, workdir, "tokenizer", "tokenizer")
    tokenizer = artifacts.require(tokenizer_directory, "train_tokenizer")
    relevant = artifacts.relevant_config(config, ("data", "codes"))
    inputs = {"tokenizer": tokenizer.fingerprint}
    # Validation measures the pictures themselves, whatever copies are trained on.
    splits = {"train": config.codes.crops, "val": "center"}
    if all(artifacts.finished(workdir / "codes" / split, relevant, inputs) for split in splits):
        say(f"extract_codes: done, in {workdir / 'codes'}")
        return
    if jax.process_count() > 1:
        raise UserError("extract_codes runs as one process; give it one machine, with any number of devices")
    mesh = sharding.make_mesh(**config.mesh)
    sharding.check_batch_size(mesh, config.codes.batch_size, "config.codes.batch_size")
    images = open_images(config.data)
    for split in splits:
        artifacts.begin(workdir / "codes" / split, "extract_codes", relevant, inputs | {"images": images.fingerprint})
    with lock.hold(workdir / "codes"), catch_stop_signals() as stop:
        extract_splits(config, workdir / "codes", tokenizer_directory, images, splits, mesh, stop)


def extract_splits(
    config: ConfigDict,
    codes_directory: epath.Path,
    tokenizer_directory: epath.Path,
    images: ImageDataset,
    splits: dict[str, str],
    mesh: Mesh,
    stop: StopRequest,
) -> None:
    """Encodes each split with the crops that `splits` says; what a run before has finished is kept."""
    model, params, _ = load_tokenizer(tokenizer_directory, mesh)
    encode = jax.jit(lambda params, images: model.apply({"params": params}, images, method="encode"))

    def encode_pictures(crops: np.ndarray) -> np.ndarray:
        flat = preprocessing.to_unit_range(crops.reshape(-1, *crops.shape[2:]))
        found = encode(params, sharding.global_batch(mesh, flat))
        return np.asarray(found).reshape(*crops.shape[:2], -1)

    for split, kind in splits.items():
        directory, source = codes_directory / split, getattr(images, split)
        with progress(f"extract_codes {split}", len(source), "images") as shown:
            start = time.monotonic()
            extract(
                source,
                directory,
                encode_pictures,
                config.codes,
                functools.partial(
                    preprocessing.crops,
                    kind=kind,
                    size=config.data.resolution,
                    max_shift=config.data.max_shift,
                    crop_ranges=config.codes.crop_ranges,
                ),
                model.codebook_size,
                shown,
                stop,
            )
        shards = sorted(directory.glob("codes-*.array_record"))
        figures = {
            "num_images": len(source),
            "class_names": list(images.class_names),
            "seconds": time.monotonic() - start,
        }
        artifacts.finish(directory, codes.fingerprint_records(shards), figures)
        say(f"extract_codes: {len(source)} images of {split} in {len(shards)} files under {directory}")


def extract(
    source: ImageSource,
    directory: epath.Path,
    encode_pictures,
    section: ConfigDict,
    crop: Callable[[Image.Image], np.ndarray],
    codebook_size: int,
    shown: Progress,
    stop: StopRequest,
) -> None:
    """Writes the shards that are not there yet; `crop` makes the views of a picture, uint8 [crops, R, R, 3].

    Raises:
        Interrupted: a stop was asked for; whole shards are kept.
    """
    num_shards = -(-len(source) // section.images_per_shard)
    for shard in range(num_shards):
        path = codes.shard_path(directory, shard, num_shards)
        indices = range(shard * section.images_per_shard, min((shard + 1) * section.images_per_shard, len(source)))
        if not path.exists():
            records = []
            for batch in encoded_batches(source, indices, encode_pictures, section.batch_size, crop):
                records += batch
                stop.obey(f"extract_codes stopped in file {shard + 1} of {num_shards}; those before it are kept")
            codes.write_shard(path, [codes.pack(record, codebook_size) for record in records])
        shown.update(len(indices))


def encoded_batches(
    source: ImageSource, indices: range, encode_pictures, batch_size: int, crop: Callable[[Image.Image], np.ndarray]
) -> Iterator[list[codes.CodeRecord]]:
    """Code records of the pictures at `indices`, in their order; host threads prepare while devices encode."""

    def prepare(index):
        return {
            "image": crop(source.picture(index)),
            "label": source.labels[index],
            "image_id": source.image_ids[index],
        }

    batches = grain.MapDataset.source(list(indices)).map(prepare).batch(batch_size)
    for batch in batches.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=2)):
        count = len(batch["label"])
        filling = np.repeat(batch["image"][-1:], batch_size - count, axis=0)
        found = encode_pictures(np.concatenate([batch["image"], filling]))[:count]
        yield [
            codes.CodeRecord(c, int(label), int(image_id))
            for c, label, image_id in zip(found, batch["label"], batch["image_id"], strict=True)
        ]


if __name__ == "__main__":
    command_line.main(run)
