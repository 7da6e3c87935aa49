"""Does what `beyond` kept hold for as long as the ablation trains? The baseline, IAR, and configs/imagenet.py's "best".

    python -m iar_jax.study --config=configs/studies/best.py:cifar10:PATH --workdir=runs/best

With --config.study.runs=DIR of configs/studies/ablation.py's study it takes that one's runs of λ = 0 and 1.
"""

from ml_collections import ConfigDict

from iar_jax.config.files import config_beside

BASELINE, IAR = "training.cluster_weights=(0.0,)", "training.cluster_weights=(1.0,)"


def get_config(arg: str = "mnist") -> ConfigDict:
    config = config_beside(__file__, arg)
    config.study.arms = (
        ("baseline", BASELINE),
        ("iar", IAR),
        ("best", IAR, "training.regression_weight=1.0"),
    )
    return config
