"""Plain values that stages hand to a generator: what it models, what it is trained on, and how it is sampled."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike

from iar_jax.generators.code_layout import CodeLayout
from iar_jax.generators.guidance import CONSTANT, GUIDANCE, Schedule
from iar_jax.runtime.section import Section

# config.sampling.dtype: of decoding and its cache; None leaves the generator's own.
SAMPLING_DTYPES: dict[str, DTypeLike | None] = {"model": None, "float32": jnp.float32, "bfloat16": jnp.bfloat16}


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


@dataclasses.dataclass(frozen=True)
class Objective:
    """What training and validation measure.

    Attributes:
        cluster_sizes: nested levels of clusters, from the finest on.
        loss_chunks: parts that the head and the loss take the positions in; see `losses.cluster_loss`.
    """

    cluster_sizes: tuple[int, ...] = (1,)
    loss_chunks: int = 1


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
    """

    cfg_scale: float = 1.0
    schedule: Schedule = CONSTANT
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    dtype: DTypeLike | None = None

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
    return f"checkpoint-{name}" if section["step"] else name
