"""Stage 2: tokenizer -> balanced clusters -> permutation of its codebook.

python -m iar_jax.rearrange_codebook --config=configs/mnist.py --workdir=runs/mnist
"""

import io
import itertools
import time
from collections.abc import Callable
from typing import Any

import jax
import matplotlib
import numpy as np
from etils import epath
from jaxtyping import UInt8
from ml_collections import ConfigDict
from scipy.spatial.distance import pdist

from iar_jax.codebook.average_linkage import average_linkage
from iar_jax.codebook.balanced_kmeans import BalancedClustering, clustering_of, nested_clusters, unconstrained_inertia
from iar_jax.codebook.code_distance import neighbours_in_own_cluster
from iar_jax.codebook.ordering import ORDERS, path_length, spanning_tree_length
from iar_jax.codebook.permutation import Permutation, invert, save_permutation
from iar_jax.config import command_line
from iar_jax.config.fields import UNEQUAL
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
PAIRS = 1_000_000


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
        points = POINTS[config.codebook.points](tokenizer, codebook)
        levels, order, permutation = rearranged(points, config.codebook, config.seed)
        codebook_fingerprint = artifacts.fingerprint_arrays(raw_codebook)
        with writing(directory / "permutation.npz") as local:
            save_permutation(local, permutation, codebook_fingerprint)
        within = distances_within(points, order, permutation.bounds)
        among_all = distances_among_all(points)
        write_bytes(directory / "distances.png", distance_histogram(within, among_all))
        image_grids.write_png(directory / "clusters.png", picture_of(tokenizer, order, permutation.bounds))
        figures = measured(points, order, permutation, levels)
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
    points: np.ndarray, section: ConfigDict, seed: int
) -> tuple[list[BalancedClustering], np.ndarray, Permutation]:
    """The levels of clusters of the codes' points, the old ids in their new order, and the permutation.

    Args:
        points: [N, d], one of each code.
        section: config.codebook.

    Raises:
        UserError: a cluster size does not divide the codebook.
    """
    sizes = tuple(section.cluster_sizes)
    if len(points) % sizes[-1]:
        raise UserError(
            f"config.codebook.cluster_sizes is {sizes}: {sizes[-1]} does not divide the {len(points)} codes of the "
            "tokenizer"
        )
    if section.assignment == UNEQUAL:
        order, offsets = average_linkage(points, len(points) // sizes[0])
        permutation = Permutation(invert(order), 0, offsets=offsets)
        return [clustering_of(points, permutation.cluster_of_old)], order, permutation
    levels = nested_clusters(
        points,
        sizes,
        key=jax.random.key(seed),
        assignment=section.assignment,
        max_iterations=section.max_iterations,
        num_restarts=section.num_restarts,
    )
    order = ORDERS[section.order](points, *(np.asarray(level.assignment) for level in levels))
    return levels, order, Permutation.from_order(order, sizes[0], sizes[1:])


def picture_of(tokenizer: LoadedTokenizer, order: np.ndarray, bounds: np.ndarray) -> UInt8[np.ndarray, "Y X 3"]:
    """The decoded patches of the members of some clusters, one row a cluster."""
    rows = [order[start:end][:MEMBERS_SHOWN] for start, end in itertools.pairwise(bounds[: CLUSTERS_SHOWN + 1])]
    columns = max(map(len, rows))
    patches = decoded_patches(tokenizer, np.concatenate(rows))
    shown = np.zeros((len(rows), columns, *patches.shape[1:]), np.uint8)
    shown[np.arange(columns) < np.array([len(row) for row in rows])[:, None]] = patches
    scale = max(1, 24 // shown.shape[2])
    return image_grids.image_grid(shown.reshape(-1, *shown.shape[2:]), columns=columns, scale=scale)


def measured(
    points: np.ndarray, order: np.ndarray, permutation: Permutation, levels: list[BalancedClustering]
) -> dict[str, Any]:
    """The figures of the clusters, of the finest level where there are several, and of the order."""
    clustering, gap = levels[0], float(levels[0].gap)
    return {
        "inertia": float(clustering.inertia),
        "gap": None if np.isnan(gap) else gap,  # greedy assignments have no certificate
        "unconstrained_inertia": float(unconstrained_inertia(points, clustering.centroids)),
        "inertia_of_one_cluster": float(np.sum(np.square(points - points.mean(axis=0)))),
        "inertia_of_coarser_levels": [coarse_inertia(points, order, size) for size in permutation.coarser_sizes],
        "neighbours_in_own_cluster": neighbours_in_own_cluster(points, permutation.cluster_of_old, NEIGHBOURS),
        "path_length": path_length(points, order),
        "path_length_before": path_length(points, np.arange(len(order))),
        "spanning_tree_length": spanning_tree_length(points),
        "num_clusters": len(permutation.bounds) - 1,
        "largest_cluster": int(np.diff(permutation.bounds).max()),
        "num_iterations": int(clustering.num_iterations),
        "converged": bool(clustering.converged),
    }


def coarse_inertia(points: np.ndarray, order: np.ndarray, cluster_size: int) -> float:
    """Within-cluster sum of squared distances of codes to the means of a level's clusters."""
    groups = points[order].reshape(-1, cluster_size, points.shape[1]).astype(np.float64)
    return float(np.sum(np.square(groups - groups.mean(axis=1, keepdims=True))))


def announce(figures: dict[str, Any], permutation: Permutation, directory: epath.Path) -> None:
    """The figures for a person."""
    inertia, total = figures["inertia"], figures["inertia_of_one_cluster"]
    beyond = inertia / figures["unconstrained_inertia"] - 1.0
    say(
        f"rearrange_codebook: {permutation.said()}, within-cluster squared error {inertia:.1f}: {inertia / total:.0%} "
        f"of one cluster's, and {beyond:+.2%} to k-means without balance from there"
    )
    sizes, num_codes = np.diff(permutation.bounds), len(permutation.old_to_new)
    chance = float(np.sum(sizes * (sizes - 1.0))) / max(num_codes * (num_codes - 1.0), 1.0)
    say(
        f"{figures['neighbours_in_own_cluster']:.0%} of the {NEIGHBOURS} nearest neighbours of a code are in its "
        f"cluster ({chance:.1%} by chance); steps between ids sum to {figures['path_length']:.0f}, "
        f"{figures['path_length_before']:.0f} before, no path has less than {figures['spanning_tree_length']:.0f}"
    )
    say(f"pictures in {directory / 'clusters.png'}; distances inside clusters in {directory / 'distances.png'}")


def distances_within(points: np.ndarray, order: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """Euclidean distances of all pairs of codes that share a cluster; one zero where clusters have one code."""
    groups = [points[order[start:end]].astype(np.float64) for start, end in itertools.pairwise(bounds)]
    return np.concatenate([pdist(group) for group in groups if len(group) > 1] or [np.zeros(1)])


def distances_among_all(points: np.ndarray) -> np.ndarray:
    """Euclidean distances of some pairs of codes, drawn at random; one zero where there is one code."""
    if len(points) == 1:
        return np.zeros(1)
    rng = np.random.default_rng(0)
    first, step = rng.integers(0, len(points), PAIRS), rng.integers(1, len(points), PAIRS)
    parts = np.array_split(np.stack([first, (first + step) % len(points)]), 20, axis=1)
    return np.concatenate([np.linalg.norm(points[a] - points[b], axis=1) for a, b in parts])


def distance_histogram(within: np.ndarray, among_all: np.ndarray) -> bytes:
    """PNG of both distributions."""
    fig, axes = plt.subplots(figsize=(6.4, 4), layout="constrained")
    bins = np.linspace(0.0, max(within.max(), among_all.max(), 1e-6), 80).tolist()
    axes.hist(among_all, bins, density=True, alpha=0.5, label="any two codes")
    axes.hist(within, bins, density=True, alpha=0.7, label="two codes of one cluster")
    axes.set(title="distances between codes", xlabel="Euclidean distance of what was clustered", ylabel="density")
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


def decoded_points(tokenizer: LoadedTokenizer, codebook: np.ndarray) -> np.ndarray:
    """The patch that each code paints, as a vector of pixels in [0, 1]."""
    return decoded_patches(tokenizer, np.arange(len(codebook))).reshape(len(codebook), -1).astype(np.float32) / 255.0


# config.codebook.points: (tokenizer, unit code vectors) -> what codes are clustered by, [N, d].
POINTS: dict[str, Callable[[LoadedTokenizer, np.ndarray], np.ndarray]] = {
    "codes": lambda tokenizer, codebook: codebook,
    "pixels": decoded_points,
}


if __name__ == "__main__":
    command_line.main(run, READS)
