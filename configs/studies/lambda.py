"""How much of the cluster loss? λ from 0 to 4.

    python -m iar_jax.study --config=configs/studies/lambda.py:cifar10:PATH --workdir=runs/lambda

With --config.study.runs=DIR of configs/studies/ablation.py's study it takes that one's runs of λ = 0 and 1.
"""

from ml_collections import ConfigDict

from iar_jax.config.files import config_beside

NAMES = {0.0: "baseline", 0.25: "quarter", 0.5: "half", 1.0: "iar", 2.0: "two", 4.0: "four"}


def get_config(arg: str = "mnist") -> ConfigDict:
    config = config_beside(__file__, arg)
    config.study.seeds = (0, 1, 2)
    config.study.arms = tuple((name, f"training.cluster_weights=({weight},)") for weight, name in NAMES.items())
    return config
