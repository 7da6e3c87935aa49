"""If these fail, pictures are sampled otherwise than published, or depend on which others are sampled with them."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iar_jax.generators.guidance import CONSTANT, Schedule
from iar_jax.generators.masked import sampling
from iar_jax.generators.masked.generator import Masked
from iar_jax.generators.masked.masking import masked_after_steps, set_after_steps
from iar_jax.generators.masked.sampling import ORDERS, Drawn, Numbers, Static, sample_codes, states
from iar_jax.generators.settings import SamplingSettings
from iar_jax.runtime import sharding
from tests.generators.masked.test_transformer import initial, published, small  # noqa: F401

SETTINGS = SamplingSettings(cfg_scale=2.0, mask_steps=5, mask_order="halton", mask_noise=2.0)


def keys_of(count, seed=0):
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(count))


def static(**fields):
    return Static(**{
        "guided": False, "schedule": CONSTANT, "top_k": 0, "top_p": 1.0, "steps": 5, "order": "halton",
        "mask_schedule": "arccos", **fields,
    })  # fmt: skip


def numbers(cfg_scale=1.0, temperature=1.0, end=1.0, noise=0.0):
    return Numbers(*map(jnp.float32, (cfg_scale, temperature, end, noise)))


@pytest.mark.parametrize("w", [0, 2])
def test_every_state_of_the_published_halton_sampler_is_reproduced(published, w):  # noqa: F811
    module, params, arrays = published
    # Its draws were replaced by the most probable codes; its guidance (1 + w) c - w u is a scale of 1 + w.
    found = states(
        module, params, jnp.asarray(arrays["labels"]), keys_of(3), numbers(1.0 + w, 1.0, 1 / 1.2),
        static(guided=w > 0, top_k=1, steps=8),
    )  # fmt: skip
    drawn, there = (arrays[f"halton8_w{w}_{name}"].reshape(8, 3, 16) for name in ("pred", "mask"))
    np.testing.assert_array_equal(found, np.where(there, drawn, module.mask))


@pytest.mark.parametrize("order", list(ORDERS))
@pytest.mark.parametrize("steps", [1, 5, 16])
def test_positions_are_set_as_the_schedule_counts(order, steps):
    module = small()
    found = np.asarray(
        states(module, initial(module), jnp.zeros(6, jnp.int32), keys_of(6), numbers(noise=3.0),
               static(order=order, steps=steps))
    )  # fmt: skip
    there = np.sum(found != module.mask, axis=-1)
    halton = set_after_steps("arccos", 16, steps)
    expected = 16 - masked_after_steps("arccos", 16, steps) if order == "confidence" else halton
    np.testing.assert_array_equal(there, np.repeat(expected[:, None], 6, axis=1))
    assert found[-1].max() < 32
    for before, after in itertools.pairwise(found):
        known = before != module.mask
        assert np.all(after[known] != module.mask)
        if order == "confidence":
            np.testing.assert_array_equal(after[known], before[known])
    first = found[0] != module.mask
    same_places = np.all(first == first[0])
    assert same_places == (order == "halton" or steps == 1)


def test_the_most_confident_are_set_first():
    module = small()
    set_some = sampling.by_confidence(module, keys_of(1), numbers(), static(steps=4))
    codes = jnp.full((1, 16), module.mask).at[0, 2].set(7)
    drawn = Drawn(jnp.arange(16)[None], -jnp.arange(16.0)[None])
    after = np.asarray(set_some(codes, drawn, keys_of(1), 1))[0]
    stays = masked_after_steps("arccos", 16, 4)[1]
    np.testing.assert_array_equal(after[: 16 - stays], [0, 1, 7, *range(3, 16 - stays)])
    np.testing.assert_array_equal(after[16 - stays :], module.mask)


@pytest.mark.parametrize("order", list(ORDERS))
@pytest.mark.parametrize("mask_output", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_picture_depends_on_its_label_and_key_alone(order, mask_output):
    module = small(mask_output=mask_output)
    params, settings = initial(module), dataclasses.replace(SETTINGS, mask_order=order)
    labels, keys = jnp.array([0, 1, 2, 3, 4, 0, 1, 2]), keys_of(8)
    together = np.asarray(sample_codes(module, params, labels, keys, settings))
    assert together.min() >= 0
    assert together.max() < 32
    assert len(np.unique(together, axis=0)) == 8
    for rows in ([5], [7, 2, 4]):
        alone = sample_codes(module, params, labels[jnp.array(rows)], keys[jnp.array(rows)], settings)
        np.testing.assert_array_equal(alone, together[rows])
    mesh = sharding.mesh_of(jax.devices()[:8], (2, 2, 2))
    generator = Masked(module)
    with sharding.use_mesh(mesh):
        boxed = jax.eval_shape(generator.init, jax.random.key(0))
        placed = jax.device_put(params, sharding.unbox(sharding.tree_shardings(mesh, boxed)))
        batch = sharding.global_batch(mesh, {"label": np.asarray(labels)})
        split = generator.sample(placed, batch["label"], keys, settings)
    np.testing.assert_array_equal(split, together)


@pytest.mark.slow
def test_the_head_is_taken_in_parts_with_the_same_result(monkeypatch):
    module = small()
    params, labels = initial(module), jnp.arange(4)
    whole = sample_codes(module, params, labels, keys_of(4), SETTINGS)
    monkeypatch.setattr(sampling, "MOST_LOGITS", 8 * 32 * 2)
    jax.clear_caches()
    np.testing.assert_array_equal(sample_codes(module, params, labels, keys_of(4), SETTINGS), whole)


def test_one_pass_draws_from_the_model_s_own_distribution():
    module = small(grid_size=2)
    params = initial(module)
    labels = jnp.full(6000, 3)
    logits = module.apply({"params": params}, labels[:1], jnp.full((1, 4), module.mask))[0]
    settings = SamplingSettings(cfg_scale=1.0, temperature=1.3, mask_steps=1, mask_order="halton")
    found = np.asarray(sample_codes(module, params, labels, keys_of(6000), settings))
    expected = np.asarray(jax.nn.softmax(logits / 1.3, axis=-1))
    for place in range(4):
        counts = np.bincount(found[:, place], minlength=32)
        # Pearson's statistic has 31 degrees of freedom: mean 31, standard deviation 7.9.
        statistic = np.sum((counts - 6000 * expected[place]) ** 2 / (6000 * expected[place]))
        assert statistic < 31 + 5 * 7.9


def test_guidance_and_temperature_follow_their_schedules(monkeypatch):
    module, seen = small(), []

    def spied(network, params, labels, codes, keys, scale, temperature, static):
        jax.debug.callback(lambda *values: seen.append(tuple(map(float, values))), jnp.mean(scale), temperature)
        return Drawn(jnp.zeros(codes.shape, jnp.int32), jnp.zeros(codes.shape))

    monkeypatch.setattr(sampling, "drawn_codes", spied)
    found = states(
        module, {}, jnp.zeros(2, jnp.int32), keys_of(2), numbers(3.0, 1.0, 0.5),
        static(guided=True, schedule=Schedule("linear", start=1.0), steps=5),
    )  # fmt: skip
    jax.block_until_ready(found)
    scales, temperatures = zip(*sorted(seen), strict=True)
    np.testing.assert_allclose(scales, [1.0, 1.5, 2.0, 2.5, 3.0], rtol=1e-6)
    # The reciprocals go evenly from 1 to 2.
    np.testing.assert_allclose(temperatures, 1 / np.array([1.0, 1.25, 1.5, 1.75, 2.0]), rtol=1e-6)


def test_more_steps_than_positions_are_refused():
    module = small()
    with pytest.raises(ValueError, match="17 steps for 16 positions"):
        sample_codes(module, initial(module), jnp.zeros(1, jnp.int32), keys_of(1),
                     dataclasses.replace(SETTINGS, mask_steps=17))  # fmt: skip
