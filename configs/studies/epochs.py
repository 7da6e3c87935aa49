"""Does it help beyond the first epochs? The ablation's two arms for many passes over the pictures, until the baseline's
loss on val turns (the paper's Figure 3c).

    python -m iar_jax.study --config=configs/studies/epochs.py:cifar10:PATH --workdir=runs/epochs
"""

from ml_collections import ConfigDict

from iar_jax.config.files import config_beside


def get_config(arg: str = "mnist") -> ConfigDict:
    config = config_beside(__file__, arg)
    config.study.seeds = (0, 1, 2)
    config.study.arms = (
        ("baseline", "training.cluster_weights=(0.0,)"),
        ("iar", "training.cluster_weights=(1.0,)"),
    )
    return config
