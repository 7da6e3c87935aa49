"""Stage 3: images + tokenizer -> code records.

    python -m iar_jax.extract_codes --config=configs/mnist.py --workdir=runs/mnist
    python -m iar_jax.extract_codes --config=configs/mnist.py --workdir=runs/mnist --check

The second form holds finished records against their images: it decodes some next to their originals into check.png,
compares names, ids, labels and counts, and fails where records are not what the tokenizer makes of the images.
"""

import dataclasses
import functools
import os
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import grain
import jax
import numpy as np
from absl import flags
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict
from PIL import Image

from iar_jax.config import command_line
from iar_jax.config.relevance import relevant
from iar_jax.data import code_statistics, codes, image_grids, preprocessing
from iar_jax.data.image_source import ImageSource
from iar_jax.data.images import ImageDataset, open_images
from iar_jax.generators.code_layout import CodeLayout, layout_of
from iar_jax.models.tokenizer import LoadedTokenizer, load_tokenizer
from iar_jax.runtime import artifacts, distributed, lock, sharding
from iar_jax.runtime.errors import UserError
from iar_jax.runtime.interruption import StopRequest, catch_stop_signals
from iar_jax.runtime.progress import Progress, progress, say

# Of a check: records that are decoded, those whose codes are counted, those in the picture; the least share of codes
# that agree with a fresh encoding (rounding moves few), and of decoded records nearest to their own original.
CHECKED, COUNTED, SHOWN = 64, 2000, 16
AGREEMENT, RECOGNISED = 0.9, 0.9

READS = ("seed", "inputs", "mesh", "data", "codes")

# Codes [B, crops, L] and labels of a whole batch, from this process' crops and labels of it.
EncodeBatch = Callable[[dict[str, np.ndarray]], tuple[np.ndarray, np.ndarray]]


