"""An endless stream of training batches whose position is one integer, the step."""

from collections.abc import Callable, Iterator

import grain
import numpy as np

# Records in the stream. Grain's own endless repeat has a length whose slices overflow.
ENDLESS = 2**60


def train_batches(
    source,
    augment: Callable[[dict, np.random.Generator], dict],
    *,
    seed: int,
    batch_size: int,
    first_step: int,
    part: int,
    num_parts: int,
) -> Iterator[dict[str, np.ndarray]]:
    """This process' rows of the global batches first_step, first_step + 1, ...

    The source is shuffled anew each epoch and repeated; the global batch of step s is the block
    [s * batch_size, (s + 1) * batch_size) of that sequence, and part p is its p-th contiguous piece. So the
    sequence of global batches is the same for any number of processes, and any step can be the first.

    Args:
        source: random access to records, dicts of arrays.
        augment: called with a record and a generator that depends on the seed and the record's place alone.
        batch_size: global; a multiple of num_parts.
    """
    local_batch = batch_size // num_parts
    blocks = (
        grain.MapDataset.source(source)
        .seed(seed)
        .shuffle()
        .repeat(ENDLESS // len(source))
        .random_map(augment)
        .batch(local_batch)
    )  # block k of a part's size: part k % num_parts of step k // num_parts
    mine = blocks[first_step * num_parts + part :: num_parts]
    return iter(mine.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)))


def eval_batches(source, batch_size: int) -> Iterator[dict[str, np.ndarray]]:
    """All records in order; the last batch is filled up by repeating its last record.

    Each batch has "valid", bool [batch_size], false for the filling.
    """
    for start in range(0, len(source), batch_size):
        indices = np.arange(start, start + batch_size)
        records = [source[int(i)] for i in np.minimum(indices, len(source) - 1)]
        batch = {name: np.stack([record[name] for record in records]) for name in records[0]}
        yield {**batch, "valid": indices < len(source)}
