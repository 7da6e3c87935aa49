"""What a room is handed of a config."""

from collections.abc import Iterable
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class Section(Protocol):
    """Values by name: a section of an ml_collections config (which is not a Mapping), or a dict like it."""

    def __getitem__(self, name: str) -> Any: ...

    def __contains__(self, name: object) -> bool: ...

    def items(self) -> Iterable[tuple[str, Any]]: ...
