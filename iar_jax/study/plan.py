"""What config.study asks for: arms, their runs, and what runs share."""

import ast
import hashlib
import itertools
import json
from collections.abc import Sequence
from typing import NamedTuple

from ml_collections import ConfigDict

from iar_jax.config.checks import check_config, field_names, unknown_field
from iar_jax.config.command_line import value_of
from iar_jax.config.field import leaves, type_name
from iar_jax.config.fields import SECTIONS, default_config
from iar_jax.runtime.errors import UserError

# What the arms of a group share, so that their losses and scores mean the same.
SHARED = ("seed", "inputs", "mesh", "data", "tokenizer", "tokenizer_training", "codes", "evaluation")
SAME_LENGTH = ("num_steps", "batch_size", "eval_every")

# What the weights of a run depend on; and what is measured of them.
TRAINED = ("seed", "data", "tokenizer", "tokenizer_training", "codebook", "codes", "model", "training")
MEASURED = ("sampling", "evaluation")


class Arm(NamedTuple):
    """One way of training that a study compares with others.

    Attributes:
        name: NAME, or GROUP/NAME: arms are compared with the baseline of their group.
        config: the study's, with the arm's overrides.
        overrides: section.field=value.
        trained_as: its own name, or that of the arm whose weights it samples in another way.
    """

    name: str
    config: ConfigDict
    overrides: tuple[str, ...]
    trained_as: str

    @property
    def group(self) -> str:
        return self.name.rpartition("/")[0]


class Run(NamedTuple):
    """An arm with a seed, and with a learning rate where that is being tuned.

    Attributes:
        config: the arm's, with seed and rate; what is shared is made with the arm's own.
    """

    arm: Arm
    seed: int
    config: ConfigDict
    learning_rate: float | None = None

    @property
    def name(self) -> str:
        rate = "" if self.learning_rate is None else f"tuning-{self.learning_rate:g}-"
        return f"{self.arm.name}/{rate}{self.seed}"

    @property
    def place(self) -> str:
        """Its directory under runs/. Another config has another one."""
        rate = self.config.training.learning_rate
        return f"{self.arm.trained_as}/{rate:g}-{self.seed}-{digest(self.config, *TRAINED)}"


class Plan(NamedTuple):
    """All that a study has.

    Attributes:
        arms: in the order of the config.
        baselines: the name of the arm that each group's others are compared with.
    """

    arms: tuple[Arm, ...]
    baselines: dict[str, str]

    def arm(self, name: str) -> Arm:
        return next(arm for arm in self.arms if arm.name == name)


def plan_of(config: ConfigDict) -> Plan:
    """The arms of config.study, checked.

    Raises:
        UserError: none, or one that is impossible, is named twice, has no baseline, or does not share what its group
            shares.
    """
    section = config.study
    if not section.arms:
        raise UserError("config.study.arms is empty; a study compares two arms at least (see configs/studies)")
    arms = tuple(arm_of(config, *arm) for arm in section.arms)
    names = [arm.name for arm in arms]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"config.study.arms has {name!r} twice")
    shared_seeds = set(section.seeds) & set(section.tuning_seeds)
    if shared_seeds:
        raise UserError(
            f"config.study.tuning_seeds has {min(shared_seeds)}, which is one of config.study.seeds: rates are tuned "
            "on seeds that the comparison does not use"
        )
    if len(set(section.seeds)) < len(section.seeds):
        raise UserError(f"config.study.seeds is {tuple(section.seeds)}: a seed is there twice")
    if section.sample_every % config.training.checkpoint_every:
        raise UserError(
            f"config.study.sample_every is {section.sample_every}, which is no multiple of "
            f"config.training.checkpoint_every ({config.training.checkpoint_every})"
        )
    baselines = {}
    for arm in arms:
        baseline = f"{arm.group}/{section.baseline}" if arm.group else section.baseline
        if baseline not in names:
            raise UserError(
                f"config.study.arms has {arm.name!r}, and no {baseline!r} to compare it with (config.study.baseline)"
            )
        baselines[arm.group] = baseline
    plan = Plan(arms, baselines)
    plan = Plan(tuple(arm._replace(trained_as=trainer_of(plan, arm)) for arm in arms), baselines)
    for arm in plan.arms:
        check_shares(arm, plan.arm(baselines[arm.group]))
    return plan


def arm_of(config: ConfigDict, name: str, *overrides: str) -> Arm:
    """An arm with its overrides, written as on the command line without `--config.`.

    Raises:
        UserError: a name that is no path, or a field or value that is not allowed.
    """
    parts = name.split("/")
    if not all(part.replace("-", "").replace("_", "").replace(".", "").isalnum() for part in parts):
        raise UserError(
            f"config.study.arms: {name!r}; names are letters, digits, '-', '_' and '.', with '/' for a group"
        )
    changed = config.copy_and_resolve_references()
    try:
        for override in overrides:
            set_field(changed, override)
        check_config(changed)
    except UserError as error:
        raise UserError(f"config.study.arms, {name!r}: {error}") from error
    return Arm(name, changed, overrides, trained_as=name)


