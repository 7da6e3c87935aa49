"""LlamaGen's checkpoints (and IAR's, which are LlamaGen's) to our modules and parameter trees, and back.

Shapes and depths come from the file. Both directions only rename, reshape and transpose, so a round trip is exact.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from iar_jax.generators.autoregressive.generator import Autoregressive
from iar_jax.generators.autoregressive.sizes import size_named
from iar_jax.generators.autoregressive.transformer import Transformer
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
from iar_jax.models.rope import rope_table
from iar_jax.models.vqgan import VQModel
from iar_jax.runtime.errors import UserError
from iar_jax.runtime.section import Section

# Where trainers put the weights, in the order in which LlamaGen's own programs look: its sampling takes a transformer's
# plain weights also where averaged ones are beside them, its reconstruction a tokenizer's averaged ones.
TRANSFORMER_KEYS = ("model", "module", "state_dict", "ema")
TOKENIZER_KEYS = ("ema", "model", "module", "state_dict")


def load_transformer(path: str | Path, *, num_heads: int, grid_size: int, **overrides: Any) -> tuple[Transformer, Any]:
    """A transformer from a LlamaGen file.

    Args:
        path: .pt, .pth or .safetensors; see `read_state_dict` for the forms.
        num_heads: attention heads, which the weights do not tell.
        grid_size: side of the square of codes, 16 for 256 pixels with VQ-16.
        overrides: further fields of `Transformer`, say dtype or dropout rates.

    Returns:
        The module and its parameters (numpy); `module.apply({"params": params}, labels, codes)` gives logits.

    Raises:
        UserError: the file is not such a transformer, or does not fit num_heads and grid_size; all tensors that are
            missing, unexpected or of another shape are named.
    """
    weights = read_state_dict(path, TRANSFORMER_KEYS)
    for name, ndim in (("tok_embeddings.weight", 2), ("cls_embedding.embedding_table.weight", 2)):
        require(weights, path, name, ndim, "LlamaGen transformer")
    vocab_size, dim = weights["tok_embeddings.weight"].shape
    num_classes = weights["cls_embedding.embedding_table.weight"].shape[0] - 1
    num_layers = count(weights, r"layers\.(\d+)\.")
    if dim % num_heads or (dim // num_heads) % 4:
        raise UserError(f"{path}: {num_heads} heads do not divide the width {dim} into heads of a multiple of 4")
    head_dim = dim // num_heads
    require(weights, path, "layers.0.feed_forward.w1.weight", 2, "LlamaGen transformer")
    require(weights, path, "layers.0.attention.wqkv.weight", 2, "LlamaGen transformer")
    hidden_dim = weights["layers.0.feed_forward.w1.weight"].shape[0]
    rows = weights["layers.0.attention.wqkv.weight"].shape[0]
    num_kv_heads, rest = divmod(rows - dim, 2 * head_dim)
    if rest or num_kv_heads < 1 or num_heads % num_kv_heads:
        raise UserError(
            f"{path}: layers.0.attention.wqkv.weight has {rows} rows, which {num_heads} heads of {head_dim} do not "
            "make; is num_heads another size's?"
        )
    check_shapes(weights, _transformer_shapes(vocab_size, num_classes, dim, hidden_dim, num_layers, rows), path)
    _check_frequencies(weights, path, grid_size, head_dim, overrides.get("rope_base", 10000.0))

    def take(name: str) -> np.ndarray:
        return weights[name].astype(np.float32)

    def layer(i: int) -> dict:
        prefix = f"layers.{i}."
        q, k, v = np.split(take(prefix + "attention.wqkv.weight"), [dim, dim + num_kv_heads * head_dim])
        grouped = [part.reshape(num_kv_heads, -1, head_dim, dim) for part in (q, k, v)]
        gates = [take(f"{prefix}feed_forward.{name}.weight") for name in ("w1", "w3")]
        return {
            "attention": {
                "wqkv": np.concatenate(grouped, axis=1).transpose(3, 0, 1, 2),
                "wo": take(prefix + "attention.wo.weight").T.reshape(num_heads, head_dim, dim),
            },
            "feed_forward": {
                "w13": np.stack([gate.T for gate in gates], axis=1),
                "w2": take(prefix + "feed_forward.w2.weight").T,
            },
            "attention_norm": {"weight": take(prefix + "attention_norm.weight")},
            "ffn_norm": {"weight": take(prefix + "ffn_norm.weight")},
        }

    params = {
        "class_table": take("cls_embedding.embedding_table.weight"),
        "token_table": take("tok_embeddings.weight"),
        "layers": stack([layer(i) for i in range(num_layers)]),
        "norm": {"weight": take("norm.weight")},
        "head": take("output.weight").T,
    }
    module = Transformer(
        **{
            "vocab_size": vocab_size,
            "num_classes": num_classes,
            "grid_size": grid_size,
            "dim": dim,
            "num_layers": num_layers,
            "num_heads": num_heads,
            "num_kv_heads": None if num_kv_heads == num_heads else num_kv_heads,
            "hidden_dim": hidden_dim,
            "scan_unroll": num_layers,
            **overrides,
        }
    )
    return module, contiguous(params)


def read_generator(path: str | Path, section: Section, facts: Facts) -> tuple[Autoregressive, Any]:
    """A generator from a LlamaGen file, which must be the one that config.model and the facts describe.

    The number of classes is the file's.

    Raises:
        UserError: as `load_transformer`; or the file holds another model: names the field, and the published model.
    """
    (side,) = facts.layout.sides
    network, params = load_transformer(path, num_heads=section["num_heads"], grid_size=side)
    dim = section["dim"]
    wanted = {
        "config.model.dim": (dim, network.dim),
        "config.model.num_layers": (section["num_layers"], network.num_layers),
        "config.model.hidden_dim": (section["hidden_dim"] or swiglu_hidden_dim(dim), network.hidden_dim),
        "config.model.num_kv_heads": (
            section["num_kv_heads"] or section["num_heads"],
            network.block_fields()["num_kv_heads"],
        ),
        "the tokenizer's codebook_size": (facts.vocab_size, network.vocab_size),
    }
    name = size_named(network.num_layers, network.dim)
    hint = f"it looks like LlamaGen's {name}" if name else "give the config of that model"
    check_model(path, wanted, lambda field, theirs: hint)
    return Autoregressive(network), params


def _transformer_shapes(
    vocab_size: int, num_classes: int, dim: int, hidden_dim: int, num_layers: int, qkv_rows: int
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors of a LlamaGen transformer."""
    shapes: dict[str, tuple[int, ...]] = {
        "cls_embedding.embedding_table.weight": (num_classes + 1, dim),
        "tok_embeddings.weight": (vocab_size, dim),
        "norm.weight": (dim,),
        "output.weight": (vocab_size, dim),
    }
    for i in range(num_layers):
        prefix = f"layers.{i}."
        shapes |= {
            prefix + "attention.wqkv.weight": (qkv_rows, dim),
            prefix + "attention.wo.weight": (dim, dim),
            prefix + "feed_forward.w1.weight": (hidden_dim, dim),
            prefix + "feed_forward.w3.weight": (hidden_dim, dim),
            prefix + "feed_forward.w2.weight": (dim, hidden_dim),
            prefix + "attention_norm.weight": (dim,),
            prefix + "ffn_norm.weight": (dim,),
        }
    return shapes


