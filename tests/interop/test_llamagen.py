"""If these fail, weights go in and out as almost the same model."""

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from iar_jax.config.fields import defaults
from iar_jax.generators.autoregressive.decoding import generate
from iar_jax.generators.code_layout import CodeLayout
from iar_jax.generators.settings import Facts
from iar_jax.interop import llamagen, state_dicts
from iar_jax.interop.torch_files import read_torch_file
from iar_jax.models.rope import rope_table
from iar_jax.runtime.errors import UserError
from tests.generators.autoregressive.test_transformer import initial, small


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


def forms(plain, averaged):
    """The forms that LlamaGen's trainers write, by trainer."""
    return {
        "DDP": {"model": plain, "optimizer": {"lr": 1}, "steps": 3},
        "DDP with an average": {"model": plain, "ema": averaged},
        "average alone": {"ema": plain},
        "FSDP": plain,
        "DeepSpeed": {"module": plain},
        "state_dict": {"state_dict": plain},
    }


@pytest.mark.parametrize("form", forms({}, {}))
def test_all_forms_of_files_are_understood(monkeypatch, golden, transformer_weights, tokenizer_weights, form):
    _, expected = load(golden("gpt_tiny.pt"))
    averaged = {name: value + 1 for name, value in transformer_weights.items()}
    content = forms(transformer_weights, averaged)[form]
    monkeypatch.setattr(state_dicts, "read_torch_file", lambda _: content)
    jax.tree.map(np.testing.assert_array_equal, load("file.pt")[1], expected)
    monkeypatch.undo()
    _, expected = llamagen.load_tokenizer(golden("vq_tiny.pt"))
    # LlamaGen's programs take a tokenizer's average where there is one.
    plain = {name: value + 1 for name, value in tokenizer_weights.items()}
    has_both = form == "DDP with an average"
    content = forms(plain, tokenizer_weights)[form] if has_both else forms(tokenizer_weights, {})[form]
    monkeypatch.setattr(state_dicts, "read_torch_file", lambda _: content)
    jax.tree.map(np.testing.assert_array_equal, llamagen.load_tokenizer("file.pt")[1], expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("layers.1.attention.wo.weight"), r"missing: layers\.1\.attention\.wo\.weight"),
        (lambda w: w.pop("output.weight"), r"missing: output\.weight"),
        (lambda w: w.update({"extra": w["norm.weight"]}), "unexpected: extra"),
        (
            lambda w: w.update({"norm.weight": np.zeros(3, "f4")}),
            r"norm\.weight has shape \(3,\) and should have \(64,\)",
        ),
        (lambda w: w.update({"freqs_cis": rope_table(5, 16)}), "this is a model of 5 x 5 codes with heads of 16"),
        (lambda w: w.update({"freqs_cis": rope_table(4, 16) + 0.1}), "is not the rotary table of a grid of side 4"),
    ],
)
def test_files_that_do_not_fit_are_refused_by_tensor(tmp_path, transformer_weights, change, message):
    weights = dict(transformer_weights)
    change(weights)
    save_file(weights, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=message):
        load(tmp_path / "a.safetensors")


def test_everything_that_is_wrong_is_named_at_once(tmp_path, transformer_weights, tokenizer_weights):
    weights = dict(transformer_weights)
    for name in ("norm.weight", "layers.2.ffn_norm.weight"):
        weights[name + "s"] = weights.pop(name)
    save_file(weights, tmp_path / "a.safetensors")
    with pytest.raises(UserError) as error:
        load(tmp_path / "a.safetensors")
    assert "missing: norm.weight, layers.2.ffn_norm.weight." in str(error.value)
    assert "unexpected: layers.2.ffn_norm.weights, norm.weights" in str(error.value)
    weights = dict(tokenizer_weights)
    del weights["decoder.norm_out.bias"]
    weights["encoder.mid.0.conv1.bias"] = np.zeros(5, "f4")
    save_file(weights, tmp_path / "b.safetensors")
    with pytest.raises(UserError) as error:
        llamagen.load_tokenizer(tmp_path / "b.safetensors")
    assert "missing: decoder.norm_out.bias" in str(error.value)
    assert "encoder.mid.0.conv1.bias has shape (5,) and should have (64,)" in str(error.value)


def random_transformer(num_layers, num_heads, num_kv_heads, dim, hidden_dim, num_classes, vocab_size):
    """A LlamaGen state dict of any size, by its public names."""
    rng = np.random.default_rng(0)
    rows = dim + 2 * num_kv_heads * dim // num_heads
    shapes = {"tok_embeddings.weight": (vocab_size, dim), "output.weight": (vocab_size, dim), "norm.weight": (dim,)}
    shapes["cls_embedding.embedding_table.weight"] = (num_classes + 1, dim)
    for i in range(num_layers):
        for name, shape in (
            ("attention.wqkv", (rows, dim)),
            ("attention.wo", (dim, dim)),
            ("feed_forward.w1", (hidden_dim, dim)),
            ("feed_forward.w3", (hidden_dim, dim)),
            ("feed_forward.w2", (dim, hidden_dim)),
            ("attention_norm", (dim,)),
            ("ffn_norm", (dim,)),
        ):
            shapes[f"layers.{i}.{name}.weight"] = shape
    return {name: (0.2 * rng.standard_normal(shape)).astype("f4") for name, shape in shapes.items()}


