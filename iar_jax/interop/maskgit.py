"""Halton-MaskGIT's checkpoints to our module and parameter tree, and back.

Shapes and depths come from the file. The table of codes has one row more than there are codes, the mask's; the head is
the same table, with a bias, and the mask is one of its classes. Both directions only rename, reshape and transpose.
"""

from pathlib import Path
from typing import Any

import numpy as np

from iar_jax.generators.masked.generator import Masked
from iar_jax.generators.masked.sizes import SIZES
from iar_jax.generators.masked.transformer import MaskedTransformer
from iar_jax.generators.settings import Facts
from iar_jax.interop.state_dicts import (
    StateDict,
    check_model,
    check_shapes,
    contiguous,
    count,
    read_state_dict,
    require,
    stack,
)
from iar_jax.interop.torch_files import write_torch_file
from iar_jax.models.layers import swiglu_hidden_dim
from iar_jax.runtime.errors import UserError
from iar_jax.runtime.section import Section

# Where the trainer puts the weights; others are as in files of plain weights.
KEYS = ("model_state_dict", "model", "state_dict")

WHAT = "Halton-MaskGIT transformer"
# The bias of a mask that is no output of ours, for a head that has one: it is never drawn.
NEVER = -1e4


def load_generator(
    path: str | Path, *, num_heads: int, grid_size: int, **overrides: Any
) -> tuple[MaskedTransformer, Any]:
    """A masked transformer from a file of the published form.

    Args:
        path: .pt, .pth or .safetensors, weights flat or under "model_state_dict", with the prefixes of wrapped models
            or without.
        num_heads: attention heads, which the weights do not tell.
        grid_size: side of the square of codes, 24 for 384 pixels with VQ-16.
        overrides: further fields of `MaskedTransformer`, say dtype.

    Returns:
        The module and its parameters (numpy); `module.apply({"params": params}, labels, masked_codes)` gives logits
        [B, L, N + 1], where masked_codes are N where masked, and the label num_classes stands for none.

    Raises:
        UserError: the file is not such a transformer, or does not fit num_heads and grid_size; all tensors that are
            missing, unexpected or of another shape are named.
    """
    weights = read_state_dict(path, KEYS)
    for name in ("tok_emb.weight", "cls_emb.weight", "pos_emb.weight", "transformer.layers.0.ff.w1.weight"):
        require(weights, path, name, 2, WHAT)
    if "in_proj.weight" in weights:
        raise UserError(f"{path} puts 2 x 2 codes together (proj 2); networks of single codes are read here")
    rows, dim = weights["tok_emb.weight"].shape
    num_classes, length = weights["cls_emb.weight"].shape[0] - 1, weights["pos_emb.weight"].shape[0]
    hidden_dim = weights["transformer.layers.0.ff.w1.weight"].shape[0]
    num_layers = count(weights, r"transformer\.layers\.(\d+)\.")
    num_registers = len(weights.get("reg_tokens.weight", ()))
    if length != grid_size**2:
        raise UserError(
            f"{path} has {length} positions, and grid_size {grid_size} makes {grid_size**2}: it is a model of "
            f"{round(length**0.5)} x {round(length**0.5)} codes (384 pixels make 24 x 24)"
        )
    head_dim = dim // num_heads
    width = num_heads * head_dim
    check_shapes(weights, shapes(rows, num_classes, length, dim, width, hidden_dim, num_layers, num_registers), path)
    if not np.array_equal(weights["head.weight"], weights["tok_emb.weight"]):
        raise UserError(f"{path}: head.weight is not tok_emb.weight, with which the published networks tie it")

    def take(name: str) -> np.ndarray:
        return weights[name].astype(np.float32)

    def modulation(name: str, parts: int) -> dict[str, np.ndarray]:
        kernel = take(f"{name}.weight").T.reshape(dim, parts, dim)
        return {"kernel": kernel, "bias": take(f"{name}.bias").reshape(parts, dim)}

    def layer(i: int) -> dict[str, Any]:
        prefix = f"transformer.layers.{i}."
        qkv = [take(f"{prefix}attn.{name}.weight").T.reshape(dim, num_heads, head_dim) for name in ("wq", "wk", "wv")]
        return {
            "modulation": modulation(f"{prefix}mlp.1", 6),
            "attention_norm": {"weight": take(f"{prefix}ln1.weight")},
            "attention": {
                "wqkv": np.stack(qkv, axis=2),
                "wo": take(f"{prefix}attn.wo.weight").T.reshape(num_heads, head_dim, dim),
            },
            "ffn_norm": {"weight": take(f"{prefix}ln2.weight")},
            "feed_forward": {
                "w13": np.stack([take(f"{prefix}ff.{name}.weight").T for name in ("w1", "w3")], axis=1),
                "w2": take(f"{prefix}ff.w2.weight").T,
            },
        }

    table, bias = take("tok_emb.weight"), take("head.bias")
    params = {
        "class_table": take("cls_emb.weight"),
        "token_table": table[:-1],
        "mask_vector": table[-1:],
        "position_table": take("pos_emb.weight"),
        "register_table": take("reg_tokens.weight") if num_registers else np.zeros((0, dim), np.float32),
        "layers": stack([layer(i) for i in range(num_layers)]),
        "norm": {"weight": take("last_norm.norm_final.weight")},
        "norm_bias": take("last_norm.norm_final.bias"),
        "modulation": modulation("last_norm.mlp.1", 2),
        "head_bias": bias[:-1],
        "mask_bias": bias[-1:],
    }
    module = MaskedTransformer(
        **{
            "vocab_size": rows - 1,
            "num_classes": num_classes,
            "grid_size": grid_size,
            "dim": dim,
            "num_layers": num_layers,
            "num_heads": num_heads,
            "hidden_dim": hidden_dim,
            "num_registers": num_registers,
            "mask_output": True,
            "scan_unroll": num_layers,
            **overrides,
        }
    )
    return module, contiguous(params)


