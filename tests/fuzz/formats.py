"""What is read from outside: sound files of each format, how they are put in order again after a change, and the
program's own reader of them.

A reader returns what it read as arrays, or raises UserError or Unreadable; anything else is a defect.
"""

import functools
import io
import pickle
import struct
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from PIL import Image
from safetensors.numpy import save as safetensors_bytes

from iar_jax.codebook.permutation import Permutation, load_permutation, save_permutation
from iar_jax.data import codes, tfds_images
from iar_jax.data.array_files import RowReader, array_names, read_array
from iar_jax.data.image_source import Unreadables
from iar_jax.data.pictures import Unreadable, read_image
from iar_jax.data.preprocessing import center_crop
from iar_jax.interop import graph_def, llamagen
from iar_jax.interop.torch_files import read_torch_file
from iar_jax.runtime.errors import UserError
from tests.fuzz.changes import changed, odd_exif

GOLDEN = Path(__file__).parents[1] / "golden"


class Format(NamedTuple):
    """One format.

    Attributes:
        count: files of a whole run.
        suffix: of the file that is read.
        sound: the content of sound files.
        make: a generator, sound files -> the content of an odd one.
        read: the file at a path, by the program.
    """

    count: int
    suffix: str
    sound: Callable[[], list[bytes]]
    make: Callable[[np.random.Generator, list[bytes]], bytes]
    read: Callable[[Path], Any]


# Pictures.


def pictures(file_format: str) -> list[bytes]:
    """Pictures of several modes in one file format."""
    rng = np.random.default_rng(0)
    smooth = np.asarray(Image.fromarray(rng.integers(0, 256, (5, 7, 4), dtype=np.uint8), "RGBA").resize((40, 33)))
    image = Image.fromarray(smooth, "RGBA")
    grey = Image.fromarray((smooth[..., 0].astype(np.uint16) << 8) + 7)
    options: dict[str, list[tuple[Image.Image, dict[str, Any]]]] = {
        "PNG": [
            (image, {}),
            (image.convert("P"), {"transparency": 3}),
            (grey, {}),
            (image.convert("1"), {}),
            (image.convert("LA"), {}),
        ],
        "JPEG": [
            (image.convert("RGB"), {}),
            (image.convert("L"), {"progressive": True}),
            (image.convert("CMYK"), {"subsampling": 0}),
        ],
        "WEBP": [
            (image, {}),
            (image, {"lossless": True}),
            (image.convert("RGB"), {"save_all": True, "append_images": [image.convert("RGB").rotate(90)]}),
        ],
    }
    found = []
    for picture, more in options[file_format]:
        buffer = io.BytesIO()
        picture.save(buffer, file_format, **more)
        found.append(buffer.getvalue())
    return found


def read_picture(path: Path) -> list[np.ndarray]:
    image = read_image(path)
    return [center_crop(image, 16)]


def change_png(rng: np.random.Generator, sound: list[bytes]) -> bytes:
    """A PNG changed as a whole, or one of whose chunks was changed, with its length and checksum put right."""
    if rng.random() < 0.3:
        return changed(rng, sound)
    content, chunks, place = sound[rng.integers(len(sound))], [], 8
    while place < len(content):
        size = int.from_bytes(content[place : place + 4], "big")
        chunks.append(content[place + 4 : place + 8 + size])
        place += 12 + size
    victim = int(rng.integers(len(chunks)))
    kind, body = chunks[victim][:4], chunks[victim][4:]
    if kind == b"IDAT" and rng.random() < 0.7:  # what is packed, and packed again
        chunks[victim] = kind + zlib.compress(changed(rng, [zlib.decompress(body)]))
    elif rng.random() < 0.8:
        chunks[victim] = kind + changed(rng, [body])
    else:
        chunks.insert(int(rng.integers(len(chunks))), bytes(rng.choice(CHUNKS)) + rng.bytes(int(rng.integers(40))))
    packed = (struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks)
    return content[:8] + b"".join(packed)


# Kinds of chunks that decoders look into.
CHUNKS = b"tRNS PLTE gAMA cHRM iCCP eXIf zTXt iTXt pHYs acTL fcTL fdAT IDAT".split()


def change_exif(rng: np.random.Generator, sound: list[bytes]) -> bytes:
    """A picture with an odd EXIF block."""
    block, jpeg = odd_exif(rng)[:65_000], sound[0]
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 8) + b"Exif\0\0" + block + jpeg[2:]


# Archives of weights and arrays.


