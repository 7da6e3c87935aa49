"""Plain values that stages hand to a generator: what it models, what it is trained on, and how it is sampled."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from iar_jax.codebook.neighbours import near_codes
from iar_jax.generators.code_layout import CodeLayout
from iar_jax.generators.guidance import CONSTANT, GUIDANCE, Schedule
from iar_jax.losses.cluster_loss import Clusters
from iar_jax.losses.neighbours import Neighbours
from iar_jax.runtime.section import Section

# config.sampling.dtype: of decoding and its cache; None leaves the generator's own.
SAMPLING_DTYPES: dict[str, DTypeLike | None] = {"model": None, "float32": jnp.float32, "bfloat16": jnp.bfloat16}


# Fields of config.model that the transformers of both kinds take as they are.
NETWORK_FIELDS = (
    "dim",
    "num_layers",
    "num_heads",
    "init_std",
    "token_dropout_rate",
    "residual_dropout_rate",
    "ffn_dropout_rate",
    "drop_path_rate",
    "class_dropout_rate",
    "remat",
    "attention",
    "attention_block",
    "scan_unroll",
)

# The entry of a generator's parameters, where there is one, that training alone needs.
AUXILIARY = "auxiliary"

# Fields of config.sampling that masked models alone read, and how they are said in the name of samples.
MASKED = {
    "mask_steps": "steps",
    "mask_order": "",
    "mask_schedule": "",
    "mask_noise": "noise",
    "mask_temperature_end": "tend",
}


@dataclasses.dataclass(frozen=True)
class Facts:
    """What data and codebook say of a generator; together with config.model they describe it. Kept in its metadata.

    Attributes:
        vocab_size: N, the number of codes.
        num_classes: labels are in [0, num_classes).
        layout: how the positions lie in a picture.
    """

    vocab_size: int
    num_classes: int
    layout: CodeLayout

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "vocab_size": self.vocab_size,
            "num_classes": self.num_classes,
            "layout": list(self.layout.sides),
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Facts":
        """Undoes `to_json`."""
        return cls(content["vocab_size"], content["num_classes"], CodeLayout(tuple(content["layout"])))


class Weights(NamedTuple):
    """What the parts of a loss count at a step.

    Attributes:
        clusters: λ of each level of clusters.
        lookahead: of `autoregressive.auxiliary`'s look-ahead; None where there is none.
    """

    clusters: Float[Array, " levels"]
    lookahead: Float[Array, ""] | None = None


@dataclasses.dataclass(frozen=True)
class Objective:
    """What training and validation measure.

    Attributes:
        cluster_sizes: nested levels of clusters, from the finest on; or the offsets of unequal ones.
        loss_chunks, label_smoothing: see `losses.cluster_loss`.
        mean_of_pictures: its `mean_of_rows`.
        mask_schedule, mask_draw: how a masked model's inputs are masked; keys of `masked.masking`'s tables.
        unmasked_weight: what its positions that are not masked count in the loss.
        neighbour_weight: α of `neighbours`, see `losses.neighbours`.
        regression_weight: of the code vectors that hidden states are held to, see `autoregressive.auxiliary`.
        lookahead_weight: of its look-ahead; 0 is none, and its schedule is the trainer's.
        vectors: float32 [N, d] of the rearranged codes, unit ones; None where nothing asks for them.
        neighbours: of each code; None where nothing asks for them.
    """

    cluster_sizes: tuple[Clusters, ...] = (1,)
    loss_chunks: int = 1
    label_smoothing: float = 0.0
    mean_of_pictures: bool = False
    mask_schedule: str = "arccos"
    mask_draw: str = "independent"
    unmasked_weight: float = 1.0
    neighbour_weight: float = 0.0
    regression_weight: float = 0.0
    lookahead_weight: float = 0.0
    vectors: Float[np.ndarray, "N d"] | None = dataclasses.field(default=None, repr=False, compare=False)
    neighbours: Neighbours | None = dataclasses.field(default=None, repr=False, compare=False)

    @classmethod
    def of(
        cls,
        section: Section,
        cluster_sizes: tuple[Clusters, ...],
        vectors: Float[Array | np.ndarray, "N d"] | None = None,
    ) -> "Objective":
        """What config.training says, of a codebook with these clusters and, where it `needs_vectors`, these vectors.

        Raises:
            ValueError: it needs vectors, and there are none.
        """
        if vectors is None and needs_vectors(section):
            raise ValueError("config.training asks for the tokenizer's code vectors, and none are given")
        given = ("cluster_sizes", "vectors", "neighbours")
        names = [field.name for field in dataclasses.fields(cls) if field.name not in given]
        neighbours = None
        if vectors is not None and needs_neighbours(section):
            found = near_codes(vectors, section["neighbour_count"], section["neighbour_temperature"])
            neighbours = Neighbours(*found)
        kept = None if vectors is None else np.asarray(vectors, np.float32)
        return cls(cluster_sizes, **{name: section[name] for name in names}, vectors=kept, neighbours=neighbours)

    def indivisible(self, vocab_size: int) -> int:
        """How many parts the codes have that are not to be split over devices: clusters of the coarsest level, which
        are the fewest. Unequal ones may be split."""
        clusters = self.cluster_sizes[-1]
        return vocab_size if isinstance(clusters, tuple) else vocab_size // clusters

    @property
    def holds_states(self) -> bool:
        """Whether the loss asks for states inside of the network, and for heads on them."""
        return self.regression_weight > 0.0 or self.lookahead_weight > 0.0

    @property
    def soft(self) -> Neighbours | None:
        """The neighbours that the loss takes, where it does."""
        return self.neighbours if self.neighbour_weight else None


def needs_neighbours(section: Section) -> bool:
    """Whether config.training asks for each code's near ones."""
    drawn = section["context_noise"] > 0.0 and section["context_noise_draw"] == "neighbours"
    return section["neighbour_weight"] > 0.0 or drawn


