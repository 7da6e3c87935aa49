"""If these fail, stages are told wrong things about the masked transformer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import imagenet, mnist
from iar_jax.codebook.permutation import Permutation
from iar_jax.config.checks import check_config
from iar_jax.config.fields import defaults
from iar_jax.generators.code_layout import CodeLayout
from iar_jax.generators.generator import Generator, build_generator
from iar_jax.generators.masked.generator import Masked
from iar_jax.generators.masked.masking import draw_masks
from iar_jax.generators.masked.transformer import MaskedTransformer
from iar_jax.generators.settings import Facts, Objective, Weights
from iar_jax.losses.cluster_loss import reference
from iar_jax.runtime.errors import UserError
from tests.generators.masked.test_transformer import initial, small


def published_large(**fields):
    section = imagenet.get_config("masked-L,384").model.to_dict() | fields
    return build_generator(section, Facts(16384, 1000, CodeLayout.square(24)))


def test_the_published_model_has_its_number_of_parameters():
    shapes = jax.eval_shape(published_large(mask_output=True).init, jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 479_984_641
    assert published_large().network.hidden_dim == 2816


def test_flops_are_those_that_the_compiler_counts():
    network = MaskedTransformer(64, 5, 8, 48, 1, 4, 128, attention_block=1024)
    generator = Masked(network)
    params = initial(network)
    codes = jnp.zeros((2, 64), jnp.int32)
    compiled = jax.jit(lambda p: network.apply({"params": p}, jnp.zeros(2, jnp.int32), codes)).lower(params).compile()
    counted = compiled.cost_analysis()["flops"]
    # Beside products it counts norms, softmax and the like: some ten operations a number.
    assert generator.flops(2) / 3 < counted < 1.15 * generator.flops(2) / 3


def test_a_config_and_facts_make_the_generator_that_they_describe():
    section = defaults("model") | {"kind": "masked", "dim": 64, "num_heads": 8, "num_layers": 3, "num_registers": 2}
    facts = Facts(32, 5, CodeLayout.square(4))
    generator = build_generator(section, facts, Objective((4, 16)))
    assert isinstance(generator, Generator)
    assert generator.facts == facts
    assert generator.splits["heads"] == (8, "tensor")
    assert generator.splits["clusters of codes"] == (2, "tensor")
    shapes = jax.eval_shape(generator.init, jax.random.key(0))
    assert shapes["layers"]["attention"]["wqkv"].value.shape == (3, 64, 8, 3, 8)
    assert shapes["register_table"].value.shape == (2, 64)
    assert "mask_bias" not in shapes
    assert all(jax.tree.leaves(generator.decays(shapes)))


def batch_of(rows=6, seed=0):
    rng = np.random.default_rng(seed)
    return {"codes": jnp.asarray(rng.integers(0, 32, (rows, 16))), "label": jnp.asarray(rng.integers(0, 5, rows))}


@pytest.mark.parametrize("unmasked_weight", [1.0, 0.1, 0.0])
@pytest.mark.parametrize("mean_of_pictures", [False, True])
def test_the_loss_is_of_the_positions_that_count(unmasked_weight, mean_of_pictures):
    module, batch = small(), batch_of()
    params = initial(module)
    objective = Objective((4,), unmasked_weight=unmasked_weight, mean_of_pictures=mean_of_pictures, mask_draw="counted")
    generator, key = Masked(module, objective), jax.random.key(7)
    loss, metrics = generator.loss(params, batch, key, Weights(jnp.array([0.5])))
    # The same draw again.
    masked = draw_masks(jax.random.split(jax.random.split(key)[0], 6), 16, "arccos", "counted")
    inputs = jnp.where(masked, module.mask, batch["codes"])
    found = reference(module.apply({"params": params}, batch["label"], inputs), batch["codes"], (4,))
    each = np.asarray(found.token_loss + 0.5 * found.cluster_losses[0], np.float64)
    weights = np.where(masked, 1.0, unmasked_weight)
    means = (weights * each).sum(axis=1) / weights.sum(axis=1)
    expected = means.mean() if mean_of_pictures else (weights * each).sum() / weights.sum()
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(metrics["token_loss"], np.asarray(found.token_loss)[masked].mean(), rtol=1e-5)


def test_other_keys_mask_other_positions_and_equal_ones_the_same():
    generator, batch = Masked(small(), Objective((4,))), batch_of()
    params = initial(generator.network)
    losses = [float(generator.loss(params, batch, jax.random.key(i), Weights(jnp.zeros(1)))[0]) for i in (0, 1, 0)]
    assert losses[0] == losses[2] != losses[1]


def test_scores_of_a_picture_do_not_depend_on_its_batch():
    generator, batch = Masked(small(), Objective((4,))), batch_of()
    params = initial(generator.network)
    together = generator.score(params, batch)
    assert set(together) == {"token_loss", "cluster_loss", "token_accuracy", "cluster_accuracy"}
    some = generator.score(params, {name: rows[3:] for name, rows in batch.items()})
    for name, values in some.items():
        np.testing.assert_allclose(values, together[name][3:], rtol=2e-5, atol=1e-6)


def test_ids_in_another_order_are_the_same_model():
    module = small(mask_output=True)
    params, generator = initial(module), Masked(module)
    permutation = Permutation.from_order(np.random.default_rng(0).permutation(32), 4)
    converted = generator.with_vocabulary(params, permutation.new_to_old)
    codes = np.random.default_rng(1).integers(0, 32, (2, 16))
    masked = np.random.default_rng(2).random((2, 16)) < 0.5
    labels = np.array([0, 2])
    before = module.apply({"params": params}, labels, np.where(masked, 32, codes))
    after = module.apply({"params": converted}, labels, np.where(masked, 32, permutation.rearrange_codes(codes)))
    np.testing.assert_array_equal(np.asarray(after)[..., permutation.old_to_new], before[..., :32])
    np.testing.assert_array_equal(after[..., 32], before[..., 32])


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("sampling.mask_steps", 65, "mask_steps is 65, more than the 64 positions of a picture"),
        ("sampling.cfg_schedule", "iar2", "cfg_schedule is iar2, which takes the attention to a class token"),
        ("model.num_kv_heads", 2, "num_kv_heads is 2, and a masked model has one for each head"),
        ("model.num_heads", 128, "num_heads is 128, more than config.model.dim"),
        ("training.mask_schedule", "sine", "allowed are 'arccos', 'cosine'"),
        ("training.label_smoothing", 1.0, "label_smoothing is 1.0; allowed are numbers in"),
        ("sampling.mask_order", "random", "allowed are 'halton', 'halton_rolled', 'confidence'"),
    ],
)
def test_what_does_not_go_together_is_refused(field, value, message):
    config = mnist.get_config("masked")
    check_config(config)
    section, name = field.split(".")
    config[section][name] = value
    with pytest.raises(UserError, match=message):
        check_config(config)
