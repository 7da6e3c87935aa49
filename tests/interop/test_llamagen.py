"""If these fail, weights go in and out as almost the same model."""

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from iar_jax.interop import llamagen
from iar_jax.interop.torch_files import read_torch_file
from iar_jax.models.rope import rope_table
from iar_jax.runtime.errors import UserError


@pytest.fixture(scope="module")
def transformer_weights(golden):
    return read_torch_file(golden("gpt_tiny.pt"))["model"]


@pytest.fixture(scope="module")
def tokenizer_weights(golden):
    return read_torch_file(golden("vq_tiny.pt"))["model"]


def load(path, **changes):
    return llamagen.load_transformer(path, **{"num_heads": 4, "grid_size": 4, **changes})


def test_a_transformer_goes_in_and_out_bit_for_bit(tmp_path, golden, transformer_weights):
    _, params = load(golden("gpt_tiny.pt"))
    llamagen.save_transformer(params, tmp_path / "out.safetensors")
    written = read_torch_file(tmp_path / "out.safetensors")
    assert written.keys() == transformer_weights.keys()
    for name, value in transformer_weights.items():
        np.testing.assert_array_equal(written[name], value, err_msg=name)
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path / "out.safetensors")[1], params)


def test_a_tokenizer_goes_in_and_out_bit_for_bit(tmp_path, golden, tokenizer_weights):
    module, params = llamagen.load_tokenizer(golden("vq_tiny.pt"))
    llamagen.save_tokenizer(params, tmp_path / "out.safetensors")
    written = read_torch_file(tmp_path / "out.safetensors")
    assert written.keys() == tokenizer_weights.keys()
    for name, value in tokenizer_weights.items():
        np.testing.assert_array_equal(written[name], value, err_msg=name)
    again_module, again = llamagen.load_tokenizer(tmp_path / "out.safetensors")
    assert again_module == module
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_wrappers_prefixes_and_buffers_of_other_trainers_are_understood(tmp_path, golden, transformer_weights):
    _, expected = load(golden("gpt_tiny.pt"))
    table = rope_table(4, 16)
    save_file(
        {f"_orig_mod.{k}": v for k, v in transformer_weights.items()} | {"_orig_mod.freqs_cis": table},
        tmp_path / "a.safetensors",
    )
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path / "a.safetensors")[1], expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("layers.1.attention.wo.weight"), r"layers\.1\.attention\.wo\.weight is missing"),
        (lambda w: w.pop("output.weight"), r"output\.weight is missing"),
        (lambda w: w.update({"extra": w["norm.weight"]}), "1 tensors have no place in the model, the first is extra"),
        (
            lambda w: w.update({"norm.weight": np.zeros(3, "f4")}),
            r"norm\.weight has shape \(3,\); it should be \(64,\)",
        ),
        (lambda w: w.update({"freqs_cis": rope_table(5, 16)}), "freqs_cis has shape"),
        (lambda w: w.update({"freqs_cis": rope_table(4, 16) + 0.1}), "is not the rotary table of a grid of side 4"),
    ],
)
def test_files_that_do_not_fit_are_refused_by_tensor(tmp_path, transformer_weights, change, message):
    weights = dict(transformer_weights)
    change(weights)
    save_file(weights, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=message):
        load(tmp_path / "a.safetensors")


def test_wrong_kinds_of_files_are_refused(golden):
    with pytest.raises(UserError, match=r"tok_embeddings\.weight is missing"):
        load(golden("vq_tiny.pt"))
    with pytest.raises(UserError, match=r"encoder\.conv_in\.weight is missing"):
        llamagen.load_tokenizer(golden("gpt_tiny.pt"))
    with pytest.raises(UserError, match="5 heads do not divide the width 64"):
        load(golden("gpt_tiny.pt"), num_heads=5)
