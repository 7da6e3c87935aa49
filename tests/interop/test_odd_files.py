"""If these fail, a file that is no weights ends in a stack trace, hangs, or reads what is not its own."""

import collections
import gzip
import io
import pickle
import shutil
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from iar_jax.interop import graph_def, llamagen, state_dicts, torch_files
from iar_jax.interop.state_dicts import read_state_dict
from iar_jax.interop.torch_files import read_torch_file
from iar_jax.runtime.errors import UserError
from tests.fuzz.formats import constant, graph_of

CASES = Path(__file__).parents[1] / "cases"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no weights: it is empty; download it again"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 3\n",
            "is a Git LFS pointer .*git lfs pull",
        ),
        (b"\n <!DOCTYPE html><html><body>Sign in</body></html>", "is a web page"),
        (gzip.compress(b"weights", mtime=0), "is compressed with gzip"),
        (b"Entry not found", "it is a text; it begins: Entry not found"),
        (b"PK\x03\x04" + bytes(100), "is a zip file that was cut short"),
        (bytes(range(256)), "cannot be read as a PyTorch"),
    ],
    ids=["empty", "pointer", "page", "gzip", "text", "cut", "bytes"],
)
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors"])
def test_what_downloads_leave_is_named_for_what_it_is(tmp_path, content, message, suffix):
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_torch_file(path)


def test_files_are_told_by_their_content_and_not_by_their_names(tmp_path, golden):
    save_file({"a": np.arange(3, dtype=np.float32)}, tmp_path / "a.safetensors")
    shutil.copy(tmp_path / "a.safetensors", tmp_path / "a.pt")
    np.testing.assert_array_equal(read_torch_file(tmp_path / "a.pt")["a"], [0, 1, 2])
    shutil.copy(golden("gpt_tiny.pt"), tmp_path / "b.safetensors")
    assert read_torch_file(tmp_path / "b.safetensors").keys() == read_torch_file(golden("gpt_tiny.pt")).keys()


def test_lists_that_hold_each_other_many_times_over_are_refused_at_once():
    started = time.monotonic()
    with pytest.raises(UserError, match="refused: the file's containers have more than"):
        read_torch_file(CASES / "laughs.pt")
    assert time.monotonic() - started < 5


class Call:
    """Pickled as a call of one of the globals that are allowed, with a state."""

    def __init__(self, function, arguments, state=None):
        self.function, self.arguments, self.state = function, arguments, state

    def __reduce__(self):
        return self.function, self.arguments, *([self.state] if self.state is not None else [])


def archive(tmp_path, pickled, storages, **more):
    path = tmp_path / "weights.pt"
    with zipfile.ZipFile(path, "w", **more) as file:
        file.writestr("archive/data.pkl", pickled)
        for name, content in storages.items():
            file.writestr(f"archive/data/{name}", content)
    return path


class Pickler(pickle.Pickler):
    """Writes storages as PyTorch does, by what they are called."""

    def persistent_id(self, value):
        return value.arguments if isinstance(value, Call) and value.function is None else None


def tensor(offset, shape, strides, size=8, state=None):
    """A tensor of float32 in storage 0, as a pickle of PyTorch's."""
    from torch_names import FloatStorage, _rebuild_tensor_v2

    storage = Call(None, ("storage", FloatStorage, "0", "cpu", size))
    return Call(_rebuild_tensor_v2, (storage, offset, shape, strides, False, collections.OrderedDict()), state)


@pytest.fixture
def torch_names(monkeypatch):
    """Functions and classes that pickle under PyTorch's names."""
    import sys
    import types

    module = types.ModuleType("torch_names")
    for place, name in (("torch._utils", "_rebuild_tensor_v2"), ("torch", "FloatStorage")):
        stand_in = type(name, (), {"__module__": place, "__qualname__": name})
        owner = sys.modules.get(place) or types.ModuleType(place)
        monkeypatch.setitem(sys.modules, place, owner)
        monkeypatch.setattr(owner, name, stand_in, raising=False)
        setattr(module, name, stand_in)
    monkeypatch.setitem(sys.modules, "torch_names", module)
    if not hasattr(sys.modules["torch"], "__path__"):
        monkeypatch.setattr(sys.modules["torch"], "__path__", [], raising=False)


def pickled(value):
    buffer = io.BytesIO()
    Pickler(buffer, 2).dump(value)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("offset", "shape", "strides", "message"),
    [
        (0, (9,), (1,), "reaches beyond its storage"),
        (7, (2,), (1,), "reaches beyond its storage"),
        (0, (2, 2), (6, 1), None),
        (0, (2, 2), (7, 2), "reaches beyond its storage"),
        (0, (1 << 40,), (0,), "reaches beyond its storage"),
        (-1, (2,), (1,), "a size, stride or offset that is none"),
        (0, (2,), (-1,), "a size, stride or offset that is none"),
        (0, (2, 2), (1,), "a size, stride or offset that is none"),
        (0, (0, 1 << 60), (1, 1), None),
    ],
)
def test_a_tensor_takes_nothing_beyond_its_storage(tmp_path, torch_names, offset, shape, strides, message):
    path = archive(tmp_path, pickled({"a": tensor(offset, shape, strides)}), {"0": np.arange(8, dtype="<f4").tobytes()})
    if message is None:
        assert read_torch_file(path)["a"].shape == shape
        return
    with pytest.raises(UserError, match=message):
        read_torch_file(path)


