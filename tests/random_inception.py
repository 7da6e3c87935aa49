"""Weights of the Inception network by the recipe of the reference data, in the forms that people have."""

import json
import struct
import zlib

import numpy as np

from iar_jax.interop import inception


def state_dict(shapes_file):
    """Random weights by the names of the PyTorch ports."""
    with open(shapes_file) as file:
        shapes = json.load(file)
    return {name: draw(name, shape) for name, shape in shapes.items()}


def draw(name, shape):
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    if name.endswith(("running_var", "bn.weight")):
        values = rng.uniform(0.5, 1.5, shape)
    elif name.endswith(("running_mean", "bias")):
        values = 0.1 * rng.standard_normal(shape)
    else:
        values = rng.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))
    return np.asarray(values, np.float32)


def graph(weights):
    """The same weights as the graph of TensorFlow holds them, as bytes."""
    places = {name: place for place, name in inception.STEM.items()}
    for block, (name, branches) in inception.BLOCKS.items():
        places |= {f"{name}.{branch}": f"{block}/{place}" for place, branch in branches.items()}
    nodes = [node("ExpandDims/dim", np.int32(0)), node("Mul", None)]
    for name, place in places.items():
        nodes.append(node(f"{place}/conv2d_params", weights[f"{name}.conv.weight"].transpose(2, 3, 1, 0)))
        for theirs, ours in (
            ("gamma", "weight"),
            ("beta", "bias"),
            ("moving_mean", "running_mean"),
            ("moving_variance", "running_var"),
        ):
            nodes.append(node(f"{place}/batchnorm/{theirs}", weights[f"{name}.bn.{ours}"]))
    nodes.append(node("softmax/weights", weights["fc.weight"].T))
    return b"".join(field(1, content) for content in nodes)


def varint(value):
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def field(number, content):
    if isinstance(content, int):
        return varint(number << 3) + varint(content)
    return varint(number << 3 | 2) + varint(len(content)) + content


def node(name, value):
    if value is None:
        return field(1, name.encode()) + field(2, b"Mul") + field(3, b"an input")
    value = np.asarray(value)
    dtype = {"float32": 1, "int32": 3}[str(value.dtype)]
    shape = b"".join(field(2, field(1, size)) for size in value.shape)
    # One scalar the other way that TensorFlow writes numbers, by float_val or int_val and not by their bytes.
    content = field(4, value.tobytes()) if value.ndim else field(7, int(value))
    tensor = field(1, dtype) + field(2, shape) + content
    attribute = field(1, b"value") + field(2, field(8, tensor))
    kind = field(1, b"dtype") + field(2, field(6, dtype))
    return field(1, name.encode()) + field(2, b"Const") + field(5, kind) + field(5, attribute)


def unit_fixed(number, value):
    """A field of eight bytes, which a reader must pass over."""
    return varint(number << 3 | 1) + struct.pack("<d", value)
