"""Every field of an experiment, with its meaning and a neutral default. A file in configs/ starts from this."""

from ml_collections import ConfigDict


def default_config() -> ConfigDict:
    """All sections; field types are fixed from here on, and no field can be added."""
    config = ConfigDict()
    config.seed = 0

    # Which finished artifact a stage takes instead of the workdir's own: a directory such as OTHER/tokenizer.
    config.inputs = ConfigDict({"tokenizer": "", "codebook": "", "codes": "", "transformer": ""})

    # Devices along each axis; -1 is all that are left.
    config.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})

    config.data = ConfigDict(
        {
            # mnist5k; folder:PATH with one sub-folder a class; tfds:NAME, prepared, such as tfds:imagenet2012
            "source": "mnist5k",
            "tfds_dir": "",  # where tfds sets are prepared; "" is TFDS_DATA_DIR or ~/tensorflow_datasets
            "resolution": 32,  # side of the square pictures, pixels
            "val_fraction": 0.1,  # share of every class held out
            "augmentation": "none",  # none; shift by up to max_shift pixels; crop_flip: random square and mirror
            "max_shift": 2,  # pixels
            "smallest_crop": 0.8,  # side of the smallest random square, share of the picture's
            "max_unreadable": 10,  # broken files of a folder that are left out before it is refused
        }
    )

    # The VQ tokenizer. A picture of side R becomes (R / f)^2 codes, f = patch_size * 2^(levels - 1).
    config.tokenizer = ConfigDict(
        {
            "channels": 128,
            "channel_multipliers": (1, 1, 2, 2, 4),  # one for each level, from full resolution down
            "num_res_blocks": 2,
            "z_channels": 256,
            "codebook_size": 16384,
            "codebook_dim": 8,
            "patch_size": 1,  # pixels folded into channels by the stem; 1 is LlamaGen's plain convolution
            "local_encoder": False,  # encode each patch by itself, without its surroundings; one level only
            "attention": True,  # self-attention at the lowest resolution
            "dtype": "float32",  # of activations; parameters are float32
        }
    )
    config.tokenizer_training = ConfigDict(
        {
            "num_steps": 400_000,
            "batch_size": 128,
            "learning_rate": 1e-4,
            "schedule": "constant",  # constant, or cosine down to zero
            "warmup_steps": 0,
            "b1": 0.9,
            "b2": 0.95,
            "weight_decay": 0.0,
            "clip_norm": 1.0,
            "ema_decay": 0.9999,
            # Weights of the loss's terms; 0 leaves a term out.
            "l1_weight": 0.0,
            "l2_weight": 1.0,
            "perceptual_weight": 0.0,
            "codebook_weight": 1.0,
            "commitment_weight": 0.25,
            "entropy_weight": 0.0,
            "adversarial_weight": 0.0,
            "adversarial_from_step": 20_000,
            "discriminator_channels": 64,
            "discriminator_layers": 3,
            # VGG-16 and LPIPS files for perceptual_weight > 0; "" takes those in the cache directory, or fetches them
            "vgg_weights": "",
            "lpips_weights": "",
            # The codebook is seeded from encoder outputs at this step; before it the decoder sees them as they are.
            # 0 leaves the random codebook.
            "quantize_from_step": 0,
            "seed_images": 512,  # pictures whose encoder outputs seed the codebook
            # Every so many steps, codes used less than dead_below of an even share are restarted; 0 never.
            "restart_every": 0,
            "restart_until_step": 0,
            "dead_below": 0.05,
            "log_every": 100,
            "eval_every": 5000,
            "checkpoint_every": 5000,
            "keep_checkpoints": 2,  # the last ones; and
            "keep_every": 0,  # those whose step is a multiple of this; 0 is none; and
            "keep_best": "",  # the one with the lowest of this val metric; a minus before it is the highest
            "max_skipped_steps": 0,  # steps with a loss or gradient that is not finite that may be left out
        }
    )

    config.codebook = ConfigDict(
        {
            "cluster_size": 128,  # m; there are codebook_size / m clusters
            "assignment": "optimal",  # greedy: the paper's algorithm; optimal: annealing, then exact assignments
            "max_iterations": 100,
            "num_restarts": 1,
            # Of the ids: chain is the published one (clusters by index, chains inside); path puts clusters and codes
            # along one short path. Training does not see it.
            "order": "chain",
        }
    )

    config.codes = ConfigDict(
        {
            # center; mirror: and its mirror image; shifts: nine copies moved by data.max_shift; ten_crop: corners,
            # centre and their mirrors, once for each of crop_ranges (the picture's side over the crop's)
            "crops": "center",
            "crop_ranges": (1.1, 1.05),
            "batch_size": 64,  # pictures encoded together
            "images_per_shard": 1024,  # a shard is what an interrupted extraction keeps
        }
    )

    # The transformer.
    config.model = ConfigDict(
        {
            "dim": 768,
            "num_layers": 12,
            "num_heads": 12,
            "hidden_dim": 0,  # of the feed-forward blocks; 0 takes LlamaGen's rule
            "init_std": 0.02,  # of the initial weights; narrow models want about dim^-0.5
            "token_dropout_rate": 0.1,
            "residual_dropout_rate": 0.1,
            "ffn_dropout_rate": 0.1,
            "drop_path_rate": 0.0,
            "class_dropout_rate": 0.1,
            "dtype": "float32",  # of activations and matrix products; parameters are float32
            # What the backward pass recomputes: none; layer: whole layers, a third more work for the least memory;
            # dots: all but matrix products with weights
            "remat": "none",
            "attention_block": 128,  # queries that attention takes together; 64 is a little faster on CPUs
            "scan_unroll": 1,  # layers compiled as one step of the scan; num_layers is fastest on CPUs
        }
    )
    config.training = ConfigDict(
        {
            "num_steps": 1_500_000,
            "batch_size": 256,
            "accumulation": 1,  # parts that a batch is taken in, one after the other, to save memory
            "loss_chunks": 1,  # parts that the head and the loss take the positions in: less memory for large codebooks
            "cluster_weight": 1.0,  # lambda; 0 is LlamaGen's plain cross-entropy
            "cluster_weight_schedule": "constant",  # or linear or cosine, to cluster_weight_end at the last step
            "cluster_weight_end": 0.0,
            "learning_rate": 1e-4,
            "schedule": "constant",
            "warmup_steps": 0,
            "b1": 0.9,
            "b2": 0.95,
            "weight_decay": 0.05,
            "clip_norm": 1.0,
            "ema_decay": 0.9999,
            "log_every": 100,
            "eval_every": 5000,
            "checkpoint_every": 5000,
            "keep_checkpoints": 2,  # the last ones; and
            "keep_every": 0,  # those whose step is a multiple of this; 0 is none; and
            "keep_best": "",  # the one with the lowest of this val metric; a minus before it is the highest
            "max_skipped_steps": 0,  # steps with a loss or gradient that is not finite that may be left out
        }
    )

    config.sampling = ConfigDict(
        {
            "num_images": 50_000,
            "step": 0,  # of the transformer's checkpoint; 0 is the last one of a finished training
            "batch_size": 64,
            "labels": "balanced",  # balanced: the classes in turn; uniform: drawn at random, as LlamaGen does
            "dtype": "model",  # of the decoding and its cache: model is config.model's; or float32, bfloat16
            "cfg_scale": 2.0,  # 1 turns guidance off
            # How the scale goes from the first code to the last: constant; interval: off outside of codes cfg_first up
            # to cfg_last (0 is the end); linear, from cfg_start; power_cosine, from 1, with cfg_power; iar2: linear,
            # plus cfg_attention_weight times the attention to the class token
            "cfg_schedule": "constant",
            "cfg_start": 1.0,
            "cfg_first": 0,
            "cfg_last": 0,
            "cfg_power": 1.0,
            "cfg_attention_weight": 0.05,
            "temperature": 1.0,
            "top_k": 0,  # 0 keeps all codes
            "top_p": 1.0,
            "seed": 0,
            "image_size": 0,  # of the images that are kept, reduced by LlamaGen's bicubic filter; 0 is as decoded
            "write_pngs": False,  # each image as a file of its own, too
        }
    )

    config.evaluation = ConfigDict(
        {
            # classifier: a small network trained on this data set, whose figures compare runs on it; inception: the
            # ADM suite's network and figures
            "features": "classifier",
            "inception_weights": "",  # "" takes the file in the cache directory, or fetches it
            "reference": "",  # for inception, such as VIRTUAL_imagenet256_labeled.npz; "" is made of the train split
            "batch_size": 250,
            "neighbours": 3,  # k of precision and recall
            "code_distance_images": 64,  # of the val split, for --what=code_distance
            "classifier_steps": 2000,
            "classifier_batch_size": 64,
            "classifier_learning_rate": 2e-3,
        }
    )
    return config.lock()
