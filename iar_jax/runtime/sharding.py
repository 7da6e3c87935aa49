"""The device mesh (data, fsdp, tensor), the logical axis rules, and shardings of trees."""

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from iar_jax.runtime.errors import UserError

MESH_AXES = ("data", "fsdp", "tensor")

# Logical axis of an array -> mesh axes. `fsdp` splits parameters along the model width; `tensor` splits heads, hidden
# units and the vocabulary, whose contiguous clusters then stay whole on a device.
LOGICAL_AXIS_RULES = (
    ("batch", ("data", "fsdp")),
    ("vocab", "tensor"),
    ("heads", "tensor"),
    ("hidden", "tensor"),
    ("embed", "fsdp"),
)

BATCH_SPEC = PartitionSpec(("data", "fsdp"))


def mesh_shape(data: int, fsdp: int, tensor: int, num_devices: int) -> tuple[int, int, int]:
    """Sizes of the three axes with one -1 replaced by what is left.

    Raises:
        UserError: when the sizes do not multiply up to the number of devices.
    """
    sizes = [data, fsdp, tensor]
    arithmetic = " x ".join(f"{name} {size}" for name, size in zip(MESH_AXES, sizes, strict=True))
    if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
        raise UserError(f"config.mesh is {arithmetic}; sizes are positive, and one at most is -1, 'the rest'")
    known = int(np.prod([size for size in sizes if size != -1]))
    if -1 in sizes and num_devices % known == 0:
        sizes[sizes.index(-1)] = num_devices // known
    if int(np.prod(sizes)) != num_devices:
        raise UserError(f"config.mesh is {arithmetic}, which does not multiply up to the {num_devices} devices here")
    return sizes[0], sizes[1], sizes[2]


def make_mesh(data: int, fsdp: int, tensor: int) -> Mesh:
    """The mesh over all devices; see `mesh_shape` for the sizes and the errors."""
    return mesh_of(jax.devices(), mesh_shape(data, fsdp, tensor, jax.device_count()))


