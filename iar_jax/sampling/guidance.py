"""From logits to the distribution that the next code is drawn from: guidance, temperature, top-k, top-p."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def guide(logits: Float[Array, "both V"], cfg_scale: Float[Array, ""]) -> Float[Array, "B V"]:
    """Classifier-free guidance, u + s * (c - u).

    Args:
        logits: conditional rows c first, then as many unconditional rows u.
        cfg_scale: s; 1 is no guidance.
    """
    conditional, unconditional = jnp.split(logits, 2)
    return unconditional + cfg_scale * (conditional - unconditional)


def keep_top_k(logits: Float[Array, "B V"], top_k: int) -> Float[Array, "B V"]:
    """Minus infinity for all but the k largest logits of a row; ties with the k-th stay. 0 keeps all."""
    if top_k <= 0 or top_k >= logits.shape[-1]:
        return logits
    threshold = jax.lax.top_k(logits, top_k)[0][:, -1:]
    return jnp.where(logits < threshold, -jnp.inf, logits)


def keep_top_p(logits: Float[Array, "B V"], top_p: float) -> Float[Array, "B V"]:
    """Minus infinity outside the smallest set of codes whose probabilities add up to at least p; 1 keeps all.

    The most probable code always stays.
    """
    if top_p >= 1.0:
        return logits
    descending = -jnp.sort(-logits, axis=-1)
    probability = jax.nn.softmax(descending, axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    threshold = jnp.min(jnp.where(before < top_p, descending, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits < threshold, -jnp.inf, logits)
