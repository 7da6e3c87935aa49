"""The rearrangement of a codebook: a permutation of ids in which every cluster is a run of ids."""

import dataclasses
import io
import itertools
from typing import Any

import numpy as np
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class Permutation:
    """Old ids to new ids.

    Attributes:
        old_to_new: int32 [N], a permutation of 0 .. N - 1.
        cluster_size: S of the finest level; new ids [c * S, (c + 1) * S) are cluster c. 0 where clusters are unequal.
        coarser_sizes: of further levels, nested; new ids [c * S, (c + 1) * S) are cluster c of a level with clusters
            of S codes.
        offsets: of unequal clusters, which are one level: the first new id of each, and last N; else empty.

    Raises:
        ValueError: when old_to_new is not a permutation (it names the first id that is wrong), or a size does not
            divide the next one, or the last one N, or offsets do not rise from 0 to N.
    """

    old_to_new: Int[np.ndarray, " N"]
    cluster_size: int
    coarser_sizes: tuple[int, ...] = ()
    offsets: tuple[int, ...] = ()

    def __post_init__(self):
        size = len(self.old_to_new)
        seen = np.zeros(size, bool)
        for old, new in enumerate(self.old_to_new.tolist()):
            if not 0 <= new < size:
                raise ValueError(f"not a permutation: code {old} goes to {new}, which is outside [0, {size})")
            if seen[new]:
                raise ValueError(f"not a permutation: code {old} goes to {new}, and so does a code before it")
            seen[new] = True
        if self.offsets:
            if self.cluster_size or self.coarser_sizes:
                raise ValueError("clusters have one size, or offsets")
            if self.offsets[0] != 0 or self.offsets[-1] != size or min(np.diff(self.offsets)) < 1:
                raise ValueError(f"offsets of clusters rise from 0 to the number of codes, {size}")
            return
        if self.cluster_size < 1 or size % self.cluster_size:
            raise ValueError(f"cluster_size {self.cluster_size} does not divide the codebook size {size}")
        for finer, coarser in itertools.pairwise((*self.cluster_sizes, size)):
            if coarser % finer:
                raise ValueError(f"cluster sizes {self.cluster_sizes} of {size} codes are not nested")

    @classmethod
    def from_order(
        cls, order: Int[np.ndarray, " N"], cluster_size: int, coarser_sizes: tuple[int, ...] = ()
    ) -> "Permutation":
        """From old ids in their new order, order[new] = old."""
        return cls(invert(order), cluster_size, coarser_sizes)

    @property
    def cluster_sizes(self) -> tuple[int, ...]:
        """Of all levels, from the finest on."""
        return (self.cluster_size, *self.coarser_sizes)

    @property
    def levels(self) -> tuple[int | tuple[int, ...], ...]:
        """The clusters of all levels as `losses.cluster_loss` takes them: by their size, or by offsets."""
        return (self.offsets,) if self.offsets else self.cluster_sizes

    @property
    def bounds(self) -> Int[np.ndarray, " bounds"]:
        """First new ids of the finest level's clusters, and last N."""
        if self.offsets:
            return np.asarray(self.offsets, np.int32)
        return np.arange(0, len(self.old_to_new) + 1, self.cluster_size, dtype=np.int32)

    @property
    def new_to_old(self) -> Int[np.ndarray, " N"]:
        """The inverse, int32 [N]."""
        return invert(self.old_to_new)

    @property
    def cluster_of_old(self) -> Int[np.ndarray, " N"]:
        """Cluster of each old id, int32 [N]."""
        return (np.searchsorted(self.bounds, self.old_to_new, side="right") - 1).astype(np.int32)

    def said(self) -> str:
        """The clusters, for people."""
        if self.offsets:
            sizes = np.diff(self.offsets)
            return f"{len(sizes)} clusters of {sizes.min()} to {sizes.max()} codes"
        return " in ".join(f"{len(self.old_to_new) // size} clusters of {size}" for size in self.cluster_sizes)

    def usage_weighted_size(self, usage: Int[np.ndarray, " N"]) -> float:
        """The codes of a cluster, on the mean over all uses of codes.

        Args:
            usage: how often each old id is used.
        """
        sizes = np.diff(self.bounds)[self.cluster_of_old]
        return float(np.sum(usage * sizes) / np.sum(usage))

    def rearrange_codes(self, codes: Int[np.ndarray, "*shape"]) -> Int[np.ndarray, "*shape"]:
        """Rearranged ids of original ones, int32."""
        return self.old_to_new[codes]

    def rearrange_codebook(self, codebook: Float[Array | np.ndarray, "N d"]) -> Float[Array | np.ndarray, "N d"]:
        """The codebook in the rearranged order: row `new` is the vector of the code with that id."""
        return codebook[self.new_to_old]


def invert(permutation: Int[np.ndarray, " N"]) -> Int[np.ndarray, " N"]:
    """inverse[permutation[i]] = i, int32."""
    inverse = np.empty(len(permutation), np.int32)
    inverse[permutation] = np.arange(len(permutation), dtype=np.int32)
    return inverse


def save_permutation(path: Any, permutation: Permutation, codebook_fingerprint: str) -> None:
    """Writes a permutation file.

    Args:
        path: of a local file.
        codebook_fingerprint: of the codebook that the old ids belong to.
    """
    with open(path, "wb") as file:
        np.savez(
            file,
            old_to_new=permutation.old_to_new.astype(np.int32),
            cluster_size=permutation.cluster_size,
            coarser_sizes=np.array(permutation.coarser_sizes, np.int32),
            offsets=np.array(permutation.offsets, np.int32),
            codebook_fingerprint=codebook_fingerprint,
        )


def load_permutation(path: Any) -> tuple[Permutation, str]:
    """The permutation in a file and the fingerprint of its codebook. Nothing in the file is executed.

    Raises:
        ValueError: the file is damaged, or holds no permutation.
    """
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as content:
            # Files from before there were levels have none.
            coarser = tuple(content["coarser_sizes"].tolist()) if "coarser_sizes" in content else ()
            offsets = tuple(content["offsets"].tolist()) if "offsets" in content else ()
            old_to_new, size = content["old_to_new"].astype(np.int32), int(content["cluster_size"])
            return Permutation(old_to_new, size, coarser, offsets), str(content["codebook_fingerprint"])
    except Exception as error:  # zipfile, zlib and numpy raise many kinds for damaged files
        raise ValueError(f"{path} is not a permutation file ({error})") from error
