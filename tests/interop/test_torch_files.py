"""If these fail, a weight file can run code, or is read wrongly."""

import argparse
import collections
import io
import os
import pickle
import zipfile

import numpy as np
import pytest

from iar_jax.interop.torch_files import read_torch_file, write_torch_file
from iar_jax.runtime.errors import UserError


def zip_file(path, pickled, storages=()):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/data.pkl", pickled)
        archive.writestr("model/byteorder", "little")
        for key, data in storages:
            archive.writestr(f"model/data/{key}", data)


class Call:
    """Pickles as a call of a function by name."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def touch(path):
    return Call(os.system, f"touch {path}")


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: {"model": {"w": x}}, lambda x: [collections.OrderedDict(a=x)]])
def test_a_malicious_pickle_is_refused_by_name_and_not_run(tmp_path, wrap):
    victim = tmp_path / "victim"
    content = pickle.dumps(wrap(touch(victim)), protocol=2)
    zip_file(tmp_path / "evil.pt", content)
    with pytest.raises(UserError, match=r"refused: the file's pickle asks for (posix|nt)\.system"):
        read_torch_file(tmp_path / "evil.pt")
    (tmp_path / "legacy.pth").write_bytes(content)
    with pytest.raises(UserError, match="refused"):
        read_torch_file(tmp_path / "legacy.pth")
    assert not victim.exists()


@pytest.mark.parametrize("function", [eval, exec, __import__, getattr, open, bytearray])
def test_builtins_are_refused(tmp_path, function):
    zip_file(tmp_path / "evil.pt", pickle.dumps(Call(function, "1"), protocol=2))
    with pytest.raises(UserError, match="refused"):
        read_torch_file(tmp_path / "evil.pt")


def test_the_arguments_that_llamagens_trainers_save_are_plain_data(tmp_path):
    content = {"args": argparse.Namespace(lr=1e-4, name="B"), "steps": 7, "sizes": {1, 2}, "none": None}
    zip_file(tmp_path / "a.pt", pickle.dumps(content, protocol=2))
    found = read_torch_file(tmp_path / "a.pt")
    assert found == {"args": {"lr": 1e-4, "name": "B"}, "steps": 7, "sizes": {1, 2}, "none": None}


class Storage:
    """Stands for a storage when a test writes a file as PyTorch does."""

    def __init__(self, kind, key, size):
        self.pid = ("storage", kind, key, "cpu", size)


class Tensor:
    def __init__(self, storage, offset, shape, strides):
        self.state = (storage, offset, shape, strides, False, collections.OrderedDict())


class Global:
    """Pickles as a reference to module.name, which need not exist here."""

    def __init__(self, module, name):
        self.text = f"c{module}\n{name}\n".encode()


def write_pickle(value):
    """A protocol-2 pickle with PyTorch's globals and persistent ids, written by hand."""
    out = io.BytesIO()
    out.write(b"\x80\x02")

    def put(item):
        if isinstance(item, Tensor):
            out.write(b"ctorch._utils\n_rebuild_tensor_v2\n")
            put(item.state)
            out.write(b"R")
        elif isinstance(item, Storage):
            put(item.pid)
            out.write(b"Q")
        elif isinstance(item, Global):
            out.write(item.text)
        elif isinstance(item, collections.OrderedDict):
            out.write(b"ccollections\nOrderedDict\n)R")
        elif isinstance(item, dict):
            out.write(b"}(")
            for key, inner in item.items():
                put(key)
                put(inner)
            out.write(b"u")
        elif isinstance(item, tuple):
            out.write(b"(")
            for inner in item:
                put(inner)
            out.write(b"t")
        else:
            out.write(pickle.dumps(item, protocol=2)[2:-1])

    put(value)
    out.write(b".")
    return out.getvalue()


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("FloatStorage", "f4"), ("HalfStorage", "f2"), ("LongStorage", "i8"), ("IntStorage", "i4"), ("ByteStorage", "u1")],
)
def test_views_with_offsets_and_strides_are_read(tmp_path, kind, dtype):
    data = np.arange(12).astype(dtype)
    storage = Storage(Global("torch", kind), "0", 12)
    content = {"whole": Tensor(storage, 0, (3, 4), (4, 1)), "turned": Tensor(storage, 2, (2, 3), (1, 4))}
    zip_file(tmp_path / "a.pt", write_pickle(content), [("0", data.tobytes())])
    found = read_torch_file(tmp_path / "a.pt")
    np.testing.assert_array_equal(found["whole"], data.reshape(3, 4))
    np.testing.assert_array_equal(found["turned"], data.reshape(3, 4)[:, 2:].T)
    assert found["whole"].dtype == np.dtype(dtype)


