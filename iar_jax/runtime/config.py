"""Checks a config before anything runs. Each complaint names the field, its value and what is allowed."""

import difflib
import math
from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from iar_jax.runtime.default_config import default_config
from iar_jax.runtime.errors import UserError

CHOICES = {
    "data.augmentation": ("none", "shift", "crop_flip"),
    "tokenizer.dtype": ("float32", "bfloat16"),
    "tokenizer_training.keep_best": ("", "-psnr", "-codebook_usage", "-codebook_perplexity"),
    "tokenizer_training.schedule": ("constant", "cosine"),
    "codebook.assignment": ("greedy", "optimal"),
    "codebook.order": ("chain", "path"),
    "codes.crops": ("center", "mirror", "shifts", "ten_crop"),
    "model.dtype": ("float32", "bfloat16"),
    "model.remat": ("none", "layer", "dots"),
    "training.cluster_weight_schedule": ("constant", "linear", "cosine"),
    "training.keep_best": ("", "token_loss", "cluster_loss", "-token_accuracy", "-cluster_accuracy"),
    "training.schedule": ("constant", "cosine"),
    "sampling.cfg_schedule": ("constant", "interval", "linear", "power_cosine", "iar2"),
    "sampling.dtype": ("model", "float32", "bfloat16"),
    "sampling.labels": ("balanced", "uniform"),
    "evaluation.features": ("classifier", "inception"),
}

# Integer fields that may be zero; all others are 1 or more. The mesh has a check of its own.
MAY_BE_ZERO = {
    "seed",
    "data.max_shift",
    "data.max_unreadable",
    "tokenizer_training.warmup_steps",
    "tokenizer_training.adversarial_from_step",
    "tokenizer_training.quantize_from_step",
    "tokenizer_training.restart_every",
    "tokenizer_training.keep_every",
    "tokenizer_training.max_skipped_steps",
    "tokenizer_training.restart_until_step",
    "model.hidden_dim",
    "training.keep_every",
    "training.max_skipped_steps",
    "training.warmup_steps",
    "sampling.cfg_first",
    "sampling.cfg_last",
    "sampling.image_size",
    "sampling.step",
    "sampling.top_k",
    "sampling.seed",
}

# Float fields outside the usual [0, infinity): the interval, and whether its ends belong to it.
INTERVALS = {
    "data.val_fraction": (0.0, 1.0, False, False),
    "data.smallest_crop": (0.0, 1.0, False, True),
    "sampling.cfg_power": (0.0, math.inf, False, False),
    "sampling.temperature": (0.0, math.inf, False, False),
    "sampling.top_p": (0.0, 1.0, False, True),
    "tokenizer_training.learning_rate": (0.0, math.inf, False, False),
    "tokenizer_training.clip_norm": (0.0, math.inf, False, False),
    "training.learning_rate": (0.0, math.inf, False, False),
    "training.clip_norm": (0.0, math.inf, False, False),
    "evaluation.classifier_learning_rate": (0.0, math.inf, False, False),
}


def downsampling(config: ConfigDict) -> int:
    """Pixels of a picture's side for each code."""
    return config.tokenizer.patch_size * 2 ** (len(config.tokenizer.channel_multipliers) - 1)


def grid_size(config: ConfigDict) -> int:
    """Side of the square of codes."""
    return config.data.resolution // downsampling(config)


def check_config(config: ConfigDict) -> None:
    """Raises UserError for the first field that is unknown, of the wrong type or impossible."""
    _check_fields(config, default_config(), "config")
    for field, value in _leaves(config):
        _check_value(field, value)
    _check_together(config)


