"""Fashion-MNIST: 60,000 grey pictures of clothes in ten classes, on two CPU cores.

    apt-get download dataset-fashion-mnist && dpkg -x dataset-fashion-mnist_*.deb debian
    python launch/picture_folders.py debian/usr/share/datasets/fashion-mnist runs/data/fashion
    python -m iar_jax.pipeline --config=configs/fashion.py:runs/data/fashion/train --workdir=runs/fashion

The argument is the folder of the training pictures, one sub-folder a class, or `parquet:PATH` or `tfds:fashion_mnist`;
a word `baseline` behind a comma is plain cross-entropy. A twentieth of a folder is held out for validation.
"""

from ml_collections import ConfigDict

from iar_jax.config.fields import default_config
from iar_jax.runtime.errors import UserError

SOURCES = ("folder:", "parquet:", "tfds:")


def get_config(arg: str = "") -> ConfigDict:
    path, comma, word = arg.rpartition(",")
    if word != "baseline":
        path, comma = arg, ""
    if not path:
        raise UserError(
            "name the pictures: configs/fashion.py:PATH with the folder of Fashion-MNIST's training pictures, "
            "parquet:PATH or tfds:fashion_mnist"
        )
    config = default_config()
    data = config.data
    data.source = path if path.startswith(SOURCES) else f"folder:{path}"
    data.resolution = 28
    data.augmentation = "shift"
    data.val_fraction = 0.05

    # 4 x 4 pixels a code, 7 x 7 codes.
    tokenizer = config.tokenizer
    tokenizer.channels = 64
    tokenizer.channel_multipliers = (1,)
    tokenizer.num_res_blocks = 1
    tokenizer.z_channels = 64
    tokenizer.codebook_size = 1024
    tokenizer.codebook_dim = 8
    tokenizer.patch_size = 4
    tokenizer.attention = False
    training = config.tokenizer_training
    training.num_steps = 1500
    training.batch_size = 64
    training.learning_rate = 4e-3
    training.schedule = "cosine"
    training.warmup_steps = 50
    training.b2 = 0.99
    training.weight_decay = 1e-4
    training.ema_decay = 0.999
    training.l1_weight = 0.2
    training.l2_weight = 1.6
    training.codebook_weight = 0.2
    training.commitment_weight = 1.5
    training.quantize_from_step = 100
    training.restart_every = 50
    training.restart_until_step = 1200
    training.log_every = 50
    training.eval_every = 500
    training.checkpoint_every = 500

    codebook = config.codebook
    codebook.cluster_sizes = (32,)
    codebook.num_restarts = 4
    config.codes.crops = "mirror"
    config.codes.batch_size = 250

    model = config.model
    model.dim = 128
    model.num_layers = 4
    model.num_heads = 4
    model.scan_unroll = 4
    model.init_std = 0.08
    model.token_dropout_rate = 0.0
    model.residual_dropout_rate = 0.0
    model.ffn_dropout_rate = 0.0
    training = config.training
    training.num_steps = 1500
    training.batch_size = 32
    training.cluster_weights = (0.0 if comma else 1.0,)
    training.learning_rate = 3e-3
    training.schedule = "cosine"
    training.warmup_steps = 50
    training.weight_decay = 0.03
    training.ema_decay = 0.99
    training.log_every = 50
    training.eval_every = 100
    training.checkpoint_every = 500

    sampling = config.sampling
    sampling.num_images = 10_000
    sampling.batch_size = 250
    sampling.cfg_scale = 2.0
    config.evaluation.classifier_steps = 3000
    study = config.study
    study.learning_rates = (1.5e-3, 3e-3, 6e-3)
    study.cfg_scales = (1.0, 1.5, 2.0, 2.5)
    study.sample_every = 500
    return config