def change_archive(rng: np.random.Generator, sound: list[bytes]) -> bytes:
    """A zip archive changed as a whole, or one of whose members was changed before it was packed."""
    if rng.random() < 0.4:
        return changed(rng, sound)
    members = contents_of(sound[rng.integers(len(sound))])
    names = list(members)
    victim = names[rng.integers(len(names))]
    if rng.random() < 0.5:  # the pickle, or the first array: what is understood, not only copied
        victim = next((name for name in names if name.endswith("data.pkl")), names[0])
    members[victim] = changed(rng, [members[victim]])
    if rng.random() < 0.1:
        members[names[rng.integers(len(names))] + ".npy"] = members.pop(victim)
    buffer = io.BytesIO()
    method = zipfile.ZIP_DEFLATED if rng.random() < 0.2 else zipfile.ZIP_STORED
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    packed = buffer.getvalue()
    return changed(rng, [packed]) if rng.random() < 0.1 else packed


def contents_of(archive: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(archive)) as opened:
        return {name: opened.read(name) for name in opened.namelist()}


def change_weights(rng: np.random.Generator, sound: list[bytes]) -> bytes:
    return change_archive(rng, sound[:1]) if rng.random() < 0.6 else changed(rng, sound[1:])


def torch_files() -> list[bytes]:
    """A transformer as PyTorch saves it, and a small file of its older format."""
    small = GOLDEN / "gpt_tiny.pt"
    return [small.read_bytes(), legacy_file()]


