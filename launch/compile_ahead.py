"""Compiles a stage's real program for chips that are not here, and tells what it takes: memory, network, time.

    python launch/compile_ahead.py --config=configs/imagenet.py:XXL,384 --topology=v5e:16x16
    python launch/compile_ahead.py --config=configs/imagenet.py:B,256 --topology=h100:8 --json=b.json --hlo=b.txt
    python launch/compile_ahead.py --config=configs/imagenet.py:B,256 --topology=v5e:2x2 --stage=sample \\
        --config.sampling.batch_size=128

TPUs (v4, v5e, v5p, v6e) need `pip install 'jax[tpu]==0.10.2'`, H100s
`pip install --no-deps jax-cuda12-plugin==0.10.2 jax-cuda12-pjrt==0.10.2 nvidia-cudnn-cu12` (JAX asks for the version of
cuDNN when it lowers its attention), each in an environment of its own; no accelerator and no driver. Bounds are at peak
rates; beside them stands what the chip's own compiler expects (launch/expected_time.py says how, and what that leaves
out). The flags are those of launch/xla_flags_tpu.txt and launch/xla_flags_gpu.txt; IAR_JAX_XLA_FLAGS=off does without.
"""

import json
import math
import os
import pathlib
import sys
import tempfile
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
from iar_jax.generators.generator import KINDS, build_generator
from iar_jax.generators.settings import Facts, SamplingSettings
from iar_jax.models.tokenizer import build_tokenizer
from iar_jax.runtime import checkpoint, sharding
from iar_jax.runtime.chips import CHIPS, Chip
from iar_jax.runtime.errors import UserError
from iar_jax.training.state import state_shardings
from launch.compiled_cost import StepBound, Traffic, collective_traffic, step_bound
from launch.expected_time import dump_flags, expected_time, kernel_schedules
from launch.stand_in import stand_in

config_flags.DEFINE_config_file("config", None, "Path of the config, with its argument after a colon.")
flags.DEFINE_string("topology", None, "CHIP:SHAPE, as v5e:16x16, v5p:4x4x4 or h100:8 (h100:2x8 is two nodes).")
flags.DEFINE_string("json", None, "File to write the figures to.")
flags.DEFINE_string("hlo", None, "File to write the compiled program's text to.")
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
        with tempfile.TemporaryDirectory() as dumped:
            set_flags(pathlib.Path(dumped))
            figures, text = compile_and_measure(
                options.config, options.topology, options.stage, options.num_classes, pathlib.Path(dumped)
            )
    except UserError as error:
        print(f"\ncompile_ahead.py: {error}", file=sys.stderr)
        sys.exit(2)
    print_table(figures)
    if options.json:
        write(options.json, json.dumps(figures, indent=2))
    if options.hlo:
        write(options.hlo, text)


def set_flags(dumped: pathlib.Path) -> None:
    """Before libtpu is loaded: the launch script's flags for TPUs, and where it puts the schedules of kernels.

    Flags that are set already come last, and win. A GPU's go with the compilation (`gpu_options`).
    """
    own = [] if os.environ.get("IAR_JAX_XLA_FLAGS") == "off" else flags_of("tpu")
    already = os.environ.get("LIBTPU_INIT_ARGS", "")
    os.environ["LIBTPU_INIT_ARGS"] = " ".join([*dump_flags(dumped), *own, already]).strip()


def flags_of(platform: str) -> list[str]:
    """The flags of launch/xla_flags_PLATFORM.txt."""
    lines = (pathlib.Path(__file__).parent / f"xla_flags_{platform}.txt").read_text().splitlines()
    return [flag for line in lines if (flag := line.partition("#")[0].strip())]


def write(path: str, text: str) -> None:
    with open(path + ".partial", "w") as file:
        file.write(text)
    os.replace(path + ".partial", path)