def numpy_logits(weights, num_heads, num_kv_heads, grid_size, label, codes):
    """LlamaGen's forward pass for one image in float64, from its definition."""
    w = {name: value.astype(np.float64) for name, value in weights.items()}
    dim = w["norm.weight"].shape[0]
    head_dim, length = dim // num_heads, len(codes)
    x = np.concatenate([w["cls_embedding.embedding_table.weight"][[label]], w["tok_embeddings.weight"][codes[:-1]]])
    frequencies = 10000.0 ** (-np.arange(0, head_dim // 2, 2)[: head_dim // 4] / (head_dim // 2))
    cells = np.arange(length - 1)
    rows, columns = np.outer(cells // grid_size, frequencies), np.outer(cells % grid_size, frequencies)
    angles = np.concatenate([rows, columns], axis=1)
    turn = np.concatenate([np.zeros((1, head_dim // 2)), np.exp(1j * angles)])[:, None]

    def norm(x, name):
        return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-5) * w[name]

    def rotate(x):
        turned = (x[..., ::2] + 1j * x[..., 1::2]) * turn
        return np.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)

    for i in range(1 + max(int(name.split(".")[1]) for name in w if name.startswith("layers."))):
        p = f"layers.{i}."
        qkv = norm(x, p + "attention_norm.weight") @ w[p + "attention.wqkv.weight"].T
        q, k, v = np.split(qkv, [dim, dim + num_kv_heads * head_dim], axis=1)
        q = rotate(q.reshape(length, num_heads, head_dim))
        k = rotate(k.reshape(length, num_kv_heads, head_dim)).repeat(num_heads // num_kv_heads, axis=1)
        v = v.reshape(length, num_kv_heads, head_dim).repeat(num_heads // num_kv_heads, axis=1)
        scores = np.einsum("lhk,shk->hls", q, k) / np.sqrt(head_dim)
        scores = np.where(np.tril(np.ones((length, length), bool)), scores, -np.inf)
        attention = np.exp(scores - scores.max(axis=-1, keepdims=True))
        attention /= attention.sum(axis=-1, keepdims=True)
        x = x + np.einsum("hls,shk->lhk", attention, v).reshape(length, dim) @ w[p + "attention.wo.weight"].T
        h = norm(x, p + "ffn_norm.weight")
        gate = h @ w[p + "feed_forward.w1.weight"].T
        hidden = gate / (1 + np.exp(-gate)) * (h @ w[p + "feed_forward.w3.weight"].T)
        x = x + hidden @ w[p + "feed_forward.w2.weight"].T
    return norm(x, "norm.weight") @ w["output.weight"].T


@pytest.mark.parametrize(
    ("num_layers", "num_heads", "num_kv_heads", "dim", "grid_size", "num_classes"),
    [(1, 2, 2, 16, 3, 7), (2, 4, 2, 32, 5, 3), (2, 6, 1, 48, 2, 1), (3, 8, 8, 32, 4, 100)],
)
def test_other_sizes_and_groups_equal_the_definition_in_float64(
    tmp_path, num_layers, num_heads, num_kv_heads, dim, grid_size, num_classes
):
    weights = random_transformer(num_layers, num_heads, num_kv_heads, dim, 24, num_classes, 40)
    save_file(weights, tmp_path / "a.safetensors")
    module, params = load(tmp_path / "a.safetensors", num_heads=num_heads, grid_size=grid_size)
    assert (module.num_layers, module.num_classes, module.hidden_dim) == (num_layers, num_classes, 24)
    codes = np.random.default_rng(1).integers(0, 40, (2, grid_size**2))
    labels = np.array([0, num_classes])  # the null class too
    found = module.apply({"params": params}, labels, codes)
    for row, label in enumerate(labels):
        expected = numpy_logits(weights, num_heads, num_kv_heads, grid_size, label, codes[row])
        np.testing.assert_allclose(found[row], expected, atol=1e-4)
    keys = jax.random.split(jax.random.key(0), 2)
    greedy = generate(module, params, labels, keys, cfg_scale=1.0, greedy=True)
    again = module.apply({"params": params}, labels, greedy)
    np.testing.assert_array_equal(np.argmax(again, axis=-1), greedy)
    llamagen.save_transformer(params, tmp_path / "out.safetensors")
    written = read_torch_file(tmp_path / "out.safetensors")
    for name, value in weights.items():
        np.testing.assert_array_equal(written[name], value, err_msg=name)


def test_wrong_kinds_of_files_are_refused(golden):
    with pytest.raises(UserError, match=r"tok_embeddings\.weight is missing"):
        load(golden("vq_tiny.pt"))
    with pytest.raises(UserError, match=r"encoder\.conv_in\.weight is missing"):
        llamagen.load_tokenizer(golden("gpt_tiny.pt"))
    with pytest.raises(UserError, match="5 heads do not divide the width 64"):
        load(golden("gpt_tiny.pt"), num_heads=5)


def test_a_file_is_read_as_the_generator_of_the_config_or_refused(tmp_path):
    network = small(num_heads=4, num_kv_heads=2)
    llamagen.save_transformer(jax.tree.map(np.asarray, initial(network)), tmp_path / "grouped.safetensors")
    section = defaults("model") | {"dim": 16, "num_layers": 2, "num_heads": 4, "hidden_dim": 24}
    facts = Facts(32, 0, CodeLayout.square(3))
    with pytest.raises(UserError, match=r"config.model.num_kv_heads is 4, and the file's model has 2; give the config"):
        llamagen.read_generator(tmp_path / "grouped.safetensors", section, facts)
    generator, _ = llamagen.read_generator(tmp_path / "grouped.safetensors", section | {"num_kv_heads": 2}, facts)
    assert generator.facts == Facts(32, 3, CodeLayout.square(3))
    with pytest.raises(UserError, match="the tokenizer's codebook_size is 64, and the file's model has 32"):
        llamagen.read_generator(
            tmp_path / "grouped.safetensors", section | {"num_kv_heads": 2}, Facts(64, 0, CodeLayout.square(3))
        )
