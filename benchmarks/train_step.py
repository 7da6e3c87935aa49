"""One training step of the transformer: tokens a second, and the share of the machine's own matrix rate, part by part.

    python -m benchmarks.train_step                        LlamaGen's B, 4 x 256 tokens, float32
    python -m benchmarks.train_step --model=B --batch=8 --repeats=9
    taskset -c 0 python -m benchmarks.train_step --config=configs/cifar10.py:PATH --batch=32    a step of a study

The matrix rate is that of a 2048 x 2048 x 2048 product, measured before each step, and the share is the median over
the steps. The step's FLOPs are the model's (three times the forward products, the causal half of attention, nothing
recomputed). Parts are run by themselves, so they need not add up to the step. On Linux CPUs, large pages for malloc are
a tenth of the time: GLIBC_TUNABLES=glibc.malloc.hugetlb=1, which launch/demo.sh sets.
"""

import argparse
import runpy
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from configs.imagenet import get_config
from iar_jax import train
from iar_jax.config.checks import grid_size
from iar_jax.generators.code_layout import CodeLayout
from iar_jax.generators.generator import Generator
from iar_jax.generators.settings import Facts
from iar_jax.losses.cluster_loss import cluster_loss
from iar_jax.models.attention_blocks import attention_in_blocks
from iar_jax.models.layers import swiglu_hidden_dim
from iar_jax.models.rope import apply_rope, rope_table
from iar_jax.runtime import sharding
from iar_jax.training.optimizer import optimizer_of
from iar_jax.training.state import update_ema
from launch.stand_in import stand_in


def seconds(function, *arguments, repeats: int, donates: bool = False) -> float:
    """Median time of a compiled call; the first one is left out. One that donates gets its first result back."""
    found = []
    for i in range(repeats + 1):
        start = time.perf_counter()
        result = jax.block_until_ready(function(*arguments))
        if i:
            found.append(time.perf_counter() - start)
        if donates:
            arguments = (result[0], *arguments[1:])
    return statistics.median(found)


NUM_CLASSES = 1000


class Problem(NamedTuple):
    """A generator with its optimizer, compiled train step, fresh state, and a batch of random labels and codes."""

    generator: Generator
    optimizer: optax.GradientTransformation
    step: Callable
    state: Any
    batch: dict[str, jax.Array]


def fresh_problem(config: ConfigDict, batch_size: int) -> Problem:
    """The problem of a config, whose pictures are not opened: its codes are drawn at random."""
    codebook_size, layout = config.tokenizer.codebook_size, CodeLayout.square(grid_size(config))
    facts, mesh = Facts(codebook_size, NUM_CLASSES, layout), sharding.make_mesh(1, 1, 1)
    generator, init, step = train.make_step(config, mesh, facts, *stand_in(config))
    optimizer = optimizer_of(config.training, generator.decays)
    state = jax.jit(lambda key: sharding.unbox(init(key)))(jax.random.key(0))
    rng = np.random.default_rng(0)
    batch = {
        "label": jnp.asarray(rng.integers(0, NUM_CLASSES, batch_size), jnp.int32),
        "codes": jnp.asarray(rng.integers(0, codebook_size, (batch_size, generator.layout.length)), jnp.int32),
    }
    return Problem(generator, optimizer, jax.jit(step, donate_argnums=0), state, batch)