def test_bfloat16_is_read_exactly(tmp_path):
    bits = np.array([0x3F80, 0xC000, 0x3F01], np.uint16)  # 1, -2, 0.50390625
    storage = Storage(Global("torch", "BFloat16Storage"), "0", 3)
    zip_file(tmp_path / "a.pt", write_pickle({"w": Tensor(storage, 0, (3,), (1,))}), [("0", bits.tobytes())])
    np.testing.assert_array_equal(read_torch_file(tmp_path / "a.pt")["w"].astype("f4"), [1, -2, 0.50390625])


def test_the_legacy_format_is_read(tmp_path):
    data = np.arange(6, dtype=np.float32)

    def legacy_storage(item):
        return ("storage", item.pid[1], item.pid[2], "cpu", item.pid[4], None)

    storage = Storage(Global("torch", "FloatStorage"), "17", 6)
    storage.pid = legacy_storage(storage)
    parts = [pickle.dumps(x, protocol=2) for x in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
    parts += [write_pickle({"w": Tensor(storage, 0, (2, 3), (3, 1))}), pickle.dumps(["17"], protocol=2)]
    parts += [np.int64(6).tobytes(), data.tobytes()]
    (tmp_path / "a.pth").write_bytes(b"".join(parts))
    np.testing.assert_array_equal(read_torch_file(tmp_path / "a.pth")["w"], data.reshape(2, 3))
    (tmp_path / "cut.pth").write_bytes(b"".join(parts)[:-4])
    with pytest.raises(UserError, match=r"cut\.pth"):
        read_torch_file(tmp_path / "cut.pth")


@pytest.mark.parametrize(
    ("offset", "shape", "strides"), [(0, (4, 4), (4, 1)), (9, (4,), (1,)), (-1, (2,), (1,)), (0, (3,), (-1,))]
)
def test_tensors_outside_their_storage_are_refused(tmp_path, offset, shape, strides):
    storage = Storage(Global("torch", "FloatStorage"), "0", 12)
    content = {"w": Tensor(storage, offset, shape, strides)}
    zip_file(tmp_path / "a.pt", write_pickle(content), [("0", bytes(48))])
    with pytest.raises(UserError, match="a tensor in the file"):
        read_torch_file(tmp_path / "a.pt")


def test_damaged_and_foreign_files_are_refused_by_name(tmp_path, golden):
    with pytest.raises(UserError, match=r"nowhere\.pt: no such file"):
        read_torch_file(tmp_path / "nowhere.pt")
    with open(golden("gpt_tiny.pt"), "rb") as file:
        whole = file.read()
    for name, content in (("cut.pt", whole[: len(whole) // 2]), ("text.pt", b"hello"), ("empty.pt", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=name):
            read_torch_file(tmp_path / name)
    with zipfile.ZipFile(tmp_path / "other.pt", "w") as archive:
        archive.writestr("a.txt", "hello")
    with pytest.raises(UserError, match="not one of PyTorch's"):
        read_torch_file(tmp_path / "other.pt")


def test_safetensors_round_trip_and_other_suffixes_are_refused(tmp_path):
    weights = {"a": np.arange(6, dtype=np.float32).reshape(2, 3)}
    write_torch_file(weights, tmp_path / "a.safetensors")
    np.testing.assert_array_equal(read_torch_file(tmp_path / "a.safetensors")["a"], weights["a"])
    with pytest.raises(UserError, match=r"written to \.safetensors or \.pt"):
        write_torch_file(weights, tmp_path / "a.bin")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors"]
