"""If these fail, other positions are masked or set than the published models were trained and sampled with."""

import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iar_jax.generators.masked.masking import (
    DRAWS,
    SCHEDULES,
    draw_masks,
    halton_order,
    masked_after_steps,
    set_after_steps,
)


def test_counts_are_those_of_the_published_codes(golden):
    content = json.loads(pathlib.Path(golden("maskgit_schedules.json")).read_text())
    for name, expected in content.items():
        length, steps = int(name.split("_")[0]), int(name.split("_")[2])
        found = masked_after_steps("cosine", length, steps)
        np.testing.assert_array_equal(found, expected["cosine"]["masked_after_step_float32"], err_msg=name)
        found = masked_after_steps("arccos", length, steps)
        np.testing.assert_array_equal(found, expected["arccos"]["masked_after_step"], err_msg=name)
    # A tie, which float64 would round to 128.
    assert masked_after_steps("cosine", 256, 12)[7] == 127


def test_the_halton_order_is_the_published_one(golden):
    arrays = np.load(golden("maskgit_halton_tiny.npz"))
    for side, name in ((4, "halton_order"), (16, "halton_order_16"), (24, "halton_order_24")):
        rows, columns = arrays[name].T
        np.testing.assert_array_equal(halton_order(side), rows * side + columns)
    masks = arrays["halton8_w0_mask"].reshape(8, 3, 16).sum(axis=-1)
    np.testing.assert_array_equal(set_after_steps("arccos", 16, 8), masks[:, 0])


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(list(SCHEDULES)), st.integers(1, 40), st.data())
def test_every_step_sets_something_and_the_last_one_all(schedule, length, data):
    steps = data.draw(st.integers(1, length))
    masked = masked_after_steps(schedule, length, steps)
    assert masked[-1] == 0
    assert np.all(np.diff([length, *masked]) < 0)
    there = set_after_steps(schedule, length, steps)
    assert there[-1] == length
    assert np.all(np.diff(there) >= 0)
    assert np.all(there >= np.arange(1, steps + 1))


@pytest.mark.parametrize("steps", [0, 17])
def test_more_steps_than_positions_are_refused(steps):
    for count in (masked_after_steps, set_after_steps):
        with pytest.raises(ValueError, match=f"{steps} steps for 16 positions"):
            count("arccos", 16, steps)


@settings(deadline=None, max_examples=10)
@given(st.integers(1, 20))
def test_the_order_is_a_permutation(side):
    np.testing.assert_array_equal(np.sort(halton_order(side)), np.arange(side**2))


# E[share] of an even draw: 2/π for arccos and cosine (their integrals from 0 to 1), and so on.
MEANS = {"arccos": 2 / math.pi, "cosine": 2 / math.pi, "linear": 0.5, "square": 2 / 3, "cubic": 3 / 4, "root": 1 / 3}


@pytest.mark.parametrize("draw", list(DRAWS))
@pytest.mark.parametrize("schedule", list(MEANS))
def test_masks_have_the_share_of_their_schedule_and_no_favourite_place(schedule, draw):
    keys, length = jax.random.split(jax.random.key(0), 4000), 64
    masks = np.asarray(draw_masks(keys, length, schedule, draw))
    # The shares' standard deviation is below 0.4; four standard errors.
    assert abs(masks.mean() - MEANS[schedule]) < 4 * 0.4 / math.sqrt(4000)
    assert np.abs(masks.mean(axis=0) - masks.mean()).max() < 4.5 * 0.5 / math.sqrt(4000)
    counts = masks.sum(axis=1)
    if draw == "counted":
        assert counts.min() >= 1
    some = draw_masks(keys, length, schedule, draw, at_least_one=True)
    np.testing.assert_array_equal(some.sum(axis=1), np.maximum(counts, 1))
    np.testing.assert_array_equal(some | masks, some)


def test_counted_masks_have_the_rounded_share():
    keys = jax.random.split(jax.random.key(1), 50)
    masks = draw_masks(keys, 10, "linear", "counted")
    drawn = jax.vmap(lambda key: jax.random.uniform(jax.random.split(key)[0]))(keys)
    expected = np.maximum(np.round((1 - np.asarray(drawn)) * 10), 1)
    np.testing.assert_array_equal(np.asarray(jnp.sum(masks, axis=1)), expected)