class Program(NamedTuple):
    """What is compiled.

    Attributes:
        function: on arrays; its first argument holds `params`.
        arguments: shapes with their shardings.
        params: the parameters among the arguments.
        state: all that is held between calls, by name.
        batch_size: images of a call, over all devices.
        options: of `jax.jit`.
        flops: over all devices; None where they are not counted.
        bytes_moved: what a device must read and write of its memory; None is arguments and results once.
        steps: of the recipe; None where there is none.
        runs: what is chosen by platform, such as the attention.
    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    params: Any
    state: dict[str, Any]
    batch_size: int
    options: dict[str, Any]
    flops: float | None
    bytes_moved: float | None = None
    steps: int | None = None
    runs: str = ""


def compile_and_measure(
    config: ConfigDict, topology: str, stage: str, num_classes: int, dumped: pathlib.Path
) -> tuple[dict, str]:
    """All figures of a stage's program on a topology, as plain data, and the compiled program's text.

    Args:
        dumped: where the compiler puts the schedules of its kernels (`dump_flags`).

    Raises:
        UserError: no such topology, a mesh that does not divide the program, or a program that does not fit.
    """
    chip, devices = devices_of(topology)
    mesh = sharding.mesh_of(devices, sharding.mesh_shape(**config.mesh, num_devices=len(devices)))
    start = time.monotonic()
    program = PROGRAMS[stage](config, mesh, num_classes)
    with sharding.use_mesh(mesh):
        try:
            jitted = jax.jit(program.function, **program.options)
            lowered = jitted.trace(*program.arguments).lower(lowering_platforms=(chip.platform,))
            compiled = lowered.compile(PLATFORMS[chip.platform].options())
        except (jax.errors.JaxRuntimeError, RuntimeError) as error:
            reason = str(error).splitlines()[0][:400]
            # The compiler gives up where a program cannot be placed in memory at all.
            if "RESOURCE_EXHAUSTED" in reason:
                raise UserError(f"the program does not fit: {reason}\n{advice(chip)}") from error
            lacks_cudnn = "cudnn" in reason.lower()
            needed = f"; it needs {PLATFORMS[chip.platform].needed}" if lacks_cudnn else ""
            raise UserError(f"{chip.name}'s compiler: {reason}{needed}") from error
    memory = compiled.memory_analysis()
    peak = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes
    )
    text = compiled.as_text()
    traffic = collective_traffic(text, dict(mesh.shape))
    moved = program.bytes_moved or memory.argument_size_in_bytes + memory.output_size_in_bytes
    counted, flops = "the model's: causal half, nothing recomputed", program.flops
    if flops is None:
        # The compiler's own count, which is right where there are no loops.
        counted, flops = "the compiler's count", float(compiled.cost_analysis()["flops"]) * len(devices)
    bound = step_bound(chip, len(devices), model_flops=flops, bytes_touched=moved, traffic=traffic)
    figures = {
        "stage": stage,
        "topology": topology,
        "chip": chip.name,
        "rates_from": chip.source,
        "devices": len(devices),
        "mesh": dict(mesh.shape),
        "batch_size": program.batch_size,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(program.params)),
        "runs": program.runs,
        "bytes_per_device": {
            "parameters": per_device(program.params),
            **{name: per_device(tree) for name, tree in program.state.items()},
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
                "bytes_ahead": item.bytes_ahead,
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
        "expected": expected_figures(text, chip, traffic, dumped, bound),
        "images_per_second_at_most": program.batch_size / bound.seconds,
        "compile_seconds": time.monotonic() - start,
    }
    if program.steps:
        hours = program.steps * bound.seconds / 3600
        figures["recipe"] = {
            "steps": program.steps,
            "hours_at_least": hours,
            "chip_hours_at_least": hours * len(devices),
        }
    return figures, text


def expected_figures(
    text: str, chip: Chip, traffic: list[Traffic], dumped: pathlib.Path, bound: StepBound
) -> dict | None:
    """What the compiler expects, with the share of the chip's peak that the program's FLOPs are of it (MFU); None for
    chips whose compiler says nothing that tells a time."""
    if chip.platform == "tpu" and not chip.clock:
        return None
    found = expected_time(text, chip, traffic, kernel_schedules(dumped))
    if not found.seconds:
        return None
    return {
        "seconds": found.seconds,
        "mfu": bound.compute / found.seconds,
        "parts": found.parts,
        "of_kernels": found.kernels,
        "left_out": found.left_out,
    }


def state_program(section: ConfigDict, mesh: Mesh, init, step, batch: tuple, flops, runs: str = "") -> Program:
    """A train step on its state."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    with sharding.use_mesh(mesh):
        boxed = jax.eval_shape(init, key)
        shardings = state_shardings(mesh, boxed)
    state = checkpoint.abstract_tree(sharding.unbox(boxed), shardings)
    return Program(
        step,
        (state, *batch),
        state.params,
        {"optimizer": state.opt_state, "ema": state.ema_params},
        section.batch_size,
        {"donate_argnums": 0, "out_shardings": (shardings, sharding.replicated(mesh))},
        flops,
        steps=section.num_steps,
        runs=runs,
    )


