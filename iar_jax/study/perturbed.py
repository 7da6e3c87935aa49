"""pFID: how far reconstructions come from the training images when a share of their codes is replaced by near ones.

After RobusTok (arXiv 2503.08354), which finds that it tells of a tokenizer how good samples of its codes can be: a
generator errs now and then, and what its errors cost depends on where near codes decode to.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from iar_jax.codebook.code_distance import random_members
from iar_jax.codebook.distances import nearest_neighbours
from iar_jax.data import preprocessing
from iar_jax.data.codes import RawRecords, read_permutation
from iar_jax.data.image_source import ArraySource
from iar_jax.data.image_streams import SourceStream
from iar_jax.metrics import features
from iar_jax.models.quantizer import normalize
from iar_jax.models.tokenizer import load_tokenizer
from iar_jax.runtime import artifacts, sharding
from iar_jax.study.judge import Judge, frechet_distance

SHARES = (0.0, 0.1, 0.25, 0.5, 1.0)
NEIGHBOURS = 8


def perturbed_distances(config: ConfigDict, judge: Judge) -> list[dict[str, Any]]:
    """Fréchet distances of the val images' reconstructions for each of SHARES, with codes replaced by one of their
    NEIGHBOURS nearest, by another of their cluster, and by any.

    Args:
        config: its inputs name a tokenizer, its codes and a partition.
    """
    nowhere = epath.Path()
    inputs = artifacts.open_inputs(config.inputs, nowhere, "tokenizer", "codebook", "val_codes")
    model, params, _ = load_tokenizer(inputs["tokenizer"].directory, sharding.make_mesh(**config.mesh))
    permutation = read_permutation(inputs["codebook"])
    records = RawRecords(inputs["val_codes"].directory, model.codebook_size, config.data.cache_dir)
    codes = np.stack([records[i].codes[0] for i in range(len(records))])
    codebook = np.asarray(normalize(params["quantizer"]["codebook"]))
    near = np.asarray(nearest_neighbours(codebook, min(NEIGHBOURS, len(codebook) - 1))[0])
    rng = np.random.default_rng(0)
    ways: dict[str, Callable[[], np.ndarray]] = {
        "near": lambda: near[codes, rng.integers(0, near.shape[1], codes.shape)],
        "own_cluster": lambda: random_members(codes, permutation, rng),
        "any": lambda: rng.integers(0, len(codebook), codes.shape),
    }
    decode = jax.jit(lambda codes: model.apply({"params": params}, codes, method="decode_positions"))

    def distance(codes: np.ndarray) -> float:
        images = features.in_batches(
            lambda part: preprocessing.to_uint8(decode(part)), codes.astype(np.int32), config.evaluation.batch_size
        )
        return frechet_distance(judge, judge.features_of(SourceStream(ArraySource(images, np.zeros(len(images), int)))))

    whole = distance(codes)
    rows = [{"share": 0.0, **dict.fromkeys(ways, whole)}]
    for share in SHARES[1:]:
        replaced = rng.random(codes.shape) < share
        found = {way: distance(np.where(replaced, substitutes(), codes)) for way, substitutes in ways.items()}
        rows.append({"share": share, **found})
    return rows
