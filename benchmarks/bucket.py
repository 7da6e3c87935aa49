"""Reading code records of a bucket: one request a record, or a local copy of each file first.

    python -m benchmarks.bucket

The bucket is on 127.0.0.1 and answers after some milliseconds, as a real one in the same region does.
"""

import os
import tempfile
import time

from tests.bucket.server import serving

DELAY_SECONDS = 0.02
IMAGES, CROPS, LENGTH, CODEBOOK_SIZE, BATCH = 2048, 20, 256, 16384, 64


def main() -> None:
    with serving() as (bucket, environment), tempfile.TemporaryDirectory() as directory:
        # Before the libraries that read them.
        os.environ |= environment | {"IAR_JAX_CACHE": directory}
        import numpy as np
        from etils import epath

        from iar_jax.data import codes, loader

        rng, place = np.random.default_rng(0), epath.Path("gs://bucket/codes/train")
        for shard in range(2):
            records = [
                codes.CodeRecord(rng.integers(0, CODEBOOK_SIZE, (CROPS, LENGTH)), 0, image)
                for image in range(IMAGES // 2)
            ]
            packed = [codes.pack(record, CODEBOOK_SIZE) for record in records]
            codes.write_shard(codes.shard_path(place, shard, 2), packed)
        bucket.make_trouble(delay=DELAY_SECONDS)

        def rate(source, batches) -> float:
            examples = loader.train_batches(
                source,
                lambda record, rng: {"codes": record.codes[0]},
                seed=0,
                batch_size=BATCH,
                first_step=0,
                part=0,
                num_parts=1,
            )
            next(examples)
            start = time.monotonic()
            for _ in range(batches):
                next(examples)
            return batches * BATCH / (time.monotonic() - start)

        start = time.monotonic()
        copied = codes.RawRecords(place, CODEBOOK_SIZE)
        copying = time.monotonic() - start
        there = codes.RawRecords(place, CODEBOOK_SIZE)
        there.source = codes.ArrayRecordDataSource([str(path) for path in codes.shards_in(place)])
        size = sum(codes.sizes_of(codes.shards_in(place)).values()) / 1e6
        print(
            f"{IMAGES} records of {CROPS} x {LENGTH} codes, {size:.0f} MB; answers after {DELAY_SECONDS * 1e3:.0f} ms"
        )
        print(f"{'from the bucket':24}{rate(there, 10):10,.0f} records a second")
        print(f"{'from a local copy':24}{rate(copied, 100):10,.0f} records a second, after {copying:.1f} s of copying")


if __name__ == "__main__":
    main()