def unknown_field(field: str, known: list[str]) -> str:
    """The complaint about a field that does not exist, with the nearest one that does."""
    section, _, name = field.rpartition(".")
    names = [k.rpartition(".")[2] for k in known if k.rpartition(".")[0] == section]
    # One that is spelled nearly so in another section is likelier than one that is a little alike in this one.
    very_near = difflib.get_close_matches(name, names, n=1, cutoff=0.8)
    elsewhere = difflib.get_close_matches(name, [k.rpartition(".")[2] for k in known], n=1, cutoff=0.8)
    if elsewhere and not very_near:
        full = next(k for k in known if k.rpartition(".")[2] == elsewhere[0])
        return f"{field}: no such field; did you mean {full!r}?"
    near = very_near or difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if near:
        return f"{field}: no such field; did you mean {near[0]!r}?"
    return f"{field}: no such field; {section} has {', '.join(names)}" if names else f"{field}: no such field"


def field_names(config: ConfigDict, prefix: str = "config") -> list[str]:
    """Full names of all fields and sections."""
    names = []
    for key, value in config.items():
        names.append(f"{prefix}.{key}")
        if isinstance(value, ConfigDict):
            names += field_names(value, f"{prefix}.{key}")
    return names


def _check_fields(config: ConfigDict, known: ConfigDict, prefix: str) -> None:
    for key, value in config.items():
        field = f"{prefix}.{key}"
        if key not in known:
            raise UserError(unknown_field(field, field_names(known, prefix)))
        if isinstance(known[key], ConfigDict) != isinstance(value, ConfigDict):
            raise UserError(f"{field} is {value!r}; a {type(known[key]).__name__} belongs there")
        if isinstance(value, ConfigDict):
            _check_fields(value, known[key], field)
        elif type(value) is not type(known[key]):
            raise UserError(
                f"{field} is {value!r}, of type {type(value).__name__}; allowed is {_type_name(known[key])}"
            )
    for key in known:
        if key not in config:
            raise UserError(f"{prefix}.{key} is missing; start the config from iar_jax.runtime.default_config")


def _type_name(value: Any) -> str:
    if isinstance(value, tuple):
        return f"a tuple, such as {value}"
    return {int: "an integer", float: "a number", bool: "True or False", str: "a text"}[type(value)]


