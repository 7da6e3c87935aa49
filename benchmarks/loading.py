"""Training examples a second out of code records, against what the training step takes.

    python -m benchmarks.loading

Records as ImageNet's extraction makes them: 20 crops of 256 codes an image, 10 KB, here of random codes. The loader
shuffles, draws a crop, rearranges its codes and makes batches of 256. The step is that of B at 256 px with 4 images on
this machine; larger machines take more, and have more cores to load with.
"""

import itertools
import statistics
import tempfile
import time

import numpy as np
from etils import epath

from benchmarks.train_step import fresh_problem, interleaved
from configs.imagenet import get_config
from iar_jax.codebook.permutation import Permutation
from iar_jax.data import codes, loader

NUM_RECORDS, CROPS, LENGTH, CODEBOOK_SIZE, BATCH_SIZE = 20_480, 20, 256, 16384, 256


def records_in(directory: epath.Path) -> None:
    rng = np.random.default_rng(0)
    packed = [
        codes.pack(
            codes.CodeRecord(rng.integers(0, CODEBOOK_SIZE, (CROPS, LENGTH), dtype=np.int32), i % 1000, i),
            CODEBOOK_SIZE,
        )
        for i in range(NUM_RECORDS)
    ]
    codes.write_shard(codes.shard_path(directory, 0, 1), packed)


def loaded_per_second(directory: epath.Path, num_batches: int) -> float:
    """Examples a second, from the second batch on."""
    order = np.random.default_rng(0).permutation(CODEBOOK_SIZE).astype(np.int32)
    source = codes.CodeSource(directory, Permutation(order, 128), 1000)
    batches = loader.train_batches(
        source, codes.random_crop_codes, seed=0, batch_size=BATCH_SIZE, first_step=0, part=0, num_parts=1
    )
    next(batches)
    start = time.perf_counter()
    for _ in itertools.islice(batches, num_batches):
        pass
    return num_batches * BATCH_SIZE / (time.perf_counter() - start)


def main() -> None:
    with tempfile.TemporaryDirectory() as path:
        records_in(epath.Path(path))
        loaded = statistics.median(loaded_per_second(epath.Path(path), 60) for _ in range(3))
    config = get_config("B,256")
    config.model.dtype = "float32"
    config.model.scan_unroll = config.model.num_layers
    problem = fresh_problem(config, 4)
    times, _ = interleaved(problem.step, problem.state, problem.batch, repeats=3)
    taken = len(problem.batch["label"]) / statistics.median(times)
    print(
        f"loader {loaded:,.0f} examples a second; the step of B takes {taken:.2f}: {loaded / taken:,.0f} times as many"
    )


if __name__ == "__main__":
    main()
