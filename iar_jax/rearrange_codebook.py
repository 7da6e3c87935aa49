"""Stage 2: tokenizer -> balanced clusters -> permutation of its codebook.

python -m iar_jax.rearrange_codebook --config=configs/mnist.py --workdir=runs/mnist
"""

import time

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from iar_jax.codebook.balanced_kmeans import balanced_kmeans
from iar_jax.codebook.ordering import order_by_cluster
from iar_jax.codebook.permutation import Permutation, save_permutation
from iar_jax.data import pictures, preprocessing
from iar_jax.data.codes import permutation_fingerprint
from iar_jax.models.build import load_tokenizer
from iar_jax.models.quantizer import normalize
from iar_jax.runtime import artifacts, command_line, sharding
from iar_jax.runtime.errors import UserError
from iar_jax.runtime.progress import say

CLUSTERS_SHOWN = 16
MEMBERS_SHOWN = 32


def run(config: ConfigDict, workdir: epath.Path) -> None:
    """Clusters the tokenizer's normalised codes and leaves permutation.npz and clusters.png in workdir/codebook."""
    directory = workdir / "codebook"
    tokenizer_directory = artifacts.input_directory(config, workdir, "tokenizer", "tokenizer")
    tokenizer = artifacts.require(tokenizer_directory, "train_tokenizer")
    relevant = artifacts.relevant_config(config, ("seed", "codebook"))
    if artifacts.begin(directory, "rearrange_codebook", relevant, {"tokenizer": tokenizer.fingerprint}):
        say(f"rearrange_codebook: done, in {directory}")
        return
    start = time.monotonic()
    mesh = sharding.make_mesh(**config.mesh)
    model, params, _ = load_tokenizer(tokenizer_directory, mesh)
    cluster_size = config.codebook.cluster_size
    if model.codebook_size % cluster_size:
        raise UserError(
            f"config.codebook.cluster_size is {cluster_size}, which does not divide the {model.codebook_size} codes of "
            f"{tokenizer_directory}"
        )

    codebook = normalize(params["quantizer"]["codebook"])
    clustering = balanced_kmeans(
        codebook,
        model.codebook_size // cluster_size,
        key=jax.random.key(config.seed),
        assignment=config.codebook.assignment,
        max_iterations=config.codebook.max_iterations,
        num_restarts=config.codebook.num_restarts,
    )
    order = order_by_cluster(np.asarray(codebook), np.asarray(clustering.assignment))
    permutation = Permutation.from_order(order, cluster_size)

    codebook_fingerprint = artifacts.fingerprint_arrays(params["quantizer"]["codebook"])
    save_permutation(directory / "permutation.npz", permutation, codebook_fingerprint)
    patches = decoded_patches(model, params, order[: min(CLUSTERS_SHOWN * cluster_size, len(order))])
    shown = patches.reshape(-1, cluster_size, *patches.shape[1:])[:, :MEMBERS_SHOWN]
    scale = max(1, 24 // shown.shape[2])
    picture = pictures.image_grid(shown.reshape(-1, *shown.shape[2:]), columns=shown.shape[1], scale=scale)
    pictures.write_png(directory / "clusters.png", picture)
    total = float(jnp.sum(jnp.square(codebook - codebook.mean(axis=0))))
    figures = {
        "inertia": float(clustering.inertia),
        "inertia_of_one_cluster": total,
        "num_clusters": model.codebook_size // cluster_size,
        "num_iterations": int(clustering.num_iterations),
        "converged": bool(clustering.converged),
        "codebook_fingerprint": codebook_fingerprint,
        "seconds": time.monotonic() - start,
    }
    artifacts.finish(directory, permutation_fingerprint(permutation), figures)
    say(
        f"rearrange_codebook: {figures['num_clusters']} clusters of {cluster_size}, within-cluster squared error "
        f"{figures['inertia']:.1f} ({figures['inertia'] / total:.0%} of one cluster's), "
        f"{figures['num_iterations']} iterations; pictures in {directory / 'clusters.png'}"
    )


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
