"""The Inception score, as the ADM suite computes it."""

import numpy as np
from jaxtyping import Float


def inception_score(logits: Float[np.ndarray, "N C"], split_size: int) -> float:
    """Mean over splits of exp(mean KL(p(y|x) || p(y))), with p(y) the split's own mean.

    Splits are consecutive, so that the score depends on the order: samples sorted by class score far too low. A last
    split that is not full counts like the others, as in the ADM suite, which makes splits of 5,000.

    Args:
        logits: without bias, over the 1008 outputs of the network of 2015-12-05.

    Raises:
        ValueError: no logits, or a split size below one.
    """
    if not len(logits) or split_size < 1:
        raise ValueError(f"a score needs logits and splits of one at least; there are {len(logits)} and {split_size}")
    scores = []
    for start in range(0, len(logits), split_size):
        part = np.asarray(logits[start : start + split_size], np.float64)
        part = part - part.max(axis=1, keepdims=True)
        log_p = part - np.log(np.exp(part).sum(axis=1, keepdims=True))
        p = np.exp(log_p)
        # A class that no image has: zero times a logarithm, which counts as zero.
        log_mean = np.log(np.maximum(p.mean(axis=0), np.finfo(np.float64).tiny))
        divergence = np.sum(p * (log_p - log_mean), axis=1)
        scores.append(np.exp(divergence.mean()))
    return float(np.mean(scores))