def run(config: ConfigDict, workdir: epath.Path, thorough: bool = False) -> None:
    """Encodes all crops of every picture of both splits into workdir/codes/train and workdir/codes/val.

    Files of finished splits that are damaged are made again; damage inside of them, which leaves their sizes, is looked
    for where a thorough run is asked for.
    """
    opened = artifacts.open_inputs(config.inputs, workdir, "tokenizer")
    made_by, inputs = relevant(config, ("data", "codes")), artifacts.fingerprints(opened)
    # Validation measures the pictures themselves, whatever copies are trained on.
    splits = {"train": config.codes.crops, "val": "center"}

    def contents() -> dict[str, str]:
        return {"images": open_images(config.data).fingerprint}

    def whole(directory: epath.Path) -> bool:
        found = artifacts.finished(directory, made_by, inputs, contents)
        return found is not None and codes.whole(directory, found, thorough)

    there = {directory: whole(directory) for directory in (workdir / "codes" / split for split in splits)}
    if all(there.values()):
        say(f"extract_codes: done, in {workdir / 'codes'}")
        return
    mesh = sharding.make_mesh(**config.mesh)
    sharding.check_batch_size(mesh, config.codes.batch_size, "config.codes.batch_size")
    images = open_images(config.data)
    with lock.hold(workdir / "codes"), catch_stop_signals() as stop:
        command_line.save_config(config, workdir)
        for directory, sound in there.items():
            done = artifacts.begin(directory, "extract_codes", made_by, inputs | {"images": images.fingerprint})
            if done and not sound:
                artifacts.reopen(directory)
        extract_splits(config, workdir / "codes", opened["tokenizer"].directory, images, splits, mesh, stop)


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

    def encode_batch(batch: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        crops = batch["image"]
        flat = preprocessing.to_unit_range(crops.reshape(-1, *crops.shape[2:]))
        found = distributed.to_host(encode(params, sharding.global_batch(mesh, flat)))
        labels = distributed.to_host(sharding.global_batch(mesh, batch["label"]))
        return found.reshape(-1, crops.shape[1], found[0].size), labels

    for split, kind in splits.items():
        directory, source = codes_directory / split, getattr(images, split)
        with progress(f"extract_codes {split}", len(source), "images") as shown:
            start = time.monotonic()
            pace = extract(
                source,
                directory,
                encode_batch,
                config.codes,
                functools.partial(preprocessing.crops, kind=kind, views=views_of(config)),
                sharding.local_part(mesh),
                model.codebook_size,
                shown,
                stop,
            )
        num_shards = -(-len(source) // config.codes.images_per_shard)
        shards = [codes.shard_path(directory, shard, num_shards) for shard in range(num_shards)]
        figures = {
            "files": artifacts.sizes_of(shards),
            "num_images": len(source),
            "class_names": list(images.class_names),
            "layout": list(model.code_sides(config.data.resolution)),
            "seconds": time.monotonic() - start,
            **pace.figures(),
        }
        fingerprint = codes.fingerprint_records(shards) if distributed.is_first() else ""
        artifacts.finish(directory, fingerprint, figures)
        say(f"extract_codes: {len(source)} images of {split} in {len(shards)} files under {directory}{pace}")


def views_of(config: ConfigDict) -> preprocessing.Views:
    """What the config says of an image's views."""
    return preprocessing.Views(config.data.resolution, config.data.max_shift, config.codes.crop_ranges)


@dataclasses.dataclass
class Pace:
    """Images that were encoded, the seconds from their first batch to their last, and those of them in which devices
    had nothing to do because the next batch was not ready."""

    images: int = 0
    seconds: float = 0.0
    waiting: float = 0.0

    def figures(self) -> dict[str, float]:
        """Images a second and the share of time that devices waited; nothing where nothing was encoded."""
        if not self.images:
            return {}
        return {"images_per_second": self.images / self.seconds, "device_wait": self.waiting / self.seconds}

    def __str__(self) -> str:
        if not self.images:
            return ""
        return f"; {self.images / self.seconds:.1f} images a second, devices waited {self.waiting / self.seconds:.0%}"


def extract(
    source: ImageSource,
    directory: epath.Path,
    encode_batch: EncodeBatch,
    section: ConfigDict,
    crop: Callable[[Image.Image], np.ndarray],
    part: tuple[int, int],
    codebook_size: int,
    shown: Progress,
    stop: StopRequest,
) -> Pace:
    """Writes the shards that are not there yet; `crop` makes the views of a picture, uint8 [crops, R, R, 3].

    Each process prepares its part of every batch, all get all codes, and the first one writes.

    Raises:
        Interrupted: a stop was asked for; whole shards are kept.
    """
    num_shards = -(-len(source) // section.images_per_shard)
    pace = Pace()
    for shard in range(num_shards):
        path = codes.shard_path(directory, shard, num_shards)
        indices = range(shard * section.images_per_shard, min((shard + 1) * section.images_per_shard, len(source)))
        there = distributed.is_first() and path.exists()
        if there and not codes.sound(path, len(indices)):
            say(f"WARNING: {path} is damaged; it is made again")
            path.unlink()
            there = False
        if not distributed.from_first(there):
            records = []
            for batch in encoded_batches(source, indices, encode_batch, section.batch_size, crop, part, pace):
                records += batch
                stop.obey(f"extract_codes stopped in file {shard + 1} of {num_shards}; those before it are kept")
            if distributed.is_first():
                codes.write_shard(path, [codes.pack(record, codebook_size) for record in records])
        shown.update(len(indices))
    distributed.wait_for_all("all shards")
    return pace


def encoded_batches(
    source: ImageSource,
    indices: range,
    encode_batch: EncodeBatch,
    batch_size: int,
    crop: Callable[[Image.Image], np.ndarray],
    part: tuple[int, int],
    pace: Pace,
) -> Iterator[list[codes.CodeRecord]]:
    """Code records of the pictures at `indices`, in their order; host threads prepare while devices encode.

    Args:
        part: which of how many parts of each batch this process prepares.
    """
    blocks = [indices[start : start + batch_size] for start in range(0, len(indices), batch_size)]
    # The last block is filled up with its last picture, whose codes are left out.
    filled = [np.minimum(block.start + np.arange(batch_size), block.stop - 1) for block in blocks]
    mine = np.concatenate([np.split(block, part[1])[part[0]] for block in filled])
    threads = os.cpu_count() or 1

    def prepare(index):
        picture, label = source.example(index)
        return {"image": crop(picture), "label": np.int32(label)}

    batches = (
        grain.MapDataset.source(mine.tolist())
        .map(prepare)
        .batch(batch_size // part[1])
        .to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(threads, 2)))
    )
    before = time.monotonic()
    for block, batch in zip(blocks, batches, strict=True):
        ready = time.monotonic()
        found, labels = encode_batch(batch)
        pace.images += len(block)
        pace.waiting += ready - before
        pace.seconds += time.monotonic() - before
        before = time.monotonic()
        yield [
            codes.CodeRecord(found[i], int(labels[i]), int(source.image_ids[index])) for i, index in enumerate(block)
        ]


def run_check(config: ConfigDict, workdir: epath.Path) -> None:
    """Holds the records of both splits against their images; leaves check.png in workdir/codes.

    Raises:
        UserError: they are not what the tokenizer makes of the images, or images and labels are others.
    """
    inputs = artifacts.open_inputs(config.inputs, workdir, "tokenizer", "codes", "val_codes")
    tokenizer = load_tokenizer(inputs["tokenizer"].directory, sharding.make_mesh(**config.mesh))
    images = open_images(config.data)
    rng = np.random.default_rng(config.seed)
    usages, pairs = [], []
    for split, name, kind in (("train", "codes", config.codes.crops), ("val", "val_codes", "center")):
        stored = stored_codes(inputs[name], images, split, kind, views_of(config), tokenizer.model.codebook_size, rng)
        found = compared(stored, tokenizer)
        usages.append(found.usage)
        pairs += [preprocessing.to_uint8(stored.originals[:SHOWN]), preprocessing.to_uint8(found.decoded[:SHOWN])]
        say(f"{split:6}{found}")
        if found.agreement < AGREEMENT or found.recognised < RECOGNISED:
            raise UserError(
                f"{inputs[name].directory}: these records are not what {inputs['tokenizer'].directory} makes of "
                f"{images.name}: {found.agreement:.1%} of the codes agree with a fresh encoding ({AGREEMENT:.0%} at "
                f"least), {found.recognised:.0%} decode nearest to their own original ({RECOGNISED:.0%} at least). "
                f"Move {inputs['codes'].directory.parent} away and extract again"
            )
    path = inputs["codes"].directory.parent / "check.png"
    rows = np.concatenate([np.concatenate([row, np.zeros_like(pairs[0])[: SHOWN - len(row)]]) for row in pairs])
    image_grids.write_png(path, image_grids.image_grid(rows, SHOWN, image_grids.scale_to_see(config.data.resolution)))
    say(f"both   share {code_statistics.usage_overlap(*usages):.1%} of their usage of codes")
    say(f"pictures {path} (of train and of val: originals, decoded records below)")


class Stored(NamedTuple):
    """Some records and the views that they are of.

    Attributes:
        records: all of the split.
        layout: how an image's codes lie in it.
        codes: [n, L], of a view of each of some images.
        originals: those views, in [-1, 1].
    """

    records: codes.RawRecords
    layout: CodeLayout
    codes: np.ndarray
    originals: np.ndarray


def stored_codes(
    artifact: artifacts.Artifact,
    images: ImageDataset,
    split: str,
    kind: str,
    views: preprocessing.Views,
    codebook_size: int,
    rng: np.random.Generator,
) -> Stored:
    """Some records of a split and the views that they are of.

    Raises:
        UserError: a record that is of another image, or has another label or number of views.
    """
    directory, source = artifact.directory, getattr(images, split)
    if artifact.metadata.figures["class_names"] != list(images.class_names):
        raise UserError(f"{directory}: its class names are not those of {images.name}")
    records = codes.RawRecords(directory, codebook_size)
    if len(records) != len(source):
        raise UserError(f"{directory} has {len(records)} records; {images.name} has {len(source)} images")
    chosen = np.sort(rng.choice(len(source), min(CHECKED, len(source)), replace=False))
    found, originals = [], []
    for index in chosen.tolist():
        record, (image, label) = records[index], source.example(index)
        if (record.image_id, record.label) != (source.image_ids[index], label):
            raise UserError(
                f"{directory}: record {index} is of image {record.image_id}, label {record.label}; "
                f"{images.name} has image {source.image_ids[index]}, label {label} there"
            )
        crops = preprocessing.crops(image, kind, views)
        view = int(rng.integers(len(crops)))
        if len(crops) != len(record.codes):
            raise UserError(f"{directory}: record {index} has {len(record.codes)} crops, not {len(crops)}")
        found.append(record.codes[view])
        originals.append(preprocessing.to_unit_range(crops[view]))
    return Stored(records, layout_of(artifact, len(found[0])), np.stack(found), np.stack(originals))


@dataclasses.dataclass
class Comparison:
    """Records against a fresh encoding, and what their codes look like; `str()` says it for people.

    Attributes:
        agreement: share of codes that are those of a fresh encoding.
        recognised: share of decoded records that are nearest to their own original.
        usage: how often each code is used, int [N].
        information: nats that a code tells of the one to its right, and of the one below.
    """

    num_records: int
    num_compared: int
    num_counted: int
    decoded: np.ndarray
    agreement: float
    recognised: float
    psnr: float
    usage: np.ndarray
    information: tuple[float, float]

    def __str__(self) -> str:
        right, down = self.information
        return (
            f"{self.num_records:>9,} records; of {self.num_compared}: {self.agreement:.1%} of the codes are those of a "
            f"fresh encoding, {self.recognised:.0%} decode nearest to their own original, PSNR {self.psnr:.1f} dB\n"
            f"{'':6}of {self.num_counted:,}: {np.mean(self.usage > 0):.1%} of the codebook used, perplexity "
            f"{code_statistics.perplexity(self.usage):.0f}; a code tells {right:.3f} nats of the one to its right, "
            f"{down:.3f} of the one below"
        )


def compared(stored: Stored, tokenizer: LoadedTokenizer) -> Comparison:
    """Encodes the views again and decodes the records."""
    model, params, _ = tokenizer
    fresh = np.asarray(model.apply({"params": params}, stored.originals, method="encode"))
    decoded = np.asarray(model.apply({"params": params}, stored.codes, method="decode_positions"))
    errors = np.square(decoded[:, None] - stored.originals[None]).mean(axis=(2, 3, 4))
    some = np.linspace(0, len(stored.records) - 1, min(len(stored.records), COUNTED)).round().astype(int)
    many = np.concatenate([stored.records[i].codes for i in some.tolist()])
    grids = np.asarray(stored.layout.squares(many)[-1])
    size = model.codebook_size
    return Comparison(
        num_records=len(stored.records),
        num_compared=len(stored.originals),
        num_counted=len(some),
        decoded=decoded,
        agreement=float(np.mean(fresh.reshape(stored.codes.shape) == stored.codes)),
        recognised=float(np.mean(errors.argmin(axis=1) == np.arange(len(errors)))),
        psnr=float(np.mean(10 * np.log10(4 / np.maximum(np.diag(errors), 1e-12)))),
        usage=np.bincount(many.ravel(), minlength=size),
        information=(
            code_statistics.neighbour_information(grids, size, 0, 1),
            code_statistics.neighbour_information(grids, size, 1, 0),
        ),
    )


def run_or_check(config: ConfigDict, workdir: epath.Path) -> None:
    """The whole command."""
    if flags.FLAGS.check:
        run_check(config, workdir)
    else:
        run(config, workdir, thorough=True)


if __name__ == "__main__":
    flags.DEFINE_bool("check", False, "Hold finished records against their images.")
    command_line.main(run_or_check, READS)
