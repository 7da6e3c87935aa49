"""Fashion-MNIST: 60,000 grey pictures of clothes in ten classes, on two CPU cores.

    apt-get download dataset-fashion-mnist && dpkg -x dataset-fashion-mnist_*.deb debian
    python launch/picture_folders.py debian/usr/share/datasets/fashion-mnist runs/data/fashion
    python -m iar_jax.pipeline --config=configs/fashion.py:runs/data/fashion/train --workdir=runs/fashion

The argument is that of configs/cifar10.py, which this config starts from.
"""

from pathlib import Path

from ml_collections import ConfigDict

from iar_jax.config.files import config_at


def get_config(arg: str = "") -> ConfigDict:
    config = config_at(Path(__file__).with_name("cifar10.py"), arg)
    # 4 x 4 pixels a code, 7 x 7 codes.
    config.data.resolution = 28
    config.data.augmentation = "shift"
    config.tokenizer.codebook_size = 1024
    config.tokenizer_training.num_steps = 1500
    config.tokenizer_training.restart_until_step = 1200
    return config
