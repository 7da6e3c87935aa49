"""The recipe of the released IAR code for class-conditional ImageNet, for each of LlamaGen's models.

    configs/imagenet.py:B,256            IAR-B on 16 x 16 codes
    configs/imagenet.py:L,384            IAR-L on 24 x 24 codes, sampled at 384 pixels
    configs/imagenet.py:B,256,baseline   LlamaGen itself: plain cross-entropy, otherwise the same
    configs/imagenet.py:B,256,best       what the studies of docs/evidence.md add to it; not run at this size
    configs/imagenet.py:masked-L,384     Halton-MaskGIT-Large with the cluster loss (T, S, B, L, XL)

Give the folder of ImageNet's training images, one sub-folder a class, with --config.data.source=folder:PATH.

The paper's own hyper-parameters are not published; these are the defaults of its code, and LlamaGen's authors' runs
where that code has none. Published figures to meet (FID / Inception score, ADM suite, 50,000 samples):

    | model | 256 px: LlamaGen, IAR     | 384 px: LlamaGen, IAR     |
    |-------|---------------------------|---------------------------|
    | B     | 5.46 / 193.6, 5.14 / 202.0 | 6.09 / 182.5, 5.77 / 192.5 |
    | L     | 3.80 / 248.3, 3.40 / 271.3 | 3.07 / 256.1, 3.18 / 234.8 |
    | XL    | 3.39 / 227.1, 3.36 / 228.9 | 2.62 / 244.1, 2.52 / 248.1 |
    | XXL   | 3.09 / 253.6, 3.01 / 257.4 | 2.34 / 253.9, 2.19 / 265.6 |

after 300 epochs, but XL and XXL at 256 px after 50. The IAR paper compares its L at 384 px with 3.29 / 227.8 of its own
LlamaGen run; LlamaGen publishes 3.07 / 256.1 (cfg 2.0), which IAR-L does not beat.
"""

from ml_collections import ConfigDict

from iar_jax.config.fields import default_config
from iar_jax.generators.autoregressive.sizes import SIZES
from iar_jax.generators.masked import sizes as masked_sizes
from iar_jax.runtime.errors import UserError

# Learning rate and batch of LlamaGen's authors' runs (LlamaGen issue 8; XXXL, 1B and 7B have no published run and take
# 3B's).
RUNS = {
    "B": (1e-4, 256),
    "L": (1e-4, 256),
    "XL": (2e-4, 256),
    "XXL": (2e-4, 512),
    "3B": (2e-4, 512),
    "XXXL": (2e-4, 512),
    "1B": (2e-4, 512),
    "7B": (2e-4, 512),
}

# Guidance of the published scores: LlamaGen's README and tables; IAR's B at 384 px was sampled at 2.25 and its XXL at
# 1.7 (its Table 1). XL's is not stated for IAR; 1.75 is LlamaGen's.
CFG_SCALES = {
    ("B", 256): 2.0,
    ("B", 384): 2.25,
    ("L", 256): 1.75,
    ("L", 384): 2.0,
    ("XL", 256): 1.75,
    ("XL", 384): 1.75,
    ("XXL", 256): 1.75,
    ("XXL", 384): 1.75,
    ("3B", 256): 1.75,
    ("3B", 384): 1.65,
}

# What "best" adds: reAR's regression to code vectors with its weight of 1 (arXiv 2510.04450), which of the
# variants in docs/evidence.md ("Beyond the cluster loss") saves most steps, at 1 to 4 % of one.
BEST = {"training.regression_weight": 1.0}

MASKED = {f"masked-{name}": size for name, size in masked_sizes.SIZES.items()}
NAMES = (*SIZES, *MASKED)

TRAINING_IMAGES = 1_281_167  # of ImageNet's training split


