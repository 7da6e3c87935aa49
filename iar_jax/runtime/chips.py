"""Peak rates of accelerators."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peak rates of one accelerator, from its maker's tables.

    Attributes:
        memory: bytes.
        memory_rate, network_rate: bytes a second; the network's is one way, over all links of a chip together.
        flops: bf16 products, a second.
        clock: cycles a second, where the compiler counts in cycles.
        platform: what JAX calls the maker's compiler.
        island: chips that the network rate holds between; above it, `outside_rate` does.
    """

    name: str
    memory: float
    memory_rate: float
    flops: float
    network_rate: float
    clock: float = 0.0
    island: int = 2**62
    outside_rate: float = 0.0
    source: str = ""
    platform: str = "tpu"


TORUS_2D, TORUS_3D = 4, 6  # links of a chip
# Clocks are those at which the matrix units that the compilers count with (131,072 FLOPs a cycle on v5e, 262,144 on
# v5p, 524,288 on v6e) reach the peak. v4's compiler counts one of a chip's two cores, so its cycles tell no time.
CHIPS = {
    "v4": Chip("TPU v4", 32e9, 1.2e12, 275e12, TORUS_3D * 45e9, source="Google Cloud's TPU v4 page"),
    "v5e": Chip("TPU v5e", 16e9, 0.81e12, 197e12, TORUS_2D * 45e9, 1.5e9, source="Google Cloud's TPU v5e page"),
    "v5p": Chip("TPU v5p", 96e9, 2.8e12, 459e12, TORUS_3D * 90e9, 1.75e9, source="Google Cloud's TPU v5p page"),
    "v6e": Chip("TPU v6e", 32e9, 1.6e12, 918e12, TORUS_2D * 90e9, 1.75e9, source="Google Cloud's TPU v6e page"),
    "h100": Chip(
        "H100 SXM",
        80e9,
        3.35e12,
        989e12,
        450e9,
        island=8,
        outside_rate=50e9,
        source="NVIDIA's H100 data sheet",
        platform="cuda",
    ),
}


# What JAX calls these chips (Device.device_kind), by how it begins.
DEVICE_KINDS = (
    ("TPU v4", "v4"),
    ("TPU v5 lite", "v5e"),
    ("TPU v5e", "v5e"),
    ("TPU v5", "v5p"),
    ("TPU v6", "v6e"),
    ("NVIDIA H100 80GB HBM3", "h100"),
)


def peak_flops(device_kind: str) -> float | None:
    """bf16 peak of a device in FLOP/s; None where it is not known."""
    return next((CHIPS[chip].flops for begin, chip in DEVICE_KINDS if device_kind.startswith(begin)), None)
