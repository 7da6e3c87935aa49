"""How the L positions of a picture's codes lie in it."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Array, Int

from iar_jax.runtime.artifacts import Artifact
from iar_jax.runtime.errors import UserError


@dataclasses.dataclass(frozen=True)
class CodeLayout:
    """Squares of codes, one after the other, each row by row.

    Attributes:
        sides: of the squares. (16,) is one square of 256 codes; a next-scale model has several, (1, 2, 3, ..., 16).

    Raises:
        ValueError: no square, or one of a side below 1.
    """

    sides: tuple[int, ...]

    def __post_init__(self):
        if not self.sides or min(self.sides) < 1:
            raise ValueError(f"a layout of squares with the sides {self.sides} has no positions")

    @classmethod
    def square(cls, side: int) -> "CodeLayout":
        """One square."""
        return cls((side,))

    @classmethod
    def of_length(cls, length: int) -> "CodeLayout":
        """The one square that has so many positions.

        Raises:
            ValueError: there is none.
        """
        side = math.isqrt(length)
        if side**2 != length:
            raise ValueError(f"{length} codes are not a square")
        return cls.square(side)

    @classmethod
    def recorded(cls, sides: Sequence[int] | None, length: int) -> "CodeLayout":
        """The layout that the metadata of codes has, which is one square where they are from before it was kept.

        Raises:
            ValueError: it has another number of positions than the codes.
        """
        found = cls(tuple(sides)) if sides else cls.of_length(length)
        if found.length != length:
            raise ValueError(f"its metadata.json says squares of {found.sides}, and an image has {length} codes")
        return found

    def only_side(self, kind: str) -> int:
        """The side of the one square that a kind of generator goes over.

        Raises:
            ValueError: there are several.
        """
        if len(self.sides) != 1:
            raise ValueError(f"the kind {kind} goes over one square of codes, not those of {self.sides}")
        return self.sides[0]

    @property
    def length(self) -> int:
        """L, the number of positions."""
        return sum(side**2 for side in self.sides)

    def squares(self, codes: Int[Array | np.ndarray, "B L"]) -> list[Int[Array | np.ndarray, "B side side"]]:
        """The codes of each square."""
        found, start = [], 0
        for side in self.sides:
            found.append(codes[:, start : start + side**2].reshape(-1, side, side))
            start += side**2
        return found


def layout_of(codes: Artifact, length: int) -> CodeLayout:
    """The layout of extracted codes, of which an image has `length`.

    Raises:
        UserError: their metadata has another one, or none and they are not a square.
    """
    try:
        return CodeLayout.recorded(codes.metadata.figures.get("layout"), length)
    except ValueError as error:
        raise UserError(f"{codes.directory}: {error}") from error
