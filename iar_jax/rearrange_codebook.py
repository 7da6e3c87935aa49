"""Stage 2: tokenizer -> balanced clusters -> permutation of its codebook.

python -m iar_jax.rearrange_codebook --config=configs/mnist.py --workdir=runs/mnist
"""

import io
import time
from typing import Any

import jax
import matplotlib
import numpy as np
from etils import epath
from jaxtyping import UInt8
from ml_collections import ConfigDict

from iar_jax.codebook.balanced_kmeans import BalancedClustering, nested_clusters, unconstrained_inertia
from iar_jax.codebook.code_distance import neighbours_in_own_cluster
from iar_jax.codebook.ordering import ORDERS, path_length, spanning_tree_length
from iar_jax.codebook.permutation import Permutation, save_permutation
from iar_jax.config import command_line
from iar_jax.config.relevance import relevant
from iar_jax.data import image_grids, preprocessing
from iar_jax.data.codes import permutation_fingerprint, read_permutation
from iar_jax.models.quantizer import normalize
from iar_jax.models.tokenizer import LoadedTokenizer, load_tokenizer
from iar_jax.runtime import artifacts, lock, sharding
from iar_jax.runtime.errors import UserError, refusal
from iar_jax.runtime.files import write_bytes, writing
from iar_jax.runtime.progress import say

matplotlib.use("Agg")
import matplotlib.pyplot as plt

READS = ("seed", "inputs", "mesh", "codebook")

CLUSTERS_SHOWN = 16
MEMBERS_SHOWN = 32
NEIGHBOURS = 10


def run(config: ConfigDict, workdir: epath.Path) -> None:
    """Clusters the tokenizer's normalised codes and leaves permutation.npz, clusters.png and
    distances.png in workdir/codebook."""
    directory = workdir / "codebook"
    inputs = artifacts.open_inputs(config.inputs, workdir, "tokenizer")
    made_by = relevant(config, ("seed", "codebook"))
    given = artifacts.fingerprints(inputs)
    if sound(artifacts.finished(directory, made_by, given), directory):
        say(f"rearrange_codebook: done, in {directory}")
        return
    start = time.monotonic()
    with lock.hold(directory):
        command_line.save_config(config, workdir)
        if artifacts.begin(directory, "rearrange_codebook", made_by, given):
            artifacts.reopen(directory)
        tokenizer = load_tokenizer(inputs["tokenizer"].directory, sharding.make_mesh(**config.mesh))
        raw_codebook = tokenizer.params["quantizer"]["codebook"]
        codebook = np.asarray(normalize(raw_codebook))
        levels, order, permutation = rearranged(codebook, config.codebook, config.seed)
        codebook_fingerprint = artifacts.fingerprint_arrays(raw_codebook)
        with writing(directory / "permutation.npz") as local:
            save_permutation(local, permutation, codebook_fingerprint)
        within = distances_within(codebook, order, permutation.cluster_size)
        among_all = distances_among_all(codebook)
        write_bytes(directory / "distances.png", distance_histogram(within, among_all))
        image_grids.write_png(directory / "clusters.png", picture_of(tokenizer, order, permutation.cluster_size))
        figures = measured(codebook, order, permutation, levels)
        figures |= {"mean_distance_within": float(np.mean(within))}
        figures |= {"mean_distance_among_all": float(np.mean(among_all))}
        figures |= {"codebook_fingerprint": codebook_fingerprint, "seconds": time.monotonic() - start}
        artifacts.finish(directory, permutation_fingerprint(permutation), figures)
    announce(figures, permutation, directory)


def sound(found: artifacts.Metadata | None, directory: epath.Path) -> bool:
    """Whether a finished codebook is there whose permutation is the one that was made; says where it is not."""
    if found is None:
        return False
    problem = refusal(lambda: read_permutation(artifacts.Artifact(directory, found)))
    if problem:
        say(f"WARNING: {problem}; it is made again")
    return not problem


def rearranged(
    codebook: np.ndarray, section: ConfigDict, seed: int
) -> tuple[list[BalancedClustering], np.ndarray, Permutation]:
    """The levels of clusters of unit code vectors, the old ids in their new order, and the permutation.

    Args:
        section: config.codebook.

    Raises:
        UserError: a cluster size does not divide the codebook.
    """
    sizes = tuple(section.cluster_sizes)
    if len(codebook) % sizes[-1]:
        raise UserError(
            f"config.codebook.cluster_sizes is {sizes}: {sizes[-1]} does not divide the {len(codebook)} codes of the "
            "tokenizer"
        )
    levels = nested_clusters(
        codebook,
        sizes,
        key=jax.random.key(seed),
        assignment=section.assignment,
        max_iterations=section.max_iterations,
        num_restarts=section.num_restarts,
    )
    order = ORDERS[section.order](codebook, *(np.asarray(level.assignment) for level in levels))
    return levels, order, Permutation.from_order(order, sizes[0], sizes[1:])


