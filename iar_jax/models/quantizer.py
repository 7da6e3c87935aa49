"""Nearest-neighbour vector quantisation with an L2-normalised codebook.

Look-up and decoding both use the normalised codebook row, as LlamaGen's tokenizer does.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


class Quantized(NamedTuple):
    """What the quantizer returns.

    Attributes:
        vectors: unit code vectors [..., d], straight-through: their gradient goes to the input.
        unit_encoded: the normalised input [..., d].
        codes: ids of the nearest codes [...], int32 in [0, N).
        codebook_loss: scalar, mean squared distance, gradient to the codebook alone.
        commitment_loss: scalar, the same distance, gradient to the encoder alone (β not applied).
    """

    vectors: Float[Array, "... d"]
    unit_encoded: Float[Array, "... d"]
    codes: Int[Array, "..."]
    codebook_loss: Float[Array, ""]
    commitment_loss: Float[Array, ""]


def normalize(vectors: Float[Array | np.ndarray, "*B d"]) -> Float[Array, "*B d"]:
    """Scales vectors [..., d] to unit L2 norm; a zero vector stays zero."""
    vectors = jnp.asarray(vectors)
    norm = jnp.sqrt(jnp.sum(jnp.square(vectors), axis=-1, keepdims=True))
    return vectors / jnp.maximum(norm, 1e-12)


def nearest_codes(unit_vectors: Float[Array, "*B d"], unit_codebook: Float[Array, "N d"]) -> Int[Array, "*B"]:
    """Ids, int32 in [0, N), of the nearest codes; the lowest id on ties. Both arguments have unit rows."""
    distance = (
        jnp.sum(jnp.square(unit_vectors), axis=-1, keepdims=True)
        + jnp.sum(jnp.square(unit_codebook), axis=-1)
        - 2.0 * jnp.matmul(unit_vectors, unit_codebook.T, precision="highest")
    )
    return jnp.argmin(distance, axis=-1).astype(jnp.int32)


class Quantizer(nn.Module):
    """A codebook [codebook_size, codebook_dim] and its look-up (LlamaGen's `VectorQuantizer` with L2 norm)."""

    codebook_size: int
    codebook_dim: int

    def setup(self):
        def unit_uniform(key, shape):
            return normalize(jax.random.uniform(key, shape, minval=-1.0, maxval=1.0))

        self.codebook = self.param("codebook", unit_uniform, (self.codebook_size, self.codebook_dim))

    def __call__(self, encoded: Float[Array, "*B d"]) -> Quantized:
        """Quantises encoder outputs [..., d], which need not be normalised."""
        unit_encoded = normalize(encoded.astype(jnp.float32))
        unit_codebook = normalize(self.codebook)
        codes = nearest_codes(jax.lax.stop_gradient(unit_encoded), jax.lax.stop_gradient(unit_codebook))
        chosen = unit_codebook[codes]
        codebook_loss = jnp.mean(jnp.square(chosen - jax.lax.stop_gradient(unit_encoded)))
        commitment_loss = jnp.mean(jnp.square(jax.lax.stop_gradient(chosen) - unit_encoded))
        straight_through = unit_encoded + jax.lax.stop_gradient(chosen - unit_encoded)
        return Quantized(straight_through, unit_encoded, codes, codebook_loss, commitment_loss)

    def lookup(self, codes: Int[Array | np.ndarray, "*B"]) -> Float[Array, "*B d"]:
        """Unit code vectors [..., d] of codes [...]."""
        return normalize(self.codebook)[codes]
