"""What saving a checkpoint costs the training loop, asynchronously as the stages do it.

    python -m benchmarks.checkpointing                LlamaGen's B, 4 x 256 tokens, float32
    python -m benchmarks.checkpointing --model=L --directory=/mnt/fast

Steps are timed without a save, then from a save on until it is on disk. The loss is the time that the save holds the
loop, and what the steps beside it take longer. It is set against the time between two saves at the default interval.
"""

import argparse
import statistics
import tempfile
import time

import jax
from etils import epath

from benchmarks.train_step import fresh_problem
from configs.imagenet import get_config
from iar_jax.config.fields import default_config
from iar_jax.runtime.checkpoint import Checkpoints, Retention


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="B")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--saves", type=int, default=3)
    parser.add_argument("--directory", default=None, help="where to write; a temporary directory by default")
    arguments = parser.parse_args()
    config = get_config(f"{arguments.model},256")
    config.model.dtype = "float32"
    config.model.scan_unroll = config.model.num_layers
    problem = fresh_problem(config, arguments.batch)
    state = problem.state

    def timed_step(state):
        start = time.perf_counter()
        state = jax.block_until_ready(problem.step(state, problem.batch)[0])
        return state, time.perf_counter() - start

    held, slowed = [], []
    with (
        tempfile.TemporaryDirectory(dir=arguments.directory) as name,
        Checkpoints(epath.Path(name), Retention(latest=1)) as checkpoints,
    ):
        state, _ = timed_step(state)
        alone = []
        for number in range(arguments.saves + 1):
            for _ in range(4):
                state, seconds = timed_step(state)
                alone.append(seconds)
            start = time.perf_counter()
            checkpoints.save(number, state, {})
            hold, extra = time.perf_counter() - start, 0.0
            while checkpoints.manager.is_saving_in_progress():
                state, seconds = timed_step(state)
                extra += seconds - statistics.median(alone)
            if number:  # the first one compiles the checksums
                held.append(hold)
                slowed.append(extra)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) / 1e9
    step, loss = statistics.median(alone), statistics.median(held) + statistics.median(slowed)
    every = default_config().training.checkpoint_every
    print(f"{arguments.model}, {size:.2f} GB a checkpoint, {step:.2f} s a step, {jax.devices()[0].device_kind}")
    print(f"the loop is held        {statistics.median(held):8.2f} s a save")
    print(f"steps beside it lose    {statistics.median(slowed):8.2f} s a save")
    print(f"of the {every} steps between two saves ({every * step:.0f} s) that is {loss / (every * step):.3%}")
    print(f"5 % is reached at a save every {loss / (0.05 * step):.0f} steps")


if __name__ == "__main__":
    main()
