"""Image-classification sets of TensorFlow Datasets that are prepared on this machine, read at random.

Nothing is downloaded or prepared here, and TensorFlow is not imported: records are read and parsed as bytes. Pictures
are converted to RGB as ADM and LlamaGen do for ImageNet: transparency is dropped, EXIF rotation is not applied.
"""

import functools
import hashlib
import itertools
import struct
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from iar_jax.data.image_source import Opened, Unreadables, centred
from iar_jax.data.imagenet import check_class_order
from iar_jax.runtime.errors import UserError, brief
from iar_jax.runtime.progress import progress
from iar_jax.runtime.section import Section


class TfdsSource:
    """One split. Labels are read from the records when they are first asked for as a whole.

    Args:
        records: random access to {"image": bytes of a picture, "label": int}.
        first_id: id of the first image; the others follow.
    """

    def __init__(self, name: str, records: Any, first_id: int, resolution: int, unreadables: Unreadables | None = None):
        self.name, self.records, self.resolution = name, records, resolution
        self.unreadables = unreadables or Unreadables(0)
        self.image_ids = first_id + np.arange(len(records))

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict:
        return centred(self, index, self.resolution)

    def example(self, index: int) -> tuple[Image.Image, int]:
        return self.unreadables.example(int(index), len(self), self.content)

    def content(self, index: int) -> tuple[bytes, int, str]:
        """The encoded picture of a record, its label, and where it lies."""
        image, label = self.parsed(index)
        return image, label, f"{self.name}: record {index}"

    def parsed(self, index: int) -> tuple[bytes, int]:
        """The encoded picture of a record, and its label; raises UserError where the record is damaged."""
        try:
            record = self.records[index]
            return bytes(record["image"]), int(record["label"])
        except Exception as error:  # parsers of records raise many kinds
            raise UserError(
                f"{self.name}: record {index} cannot be read ({brief(error)}); prepare the set again"
            ) from error

    @functools.cached_property
    def labels(self) -> np.ndarray:
        found = np.zeros(len(self), np.int32)
        with progress(f"labels of {self.name}", len(self), "records") as shown:
            for i in range(len(self)):
                found[i] = self.parsed(i)[1]
                shown.update()
        return found


class ParsedRecords:
    """Records of a file format that has no random access in TFDS: bytes, parsed by the set's features."""

    def __init__(self, raw: "TfRecordFiles", features: Any, decoders: dict[str, Any]):
        self.raw, self.features, self.decoders = raw, features, decoders

    def __len__(self) -> int:
        return len(self.raw)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.features.deserialize_example_np(self.raw[index], decoders=self.decoders)


class TfRecordFiles:
    """Random access to the records of TFRecord files, whose places are found by one walk over their lengths.

    Raises:
        UserError: a file ends inside a record.
    """

    def __init__(self, paths: Sequence[str]):
        self.paths, self.places = paths, [record_places(path) for path in paths]
        self.starts = [0, *itertools.accumulate(len(places) for places in self.places)]

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, index: int) -> bytes:
        file = bisect_right(self.starts, index) - 1
        place, length = self.places[file][index - self.starts[file]]
        with open(self.paths[file], "rb") as content:
            content.seek(place)
            return content.read(length)


def record_places(path: str) -> list[tuple[int, int]]:
    """Where each record of a TFRecord file begins, and how long it is. A record is its length (8 bytes), a checksum of
    that (4), the bytes, and a checksum of them (4)."""
    places: list[tuple[int, int]] = []
    size, at = Path(path).stat().st_size, 0
    with open(path, "rb") as file:
        while at < size:
            file.seek(at)
            header = file.read(12)
            length = struct.unpack("<Q", header[:8])[0] if len(header) == 12 else size
            if at + 16 + length > size:
                raise UserError(f"{path} ends inside record {len(places)}; prepare the set again")
            places.append((at + 12, length))
            at += 16 + length
    return places


class TfdsSplits:
    """What a prepared set has: its splits as sources, names of classes, a fingerprint.

    Raises:
        UserError: no such set is prepared, or it is not one of labelled images.
    """

    def __init__(self, name: str, directory: str, resolution: int, max_unreadable: int = 0):
        import tensorflow_datasets as tfds  # takes a second

        try:
            builder = tfds.core.read_only_builder.builder_from_files(name, data_dir=directory or None)
        except (tfds.core.registered.DatasetNotFoundError, OSError, ValueError) as error:
            raise UserError(
                f"config.data.source is 'tfds:{name}', which is not prepared in "
                f"{directory or 'TFDS_DATA_DIR or ~/tensorflow_datasets'}: run tfds build {name} "
                "--file_format=array_record there, or set config.data.tfds_dir"
            ) from error
        features = builder.info.features
        if not {"image", "label"} <= set(features) or not hasattr(features["label"], "names"):
            raise UserError(f"tfds:{name} has {sorted(features)}; needed are an image and a label of named classes")
        decoders = {"image": tfds.decode.SkipDecoding()}
        self.class_names = tuple(features["label"].names)
        self.sources: dict[str, TfdsSource] = {}
        unreadables = Unreadables(max_unreadable)
        digest = hashlib.sha256(f"{builder.info.full_name} {resolution}".encode())
        first_id = 0
        for split in ("train", "validation", "test"):
            if split not in builder.info.splits:
                continue
            info = builder.info.splits[split]
            if builder.info.file_format == tfds.core.file_adapters.FileFormat.TFRECORD:
                paths = [str(path) for path in info.filepaths]
                records: Any = ParsedRecords(TfRecordFiles(paths), features, decoders)
            else:
                try:
                    records = builder.as_data_source(split, decoders=decoders)
                except Exception as error:  # of many kinds, for files that are damaged
                    raise UserError(
                        f"the files of tfds:{name} {split} cannot be read ({brief(error)}); prepare the set again"
                    ) from error
            self.sources[split] = TfdsSource(f"tfds:{name} {split}", records, first_id, resolution, unreadables)
            first_id += len(records)
            digest.update(f" {split} {info.shard_lengths} {info.num_bytes}".encode())
        self.fingerprint = digest.hexdigest()


def open_tfds(name: str, section: Section) -> Opened:
    """A prepared set: its validation split, else its test split, is what we validate on, where it has one.

    Raises:
        UserError: see `TfdsSplits`; or it has no train split.
    """
    found = TfdsSplits(name, section["tfds_dir"], section["resolution"], section["max_unreadable"])
    if "train" not in found.sources:
        raise UserError(f"tfds:{name} has no train split")
    check_class_order(found.class_names, f"tfds:{name}")
    val = found.sources.get("validation") or found.sources.get("test")

    def fingerprint(held_out: bytes) -> str:
        return hashlib.sha256(found.fingerprint.encode() + held_out).hexdigest() if held_out else found.fingerprint

    return Opened(found.sources["train"], val, found.class_names, fingerprint)
