"""The rearrangement of a codebook: a permutation of ids whose blocks of `cluster_size` are the clusters."""

import dataclasses

import numpy as np
from jaxtyping import Int


@dataclasses.dataclass(frozen=True)
class Permutation:
    """Old ids to new ids.

    Attributes:
        old_to_new: int32 [N], a permutation of 0 .. N - 1.
        cluster_size: S; new ids [c * S, (c + 1) * S) are cluster c.

    Raises:
        ValueError: when old_to_new is no permutation (it names the first id that is wrong) or S does not divide N.
    """

    old_to_new: Int[np.ndarray, " N"]
    cluster_size: int

    def __post_init__(self):
        size = len(self.old_to_new)
        seen = np.zeros(size, bool)
        for old, new in enumerate(self.old_to_new.tolist()):
            if not 0 <= new < size:
                raise ValueError(f"no permutation: code {old} goes to {new}, which is outside [0, {size})")
            if seen[new]:
                raise ValueError(f"no permutation: code {old} goes to {new}, and so does a code before it")
            seen[new] = True
        if self.cluster_size < 1 or size % self.cluster_size:
            raise ValueError(f"cluster_size {self.cluster_size} does not divide the codebook size {size}")

    @classmethod
    def from_order(cls, order: Int[np.ndarray, " N"], cluster_size: int) -> "Permutation":
        """From old ids in their new order, order[new] = old."""
        return cls(invert(order), cluster_size)

    @property
    def new_to_old(self) -> Int[np.ndarray, " N"]:
        """The inverse, int32 [N]."""
        return invert(self.old_to_new)

    @property
    def cluster_of_old(self) -> Int[np.ndarray, " N"]:
        """Cluster of each old id, int32 [N]."""
        return self.old_to_new // self.cluster_size


def invert(permutation: Int[np.ndarray, " N"]) -> Int[np.ndarray, " N"]:
    """inverse[permutation[i]] = i, int32."""
    inverse = np.empty(len(permutation), np.int32)
    inverse[permutation] = np.arange(len(permutation), dtype=np.int32)
    return inverse