def facts_of(config: ConfigDict, num_classes: int) -> Facts:
    return Facts(config.tokenizer.codebook_size, num_classes, CodeLayout.square(grid_size(config)))


def train_program(config: ConfigDict, mesh: Mesh, num_classes: int) -> Program:
    """The training of config.model."""
    section, rows = config.training, sharding.batch_sharding(mesh)
    sharding.check_batch_size(mesh, section.batch_size, "config.training.batch_size", section.accumulation)
    facts = facts_of(config, num_classes)
    generator, init, step = train.make_step(config, mesh, facts, *stand_in(config))
    batch = {
        "label": jax.ShapeDtypeStruct((section.batch_size,), jnp.int32, sharding=rows),
        "codes": jax.ShapeDtypeStruct((section.batch_size, generator.layout.length), jnp.int32, sharding=rows),
    }
    flops = generator.flops(section.batch_size)
    runs = KINDS[config.model.kind].implementation(config.model, facts, mesh.devices.flat[0].platform)
    return state_program(section, mesh, init, step, (batch,), flops, runs)


def tokenizer_program(config: ConfigDict, mesh: Mesh, num_classes: int) -> Program:
    """The training of config.tokenizer, with its discriminator where it has one; classes make no difference."""
    section, size = config.tokenizer_training, config.data.resolution
    sharding.check_batch_size(mesh, section.batch_size, "config.tokenizer_training.batch_size")
    _, discriminator, init, make_step = train_tokenizer.make_steps(config)
    shape, rows = (section.batch_size, size, size, 3), sharding.batch_sharding(mesh)
    images = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=rows)
    return state_program(section, mesh, init, make_step(adversarial=discriminator is not None), (images,), None)


