"""InceptionV3 weights of 2015-12-05 to our parameter tree, from the files people have, without PyTorch or TensorFlow.

* `weights-inception-2015-12-05-6726825d.pth` (torch-fidelity) and `pt_inception-2015-12-05-6726825d.pth` (pytorch-fid);
* `classify_image_graph_def.pb`, the graph that the ADM evaluator runs.

Batch norms are folded into the convolutions: kernel * scale, and shift as the bias.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from iar_jax.interop import graph_def
from iar_jax.interop.torch_files import named_tensor, read_torch_file
from iar_jax.models.inception import SIZE, InceptionV3
from iar_jax.runtime.errors import UserError

BATCH_NORM_EPSILON = 1e-3
CLASSES = 1008
AS_INCEPTION = ", read as the Inception network of 2015-12-05"

# Blocks of the graph, and what their convolutions are called in the PyTorch ports.
STEM = {
    "conv": "Conv2d_1a_3x3",
    "conv_1": "Conv2d_2a_3x3",
    "conv_2": "Conv2d_2b_3x3",
    "conv_3": "Conv2d_3b_1x1",
    "conv_4": "Conv2d_4a_3x3",
}
FIRST_KIND = {
    "conv": "branch1x1",
    "tower/conv": "branch5x5_1",
    "tower/conv_1": "branch5x5_2",
    "tower_1/conv": "branch3x3dbl_1",
    "tower_1/conv_1": "branch3x3dbl_2",
    "tower_1/conv_2": "branch3x3dbl_3",
    "tower_2/conv": "branch_pool",
}
FIRST_REDUCTION = {
    "conv": "branch3x3",
    "tower/conv": "branch3x3dbl_1",
    "tower/conv_1": "branch3x3dbl_2",
    "tower/conv_2": "branch3x3dbl_3",
}
SECOND_KIND = {
    "conv": "branch1x1",
    "tower/conv": "branch7x7_1",
    "tower/conv_1": "branch7x7_2",
    "tower/conv_2": "branch7x7_3",
    "tower_1/conv": "branch7x7dbl_1",
    "tower_1/conv_1": "branch7x7dbl_2",
    "tower_1/conv_2": "branch7x7dbl_3",
    "tower_1/conv_3": "branch7x7dbl_4",
    "tower_1/conv_4": "branch7x7dbl_5",
    "tower_2/conv": "branch_pool",
}
SECOND_REDUCTION = {
    "tower/conv": "branch3x3_1",
    "tower/conv_1": "branch3x3_2",
    "tower_1/conv": "branch7x7x3_1",
    "tower_1/conv_1": "branch7x7x3_2",
    "tower_1/conv_2": "branch7x7x3_3",
    "tower_1/conv_3": "branch7x7x3_4",
}
THIRD_KIND = {
    "conv": "branch1x1",
    "tower/conv": "branch3x3_1",
    "tower/mixed/conv": "branch3x3_2a",
    "tower/mixed/conv_1": "branch3x3_2b",
    "tower_1/conv": "branch3x3dbl_1",
    "tower_1/conv_1": "branch3x3dbl_2",
    "tower_1/mixed/conv": "branch3x3dbl_3a",
    "tower_1/mixed/conv_1": "branch3x3dbl_3b",
    "tower_2/conv": "branch_pool",
}
BLOCKS = {
    "mixed": ("Mixed_5b", FIRST_KIND),
    "mixed_1": ("Mixed_5c", FIRST_KIND),
    "mixed_2": ("Mixed_5d", FIRST_KIND),
    "mixed_3": ("Mixed_6a", FIRST_REDUCTION),
    "mixed_4": ("Mixed_6b", SECOND_KIND),
    "mixed_5": ("Mixed_6c", SECOND_KIND),
    "mixed_6": ("Mixed_6d", SECOND_KIND),
    "mixed_7": ("Mixed_6e", SECOND_KIND),
    "mixed_8": ("Mixed_7a", SECOND_REDUCTION),
    "mixed_9": ("Mixed_7b", THIRD_KIND),
    "mixed_10": ("Mixed_7c", THIRD_KIND),
}


def load(path_or_state_dict: str | Path | Mapping[str, np.ndarray]) -> tuple[InceptionV3, Any]:
    """The network and its parameters, for `evaluation.features.inception_features`.

    Args:
        path_or_state_dict: a .pth, .safetensors or .pb file, or arrays by the names of the PyTorch ports.

    Raises:
        UserError: no such file, a tensor is missing, or one has another shape.
    """
    if isinstance(path_or_state_dict, Mapping):
        return InceptionV3(), from_state_dict(path_or_state_dict, f"the given state dict{AS_INCEPTION}")
    path = Path(path_or_state_dict)
    if path.suffix == ".pb":
        return InceptionV3(), from_graph(graph_def.read_constants(path), f"{path}{AS_INCEPTION}")
    weights = read_torch_file(path)
    if not isinstance(weights, Mapping):
        raise UserError(f"{path} holds no tensors by name")
    return InceptionV3(), from_state_dict(weights, f"{path}{AS_INCEPTION}")


def from_state_dict(weights: Mapping[str, np.ndarray], source: str) -> Any:
    """Parameters from arrays by the names of the PyTorch ports."""

    def convolution(name: str, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
        height, width, channels_in, channels = shape
        kernel = named_tensor(weights, f"{name}.conv.weight", (channels, channels_in, height, width), source)
        norm = [
            named_tensor(weights, f"{name}.bn.{part}", (channels,), source)
            for part in ("weight", "bias", "running_mean", "running_var")
        ]
        return folded(kernel.transpose(2, 3, 1, 0), *norm)

    dense = named_tensor(weights, "fc.weight", (CLASSES, 2048), source)
    return parameters(convolution, dense.T)


def from_graph(constants: Mapping[str, np.ndarray], source: str) -> Any:
    """Parameters from the constants of the graph, by its names."""
    places = {name: place for place, name in STEM.items()}
    for block, (name, branches) in BLOCKS.items():
        places |= {f"{name}.{branch}": f"{block}/{place}" for place, branch in branches.items()}

    def convolution(name: str, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
        place = places[name]
        kernel = named_tensor(constants, f"{place}/conv2d_params", shape, source)
        norm = [
            named_tensor(constants, f"{place}/batchnorm/{part}", shape[-1:], source)
            for part in ("gamma", "beta", "moving_mean", "moving_variance")
        ]
        return folded(kernel, *norm)

    return parameters(convolution, named_tensor(constants, "softmax/weights", (2048, CLASSES), source))


def parameters(convolution, dense: Float[np.ndarray, "2048 1008"]) -> Any:
    """The parameter tree, with `convolution` asked for each convolution by its name and the shape of its kernel."""
    return {
        **{name: convolution(name, shape) for name, shape in kernel_shapes().items()},
        "fc": {"kernel": np.ascontiguousarray(dense)},
    }


def kernel_shapes() -> dict[str, tuple[int, ...]]:
    """Shapes [height, width, channels in, channels out] of all kernels, by the names of the modules."""
    shapes = jax.eval_shape(InceptionV3().init, jax.random.key(0), jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), np.float32))
    return {name: part["kernel"].shape for name, part in shapes["params"].items() if name != "fc"}


def folded(
    kernel: Float[np.ndarray, "H W I O"],
    gamma: Float[np.ndarray, " O"],
    beta: Float[np.ndarray, " O"],
    mean: Float[np.ndarray, " O"],
    variance: Float[np.ndarray, " O"],
) -> dict[str, np.ndarray]:
    """Convolution with the batch norm that follows it, in float64 until the end."""
    scale = gamma.astype(np.float64) / np.sqrt(variance.astype(np.float64) + BATCH_NORM_EPSILON)
    return {
        "kernel": np.ascontiguousarray(kernel * scale, np.float32),
        "bias": (beta - mean * scale).astype(np.float32),
    }
