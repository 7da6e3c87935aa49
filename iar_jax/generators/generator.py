"""The contract of a generator, the table of kinds, and finished ones read back.

A stage knows a generator by this contract alone. To add a kind, write a folder beside `autoregressive/` whose builder
returns an object with these methods, and enter the builder in KINDS.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
from etils import epath
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key
from ml_collections import ConfigDict

from iar_jax.config.fields import defaults
from iar_jax.generators.autoregressive import generator as autoregressive
from iar_jax.generators.code_layout import CodeLayout
from iar_jax.generators.masked import generator as masked
from iar_jax.generators.settings import NO_OBJECTIVE, Facts, Objective, SamplingSettings, Weights, Work
from iar_jax.runtime import artifacts, checkpoint, sharding
from iar_jax.runtime.errors import UserError, brief
from iar_jax.runtime.section import Section

# "label" int32 [B] and "codes" int32 [B, L], as rearranged ids; and where training has noise on what the model reads,
# "context" like codes.
Batch = Mapping[str, Any]


@runtime_checkable
class Generator(Protocol):
    """A model of codes, without its weights.

    Parameters are a dict that nobody else looks into. Its entry `settings.AUXILIARY`, where there is one, is what the
    loss alone needs: it is trained, and neither averaged, nor sampled from, nor exported.
    """

    @property
    def layout(self) -> CodeLayout:
        """How its L positions lie in a picture."""

    @property
    def facts(self) -> Facts:
        """What data and codebook say of it."""

    @property
    def splits(self) -> dict[str, tuple[int, str]]:
        """What mesh axes split, by its name for people: (size, axis); each axis must divide its sizes."""

    def flops(self, batch_size: int) -> float:
        """FLOPs of one training step: three times the forward products, nothing recomputed."""

    def init(self, key: Key[Array, ""]) -> Any:
        """Fresh parameters, float32, whose leaves carry their logical axes (flax boxes)."""

    def loss(
        self, params: Any, batch: Batch, key: Key[Array, ""], weights: Weights, teacher: Any = None
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """What training minimises, and its parts as metrics. All dropouts are on.

        Args:
            key: of everything that is drawn at random.
            weights: of its parts, λ of each level of clusters among them.
            teacher: the averaged weights.
        """

    def score(self, params: Any, batch: Batch) -> dict[str, Float[Array, " B"]]:
        """Metrics of each row, without dropout: token_loss, cluster_loss, token_accuracy and cluster_accuracy at least,
        in nats a code and in [0, 1]."""

    def sample(
        self, params: Any, labels: Int[Array, " B"], keys: Key[Array, " B"], settings: SamplingSettings
    ) -> Int[Array, "B L"]:
        """Rearranged ids of one picture for each label; row i depends on labels[i] and keys[i] alone."""

    def decays(self, params: Any) -> Any:
        """True for the leaves that weight decay acts on."""

    def with_vocabulary(self, params: Any, order: Int[Any, " N"]) -> Any:
        """Parameters for ids in another order: id i of the new ones is id order[i] of the old ones."""


class Kind(NamedTuple):
    """A kind of generator.

    Attributes:
        build: makes one of config.model, its facts and its objective.
        check: raises UserError where fields of the config do not go together for this kind, before anything runs.
        implementation: what runs on a platform (cpu, tpu, gpu) where that is chosen by it, for the first line of a
            training; raises UserError where config.model asks for what cannot run there.
        sampling_work: what `sample` has to do at least for so many pictures on one device; None where it is not known.
    """

    build: Callable[[Section, Facts, Objective], Generator]
    check: Callable[[ConfigDict], None] = lambda config: None
    implementation: Callable[[Section, Facts, str], str] = lambda section, facts, platform: ""
    sampling_work: Callable[[Any, int, SamplingSettings], Work] | None = None


# config.model.kind.
KINDS = {
    "autoregressive": Kind(
        autoregressive.build_autoregressive,
        autoregressive.check_autoregressive,
        autoregressive.implementation,
        autoregressive.sampling_work,
    ),
    "masked": Kind(masked.build_masked, masked.check_masked, masked.implementation, masked.sampling_work),
}


def build_generator(section: Section, facts: Facts, objective: Objective = NO_OBJECTIVE) -> Generator:
    """The generator of config.model."""
    return KINDS[section["kind"]].build(section, facts, objective)


def generator_at(directory: epath.Path, step: int) -> artifacts.Metadata:
    """Metadata of a generator: of the finished one where step is 0, else as if it had been finished at that step.

    Raises:
        UserError: it is not finished, or has no whole checkpoint of that step.
    """
    if not step:
        return artifacts.require(directory, "train")
    found = artifacts.read_metadata(directory)
    artifacts.check_stage(directory, found, "train")
    steps = checkpoint.steps_in(directory / "checkpoints")
    if found is None or step not in steps:
        raise UserError(f"{directory} has no checkpoint of step {step}; there are {steps or 'none'}")
    try:
        checksum = checkpoint.read_info(directory / "checkpoints", step).get("ema_checksum")
    except Exception as error:  # damaged, or removed just now
        raise UserError(f"{directory}: the checkpoint of step {step} cannot be read ({brief(error)})") from error
    fingerprint = hashlib.sha256(f"{step} {checksum} {sorted(found.inputs.items())}".encode()).hexdigest()
    return dataclasses.replace(found, fingerprint=fingerprint, figures=found.figures | {"step": step})


def generator_directory(section: Section, workdir: epath.Path) -> epath.Path:
    """Where the generator lies that is sampled and scored: config.inputs.transformer, or the workdir's own. With
    config.inputs.step the former is what training branches off, and the latter its branch.

    Args:
        section: config.inputs.
    """
    if section["step"]:
        return workdir / artifacts.INPUTS["transformer"].default
    return artifacts.locate(section, workdir, "transformer")


def open_generator(section: Section, workdir: epath.Path, step: int) -> artifacts.Artifact:
    """The generator of `generator_directory`, finished or at the checkpoint of a step; see `generator_at`.

    Args:
        section: config.inputs.

    Raises:
        UserError: as `generator_at`.
    """
    directory = generator_directory(section, workdir)
    return artifacts.Artifact(directory, generator_at(directory, step))


class Loaded(NamedTuple):
    """A generator with its averaged weights, sharded by the rules, and what is known of them."""

    generator: Generator
    params: Any
    metadata: artifacts.Metadata


def load_generator(directory: epath.Path, mesh: Mesh, step: int = 0) -> Loaded:
    """A finished generator, or a checkpoint of one; see `generator_at`.

    Raises:
        UserError: as `generator_at`; or of a kind that is not known here, or with weights that cannot be read.
    """
    metadata = generator_at(directory, step)
    # A field that came with a later version was at its default before.
    section = defaults("model") | metadata.config["model"] | {"scan_unroll": 1, "remat": "none", "attention": "auto"}
    if section["kind"] not in KINDS:
        raise UserError(f"{directory} is of the kind {section['kind']!r}; known here are {', '.join(KINDS)}")
    generator = build_generator(section, Facts.from_json(metadata.figures["facts"]))
    boxed = jax.eval_shape(generator.init, jax.random.key(0))
    abstract = checkpoint.abstract_tree(sharding.unbox(boxed), sharding.tree_shardings(mesh, boxed))
    params, _ = checkpoint.restore_params(directory / "checkpoints", abstract, step or None)
    return Loaded(generator, params, metadata)
