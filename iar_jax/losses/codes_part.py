"""How the logits of a chunk of positions lie, and which codes they are of: all, or a device's part of them."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class CodesPart:
    """The arrays are positions by codes, or the other way round.

    Attributes:
        axis: the codes', 0 or 1.
        device_axis: of the mesh, along which the codes are split; None where they are not.
        first: the id of the first code here.
    """

    axis: int
    device_axis: str | None
    first: Int[Array, ""] | int

    def everywhere(self, values: Any) -> Any:
        """The sum over all devices' parts."""
        return values if self.device_axis is None else jax.lax.psum(values, self.device_axis)

    def highest(self, values: Array) -> Array:
        """The highest over all devices' parts."""
        return values if self.device_axis is None else jax.lax.pmax(values, self.device_axis)

    def each(self, positions: Array) -> Array:
        """Values of positions [P], against all codes of each."""
        return jnp.expand_dims(positions, self.axis)

    def places(self, values: Array) -> Int[Array, "A B"]:
        """The place of each value along the codes' axis."""
        return jax.lax.broadcasted_iota(jnp.int32, values.shape, self.axis)

    def in_groups(self, values: Array, size: int) -> Array:
        """Values of codes as those of groups of `size` codes."""
        return values.reshape(*values.shape[: self.axis], -1, size, *values.shape[self.axis + 1 :])

    def taken(self, values: Array, group: Int[Array, " P"], size: int) -> Array:
        """Of the codes in groups of `size`, the group of each position; zeros where it is not there."""
        grouped = self.in_groups(values, size)
        places = jax.lax.broadcasted_iota(jnp.int32, grouped.shape, self.axis)
        return jnp.sum(jnp.where(places == self.each(self.each(group)), grouped, 0.0), axis=self.axis)

    def is_first_highest(
        self, values: Array, place: Int[Array, " P"], wanted: Float[Array, " P"]
    ) -> Float[Array, " P"]:
        """1 where no value is above the wanted one, nor equal to it at a lower place, else 0."""
        # Comparisons and a sum: an argmax is ten times slower on CPUs, and here would need to know its device.
        equal = (values == self.each(wanted)) & (self.places(values) < self.each(place))
        ahead = (values > self.each(wanted)) | equal
        return (self.everywhere(jnp.sum(ahead, axis=self.axis)) == 0).astype(jnp.float32)
