"""Compiles the real train step for chips that are not here, and tells what it takes: memory, network, time.

    python launch/compile_ahead.py --config=configs/imagenet.py:XXL,384 --topology=v5e:16x16
    python launch/compile_ahead.py --config=configs/imagenet.py:B,256 --topology=h100:8 --json=b.json
    python launch/compile_ahead.py --config=configs/imagenet.py:B,256 --topology=v5p:2x2x1 --stage=train_tokenizer

TPUs (v4, v5e, v5p, v6e) need `pip install 'jax[tpu]==0.10.2'`, H100s
`pip install --no-deps jax-cuda12-plugin==0.10.2 jax-cuda12-pjrt==0.10.2`, each in an environment of its own; no
accelerator and no driver. Times are lower bounds at peak rates: real steps take two or three times as long.
"""

import json
import math
import os
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

# Before jax: the compilers must not look for hardware.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-16"}
sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

import jax
import jax.numpy as jnp
from absl import app, flags
from jax.experimental import topologies
from jax.sharding import Mesh
from ml_collections import ConfigDict, config_flags

from iar_jax import train, train_tokenizer
from iar_jax.config.checks import check_config, grid_size
from iar_jax.generators.code_layout import CodeLayout
from iar_jax.generators.settings import Facts
from iar_jax.runtime import sharding
from iar_jax.runtime.chips import CHIPS, Chip
from iar_jax.runtime.errors import UserError
from launch.compiled_cost import collective_traffic, step_bound

config_flags.DEFINE_config_file("config", None, "Path of the config, with its argument after a colon.")
flags.DEFINE_string("topology", None, "CHIP:SHAPE, as v5e:16x16, v5p:4x4x4 or h100:8 (h100:2x8 is two nodes).")
flags.DEFINE_string("json", None, "File to write the figures to.")
flags.DEFINE_integer("num_classes", 1000, "Classes of the data set.")

# What a compiler for an H100 has to know of it.
H100 = """
gpu_device_info { threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
 shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
 memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 84929347584
 shared_memory_per_block_optin: 232448 cuda_compute_capability { major: 9 }
 registers_per_core_limit: 65536 registers_per_block_limit: 65536 }
platform_name: "CUDA" dnn_version_info { major: 9 minor: 8 } runtime_version { major: 12 minor: 9 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def main(_) -> None:
    options = flags.FLAGS
    try:
        if options.config is None or not options.topology:
            raise UserError("give --config=configs/FILE.py and --topology=CHIP:SHAPE")
        check_config(options.config)
        figures = compile_and_measure(options.config, options.topology, options.stage, options.num_classes)
    except UserError as error:
        print(f"\ncompile_ahead.py: {error}", file=sys.stderr)
        sys.exit(2)
    print_table(figures)
    if options.json:
        partial = options.json + ".partial"
        with open(partial, "w") as file:
            json.dump(figures, file, indent=2)
        os.replace(partial, options.json)


def compile_and_measure(config: ConfigDict, topology: str, stage: str, num_classes: int) -> dict:
    """All figures of a stage's train step on a topology, as plain data."""
    chip, devices = devices_of(topology)
    shape = sharding.mesh_shape(**config.mesh, num_devices=len(devices))
    mesh = sharding.mesh_of(devices, shape)
    start = time.monotonic()
    # Made before the mesh is set: nothing can be computed on chips that are not there.
    section, init, step, batch, flops = RECIPES[stage](config, mesh, num_classes)
    key = jax.eval_shape(lambda: jax.random.key(0))
    with sharding.use_mesh(mesh):
        boxed = jax.eval_shape(init, key)
        shardings = sharding.tree_shardings(mesh, boxed)
        state = jax.tree.map(
            lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
            sharding.unbox(boxed),
            shardings,
        )
        jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings, sharding.replicated(mesh)))
        try:
            lowered = jitted.trace(state, *batch).lower(lowering_platforms=(chip.platform,))
            compiled = lowered.compile(PLATFORMS[chip.platform].options)
        except jax.errors.JaxRuntimeError as error:
            reason = str(error).splitlines()[0][:400]
            # The compiler gives up where a program cannot be placed in memory at all.
            fits_not = "RESOURCE_EXHAUSTED" in reason
            raise UserError(
                f"the step does not fit: {reason}\n{advice(chip)}" if fits_not else f"{chip.name}'s compiler: {reason}"
            ) from error
    memory = compiled.memory_analysis()
    peak = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes
    )
    traffic = collective_traffic(compiled.as_text(), dict(mesh.shape))
    touched = memory.argument_size_in_bytes + memory.output_size_in_bytes
    counted = "the model's: causal half, nothing recomputed"
    if flops is None:
        # The compiler's own count, which is right where there are no loops.
        counted = "the compiler's count"
        flops = float(compiled.cost_analysis()["flops"]) * len(devices)
    bound = step_bound(chip, len(devices), model_flops=flops, bytes_touched=touched, traffic=traffic)
    steps = section.num_steps
    return {
        "stage": stage,
        "topology": topology,
        "chip": chip.name,
        "rates_from": chip.source,
        "devices": len(devices),
        "mesh": dict(mesh.shape),
        "batch_size": section.batch_size,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "bytes_per_device": {
            "parameters": per_device(state.params),
            "optimizer": per_device(state.opt_state),
            "ema": per_device(state.ema_params),
            "temporaries": memory.temp_size_in_bytes,
            "peak": peak,
        },
        "capacity": chip.memory,
        "fits": peak <= chip.memory,
        "flops_per_step": flops,
        "flops_are": counted,
        "collectives": [
            {
                "kind": item.kind,
                "axes": list(item.axes),
                "devices": item.group_size,
                "count": item.count,
                "bytes_sent": item.bytes_sent,
            }
            for item in traffic
        ],
        "lower_bound_seconds": {
            "compute": bound.compute,
            "memory": bound.memory,
            "network": bound.network,
            "step": bound.seconds,
            "bound_by": bound.bound_by,
        },
        "images_per_second_at_most": section.batch_size / bound.seconds,
        "recipe": {
            "steps": steps,
            "hours_at_least": steps * bound.seconds / 3600,
            "chip_hours_at_least": steps * bound.seconds / 3600 * len(devices),
        },
        "compile_seconds": time.monotonic() - start,
    }


