"""Images and tokens a second of decoding, against what the machine's memory and matrix rates allow.

    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python -m benchmarks.sampling              B at 256 px, batches 1 to 128
    python -m benchmarks.sampling --batches=8,16 --model=L,256 --dtype=bfloat16 --top_k=2000
    python -m benchmarks.sampling --kind=masked --batches=8 --steps=8,16,32       a masked model of the same size

The floor of a step is the larger of two times: reading weights and the positions of the cache that hold something, at
the rate of a sum over a large array; and the products' FLOPs, at the rate of a large matrix product. Both rates are
measured right before each batch size, since shared machines change theirs within minutes. Guidance doubles the rows.
Weights are random; the time does not depend on them.
"""

import argparse
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta

from benchmarks.train_step import seconds
from configs import imagenet
from iar_jax.config.checks import grid_size
from iar_jax.generators.code_layout import CodeLayout
from iar_jax.generators.generator import KINDS, build_generator
from iar_jax.generators.settings import Facts, SamplingSettings
from iar_jax.runtime.errors import UserError


def machine_rates(dtype) -> tuple[float, float]:
    """Bytes a second of reading, FLOPs a second of a large product."""
    array = jnp.ones((2**27,), jnp.float32)
    total = jax.jit(jnp.sum)
    square = jnp.ones((2048, 2048), dtype)
    product = jax.jit(lambda a: a @ a)
    # Seconds of it: the first products after a rest are up to a fifth faster than a processor can go on with.
    return array.nbytes / seconds(total, array, repeats=15), 2 * 2048**3 / seconds(product, square, repeats=61)


def counts(text: str) -> list[int]:
    sizes = text.split(",")
    if not all(size.isdecimal() and int(size) for size in sizes):
        raise argparse.ArgumentTypeError(f"{text!r} are not positive numbers with commas between them, such as 8,32")
    return [int(size) for size in sizes]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="B,256", help="argument of configs/imagenet.py")
    parser.add_argument("--kind", default="autoregressive", choices=tuple(KINDS))
    parser.add_argument("--steps", type=counts, default="32", help="passes of a masked model")
    parser.add_argument("--batches", type=counts, default="1,8,32,64,128")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--cfg_scale", type=float, default=2.0)
    parser.add_argument("--top_k", type=int, default=0)
    parser.add_argument("--top_p", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()

    try:
        config = imagenet.get_config(options.model)
    except UserError as error:
        parser.error(str(error))
    config.model.dtype, config.model.kind = options.dtype, options.kind
    facts = Facts(16384, 1000, CodeLayout.square(grid_size(config)))
    generator = build_generator(config.model, facts)
    params = meta.unbox(jax.jit(generator.init)(jax.random.key(0)))
    # Random weights, also where they begin at zero: the time does not depend on them.
    params = jax.tree.map(lambda leaf: 0.02 * jax.random.normal(jax.random.key(1), leaf.shape), params)
    sampling_work, length = KINDS[options.kind].sampling_work, facts.layout.length
    assert sampling_work is not None
    print(f"{options.kind} {options.model}, {length} tokens, {options.dtype}, cfg {options.cfg_scale:g}, ", end="")
    print(f"top_k {options.top_k}")
    print(f"{'batch':>6}{'steps':>7}{'GB/s':>7}{'GFLOP/s':>9}{'floor: bytes':>14}{'FLOPs':>9}{'took':>9}", end="")
    print(f"{'images/s':>10}{'tokens/s':>10}{'of floor':>10}")
    for batch, steps in itertools.product(options.batches, options.steps if options.kind == "masked" else [length]):
        settings = SamplingSettings(
            cfg_scale=options.cfg_scale, top_k=options.top_k, top_p=options.top_p, mask_steps=steps
        )
        bytes_a_second, flops_a_second = machine_rates(options.dtype)
        work = sampling_work(generator, batch, settings)
        reading, computing = work.bytes / bytes_a_second, work.flops / flops_a_second
        sampled, keys = np.arange(batch, dtype=np.int32), jax.random.split(jax.random.key(2), batch)

        def run(sampled=sampled, keys=keys, settings=settings):
            return generator.sample(params, jnp.asarray(sampled), keys, settings)

        taken = seconds(run, repeats=options.repeats)
        print(
            f"{batch:6}{steps:7}{bytes_a_second / 1e9:7.1f}{flops_a_second / 1e9:9.0f}{reading:12.2f} s"
            f"{computing:7.2f} s{taken:7.2f} s{batch / taken:10.3f}{batch * length / taken:10.0f}"
            f"{max(reading, computing) / taken:10.1%}",
            flush=True,
        )


if __name__ == "__main__":
    main()