def _leaves(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _check_value(field: str, value: Any) -> None:
    if field in CHOICES:
        if value not in CHOICES[field]:
            raise UserError(f"config.{field} is {value!r}; allowed are {', '.join(map(repr, CHOICES[field]))}")
    elif isinstance(value, bool) or field.startswith("mesh."):
        return
    elif isinstance(value, int):
        smallest = 0 if field in MAY_BE_ZERO else 1
        if value < smallest:
            raise UserError(f"config.{field} is {value}; allowed are integers from {smallest} on")
    elif isinstance(value, float):
        if field.endswith(("_rate", ".b1", ".b2", "_decay")) and field not in INTERVALS:
            low, high, low_in, high_in = 0.0, 1.0, True, False
        else:
            low, high, low_in, high_in = INTERVALS.get(field, (0.0, math.inf, True, False))
        inside = (low <= value if low_in else low < value) and (value <= high if high_in else value < high)
        if not inside:
            bounds = f"{'[' if low_in else '('}{low:g}, {high:g}{']' if high_in else ')'}"
            raise UserError(f"config.{field} is {value}; allowed are numbers in {bounds}")
    elif field == "codes.crop_ranges":
        if not (value and all(isinstance(v, float) and v >= 1.0 for v in value)):
            raise UserError(f"config.{field} is {value}; allowed is a tuple of numbers from 1 on, such as (1.1, 1.05)")
    elif isinstance(value, tuple) and not (value and all(isinstance(v, int) and v > 0 for v in value)):
        raise UserError(f"config.{field} is {value}; allowed is a tuple of positive integers, such as (1, 2)")


def _divisors_near(number: int, wanted: int) -> str:
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    return " or ".join(str(d) for d in sorted(sorted(divisors, key=lambda d: abs(math.log(d / wanted)))[:2]))


def _check_together(config: ConfigDict) -> None:
    """What fields allow each other."""
    codebook_size, cluster_size = config.tokenizer.codebook_size, config.codebook.cluster_size
    if codebook_size % cluster_size:
        raise UserError(
            f"config.codebook.cluster_size is {cluster_size}, which does not divide config.tokenizer.codebook_size "
            f"({codebook_size}); {_divisors_near(codebook_size, cluster_size)} would"
        )
    dim, num_heads = config.model.dim, config.model.num_heads
    if dim % num_heads:
        raise UserError(
            f"config.model.num_heads is {num_heads}, which does not divide config.model.dim ({dim}); "
            f"{_divisors_near(dim, num_heads)} would"
        )
    if (dim // num_heads) % 4:
        raise UserError(
            f"config.model.dim {dim} over config.model.num_heads {num_heads} makes heads of {dim // num_heads}; the "
            "rotary embedding of rows and columns needs a multiple of 4"
        )
    if config.tokenizer.local_encoder and len(config.tokenizer.channel_multipliers) > 1:
        raise UserError(
            f"config.tokenizer.local_encoder is set, which goes with one level; "
            f"config.tokenizer.channel_multipliers is {tuple(config.tokenizer.channel_multipliers)}: (1,), "
            "with patch_size as the downsampling, would do"
        )
    factor = downsampling(config)
    if config.data.resolution % factor:
        below = config.data.resolution // factor * factor
        raise UserError(
            f"config.data.resolution is {config.data.resolution}, and the tokenizer turns {factor} x {factor} pixels "
            f"into a code, which does not divide it; {' or '.join(str(r) for r in (below, below + factor) if r)} would"
        )
    if grid_size(config) < 2:
        raise UserError(
            f"config.data.resolution is {config.data.resolution}, a single code of the tokenizer; {2 * factor} at least"
        )
    if config.data.source == "mnist5k" and config.data.resolution != 32:
        raise UserError(f"config.data.resolution is {config.data.resolution}; the source 'mnist5k' has 32")
    training = config.tokenizer_training
    if training.perceptual_weight > 0.0 and config.data.resolution < 16:
        raise UserError(
            "config.tokenizer_training.perceptual_weight is set; LPIPS needs pictures of 16 pixels at least"
        )
    smallest = 2 ** (training.discriminator_layers + 2)
    if training.adversarial_weight > 0.0 and config.data.resolution < smallest:
        raise UserError(
            f"config.tokenizer_training.discriminator_layers is {training.discriminator_layers}, which needs pictures "
            f"of {smallest} pixels; config.data.resolution is {config.data.resolution}"
        )
    for name in ("tokenizer_training", "training"):
        section = config[name]
        if section.keep_best and section.checkpoint_every % section.eval_every:
            raise UserError(
                f"config.{name}.keep_best is {section.keep_best!r}, and checkpoints every {section.checkpoint_every} "
                f"steps are not all validated, which happens every {section.eval_every}; make config.{name}."
                f"checkpoint_every a multiple of config.{name}.eval_every"
            )
    if config.training.batch_size % config.training.accumulation:
        raise UserError(
            f"config.training.accumulation is {config.training.accumulation}, which does not divide "
            f"config.training.batch_size ({config.training.batch_size})"
        )
    positions = grid_size(config) ** 2
    if positions % config.training.loss_chunks:
        raise UserError(
            f"config.training.loss_chunks is {config.training.loss_chunks}, which does not divide the {positions} "
            f"positions of a picture; {_divisors_near(positions, config.training.loss_chunks)} would"
        )
    if config.model.scan_unroll > config.model.num_layers:
        raise UserError(
            f"config.model.scan_unroll is {config.model.scan_unroll}; allowed are 1 to config.model.num_layers "
            f"({config.model.num_layers})"
        )
    sampling = config.sampling
    if sampling.image_size > config.data.resolution:
        raise UserError(
            f"config.sampling.image_size is {sampling.image_size}; images of {config.data.resolution} pixels are "
            "reduced, not enlarged"
        )
    if sampling.cfg_last and sampling.cfg_last <= sampling.cfg_first:
        raise UserError(
            f"config.sampling.cfg_last is {sampling.cfg_last}; it must be above config.sampling.cfg_first "
            f"({sampling.cfg_first}), or 0 for the last code"
        )
    if sampling.top_k > codebook_size:
        raise UserError(f"config.sampling.top_k is {config.sampling.top_k}; the codebook has {codebook_size} codes")