def test_the_state_of_a_tensor_that_was_looked_at_is_changed_by_nothing(tmp_path, torch_names):
    changed = pickled({"a": tensor(0, (2,), (1,), state={"shape": (1 << 30,)})})
    path = archive(tmp_path, changed, {"0": np.arange(8, dtype="<f4").tobytes()})
    with pytest.raises(UserError, match="refused: the file's pickle changes the state of a _View"):
        read_torch_file(path)


def test_a_storage_class_is_the_same_for_every_file(tmp_path, torch_names):
    from torch_names import FloatStorage

    # GLOBAL torch FloatStorage, a state, BUILD.
    program = b"\x80\x02ctorch\nFloatStorage\n}X\x05\x00\x00\x00dtypeX\x02\x00\x00\x00f8sb."
    with pytest.raises(UserError, match="changes the state of a _StorageType"):
        read_torch_file(archive(tmp_path, program, {}))
    assert torch_files.ALLOWED_GLOBALS["torch", "FloatStorage"].dtype == np.float32
    assert FloatStorage.__module__ == "torch"


def test_storages_of_another_size_and_compressed_ones_are_refused(tmp_path, torch_names):
    whole = pickled({"a": tensor(0, (2,), (1,))})
    for content in (bytes(31), bytes(33), bytes(1 << 20)):
        with pytest.raises(UserError, match="bytes where 32 are needed"):
            read_torch_file(archive(tmp_path, whole, {"0": content}))
    with pytest.raises(UserError, match="is compressed"):
        read_torch_file(archive(tmp_path, whole, {"0": bytes(32)}, compression=zipfile.ZIP_DEFLATED))
    with pytest.raises(UserError, match=r"archive/data/0 is missing"):
        read_torch_file(archive(tmp_path, whole, {}))


def test_entries_that_are_not_finite_are_refused_by_the_tensors_name(tmp_path, golden):
    weights = read_state_dict(golden("gpt_tiny.pt"), llamagen.TRANSFORMER_KEYS)
    damaged = {name: np.array(value) for name, value in weights.items() if name not in state_dicts.BUFFERS}
    damaged["layers.0.attention.wqkv.weight"].flat[5] = np.nan
    damaged["norm.weight"].flat[0] = np.inf
    save_file(damaged, tmp_path / "nan.safetensors")
    with pytest.raises(UserError, match=r"not finite: (layers.0.attention.wqkv|norm).weight \(1 of .*\), "):
        read_state_dict(tmp_path / "nan.safetensors", llamagen.TRANSFORMER_KEYS)


def test_a_text_to_image_model_is_named_as_one(tmp_path):
    weights = {"cls_embedding.cap_proj.fc1.weight": (2, 2), "tok_embeddings.weight": (4, 2)}
    save_file({name: np.zeros(shape, np.float32) for name, shape in weights.items()}, tmp_path / "t2i.safetensors")
    with pytest.raises(UserError, match="it is LlamaGen's text-to-image model, not read here"):
        llamagen.load_transformer(tmp_path / "t2i.safetensors", num_heads=2, grid_size=2)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (graph_of(constant((2, 3), bytes(20))), "cannot reshape"),
        (graph_of(constant((2**63,), number=1.0)), "is not a TensorFlow graph, or is damaged"),
        (graph_of(constant((1,) * 100, number=1.0)), "is not a TensorFlow graph, or is damaged"),
        (graph_of(constant((2, 3), bytes(24)))[:-9], "ends in the middle"),
        (b"\xff" * 30, "integer of more than 64 bits"),
        (b"<html>Not found</html>", "it is a web page"),
        (b"", "it is empty"),
    ],
)
def test_graphs_that_are_none_are_refused_in_a_line(tmp_path, content, message):
    (tmp_path / "graph.pb").write_bytes(content)
    with pytest.raises(UserError, match=message):
        graph_def.read_constants(tmp_path / "graph.pb")


def test_a_number_that_stands_for_a_large_tensor_takes_no_memory(tmp_path):
    (tmp_path / "graph.pb").write_bytes(graph_of(constant((1 << 20, 1 << 20), number=1.5)))
    found = graph_def.read_constants(tmp_path / "graph.pb")["name"]
    assert found.shape == (1 << 20, 1 << 20)
    assert found[5, 7] == 1.5
