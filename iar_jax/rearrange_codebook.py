"""Stage 2: tokenizer -> balanced clusters -> permutation of its codebook.

python -m iar_jax.rearrange_codebook --config=configs/mnist.py --workdir=runs/mnist
"""

import io
import time

import jax
import matplotlib
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from iar_jax.codebook.balanced_kmeans import balanced_kmeans, unconstrained_inertia
from iar_jax.codebook.code_distance import neighbours_in_own_cluster
from iar_jax.codebook.ordering import order_along_path, order_by_cluster, path_length, spanning_tree_length
from iar_jax.codebook.permutation import Permutation, save_permutation
from iar_jax.data import pictures, preprocessing
from iar_jax.data.codes import permutation_fingerprint
from iar_jax.models.build import load_tokenizer
from iar_jax.models.quantizer import normalize
from iar_jax.runtime import artifacts, command_line, lock, sharding
from iar_jax.runtime.errors import UserError
from iar_jax.runtime.progress import say

matplotlib.use("Agg")
import matplotlib.pyplot as plt

CLUSTERS_SHOWN = 16
MEMBERS_SHOWN = 32
NEIGHBOURS = 10


def run(config: ConfigDict, workdir: epath.Path) -> None:
    """Clusters the tokenizer's normalised codes and leaves permutation.npz, clusters.png and
    distances.png in workdir/codebook."""
    directory = workdir / "codebook"
    tokenizer_directory = artifacts.input_directory(config, workdir, "tokenizer", "tokenizer")
    tokenizer = artifacts.require(tokenizer_directory, "train_tokenizer")
    relevant = artifacts.relevant_config(config, ("seed", "codebook"))
    if artifacts.begin(directory, "rearrange_codebook", relevant, {"tokenizer": tokenizer.fingerprint}):
        say(f"rearrange_codebook: done, in {directory}")
        return
    with lock.hold(directory):
        rearrange(config, directory, tokenizer_directory)


