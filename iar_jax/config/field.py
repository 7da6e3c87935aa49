"""One field of a config: its default, its meaning, what is allowed, and whether it changes what a stage makes."""

import dataclasses
import importlib
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol, runtime_checkable

# Of counts: devices have them as int32.
MOST = 2**31 - 1


@runtime_checkable
class Allowed(Protocol):
    """What values a field may have. `str()` says it for people, after "allowed is" or "allowed are"."""

    def admits(self, value: Any) -> bool:
        """Whether a value of the right type may be set."""


class Integers(NamedTuple):
    """Integers from a smallest to a largest one, and some besides."""

    smallest: int = 1
    also: tuple[int, ...] = ()
    largest: int = MOST

    def admits(self, value: int) -> bool:
        return self.smallest <= value <= self.largest or value in self.also

    def __str__(self) -> str:
        end = " on (below 2^31)" if self.largest == MOST else f" to {self.largest}"
        return "".join(f"{value}, and " for value in self.also) + f"integers from {self.smallest}{end}"


class Numbers(NamedTuple):
    """An interval of finite numbers, with or without its ends."""

    low: float = 0.0
    high: float = math.inf
    low_in: bool = True
    high_in: bool = False

    def admits(self, value: float) -> bool:
        above = self.low <= value if self.low_in else self.low < value
        return above and (value <= self.high if self.high_in else value < self.high)

    def __str__(self) -> str:
        ends = f"{'[' if self.low_in else '('}{self.low:g}, {self.high:g}{']' if self.high_in else ')'}"
        return f"numbers in {ends}"


POSITIVE = Numbers(0.0, math.inf, low_in=False)
SHARE = Numbers(0.0, 1.0)


class Choices(NamedTuple):
    """Some texts.

    Attributes:
        table: "module:NAME", a mapping whose keys they are: the functions that serve them. It is imported when it is
            asked for, since the rooms that serve the choices lie above the config.
        also: texts besides.
    """

    table: str = ""
    also: tuple[str, ...] = ()

    def names(self) -> tuple[str, ...]:
        return (*self.also, *(table(self.table) if self.table else ()))

    def admits(self, value: str) -> bool:
        return value in self.names()

    def __str__(self) -> str:
        return ", ".join(map(repr, self.names()))


class Sources(NamedTuple):
    """Texts NAME or NAME:ARGUMENT with the names of a table, see `Choices`, whose values have a `usage` that tells
    which of the two it is."""

    table: str

    def admits(self, value: str) -> bool:
        name, _, argument = value.partition(":")
        entry = table(self.table).get(name)
        return entry is not None and bool(argument) == (":" in entry.usage)

    def __str__(self) -> str:
        return ", ".join(repr(entry.usage) for entry in table(self.table).values())


class Texts(NamedTuple):
    """Any text."""

    def admits(self, value: str) -> bool:
        return True

    def __str__(self) -> str:
        return "any text"


class Switch(NamedTuple):
    """True or False."""

    def admits(self, value: bool) -> bool:
        return True

    def __str__(self) -> str:
        return "True, False"


class Tuples(NamedTuple):
    """Tuples of what `each` allows.

    Attributes:
        example: shown for what is allowed.
        empty: whether there may be no entry.
    """

    each: Any
    example: tuple
    empty: bool = False

    def admits(self, value: tuple) -> bool:
        kind = (int, float) if isinstance(self.each, Numbers) else int
        sound = all(isinstance(v, kind) and not isinstance(v, bool) and self.each.admits(v) for v in value)
        return sound and (self.empty or bool(value))

    def __str__(self) -> str:
        return f"a tuple of {self.each}, such as {self.example}"


class Arms(NamedTuple):
    """Tuples of tuples of texts, none of them empty: a name, and what is other under it."""

    def admits(self, value: tuple) -> bool:
        return all(
            isinstance(arm, (tuple, list)) and bool(arm) and all(isinstance(text, str) and text for text in arm)
            for arm in value
        )

    def __str__(self) -> str:
        return "a tuple of (name, section.field=value, ...), such as (('baseline', 'training.cluster_weights=(0.0,)'),)"


@dataclasses.dataclass(frozen=True)
class Field:
    """A field.

    Attributes:
        default: its type is the field's from then on.
        meaning: a sentence for people.
        allowed: what values it may have.
        matters: whether another value makes another artifact; where not, it may change from one part of a run to the
            next. "module:NAME" names a function (old section, new section, steps done so far) -> bool that decides.
        content: of a field that holds a path: the artifact's input that is the fingerprint of what lies there. The
            same content at another path makes no other artifact.
    """

    default: Any
    meaning: str
    allowed: Allowed
    matters: bool | str = True
    content: str = ""

    def changes_artifact(self, old: dict[str, Any], new: dict[str, Any], steps_done: int | None) -> bool:
        """Whether going from one section to the other, which differ in this field, makes another artifact."""
        if isinstance(self.matters, bool):
            return self.matters
        decide: Callable[..., bool] = table(self.matters)
        return decide(old, new, steps_done)


def table(reference: str) -> Any:
    """The object that "module:NAME" names."""
    module, _, name = reference.partition(":")
    return getattr(importlib.import_module(module), name)


def type_name(value: Any) -> str:
    """The type of a default, for people."""
    if isinstance(value, tuple):
        return f"a tuple, such as {value}"
    return {int: "an integer", float: "a number", bool: "True or False", str: "a text"}[type(value)]


def leaves(tree: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, Field]]:
    """All fields of a tree of sections, by their full names."""
    for name, value in tree.items():
        if isinstance(value, Field):
            yield f"{prefix}{name}", value
        else:
            yield from leaves(value, f"{prefix}{name}.")