def interleaved(step: Callable, state: Any, batch: Any, repeats: int) -> tuple[list[float], list[float]]:
    """Seconds of each of several steps, and the machine's FLOP/s in a large float32 product before each of them."""
    size = 2048
    matrix = jnp.ones((size, size), jnp.float32)
    product = jax.jit(jnp.matmul)
    seconds(product, matrix, matrix, repeats=1)
    state = jax.block_until_ready(step(state, batch))[0]
    times, rates = [], []
    for _ in range(repeats):
        rates.append(2 * size**3 / seconds(product, matrix, matrix, repeats=9))
        # As in a training, where a step comes after a step and finds its memory warm.
        state = jax.block_until_ready(step(state, batch))[0]
        start = time.perf_counter()
        state = jax.block_until_ready(step(state, batch))[0]
        times.append(time.perf_counter() - start)
    return times, rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="B", help="one of LlamaGen's, at 256 px")
    parser.add_argument("--config", default="", help="another config, in its place")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--loss_chunks", type=int, default=1)
    parser.add_argument("--attention_block", type=int, default=64)
    arguments = parser.parse_args()
    path, _, rest = arguments.config.partition(":")
    config = runpy.run_path(path)["get_config"](rest) if path else get_config(f"{arguments.model},256")
    repeats, batch_size, length = arguments.repeats, arguments.batch, grid_size(config) ** 2
    config.model.dtype = arguments.dtype
    config.model.attention_block = arguments.attention_block
    config.model.scan_unroll = config.model.num_layers
    config.training.loss_chunks = arguments.loss_chunks
    generator, optimizer, step, state, batch = fresh_problem(config, batch_size)
    rng = np.random.default_rng(1)
    params = jax.tree.map(jnp.copy, state.params)
    times, rates = interleaved(step, state, batch, repeats)
    whole = statistics.median(times)

    layers, dim = config.model.num_layers, config.model.dim
    hidden = config.model.hidden_dim or swiglu_hidden_dim(dim)
    dtype = jnp.dtype(arguments.dtype)
    x = jnp.asarray(rng.standard_normal((batch_size, length, dim)), dtype)
    rope = jnp.asarray(rope_table(grid_size(config), dim // config.model.num_heads, 10000.0)[:length])

    def attention(q, k, v):
        q, k = apply_rope(q, rope), apply_rope(k, rope)
        return jnp.sum(attention_in_blocks(q, k, v, arguments.attention_block, True).astype(jnp.float32))

    heads = x.reshape(batch_size, length, config.model.num_heads, -1)
    one_attention = seconds(jax.jit(jax.grad(attention, (0, 1, 2))), heads, heads, heads, repeats=repeats)

    def matrices(weights, x):
        for w in weights:
            x = x @ w if w.shape[0] == x.shape[-1] else x
        return jnp.sum(x.astype(jnp.float32))

    sizes = [(dim, 3 * dim), (3 * dim, dim), (dim, 2 * hidden), (2 * hidden, dim)]
    weights = [jnp.asarray(0.02 * rng.standard_normal(size), dtype) for size in sizes]
    flat = x.reshape(-1, dim)
    chain = seconds(jax.jit(jax.grad(matrices, (0, 1))), weights, flat, repeats=repeats)
    # The layer's own products have 4 d^2 + 3 d h weights; the chain's are a little more.
    chain *= (4 * dim**2 + 3 * dim * hidden) / sum(int(np.prod(size)) for size in sizes)

    def head_and_loss(hidden, weights):
        levels = list(zip(config.codebook.cluster_sizes, config.training.cluster_weights, strict=True))
        return cluster_loss(hidden, weights, batch["codes"], levels, num_chunks=arguments.loss_chunks)

    weights = jnp.asarray(0.02 * rng.standard_normal((dim, generator.facts.vocab_size)), jnp.float32)
    head = seconds(jax.jit(jax.grad(head_and_loss, (0, 1), has_aux=True)), x, weights, repeats=repeats)

    def update(state, grads):
        updates, opt_state = optimizer.update(grads, state[1], state[0])
        new = optax.apply_updates(state[0], updates)
        return (new, opt_state, update_ema(state[2], new, 0.9999, jnp.int32(100))), 0

    state = (jax.tree.map(jnp.copy, params), jax.jit(optimizer.init)(params), jax.tree.map(jnp.copy, params))
    optimizing = seconds(jax.jit(update, donate_argnums=0), state, params, repeats=repeats, donates=True)

    flops = generator.flops(batch_size)
    share = statistics.median(flops / each / rate for each, rate in zip(times, rates, strict=True))
    device = jax.devices()[0].device_kind
    print(f"{arguments.config or arguments.model}, {batch_size} x {length} tokens, {arguments.dtype}, {device}")
    print(f"machine's matrix rate   {statistics.median(rates) / 1e9:8.0f} GFLOP/s")
    print(f"step                    {whole:8.3f} s, {batch_size * length / whole:,.0f} tokens/s")
    print(f"model FLOPs a step      {flops:8.3g}: {flops / whole / 1e9:.0f} GFLOP/s, {share:.1%} of it")
    parts = {
        "attention": layers * one_attention,
        "matrices of the layers": layers * chain,
        "head and loss": head,
        "optimizer and EMA": optimizing,
    }
    parts["rest"] = whole - sum(parts.values())
    for name, value in parts.items():
        print(f"  {name:22}{value:8.3f} s, {value / whole:.0%}")


if __name__ == "__main__":
    main()
