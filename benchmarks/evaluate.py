"""Speeds of the FID job, each beside a peer in the same run.

    python -m benchmarks.evaluate              Inception features, the Fréchet distance, precision and recall
    python -m benchmarks.evaluate --full       precision and recall of 10,000 x 50,000 features: minutes

With PyTorch, torchvision and pytorch-fid installed, its network computes features beside ours, with the same random
weights; scipy.linalg.sqrtm is the peer of the Fréchet distance.
"""

import argparse
import os
import resource
import statistics
import time

import jax
import numpy as np
import scipy.linalg

from iar_jax.interop import inception
from iar_jax.metrics.features import inception_features
from iar_jax.metrics.frechet import FeatureStatistics, frechet_distance
from iar_jax.metrics.precision_recall import precision_recall
from tests import random_inception

SHAPES = os.path.join(os.path.dirname(__file__), "..", "tests", "golden", "inception_shapes.json")


def seconds(function, repeats: int) -> float:
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def peer_network(weights):
    """pytorch-fid's network up to pool_3 as a function of a float32 NCHW batch of 299 x 299; None without PyTorch."""
    try:
        import pytorch_fid.inception as peer
        import torch
    except ImportError:
        return None
    # Its constructor fetches weights.
    peer.load_state_dict_from_url = lambda *_, **__: {name: torch.from_numpy(weights[name]) for name in weights}
    block = peer.InceptionV3.BLOCK_INDEX_BY_DIM[2048]
    network = peer.InceptionV3([block], resize_input=False, normalize_input=False).eval()

    def run(images):
        with torch.no_grad():
            return network(torch.from_numpy(images))[0].numpy()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--full", action="store_true")
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)

    weights = random_inception.state_dict(SHAPES)
    network = inception.load(weights)
    images = rng.integers(0, 256, (arguments.batch, 299, 299, 3)).astype(np.uint8)
    prepared = np.ascontiguousarray((images.astype(np.float32) - 128.0).transpose(0, 3, 1, 2) / 128.0)
    peer = peer_network(weights)
    first = inception_features(*network, images, arguments.batch)["pool"]
    ours, theirs = [], []
    if peer is not None:
        difference = np.abs(peer(prepared).reshape(len(images), -1) - first).max() / np.abs(first).max()
        print(f"pool_3 differs by {difference:.1e} of its largest entry")
    for _ in range(arguments.repeats):
        ours.append(seconds(lambda: inception_features(*network, images, arguments.batch), 1))
        if peer is not None:
            theirs.append(seconds(lambda: peer(prepared), 1))
    rate = arguments.batch / statistics.median(ours)
    print(f"Inception features   {rate:8.1f} images/s of 299 x 299, {jax.devices()[0].device_kind}")
    if theirs:
        ratio = statistics.median(b / a for a, b in zip(ours, theirs, strict=True))
        rate = arguments.batch / statistics.median(theirs)
        print(f"  pytorch-fid        {rate:8.1f} images/s; ours makes {ratio:.2f} x as many")

    dimension = 2048
    first, second = (
        FeatureStatistics(x.mean(0), np.cov(x, rowvar=False))
        for x in (rng.gamma(1.0, size=(3000, dimension)), rng.gamma(1.1, size=(3000, dimension)))
    )
    found = []

    def by_square_root():
        root = scipy.linalg.sqrtm(first.covariance @ second.covariance).real
        gap = np.sum(np.square(first.mean - second.mean))
        found.append(gap + np.trace(first.covariance + second.covariance - 2.0 * root))

    ratios, times = [], []
    for _ in range(3):
        ours_time = seconds(lambda: found.append(frechet_distance(*first, *second)), 1)
        ratios.append(seconds(by_square_root, 1) / ours_time)
        times.append(ours_time)
    print(
        f"Fréchet distance     {statistics.median(times):8.1f} s for {dimension} dimensions, "
        f"{statistics.median(ratios):.1f} x as fast as sqrtm; they differ by {abs(found[-1] / found[-2] - 1):.1e}"
    )

    sizes = (10_000, 50_000) if arguments.full else (2_000, 10_000)
    reference, samples = (rng.standard_normal((size, dimension)).astype(np.float32) for size in sizes)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    took = seconds(lambda: precision_recall(reference, samples), 1)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e6
    flops = 2.0 * dimension * (sizes[0] ** 2 + sizes[1] ** 2 + sizes[0] * sizes[1])
    print(
        f"precision and recall {took:8.1f} s for {sizes[0]:,} x {sizes[1]:,}, {flops / took / 1e9:.0f} GFLOP/s; "
        f"{grown:.2f} GB beside the features"
    )


if __name__ == "__main__":
    main()
