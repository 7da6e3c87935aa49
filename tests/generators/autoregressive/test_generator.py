"""If these fail, stages are told wrong things about LlamaGen's transformer."""

import jax
import numpy as np
import pytest

from iar_jax.codebook.permutation import Permutation
from iar_jax.config.fields import defaults
from iar_jax.generators.autoregressive.generator import Autoregressive
from iar_jax.generators.autoregressive.sizes import SIZES, size_named
from iar_jax.generators.code_layout import CodeLayout
from iar_jax.generators.generator import Generator, build_generator
from iar_jax.generators.settings import Facts, Objective
from tests.generators.autoregressive.test_transformer import initial, small


@pytest.mark.parametrize(
    ("layers", "dim", "hidden", "side", "forward_gflops"),
    [(12, 768, 2048, 16, 51.1), (48, 1536, 4096, 24, 1643.4), (24, 3200, 8704, 16, 1567.0)],
)
def test_flops_are_those_of_the_published_models(layers, dim, hidden, side, forward_gflops):
    network = small(vocab_size=16384, dim=dim, num_layers=layers, hidden_dim=hidden, grid_size=side)
    np.testing.assert_allclose(Autoregressive(network).flops(2), 2 * 3 * forward_gflops * 1e9, rtol=1e-3)


def test_a_config_and_facts_make_the_generator_that_they_describe():
    section = defaults("model") | {"dim": 64, "num_heads": 8, "num_kv_heads": 2, "num_layers": 3}
    facts = Facts(32, 5, CodeLayout.square(4))
    generator = build_generator(section, facts, Objective((4, 16)))
    assert isinstance(generator, Generator)
    assert generator.facts == facts == Facts.from_json(facts.to_json())
    assert generator.layout.length == 16
    assert generator.splits["heads of keys and values"] == (2, "tensor")
    assert generator.splits["clusters of codes"] == (2, "tensor")
    shapes = jax.eval_shape(generator.init, jax.random.key(0))
    assert shapes["layers"]["attention"]["wqkv"].value.shape == (3, 64, 2, 4 + 2, 8)


def test_ids_in_another_order_are_the_same_model():
    module = small()
    params, generator = initial(module), Autoregressive(module)
    permutation = Permutation.from_order(np.random.default_rng(0).permutation(32), 4)
    converted = generator.with_vocabulary(params, permutation.new_to_old)
    labels, codes = np.array([0, 2]), np.random.default_rng(1).integers(0, 32, (2, 9))
    before = module.apply({"params": params}, labels, codes)
    after = module.apply({"params": converted}, labels, permutation.rearrange_codes(codes))
    np.testing.assert_array_equal(np.asarray(after)[..., permutation.old_to_new], before)
    assert converted["norm"] is params["norm"]


def test_published_sizes_are_found_by_depth_and_width():
    assert [size_named(size.num_layers, size.dim) for size in SIZES.values()] == list(SIZES)
    assert size_named(5, 64) is None