def sample_program(config: ConfigDict, mesh: Mesh, num_classes: int) -> Program:
    """The codes of one batch of config.sampling; the tokenizer that decodes them is not in it."""
    section, rows = config.sampling, sharding.batch_sharding(mesh)
    sharding.check_batch_size(mesh, section.batch_size, "config.sampling.batch_size")
    generator, settings = build_generator(config.model, facts_of(config, num_classes)), SamplingSettings.of(section)
    key = jax.eval_shape(lambda: jax.random.key(0))
    with sharding.use_mesh(mesh):
        boxed = jax.eval_shape(generator.init, key)
        params = checkpoint.abstract_tree(sharding.unbox(boxed), sharding.tree_shardings(mesh, boxed))
    labels = jax.ShapeDtypeStruct((section.batch_size,), jnp.int32, sharding=rows)
    keys = jax.ShapeDtypeStruct((section.batch_size,), key.dtype, sharding=rows)
    count_work, shards = KINDS[config.model.kind].sampling_work, sharding.num_batch_shards(mesh)
    work = count_work(generator, section.batch_size // shards, settings) if count_work else None
    return Program(
        lambda params, labels, keys: generator.sample(params, labels, keys, settings),
        (params, labels, keys),
        params,
        {},
        section.batch_size,
        {"out_shardings": rows},
        work and work.flops * shards,
        work and work.bytes / mesh.shape["tensor"],
    )


def extract_program(config: ConfigDict, mesh: Mesh, num_classes: int) -> Program:
    """The codes of config.codes.batch_size crops; classes make no difference."""
    section, size, rows = config.codes, config.data.resolution, sharding.batch_sharding(mesh)
    sharding.check_batch_size(mesh, section.batch_size, "config.codes.batch_size")
    model = build_tokenizer(config.tokenizer)
    images = jax.ShapeDtypeStruct((section.batch_size, size, size, 3), jnp.float32, sharding=rows)
    params = jax.eval_shape(
        lambda key: model.init(key, jnp.zeros((1, size, size, 3)))["params"], jax.eval_shape(lambda: jax.random.key(0))
    )
    params = checkpoint.abstract_tree(params, jax.tree.map(lambda _: sharding.replicated(mesh), params))
    return Program(
        lambda params, images: model.apply({"params": params}, images, method="encode"),
        (params, images),
        params,
        {},
        section.batch_size,
        {},
        None,
    )


# --stage.
PROGRAMS = {
    "train": train_program,
    "train_tokenizer": tokenizer_program,
    "extract_codes": extract_program,
    "sample": sample_program,
}
flags.DEFINE_enum("stage", "train", tuple(PROGRAMS), "Whose program: a train step, or one batch.")


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


def gpu_options() -> dict[str, Any]:
    """The launch script's flags as options of a compilation, and one that is needed without a GPU."""
    found = flags_of("gpu") if os.environ.get("IAR_JAX_XLA_FLAGS") != "off" else []
    texts = dict(flag.removeprefix("--").split("=") for flag in found)
    options = {name: {"true": True, "false": False}.get(text, text) for name, text in texts.items()}
    # Triton's products are chosen by trying them, for which there is no GPU.
    return options | {"xla_gpu_enable_triton_gemm": False}


class Topologies(NamedTuple):
    """Which shapes a chip comes in."""

    allows: Callable[[list[int]], bool]
    described: str


FLAT = [(2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16)]


def is_flat(sizes: list[int]) -> bool:
    return tuple(sizes) in FLAT


def is_solid(sizes: list[int]) -> bool:
    """Three sizes, all of 4 chips or more multiples of 4; of fewer, 2x2x1 and what is made of 2 and 4."""
    small = sizes == [2, 2, 1] or all(size in (2, 4) for size in sizes)
    return len(sizes) == 3 and (small or all(size % 4 == 0 and size for size in sizes))


def is_nodes(sizes: list[int]) -> bool:
    return len(sizes) <= 2 and all(sizes)


flat = Topologies(is_flat, ", ".join(f"{a}x{b}" for a, b in FLAT))
solid = Topologies(is_solid, "three sizes, as 2x2x1, 2x2x2, 2x2x4, 2x4x4, 4x4x4, 4x4x8, 8x8x8, 8x16x16")
nodes = Topologies(is_nodes, "GPUs of a node, as h100:8, or NODESxGPUS, as h100:4x8")
TOPOLOGIES = {"v4": solid, "v5e": flat, "v5p": solid, "v6e": flat, "h100": nodes}


class Platform(NamedTuple):
    """A maker's compiler: the devices of a topology, options of a compilation, and what to install."""

    devices: Callable[[str], list[Any]]
    options: Callable[[], dict[str, Any] | None]
    needed: str


PLATFORMS = {
    "tpu": Platform(
        tpu_devices,
        lambda: None,
        "pip install 'jax[tpu]==0.10.2'",
    ),
    "cuda": Platform(
        gpu_devices,
        gpu_options,
        "pip install --no-deps jax-cuda12-plugin==0.10.2 jax-cuda12-pjrt==0.10.2 nvidia-cudnn-cu12",
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
    sizes = [int(part) for part in shape.split("x")]
    # Some that do not exist end libtpu's process.
    if not TOPOLOGIES[name].allows(sizes):
        raise UserError(f"--topology={topology}: there is none like it; there are {TOPOLOGIES[name].described}")
    platform = PLATFORMS[CHIPS[name].platform]
    try:
        return CHIPS[name], platform.devices(topology)
    except (RuntimeError, NotImplementedError, ValueError, ImportError, AssertionError) as error:
        reason = " ".join(str(error).split())[:300]
        unknown = "INVALID_ARGUMENT" in reason
        todo = f"there are {TOPOLOGIES[name].described}" if unknown else f"try {platform.needed}"
        raise UserError(f"--topology={topology}: no compiler for it ({reason}); {todo}") from error


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
    bound, expected = f["lower_bound_seconds"], f["expected"]
    fits = "fits" if f["fits"] else "DOES NOT FIT"
    held = [f"{name} {gb[name]:.3f}" for name in ("optimizer", "ema") if name in gb]
    lines = [
        (f["stage"], f"{f['parameters']:,} parameters, batch {f['batch_size']}"),
        ("on", f"{f['devices']} x {f['chip']} ({f['topology']}), mesh {mesh}"),
        *([("with", f["runs"])] if f["runs"] else []),
        ("parameters a device", ", ".join([f"{gb['parameters']:.3f} GB", *held])),
        ("peak memory a device", f"{gb['peak']:.2f} GB of {f['capacity'] / 1e9:.1f} GB: {fits}"),
    ]
    lines.append(("FLOPs", f"{f['flops_per_step']:.3e} ({f['flops_are']})"))
    lines += [
        (
            item["kind"],
            f"{item['bytes_sent'] / 1e6:.1f} MB sent a device over {', '.join(item['axes'])} ({item['devices']} "
            f"devices, {item['count']} times), {item['bytes_ahead'] / 1e6:.1f} of them beside other work",
        )
        for item in f["collectives"]
        if item["bytes_sent"] >= 1e4
    ]
    terms = [f"{name} {bound[name] * 1e3:.1f} ms" for name in ("compute", "memory", "network") if bound[name]]
    lines += [
        ("takes at least", f"{bound['step'] * 1e3:.1f} ms: {', '.join(terms)} (peak rates: {f['rates_from']})"),
        ("images a second", f"{f['images_per_second_at_most']:,.0f} at most"),
    ]
    if expected:
        lines.append(
            ("the compiler expects", f"{expected['seconds'] * 1e3:.1f} ms, {expected['mfu']:.1%} of peak FLOP/s")
        )
        lines += [
            ("", f"{seconds * 1e3:9.2f} ms  {part}")
            for part, seconds in expected["parts"].items()
            if seconds > 0.002 * expected["seconds"]
        ]
        kernels = [f"{name} {seconds * 1e3:.2f} ms" for name, seconds in expected["of_kernels"].items()]
        if kernels:
            lines.append(("by our estimate of", ", ".join(kernels)))
        left = [f"{name} ({count} times)" for name, count in expected["left_out"].items()]
        lines.append(("left out", ", ".join(["copies and collectives beside other work", *left])))
    else:
        lines.append(("the compiler expects", "nothing that tells a time for this chip"))
    if "recipe" in f:
        lines.append(
            (
                "the recipe, at least",
                f"{f['recipe']['steps']:,} steps, {f['recipe']['hours_at_least']:.1f} h, "
                f"{f['recipe']['chip_hours_at_least']:,.0f} chip-hours",
            )
        )
    lines.append(("compiled in", f"{f['compile_seconds']:.0f} s"))
    for name, text in lines:
        print(f"{name:24}{text}")
    if not f["fits"]:
        print(advice(CHIPS[f["topology"].partition(":")[0]]))


if __name__ == "__main__":
    app.run(main)
