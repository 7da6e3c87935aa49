"""Balanced k-means: error, time and peak memory as the codebook grows, beside other packages where they are installed.

    python -m benchmarks.balanced_kmeans                 up to 16,384 codes
    python -m benchmarks.balanced_kmeans --largest=262144

Each line is a process of its own, so that memory is its own; times are without compilation (some two seconds), but
with it for the largest size, which runs once. All methods start from the same centroids, but for those with seeds of
their own. Peers are added by `pip install k-means-constrained` (min-cost-flow assignment) and `pip install ballot`
(optimal transport); what takes more than LIMIT seconds is stopped.
"""

import argparse
import importlib.util
import json
import math
import resource
import subprocess
import sys
import time

import numpy as np

SIZES = ((4096, 64), (16384, 128), (65536, 512), (262144, 2048))
METHODS = (
    "greedy",
    "optimal",
    "optimal, 4 k-means++ starts",
    "k-means-constrained",
    "ballot, its own start",
    "unconstrained k-means",
)
PEERS = {"k-means-constrained": "k_means_constrained", "ballot, its own start": "ballot"}

# Sizes beyond which a method takes many minutes, or 4 N x N float64 arrays of memory.
LARGEST_OF = {"k-means-constrained": 16384, "ballot, its own start": 4096, "optimal, 4 k-means++ starts": 65536}

RUN_ONCE_FROM = 200_000
LIMIT = 1200


def problem(num_vectors: int, num_clusters: int) -> tuple[np.ndarray, np.ndarray]:
    """Clustered unit vectors of dimension 8 and the indices of the first centroids."""
    rng = np.random.default_rng(1)
    centres = rng.standard_normal((300, 8))
    vectors = centres[rng.integers(0, 300, num_vectors)] + 0.6 * rng.standard_normal((num_vectors, 8))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    return vectors, rng.permutation(num_vectors)[:num_clusters]


def run(method: str, num_vectors: int, num_clusters: int) -> dict:
    vectors, init = problem(num_vectors, num_clusters)
    size = num_vectors // num_clusters
    extra = {}
    if method == "k-means-constrained":
        from k_means_constrained import KMeansConstrained

        model = KMeansConstrained(
            num_clusters, size_min=size, size_max=size, init=vectors[init], n_init=1, max_iter=100, n_jobs=1
        )
        start = time.monotonic()
        assignment = model.fit_predict(vectors)
        seconds, extra["iterations"] = time.monotonic() - start, int(model.n_iter_)
    elif method.startswith("ballot"):
        from ballot.estimator import BalancedKMeans

        start = time.monotonic()
        assignment = BalancedKMeans(num_clusters, algorithm="exact", max_iter=100, random_state=0).fit_predict(vectors)
        seconds = time.monotonic() - start
    elif method == "unconstrained k-means":
        from sklearn.cluster import KMeans

        model = KMeans(num_clusters, init=vectors[init], n_init=1, max_iter=300)
        start = time.monotonic()
        assignment = model.fit_predict(vectors)
        seconds, extra["iterations"] = time.monotonic() - start, int(model.n_iter_)
    else:
        import jax

        from iar_jax.codebook.balanced_kmeans import balanced_kmeans

        options: dict = {"assignment": method.split(",")[0]}
        if "starts" in method:
            options |= {"key": jax.random.key(0), "num_restarts": 4}
        else:
            options["initial_centroids"] = vectors[init]
        for _ in range(1 if num_vectors >= RUN_ONCE_FROM else 2):  # the first call compiles
            start = time.monotonic()
            found = jax.block_until_ready(balanced_kmeans(vectors, num_clusters, **options))
            seconds = time.monotonic() - start
        assignment = np.asarray(found.assignment)
        extra = {"iterations": int(found.num_iterations), "gap": float(found.gap)}
    groups = [vectors[assignment == cluster].astype(np.float64) for cluster in range(num_clusters)]
    error = sum(np.square(group - group.mean(axis=0)).sum() for group in groups if len(group))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"error": error, "seconds": seconds, "memory": memory, **extra}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--largest", type=int, default=16384)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        method, num_vectors, num_clusters = arguments.one
        print(json.dumps(run(method, int(num_vectors), int(num_clusters))))
        return
    print(
        f"{'codes':>8}{'clusters':>9}  {'method':30}{'error':>11}{'time, s':>10}{'GB':>7}{'iterations':>11}{'gap':>10}"
    )
    for num_vectors, num_clusters in SIZES:
        if num_vectors > arguments.largest:
            continue
        for method in METHODS:
            if num_vectors > LARGEST_OF.get(method, num_vectors):
                continue
            if method in PEERS and importlib.util.find_spec(PEERS[method]) is None:
                continue
            command = [
                sys.executable,
                "-m",
                "benchmarks.balanced_kmeans",
                "--one",
                method,
                str(num_vectors),
                str(num_clusters),
            ]
            try:
                done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=LIMIT)
            except subprocess.TimeoutExpired:
                print(f"{num_vectors:>8}{num_clusters:>9}  {method:30}not finished in {LIMIT} s", flush=True)
                continue
            if done.returncode:
                print(f"{num_vectors:>8}{num_clusters:>9}  {method:30}failed: {done.stderr.strip().splitlines()[-1]}")
                continue
            row = json.loads(done.stdout.splitlines()[-1])
            gap = "–" if math.isnan(row.get("gap", math.nan)) else f"{row['gap']:.1e}"
            print(
                f"{num_vectors:>8}{num_clusters:>9}  {method:30}{row['error']:>11.2f}{row['seconds']:>10.2f}"
                f"{row['memory']:>7.2f}{row.get('iterations', '–'):>11}{gap:>10}",
                flush=True,
            )


if __name__ == "__main__":
    main()
