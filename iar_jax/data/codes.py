"""Code records: the codes of all crops of one image, in sharded ArrayRecord files.

Ids in the records are those of the ORIGINAL codebook; the permutation is applied when they are read for training.
"""

import dataclasses
import hashlib
import os
import shutil
import struct

import numpy as np
from array_record.python import array_record_module
from etils import epath
from grain.sources import ArrayRecordDataSource
from jaxtyping import Int

from iar_jax.codebook.permutation import Permutation, load_permutation
from iar_jax.runtime.artifacts import Artifact, Metadata, changed_files, fingerprint_arrays, read_metadata, sizes_of
from iar_jax.runtime.errors import UserError, brief
from iar_jax.runtime.files import cache_directory, download, flush, in_bucket, local_copy, writing
from iar_jax.runtime.progress import say

MAKE_AGAIN = "run python -m iar_jax.extract_codes again, which makes damaged files anew"

# image id, label, number of crops, codes of a crop, bytes of a code; little-endian.
HEADER = struct.Struct("<qiIIB")


@dataclasses.dataclass(frozen=True)
class CodeRecord:
    """Codes [crops, L] of one image, with its label and its id."""

    codes: Int[np.ndarray, "crops L"]
    label: int
    image_id: int


def pack(record: CodeRecord, codebook_size: int) -> bytes:
    """Bytes of a record; uint16 codes where the codebook allows it, int32 otherwise."""
    dtype = np.dtype("<u2" if codebook_size <= 65536 else "<i4")
    crops, length = record.codes.shape
    header = HEADER.pack(record.image_id, record.label, crops, length, dtype.itemsize)
    return header + record.codes.astype(dtype).tobytes()


def unpack(content: bytes) -> CodeRecord:
    """Undoes `pack`.

    Raises:
        ValueError: the bytes are not a code record.
    """
    if len(content) < HEADER.size:
        raise ValueError(f"a code record has {len(content)} bytes, fewer than its header")
    image_id, label, crops, length, itemsize = HEADER.unpack_from(content)
    if itemsize not in (2, 4) or len(content) != HEADER.size + crops * length * itemsize:
        raise ValueError(f"a code record of {len(content)} bytes says it has {crops} x {length} codes of {itemsize}")
    codes = np.frombuffer(content, "<u2" if itemsize == 2 else "<i4", offset=HEADER.size)
    return CodeRecord(codes.reshape(crops, length).astype(np.int32), label, image_id)


def shard_path(directory: epath.Path, shard: int, num_shards: int) -> epath.Path:
    return directory / f"codes-{shard:05d}-of-{num_shards:05d}.array_record"


def write_shard(path: epath.Path, records: list[bytes]) -> None:
    """Writes one ArrayRecord file, whole or not at all."""
    with writing(path) as local:
        writer = array_record_module.ArrayRecordWriter(str(local), "group_size:1")
        for record in records:
            writer.write(record)
        writer.close()


def shards_in(directory: epath.Path) -> list[epath.Path]:
    """The files of a split, in their order."""
    return sorted(directory.glob("codes-*.array_record"))


def sound(path: epath.Path, num_records: int) -> bool:
    """Whether a file has so many records and all can be read; ArrayRecord checks each."""
    try:
        with local_copy(path) as local:
            source = ArrayRecordDataSource([str(local)])
            return len(source) == num_records and all(unpack(source[i]) for i in range(num_records))
    except Exception:  # of many kinds
        return False


def whole(directory: epath.Path, metadata: Metadata, thorough: bool) -> bool:
    """Whether the files of a finished split are those that were written, by their sizes, or by what is in them; says
    where they are not."""
    problem = changed_files(directory, metadata)
    if thorough and not problem:
        try:
            if fingerprint_records(shards_in(directory)) != metadata.fingerprint:
                problem = f"{directory}: its records are not those that were written"
        except Exception as error:  # of many kinds, for files that are damaged
            problem = f"{directory}: its records cannot be read ({brief(error)})"
    if problem:
        say(f"WARNING: {problem}; damaged files are made again")
    return not problem


def cached(directory: epath.Path, paths: list[epath.Path], cache_dir: str) -> list[epath.Path]:
    """Local copies of the files of a finished split in a bucket, where a read of one record takes a request; copies of
    the same content that are there already stay.

    Args:
        paths: of the files.
        cache_dir: "" is the machine's cache directory, unless the files would take more than half of its room.

    Raises:
        UserError: the given directory has too little room for them.
    """
    metadata, sizes = read_metadata(directory), sizes_of(paths)
    top = epath.Path(cache_dir).expanduser() if cache_dir else cache_directory() / "codes"
    copies = top / (metadata.fingerprint[:16] if metadata else "codes")
    copies.mkdir(parents=True, exist_ok=True)
    here = sizes_of(shards_in(copies))
    missing = [path for path in paths if here.get(path.name) != sizes[path.name]]
    needed, free = sum(sizes[path.name] for path in missing), shutil.disk_usage(copies).free
    if not cache_dir and needed > free / 2:
        say(f"{directory}: {needed / 1e9:.1f} GB, too much to copy to {top}; read where they lie, one request a record")
        return paths
    if needed > free:
        raise UserError(
            f"config.data.cache_dir={top} has {free / 1e9:.1f} GB free, and the code records of {directory} that are "
            f"not there yet take {needed / 1e9:.1f} GB; give another directory"
        )
    for path in missing:
        # Several processes of a machine may do so at once.
        own = copies / f"{path.name}.{os.getpid()}.partial"
        download(path, own)
        flush(own)
        own.replace(copies / path.name)
    return [copies / path.name for path in paths]


