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
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath

from iar_jax.runtime.errors import UserError
from iar_jax.runtime.files import writing

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


def read_torch_file(path: str | Path) -> Any:
    """The object saved in a .pt, .pth or .safetensors file, with tensors as numpy arrays.

    Raises:
        UserError: no such file, not such a file, truncated, or a pickle that asks for anything but data.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.numpy import load_file

            return load_file(path)
        if zipfile.is_zipfile(path):
            return _read_zip(path)
        return _read_legacy(path)
    except UserError:
        raise
    except Exception as error:  # whatever a damaged file makes zipfile, pickle, numpy or safetensors raise
        raise UserError(f"{path} cannot be read as a PyTorch or safetensors file: {error}") from error


def named_tensor(weights: Any, name: str, shape: tuple[int, ...], source: str) -> np.ndarray:
    """A tensor of what a file holds, float32; raises UserError where it is missing or has another shape."""
    if not isinstance(weights, Mapping) or name not in weights:
        raise UserError(f"{source}: the tensor {name} is missing")
    if weights[name].shape != shape:
        raise UserError(f"{source}: {name} has shape {weights[name].shape}; it should be {shape}")
    return weights[name].astype(np.float32)


class _StorageType:
    """Stands for PyTorch's storage class of one dtype."""

    def __init__(self, dtype: np.dtype):
        self.dtype = dtype


class _LegacyStorage:
    """A storage of the legacy format, whose bytes follow the pickle."""

    def __init__(self, dtype: np.dtype, size: int):
        self.dtype, self.size = dtype, size
        self.array = np.zeros(size, dtype)


def _rebuild_tensor(storage, offset, shape, strides, *_ignored):
    flat = storage.array if isinstance(storage, _LegacyStorage) else storage
    shape, strides = tuple(shape), tuple(strides)
    if any(s < 0 for s in (*shape, *strides, offset)):
        raise UserError("a tensor in the file has a negative size, stride or offset")
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if math.prod(shape) and last >= flat.size:
        raise UserError("a tensor in the file reaches beyond its storage")
    return _View(flat, offset, shape, strides)


class _View:
    """A tensor until all storages have been read."""

    def __init__(self, flat, offset, shape, strides):
        self.flat, self.offset, self.shape, self.strides = flat, offset, shape, strides

    def array(self) -> np.ndarray:
        item = self.flat.itemsize
        view = np.lib.stride_tricks.as_strided(
            self.flat[self.offset :], self.shape, [stride * item for stride in self.strides]
        )
        return np.array(view)


def _rebuild_parameter(view, *_ignored):
    return view


class _Namespace(dict):
    """argparse.Namespace, read as a dict."""

    def __setstate__(self, state):
        self.update(state)


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


class _Unpickler(pickle.Unpickler):
    def __init__(self, file, load_storage):
        super().__init__(file, encoding="utf-8")
        self._load_storage = load_storage

    def find_class(self, module, name):
        try:
            return ALLOWED_GLOBALS[(module, name)]
        except KeyError:
            raise UserError(f"refused: the file's pickle asks for {module}.{name}, which is not data") from None

    def persistent_load(self, pid):
        if not isinstance(pid, tuple) or pid[0] != "storage" or not isinstance(pid[1], _StorageType):
            raise UserError(f"refused: the file's pickle asks for an unknown kind of object, {pid!r:.80}")
        return self._load_storage(pid[1].dtype, *pid[2:])


def _arrays(value: Any) -> Any:
    """The same containers with every tensor an array."""
    if isinstance(value, _View):
        return value.array()
    if isinstance(value, dict):
        return {key: _arrays(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return type(value)(_arrays(item) for item in value)
    return value


def _read_zip(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive:
        names = set(archive.namelist())
        pickles = [name for name in names if name.endswith("/data.pkl") or name == "data.pkl"]
        if len(pickles) != 1:
            raise UserError(f"{path} is a zip file but not one of PyTorch's (no data.pkl in it)")
        prefix = pickles[0][: -len("data.pkl")]
        order = "little"
        if prefix + "byteorder" in names:
            order = archive.read(prefix + "byteorder").decode().strip()
        storages: dict[str, np.ndarray] = {}

        def load_storage(dtype, key, _location, size, *_rest):
            if key not in storages:
                data = archive.read(f"{prefix}data/{key}")
                array = np.frombuffer(data, dtype, count=size)
                storages[key] = array if order == "little" else array.byteswap()
            return storages[key]

        return _arrays(_Unpickler(io.BytesIO(archive.read(pickles[0])), load_storage).load())


def _read_legacy(path: Path) -> Any:
    with open(path, "rb") as file:

        def plain(what):
            try:
                return _Unpickler(file, lambda *_: None).load()
            except pickle.UnpicklingError as error:
                raise UserError(f"{path} cannot be read as a PyTorch file ({what}: {error})") from error

        if plain("header") != LEGACY_MAGIC or plain("protocol") != LEGACY_PROTOCOL:
            raise UserError(f"{path} is not a PyTorch file: it does not begin as one")
        info = plain("system info")
        storages: dict[str, _LegacyStorage] = {}

        def load_storage(dtype, key, _location, size, view=None):
            if view is not None:
                raise UserError(f"{path}: storage views of very old PyTorch files are not supported; save it again")
            return storages.setdefault(key, _LegacyStorage(dtype, size))

        value = _Unpickler(file, load_storage).load()
        little = info.get("little_endian", True)
        for key in plain("storage keys"):
            (size,) = np.frombuffer(file.read(8), "<i8" if little else ">i8")
            storage = storages[key]
            if size != storage.size:
                raise UserError(f"{path}: storage {key} has {size} elements, not the {storage.size} of its header")
            data = np.frombuffer(file.read(size * storage.dtype.itemsize), storage.dtype, count=size)
            storage.array[:] = data if little else data.byteswap()
        return _arrays(value)


def write_torch_file(weights: dict[str, np.ndarray], path: os.PathLike[str] | str) -> None:
    """Writes weights to .safetensors, or to .pt as {"model": weights} where PyTorch is installed.

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
            torch.save({"model": {name: torch.from_numpy(value.copy()) for name, value in weights.items()}}, local)
    else:
        raise UserError(f"{path}: weights are written to .safetensors or .pt")
