"""If these fail, gradients are clipped otherwise than by their global norm."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from iar_jax.training.optimizer import clip_by_global_norm


@pytest.mark.parametrize("max_norm", [0.5, 1e3])
def test_clipping_is_optax_s(max_norm):
    rng = np.random.default_rng(0)
    grads = {"a": jnp.asarray(rng.standard_normal((5, 3))), "b": jnp.asarray(rng.standard_normal(4))}
    ours, theirs = clip_by_global_norm(max_norm), optax.clip_by_global_norm(max_norm)
    found, _ = ours.update(grads, ours.init(grads))
    expected, _ = theirs.update(grads, theirs.init(grads))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), found, expected)


def test_gradients_of_zero_stay_zero():
    optimizer = clip_by_global_norm(1.0)
    found, _ = optimizer.update({"a": jnp.zeros(3)}, optimizer.init({"a": jnp.zeros(3)}))
    np.testing.assert_array_equal(found["a"], 0.0)
