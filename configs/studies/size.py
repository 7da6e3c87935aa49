"""Does it help transformers of any size? Four widths, each with its own baseline (the paper's Figure 3b).

python -m iar_jax.study --config=configs/studies/size.py:cifar10:PATH --workdir=runs/size
"""

from ml_collections import ConfigDict

from iar_jax.config.files import config_beside

# Width and heads.
SIZES = ((64, 2), (128, 4), (192, 6), (256, 8))


def get_config(arg: str = "mnist") -> ConfigDict:
    config = config_beside(__file__, arg)
    config.study.seeds = (0, 1, 2)
    config.study.arms = tuple(
        (
            f"{dim}/{name}",
            f"model.dim={dim}",
            f"model.num_heads={heads}",
            f"model.init_std={dim**-0.5:.3f}",
            f"training.cluster_weights=({weight},)",
        )
        for dim, heads in SIZES
        for name, weight in (("baseline", 0.0), ("iar", 1.0))
    )
    return config
