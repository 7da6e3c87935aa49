"""If these fail, the README's example does not run, or a picture is of another class."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iar_jax.generators.autoregressive.decoding import generate
from iar_jax.generators.autoregressive.generator import Autoregressive
from iar_jax.generators.pictures import sample_pictures
from iar_jax.interop.llamagen import load_tokenizer, load_transformer
from iar_jax.runtime import sharding
from iar_jax.runtime.errors import UserError
from tests.generators.autoregressive.test_transformer import initial, small


def test_pictures_come_from_llamagen_files(golden):
    module, params = load_transformer(golden("gpt_tiny.pt"), num_heads=4, grid_size=4)
    transformer = Autoregressive(module), params
    tokenizer = load_tokenizer(golden("vq_tiny.pt"))
    first, second = sample_pictures(*transformer, tokenizer, [1, 0], seed=3)
    assert first.mode == "RGB"
    assert first.size[0] == first.size[1] > 4
    (alone,) = sample_pictures(*transformer, tokenizer, [1], seed=3)
    assert np.abs(np.asarray(first).astype(int) - np.asarray(alone)).max() <= 1  # rounding of another batch
    assert np.asarray(first).tobytes() != np.asarray(second).tobytes()
    with pytest.raises(ValueError, match="labels are"):
        sample_pictures(*transformer, tokenizer, [1000])
    with pytest.raises(UserError, match="the nearest are"):
        sample_pictures(*transformer, tokenizer, ["golden retreiver"])


def test_the_same_codes_on_one_device_and_on_eight():
    module = small(grid_size=4)
    params = initial(module)
    labels = np.arange(16) % 3
    keys = jax.random.split(jax.random.key(0), 16)
    one = generate(module, params, labels, keys, cfg_scale=1.5, top_k=8)
    for shape in ((8, 1, 1), (2, 2, 2)):
        mesh = sharding.make_mesh(*shape)
        spread = jax.device_put((jnp.asarray(labels), keys), sharding.batch_sharding(mesh))
        with sharding.use_mesh(mesh):
            eight = generate(module, params, *spread, cfg_scale=1.5, top_k=8)
        np.testing.assert_array_equal(one, eight)
