"""Parquet files of encoded images with labels, as Hugging Face stores image sets, read at random.

Images are converted to RGB as those of TensorFlow Datasets: transparency is dropped, EXIF rotation is not applied.
"""

import bisect
import collections
import functools
import hashlib
import itertools
import json
import struct
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from iar_jax.data.image_source import Opened, Unreadables, centred
from iar_jax.data.imagenet import check_class_order
from iar_jax.runtime.errors import UserError, brief
from iar_jax.runtime.section import Section

# What Hugging Face's imagenet-1k and cifar10 call theirs.
IMAGE_COLUMNS, LABEL_COLUMNS = ("image", "img"), ("label",)
# How the names of a split's files begin; of the second kind, the first that is there is validated on.
TRAIN, VAL = "train", ("val", "test")
# Row groups that are kept in memory: Hugging Face's have 100 images, some 11 MB of ImageNet's.
KEPT = 8


class RowGroup(NamedTuple):
    """A row group: its file, its number there, and the row of the file that it begins with."""

    path: Path
    number: int
    first: int


class Footer(NamedTuple):
    """What a parquet file says of itself: its row groups, and its columns."""

    metadata: pq.FileMetaData
    schema: pa.Schema


class ParquetFiles:
    """Random access to the encoded images of some files, in their order; a row group is read as a whole.

    Args:
        column: of the images: binary, or a struct with a field of bytes ("image.bytes"; "bytes" may be left out).
    """

    def __init__(self, paths: Sequence[Path], column: str):
        self.column = column
        self.places: list[RowGroup] = []
        sizes = []
        for path in paths:
            metadata, first = opened(path).metadata, 0
            for group in range(metadata.num_row_groups):
                self.places.append(RowGroup(path, group, first))
                sizes.append(metadata.row_group(group).num_rows)
                first += sizes[-1]
        self.starts = [0, *itertools.accumulate(sizes)]
        self.kept: collections.OrderedDict[int, pa.Array] = collections.OrderedDict()
        self.lock = threading.Lock()

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, index: int) -> bytes | None:
        place = bisect.bisect_right(self.starts, index) - 1
        return self.row_group(place)[index - self.starts[place]].as_py()

    def where(self, index: int) -> str:
        """File and row, for people."""
        place = bisect.bisect_right(self.starts, index) - 1
        path, _, first = self.places[place]
        return f"{path}: row {first + index - self.starts[place]}"

    def row_group(self, place: int) -> pa.Array:
        """The encoded images of a row group, kept for the next ones."""
        with self.lock:
            if place in self.kept:
                self.kept.move_to_end(place)
                return self.kept[place]
        path, group, _ = self.places[place]
        found = column_of(path, self.column, group)
        with self.lock:
            self.kept[place] = found
            if len(self.kept) > KEPT:
                self.kept.popitem(last=False)
        return found


class ParquetSource:
    """One split. Labels are in memory.

    Args:
        first_id: id of the first image; the others follow.
    """

    def __init__(
        self, files: ParquetFiles, labels: np.ndarray, first_id: int, resolution: int, unreadables: Unreadables
    ):
        self.files, self.labels, self.resolution = files, labels.astype(np.int32), resolution
        self.unreadables = unreadables
        self.image_ids = first_id + np.arange(len(labels))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict:
        return centred(self, index, self.resolution)

    def example(self, index: int) -> tuple[Image.Image, int]:
        return self.unreadables.example(
            int(index), len(self), lambda i: (self.files[i], int(self.labels[i]), self.files.where(i))
        )


def open_parquet(path: str, section: Section) -> Opened:
    """A parquet file, or a folder of them; files named train-... are trained on, and files named validation-... or
    test-... validated with. Without such names all files are trained on.

    Raises:
        UserError: no such files, or without the columns; names those that they have.
    """
    splits = files_of_splits(Path(path).expanduser())
    sample = opened(splits[TRAIN][0]).schema
    image_column = chosen_column(sample, section["image_column"], IMAGE_COLUMNS, "image_column", "images")
    label_column = chosen_column(sample, section["label_column"], LABEL_COLUMNS, "label_column", "labels")
    for file in itertools.chain(*splits.values()):
        check_columns(file, image_column, label_column)
    labels = {split: labels_of(paths, label_column) for split, paths in splits.items()}
    class_names = names_of_classes(sample, label_column) or numbered(labels[TRAIN])
    check_class_order(class_names, section["source"])
    digest = hashlib.sha256(f"{section['resolution']} {image_column} {label_column}".encode())
    sources: dict[str, ParquetSource] = {}
    unreadables = Unreadables(section["max_unreadable"])
    first_id = 0
    for split, paths in splits.items():
        check_labels(paths, labels[split], class_names)
        files = ParquetFiles(paths, image_column)
        sources[split] = ParquetSource(files, labels[split], first_id, section["resolution"], unreadables)
        first_id += len(files)
        for file in paths:
            digest.update(split.encode() + footer(file))
    content = digest.digest()
    return Opened(
        sources[TRAIN],
        next((sources[name] for name in VAL if name in sources), None),
        class_names,
        lambda held_out: hashlib.sha256(content + held_out).hexdigest(),
    )