def save_transformer(params: Any, path: str | Path) -> None:
    """Writes transformer parameters as LlamaGen names them: {"model": ...} in a .pt file, flat in .safetensors."""
    layers = params["layers"]
    dim = np.shape(params["token_table"])[1]
    weights = {
        "cls_embedding.embedding_table.weight": params["class_table"],
        "tok_embeddings.weight": params["token_table"],
    }
    for i in range(np.shape(layers["attention_norm"]["weight"])[0]):
        prefix = f"layers.{i}."
        # [D, groups, queries + key + value, K] to LlamaGen's rows: all queries, all keys, all values.
        wqkv = np.asarray(layers["attention"]["wqkv"][i])
        w13 = np.asarray(layers["feed_forward"]["w13"][i])
        weights |= {
            prefix + "attention.wqkv.weight": np.concatenate(
                [
                    part.transpose(1, 2, 3, 0).reshape(-1, dim)
                    for part in (wqkv[:, :, :-2], wqkv[:, :, -2:-1], wqkv[:, :, -1:])
                ]
            ),
            prefix + "attention.wo.weight": np.asarray(layers["attention"]["wo"][i]).reshape(dim, dim).T,
            prefix + "feed_forward.w1.weight": w13[:, 0].T,
            prefix + "feed_forward.w3.weight": w13[:, 1].T,
            prefix + "feed_forward.w2.weight": np.asarray(layers["feed_forward"]["w2"][i]).T,
            prefix + "attention_norm.weight": layers["attention_norm"]["weight"][i],
            prefix + "ffn_norm.weight": layers["ffn_norm"]["weight"][i],
        }
    weights |= {"norm.weight": params["norm"]["weight"], "output.weight": np.asarray(params["head"]).T}
    write_torch_file(contiguous(weights), path)


