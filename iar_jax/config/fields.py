"""Every field of an experiment, said once. A file in configs/ starts from `default_config()`.

From here come the defaults, the checks, `--help` of each stage, docs/config.md, and what two parts of a run may differ
in.
"""

from typing import Any

from ml_collections import ConfigDict

from iar_jax.config.field import (
    POSITIVE,
    SHARE,
    Arms,
    Choices,
    Field,
    Integers,
    Numbers,
    Sources,
    Switch,
    Texts,
    Tuples,
)

DTYPES = Choices(also=("float32", "bfloat16"))
COUNT, COUNT_OR_NONE = Integers(1), Integers(0)
# JAX takes the lower 32 bits of a seed and no others.
SEED = Integers(0, largest=2**32 - 1)
WEIGHT = Numbers()
DEVICES = Integers(1, also=(-1,))

# config.codebook.assignment: the one whose clusters are unequal.
UNEQUAL = "average_linkage"

# The kinds of generators.
KINDS = "iar_jax.generators.generator:KINDS"

MASK_SCHEDULES = "iar_jax.generators.masked.masking:SCHEDULES"

# A schedule may change as long as no step done so far would have been another.
SCHEDULED = "iar_jax.training.schedules:differs_so_far"


def optimizer(schedules: str, **defaults: Any) -> dict[str, Field]:
    """The fields of an optimizer and its schedule."""
    return {
        "num_steps": Field(defaults["num_steps"], "Steps of the optimizer.", COUNT, matters=SCHEDULED),
        "batch_size": Field(defaults["batch_size"], "Images of one step, over all devices.", COUNT),
        "learning_rate": Field(1e-4, "The highest rate of the schedule.", POSITIVE),
        "schedule": Field(
            "constant",
            "Of the learning rate, after the warm-up: constant; cosine or linear, down to zero at the last step; wsd, "
            "constant and then linear down to zero in the last decay_steps.",
            Choices(schedules),
            matters=SCHEDULED,
        ),
        "warmup_steps": Field(0, "Steps in which the rate rises from zero.", COUNT_OR_NONE),
        "decay_steps": Field(
            0,
            "Steps of the schedule wsd in which the rate falls; 0 is a tenth of them.",
            COUNT_OR_NONE,
            matters=SCHEDULED,
        ),
        "b1": Field(0.9, "AdamW's decay of the mean gradient.", SHARE),
        "b2": Field(0.95, "AdamW's decay of the mean squared gradient.", SHARE),
        "weight_decay": Field(defaults["weight_decay"], "AdamW's, on matrices and larger arrays.", SHARE),
        "clip_norm": Field(1.0, "Gradients of a larger global norm are scaled down to it.", POSITIVE),
        "ema_decay": Field(0.9999, "Of the averaged weights, which later stages read.", SHARE),
    }


def logging(*best: str) -> dict[str, Field]:
    """The fields of a run's log and checkpoints; `best` are the validation metrics that can choose one."""
    return {
        "log_every": Field(100, "Steps between two lines of metrics.", COUNT, matters=False),
        "eval_every": Field(5000, "Steps between two validations.", COUNT, matters=False),
        "checkpoint_every": Field(5000, "Steps between two checkpoints.", COUNT, matters=False),
        "keep_checkpoints": Field(2, "Checkpoints that are kept: the last ones.", COUNT, matters=False),
        "keep_every": Field(
            0, "Checkpoints whose step is a multiple of this are kept too; 0 is none.", COUNT_OR_NONE, matters=False
        ),
        "keep_best": Field(
            "",
            "And the one with the lowest of this validation metric (with a minus before it, the highest).",
            Choices(also=("", *best)),
            matters=False,
        ),
        "max_skipped_steps": Field(
            0,
            "Steps with a loss or gradient that is not finite that may be left out.",
            COUNT_OR_NONE,
            matters=False,
        ),
    }


