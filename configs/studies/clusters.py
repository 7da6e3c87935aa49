"""Which clusters? Codes of a cluster from 8 to 512, and other ways to partition.

    python -m iar_jax.study --config=configs/studies/clusters.py:cifar10:PATH --workdir=runs/clusters

With --config.study.runs=DIR of configs/studies/ablation.py's study it takes that one's runs of λ = 0 and 1. Cluster
losses of different partitions mean different things; token losses and scores can be compared.
"""

from ml_collections import ConfigDict

from iar_jax.config.files import config_beside

SIZES = (8, 16, 32, 64, 128, 256, 512)


def get_config(arg: str = "mnist") -> ConfigDict:
    config = config_beside(__file__, arg)
    (published,) = config.codebook.cluster_sizes
    config.study.seeds = (0, 1, 2)
    config.study.arms = (
        ("baseline", "training.cluster_weights=(0.0,)"),
        ("iar", "training.cluster_weights=(1.0,)"),
        *((f"size-{size}", f"codebook.cluster_sizes=({size},)") for size in SIZES if size != published),
        ("greedy", "codebook.assignment=greedy"),
        ("path", "codebook.order=path"),
    )
    return config
