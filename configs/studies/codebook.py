"""From how many codes on does it help? Codebooks of 512 to 16,384 codes in 128 clusters, each with its own baseline.

python -m iar_jax.study --config=configs/studies/codebook.py:cifar10:PATH --workdir=runs/codebook
"""

from ml_collections import ConfigDict

from iar_jax.config.files import config_beside

SIZES = (512, 1024, 2048, 4096, 8192, 16384)
NUM_CLUSTERS = 128


def get_config(arg: str = "mnist") -> ConfigDict:
    config = config_beside(__file__, arg)
    config.study.seeds = (0, 1, 2)
    config.study.arms = tuple(
        (
            f"{size}/{name}",
            f"tokenizer.codebook_size={size}",
            f"codebook.cluster_sizes=({size // NUM_CLUSTERS},)",
            f"training.cluster_weights=({weight},)",
        )
        for size in SIZES
        for name, weight in (("baseline", 0.0), ("iar", 1.0))
    )
    return config
