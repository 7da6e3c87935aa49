"""A codebook's clusters and vectors where there is none, for programs that are compiled or timed alone."""

import numpy as np
from ml_collections import ConfigDict

from iar_jax.config.fields import UNEQUAL
from iar_jax.generators.settings import needs_vectors
from iar_jax.losses.cluster_loss import Clusters


def stand_in(config: ConfigDict) -> tuple[tuple[Clusters, ...], np.ndarray | None]:
    """Clusters and, where the training asks for them, unit code vectors, float32 [N, d]: programs depend on their
    shapes, and on how many unequal clusters there are."""
    rng, size = np.random.default_rng(0), config.tokenizer.codebook_size
    clusters: tuple[Clusters, ...] = tuple(config.codebook.cluster_sizes)
    if config.codebook.assignment == UNEQUAL:
        cuts = rng.choice(np.arange(1, size), size // config.codebook.cluster_sizes[0] - 1, replace=False)
        clusters = ((0, *sorted(cuts.tolist()), size),)
    if not needs_vectors(config.training):
        return clusters, None
    vectors = rng.standard_normal((size, config.tokenizer.codebook_dim)).astype(np.float32)
    return clusters, vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