def fingerprint_records(paths: list[epath.Path]) -> str:
    """SHA-256 over the content of all records in order, whatever their shards."""
    digest = hashlib.sha256()
    for path in paths:
        with local_copy(path) as local:
            source = ArrayRecordDataSource([str(local)])
            for i in range(len(source)):
                digest.update(hashlib.sha256(source[i]).digest())
    return digest.hexdigest()


class RawRecords:
    """Random access to code records as they are stored, with the original ids.

    Args:
        cache_dir: as in `cached`.

    Raises:
        UserError: from the constructor where shards are missing, from a read where a record is damaged or has a code
            that the codebook has not.
    """

    def __init__(self, directory: epath.Path, codebook_size: int, cache_dir: str = ""):
        self.codebook_size = codebook_size
        paths = shards_in(directory)
        self.paths = [str(path) for path in paths]
        promised = int(self.paths[0].rsplit("-", 1)[1].split(".")[0]) if self.paths else 0
        if not self.paths or len(self.paths) != promised:
            raise UserError(
                f"{directory} has {len(self.paths)} of {promised or 'its'} code files; run python -m "
                "iar_jax.extract_codes again"
            )
        try:
            if in_bucket(directory):
                self.paths = [str(path) for path in cached(directory, paths, cache_dir)]
            self.source = ArrayRecordDataSource(self.paths)
        except UserError:
            raise
        except Exception as error:  # of many kinds, for files that are not ArrayRecord any more
            raise UserError(f"{directory}: its code files cannot be read ({brief(error)}); {MAKE_AGAIN}") from error

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> CodeRecord:
        try:
            record = unpack(self.source[index])
        except Exception as error:  # ArrayRecord checks what it reads, and raises several kinds
            raise UserError(
                f"record {index} of {self.paths[0]} and its shards cannot be read ({brief(error)}); {MAKE_AGAIN}"
            ) from error
        if record.codes.size and not 0 <= record.codes.min() <= record.codes.max() < self.codebook_size:
            raise UserError(
                f"record {index} (image {record.image_id}) has the code {record.codes.max()}; the codebook has "
                f"{self.codebook_size}: these codes are of another tokenizer, or damaged"
            )
        return record


def code_usage(directory: epath.Path, codebook_size: int) -> np.ndarray | None:
    """How often each code is used in a finished split of records, int [N]; None where there is none."""
    metadata = read_metadata(directory)
    if metadata is None or not metadata.finished:
        return None
    counts = np.zeros(codebook_size, np.int64)
    records = RawRecords(directory, codebook_size)
    for i in range(len(records)):
        counts += np.bincount(records[i].codes.ravel(), minlength=codebook_size)
    return counts


def permutation_fingerprint(permutation: Permutation) -> str:
    """Fingerprint of a codebook artifact."""
    arrays = {"old_to_new": permutation.old_to_new, "cluster_size": np.asarray(permutation.cluster_size)}
    if permutation.coarser_sizes:
        arrays["coarser_sizes"] = np.asarray(permutation.coarser_sizes)
    if permutation.offsets:
        arrays["offsets"] = np.asarray(permutation.offsets)
    return fingerprint_arrays(arrays)


def read_permutation(codebook: Artifact) -> Permutation:
    """The permutation of a finished codebook.

    Raises:
        UserError: it is damaged, or not the one that belongs there.
    """
    directory, metadata = codebook
    try:
        permutation, codebook_fingerprint = load_permutation(directory / "permutation.npz")
    except ValueError as error:
        raise UserError(str(error)) from error
    if (
        permutation_fingerprint(permutation) != metadata.fingerprint
        or codebook_fingerprint != metadata.figures["codebook_fingerprint"]
    ):
        raise UserError(f"{directory / 'permutation.npz'} is not the one that {directory / 'metadata.json'} describes")
    return permutation


class CodeSource:
    """Random access to code records for training, as rearranged ids.

    `source[i]` is {"codes": int32 [crops, L], "label", "image_id"}.

    Raises:
        UserError: from the constructor where shards are missing, from a read where a record does not fit the codebook
            or the classes.
    """

    def __init__(self, directory: epath.Path, permutation: Permutation, num_classes: int, cache_dir: str = ""):
        self.records = RawRecords(directory, len(permutation.old_to_new), cache_dir)
        self.permutation = permutation
        self.num_classes = num_classes

    def __repr__(self) -> str:
        return f"CodeSource({self.records.paths})"

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict:
        record = self.records[index]
        if not 0 <= record.label < self.num_classes:
            raise UserError(
                f"record {index} (image {record.image_id}) has the label {record.label}; there are "
                f"{self.num_classes} classes"
            )
        return {
            "codes": self.permutation.rearrange_codes(record.codes),
            "label": np.int32(record.label),
            "image_id": np.int64(record.image_id),
        }


def random_crop_codes(record: dict, rng: np.random.Generator) -> dict:
    """A training example: the codes of one crop of an image, drawn evenly, [L], with its label and id."""
    crop = int(rng.integers(len(record["codes"])))
    return {"codes": record["codes"][crop], "label": record["label"], "image_id": record["image_id"]}


class FirstCrop:
    """The same source with the codes of the first crop alone, for validation."""

    def __init__(self, source: CodeSource):
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict:
        record = self.source[index]
        return {"codes": record["codes"][0], "label": record["label"]}