def set_field(config: ConfigDict, override: str) -> None:
    """Sets section.field=value.

    Raises:
        UserError: no such field, or no value of its type.
    """
    name, equals, text = override.partition("=")
    known = field_names(default_config())
    if f"config.{name}" not in known or not equals:
        raise UserError(
            unknown_field(f"config.{name}", known) if equals else f"{override!r} is not section.field=value"
        )
    section, _, key = name.rpartition(".")
    place = config[section] if section else config
    kind = type(place[key])
    if kind is ConfigDict:
        raise UserError(f"config.{name} is a section; set one of its fields: {', '.join(place[key])}")
    if section in ("study", "inputs", "mesh"):
        raise UserError(f"config.{name} is of the study as a whole, and not of an arm")
    try:
        value = text if kind is str else ast.literal_eval(text)
        place[key] = float(value) if kind is float and not isinstance(value, bool) else value
    except (ValueError, SyntaxError, TypeError) as error:
        raise UserError(f"config.{name} is {text!r}; allowed is {type_name(place[key])}") from error


def check_shares(arm: Arm, baseline: Arm) -> None:
    """Raises UserError where an arm differs from its baseline in what both have to share."""
    names = [name for name, _ in leaves(SECTIONS) if name.partition(".")[0] in SHARED]
    names += [f"training.{name}" for name in SAME_LENGTH]
    pairs = [
        (name, value_of(baseline.config, f"config.{name}"), value_of(arm.config, f"config.{name}")) for name in names
    ]
    differing = [f"config.{name} ({theirs!r}, {own!r})" for name, theirs, own in pairs if theirs != own]
    if differing:
        raise UserError(
            f"config.study.arms: {arm.name!r} differs from {baseline.name!r} in {', '.join(differing)}, which arms "
            f"that are compared share; give it a group with a baseline of its own, as 'GROUP/{arm.name}'"
        )


def tuning_runs(arm: Arm) -> list[Run]:
    """The runs that choose an arm's learning rate and guidance; none where both are fixed."""
    section = arm.config.study
    rates = tuple(section.learning_rates)
    if not rates and len(section.cfg_scales) < 2:
        return []
    rates = rates or (float(arm.config.training.learning_rate),)
    return [
        Run(arm, seed, with_seed(arm.config, seed, float(rate)), float(rate))
        for rate in rates
        for seed in section.tuning_seeds
    ]


def comparison_runs(plan: Plan, arm: Arm, learning_rate: float, cfg_scale: float) -> list[Run]:
    """The runs of an arm that count. One whose config is that of an arm before it checks the apparatus: its first seed
    alone is run, and is to end the same to the last bit."""
    seeds = arm.config.study.seeds[:1] if twin_of(plan, arm) else arm.config.study.seeds
    runs = []
    for seed in seeds:
        config = with_seed(arm.config, seed, learning_rate)
        config.sampling.cfg_scale = cfg_scale
        runs.append(Run(arm, seed, config))
    return runs


def twin_of(plan: Plan, arm: Arm) -> Arm | None:
    """The first arm before this one, of its group, that trains and is sampled the same."""
    return next((other for other in trained_the_same(plan, arm) if sampled_the_same(other, arm)), None)


def trainer_of(plan: Plan, arm: Arm) -> str:
    """The name of the first arm before this one, of its group, that trains the same and is sampled otherwise; else its
    own. A twin has weights of its own: to end as another one does checks the apparatus."""
    others = trained_the_same(plan, arm)
    return arm.name if not others or twin_of(plan, arm) else others[0].name


def trained_the_same(plan: Plan, arm: Arm) -> list[Arm]:
    """The arms before this one, of its group, that train the same."""
    own = digest(arm.config, *TRAINED)
    before = itertools.takewhile(lambda other: other.name != arm.name, plan.arms)
    return [other for other in before if other.group == arm.group and digest(other.config, *TRAINED) == own]


def sampled_the_same(first: Arm, second: Arm) -> bool:
    return digest(first.config, *MEASURED) == digest(second.config, *MEASURED)


def with_seed(config: ConfigDict, seed: int, learning_rate: float) -> ConfigDict:
    """The config of a run: its seed is of training and sampling alone; what is shared was made with the study's."""
    changed = config.copy_and_resolve_references()
    changed.seed, changed.sampling.seed = seed, seed
    changed.training.learning_rate = learning_rate
    if changed.study.sample_every:
        changed.training.keep_every = changed.study.sample_every
    return changed


def digest(config: ConfigDict, *sections: str) -> str:
    """Eight hexadecimal digits of all fields of some sections that matter to what is made. Fields at their defaults do
    not count, so that runs are found again where a later version has more of them."""
    fields = {n: field for n, field in leaves(SECTIONS) if n.partition(".")[0] in sections and field.matters}
    found = {name: value_of(config, f"config.{name}") for name in fields}
    values = {name: value for name, value in found.items() if value != fields[name].default}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]


def lowest(found: Sequence[tuple[float, float]]) -> float:
    """Of (candidate, value) pairs, the candidate with the lowest mean of its values; the smaller one of equals."""
    values: dict[float, list[float]] = {}
    for candidate, seen in found:
        values.setdefault(candidate, []).append(seen)
    return min(sorted(values), key=lambda candidate: sum(values[candidate]) / len(values[candidate]))
