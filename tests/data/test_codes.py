"""If these fail, codes are lost, damaged or read with the wrong ids."""

import dataclasses

import numpy as np
import pytest
from etils import epath
from hypothesis import given
from hypothesis import strategies as st

from iar_jax.codebook.permutation import Permutation
from iar_jax.data import codes, loader
from iar_jax.runtime.errors import UserError


@given(st.integers(1, 4), st.integers(1, 20), st.sampled_from([16, 65536, 65537, 2**20]), st.integers(0, 2**40))
def test_records_round_trip(crops, length, codebook_size, image_id):
    ids = np.random.default_rng(0).integers(0, codebook_size, (crops, length)).astype(np.int32)
    record = codes.CodeRecord(ids, 7, image_id)
    packed = codes.pack(record, codebook_size)
    assert len(packed) == codes.HEADER.size + crops * length * (2 if codebook_size <= 65536 else 4)
    found = codes.unpack(packed)
    np.testing.assert_array_equal(found.codes, ids)
    assert (found.label, found.image_id) == (7, image_id)


@pytest.mark.parametrize("damage", [lambda b: b[:5], lambda b: b[:-1], lambda b: b + b"x"])
def test_a_damaged_record_is_refused(damage):
    packed = codes.pack(codes.CodeRecord(np.zeros((1, 4), np.int32), 0, 0), 16)
    with pytest.raises(ValueError, match="a code record"):
        codes.unpack(damage(packed))


def write(directory, num_images=10, num_shards=3, codebook_size=16, crops=2, label=1):
    records = [codes.CodeRecord(np.full((crops, 4), i % codebook_size, np.int32), label, i) for i in range(num_images)]
    for shard, part in enumerate(np.array_split(np.arange(num_images), num_shards)):
        content = [codes.pack(records[i], codebook_size) for i in part]
        codes.write_shard(codes.shard_path(directory, shard, num_shards), content)


def test_shards_are_read_in_order_with_rearranged_ids(tmp_path):
    directory = epath.Path(tmp_path)
    write(directory)
    permutation = Permutation.from_order(np.random.default_rng(0).permutation(16), 4)
    source = codes.CodeSource(directory, permutation, num_classes=2)
    assert len(source) == 10
    assert [int(source[i]["image_id"]) for i in range(10)] == list(range(10))
    for i in range(10):
        assert (permutation.new_to_old[source[i]["codes"]] == i).all()


def test_the_fingerprint_does_not_depend_on_the_sharding(tmp_path):
    fingerprints = set()
    for num_shards in (1, 3):
        directory = epath.Path(tmp_path) / str(num_shards)
        directory.mkdir()
        write(directory, num_shards=num_shards)
        fingerprints.add(codes.fingerprint_records(sorted(directory.glob("*.array_record"))))
    assert len(fingerprints) == 1


def test_missing_shards_and_impossible_content_are_refused(tmp_path):
    directory = epath.Path(tmp_path)
    identity = Permutation(np.arange(16, dtype=np.int32), 4)
    with pytest.raises(UserError, match="0 of its code files"):
        codes.CodeSource(directory, identity, 2)
    write(directory, codebook_size=300, num_images=40)
    source = codes.CodeSource(directory, identity, 2)
    with pytest.raises(UserError, match=r"record 20 \(image 20\) has the code 20; the codebook has 16"):
        source[20]
    with pytest.raises(UserError, match="has the label 1; there are 1 classes"):
        codes.CodeSource(directory, identity, 1)[3]
    codes.shard_path(directory, 1, 3).unlink()
    with pytest.raises(UserError, match="has 2 of 3 code files"):
        codes.CodeSource(directory, identity, 2)


@dataclasses.dataclass(frozen=True)
class Numbers:
    size: int

    def __len__(self):
        return self.size

    def __getitem__(self, i):
        return {"number": np.int64(i)}


def keep(record, rng):
    return record | {"noise": rng.random()}


def take(count, batch_size=6, first_step=0, part=0, num_parts=1):
    stream = loader.train_batches(
        Numbers(10),
        keep,
        seed=1,
        batch_size=batch_size,
        first_step=first_step,
        part=part,
        num_parts=num_parts,
    )
    return [next(stream) for _ in range(count)]


def test_every_record_is_seen_once_an_epoch_in_a_new_order():
    seen = np.concatenate([batch["number"] for batch in take(10)])  # 60 of 10 records: six epochs
    epochs = seen.reshape(6, 10)
    for epoch in epochs:
        assert sorted(epoch) == list(range(10))
    assert len({tuple(epoch) for epoch in epochs.tolist()}) > 1


def test_a_stream_from_a_later_step_is_the_rest_of_the_whole_one():
    whole, rest = take(8), take(3, first_step=5)
    for a, b in zip(whole[5:], rest, strict=True):
        np.testing.assert_array_equal(a["number"], b["number"])
        np.testing.assert_array_equal(a["noise"], b["noise"])


@pytest.mark.parametrize("num_parts", [2, 3, 6])
def test_processes_share_the_same_global_batches(num_parts):
    whole = take(4, first_step=2)
    parts = [take(4, first_step=2, part=p, num_parts=num_parts) for p in range(num_parts)]
    for step, batch in enumerate(whole):
        for name in ("number", "noise"):
            np.testing.assert_array_equal(np.concatenate([part[step][name] for part in parts]), batch[name])


def test_evaluation_batches_cover_everything_once():
    batches = list(loader.eval_batches(Numbers(10), 4))
    assert [len(batch["number"]) for batch in batches] == [4, 4, 4]
    valid = np.concatenate([batch["number"][batch["valid"]] for batch in batches])
    np.testing.assert_array_equal(valid, np.arange(10))
