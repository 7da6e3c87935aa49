"""Does the cluster loss help? The baseline, IAR, the loss over clusters of no meaning, and what is only rearranged.

python -m iar_jax.study --config=configs/studies/ablation.py:mnist --workdir=runs/ablation-mnist
python -m iar_jax.study --config=configs/studies/ablation.py:cifar10:PATH --workdir=runs/ablation-cifar10
python -m iar_jax.study --config=configs/studies/ablation.py:fashion:PATH --workdir=runs/ablation-fashion
"""

from ml_collections import ConfigDict

from iar_jax.config.files import config_beside


def get_config(arg: str = "mnist") -> ConfigDict:
    config = config_beside(__file__, arg)
    config.study.arms = (
        ("baseline", "training.cluster_weights=(0.0,)"),
        ("iar", "training.cluster_weights=(1.0,)"),
        ("random", "training.cluster_weights=(1.0,)", "codebook.assignment=random"),
        # All arms train on rearranged ids, which without the loss are names: the baseline once more.
        ("rearranged", "training.cluster_weights=(0.0,)"),
    )
    return config