class Recipe(NamedTuple):
    """A training: the section of its config, how its state begins, its step, the shapes of a batch, and the FLOPs of a
    step (None where they are not counted)."""

    section: ConfigDict
    init: Callable[[Any], Any]
    step: Callable[..., Any]
    batch: tuple[Any, ...]
    flops: float | None


def generator_recipe(config: ConfigDict, mesh: Mesh, num_classes: int) -> Recipe:
    """The training of config.model; raises UserError where the mesh does not divide it."""
    section, rows = config.training, sharding.batch_sharding(mesh)
    sharding.check_batch_size(mesh, section.batch_size, "config.training.batch_size", section.accumulation)
    facts = Facts(config.tokenizer.codebook_size, num_classes, CodeLayout.square(grid_size(config)))
    generator, init, step = train.make_step(config, mesh, facts, tuple(config.codebook.cluster_sizes))
    batch = {
        "label": jax.ShapeDtypeStruct((section.batch_size,), jnp.int32, sharding=rows),
        "codes": jax.ShapeDtypeStruct((section.batch_size, generator.layout.length), jnp.int32, sharding=rows),
    }
    return Recipe(section, init, step, (batch,), generator.flops(section.batch_size))


def tokenizer_recipe(config: ConfigDict, mesh: Mesh, num_classes: int) -> Recipe:
    """The training of config.tokenizer, with its discriminator where it has one; classes make no difference."""
    section, size = config.tokenizer_training, config.data.resolution
    sharding.check_batch_size(mesh, section.batch_size, "config.tokenizer_training.batch_size")
    _, discriminator, init, make_step = train_tokenizer.make_steps(config)
    shape, rows = (section.batch_size, size, size, 3), sharding.batch_sharding(mesh)
    images = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=rows)
    return Recipe(section, init, make_step(adversarial=discriminator is not None), (images,), None)


# --stage.
RECIPES = {"train": generator_recipe, "train_tokenizer": tokenizer_recipe}
flags.DEFINE_enum("stage", "train", tuple(RECIPES), "Whose train step.")


def tpu_devices(topology: str) -> list[Any]:
    """The devices of CHIP:SHAPE, by libtpu."""
    return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)