def get_config(arg: str = "B,256") -> ConfigDict:
    name, resolution, word = parse(arg)
    is_masked = name.startswith("masked-")
    learning_rate, batch_size = (1e-4, 256) if is_masked else RUNS[name]
    config = default_config()

    config.data.source = "folder:imagenet/train"
    config.data.resolution = resolution
    config.data.augmentation = "crop_flip"  # LlamaGen's tokenizer training: random square of 0.8 to 1, and mirror

    # VQ-16, as LlamaGen's vq_model.py has it: these are the defaults of config.tokenizer.
    training = config.tokenizer_training
    training.num_steps = 40 * TRAINING_IMAGES // 128  # 40 epochs
    training.batch_size = 128
    training.learning_rate = 1e-4  # constant, Adam (0.9, 0.95)
    training.l2_weight = 1.0
    training.codebook_weight = 1.0
    training.commitment_weight = 0.25
    training.adversarial_weight = 0.5
    training.adversarial_from_step = 20_000

    config.codes.crops = "ten_crop"
    config.codes.crop_ranges = (1.1, 1.05)  # both were used for LlamaGen (its issue 14)

    config.codebook.cluster_sizes = (128,)  # IAR's default: 128 clusters of 128
    config.codebook.assignment = "greedy"
    config.codebook.max_iterations = 100

    model = config.model
    model.num_layers, model.num_heads, model.dim = MASKED[name] if is_masked else SIZES[name]
    model.dtype = "bfloat16"  # autocast in the released trainer
    # Where compiling takes two minutes at most: TPUs then neither stack nor slice what the layers keep.
    model.scan_unroll = 0 if model.num_layers <= 36 else 1
    # Dropouts of the released trainer: residual and feed-forward 0.1, tokens 0.1, classes 0.1, drop-path 0; they are
    # the defaults of config.model.

    training = config.training
    epochs = 50 if resolution == 256 and name not in ("B", "L") else 300
    training.batch_size = batch_size
    training.num_steps = epochs * TRAINING_IMAGES // batch_size
    training.loss_chunks = 2 if name in ("B", "L", "XL") or is_masked else 8
    training.cluster_weights = (0.0 if word == "baseline" else 1.0,)  # lambda of the released trainer
    training.learning_rate = learning_rate
    training.schedule = "constant"  # no warm-up, no decay
    training.b1, training.b2 = 0.9, 0.95
    training.weight_decay = 0.05
    training.clip_norm = 1.0

    sampling = config.sampling
    sampling.num_images = 50_000
    sampling.labels = "uniform"  # drawn at random, as LlamaGen does; not 50 a class
    sampling.image_size = 256 if resolution == 384 else 0  # 384-px models are decoded at 384 and scored at 256
    sampling.cfg_scale = CFG_SCALES.get((name, resolution), 1.75)
    if is_masked:
        masked(config)
    if word == "best":
        config.update_from_flattened_dict(BEST)
    return config


def masked(config: ConfigDict) -> None:
    """Halton-MaskGIT's model and recipe, as its code has them (Network/transformer.py, Trainer/cls_trainer.py, launch/,
    README). Its trainer drops attention weights at 0.1 too, and its last 100,000 steps are a cosine to 1 %, not a line
    to zero; it averages no weights, ours are."""
    model = config.model
    model.kind = "masked"
    model.num_registers = 1
    model.token_dropout_rate = 0.0
    model.residual_dropout_rate = model.ffn_dropout_rate = model.class_dropout_rate = 0.1

    training = config.training
    training.num_steps = 1_000_000
    training.warmup_steps = 2500
    training.schedule = "wsd"
    training.decay_steps = 100_000
    training.b1, training.b2 = 0.9, 0.999
    training.weight_decay = 0.03  # of everything
    training.mask_schedule, training.mask_draw = "arccos", "independent"
    training.unmasked_weight = 1.0  # the loss is of all positions
    training.label_smoothing = 0.0

    sampling = config.sampling
    sampling.cfg_scale = 3.0  # its w of 2 is a scale of 1 + w
    sampling.mask_steps = 32
    sampling.mask_order = "halton_rolled"
    sampling.mask_temperature_end = 1 / 1.2  # its "temperature" multiplies, from 1 to 1.2


def parse(arg: str) -> tuple[str, int, str]:
    """Model, resolution, and the word behind them, or ""."""
    parts = arg.split(",")
    if (
        len(parts) not in (2, 3)
        or parts[0] not in NAMES
        or parts[1] not in ("256", "384")
        or parts[2:] not in ([], ["baseline"], ["best"])
    ):
        raise UserError(
            f"configs/imagenet.py:{arg}: the argument is MODEL,RESOLUTION and, behind another comma, 'baseline', "
            f"'best' or nothing, with MODEL one of {', '.join(NAMES)} and RESOLUTION 256 or 384"
        )
    if parts[0] in MASKED and parts[2:] == ["best"]:
        raise UserError(
            f"configs/imagenet.py:{arg}: 'best' adds a regression of hidden states, which masked models do not have; "
            "leave it out"
        )
    return parts[0], int(parts[1]), "".join(parts[2:])