SECTIONS: dict[str, Any] = {
    "seed": Field(0, "Of everything that is drawn at random, but for sampling.", SEED),
    "inputs": {
        name: Field("", f"{what} of another workdir, in the place of this one's own: a directory.", Texts())
        for name, what in (
            ("tokenizer", "The finished tokenizer"),
            ("codebook", "The finished codebook"),
            ("codes", "The finished codes"),
        )
    }
    | {
        "transformer": Field(
            "",
            "The finished generator of another workdir: what `sample` samples, and what `train` starts from.",
            Texts(),
        ),
        "step": Field(
            0,
            "Of inputs.transformer's checkpoints, the one that `train` branches off, optimizer, step and all; later "
            "stages then take the branch. 0 starts afresh from the averaged weights of the finished one.",
            COUNT_OR_NONE,
        ),
    },
    "mesh": {
        "data": Field(-1, "Devices that split the batch alone; -1 is all that are left.", DEVICES),
        "fsdp": Field(1, "Devices that split the batch, and the weights along the model's width.", DEVICES),
        "tensor": Field(1, "Devices that split heads, hidden units and the vocabulary.", DEVICES),
    },
    "data": {
        "source": Field(
            "mnist5k",
            "The images: an embedded set of digits; a folder with one sub-folder for each class; a prepared set of "
            "TensorFlow Datasets; parquet files, as Hugging Face stores image sets.",
            Sources("iar_jax.data.images:SOURCES"),
            content="images",
        ),
        "tfds_dir": Field(
            "", "Where tfds sets are prepared; empty is TFDS_DATA_DIR or ~/tensorflow_datasets.", Texts(), matters=False
        ),
        "image_column": Field("", "Column of parquet files with the pictures; empty finds image or img.", Texts()),
        "label_column": Field("", "Column of parquet files with the labels; empty is label.", Texts()),
        "resolution": Field(32, "Side of the square images, pixels.", COUNT),
        "val_fraction": Field(
            0.1,
            "Share of every class that is held out, of sources without a split of their own.",
            Numbers(0.0, 1.0, low_in=False),
        ),
        "augmentation": Field(
            "none",
            "Of the tokenizer's training images: none; shift, by up to max_shift pixels; crop_flip, a random square, "
            "mirrored half the time.",
            Choices("iar_jax.data.preprocessing:AUGMENTATIONS"),
        ),
        "max_shift": Field(2, "Pixels.", COUNT_OR_NONE),
        "smallest_crop": Field(
            0.8, "Side of crop_flip's smallest square, as a share of the image's.", Numbers(0.0, 1.0, False, True)
        ),
        "max_unreadable": Field(10, "Broken files that are left out before the source is refused.", COUNT_OR_NONE),
        "cache_dir": Field(
            "",
            "Local directory for copies of a bucket's code records; empty is IAR_JAX_CACHE or ~/.cache/iar_jax.",
            Texts(),
            matters=False,
        ),
    },
    # A picture of side R becomes (R / f)^2 codes, f = patch_size * 2^(levels - 1).
    "tokenizer": {
        "channels": Field(128, "Channels at full resolution.", COUNT),
        "channel_multipliers": Field(
            (1, 1, 2, 2, 4),
            "Of the channels, one for each level from full resolution down; each level but the first halves the sides.",
            Tuples(COUNT, (1, 2)),
        ),
        "num_res_blocks": Field(2, "Residual blocks of a level of the encoder; the decoder has one more.", COUNT),
        "z_channels": Field(256, "Channels beside the codebook.", COUNT),
        "codebook_size": Field(16384, "N, the number of codes.", COUNT),
        "codebook_dim": Field(8, "d, the width of a code's vector.", COUNT),
        "patch_size": Field(1, "Pixels that the stem folds into channels; 1 is LlamaGen's plain convolution.", COUNT),
        "local_encoder": Field(False, "Encode each patch by itself, not its surroundings; one level only.", Switch()),
        "attention": Field(True, "Self-attention at the lowest resolution.", Switch()),
        "dtype": Field("float32", "Of activations; parameters are float32.", DTYPES),
    },
    "tokenizer_training": {
        **optimizer("iar_jax.training.schedules:SCHEDULES", num_steps=400_000, batch_size=128, weight_decay=0.0),
        "l1_weight": Field(0.0, "Weight of the mean absolute error; a term of weight 0 is left out.", WEIGHT),
        "l2_weight": Field(1.0, "Weight of the mean squared error.", WEIGHT),
        "perceptual_weight": Field(0.0, "Weight of LPIPS.", WEIGHT),
        "codebook_weight": Field(1.0, "Weight of the codebook's distance to the encoder.", WEIGHT),
        "commitment_weight": Field(0.25, "Weight of the encoder's distance to the codebook.", WEIGHT),
        "entropy_weight": Field(0.0, "Weight of the entropy of the codes' use.", WEIGHT),
        "adversarial_weight": Field(0.0, "Weight of the discriminator's loss.", WEIGHT),
        "adversarial_from_step": Field(20_000, "The first step with the discriminator.", COUNT_OR_NONE),
        "discriminator_channels": Field(64, "Of the discriminator's first layer.", COUNT),
        "discriminator_layers": Field(3, "Of the discriminator, each of which halves the sides.", COUNT),
        "vgg_weights": Field(
            "",
            "File of VGG-16 for perceptual_weight; empty takes that in the cache directory, or fetches it.",
            Texts(),
            content="vgg_weights",
        ),
        "lpips_weights": Field(
            "",
            "File of LPIPS for perceptual_weight; empty takes that in the cache directory, or fetches it.",
            Texts(),
            content="lpips_weights",
        ),
        "quantize_from_step": Field(
            0,
            "The step at which the codebook is seeded from encoder outputs; before it the decoder sees them as they "
            "are. 0 leaves the random codebook.",
            COUNT_OR_NONE,
        ),
        "seed_images": Field(512, "Images whose encoder outputs seed the codebook.", COUNT),
        "restart_every": Field(0, "Steps between two restarts of codes that are hardly used; 0 never.", COUNT_OR_NONE),
        "restart_until_step": Field(0, "The last step with restarts.", COUNT_OR_NONE),
        "dead_below": Field(0.05, "Codes used less than this share of an even one are restarted.", WEIGHT),
        **logging("-psnr", "-codebook_usage", "-codebook_perplexity"),
    },
    "codebook": {
        "cluster_sizes": Field(
            (128,),
            "Codes of a cluster, for each level of clusters from the finest to the coarsest; each divides the next, "
            "and the last divides codebook_size. One level is the paper's.",
            Tuples(COUNT, (8, 64)),
        ),
        "assignment": Field(
            "optimal",
            "greedy: the paper's algorithm; optimal: annealing, then exact assignments; random: no clusters at all, "
            "the control of a study; average_linkage: unequal clusters, as many of them (arXiv 2510.04220).",
            Choices("iar_jax.codebook.balanced_kmeans:ASSIGNMENTS", also=(UNEQUAL,)),
        ),
        "points": Field(
            "codes",
            "What codes are clustered by: codes, their unit vectors; pixels, what each paints among codes like itself.",
            Choices("iar_jax.rearrange_codebook:POINTS"),
        ),
        "max_iterations": Field(100, "Of k-means.", COUNT),
        "num_restarts": Field(1, "Runs of k-means from other seeds, of which the best is taken.", COUNT),
        "order": Field(
            "chain",
            "Of the ids: chain, the published one (clusters by index, chains inside); path, clusters and codes along "
            "one short path. Training does not see it.",
            Choices("iar_jax.codebook.ordering:ORDERS"),
        ),
    },
    "codes": {
        "crops": Field(
            "center",
            "Views of a training image that are stored: center; mirror, with its mirror image; shifts, nine copies "
            "moved by data.max_shift; ten_crop, corners, centre and their mirrors for each of crop_ranges.",
            Choices("iar_jax.data.preprocessing:CROPS"),
        ),
        "crop_ranges": Field(
            (1.1, 1.05), "Of ten_crop: the image's side over the crop's.", Tuples(Numbers(1.0), (1.1, 1.05))
        ),
        "batch_size": Field(64, "Images that are encoded together.", COUNT, matters=False),
        "images_per_shard": Field(1024, "Images of a file; a file is what an interrupted extraction keeps.", COUNT),
    },
    "model": {
        "kind": Field("autoregressive", "Of the generator.", Choices(KINDS)),
        "dim": Field(768, "Width.", COUNT),
        "num_layers": Field(12, "Depth.", COUNT),
        "num_heads": Field(12, "Attention heads.", COUNT),
        "num_kv_heads": Field(
            0, "Heads of keys and values, a divisor of num_heads; 0 is one for each head.", COUNT_OR_NONE
        ),
        "hidden_dim": Field(0, "Width of the feed-forward blocks; 0 takes LlamaGen's rule.", COUNT_OR_NONE),
        "init_std": Field(0.02, "Of the initial weights; narrow models want about dim^-0.5.", WEIGHT),
        "token_dropout_rate": Field(0.1, "Dropout of the input embeddings.", SHARE),
        "residual_dropout_rate": Field(0.1, "Dropout behind attention.", SHARE),
        "ffn_dropout_rate": Field(0.1, "Dropout behind the feed-forward block.", SHARE),
        "drop_path_rate": Field(0.0, "Share of whole blocks that are left out.", SHARE),
        "class_dropout_rate": Field(0.1, "Share of labels that become the null class, for guidance.", SHARE),
        "dtype": Field("float32", "Of activations and matrix products; parameters are float32.", DTYPES),
        "num_registers": Field(1, "Of masked models: positions behind the codes that are none.", COUNT_OR_NONE),
        "mask_output": Field(
            False,
            "Of masked models: the mask is a class of the head too, as in Halton-MaskGIT's weights; no target is it.",
            Switch(),
        ),
        "remat": Field(
            "none",
            "What the backward pass recomputes: none; layer, whole layers, a third more work for the least memory; "
            "dots, all but matrix products with weights.",
            Choices("iar_jax.models.remat:REMAT_POLICIES"),
            matters=False,
        ),
        "attention": Field(
            "auto",
            "The implementation of attention: auto, the fastest that the platform, dtype and length allow; fused, "
            "rotary embedding and attention in one kernel for TPUs; splash, JAX's kernel for TPUs; cudnn, for GPUs; "
            "blocks, plain products, a block of queries at a time.",
            Choices("iar_jax.models.attention:ATTENTIONS"),
            matters=False,
        ),
        "attention_block": Field(
            128, "Queries that `blocks` takes together; 64 is a little faster on CPUs.", COUNT, matters=False
        ),
        "scan_unroll": Field(
            1,
            "Layers compiled as one step of the scan; 0 is all, which is fastest on CPUs and TPUs and takes longest to "
            "compile.",
            COUNT_OR_NONE,
            matters=False,
        ),
    },
    "training": {
        **optimizer("iar_jax.training.schedules:SCHEDULES", num_steps=1_500_000, batch_size=256, weight_decay=0.05),
        "accumulation": Field(
            1, "Parts that a batch is taken in, one after the other, to save memory.", COUNT, matters=False
        ),
        "loss_chunks": Field(
            1,
            "Parts that the head and the loss take the positions in: less memory for large codebooks.",
            COUNT,
            matters=False,
        ),
        "label_smoothing": Field(
            0.0, "Share of the target that is spread over all codes, and over all clusters.", Numbers(0.0, 1.0)
        ),
        "mean_of_pictures": Field(
            False, "Each picture counts alike in the loss, however many of its positions count.", Switch()
        ),
        "mask_schedule": Field(
            "arccos",
            "Of masked models: the share of positions that is masked, from an even draw: arccos, Halton-MaskGIT's and "
            "TiTok's; cosine, MaskGIT's; linear, square, cubic, root, log, exp.",
            Choices(MASK_SCHEDULES),
        ),
        "mask_draw": Field(
            "independent",
            "Of masked models: independent, each position by itself (Halton-MaskGIT); counted, as many as the share "
            "says (MaskGIT, TiTok).",
            Choices("iar_jax.generators.masked.masking:DRAWS"),
        ),
        "unmasked_weight": Field(
            1.0, "Of masked models: what positions that are not masked count in the loss; 0 is nothing.", WEIGHT
        ),
        "cluster_weights": Field(
            (1.0,),
            "λ of each level of codebook.cluster_sizes; 0 is plain cross-entropy, LlamaGen's.",
            Tuples(WEIGHT, (1.0, 0.5)),
        ),
        "cluster_weight_schedule": Field(
            "constant",
            "How λ goes from cluster_weights to cluster_weights_end at the last step.",
            Choices("iar_jax.training.schedules:WEIGHT_SCHEDULES"),
            matters=SCHEDULED,
        ),
        "cluster_weights_end": Field(
            (),
            "λ of each level at the last step, of schedules that are not constant; empty is 0 for all.",
            Tuples(WEIGHT, (0.0,), empty=True),
            matters=SCHEDULED,
        ),
        "neighbour_weight": Field(
            0.0,
            "α of the cross-entropy to the codes nearest to the target; DIST2Loss has 0.1 (arXiv 2503.02379).",
            WEIGHT,
        ),
        "neighbour_count": Field(8, "The nearest codes of each, itself among them.", COUNT),
        "neighbour_temperature": Field(
            0.0,
            "τ of their shares, softmax(-d²/τ) of unit code vectors; 0 takes the one at which the shares' entropy is "
            "half of the highest.",
            WEIGHT,
        ),
        "context_noise": Field(
            0.0,
            "The highest share of a picture's input codes that is replaced, at the first step; each picture's is drawn "
            "from 0 up to it. Targets stay. reAR has 1 (arXiv 2510.04450).",
            Numbers(0.0, 1.0, True, True),
        ),
        "context_noise_end": Field(
            0.75, "The share of the training at which it has come down to nothing.", Numbers(0.0, 1.0, False, True)
        ),
        "context_noise_draw": Field(
            "uniform",
            "What a code is replaced with: uniform, any code (reAR); cluster, one of its own cluster; neighbours, one "
            "of the neighbour_count nearest.",
            Choices("iar_jax.training.context_noise:DRAWS"),
        ),
        "regression_weight": Field(
            0.0,
            "Of the cosine distances of hidden states to the vectors of this code and the next one; reAR has 1 (arXiv "
            "2510.04450).",
            WEIGHT,
        ),
        "lookahead_weight": Field(
            0.0,
            "Of the cosine distances of hidden states to the averaged model's at the cells to come, up to half of the "
            "training, and half of it from there; Mirai-E has 2 (arXiv 2601.14671).",
            WEIGHT,
        ),
        **logging("token_loss", "cluster_loss", "-token_accuracy", "-cluster_accuracy"),
    },
    "sampling": {
        "num_images": Field(50_000, "Images.", COUNT),
        "step": Field(0, "Of the checkpoint; 0 is the last one of a finished training.", COUNT_OR_NONE),
        "batch_size": Field(64, "Images that are decoded together.", COUNT, matters=False),
        "labels": Field(
            "balanced",
            "balanced: the classes in turn; uniform: drawn at random, as LlamaGen does.",
            Choices("iar_jax.data.labels:PROTOCOLS"),
        ),
        "dtype": Field(
            "model",
            "Of the decoding and its cache: model is that of config.model.",
            Choices("iar_jax.generators.settings:SAMPLING_DTYPES"),
        ),
        "cfg_scale": Field(2.0, "Scale of classifier-free guidance; 1 turns it off.", WEIGHT),
        "cfg_schedule": Field(
            "constant",
            "How the scale goes from the first code to the last: constant; interval, off outside of codes cfg_first up "
            "to cfg_last; linear, from cfg_start; power_cosine, from 1, with cfg_power; iar2, linear plus "
            "cfg_attention_weight times the attention to the class token.",
            Choices("iar_jax.generators.guidance:GUIDANCE"),
        ),
        "cfg_start": Field(1.0, "The first scale of linear and iar2.", WEIGHT),
        "cfg_first": Field(0, "The first code of interval.", COUNT_OR_NONE),
        "cfg_last": Field(0, "The code at which interval ends; 0 is the end.", COUNT_OR_NONE),
        "cfg_power": Field(1.0, "Of power_cosine.", POSITIVE),
        "cfg_attention_weight": Field(0.05, "Of iar2.", WEIGHT),
        "temperature": Field(1.0, "Divides the guided logits.", POSITIVE),
        "top_k": Field(0, "Draw among so many most probable codes; 0 is all.", COUNT_OR_NONE),
        "top_p": Field(
            1.0, "Draw among the most probable codes that add up to this probability.", Numbers(0.0, 1.0, False, True)
        ),
        "mask_steps": Field(32, "Of masked models: passes in which all codes are set.", COUNT),
        "mask_order": Field(
            "halton_rolled",
            "Of masked models: halton, along the Halton sequence; halton_rolled, from a place of it that is drawn for "
            "each picture; confidence, the most probable draws first.",
            Choices("iar_jax.generators.masked.sampling:ORDERS"),
        ),
        "mask_schedule": Field(
            "arccos",
            "Of masked models: the share of positions that is masked still; see training.mask_schedule.",
            Choices(MASK_SCHEDULES),
        ),
        "mask_noise": Field(
            0.0, "Of the order confidence: Gumbel noise on log-probabilities at the first pass; it fades.", WEIGHT
        ),
        "mask_temperature_end": Field(
            0.0, "Of masked models: the temperature of the last pass; 0 is temperature, the first pass'.", WEIGHT
        ),
        "seed": Field(0, "Image i depends on it and i alone.", SEED),
        "image_size": Field(
            0,
            "Side of the images that are kept, reduced by LlamaGen's bicubic filter; 0 is as decoded.",
            COUNT_OR_NONE,
        ),
        "write_pngs": Field(False, "Each image as a file of its own, too.", Switch(), matters=False),
    },
    "evaluation": {
        "features": Field(
            "classifier",
            "What distances are taken in: classifier, a small network trained on this data set, whose figures compare "
            "runs on it; inception, the ADM suite's network and figures.",
            Choices("iar_jax.evaluate.scorers:SCORERS"),
        ),
        "inception_weights": Field(
            "", "File; empty takes that in the cache directory, or fetches it.", Texts(), content="inception_weights"
        ),
        "reference": Field(
            "",
            "For inception, such as VIRTUAL_imagenet256_labeled.npz; empty is made of the train split.",
            Texts(),
            content="reference",
        ),
        "batch_size": Field(250, "Images that pass a network together.", COUNT, matters=False),
        "neighbours": Field(3, "k of precision and recall.", COUNT),
        "code_distance_images": Field(64, "Of the val split, for --what=code_distance.", COUNT),
        "classifier_steps": Field(2000, "Training steps of the classifier.", COUNT),
        "classifier_batch_size": Field(64, "Images of one of them.", COUNT),
        "classifier_learning_rate": Field(2e-3, "The highest; it falls by a cosine.", POSITIVE),
    },
    # What `python -m iar_jax.study` reads, and no stage.
    "study": {
        "arms": Field(
            (),
            "What is compared: names, each with its overrides of this config; GROUP/NAME is compared in its group.",
            Arms(),
        ),
        "runs": Field(
            "",
            "Directory of the runs and of what they share; empty is the workdir. Studies with the same one use each "
            "other's runs of arms that are named and set alike.",
            Texts(),
        ),
        "baseline": Field("baseline", "The arm, of each group, that the others are compared with.", Texts()),
        "seeds": Field((0, 1, 2, 3, 4), "Of the runs that are compared, pair by pair.", Tuples(SEED, (0, 1, 2))),
        "learning_rates": Field(
            (),
            "training.learning_rate is chosen among these for each arm; empty leaves it as it is.",
            Tuples(POSITIVE, (1e-3, 2e-3), empty=True),
        ),
        "tuning_seeds": Field((1000,), "Of the runs by which rate and guidance are chosen.", Tuples(SEED, (1000,))),
        "criterion": Field(
            "token_loss",
            "The last value of this on val chooses the rate; steps are counted to the baseline's lowest value of it.",
            Choices(also=("token_loss", "cluster_loss")),
        ),
        "cfg_scales": Field(
            (),
            "sampling.cfg_scale is chosen among these for each arm, by the Fréchet distance of cfg_images samples; "
            "fewer than two leave it as it is.",
            Tuples(WEIGHT, (1.0, 1.5, 2.0), empty=True),
        ),
        "cfg_images": Field(2000, "Samples for each of cfg_scales.", COUNT),
        "sample_every": Field(
            0,
            "Steps between two points at which curve_images samples are scored, a multiple of "
            "training.checkpoint_every; 0 scores the last step alone.",
            COUNT_OR_NONE,
        ),
        "curve_images": Field(2000, "Samples for each of those points.", COUNT),
    },
}


def default_config() -> ConfigDict:
    """All sections at their defaults; field types are fixed from here on, and no field can be added."""
    return ConfigDict(defaults()).lock()


def defaults(section: str | None = None) -> dict[str, Any]:
    """The defaults as plain data, of all sections or of one."""

    def values(tree):
        return {k: v.default if isinstance(v, Field) else values(v) for k, v in tree.items()}

    return values(SECTIONS if section is None else SECTIONS[section])
