"""PyTorch weight files as arrays, without PyTorch and without running what they hold.

`.pt`/`.pth` files are pickles. The unpickler here knows tensors, containers, numbers and `argparse.Namespace` (which
LlamaGen's trainers save, read as a plain dict) and refuses every other global by its name.
"""

import collections
import io
import math
import os
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import ml_dtypes
import numpy as np
from etils import epath

from iar_jax.runtime.errors import UserError, brief
from iar_jax.runtime.files import leftover, writing

# Names of PyTorch's storage classes, and of dtypes, to numpy.
STORAGE_DTYPES = {
    "FloatStorage": np.dtype(np.float32),
    "DoubleStorage": np.dtype(np.float64),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001

# Of a file's pickles: tens of thousands of tensors take less. Containers inside each other, and entries in all of them.
MOST_PICKLE_BYTES, DEEPEST, MOST_ENTRIES = 1 << 26, 100, 1 << 22


def read_torch_file(path: str | Path) -> Any:
    """The object saved in a .pt, .pth or .safetensors file, told by its first bytes, with tensors as numpy arrays.

    Raises:
        UserError: no such file, not such a file, truncated, or a pickle that asks for anything but data.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        kind = kind_of(path)
        if kind == "safetensors":
            from safetensors.numpy import load_file

            return load_file(path)
        if kind == "zip":
            return _read_zip(path)
        return _read_legacy(path)
    except UserError:
        raise
    except Exception as error:  # whatever a damaged file makes zipfile, pickle, numpy or safetensors raise
        raise UserError(f"{path} cannot be read as a PyTorch or safetensors file: {brief(error)}") from error


def kind_of(path: Path) -> str:
    """ "safetensors", "zip" or "legacy", whatever the file's name says.

    Raises:
        UserError: something else that downloads leave under the names of weights, by what it is.
    """
    with path.open("rb") as file:
        head = file.read(512)
    size = path.stat().st_size
    if len(head) > 8 and int.from_bytes(head[:8], "little") <= size - 8 and head[8:].lstrip().startswith(b"{"):
        return "safetensors"
    if problem := leftover(head):
        raise UserError(f"{path} holds no weights: it {problem}")
    if zipfile.is_zipfile(path):
        return "zip"
    if head.startswith(b"PK"):
        raise UserError(f"{path} is a zip file that was cut short ({size:,} bytes); download it again")
    return "legacy"


def named_tensor(weights: Any, name: str, shape: tuple[int, ...], source: str) -> np.ndarray:
    """A tensor of what a file holds, float32; raises UserError where it is missing, has another shape, or has entries
    that are not finite."""
    if not isinstance(weights, Mapping) or name not in weights:
        raise UserError(f"{source}: the tensor {name} is missing")
    if weights[name].shape != shape:
        raise UserError(f"{source}: {name} has shape {weights[name].shape}; it should be {shape}")
    found = weights[name].astype(np.float32)
    check_finite({name: found}, source)
    return found


def check_finite(weights: Mapping[str, np.ndarray], source: str | Path) -> None:
    """Raises UserError where tensors have entries that are no numbers, or infinite; names them."""
    bad = [
        f"{name} ({count:,} of {value.size:,})"
        for name, value in weights.items()
        if np.issubdtype(value.dtype, np.floating) or value.dtype == ml_dtypes.bfloat16
        if (count := int(value.size - np.isfinite(value.astype(np.float32)).sum()))
    ]
    if bad:
        raise UserError(f"{source}: entries of these tensors are not finite: {', '.join(bad[:5])}; the file is damaged")


class _StorageType(NamedTuple):
    """Stands for PyTorch's storage class of one dtype."""

    dtype: np.dtype


class _Storage(NamedTuple):
    """Numbers that tensors are views of; those of the legacy format are read after the pickle, into the same array."""

    array: np.ndarray


class _View(NamedTuple):
    """A tensor until all storages have been read."""

    flat: np.ndarray
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def array(self) -> np.ndarray:
        """The numbers. What they are taken from is looked at here, where they are taken."""
        sizes = (*self.shape, *self.strides, self.offset)
        if not all(isinstance(size, int) and size >= 0 for size in sizes) or len(self.shape) != len(self.strides):
            raise UserError("a tensor in the file has a size, stride or offset that is none")
        last = self.offset + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        count = math.prod(self.shape)
        if count and (last >= self.flat.size or count > self.flat.size):
            raise UserError("a tensor in the file reaches beyond its storage")
        if not count:
            return np.zeros(self.shape, self.flat.dtype)
        item = self.flat.itemsize
        strides = [stride * item for stride in self.strides]
        return np.array(np.lib.stride_tricks.as_strided(self.flat[self.offset :], self.shape, strides))


class _Namespace(dict):
    """argparse.Namespace, read as a dict."""


def _rebuild_tensor(storage, offset, shape, strides, *_ignored):
    if not isinstance(storage, _Storage):
        raise UserError("a tensor in the file has no storage")
    return _View(storage.array, offset, tuple(shape), tuple(strides))


def _rebuild_parameter(view, *_ignored):
    return view


ALLOWED_GLOBALS = {
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("argparse", "Namespace"): _Namespace,
    ("torch", "Size"): tuple,
    ("builtins", "set"): set,
    ("__builtin__", "set"): set,
    **{("torch", name): _StorageType(dtype) for name, dtype in STORAGE_DTYPES.items()},
}


class _Unpickler(pickle._Unpickler):  # Python's own, whose every operation can be changed
    def __init__(self, file, load_storage):
        super().__init__(file, encoding="utf-8")
        self._load_storage = load_storage

    def find_class(self, module, name):
        try:
            return ALLOWED_GLOBALS[(module, name)]
        except KeyError:
            raise UserError(f"refused: the file's pickle asks for {module}.{name}, which is not data") from None

    def persistent_load(self, pid):
        if not isinstance(pid, tuple) or len(pid) < 2 or pid[0] != "storage" or not isinstance(pid[1], _StorageType):
            raise UserError(f"refused: the file's pickle asks for an unknown kind of object, {pid!r:.80}")
        return self._load_storage(pid[1].dtype, *pid[2:])

    def load_build(self):
        """State is taken by nothing but a Namespace; the attributes that PyTorch gives its dicts are left out."""
        state, target = self.stack.pop(), self.stack[-1]
        if type(target) is _Namespace and isinstance(state, dict):
            target.update(state)
        elif type(target) is not collections.OrderedDict:
            raise UserError(f"refused: the file's pickle changes the state of a {type(target).__name__}")

    dispatch: ClassVar[dict[int, Any]] = {**pickle._Unpickler.dispatch, pickle.BUILD[0]: load_build}


class _Contents:
    """Containers of a pickle with every tensor an array: each is visited once, and a tensor copied once. What holds the
    same containers many times over is refused, for whoever reads it would visit each of them."""

    def __init__(self):
        self.seen: dict[int, Any] = {}
        self.sizes: dict[int, int] = {}
        self.kept: list[Any] = []  # so that no other object gets the number of one that was seen

    def arrays(self, value: Any, depth: int = 0) -> Any:
        if not isinstance(value, (_View, dict, list, tuple, set)):
            return value
        if id(value) in self.seen:
            return self.seen[id(value)]
        if depth > DEEPEST:
            raise UserError(f"refused: containers lie in each other more than {DEEPEST} deep, or hold themselves")
        self.kept.append(value)
        if isinstance(value, _View):
            found: Any = value.array()
        else:
            if isinstance(value, dict):
                found = {key: self.arrays(item, depth + 1) for key, item in value.items()}
            else:
                kind = {tuple: tuple, set: set}.get(type(value), list)
                found = kind(self.arrays(item, depth + 1) for item in value)
            items = value.values() if isinstance(value, dict) else value
            self.sizes[id(value)] = size = 1 + sum(self.sizes.get(id(item), 1) for item in items)
            if size > MOST_ENTRIES:
                raise UserError(f"refused: the file's containers have more than {MOST_ENTRIES:,} entries")
        self.seen[id(value)] = found
        return found


def _read_zip(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive:
        infos = {info.filename: info for info in archive.infolist()}
        pickles = [name for name in infos if name.endswith("/data.pkl") or name == "data.pkl"]
        if len(pickles) != 1:
            raise UserError(f"{path} is a zip file but not one of PyTorch's (no data.pkl in it)")
        prefix = pickles[0][: -len("data.pkl")]

        def member(name: str, size: int, exact: bool = False) -> bytes:
            info = infos.get(name)
            if info is None:
                raise UserError(f"{path}: {name} is missing in it; download it again")
            if info.file_size > size or (exact and info.file_size < size):
                raise UserError(f"{path}: {name} has {info.file_size:,} bytes where {size:,} are needed")
            if info.compress_type != zipfile.ZIP_STORED:
                raise UserError(f"{path}: {name} is compressed, which PyTorch does not do")
            return archive.read(info)

        order = "little"
        if prefix + "byteorder" in infos:
            order = member(prefix + "byteorder", 16).decode().strip()
        storages: dict[str, _Storage] = {}

        def load_storage(dtype, key, _location, size, *_rest):
            if key not in storages:
                data = member(f"{prefix}data/{key}", int(size) * dtype.itemsize, exact=True)
                array = np.frombuffer(data, dtype, count=size)
                storages[key] = _Storage(array if order == "little" else array.byteswap())
            if storages[key].array.dtype != dtype:
                raise UserError(f"{path}: storage {key} is of two kinds")
            return storages[key]

        content = member(pickles[0], MOST_PICKLE_BYTES)
        return _Contents().arrays(_Unpickler(io.BytesIO(content), load_storage).load())


def _read_legacy(path: Path) -> Any:
    size_of_file = path.stat().st_size
    with open(path, "rb") as file:

        def plain(what):
            try:
                return _Contents().arrays(_Unpickler(_Bounded(file), lambda *_: None).load())
            except (
                pickle.UnpicklingError,
                EOFError,
                KeyError,
                IndexError,
                AttributeError,
                ValueError,
                TypeError,
            ) as error:
                raise UserError(f"{path} cannot be read as a PyTorch file ({what}: {brief(error)})") from error

        if plain("header") != LEGACY_MAGIC or plain("protocol") != LEGACY_PROTOCOL:
            raise UserError(f"{path} is not a PyTorch file: it does not begin as one")
        info = plain("system info")
        storages: dict[str, _Storage] = {}

        def load_storage(dtype, key, _location, size, view=None):
            if view is not None:
                raise UserError(f"{path}: storage views of very old PyTorch files are not supported; save it again")
            taken = sum(storage.array.nbytes for storage in storages.values())
            if not isinstance(size, int) or size < 0 or taken + size * dtype.itemsize > size_of_file:
                raise UserError(f"{path}: its storages are larger than the file; download it again")
            return storages.setdefault(key, _Storage(np.zeros(size, dtype)))

        value = _Unpickler(_Bounded(file), load_storage).load()
        little = not isinstance(info, dict) or info.get("little_endian", True)
        for key in plain("storage keys"):
            (size,) = np.frombuffer(file.read(8), "<i8" if little else ">i8")
            array = storages[key].array
            if size != array.size:
                raise UserError(f"{path}: storage {key} has {size} elements, not the {array.size} of its header")
            data = np.frombuffer(file.read(array.nbytes), array.dtype, count=size)
            array[:] = data if little else data.byteswap()
        return _Contents().arrays(value)


class _Bounded:
    """A file whose reads are bounded, and end where the file ends: a pickle may ask for any number of bytes."""

    def __init__(self, file):
        self.file, self.readline = file, file.readline
        self.left = MOST_PICKLE_BYTES

    def read(self, size: int = -1) -> bytes:
        self.left -= size
        if size < 0 or self.left < 0:
            raise UserError(f"refused: a pickle of more than {MOST_PICKLE_BYTES:,} bytes")
        return self.file.read(size)

    def readinto(self, buffer) -> int:
        return self.file.readinto(buffer)


def write_torch_file(
    weights: dict[str, np.ndarray], path: os.PathLike[str] | str, key: str = "model", **beside: Any
) -> None:
    """Writes weights to .safetensors, or to .pt as {key: weights, **beside} where PyTorch is installed.

    The file appears under its name when it is whole.

    Raises:
        UserError: another suffix, or .pt without PyTorch.
    """
    target = epath.Path(path).expanduser()
    if target.suffix == ".safetensors":
        from safetensors.numpy import save_file

        with writing(target) as local:
            save_file(weights, local)
    elif target.suffix in (".pt", ".pth"):
        try:
            import torch
        except ImportError:
            raise UserError(
                f"writing {target.name} needs PyTorch (pip install 'iar_jax[torch]'); "
                f"{target.with_suffix('.safetensors').name} can be written without"
            ) from None
        with writing(target) as local:
            torch.save(
                {key: {name: torch.from_numpy(value.copy()) for name, value in weights.items()}, **beside}, local
            )
    else:
        raise UserError(f"{path}: weights are written to .safetensors or .pt")