def gpu_devices(topology: str) -> list[Any]:
    """The devices of h100:GPUS or h100:NODESxGPUS, by JAX's CUDA plugin."""
    sizes = [int(part) for part in topology.partition(":")[2].split("x")]
    nodes, gpus = sizes if len(sizes) == 2 else (1, math.prod(sizes))
    found = topologies.get_topology_desc(
        platform="cuda", topology_name="h100", target_config=H100, topology=f"1x{nodes}x{gpus}"
    )
    return list(found.devices)


class Platform(NamedTuple):
    """A maker's compiler: the devices of a topology, options of a compilation, and what to install."""

    devices: Callable[[str], list[Any]]
    options: dict[str, Any] | None
    needed: str


PLATFORMS = {
    "tpu": Platform(tpu_devices, None, "pip install 'jax[tpu]==0.10.2'"),
    "cuda": Platform(
        gpu_devices,
        # Triton's products are chosen by trying them, for which there is no GPU.
        {"xla_gpu_enable_triton_gemm": False},
        "pip install --no-deps jax-cuda12-plugin==0.10.2 jax-cuda12-pjrt==0.10.2",
    ),
}


def devices_of(topology: str) -> tuple[Chip, list]:
    """The chip and the devices of a topology.

    Raises:
        UserError: an unknown chip or shape, or its compiler is not installed.
    """
    name, _, shape = topology.partition(":")
    if name not in CHIPS or not all(part.isdigit() for part in shape.split("x")):
        raise UserError(f"--topology={topology}: allowed are CHIP:SHAPE with a chip of {', '.join(CHIPS)}")
    platform = PLATFORMS[CHIPS[name].platform]
    try:
        return CHIPS[name], platform.devices(topology)
    except (RuntimeError, NotImplementedError, ValueError, ImportError, AssertionError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"--topology={topology}: no compiler for it ({reason}); try {platform.needed}") from error


def per_device(tree) -> int:
    """Bytes of a tree's shards on one device."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def advice(chip: Chip) -> str:
    return (
        f"to fit {chip.memory / 1e9:.0f} GB: a larger config.mesh.fsdp, config.model.remat=layer, a larger "
        "config.training.accumulation or config.training.loss_chunks, a smaller batch, or more chips"
    )


def print_table(f: dict) -> None:
    """The figures for a person."""
    mesh = " x ".join(f"{name} {size}" for name, size in f["mesh"].items())
    gb = {name: value / 1e9 for name, value in f["bytes_per_device"].items()}
    bound = f["lower_bound_seconds"]
    fits = "fits" if f["fits"] else "DOES NOT FIT"
    lines = [
        (f["stage"], f"{f['parameters']:,} parameters, batch {f['batch_size']}"),
        ("on", f"{f['devices']} x {f['chip']} ({f['topology']}), mesh {mesh}"),
        ("parameters a device", f"{gb['parameters']:.3f} GB, optimizer {gb['optimizer']:.3f}, EMA {gb['ema']:.3f}"),
        ("peak memory a device", f"{gb['peak']:.2f} GB of {f['capacity'] / 1e9:.1f} GB: {fits}"),
    ]
    lines.append(("FLOPs a step", f"{f['flops_per_step']:.3e} ({f['flops_are']})"))
    lines += [
        (
            item["kind"],
            f"{item['bytes_sent'] / 1e6:.1f} MB sent a device and step over {', '.join(item['axes'])} "
            f"({item['devices']} devices, {item['count']} times)",
        )
        for item in f["collectives"]
        if item["bytes_sent"] >= 1e4
    ]
    terms = [f"{name} {bound[name] * 1e3:.1f} ms" for name in ("compute", "memory", "network") if bound[name]]
    lines += [
        ("step, at least", f"{bound['step'] * 1e3:.1f} ms: {', '.join(terms)} (peak rates: {f['rates_from']})"),
        ("images a second", f"{f['images_per_second_at_most']:,.0f} at most"),
        (
            "the recipe, at least",
            f"{f['recipe']['steps']:,} steps, {f['recipe']['hours_at_least']:.1f} h, "
            f"{f['recipe']['chip_hours_at_least']:,.0f} chip-hours",
        ),
        ("compiled in", f"{f['compile_seconds']:.0f} s"),
    ]
    for name, text in lines:
        print(f"{name:24}{text}")
    if not f["fits"]:
        print(advice(CHIPS[f["topology"].partition(":")[0]]))


if __name__ == "__main__":
    app.run(main)