def rearrange(config: ConfigDict, directory: epath.Path, tokenizer_directory: epath.Path) -> None:
    """Makes the artifact that `run` has begun."""
    start = time.monotonic()
    mesh = sharding.make_mesh(**config.mesh)
    model, params, _ = load_tokenizer(tokenizer_directory, mesh)
    cluster_size = config.codebook.cluster_size
    if model.codebook_size % cluster_size:
        raise UserError(
            f"config.codebook.cluster_size is {cluster_size}, which does not divide the {model.codebook_size} codes of "
            f"{tokenizer_directory}"
        )

    codebook = np.asarray(normalize(params["quantizer"]["codebook"]))
    clustering = balanced_kmeans(
        codebook,
        model.codebook_size // cluster_size,
        key=jax.random.key(config.seed),
        assignment=config.codebook.assignment,
        max_iterations=config.codebook.max_iterations,
        num_restarts=config.codebook.num_restarts,
    )
    ordered = {"chain": order_by_cluster, "path": order_along_path}[config.codebook.order]
    order = ordered(codebook, np.asarray(clustering.assignment))
    permutation = Permutation.from_order(order, cluster_size)

    codebook_fingerprint = artifacts.fingerprint_arrays(params["quantizer"]["codebook"])
    save_permutation(directory / "permutation.npz", permutation, codebook_fingerprint)
    patches = decoded_patches(model, params, order[: min(CLUSTERS_SHOWN * cluster_size, len(order))])
    shown = patches.reshape(-1, cluster_size, *patches.shape[1:])[:, :MEMBERS_SHOWN]
    scale = max(1, 24 // shown.shape[2])
    picture = pictures.image_grid(shown.reshape(-1, *shown.shape[2:]), columns=shown.shape[1], scale=scale)
    pictures.write_png(directory / "clusters.png", picture)
    within, among_all = distances_within(codebook, order, cluster_size), distances_among_all(codebook)
    artifacts.write_bytes(directory / "distances.png", distance_histogram(within, among_all))
    total = float(np.sum(np.square(codebook - codebook.mean(axis=0))))
    unconstrained = float(unconstrained_inertia(codebook, clustering.centroids))
    figures = {
        "inertia": float(clustering.inertia),
        "gap": None if config.codebook.assignment == "greedy" else float(clustering.gap),
        "unconstrained_inertia": unconstrained,
        "inertia_of_one_cluster": total,
        "mean_distance_within": float(np.mean(within)),
        "mean_distance_among_all": float(np.mean(among_all)),
        "neighbours_in_own_cluster": neighbours_in_own_cluster(codebook, permutation.cluster_of_old, NEIGHBOURS),
        "path_length": path_length(codebook, order),
        "path_length_before": path_length(codebook, np.arange(len(order))),
        "spanning_tree_length": spanning_tree_length(codebook),
        "num_clusters": model.codebook_size // cluster_size,
        "num_iterations": int(clustering.num_iterations),
        "converged": bool(clustering.converged),
        "codebook_fingerprint": codebook_fingerprint,
        "seconds": time.monotonic() - start,
    }
    artifacts.finish(directory, permutation_fingerprint(permutation), figures)
    say(
        f"rearrange_codebook: {figures['num_clusters']} clusters of {cluster_size}, within-cluster squared error "
        f"{figures['inertia']:.1f}: {figures['inertia'] / total:.0%} of one cluster's, and "
        f"{figures['inertia'] / unconstrained - 1.0:+.2%} to k-means without balance from there"
    )
    say(
        f"{figures['neighbours_in_own_cluster']:.0%} of the {NEIGHBOURS} nearest neighbours of a code are in its "
        f"cluster ({(cluster_size - 1) / max(len(order) - 1, 1):.1%} by chance); steps between ids sum to "
        f"{figures['path_length']:.0f}, {figures['path_length_before']:.0f} before, no path has less than "
        f"{figures['spanning_tree_length']:.0f}"
    )
    say(f"pictures in {directory / 'clusters.png'}; distances inside clusters in {directory / 'distances.png'}")


def distances_within(codebook: np.ndarray, order: np.ndarray, cluster_size: int) -> np.ndarray:
    """Euclidean distances of all pairs of codes that share a cluster; one zero where clusters have one code."""
    pairs = np.triu_indices(cluster_size, 1)
    if not len(pairs[0]):
        return np.zeros(1)
    groups = codebook[order].reshape(-1, cluster_size, codebook.shape[1]).astype(np.float64)
    return np.concatenate([np.linalg.norm(group[pairs[0]] - group[pairs[1]], axis=1) for group in groups])


def distances_among_all(codebook: np.ndarray) -> np.ndarray:
    """Euclidean distances of a million pairs of codes, drawn at random; one zero where there is one code."""
    if len(codebook) == 1:
        return np.zeros(1)
    rng = np.random.default_rng(0)
    first, step = rng.integers(0, len(codebook), 1_000_000), rng.integers(1, len(codebook), 1_000_000)
    second = (first + step) % len(codebook)
    return np.linalg.norm(codebook[first] - codebook[second], axis=1)


def distance_histogram(within: np.ndarray, among_all: np.ndarray) -> bytes:
    """PNG of both distributions."""
    fig, axes = plt.subplots(figsize=(6.4, 4), layout="constrained")
    bins = np.linspace(0.0, max(within.max(), among_all.max(), 1e-6), 80).tolist()
    axes.hist(among_all, bins, density=True, alpha=0.5, label="any two codes")
    axes.hist(within, bins, density=True, alpha=0.7, label="two codes of one cluster")
    axes.set(title="distances between codes", xlabel="Euclidean distance of unit vectors", ylabel="density")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", dpi=150)
    plt.close(fig)
    return buffer.getvalue()


def decoded_patches(model, params, codes: np.ndarray) -> np.ndarray:
    """What each code paints: the middle patch [f, f, 3] of a decoded 3 x 3 square of it, uint8."""
    decode = jax.jit(lambda codes: model.apply({"params": params}, codes, method="decode_codes"))
    squares = np.broadcast_to(codes[:, None, None], (len(codes), 3, 3)).astype(np.int32)
    images = np.concatenate(
        [preprocessing.to_uint8(decode(part)) for part in np.array_split(squares, -(-len(codes) // 256))]
    )
    f = model.downsampling
    return images[:, f : 2 * f, f : 2 * f]


if __name__ == "__main__":
    command_line.main(run)
