"""LlamaGen's transformer as a generator: what stages ask of it, by the contract of `generators/generator.py`."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key
from ml_collections import ConfigDict

from iar_jax.config.checks import divisors_near
from iar_jax.generators.autoregressive.decoding import generate
from iar_jax.generators.autoregressive.transformer import Transformer
from iar_jax.generators.code_layout import CodeLayout
from iar_jax.generators.guidance import is_guided
from iar_jax.generators.settings import NETWORK_FIELDS, NO_OBJECTIVE, Facts, Objective, SamplingSettings, Work
from iar_jax.losses.cluster_loss import cluster_loss
from iar_jax.models.attention import Case, announced
from iar_jax.models.layers import swiglu_hidden_dim
from iar_jax.runtime.errors import UserError
from iar_jax.runtime.section import Section


@dataclasses.dataclass(frozen=True)
class Autoregressive:
    """Predicts codes one by one, row by row. The methods are those of `Generator`.

    Attributes:
        network: the transformer.
        objective: what `loss` and `score` measure; sampling needs none.
    """

    network: Transformer
    objective: Objective = NO_OBJECTIVE

    @property
    def layout(self) -> CodeLayout:
        return CodeLayout.square(self.network.grid_size)

    @property
    def facts(self) -> Facts:
        return Facts(self.network.vocab_size, self.network.num_classes, self.layout)

    @property
    def splits(self) -> dict[str, tuple[int, str]]:
        network = self.network
        return {
            "width of the model": (network.dim, "fsdp"),
            "heads of keys and values": (network.block_fields()["num_kv_heads"], "tensor"),
            "hidden units": (network.hidden_dim, "tensor"),
            # The coarsest are the fewest.
            "clusters of codes": (network.vocab_size // self.objective.cluster_sizes[-1], "tensor"),
        }

    def flops(self, batch_size: int) -> float:
        """Of the products with weights, and attention's causal half."""
        network, length = self.network, self.layout.length
        share_of_heads = network.block_fields()["num_kv_heads"] / network.num_heads
        attention_weights = (2.0 + 2.0 * share_of_heads) * network.dim**2
        weights = network.num_layers * (attention_weights + 3 * network.dim * network.hidden_dim)
        weights += network.dim * network.vocab_size
        attention = 2 * network.num_layers * length**2 * network.dim
        return 3.0 * batch_size * (2 * weights * length + attention)

    def init(self, key: Key[Array, ""]) -> Any:
        labels, codes = jnp.zeros((1,), jnp.int32), jnp.zeros((1, self.layout.length), jnp.int32)
        return self.network.init(key, labels, codes)["params"]

    def loss(
        self,
        params: Any,
        batch: Mapping[str, Any],
        key: Key[Array, ""],
        weights: Float[Array, " levels"],
        teacher: Any = None,
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        loss, losses = self._losses(params, batch, weights, {"dropout": key})
        return loss, {name: jnp.mean(values) for name, values in losses.items()}

    def score(self, params: Any, batch: Mapping[str, Any]) -> dict[str, Float[Array, " B"]]:
        _, losses = self._losses(params, batch, jnp.zeros(len(self.objective.cluster_sizes)), {})
        return {name: jnp.mean(values, axis=-1) for name, values in losses.items()}

    def _losses(self, params, batch, weights, rngs):
        sizes = self.objective.cluster_sizes
        hidden = self.network.apply({"params": params}, batch["label"], batch["codes"], method="hidden", rngs=rngs)
        loss, losses = cluster_loss(
            hidden,
            params["head"],
            batch["codes"],
            [(size, weights[i]) for i, size in enumerate(sizes)],
            num_chunks=self.objective.loss_chunks,
        )
        return loss, losses.named(sizes)

    def sample(
        self, params: Any, labels: Int[Array, " B"], keys: Key[Array, " B"], settings: SamplingSettings
    ) -> Int[Array, "B L"]:
        return generate(
            self.network if settings.dtype is None else self.network.clone(dtype=jnp.dtype(settings.dtype)),
            params,
            labels,
            keys,
            cfg_scale=settings.cfg_scale,
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
            schedule=settings.schedule,
        )

    def decays(self, params: Any) -> Any:
        """Matrices and larger, as LlamaGen's groups have it; the layers' leading axis does not count."""

        def decays(path, leaf):
            stacked = any(getattr(entry, "key", None) == "layers" for entry in path)
            return leaf.ndim - stacked >= 2

        return jax.tree_util.tree_map_with_path(decays, params)

    def with_vocabulary(self, params: Any, order: Int[np.ndarray, " N"]) -> Any:
        return params | {"token_table": params["token_table"][order], "head": params["head"][:, order]}


def check_autoregressive(config: ConfigDict) -> None:
    """Raises UserError where fields of config.model do not go together."""
    section = config.model
    dim, num_heads, num_kv_heads = section["dim"], section["num_heads"], section["num_kv_heads"]
    if dim % num_heads:
        raise UserError(
            f"config.model.num_heads is {num_heads}, which does not divide config.model.dim ({dim}); "
            f"{divisors_near(dim, num_heads)} would"
        )
    if num_kv_heads and num_heads % num_kv_heads:
        raise UserError(
            f"config.model.num_kv_heads is {num_kv_heads}, which does not divide config.model.num_heads "
            f"({num_heads}); {divisors_near(num_heads, num_kv_heads)} would"
        )
    if (dim // num_heads) % 4:
        raise UserError(
            f"config.model.dim {dim} over config.model.num_heads {num_heads} makes heads of {dim // num_heads}; the "
            "rotary embedding of rows and columns needs a multiple of 4"
        )
    if section["scan_unroll"] > section["num_layers"]:
        raise UserError(
            f"config.model.scan_unroll is {section['scan_unroll']}; allowed are 1 to config.model.num_layers "
            f"({section['num_layers']}), and 0 for all"
        )


def build_autoregressive(section: Section, facts: Facts, objective: Objective) -> Autoregressive:
    """The generator of config.model.

    Raises:
        ValueError: the layout is not one square.
    """
    network = Transformer(
        vocab_size=facts.vocab_size,
        num_classes=facts.num_classes,
        grid_size=facts.layout.only_side("autoregressive"),
        hidden_dim=section["hidden_dim"] or swiglu_hidden_dim(section["dim"]),
        num_kv_heads=section["num_kv_heads"] or None,
        dtype=jnp.dtype(section["dtype"]),
        **{name: section[name] for name in NETWORK_FIELDS},
    )
    return Autoregressive(network, objective)


def implementation(section: Section, facts: Facts, platform: str) -> str:
    """The attention that runs on a platform, and why faster ones of it do not."""
    head_dim = section["dim"] // section["num_heads"]
    case = Case(platform, jnp.dtype(section["dtype"]), head_dim, facts.layout.length)
    return announced(section["attention"], case)


def sampling_work(generator: Autoregressive, batch_size: int, settings: SamplingSettings) -> Work:
    """Weights, and the positions of the cache that hold something, are read for every code; products take what
    `flops` counts, forward alone."""
    network, length = generator.network, generator.layout.length
    rows = batch_size * (2 if is_guided(settings.schedule, settings.cfg_scale) else 1)
    itemsize = jnp.dtype(settings.dtype or network.dtype).itemsize
    head_dim = network.dim // network.num_heads
    kv_dim = network.block_fields()["num_kv_heads"] * head_dim
    layer = 2 * network.dim**2 + 2 * network.dim * kv_dim + 3 * network.dim * network.hidden_dim
    # The tables of tokens and classes are looked up.
    weights = network.num_layers * layer + network.dim * network.vocab_size
    # On the mean, half of the positions hold something.
    cache = rows * length / 2 * 2 * kv_dim * network.num_layers
    return Work(generator.flops(rows) / 3, length * itemsize * (weights + cache))