def shapes(
    rows: int, num_classes: int, length: int, dim: int, width: int, hidden_dim: int, num_layers: int, registers: int
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors of such a transformer."""
    found: dict[str, tuple[int, ...]] = {
        "cls_emb.weight": (num_classes + 1, dim),
        "tok_emb.weight": (rows, dim),
        "pos_emb.weight": (length, dim),
        "last_norm.norm_final.weight": (dim,),
        "last_norm.norm_final.bias": (dim,),
        "last_norm.mlp.1.weight": (2 * dim, dim),
        "last_norm.mlp.1.bias": (2 * dim,),
        "head.weight": (rows, dim),
        "head.bias": (rows,),
    }
    if registers:
        found["reg_tokens.weight"] = (registers, dim)
    for i in range(num_layers):
        prefix = f"transformer.layers.{i}."
        found |= {f"{prefix}attn.{name}.weight": (width, dim) for name in ("wq", "wk", "wv")}
        found |= {f"{prefix}{norm}.weight": (dim,) for norm in ("ln1", "ln2")}
        found |= {
            f"{prefix}attn.wo.weight": (dim, width),
            f"{prefix}mlp.1.weight": (6 * dim, dim),
            f"{prefix}mlp.1.bias": (6 * dim,),
            f"{prefix}ff.w1.weight": (hidden_dim, dim),
            f"{prefix}ff.w3.weight": (hidden_dim, dim),
            f"{prefix}ff.w2.weight": (dim, hidden_dim),
        }
    return found


def read_generator(path: str | Path, section: Section, facts: Facts) -> tuple[Masked, Any]:
    """A generator from a file, which must be the one that config.model and the facts describe.

    The number of classes is the file's.

    Raises:
        UserError: as `load_generator`; or the file holds another model: names the field, and the published model.
    """
    (side,) = facts.layout.sides
    network, params = load_generator(path, num_heads=section["num_heads"], grid_size=side)
    wanted = {
        "config.model.dim": (section["dim"], network.dim),
        "config.model.num_layers": (section["num_layers"], network.num_layers),
        "config.model.hidden_dim": (section["hidden_dim"] or swiglu_hidden_dim(section["dim"]), network.hidden_dim),
        "config.model.num_registers": (section["num_registers"], network.num_registers),
        "config.model.mask_output": (section["mask_output"], network.mask_output),
        "the tokenizer's codebook_size": (facts.vocab_size, network.vocab_size),
    }
    size = next((name for name, size in SIZES.items() if size[::2] == (network.num_layers, network.dim)), None)

    def hint(field: str, theirs: Any) -> str:
        is_field = field.startswith("config.")
        found = f"set --{field}={str(theirs).lower()}" if is_field else "give the config of that model"
        return found + (f" (it looks like Halton-MaskGIT's {size})" if size else "")

    check_model(path, wanted, hint)
    return Masked(network), params


def save_generator(params: Any, path: str | Path) -> None:
    """Writes parameters under the published names: {"model_state_dict": ..., "iter": 0, "global_epoch": 0} in a .pt
    file, flat in .safetensors. Where the mask is no output, it becomes one that is never drawn."""
    layers, dim = params["layers"], np.shape(params["token_table"])[1]
    table = np.concatenate([params["token_table"], params["mask_vector"]])
    mask_bias = params.get("mask_bias", np.full(1, NEVER, np.float32))
    weights: StateDict = {
        "cls_emb.weight": params["class_table"],
        "tok_emb.weight": table,
        "pos_emb.weight": params["position_table"],
        "last_norm.norm_final.weight": params["norm"]["weight"],
        "last_norm.norm_final.bias": params["norm_bias"],
        "last_norm.mlp.1.weight": np.asarray(params["modulation"]["kernel"]).reshape(dim, -1).T,
        "last_norm.mlp.1.bias": np.asarray(params["modulation"]["bias"]).reshape(-1),
        "head.weight": table,
        "head.bias": np.concatenate([params["head_bias"], mask_bias]),
    }
    if len(params["register_table"]):
        weights["reg_tokens.weight"] = params["register_table"]
    for i in range(np.shape(layers["attention_norm"]["weight"])[0]):
        prefix = f"transformer.layers.{i}."
        wqkv, w13 = np.asarray(layers["attention"]["wqkv"][i]), np.asarray(layers["feed_forward"]["w13"][i])
        for place, name in enumerate(("wq", "wk", "wv")):
            weights[f"{prefix}attn.{name}.weight"] = wqkv[:, :, place].reshape(dim, -1).T
        weights |= {
            f"{prefix}attn.wo.weight": np.asarray(layers["attention"]["wo"][i]).reshape(-1, dim).T,
            f"{prefix}ln1.weight": layers["attention_norm"]["weight"][i],
            f"{prefix}ln2.weight": layers["ffn_norm"]["weight"][i],
            f"{prefix}mlp.1.weight": np.asarray(layers["modulation"]["kernel"][i]).reshape(dim, -1).T,
            f"{prefix}mlp.1.bias": np.asarray(layers["modulation"]["bias"][i]).reshape(-1),
            f"{prefix}ff.w1.weight": w13[:, 0].T,
            f"{prefix}ff.w3.weight": w13[:, 1].T,
            f"{prefix}ff.w2.weight": np.asarray(layers["feed_forward"]["w2"][i]).T,
        }
    write_torch_file(contiguous(weights), path, "model_state_dict", iter=0, global_epoch=0)
