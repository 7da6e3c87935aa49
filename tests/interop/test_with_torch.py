"""If these fail, files that PyTorch itself wrote are read wrongly, or ours cannot be loaded by it."""

import argparse

import jax
import numpy as np
import pytest

from iar_jax.interop import llamagen
from iar_jax.interop.torch_files import read_torch_file

torch = pytest.importorskip("torch", reason="needs PyTorch: tests/run.sh --with-torch")


@pytest.mark.parametrize("legacy", [False, True])
def test_every_dtype_and_view_that_torch_saves_is_read(tmp_path, legacy):
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    content = {
        "model": {
            "plain": base,
            "turned": base.t(),
            "part": base[1:3, ::2],
            "scalar": torch.tensor(2.5),
            "empty": torch.zeros(0, 3),
            "half": base.half(),
            "bfloat16": (base / 7).bfloat16(),
            "long": torch.arange(5),
            "bytes": torch.arange(5, dtype=torch.uint8),
            "bool": torch.tensor([True, False]),
            "parameter": torch.nn.Parameter(base),
        },
        "optimizer": {"state": {0: {"step": 3, "exp_avg": base}}, "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.95)}]},
        "args": argparse.Namespace(gpt_model="GPT-B"),
    }
    torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=not legacy)
    found = read_torch_file(tmp_path / "a.pt")
    for name, value in content["model"].items():
        expected = value.detach().float().numpy() if name == "bfloat16" else value.detach().numpy()
        np.testing.assert_array_equal(found["model"][name].astype(expected.dtype), expected, err_msg=name)
    assert found["optimizer"]["param_groups"][0]["betas"] == (0.9, 0.95)
    assert found["args"] == {"gpt_model": "GPT-B"}


def test_a_whole_module_is_refused_by_name(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pt")
    with pytest.raises(Exception, match=r"refused: the file's pickle asks for torch\.nn\.modules\.linear\.Linear"):
        read_torch_file(tmp_path / "module.pt")


@pytest.mark.parametrize("kind", ["transformer", "tokenizer"])
def test_written_files_load_in_torch_and_come_back_bit_for_bit(tmp_path, golden, kind):
    name = {"transformer": "gpt_tiny.pt", "tokenizer": "vq_tiny.pt"}[kind]
    original = torch.load(golden(name), weights_only=True)["model"]
    path = tmp_path / "out.pt"
    if kind == "transformer":
        _, params = llamagen.load_transformer(golden(name), num_heads=4, grid_size=4)
        llamagen.save_transformer(params, path)
        _, again = llamagen.load_transformer(path, num_heads=4, grid_size=4)
    else:
        _, params = llamagen.load_tokenizer(golden(name))
        llamagen.save_tokenizer(params, path)
        _, again = llamagen.load_tokenizer(path)
    written = torch.load(path, weights_only=True)["model"]
    assert written.keys() == original.keys()
    for key, value in original.items():
        assert torch.equal(written[key], value), key
    jax.tree.map(np.testing.assert_array_equal, again, params)
