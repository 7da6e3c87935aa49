"""If these fail, the transformer is not LlamaGen's, peeks at codes it must predict, or drops out when it must not."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iar_jax.generators.autoregressive.transformer import Transformer
from iar_jax.interop.llamagen import load_transformer
from iar_jax.losses.cluster_loss import reference
from iar_jax.models.layers import Dropout, swiglu_hidden_dim
from iar_jax.models.rope import apply_rope, rope_table

# FACTS of the public models: name, layers, heads, width, exact number of parameters.
PUBLISHED = [
    ("B", 12, 12, 768, 110_888_448),
    ("L", 24, 16, 1024, 342_910_976),
    ("XL", 36, 20, 1280, 774_699_520),
    ("XXL", 48, 24, 1536, 1_410_972_672),
    ("3B", 24, 32, 3200, 3_096_659_200),
    ("XXXL", 48, 40, 2560, 3_893_027_840),
    ("7B", 32, 32, 4096, 6_614_589_440),
    ("1B", 22, 32, 2048, 1_199_616_000),
]


@pytest.fixture(scope="module")
def tiny(golden):
    with open(golden("gpt_tiny.json")) as file:
        facts = json.load(file)
    module, params = load_transformer(golden("gpt_tiny.pt"), num_heads=facts["n_head"], grid_size=facts["grid"])
    return module, params, dict(np.load(golden("gpt_tiny.npz"))), facts


def small(**fields):
    defaults = {"vocab_size": 32, "num_classes": 3, "grid_size": 3, "dim": 16, "num_layers": 2, "num_heads": 2}
    return Transformer(**{**defaults, "hidden_dim": 24, "init_std": 0.3, **fields})


def initial(module, key=0):
    import flax.linen as nn

    labels, codes = jnp.zeros((1,), jnp.int32), jnp.zeros((1, module.num_tokens), jnp.int32)
    params = nn.unbox(module.init(jax.random.key(key), labels, codes))["params"]
    # A zero head hides everything before it.
    return params | {"head": 0.3 * jax.random.normal(jax.random.key(key + 1), params["head"].shape)}


def test_the_golden_logits_losses_and_gradients_are_reproduced(tiny):
    module, params, expected, facts = tiny
    logits = module.apply({"params": params}, expected["labels"], expected["codes"])
    np.testing.assert_allclose(logits, expected["logits"], atol=1e-4)

    def total(params):
        logits = module.apply({"params": params}, expected["labels"], expected["codes"])
        losses = reference(logits, jnp.asarray(expected["codes"]), (facts["cluster_size"],))
        means = losses.token_loss.mean(), losses.cluster_losses[0].mean()
        return means[0] + facts["lambda_cce"] * means[1], means

    grads, (token_loss, cluster_loss) = jax.grad(total, has_aux=True)(params)
    assert abs(float(token_loss) - expected["token_loss"]) < 1e-5
    assert abs(float(cluster_loss) - expected["cluster_loss"]) < 1e-5
    dim = facts["dim"]
    for ours, theirs in (
        (grads["head"].T, "grad_output_weight"),
        (grads["token_table"], "grad_tok_embeddings"),
        (grads["layers"]["attention"]["wqkv"][0].transpose(2, 1, 3, 0).reshape(3 * dim, dim), "grad_wqkv0"),
    ):
        assert np.abs(ours - expected[theirs]).max() < 1e-4 * np.abs(expected[theirs]).max(), theirs
    norm = np.sqrt(sum(float(jnp.sum(jnp.square(g))) for g in jax.tree.leaves(grads)))
    np.testing.assert_allclose(norm, expected["grad_norm"], rtol=1e-5)


@pytest.mark.parametrize(("name", "num_layers", "num_heads", "dim", "count"), PUBLISHED)
def test_parameter_counts_are_the_published_ones(name, num_layers, num_heads, dim, count):
    module = Transformer(16384, 1000, 16, dim, num_layers, num_heads, swiglu_hidden_dim(dim))
    shapes = jax.eval_shape(
        lambda: module.init(jax.random.key(0), jnp.zeros((1,), jnp.int32), jnp.zeros((1, 256), jnp.int32))
    )
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count


def test_no_logit_depends_on_the_code_it_predicts_or_later_ones():
    module = small()
    params = initial(module)
    codes = jnp.arange(9)[None] + 3
    before = module.apply({"params": params}, jnp.array([1]), codes)
    for t in range(9):
        after = module.apply({"params": params}, jnp.array([1]), codes.at[0, t].set(0))
        changed = np.abs(np.asarray(after - before)).max(axis=-1)[0] > 0
        assert not changed[: t + 1].any()
        assert t == 8 or changed[t + 1]


def test_scan_unrolling_and_remat_do_not_change_the_model():
    params = initial(small())
    labels, codes = jnp.array([0, 2]), jnp.arange(18).reshape(2, 9)
    expected = small().apply({"params": params}, labels, codes)
    for other in (small(scan_unroll=2), small(remat="layer"), small(remat="dots")):
        np.testing.assert_allclose(other.apply({"params": params}, labels, codes), expected, atol=1e-5)


def test_dropouts_are_on_with_a_key_and_off_without():
    rates = dict.fromkeys(("token_dropout_rate", "residual_dropout_rate", "ffn_dropout_rate", "drop_path_rate"), 0.3)
    labels, codes = jnp.array([0, 2]), jnp.arange(18).reshape(2, 9)
    params = initial(small())
    plain = small().apply({"params": params}, labels, codes)
    np.testing.assert_array_equal(small(**rates).apply({"params": params}, labels, codes), plain)
    for name, rate in rates.items():
        noisy = small(**{name: rate}).apply({"params": params}, labels, codes, rngs={"dropout": jax.random.key(0)})
        assert np.abs(noisy - plain).max() > 1e-3, name


def test_class_dropout_turns_labels_into_the_null_class():
    module = small(class_dropout_rate=0.5)
    params = initial(module)
    labels, codes = jnp.zeros((64,), jnp.int32), jnp.zeros((64, 9), jnp.int32)
    logits = module.apply({"params": params}, labels, codes, rngs={"dropout": jax.random.key(0)})
    kept = module.apply({"params": params}, labels[:1], codes[:1])[0]
    null = module.apply({"params": params}, jnp.array([3]), codes[:1])[0]
    as_kept = np.abs(logits - kept).max(axis=(1, 2)) < 1e-4
    as_null = np.abs(logits - null).max(axis=(1, 2)) < 1e-4
    assert (as_kept ^ as_null).all()
    assert 16 < as_null.sum() < 48  # 64 fair draws; outside once in 30,000


def test_grouped_heads_are_heads_with_repeated_keys_and_values():
    grouped = small(dim=32, num_heads=4, num_kv_heads=2)
    params = initial(grouped)
    wqkv = params["layers"]["attention"]["wqkv"]  # [layers, dim, 2 groups, 2 queries + key + value, 8]
    assert wqkv.shape == (2, 32, 2, 4, 8)
    queries = wqkv[:, :, :, :2].reshape(2, 32, 4, 1, 8)
    keys_and_values = jnp.repeat(wqkv[:, :, :, 2:], 2, axis=2)
    attention = params["layers"]["attention"] | {"wqkv": jnp.concatenate([queries, keys_and_values], axis=3)}
    spread = params | {"layers": params["layers"] | {"attention": attention}}
    labels, codes = jnp.array([0, 2]), jnp.arange(18).reshape(2, 9)
    expected = small(dim=32, num_heads=4).apply({"params": spread}, labels, codes)
    np.testing.assert_allclose(grouped.apply({"params": params}, labels, codes), expected, atol=2e-5)


def test_rope_turns_rows_and_columns_and_blanks_the_class_token():
    table = rope_table(grid_size=4, head_dim=8)
    assert table.shape == (17, 4, 2)
    assert (table[0] == 0).all()
    frequencies = np.array([1.0, 10000.0**-0.5])
    row, column = 2, 3
    angles = np.concatenate([row * frequencies, column * frequencies])
    np.testing.assert_allclose(table[1 + row * 4 + column, :, 0], np.cos(angles), atol=1e-6)
    np.testing.assert_allclose(table[1 + row * 4 + column, :, 1], np.sin(angles), atol=1e-6)
    x = np.random.default_rng(0).standard_normal((1, 17, 2, 8)).astype(np.float32)
    turned = np.asarray(apply_rope(jnp.asarray(x), jnp.asarray(table)))
    assert (turned[:, 0] == 0).all()
    # Pairs are (0, 1), (2, 3), ...: complex numbers times exp(i * angle).
    pairs = x[0, 1 + row * 4 + column].reshape(2, 4, 2)
    expected = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * angles)
    found = turned[0, 1 + row * 4 + column].reshape(2, 4, 2)
    np.testing.assert_allclose(found[..., 0] + 1j * found[..., 1], expected, atol=1e-5)


def test_hidden_widths_follow_llamagens_rule():
    assert [swiglu_hidden_dim(d) for d in (768, 1024, 1280, 1536, 3200)] == [2048, 2816, 3584, 4096, 8704]


@pytest.mark.parametrize(("shape", "shared", "unit"), [((64, 31, 16), (), 1), ((4096, 1, 3), (1, 2), 3)])
def test_dropout_drops_its_share_and_keeps_the_mean(shape, shared, unit):
    found = Dropout(0.3, shared).apply({}, jnp.ones(shape), rngs={"dropout": jax.random.key(0)})
    kept = np.asarray(found) > 0
    draws = kept.size / unit
    # Five standard deviations of a share of independent draws.
    assert abs(kept.mean() - 0.7) < 5 * np.sqrt(0.21 / draws)
    np.testing.assert_allclose(np.asarray(found)[kept], 1 / 0.7, rtol=1e-4)
    assert not shared or (kept == kept[:, :1, :1]).all()
    # The two halves of a random word do not follow each other.
    if not shared:
        first, second = kept[:, :15].ravel(), kept[:, 16:].ravel()
        assert abs((first & second).mean() - 0.49) < 5 * np.sqrt(0.25 / first.size)
