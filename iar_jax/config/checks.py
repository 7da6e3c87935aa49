"""Checks a config before anything runs. Each complaint names the field, its value and what is allowed."""

import difflib
import itertools
import math
from typing import Any

from ml_collections import ConfigDict

from iar_jax.config.field import Field, leaves, table, type_name
from iar_jax.config.fields import KINDS, SECTIONS, UNEQUAL, default_config
from iar_jax.runtime.errors import UserError


def downsampling(config: ConfigDict) -> int:
    """Pixels of a picture's side for each code."""
    return config.tokenizer.patch_size * 2 ** (len(config.tokenizer.channel_multipliers) - 1)


def grid_size(config: ConfigDict) -> int:
    """Side of the square of codes."""
    return config.data.resolution // downsampling(config)


def check_config(config: ConfigDict) -> None:
    """Raises UserError for the first field that is unknown, of the wrong type or impossible."""
    _check_fields(config, default_config(), "config")
    for name, field in leaves(SECTIONS):
        section, _, key = name.rpartition(".")
        _check_value(name, field, (config[section] if section else config)[key])
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
            raise UserError(f"{field} is {value!r}, of type {type(value).__name__}; allowed is {type_name(known[key])}")
    for key in known:
        if key not in config:
            raise UserError(f"{prefix}.{key} is missing; start the config from iar_jax.config.fields.default_config")


def _check_value(name: str, field: Field, value: Any) -> None:
    # Tables of choices are asked for where they are needed alone: some take a second to import.
    if value != field.default and not field.allowed.admits(value):
        verb = "is" if isinstance(value, tuple) else "are"
        shown = repr(value) if isinstance(value, str) else value
        raise UserError(f"config.{name} is {shown}; allowed {verb} {field.allowed}")


def divisors_near(number: int, wanted: int) -> str:
    """The two divisors of a number that are nearest to a wanted one, for a complaint."""
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    return " or ".join(str(d) for d in sorted(sorted(divisors, key=lambda d: abs(math.log(d / wanted)))[:2]))


def _check_together(config: ConfigDict) -> None:
    """What fields allow each other."""
    _check_levels(config, config.tokenizer.codebook_size)
    # A kind checks its own fields.
    table(KINDS)[config.model.kind].check(config)
    _check_resolution(config)
    for name in ("tokenizer_training", "training"):
        _check_run(name, config[name])
    _check_training(config)
    _check_sampling(config)


def _check_resolution(config: ConfigDict) -> None:
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


def _check_run(name: str, section: ConfigDict) -> None:
    if section.decay_steps and section.warmup_steps + section.decay_steps > section.num_steps:
        raise UserError(
            f"config.{name}.warmup_steps ({section.warmup_steps}) and config.{name}.decay_steps "
            f"({section.decay_steps}) are more than config.{name}.num_steps ({section.num_steps})"
        )
    if section.keep_best and section.checkpoint_every % section.eval_every:
        raise UserError(
            f"config.{name}.keep_best is {section.keep_best!r}, and checkpoints every {section.checkpoint_every} "
            f"steps are not all validated, which happens every {section.eval_every}; make config.{name}."
            f"checkpoint_every a multiple of config.{name}.eval_every"
        )


def _check_training(config: ConfigDict) -> None:
    if not 2 <= config.training.neighbour_count <= config.tokenizer.codebook_size:
        raise UserError(
            f"config.training.neighbour_count is {config.training.neighbour_count}; a code has 2 to "
            f"{config.tokenizer.codebook_size} near ones, itself among them"
        )
    lookahead = config.training.lookahead_weight or config.training.regression_weight
    if lookahead and config.model.num_layers < 2:
        raise UserError(
            "config.training.lookahead_weight and regression_weight are of states inside of the network; "
            "config.model.num_layers is 1: 2 at least"
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
            f"positions of a picture; {divisors_near(positions, config.training.loss_chunks)} would"
        )


def _check_sampling(config: ConfigDict) -> None:
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
    codebook_size = config.tokenizer.codebook_size
    if sampling.top_k > codebook_size:
        raise UserError(f"config.sampling.top_k is {config.sampling.top_k}; the codebook has {codebook_size} codes")


def _check_levels(config: ConfigDict, codebook_size: int) -> None:
    sizes, training = tuple(config.codebook.cluster_sizes), config.training
    if config.codebook.assignment == UNEQUAL:
        if len(sizes) > 1:
            raise UserError(
                f"config.codebook.assignment is {UNEQUAL!r}, whose clusters are one level; config.codebook."
                f"cluster_sizes is {sizes}: give the mean size alone, such as ({sizes[0]},)"
            )
        if training.label_smoothing:
            raise UserError(
                f"config.training.label_smoothing is {training.label_smoothing:g}, which is of equal clusters; config."
                f"codebook.assignment is {UNEQUAL!r}: leave one of them"
            )
    for finer, coarser in itertools.pairwise(sizes):
        if coarser % finer or coarser == finer:
            raise UserError(
                f"config.codebook.cluster_sizes is {sizes}: {finer} does not divide {coarser}; each size divides the "
                "next larger one, such as (8, 64)"
            )
    if codebook_size % sizes[-1]:
        raise UserError(
            f"config.codebook.cluster_sizes is {sizes}: {sizes[-1]} does not divide config.tokenizer.codebook_size "
            f"({codebook_size}); {divisors_near(codebook_size, sizes[-1])} would"
        )
    weights, end = tuple(training.cluster_weights), tuple(training.cluster_weights_end)
    if len(weights) != len(sizes):
        raise UserError(
            f"config.training.cluster_weights is {weights} and config.codebook.cluster_sizes is {sizes}: give one "
            "weight for each size"
        )
    if end and len(end) != len(weights):
        raise UserError(
            f"config.training.cluster_weights_end is {end} and config.training.cluster_weights is {weights}: give one "
            "weight for each, or none"
        )