def files_of_splits(root: Path) -> dict[str, list[Path]]:
    """Files by split, in the order of their names."""
    if root.is_file():
        return {TRAIN: [root]}
    found = sorted(root.rglob("*.parquet")) if root.is_dir() else []
    if not found:
        raise UserError(f"config.data.source is 'parquet:{root}': there is no such file, and no folder with *.parquet")
    splits = {name: [path for path in found if path.name.startswith(name)] for name in (TRAIN, *VAL)}
    if not splits[TRAIN]:
        return {TRAIN: found}
    # A split that is not used is not looked at: test sets may have no labels.
    val = next((name for name in VAL if splits[name]), None)
    return {name: splits[name] for name in (TRAIN, val) if name}


@functools.cache
def opened(path: Path) -> Footer:
    """The file's footer, read once; the file is closed again, for a set may have more files than may be open.

    Raises:
        UserError: it is not a parquet file, or has no rows.
    """
    try:
        with pq.ParquetFile(path) as file:
            found = Footer(file.metadata, file.schema_arrow)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path} cannot be read as parquet ({brief(error)})") from error
    if not found.metadata.num_rows:
        raise UserError(f"{path} has no rows")
    return found


def chosen_column(schema: pa.Schema, given: str, usual: tuple[str, ...], field: str, what: str) -> str:
    """The column that is given, or else the first of the usual ones that is there."""
    for name in (given,) if given else usual:
        if name.partition(".")[0] in schema.names:
            return name
    asked = repr(given) if given else " or ".join(map(repr, usual))
    raise UserError(
        f"the parquet files have no column {asked} of {what}; they have {', '.join(schema.names)}: set "
        f"--config.data.{field}"
    )


def check_columns(path: Path, image_column: str, label_column: str) -> None:
    """Raises UserError where a file does not have encoded images and integer labels in these columns."""
    schema = opened(path).schema
    for column in (image_column, label_column):
        if column.partition(".")[0] not in schema.names:
            raise UserError(f"{path} has no column {column!r}; it has {', '.join(schema.names)}")
    name, _, inside = image_column.partition(".")
    kind = schema.field(name).type
    if pa.types.is_struct(kind):
        fields = {field.name: field.type for field in kind}
        if (inside or "bytes") not in fields:
            raise UserError(f"{path}: column {name!r} has no field {inside or 'bytes'!r}; it has {', '.join(fields)}")
        kind = fields[inside or "bytes"]
    if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_null(kind)):
        raise UserError(f"{path}: column {image_column!r} is of type {kind}; images are encoded files, as bytes")
    if not pa.types.is_integer(schema.field(label_column).type):
        kind = schema.field(label_column).type
        raise UserError(f"{path}: column {label_column!r} is of type {kind}; labels are integers, one a row")


def column_of(path: Path, column: str, group: int | None = None) -> pa.Array:
    """A column, or a field of a struct, of a row group or of all."""
    name, _, inside = column.partition(".")
    try:
        with pq.ParquetFile(path) as file:
            table = file.read([name]) if group is None else file.read_row_group(group, [name])
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path} cannot be read ({brief(error)})") from error
    found = table.column(name).combine_chunks()
    if pa.types.is_struct(found.type):
        found = found.field(inside or "bytes")
    return found


def labels_of(paths: Sequence[Path], column: str) -> np.ndarray:
    """Labels int64 of all rows of some files."""
    found = []
    for path in paths:
        values = column_of(path, column)
        if values.null_count:
            raise UserError(f"{path}: column {column!r} is empty in {values.null_count} rows; each image has a label")
        found.append(values.to_numpy(zero_copy_only=False).astype(np.int64))
    return np.concatenate(found)


def names_of_classes(schema: pa.Schema, column: str) -> tuple[str, ...] | None:
    """Names that Hugging Face keeps in the schema; None where there are none."""
    content = (schema.metadata or {}).get(b"huggingface")
    try:
        return tuple(json.loads(content)["info"]["features"][column]["names"]) if content else None
    except (ValueError, KeyError, TypeError):
        return None


def numbered(labels: np.ndarray) -> tuple[str, ...]:
    """Names of classes that have none: their numbers, up to the largest that has images."""
    return tuple(str(label) for label in range(min(1 + int(labels.max()), len(labels))))


def check_labels(paths: Sequence[Path], labels: np.ndarray, class_names: tuple[str, ...]) -> None:
    """Raises UserError for a label that has no class; unlabelled test sets have -1."""
    wrong = labels[(labels < 0) | (labels >= len(class_names))]
    if len(wrong):
        raise UserError(f"{paths[0].parent}: a label is {wrong[0]}; there are {len(class_names)} classes")


def footer(path: Path) -> bytes:
    """The file's own description of its content: sizes, statistics and places of all columns."""
    with path.open("rb") as file:
        file.seek(-8, 2)
        length = struct.unpack("<I", file.read(4))[0]
        file.seek(-8 - length, 2)
        return file.read(length)
