"""If these fail, samples are lost or mixed between parts, half a file counts as a whole one, or a pickle is opened."""

import io
import tracemalloc

import numpy as np
import pytest
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st

from iar_jax.data.array_files import read_array
from iar_jax.data.array_parts import ArrayParts
from iar_jax.runtime.errors import UserError


def rows(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, 4, 4, 3)).astype(np.uint8)


@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(1, 7), min_size=1, max_size=6), st.integers(0, 6))
def test_what_was_written_in_parts_is_one_array(tmp_path_factory, sizes, reopened_after):
    directory = epath.Path(tmp_path_factory.mktemp("parts"))
    everything = rows(sum(sizes))
    parts = ArrayParts(directory / "parts")
    for number, size in enumerate(sizes):
        if number == reopened_after:
            parts = ArrayParts(directory / "parts")
        parts.append(everything[parts.done : parts.done + size])
    digest = parts.save_npz(directory / "all.npz")
    np.testing.assert_array_equal(np.load(directory / "all.npz")["arr_0"], everything)
    wanted = np.random.default_rng(1).permutation(len(everything))[:5]
    np.testing.assert_array_equal(parts.take(wanted), everything[wanted])
    whole = ArrayParts(directory / "whole")
    whole.append(everything)
    assert whole.save_npz(directory / "whole.npz") == digest
    assert (directory / "whole.npz").read_bytes() == (directory / "all.npz").read_bytes()


def test_a_part_that_is_cut_and_what_comes_after_it_is_made_again(tmp_path):
    parts = ArrayParts(epath.Path(tmp_path) / "parts")
    for start in (0, 3, 6):
        parts.append(rows(3, start))
    middle = tmp_path / "parts" / "from-00000003.npy"
    middle.write_bytes(middle.read_bytes()[:-1])
    (tmp_path / "parts" / "from-00000009.npy.partial").write_bytes(b"half")
    again = ArrayParts(epath.Path(tmp_path) / "parts")
    assert again.done == 3
    again.append(rows(3, 3))
    assert again.done == 6
    assert ArrayParts(epath.Path(tmp_path) / "parts").done == 9


def test_the_joined_file_takes_the_memory_of_one_part(tmp_path):
    parts = ArrayParts(epath.Path(tmp_path) / "parts")
    part = np.zeros((100, 64, 64, 3), np.uint8)
    for _ in range(20):
        parts.append(part)
    tracemalloc.start()
    parts.save_npz(epath.Path(tmp_path) / "all.npz")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * part.nbytes


def npz_of(**arrays):
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


class Malicious:
    def __reduce__(self):
        return open, ("executed", "w")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (npz_of(arr_0=np.array([Malicious()], dtype=object)), "cannot be read as arrays .*object, not numbers"),
        (npz_of(other=np.zeros(3)), "has no array 'arr_0'"),
        (npz_of(arr_0=np.zeros(100))[:-30], "cannot be read as arrays"),
        (npz_of(arr_0=np.zeros(100)).replace(bytes(16), bytes([1]) + bytes(15), 1), "cannot be read as arrays"),
        (b"nothing of the kind", "cannot be read as arrays"),
        (b"", "cannot be read as arrays"),
        (None, "is not there"),
    ],
)
def test_what_is_no_array_is_refused_by_name_and_never_executed(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / "samples.npz").write_bytes(content)
    with pytest.raises(UserError, match=message) as refusal:
        read_array(epath.Path(tmp_path) / "samples.npz")
    assert "samples.npz" in str(refusal.value)
    assert not (tmp_path / "executed").exists()