def load_tokenizer(path: str | Path, **overrides: Any) -> tuple[VQModel, Any]:
    """A VQ tokenizer from a LlamaGen file, with the codebook in the file's order.

    LlamaGen's counter of used codes, where the file has it, comes along as params["quantizer"]["codebook_used"], which
    the module does not look at, so that writing the tokenizer again gives the same file.

    Args:
        path: .pt, .pth or .safetensors; see `read_state_dict` for the forms.
        overrides: further fields of `VQModel`, say dtype.

    Raises:
        UserError: the file is not such a tokenizer.
    """
    weights = read_state_dict(path, TOKENIZER_KEYS)
    for name, ndim in (
        ("encoder.conv_in.weight", 4),
        ("encoder.conv_out.weight", 4),
        ("quantize.embedding.weight", 2),
        ("encoder.conv_blocks.0.res.0.conv1.weight", 4),
    ):
        require(weights, path, name, ndim, "LlamaGen tokenizer")
    channels = weights["encoder.conv_in.weight"].shape[0]
    z_channels = weights["encoder.conv_out.weight"].shape[0]
    codebook_size, codebook_dim = weights["quantize.embedding.weight"].shape
    num_levels = count(weights, r"encoder\.conv_blocks\.(\d+)\.")
    num_res_blocks = count(weights, r"encoder\.conv_blocks\.0\.res\.(\d+)\.")
    widths = []
    for i in range(num_levels):
        require(weights, path, f"encoder.conv_blocks.{i}.res.0.conv1.weight", 4, "LlamaGen tokenizer")
        widths.append(weights[f"encoder.conv_blocks.{i}.res.0.conv1.weight"].shape[0])
    if any(width % channels for width in widths):
        raise UserError(f"{path}: the widths {widths} are not multiples of the first convolution's {channels}")
    module = VQModel(
        **{
            "channels": channels,
            "channel_multipliers": tuple(width // channels for width in widths),
            "num_res_blocks": num_res_blocks,
            "z_channels": z_channels,
            "codebook_size": codebook_size,
            "codebook_dim": codebook_dim,
            "attention": "encoder.mid.1.q.weight" in weights,
            **overrides,
        }
    )
    images = jnp.zeros((1, module.downsampling, module.downsampling, 3))
    shapes = _tree_shapes(jax.eval_shape(lambda: module.init(jax.random.key(0), images)["params"]))
    leaves = {}
    for theirs, ours in _tokenizer_names(num_levels, num_res_blocks, module.attention).items():
        for their_leaf, our_leaf in (("weight", "kernel" if _is_conv(theirs) else "scale"), ("bias", "bias")):
            if (*ours, our_leaf) in shapes:
                leaves[f"{theirs}.{their_leaf}"] = (*ours, our_leaf)
    expected = {name: _their_shape(shapes[ours]) for name, ours in leaves.items()}
    expected["quantize.embedding.weight"] = (codebook_size, codebook_dim)
    check_shapes(weights, expected, path, optional=("quantize.codebook_used",))

    params: dict = {"quantizer": {"codebook": weights["quantize.embedding.weight"].astype(np.float32)}}
    if "quantize.codebook_used" in weights:
        params["quantizer"]["codebook_used"] = weights["quantize.codebook_used"].astype(np.float32)
    for name, ours in leaves.items():
        value = weights[name].astype(np.float32)
        node = params
        for key in ours[:-1]:
            node = node.setdefault(key, {})
        node[ours[-1]] = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value
    return module, contiguous(params)


def save_tokenizer(params: Any, path: str | Path) -> None:
    """Writes tokenizer parameters as LlamaGen names them: {"model": ...} in a .pt file, flat in .safetensors.

    Raises:
        UserError: the tokenizer has a patch stem, which LlamaGen's network does not know.
    """
    encoder, decoder = params["encoder"], params["decoder"]
    if np.shape(encoder["conv_in"]["kernel"])[2] != 3 or np.shape(decoder["conv_out"]["kernel"])[3] != 3:
        raise UserError(
            "this tokenizer has patch_size > 1; LlamaGen's network has no such stem, so it can't be written"
        )
    num_levels = count(encoder, r"level(\d+)_res")
    num_res_blocks = count(encoder, r"level0_res(\d+)")
    weights = {"quantize.embedding.weight": params["quantizer"]["codebook"]}
    if "codebook_used" in params["quantizer"]:
        weights["quantize.codebook_used"] = params["quantizer"]["codebook_used"]
    for theirs, ours in _tokenizer_names(num_levels, num_res_blocks, "mid_attn" in encoder).items():
        node = params
        for key in ours:
            node = node.get(key, {})
        if not node:
            continue
        value = np.asarray(node["kernel"] if _is_conv(theirs) else node["scale"])
        weights[f"{theirs}.weight"] = value.transpose(3, 2, 0, 1) if value.ndim == 4 else value
        weights[f"{theirs}.bias"] = node["bias"]
    write_torch_file(contiguous(weights), path)


def _tree_shapes(tree: Any, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], tuple[int, ...]]:
    if isinstance(tree, dict):
        return {k: v for key, value in tree.items() for k, v in _tree_shapes(value, (*path, key)).items()}
    return {path: tree.shape}


