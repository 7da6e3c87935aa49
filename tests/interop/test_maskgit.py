"""If these fail, Halton-MaskGIT's weights are not what the other stages run, or another family's are taken for them."""

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from iar_jax.config.fields import defaults
from iar_jax.generators.code_layout import CodeLayout
from iar_jax.generators.generator import build_generator
from iar_jax.generators.settings import Facts
from iar_jax.interop import llamagen, maskgit
from iar_jax.interop.torch_files import read_torch_file
from iar_jax.runtime.errors import UserError
from tests.generators.masked.test_transformer import initial, small


@pytest.fixture(scope="module")
def weights(golden):
    return read_torch_file(golden("maskgit_halton_tiny.pt"))["model_state_dict"]


def saved(tmp_path, weights):
    save_file({name: np.ascontiguousarray(value) for name, value in weights.items()}, tmp_path / "weights.safetensors")
    return tmp_path / "weights.safetensors"


def load(path, **options):
    return maskgit.load_generator(path, **{"num_heads": 4, "grid_size": 4, **options})


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_what_goes_out_is_what_came_in_whatever_wrapped_it(weights, tmp_path, prefix):
    path = saved(tmp_path, {prefix + name: value for name, value in weights.items()})
    _, params = load(path)
    maskgit.save_generator(params, tmp_path / "out.safetensors")
    out = read_torch_file(tmp_path / "out.safetensors")
    assert out.keys() == weights.keys()
    for name, value in weights.items():
        np.testing.assert_array_equal(out[name], value, err_msg=name)


@pytest.mark.parametrize("num_registers", [0, 2])
def test_a_model_of_ours_goes_out_with_a_mask_that_is_never_drawn(tmp_path, num_registers):
    module = small(num_registers=num_registers)
    params = initial(module)
    maskgit.save_generator(params, tmp_path / "ours.safetensors")
    read, theirs = load(tmp_path / "ours.safetensors")
    assert (read.num_registers, read.mask_output) == (num_registers, True)
    codes, labels = np.random.default_rng(0).integers(0, 33, (2, 16)), np.array([0, 3])
    logits = np.asarray(read.apply({"params": theirs}, labels, codes))
    np.testing.assert_allclose(logits[..., :32], module.apply({"params": params}, labels, codes), atol=1e-5)
    assert np.asarray(jax.nn.softmax(logits, axis=-1))[..., 32].max() == 0.0


def change(weights, **changes):
    return {name: value for name, value in (weights | changes).items() if value is not None}


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({}, {"grid_size": 16}, "has 16 positions, and grid_size 16 makes 256: it is a model of 4 x 4 codes"),
        ({"head.bias": None}, {}, "missing: head.bias"),
        ({"more.weight": np.zeros(3)}, {}, "unexpected: more.weight"),
        ({"head.weight": np.zeros((129, 48), np.float32)}, {}, "head.weight is not tok_emb.weight"),
        ({"in_proj.weight": np.zeros((48, 48, 2, 2))}, {}, "puts 2 x 2 codes together"),
        ({"pos_emb.weight": np.full((16, 48), np.nan)}, {}, "not finite: pos_emb.weight"),
    ],
)
def test_what_does_not_fit_is_named(weights, tmp_path, changes, options, message):
    with pytest.raises(UserError, match=message):
        load(saved(tmp_path, change(weights, **changes)), **options)


OTHERS = {
    "a LlamaGen transformer: config.model.kind=autoregressive": {
        "tok_embeddings.weight": (4, 4),
        "cls_embedding.embedding_table.weight": (4, 4),
    },
    "TiTok's ImageBert": {"model.embeddings.word_embeddings.weight": (4, 4)},
    "TiTok's UViTBert": {"in_blocks.0.norm1.weight": (4,), "lm_head.weight": (4, 4)},
    "a VAR transformer": {"pos_start": (1, 1, 4), "word_embed.weight": (4, 4)},
    "a VQ tokenizer: --tokenizer": {"encoder.conv_in.weight": (4, 3, 3, 3), "quantize.embedding.weight": (4, 4)},
}


@pytest.mark.parametrize("family", OTHERS)
def test_weights_of_another_family_are_named_as_such(tmp_path, family):
    path = saved(tmp_path, {name: np.zeros(shape, np.float32) for name, shape in OTHERS[family].items()})
    with pytest.raises(UserError, match=f"tok_emb.weight is missing; it is {family}"):
        load(path)


def test_and_these_are_named_to_those_who_read_llamagen_s(golden):
    with pytest.raises(UserError, match=r"it is a Halton-MaskGIT transformer: config\.model\.kind=masked reads it"):
        llamagen.load_transformer(golden("maskgit_halton_tiny.pt"), num_heads=4, grid_size=4)


SECTION = {"kind": "masked", "dim": 48, "num_layers": 3, "num_heads": 4, "hidden_dim": 256, "mask_output": True}


def test_the_config_s_model_is_read(golden):
    section, facts = defaults("model") | SECTION, Facts(128, 0, CodeLayout.square(4))
    generator, params = maskgit.read_generator(golden("maskgit_halton_tiny.pt"), section, facts)
    assert generator.facts == Facts(128, 10, CodeLayout.square(4))
    built = build_generator(section, generator.facts)
    shapes = jax.tree.map(lambda leaf: leaf.shape, jax.eval_shape(built.init, jax.random.key(0)))
    assert jax.tree.leaves(shapes) == jax.tree.leaves(jax.tree.map(np.shape, params))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("dim", 96, "config.model.dim is 96, and the file's model has 48; set --config.model.dim=48"),
        ("num_layers", 2, "config.model.num_layers is 2, and the file's model has 3"),
        ("mask_output", False, "is False, and the file's model has True; set --config.model.mask_output=true"),
        ("num_registers", 4, "config.model.num_registers is 4, and the file's model has 1"),
    ],
)  # fmt: skip
def test_another_model_than_the_config_s_is_refused(golden, field, value, message):
    section = defaults("model") | SECTION | {field: value}
    with pytest.raises(UserError, match=message):
        maskgit.read_generator(golden("maskgit_halton_tiny.pt"), section, Facts(128, 0, CodeLayout.square(4)))
