"""Your own images: a folder with one sub-folder a class (PNG, JPEG, WebP; any size and mode).

    python -m iar_jax.pipeline --config=configs/folder.py:/path/to/images --workdir=runs/mine
    python -m iar_jax.pipeline --config=configs/folder.py:/path/to/images,small --workdir=runs/mine \\
        --config.data.resolution=128

The word after the last comma sizes tokenizer and transformer: tiny (the default) and small suit a CPU or a small GPU,
B to 7B are LlamaGen's transformers with its VQ-16 tokenizer and want accelerators.
"""

from ml_collections import ConfigDict

from iar_jax.config.fields import default_config
from iar_jax.generators.autoregressive.sizes import SIZES as LLAMAGEN
from iar_jax.generators.autoregressive.sizes import Size
from iar_jax.runtime.errors import UserError

# Sizes of our own: the transformer and the standard deviation of its initial weights; the tokenizer's channels,
# multipliers, patch and codes, and the size of its clusters; the resolution that fits; the batch sizes of both.
SMALL_SIZES = {
    "tiny": ((Size(4, 4, 128), 0.08), (48, (1, 2), 2, 512, 16), 32, 64, 32),
    "small": ((Size(8, 8, 256), 0.06), (64, (1, 2, 2), 2, 2048, 32), 64, 64, 64),
}
# LlamaGen's transformers with its VQ-16 tokenizer.
SIZES = SMALL_SIZES | {
    name: ((size, 0.02), (128, (1, 1, 2, 2, 4), 1, 16384, 128), 256, 128, 256) for name, size in LLAMAGEN.items()
}


def get_config(arg: str = "") -> ConfigDict:
    path, comma, size = arg.rpartition(",")
    if not comma or size not in SIZES:
        path, size = arg, "tiny"
    if not path:
        raise UserError(
            "name the folder: configs/folder.py:/path/to/images, or configs/folder.py:/path/to/images,SIZE with SIZE "
            f"one of {', '.join(SIZES)}"
        )
    (transformer, init_std), tokenizer, resolution, tokenizer_batch, batch = SIZES[size]
    on_cpu = size in SMALL_SIZES
    config = default_config()
    config.data.source = f"folder:{path}"
    config.data.resolution = resolution
    config.data.augmentation = "crop_flip"
    config.codes.crops = "mirror"

    section = config.tokenizer
    section.channels, section.channel_multipliers, section.patch_size, section.codebook_size, cluster_size = tokenizer
    if on_cpu:
        section.num_res_blocks = 1
        section.z_channels = 64
        section.attention = False

    training = config.tokenizer_training
    training.num_steps = 3000 if on_cpu else 100_000
    training.batch_size = tokenizer_batch
    training.learning_rate = 2e-3 if on_cpu else 1e-4
    training.schedule = "cosine"
    training.warmup_steps = 50
    training.b2 = 0.99
    training.ema_decay = 0.999
    training.l1_weight = 0.2
    training.quantize_from_step = 100
    training.restart_every = 50
    training.restart_until_step = training.num_steps * 4 // 5
    training.log_every = 50
    training.eval_every = 500
    training.checkpoint_every = 500

    config.codebook.cluster_sizes = (cluster_size,)
    config.codebook.num_restarts = 4
    model = config.model
    model.num_layers, model.num_heads, model.dim = transformer
    model.init_std = init_std
    if on_cpu:
        model.scan_unroll = model.num_layers

    training = config.training
    training.num_steps = 5000 if on_cpu else 100_000
    training.batch_size = batch
    training.learning_rate = 2e-3 if on_cpu else 1e-4
    training.schedule = "cosine"
    training.warmup_steps = 100
    training.ema_decay = 0.999
    training.log_every = 50
    training.eval_every = 500
    training.checkpoint_every = 500

    config.sampling.num_images = 1000
    config.sampling.cfg_scale = 1.5
    return config
