"""What does guidance that costs no training bring? One transformer of λ = 1 a seed, sampled with other schedules.

    python -m iar_jax.study --config=configs/studies/guidance.py:cifar10:PATH --workdir=runs/guidance

With --config.study.runs=DIR of configs/studies/ablation.py's study it takes that one's runs of λ = 1. Each schedule's
scale is chosen by itself; those that rise from 1 have to rise further than a constant one.
"""

from ml_collections import ConfigDict

from iar_jax.config.files import config_beside

SCHEDULES = {
    "iar": (),
    "linear": ("sampling.cfg_schedule=linear",),
    "power-cosine": ("sampling.cfg_schedule=power_cosine",),
    "iar2": ("sampling.cfg_schedule=iar2",),
}


def get_config(arg: str = "mnist") -> ConfigDict:
    config = config_beside(__file__, arg)
    config.study.baseline = "iar"
    config.study.cfg_scales = (2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0)
    config.study.arms = tuple(
        (name, "training.cluster_weights=(1.0,)", *schedule) for name, schedule in SCHEDULES.items()
    )
    return config
