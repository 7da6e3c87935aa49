"""5,000 MNIST digits, end to end on two CPU cores in a few minutes: real data that a package brings along.

    python -m iar_jax.pipeline --config=configs/mnist.py --workdir=runs/mnist
    python -m iar_jax.pipeline --config=configs/mnist.py:baseline --workdir=runs/mnist-baseline

`:baseline` is plain cross-entropy (lambda = 0) and otherwise the same: equal seeds, equal order of the data.
"""

from ml_collections import ConfigDict

from iar_jax.config.fields import default_config
from iar_jax.runtime.errors import UserError


def get_config(arg: str = "") -> ConfigDict:
    words = arg.split(",") if arg else []
    if words not in ([], ["baseline"], ["masked"], ["masked", "baseline"]):
        raise UserError(
            f"configs/mnist.py:{arg}: the argument can be 'baseline', 'masked' or 'masked,baseline', or left out"
        )
    config = default_config()
    data = config.data
    data.source = "mnist5k"
    data.resolution = 32
    data.augmentation = "shift"
    data.max_shift = 2

    # 4 x 4 pixels a code. Each patch is encoded by itself: most patches are blank, and should be one code, not a
    # hundred.
    tokenizer = config.tokenizer
    tokenizer.channels = 48
    tokenizer.channel_multipliers = (1,)
    tokenizer.num_res_blocks = 1
    tokenizer.z_channels = 48
    tokenizer.codebook_size = 512
    tokenizer.codebook_dim = 8
    tokenizer.patch_size = 4
    tokenizer.local_encoder = True
    tokenizer.attention = False
    training = config.tokenizer_training
    training.num_steps = 800
    training.batch_size = 64
    training.learning_rate = 4e-3
    training.schedule = "cosine"
    training.warmup_steps = 20
    training.b2 = 0.99
    training.weight_decay = 1e-4
    training.ema_decay = 0.99
    training.l1_weight = 0.2
    training.l2_weight = 1.6
    training.codebook_weight = 0.2
    training.commitment_weight = 1.5
    training.quantize_from_step = 50
    training.restart_every = 20
    training.restart_until_step = 640
    training.log_every = 20
    training.eval_every = 100
    training.checkpoint_every = 200

    codebook = config.codebook
    codebook.cluster_sizes = (16,)
    codebook.num_restarts = 8
    config.codes.batch_size = 100

    model = config.model
    model.dim = 96
    model.num_layers = 4
    model.num_heads = 4
    model.scan_unroll = 4
    model.init_std = 0.1
    model.token_dropout_rate = 0.05
    model.residual_dropout_rate = 0.05
    model.ffn_dropout_rate = 0.05
    training = config.training
    training.num_steps = 2600
    training.batch_size = 32
    training.cluster_weights = (0.0 if "baseline" in words else 1.0,)
    training.learning_rate = 5e-3
    training.schedule = "cosine"
    training.warmup_steps = 50
    training.weight_decay = 0.03
    training.ema_decay = 0.99
    training.log_every = 20
    training.eval_every = 200
    training.checkpoint_every = 400

    sampling = config.sampling
    sampling.num_images = 500
    sampling.batch_size = 250
    sampling.cfg_scale = 1.5
    config.evaluation.classifier_steps = 700
    study = config.study
    study.seeds = (0, 1, 2)
    study.learning_rates = (2.5e-3, 5e-3, 1e-2)
    study.cfg_scales = (1.0, 1.5, 2.0, 2.5)
    if "masked" in words:
        masked(config)
    return config


def masked(config: ConfigDict) -> None:
    """The masked generator in the place of the autoregressive one, for the same tokenizer and codes."""
    config.model.kind = "masked"
    sampling = config.sampling
    sampling.mask_steps = 16
