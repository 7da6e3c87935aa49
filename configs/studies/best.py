"""Does what `beyond` kept hold over more seeds? The baseline, IAR, and what configs/imagenet.py's "best" adds to it.

    python -m iar_jax.study --config=configs/studies/best.py:cifar10:PATH --workdir=runs/best

With --config.study.runs=DIR of another study it takes that one's runs of the same arms.
"""

from ml_collections import ConfigDict

from iar_jax.config.files import config_beside

BASELINE, IAR = "training.cluster_weights=(0.0,)", "training.cluster_weights=(1.0,)"


def get_config(arg: str = "mnist") -> ConfigDict:
    config = config_beside(__file__, arg)
    config.study.arms = (
        ("baseline", BASELINE),
        ("iar", IAR),
        ("regression", IAR, "training.regression_weight=1.0"),
    )
    return config
