"""Constants of a frozen TensorFlow graph (a GraphDef protocol buffer), without TensorFlow.

Only what constants need is read: GraphDef.node = 1; NodeDef.name = 1, .op = 2, .attr = 5 (a map: key = 1, value = 2);
AttrValue.tensor = 8; TensorProto.dtype = 1, .tensor_shape = 2, .tensor_content = 4, .float_val = 5;
TensorShapeProto.dim = 2, Dim.size = 1.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from iar_jax.runtime.errors import UserError, brief
from iar_jax.runtime.files import leftover

# A protocol buffer cannot be larger.
MOST_BYTES = 1 << 31

VARINT, FIXED64, LENGTH, FIXED32 = 0, 1, 2, 5
FLOAT = 1  # of the DataType enumeration


def read_constants(path: str | Path) -> dict[str, np.ndarray]:
    """The float32 constants of a graph, by the names of their nodes.

    Raises:
        UserError: no such file, or one that is not a graph.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if path.stat().st_size > MOST_BYTES:
        raise UserError(f"{path} is not a TensorFlow graph: it is larger than {MOST_BYTES:,} bytes")
    content = path.read_bytes()
    if problem := leftover(content[:512]):
        raise UserError(f"{path} is not a TensorFlow graph: it {problem}")
    constants = {}
    try:
        for number, node in fields(memoryview(content)):
            if number == 1:
                name, value = constant(node)
                if value is not None:
                    constants[name] = value
    except Exception as error:  # whatever odd numbers in it make numpy and Python raise
        raise UserError(f"{path} is not a TensorFlow graph, or is damaged ({brief(error)})") from error
    return constants


def fields(message: memoryview) -> Iterator[tuple[int, Any]]:
    """(number, value) of each field of a message; values of fixed width as their bytes."""
    place = 0
    while place < len(message):
        key, place = varint(message, place)
        kind = key & 7
        if kind == VARINT:
            value, place = varint(message, place)
            yield key >> 3, value
            continue
        if kind == LENGTH:
            size, place = varint(message, place)
        elif kind in (FIXED64, FIXED32):
            size = 8 if kind == FIXED64 else 4
        else:
            raise ValueError(f"a field of the unknown kind {kind}")
        if place + size > len(message):
            raise ValueError("it ends in the middle of a field")
        yield key >> 3, message[place : place + size]
        place += size


def varint(message: memoryview, place: int) -> tuple[int, int]:
    """An integer of seven bits a byte, and where the next thing begins."""
    value = shift = 0
    while True:
        byte = message[place]
        value |= (byte & 127) << shift
        place, shift = place + 1, shift + 7
        if byte < 128:
            return value, place
        if shift > 63:
            raise ValueError("an integer of more than 64 bits")


def constant(node) -> tuple[str, np.ndarray | None]:
    """Name of a node, and its value where it is a constant of numbers."""
    name, op, value = "", "", None
    for number, content in fields(node):
        if number == 1:
            name = bytes(content).decode()
        elif number == 2:
            op = bytes(content).decode()
        elif number == 5:
            entry = dict(fields(content))
            if bytes(entry[1]) == b"value":
                value = entry[2]
    if op != "Const" or value is None:
        return name, None
    return name, tensor(dict(fields(value))[8])


def tensor(message) -> np.ndarray | None:
    """The array of a TensorProto; None where it is not of float32."""
    dtype, content, values = None, None, []
    shape: tuple[int, ...] = ()
    for number, field in fields(message):
        if number == 1:
            dtype = field
        elif number == 2:
            shape = tuple(dict(fields(dim)).get(1, 0) for kind, dim in fields(field) if kind == 2)
        elif number == 4:
            content = bytes(field)
        elif number == 5:  # packed, or one at a time
            values.append(bytes(field))
    if dtype != FLOAT:
        return None
    flat = np.frombuffer(content if content is not None else b"".join(values), "<f4")
    # One number stands for a whole tensor, of any size that the file says: a view of it takes no memory.
    return np.broadcast_to(flat[0], shape) if flat.size == 1 else flat.reshape(shape)
