"""If these fail, the KV cache or the keys are wrong: samples then depend on the batch they were made in."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iar_jax.generators.autoregressive import decode_rows, decode_step
from iar_jax.generators.autoregressive.decode_step import (
    block_length,
    decode_weights,
    embed,
    empty_cache,
    grown,
    moved,
)
from iar_jax.generators.autoregressive.decoding import CONSTANT, _generate, generate, part_ends
from iar_jax.interop.llamagen import load_transformer
from iar_jax.runtime import sharding
from tests.generators.autoregressive.test_transformer import initial, small


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"num_heads": 4, "num_kv_heads": 2},  # groups of heads that share keys and values
        {"dim": 48, "num_heads": 4},  # heads of 12 dimensions, which are padded
        {"grid_size": 12},  # a cache that grows on the way
    ],
    ids=["plain", "shared keys", "padded heads", "grown cache"],
)
def test_decoding_with_the_cache_is_the_full_forward_pass(shape):
    module = small(**{"num_layers": 3, **shape})
    params = initial(module)
    labels = jnp.array([2, 0, 1])
    length = module.num_tokens
    codes = jax.random.randint(jax.random.key(2), (3, length), 0, 32)
    expected = module.apply({"params": params}, labels, codes)
    weights = decode_weights(module, params)
    step = jax.jit(functools.partial(decode_step.decode_step, module))
    block = block_length(module)
    cache = empty_cache(module, 3, part_ends(module)[0])
    x = module.apply({"params": params}, labels, method="embed_labels")[:, 0].T
    for t in range(length):
        logits, cache, to_class = step(weights, x, jnp.int32(t), cache)
        np.testing.assert_allclose(logits.T, expected[:, t], atol=2e-5)
        assert ((to_class > 0) & (to_class <= 1 + 1e-6)).all()
        x = embed(weights, codes[:, t])
        if (t + 1) % block == 0:
            cache = moved(cache, jnp.int32(t + 1 - block))
            room = next((end for end in part_ends(module) if end > t + 1), length)
            cache = grown(cache, room)


@pytest.mark.slow
@pytest.mark.parametrize(
    "shape",
    [{}, {"num_heads": 4, "num_kv_heads": 2}, {"dim": 48, "num_heads": 4}, {"grid_size": 12}],
    ids=["plain", "shared keys", "heads of 12", "grown cache"],
)
def test_the_layout_for_chips_decodes_the_same_codes(monkeypatch, shape):
    module = small(**{"num_layers": 3, **shape})
    params = initial(module)
    labels, keys = jnp.array([2, 0, 1]), jax.random.split(jax.random.key(3), 3)
    for cfg_scale in (1.0, 2.5):
        on_cpu = generate(module, params, labels, keys, cfg_scale=cfg_scale)
        with monkeypatch.context() as patch:
            patch.setattr(sharding, "platform", lambda: "gpu")
            jax.clear_caches()
            on_chip = generate(module, params, labels, keys, cfg_scale=cfg_scale)
        jax.clear_caches()
        np.testing.assert_array_equal(on_chip, on_cpu)


def test_the_layout_for_chips_tells_the_attention_to_the_class_token_too():
    module = small(num_layers=3)
    params, labels = initial(module), jnp.array([2, 0])
    found = []
    for layout in (decode_step, decode_rows):
        weights, cache = layout.decode_weights(module, params), layout.empty_cache(module, 2, module.num_tokens)
        x = module.apply({"params": params}, labels, method="embed_labels")[:, 0]
        x = x.T if layout is decode_step else x
        for t in range(2):
            logits, cache, to_class = layout.decode_step(module, weights, x, jnp.int32(t), cache)
            x = layout.embed(weights, jnp.argmax(logits, axis=0))
        found.append((logits, to_class))
    np.testing.assert_allclose(found[0][0], found[1][0], atol=2e-5)
    np.testing.assert_allclose(found[0][1], found[1][1], atol=1e-6)


@pytest.mark.parametrize(("grid_size", "most"), [(8, 1.25), (16, 2.0)], ids=["one part", "grown"])
def test_the_cache_is_updated_in_place(grid_size, most):
    # A copy of it at every step would be another cache at once; while it grows, the old and the new one lie together.
    module, images = small(dim=64, num_heads=4, num_layers=2, grid_size=grid_size), 64
    compiled = _generate.lower(
        module,
        jax.eval_shape(lambda: initial(module)),
        jax.ShapeDtypeStruct((images,), jnp.int32),
        jax.eval_shape(lambda: jax.random.split(jax.random.key(0), images)),
        jnp.float32(2.0),
        jnp.float32(1.0),
        guided=True,
        top_k=0,
        top_p=1.0,
        greedy=False,
        schedule=CONSTANT,
    ).compile()
    whole = jax.eval_shape(lambda: empty_cache(module, 2 * images, module.num_tokens))
    cache = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(whole))
    assert compiled.memory_analysis().temp_size_in_bytes < most * cache


def test_bfloat16_has_a_cache_of_its_own_and_stays_near_float32():
    module = small(dtype=jnp.bfloat16)
    params = initial(module)
    assert {leaf.dtype for leaf in jax.tree.leaves(empty_cache(module, 2, 8))} == {jnp.dtype(jnp.bfloat16)}
    labels, keys = jnp.array([2, 0]), jax.random.split(jax.random.key(0), 2)
    codes = generate(module, params, labels, keys, cfg_scale=1.5)
    assert ((codes >= 0) & (codes < 32)).all()
    weights, cache = decode_weights(module, params), empty_cache(module, 2, 9)
    step = jax.jit(functools.partial(decode_step.decode_step, module))
    x = module.apply({"params": params}, labels, method="embed_labels")[:, 0].T
    expected = small().apply({"params": params}, labels, codes)
    for t in range(block_length(module)):
        logits, cache, _ = step(weights, x, jnp.int32(t), cache)
        # bfloat16 has 8 bits, and there are some ten roundings on the way.
        assert np.abs(logits.T.astype(jnp.float32) - expected[:, t]).max() < 10 * 2**-8 * np.abs(expected).max()
        x = embed(weights, codes[:, t])


@pytest.mark.parametrize(("cfg_scale", "name"), [(2.0, "greedy_cfg2"), (1.0, "greedy_nocfg")])
def test_greedy_samples_are_the_golden_ones(golden, cfg_scale, name):
    module, params = load_transformer(golden("gpt_tiny.pt"), num_heads=4, grid_size=4)
    expected = np.load(golden("gpt_tiny.npz"))
    labels = jnp.asarray(expected["labels"], jnp.int32)
    keys = jax.random.split(jax.random.key(0), len(labels))
    codes = generate(module, params, labels, keys, cfg_scale=cfg_scale, greedy=True)
    np.testing.assert_array_equal(codes, expected[name])


def test_an_image_depends_on_its_key_and_label_alone():
    module = small()
    params = initial(module)
    labels = jnp.arange(16) % 3
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(7), i))(jnp.arange(16))
    together = generate(module, params, labels, keys, cfg_scale=1.5)
    for start in range(0, 16, 3):
        part = slice(start, start + 3)
        apart = generate(module, params, labels[part], keys[part], cfg_scale=1.5)
        np.testing.assert_array_equal(apart, together[part])
    assert len({tuple(row) for row in np.asarray(together).tolist()}) == 16


def test_draws_follow_the_models_distribution():
    # The first code's distribution is known exactly: that of position 0 of the forward pass.
    module = small()
    params = initial(module)
    count = 4000
    labels = jnp.ones((count,), jnp.int32)
    codes = generate(module, params, labels, jax.random.split(jax.random.key(1), count), cfg_scale=1.0)
    logits = module.apply({"params": params}, labels[:1], codes[:1])[0, 0]
    expected = np.asarray(jax.nn.softmax(logits))
    found = np.bincount(np.asarray(codes)[:, 0], minlength=32) / count
    # Four standard deviations of a share of 4,000 draws, for each of 32 codes.
    assert (np.abs(found - expected) < 4 * np.sqrt(expected * (1 - expected) / count) + 1e-3).all()


def test_top_k_of_one_is_greedy():
    module = small()
    params = initial(module)
    labels, keys = jnp.arange(3), jax.random.split(jax.random.key(0), 3)
    greedy = generate(module, params, labels, keys, cfg_scale=2.0, greedy=True)
    np.testing.assert_array_equal(generate(module, params, labels, keys, cfg_scale=2.0, top_k=1), greedy)


@pytest.mark.parametrize(
    ("setting", "message"), [({"temperature": 0.0}, "temperature is 0"), ({"top_p": 0.0}, "top_p")]
)
def test_impossible_settings_are_refused(setting, message):
    module = small()
    with pytest.raises(ValueError, match=message):
        generate(module, {}, jnp.zeros(1, jnp.int32), jax.random.split(jax.random.key(0), 1), cfg_scale=1.0, **setting)