def picture_of(tokenizer: LoadedTokenizer, order: np.ndarray, cluster_size: int) -> UInt8[np.ndarray, "Y X 3"]:
    """The decoded patches of the members of some clusters, one row a cluster."""
    patches = decoded_patches(tokenizer, order[: min(CLUSTERS_SHOWN * cluster_size, len(order))])
    shown = patches.reshape(-1, cluster_size, *patches.shape[1:])[:, :MEMBERS_SHOWN]
    scale = max(1, 24 // shown.shape[2])
    return image_grids.image_grid(shown.reshape(-1, *shown.shape[2:]), columns=shown.shape[1], scale=scale)


def measured(
    codebook: np.ndarray, order: np.ndarray, permutation: Permutation, levels: list[BalancedClustering]
) -> dict[str, Any]:
    """The figures of the clusters, of the finest level where there are several, and of the order."""
    clustering, gap = levels[0], float(levels[0].gap)
    return {
        "inertia": float(clustering.inertia),
        "gap": None if np.isnan(gap) else gap,  # greedy assignments have no certificate
        "unconstrained_inertia": float(unconstrained_inertia(codebook, clustering.centroids)),
        "inertia_of_one_cluster": float(np.sum(np.square(codebook - codebook.mean(axis=0)))),
        "inertia_of_coarser_levels": [coarse_inertia(codebook, order, size) for size in permutation.coarser_sizes],
        "neighbours_in_own_cluster": neighbours_in_own_cluster(codebook, permutation.cluster_of_old, NEIGHBOURS),
        "path_length": path_length(codebook, order),
        "path_length_before": path_length(codebook, np.arange(len(order))),
        "spanning_tree_length": spanning_tree_length(codebook),
        "num_clusters": len(codebook) // permutation.cluster_size,
        "num_iterations": int(clustering.num_iterations),
        "converged": bool(clustering.converged),
    }


def coarse_inertia(codebook: np.ndarray, order: np.ndarray, cluster_size: int) -> float:
    """Within-cluster sum of squared distances of codes to the means of a level's clusters."""
    groups = codebook[order].reshape(-1, cluster_size, codebook.shape[1]).astype(np.float64)
    return float(np.sum(np.square(groups - groups.mean(axis=1, keepdims=True))))


def announce(figures: dict[str, Any], permutation: Permutation, directory: epath.Path) -> None:
    """The figures for a person."""
    inertia, total = figures["inertia"], figures["inertia_of_one_cluster"]
    sizes = " in ".join(
        f"{len(permutation.old_to_new) // size} clusters of {size}" for size in permutation.cluster_sizes
    )
    say(
        f"rearrange_codebook: {sizes}, within-cluster squared error {inertia:.1f}: {inertia / total:.0%} of one "
        f"cluster's, and {inertia / figures['unconstrained_inertia'] - 1.0:+.2%} to k-means without balance from there"
    )
    chance = (permutation.cluster_size - 1) / max(len(permutation.old_to_new) - 1, 1)
    say(
        f"{figures['neighbours_in_own_cluster']:.0%} of the {NEIGHBOURS} nearest neighbours of a code are in its "
        f"cluster ({chance:.1%} by chance); steps between ids sum to {figures['path_length']:.0f}, "
        f"{figures['path_length_before']:.0f} before, no path has less than {figures['spanning_tree_length']:.0f}"
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


def decoded_patches(tokenizer: LoadedTokenizer, codes: np.ndarray) -> np.ndarray:
    """What each code paints: the middle patch [f, f, 3] of a decoded 3 x 3 square of it, uint8."""
    model, params, _ = tokenizer
    decode = jax.jit(lambda codes: model.apply({"params": params}, codes, method="decode_codes"))
    squares = np.broadcast_to(codes[:, None, None], (len(codes), 3, 3)).astype(np.int32)
    images = np.concatenate(
        [preprocessing.to_uint8(decode(part)) for part in np.array_split(squares, -(-len(codes) // 256))]
    )
    f = model.downsampling
    return images[:, f : 2 * f, f : 2 * f]


if __name__ == "__main__":
    command_line.main(run, READS)