def needs_vectors(section: Section) -> bool:
    """Whether config.training asks for the tokenizer's code vectors."""
    return needs_neighbours(section) or section["regression_weight"] > 0.0


# For sampling, which measures nothing.
NO_OBJECTIVE = Objective()


class Work(NamedTuple):
    """FLOPs of a computation, and bytes that it reads from memory at least."""

    flops: float
    bytes: float


@dataclasses.dataclass(frozen=True)
class SamplingSettings:
    """How codes are drawn. A generator takes what it knows of.

    Attributes:
        cfg_scale: scale of classifier-free guidance; 1 turns it off.
        schedule: how the scale changes from the first code to the last.
        temperature: divides the guided logits; positive.
        top_k, top_p: restrict the draw; 0 and 1 leave it alone; see `guidance.draw`.
        dtype: of the computation; None is the generator's own.
        mask_steps, mask_order, mask_schedule, mask_noise, mask_temperature_end: of masked models: passes, the order in
            which positions are set, how many in each pass, Gumbel noise on confidences at the first pass, temperature
            of the last pass (0 is `temperature`).
    """

    cfg_scale: float = 1.0
    schedule: Schedule = CONSTANT
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    dtype: DTypeLike | None = None
    mask_steps: int = 32
    mask_order: str = "halton_rolled"
    mask_schedule: str = "arccos"
    mask_noise: float = 0.0
    mask_temperature_end: float = 0.0

    @classmethod
    def of(cls, section: Section) -> "SamplingSettings":
        """What config.sampling says."""
        return cls(
            cfg_scale=section["cfg_scale"],
            schedule=schedule_of(section),
            temperature=section["temperature"],
            top_k=section["top_k"],
            top_p=section["top_p"],
            dtype=SAMPLING_DTYPES[section["dtype"]],
            **{name: section[name] for name in MASKED},
        )


def schedule_of(section: Section) -> Schedule:
    """The schedule of guidance that config.sampling describes."""
    return Schedule(
        section["cfg_schedule"],
        start=section["cfg_start"],
        first=section["cfg_first"],
        last=section["cfg_last"],
        power=section["cfg_power"],
        attention_weight=section["cfg_attention_weight"],
    )


def samples_name(section: Section, step: int) -> str:
    """STEP-SETTINGS, the name of the samples of config.sampling from the checkpoint of a step, and of their scores;
    "checkpoint-" before it where config.sampling.step asks for one."""
    name = (
        f"{step:07d}-cfg{section['cfg_scale']:g}-t{section['temperature']:g}-k{section['top_k']}-"
        f"p{section['top_p']:g}-{section['labels']}-n{section['num_images']}-seed{section['seed']}"
    )
    schedule = schedule_of(section)
    name += GUIDANCE[schedule.kind].label(schedule)
    name += f"-{section['dtype']}" if SAMPLING_DTYPES[section["dtype"]] else ""
    name += f"-{section['image_size']}px" if section["image_size"] else ""
    own = SamplingSettings()
    name += "".join(
        f"-{said}{section[field] if isinstance(section[field], str) else format(section[field], 'g')}"
        for field, said in MASKED.items()
        if section[field] != getattr(own, field)
    )
    return f"checkpoint-{name}" if section["step"] else name