def _their_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (shape[3], shape[2], shape[0], shape[1]) if len(shape) == 4 else shape


def _check_frequencies(weights: StateDict, path: str | Path, grid_size: int, head_dim: int, base: float) -> None:
    table = weights.get("freqs_cis")
    if table is None:
        return
    expected = rope_table(grid_size, head_dim, base)
    if table.shape != expected.shape:
        raise UserError(
            f"{path}: freqs_cis has shape {table.shape}, but num_heads and grid_size {grid_size} make "
            f"{expected.shape}: this is a model of {round((table.shape[0] - 1) ** 0.5)} x "
            f"{round((table.shape[0] - 1) ** 0.5)} codes with heads of {2 * table.shape[1]} (LlamaGen's 256-px models "
            "have 16 x 16 codes, its 384-px models 24 x 24)"
        )
    if np.abs(table.astype(np.float32) - expected).max() > 0.02:  # bfloat16 files round at 0.004
        raise UserError(f"{path}: freqs_cis is not the rotary table of a grid of side {grid_size}")


def _tokenizer_names(num_levels: int, num_res_blocks: int, attention: bool) -> dict[str, tuple[str, ...]]:
    """LlamaGen's module names to paths in our tree. Shortcuts are listed whether or not a block has one."""
    names: dict[str, tuple[str, ...]] = {"quant_conv": ("quant_conv",), "post_quant_conv": ("post_quant_conv",)}

    def residual(theirs, part, ours):
        for norm in ("norm1", "norm2"):
            names[f"{theirs}.{norm}"] = (part, ours, norm, "norm")
        for conv in ("conv1", "conv2"):
            names[f"{theirs}.{conv}"] = (part, ours, conv)
        names[f"{theirs}.nin_shortcut"] = (part, ours, "shortcut")

    def attend(theirs, part, ours):
        names[f"{theirs}.norm"] = (part, ours, "norm", "norm")
        for conv in ("q", "k", "v", "proj_out"):
            names[f"{theirs}.{conv}"] = (part, ours, conv)

    for part in ("encoder", "decoder"):
        for conv in ("conv_in", "conv_out"):
            names[f"{part}.{conv}"] = (part, conv)
        names[f"{part}.norm_out"] = (part, "norm_out", "norm")
        residual(f"{part}.mid.0", part, "mid_res0")
        residual(f"{part}.mid.{2 if attention else 1}", part, "mid_res1")
        if attention:
            attend(f"{part}.mid.1", part, "mid_attn")
        for i in range(num_levels):
            # LlamaGen numbers the decoder's blocks in the order they run, from the lowest resolution.
            theirs = f"{part}.conv_blocks.{i if part == 'encoder' else num_levels - 1 - i}"
            for j in range(num_res_blocks + (part == "decoder")):
                residual(f"{theirs}.res.{j}", part, f"level{i}_res{j}")
                if i == num_levels - 1 and attention:
                    attend(f"{theirs}.attn.{j}", part, f"level{i}_attn{j}")
            if part == "encoder" and i < num_levels - 1:
                names[f"{theirs}.downsample.conv"] = (part, f"level{i}_downsample")
            if part == "decoder" and i > 0:
                names[f"{theirs}.upsample.conv"] = (part, f"level{i}_upsample")
    return names


def _is_conv(name: str) -> bool:
    return "norm" not in name.rsplit(".", 1)[-1]
