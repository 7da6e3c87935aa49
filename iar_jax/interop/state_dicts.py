"""Weights by the names that PyTorch's modules give them: found in a file, looked at, and put into our trees."""

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from iar_jax.interop.families import family_of
from iar_jax.interop.torch_files import check_finite, read_torch_file
from iar_jax.runtime.errors import UserError

StateDict = dict[str, np.ndarray]

# Tensors that are not weights.
BUFFERS = ("freqs_cis", "causal_mask")

# Where other trainers put weights: to be told what they are.
ELSEWHERE = ("model_state_dict", "state_dict", "model", "net", "params")


def read_state_dict(path: str | Path, keys: tuple[str, ...]) -> StateDict:
    """The weights in a file of any form that LlamaGen's and IAR's trainers write; the first of `keys` that is there.

    DDP {"model": ...}, {"ema": ...}, FSDP's flat dict, DeepSpeed's {"module": ...}, {"state_dict": ...}; prefixes
    "module." and "_orig_mod." of wrapped models are dropped.
    """
    content = read_torch_file(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a dict of weights")
    for key in (*keys, *ELSEWHERE):
        if isinstance(content.get(key), dict) and content[key]:
            content = content[key]
            break
    weights = {
        re.sub(r"^((module|_orig_mod)\.)+", "", str(name)): value
        for name, value in content.items()
        if isinstance(value, np.ndarray)
    }
    if not weights:
        raise UserError(f"{path}: no tensors found, at the top or under one of {', '.join(keys)}")
    check_finite({name: value for name, value in weights.items() if name not in BUFFERS}, path)
    return weights


def require(weights: StateDict, path: str | Path, name: str, ndim: int, kind: str) -> None:
    """Refuses a file that lacks a tensor which tells the model's size."""
    if name not in weights:
        found = family_of(weights)
        hint = f"it is {found}" if found else f"is this a {kind}? It begins with {sorted(weights)[0]}"
        raise UserError(f"{path}: the tensor {name} is missing; {hint}")
    if weights[name].ndim != ndim:
        raise UserError(f"{path}: {name} has shape {weights[name].shape}; it should have {ndim} dimensions")


def check_shapes(
    weights: StateDict, expected: dict[str, tuple[int, ...]], path: str | Path, optional: tuple[str, ...] = ()
) -> None:
    """Refuses a state dict that does not have the expected tensors, naming all that are wrong."""
    missing = [name for name in expected if name not in weights]
    unexpected = [name for name in weights if name not in expected and name not in (*BUFFERS, *optional)]
    wrong = [
        f"{name} has shape {weights[name].shape} and should have {shape}"
        for name, shape in expected.items()
        if name in weights and weights[name].shape != shape
    ]
    complaints = []
    if missing:
        complaints.append(f"missing: {', '.join(missing)}")
    if unexpected:
        complaints.append(f"unexpected: {', '.join(unexpected)}")
    if wrong:
        complaints.append("; ".join(wrong) + " (as the other tensors of the file tell: files of two sizes mixed?)")
    if complaints:
        raise UserError(f"{path} does not hold the tensors of such a model. " + ". ".join(complaints))


def check_model(path: str | Path, wanted: Mapping[str, tuple[Any, Any]], hint: Callable[[str, Any], str]) -> None:
    """Raises UserError where the model in a file is another one than the config's.

    Args:
        wanted: what the config says and what the file has, by the field's name.
        hint: (field, what the file has) -> what to do.
    """
    for field, (ours, theirs) in wanted.items():
        if ours != theirs:
            raise UserError(f"{path}: {field} is {ours}, and the file's model has {theirs}; {hint(field, theirs)}")


def count(names: Iterable[str], pattern: str) -> int:
    """One more than the highest number that a pattern finds in names."""
    return 1 + max((int(match[1]) for name in names if (match := re.match(pattern, name))), default=-1)


def stack(trees: list[Any]) -> Any:
    """Trees of arrays as one tree, stacked along a new first axis."""
    if isinstance(trees[0], dict):
        return {key: stack([tree[key] for tree in trees]) for key in trees[0]}
    return np.stack(trees)


def contiguous(tree: Any) -> Any:
    """The same arrays, each in one piece."""
    if isinstance(tree, dict):
        return {key: contiguous(value) for key, value in tree.items()}
    return np.ascontiguousarray(tree)