def legacy_file() -> bytes:
    """A file of PyTorch's older format: pickles of a header, of what holds the tensors, of the storages' names; then
    the storages."""
    header = [pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
    # A dict with one tensor, float32 [2, 3] of storage "0".
    tensor = (
        b"\x80\x02}q\x00X\x06\x00\x00\x00weightq\x01ctorch._utils\n_rebuild_tensor_v2\nq\x02((X\x07\x00\x00\x00storage"
        b"q\x03ctorch\nFloatStorage\nq\x04X\x01\x00\x00\x000q\x05X\x03\x00\x00\x00cpuq\x06K\x06Ntq\x07QK\x00K\x02K\x03"
        b"\x86q\x08K\x03K\x01\x86q\x09\x89ccollections\nOrderedDict\nq\n)Rq\x0btq\x0cRq\rs."
    )
    return b"".join(
        [*header, tensor, pickle.dumps(["0"], 2), struct.pack("<q", 6), np.arange(6, dtype="<f4").tobytes()]
    )


def read_weights(path: Path) -> list[np.ndarray]:
    found = read_torch_file(path)
    if isinstance(found, dict) and "weight" in found:
        return [np.asarray(found["weight"])]
    _, params = llamagen.load_transformer(path, num_heads=4, grid_size=4)
    return [params["token_table"], params["head"]]


def safetensors_files() -> list[bytes]:
    weights = read_torch_file(GOLDEN / "gpt_tiny.pt")
    weights = weights.get("model", weights)
    return [safetensors_bytes({name: np.ascontiguousarray(value) for name, value in weights.items()})]


def change_safetensors(rng: np.random.Generator, sound: list[bytes]) -> bytes:
    """A file changed as a whole, or its header changed and its length put right."""
    if rng.random() < 0.4:
        return changed(rng, sound)
    size = int.from_bytes(sound[0][:8], "little")
    header = changed(rng, [sound[0][8 : 8 + size]])
    return struct.pack("<Q", len(header)) + header + sound[0][8 + size :]


def array_archives() -> list[bytes]:
    """Images, statistics, a permutation."""
    rng, found = np.random.default_rng(0), []
    images = rng.integers(0, 256, (5, 6, 7, 3), dtype=np.uint8)
    for save in (np.savez, np.savez_compressed):
        buffer = io.BytesIO()
        save(buffer, arr_0=images, mu=rng.standard_normal(8), sigma=np.eye(8), about=np.array('{"split": "val"}'))
        found.append(buffer.getvalue())
    buffer = io.BytesIO()
    np.savez(buffer, arr_0=np.asfortranarray(images))
    return [*found, buffer.getvalue(), permutation_file()]


def permutation_file() -> bytes:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "permutation.npz"
        save_permutation(path, Permutation(np.arange(12, dtype=np.int32)[::-1].copy(), 3, (6,)), "fingerprint")
        return path.read_bytes()


def read_arrays(path: Path) -> list[np.ndarray]:
    """Everything that is done with such files: images, statistics, what they were made from, permutations."""
    there = epath.Path(path)
    found = []
    for name in sorted(array_names(there)):
        if name == "arr_0":
            found += list(RowReader(there).batches(2))
        else:
            found.append(read_array(there, name))
    if "old_to_new" in array_names(there):
        try:
            found.append(load_permutation(there)[0].old_to_new)
        except ValueError as error:  # told as it is by its caller
            raise UserError(str(error)) from error
    return found


# Records.


def field(number: int, kind: int, content: bytes | int) -> bytes:
    """A field of a protocol buffer."""
    if isinstance(content, int):
        return varint(number << 3 | kind) + varint(content)
    return varint(number << 3 | kind) + varint(len(content)) + content


def varint(value: int) -> bytes:
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes([*found, value])


def constant(shape: tuple[int, ...], content: bytes | None = None, number: float = 0.0, name: bytes = b"name") -> bytes:
    """A node of a graph: a float32 constant of some bytes, or one number for all of it."""
    dims = b"".join(field(2, 2, field(1, 0, size)) for size in shape)
    tensor = field(1, 0, 1) + field(2, 2, dims)
    tensor += field(4, 2, content) if content is not None else field(5, 2, struct.pack("<f", number))
    value = field(1, 2, b"value") + field(2, 2, field(8, 2, tensor))
    return field(1, 2, name) + field(2, 2, b"Const") + field(5, 2, value)


def graph_of(*nodes: bytes) -> bytes:
    return b"".join(field(1, 2, node) for node in nodes)


def graph() -> list[bytes]:
    """A graph with a placeholder and two constants."""
    weights = constant((2, 3), np.arange(6, dtype="<f4").tobytes(), name=b"a/weights")
    return [
        graph_of(weights, constant((4,), number=1.5, name=b"b"), field(1, 2, b"images") + field(2, 2, b"Placeholder"))
    ]


def read_graph(path: Path) -> list[np.ndarray]:
    found = graph_def.read_constants(path)
    return [found[name] for name in sorted(found) if found[name].size < 1 << 20]


def code_records() -> list[bytes]:
    rng = np.random.default_rng(0)
    records = [codes.pack(codes.CodeRecord(rng.integers(0, 64, (2, 16)), i % 3, i), 64) for i in range(6)]
    with tempfile.TemporaryDirectory() as directory:
        path = epath.Path(directory) / "codes.array_record"
        codes.write_shard(path, records)
        return [path.read_bytes()]


def read_records(path: Path) -> list[np.ndarray]:
    directory = epath.Path(path.parent) / f"{path.name}.split"
    directory.mkdir(exist_ok=True)
    path.replace(codes.shard_path(directory, 0, 1))
    try:
        records = codes.RawRecords(directory, 64)
        return [records[i].codes for i in range(len(records))]
    finally:
        directory.rmtree()


def tfrecord_file() -> list[bytes]:
    (path,) = (GOLDEN / "tfds" / "tfrecord" / "tiny_set" / "1.0.0").glob("*train*")
    return [path.read_bytes()]


def change_tfrecord(rng: np.random.Generator, sound: list[bytes]) -> bytes:
    """A file changed as a whole, or one of whose records was changed, with its length put right."""
    if rng.random() < 0.3:
        return changed(rng, sound)
    records, place, content = [], 0, sound[0]
    while place < len(content):
        size = int.from_bytes(content[place : place + 8], "little")
        records.append(content[place + 12 : place + 12 + size])
        place += 16 + size
    victim = int(rng.integers(len(records)))
    records[victim] = changed(rng, [records[victim]])
    return b"".join(struct.pack("<QI", len(record), 0) + record + bytes(4) for record in records)


def read_tfrecord(path: Path) -> list[np.ndarray]:
    features, decoders = tfds_features()
    records = tfds_images.ParsedRecords(tfds_images.TfRecordFiles([str(path)]), features, decoders)
    source = tfds_images.TfdsSource("odd", records, 0, 8, Unreadables(len(records)))
    return [source.labels, *(source[i]["image"] for i in range(len(source)))]


@functools.cache
def tfds_features() -> tuple[Any, Any]:
    import tensorflow_datasets as tfds

    builder = tfds.core.read_only_builder.builder_from_files("tiny_set", data_dir=str(GOLDEN / "tfds" / "tfrecord"))
    return builder.info.features, {"image": tfds.decode.SkipDecoding()}


# Pillow warns of much in odd files.
warnings.filterwarnings("ignore")

FORMATS = {
    "png": Format(10_000, ".png", lambda: pictures("PNG"), change_png, read_picture),
    "jpeg": Format(10_000, ".jpg", lambda: pictures("JPEG"), changed, read_picture),
    "webp": Format(10_000, ".webp", lambda: pictures("WEBP"), changed, read_picture),
    "exif": Format(10_000, ".jpg", lambda: pictures("JPEG"), change_exif, read_picture),
    "pt": Format(5_000, ".pt", torch_files, change_weights, read_weights),
    "safetensors": Format(5_000, ".safetensors", safetensors_files, change_safetensors, read_weights),
    "npz": Format(5_000, ".npz", array_archives, change_archive, read_arrays),
    "pb": Format(5_000, ".pb", graph, changed, read_graph),
    "array_record": Format(5_000, ".array_record", code_records, changed, read_records),
    "tfrecord": Format(5_000, ".tfrecord", tfrecord_file, change_tfrecord, read_tfrecord),
}

REFUSALS = (UserError, Unreadable)
