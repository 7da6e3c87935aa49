"""Odd files made from sound ones."""

import struct

import numpy as np

# Numbers at which sizes, counts and places go wrong.
EDGES = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 2**63 - 1, 2**63, 2**64 - 1)


def changed(rng: np.random.Generator, sound: list[bytes]) -> bytes:
    """One of some files after a change, or up to four."""
    content = bytearray(sound[rng.integers(len(sound))])
    for _ in range(1 if rng.random() < 0.6 else rng.integers(2, 5)):
        if not content:
            break
        CHANGES[rng.integers(len(CHANGES))](rng, content, sound)
    return bytes(content)


def place(rng: np.random.Generator, content: bytearray) -> int:
    """Anywhere, and as often in the first bytes, where headers are."""
    return int(rng.integers(min(len(content), 200) if rng.random() < 0.5 else len(content)))


def flip(rng: np.random.Generator, content: bytearray, sound: list[bytes]) -> None:
    for _ in range(rng.integers(1, 9)):
        content[place(rng, content)] ^= 1 << int(rng.integers(8))


def overwrite(rng: np.random.Generator, content: bytearray, sound: list[bytes]) -> None:
    at, size = place(rng, content), int(rng.integers(1, 33))
    content[at : at + size] = rng.bytes(min(size, len(content) - at))


def edge(rng: np.random.Generator, content: bytearray, sound: list[bytes]) -> None:
    """A number of one to eight bytes, of either order."""
    size = int(rng.choice([1, 2, 4, 8]))
    value = EDGES[rng.integers(len(EDGES))] & (256**size - 1)
    at = place(rng, content)
    content[at : at + size] = value.to_bytes(size, "little" if rng.random() < 0.5 else "big")


def cut(rng: np.random.Generator, content: bytearray, sound: list[bytes]) -> None:
    del content[int(rng.integers(len(content))) :]


def remove(rng: np.random.Generator, content: bytearray, sound: list[bytes]) -> None:
    at = place(rng, content)
    del content[at : at + int(rng.integers(1, 65))]


def insert(rng: np.random.Generator, content: bytearray, sound: list[bytes]) -> None:
    at = place(rng, content)
    content[at:at] = rng.bytes(int(rng.integers(1, 65)))


def repeat(rng: np.random.Generator, content: bytearray, sound: list[bytes]) -> None:
    at, size = place(rng, content), int(rng.integers(1, 129))
    content[at:at] = content[at : at + size] * int(rng.integers(1, 20))


def splice(rng: np.random.Generator, content: bytearray, sound: list[bytes]) -> None:
    """The rest of another file."""
    other = sound[rng.integers(len(sound))]
    content[int(rng.integers(len(content))) :] = other[int(rng.integers(len(other))) :]


def digits(rng: np.random.Generator, content: bytearray, sound: list[bytes]) -> None:
    """Another number where one is written out."""
    places = [i for i, byte in enumerate(content[:5000]) if 48 <= byte < 58]
    if places:
        at = places[int(rng.integers(len(places)))]
        content[at : at + 1] = str(EDGES[rng.integers(len(EDGES))]).encode() if rng.random() < 0.5 else b"-"


CHANGES = (flip, overwrite, edge, cut, remove, insert, repeat, splice, digits)

# Of EXIF: orientation, descriptions, offsets of further directories, maker's note, an unknown one.
TAGS = (0x0112, 0x010E, 0x8769, 0x8825, 0xA005, 0x927C, 0x011A, 0x0201, 0xBEEF)


def odd_exif(rng: np.random.Generator) -> bytes:
    """A TIFF block with a directory of any entries: tags, types, counts and places that fit or do not."""
    order = "<" if rng.random() < 0.5 else ">"
    mark = (b"II" if order == "<" else b"MM") if rng.random() < 0.95 else rng.bytes(2)
    start = int(rng.choice([8, 8, 8, 0, 6, 2**31, 2**32 - 1]))
    count = int(rng.integers(0, 7))
    entries = b""
    for _ in range(count):
        tag = int(rng.choice(TAGS))
        kind = int(rng.choice([1, 2, 3, 4, 5, 7, 9, 10, 11, 12, 13, 0, 14, 129]))
        number = int(rng.choice([0, 1, 1, 1, 2, 4, 65_535, 2**32 - 1]))
        value = rng.bytes(4) if rng.random() < 0.5 else struct.pack(order + "HH", int(rng.integers(0, 12)), 0)
        entries += struct.pack(order + "HHI", tag, kind, number) + value
    declared = count if rng.random() < 0.9 else int(rng.integers(0, 65_536))
    block = mark + struct.pack(order + "HIH", 42, start, declared) + entries + struct.pack(order + "I", 0)
    return block + rng.bytes(int(rng.integers(0, 40))) if rng.random() < 0.9 else block[: int(rng.integers(len(block)))]
