"""If these fail, docs/extending.md shows code that does not do what the page says."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from iar_jax.config.checks import check_config
from iar_jax.config.fields import default_config, defaults
from iar_jax.data.images import SOURCES, open_images
from iar_jax.generators.autoregressive.transformer import Transformer
from iar_jax.losses.cluster_loss import reference
from iar_jax.models.attention import ATTENTIONS
from iar_jax.training.schedules import SCHEDULES, learning_rate_of
from tests.stages import ROOT

PAGE = (ROOT / "docs" / "extending.md").read_text()


def code_of(heading):
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    return code


def run(heading):
    names = {}
    exec(code_of(heading), names)
    return names


def test_the_generator_is_the_one_that_is_taken_through_the_stages():
    assert code_of("A generator") == (ROOT / "tests" / "end_to_end" / "neighbour_kind.py").read_text()


def test_a_loss():
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.standard_normal((3, 16, 8)), jnp.float32)
    head = jnp.asarray(rng.standard_normal((8, 32)), jnp.float32)
    codes = jnp.asarray(rng.integers(0, 32, (3, 16)), jnp.int32)
    loss, _ = run("A loss")["loss_with_a_heavy_first_row"](hidden, head, codes, 4)
    losses = reference(hidden @ head, codes, (4, 16))
    each = losses.token_loss + losses.cluster_losses[0] + 0.5 * losses.cluster_losses[1]
    weights = np.where(np.arange(16) < 4, 2.0, 1.0)
    np.testing.assert_allclose(loss, np.average(np.asarray(each).mean(axis=0), weights=weights), rtol=1e-5)


def test_a_source(monkeypatch):
    monkeypatch.delitem(SOURCES, "noise", raising=False)
    run("A source of images")
    config = default_config()
    config.data.source = "noise:20"
    check_config(config)
    images = open_images(config.data)
    assert (len(images.train), len(images.val)) == (36, 4)
    for i in range(len(images.val)):
        record = images.val[i]
        assert (record["image"].min() >= 128) == (record["label"] == 1)
    del SOURCES["noise"]


def test_a_schedule(monkeypatch):
    monkeypatch.delitem(SCHEDULES, "inverse_sqrt", raising=False)
    run("A schedule")
    config = default_config()
    config.training.schedule = "inverse_sqrt"
    check_config(config)
    rate = learning_rate_of(ConfigDict(defaults("training") | {"schedule": "inverse_sqrt", "warmup_steps": 10}))
    np.testing.assert_allclose([rate(5), rate(10), rate(3010)], [5e-5, 1e-4, 5e-5], rtol=1e-5)
    del SCHEDULES["inverse_sqrt"]


@pytest.mark.parametrize("num_kv_heads", [None, 2])
def test_an_attention(num_kv_heads):
    run("An attention")
    found = {}
    for attention in ("blocks", "library"):
        model = Transformer(16, 3, 4, 32, 2, 4, 64, init_std=0.3, num_kv_heads=num_kv_heads, attention=attention)
        labels, codes = jnp.array([0, 1]), jnp.arange(32).reshape(2, 16) % 16
        params = model.init(jax.random.key(0), labels, codes)["params"]
        params = params | {"head": jax.random.normal(jax.random.key(1), (32, 16))}
        found[attention] = model.apply({"params": params}, labels, codes)
    np.testing.assert_allclose(found["library"], found["blocks"], atol=1e-4)
    del ATTENTIONS["library"]