def mesh_of(devices: Sequence[Any], shape: tuple[int, int, int]) -> Mesh:
    """These devices as a mesh: neighbours on the network beside each other, and slices along `data`.

    Where devices belong to several slices (which a slower network binds together), only the data axis crosses them.

    Raises:
        UserError: data is not a multiple of the number of slices.
    """
    num_slices = len({getattr(device, "slice_index", 0) for device in devices})
    options: dict[str, Any] = {"devices": devices, "allow_split_physical_axes": True}
    if num_slices > 1:
        if shape[0] % num_slices:
            raise UserError(
                f"config.mesh.data is {shape[0]}, and there are {num_slices} slices, which the data axis alone "
                "crosses: it must be a multiple of their number"
            )
        inside = (shape[0] // num_slices, *shape[1:])
        arranged = mesh_utils.create_hybrid_device_mesh(inside, (num_slices, 1, 1), **options)
    else:
        arranged = mesh_utils.create_device_mesh(shape, **options)
    return Mesh(arranged, MESH_AXES, axis_types=(AxisType.Auto,) * len(shape))


@contextlib.contextmanager
def use_mesh(mesh: Mesh):
    """The mesh and the logical axis rules in force for what is traced inside."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(LOGICAL_AXIS_RULES):
        yield mesh


def platform() -> str:
    """JAX's name (cpu, tpu, gpu) of what the mesh in force is made of; of the devices here where there is none."""
    mesh = jax.sharding.get_abstract_mesh()
    return jax.default_backend() if mesh.empty or mesh.abstract_device is None else mesh.abstract_device.platform


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over data and fsdp, everything else whole."""
    return NamedSharding(mesh, BATCH_SPEC)


def num_batch_shards(mesh: Mesh) -> int:
    """What a global batch size must be a multiple of."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def local_part(mesh: Mesh) -> tuple[int, int]:
    """(part, number of parts) of a global batch that this process' devices hold: rows in equal contiguous parts.

    Processes that share a part (the tensor axis spans them) get the same one.

    Raises:
        UserError: the mesh gives this process rows that are not such a part.
    """
    shards = num_batch_shards(mesh)
    rows = batch_sharding(mesh).addressable_devices_indices_map((shards,))
    held = sorted({index[0].indices(shards)[0] for index in rows.values() if index})
    count = len(held)
    if held != list(range(held[0], held[0] + count)) or held[0] % count or shards % count:
        raise UserError(
            f"config.mesh splits a batch into {shards} parts, of which process {jax.process_index()} would hold parts "
            f"{held}: choose data and fsdp so that each process holds equally many in a row"
        )
    return held[0] // count, shards // count


def part_of(mesh: Mesh, batch: Any) -> Any:
    """This process' rows of a batch that every process has whole."""
    part, count = local_part(mesh)
    return jax.tree.map(lambda rows: np.split(rows, count)[part], batch)


def global_batch(mesh: Mesh, local_batch: Any) -> Any:
    """Global arrays from this process' rows (`local_part`), sharded over data and fsdp."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda rows: jax.make_array_from_process_local_data(sharding, rows), local_batch)


def tree_shardings(mesh: Mesh | AbstractMesh, boxed: Any) -> Any:
    """Shardings of an abstract tree whose leaves carry logical axes (flax boxes); leaves without are replicated."""
    return nn.logical_to_mesh_sharding(nn.get_partition_spec(boxed), mesh, LOGICAL_AXIS_RULES)


def spread_shardings(mesh: Mesh | AbstractMesh, boxed: Any) -> Any:
    """As `tree_shardings`, with each leaf split over `data` as well, along the largest axis that divides.

    For what every step reads and writes whole, but no product needs: optimizer state and averaged weights (ZeRO-1).
    """
    specs = nn.logical_to_mesh(nn.get_partition_spec(boxed), LOGICAL_AXIS_RULES)
    return jax.tree.map(lambda leaf, spec: NamedSharding(mesh, _spread(mesh, leaf.shape, spec)), unbox(boxed), specs)


def _spread(mesh: Mesh | AbstractMesh, shape: tuple[int, ...], spec: PartitionSpec) -> PartitionSpec:
    count, axes = mesh.shape["data"], [*spec, *(None,) * (len(shape) - len(spec))]
    # The largest axis first: small parts would be padded to the tiles of a chip.
    for i in sorted(range(len(shape)), key=lambda i: -shape[i]):
        own = axes[i] if isinstance(axes[i], tuple) else (axes[i],) if axes[i] else ()
        if count > 1 and shape[i] % (count * math.prod(mesh.shape[axis] for axis in own)) == 0:
            axes[i] = (*own, "data")
            break
    return PartitionSpec(*axes)


def spread(tree: Any, boxed: Any) -> Any:
    """An array tree split as `spread_shardings` would split `boxed`, which names its axes, over the mesh in force."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape["data"] == 1:
        return tree
    # First as the rules alone split it: the products that made it would be cut into as many small ones.
    tree = jax.lax.with_sharding_constraint(tree, tree_shardings(mesh, boxed))
    return jax.lax.with_sharding_constraint(tree, spread_shardings(mesh, boxed))


def unbox(boxed: Any) -> Any:
    """The tree without its logical axes; leaves may be shapes (flax's own `unbox` would constrain them)."""

    def is_box(leaf):
        return isinstance(leaf, nn.LogicallyPartitioned)

    return jax.tree.map(lambda leaf: leaf.value if is_box(leaf) else leaf, boxed, is_leaf=is_box)


def check_batch_size(mesh: Mesh, batch_size: int, field: str, accumulation: int = 1) -> None:
    """Raises UserError when a global batch, or each of its parts, cannot be split over the mesh."""
    parts = num_batch_shards(mesh) * accumulation
    if batch_size % parts:
        factors = f"data {mesh.shape['data']} x fsdp {mesh.shape['fsdp']}"
        factors += f" x accumulation {accumulation}" if accumulation > 1 else ""
        raise UserError(
            f"{field} is {batch_size}; it must be a multiple of {factors} = {parts}, the parts that a batch is split "
            "into"
        )


def check_divides(mesh: Mesh, sizes: dict[str, tuple[int, str]]) -> None:
    """Raises UserError when a mesh axis does not divide what it splits; `sizes` is {name: (size, axis)}."""
    for name, (size, axis) in sizes.items():
        if size % mesh.shape[axis]:
            raise UserError(
                f"config.mesh.{axis} is {mesh.shape[axis]}, and {size} {name} divided by it leave "
                f"{size % mesh.shape[axis]}"
            )


def initialise_sharded(
    init: Callable[..., Any],
    mesh: Mesh,
    *args: Any,
    shardings_of: Callable[[Mesh, Any], Any] = tree_shardings,
) -> tuple[Any, Any]:
    """Runs `init(*args)` so that every leaf is born on its devices, and returns (tree, shardings), unboxed.

    No device ever holds a whole leaf that the rules split.
    """
    shardings = shardings_of(mesh, jax.eval_shape(init, *args))
    tree = jax.jit(lambda *a: unbox(init(*a)), out_shardings=shardings)(*args)
    return tree, shardings
