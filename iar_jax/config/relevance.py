"""The part of a config that an artifact is made by, and whether it may change behind it."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from iar_jax.config.field import Field, leaves
from iar_jax.config.fields import SECTIONS, defaults


class Difference(NamedTuple):
    """A field of the config that is not what it was.

    Attributes:
        content: of a path: the input whose fingerprint tells whether it is the same content at another place.
    """

    field: str
    old: Any
    new: Any
    content: str = ""

    def __str__(self) -> str:
        return f"config.{self.field} was {self.old!r}, now {self.new!r}"


@dataclasses.dataclass(frozen=True)
class RelevantConfig:
    """Sections of a config, as plain data.

    Attributes:
        content: by section; what metadata.json keeps.
    """

    content: dict[str, Any]

    def restricted(self, known: dict[str, Any]) -> "RelevantConfig":
        """The fields that `known` has too."""
        return RelevantConfig(_restricted(self.content, known))

    def differences(self, stored: dict[str, Any], steps_done: int | None) -> tuple[list[Difference], list[Difference]]:
        """What differs from the sections of an artifact: what makes another one of it, and what does not.

        Args:
            stored: sections as they were; a field that came with a later version was at its default.
            steps_done: training steps that the artifact has behind it; None is all of them.
        """
        fields: dict[str, Field] = dict(leaves(SECTIONS))
        before, now = _filled(stored, _as_json(defaults())), _as_json(self.content)
        matter: list[Difference] = []
        rest: list[Difference] = []
        for difference in _differing(before, now, ""):
            section = difference.field.partition(".")[0]
            field = fields.get(difference.field)
            changes = field is None or field.changes_artifact(before[section], now[section], steps_done)
            named = difference._replace(content=field.content if field else "")
            (matter if changes else rest).append(named)
        return matter, rest


def relevant(config: ConfigDict, names: Sequence[str]) -> RelevantConfig:
    """The named sections, or single fields."""
    chosen = {name: config[name] for name in names}
    plain = {name: value.to_dict() if isinstance(value, ConfigDict) else value for name, value in chosen.items()}
    return RelevantConfig(plain)


def _as_json(content: dict[str, Any]) -> dict[str, Any]:
    """As JSON gives it back: lists in the place of tuples."""
    return json.loads(json.dumps(content))


def _filled(stored: Any, known: Any) -> Any:
    if isinstance(stored, dict) and isinstance(known, dict):
        return stored | {k: _filled(stored[k], v) if k in stored else v for k, v in known.items()}
    return stored


def _restricted(content: Any, known: Any) -> Any:
    if isinstance(content, dict) and isinstance(known, dict):
        return {key: _restricted(content[key], value) for key, value in known.items() if key in content}
    return content


def _differing(old: dict[str, Any], new: dict[str, Any], prefix: str) -> Iterator[Difference]:
    """Fields of the new sections that are others than the old ones'."""
    for key in sorted(new):
        if isinstance(new[key], dict):
            yield from _differing(old.get(key) or {}, new[key], f"{prefix}{key}.")
        elif old.get(key) != new[key]:
            yield Difference(f"{prefix}{key}", old.get(key), new[key])
