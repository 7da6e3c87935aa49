"""LlamaGen's transformer as a generator: what stages ask of it, by the contract of `generators/generator.py`."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key
from ml_collections import ConfigDict

from iar_jax.config.checks import divisors_near
from iar_jax.generators.autoregressive import auxiliary
from iar_jax.generators.autoregressive.decoding import generate
from iar_jax.generators.autoregressive.transformer import Transformer
from iar_jax.generators.code_layout import CodeLayout
from iar_jax.generators.guidance import is_guided
from iar_jax.generators.settings import (
    AUXILIARY,
    NETWORK_FIELDS,
    NO_OBJECTIVE,
    Facts,
    Objective,
    SamplingSettings,
    Weights,
    Work,
)
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
            "clusters of codes": (self.objective.indivisible(network.vocab_size), "tensor"),
        }

    def flops(self, batch_size: int) -> float:
        """Of the products with weights, and attention's causal half; and of what the loss alone needs."""
        network, length, objective = self.network, self.layout.length, self.objective
        share_of_heads = network.block_fields()["num_kv_heads"] / network.num_heads
        attention_weights = (2.0 + 2.0 * share_of_heads) * network.dim**2
        layer = 2 * (attention_weights + 3 * network.dim * network.hidden_dim) * length + 2 * length**2 * network.dim
        a_picture = 3 * (network.num_layers * layer + 2 * network.dim * network.vocab_size * length)
        if objective.holds_states:
            heads = jax.tree.leaves(jax.eval_shape(self.init, jax.random.key(0))[AUXILIARY])
            a_picture += 3 * 2 * sum(leaf.size for leaf in heads) * length
        if objective.lookahead_weight:
            # The averaged model, forward alone.
            a_picture += auxiliary.layers_at(auxiliary.LOOKAHEAD_DEPTH, network.num_layers) * layer
        return float(batch_size * a_picture)

    def init(self, key: Key[Array, ""]) -> Any:
        labels, codes = jnp.zeros((1,), jnp.int32), jnp.zeros((1, self.layout.length), jnp.int32)
        params = self.network.init(key, labels, codes)["params"]
        objective = self.objective
        if not objective.holds_states:
            return params
        vector_dim = 0 if objective.vectors is None else objective.vectors.shape[1]
        wanted = (objective.regression_weight > 0.0, objective.lookahead_weight > 0.0)
        return params | {AUXILIARY: auxiliary.new_heads(key, self.network.dim, vector_dim, *wanted)}

    def loss(
        self,
        params: Any,
        batch: Mapping[str, Any],
        key: Key[Array, ""],
        weights: Weights,
        teacher: Any = None,
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        objective = self.objective
        if objective.holds_states:
            hidden, added, more = self._held(params, batch, key, weights, teacher)
        else:
            hidden, added, more = self._hidden(params, batch, {"dropout": key}), 0.0, {}
        loss, losses = self._losses(params, hidden, batch["codes"], weights.clusters)
        return loss + added, {name: jnp.mean(values) for name, values in losses.items()} | more

    def score(self, params: Any, batch: Mapping[str, Any]) -> dict[str, Float[Array, " B"]]:
        hidden = self._hidden(params, batch, {})
        _, losses = self._losses(params, hidden, batch["codes"], jnp.zeros(len(self.objective.cluster_sizes)))
        return {name: jnp.mean(values, axis=-1) for name, values in losses.items()}

    def _hidden(self, params, batch, rngs):
        context = batch.get("context", batch["codes"])
        return self.network.apply({"params": params}, batch["label"], context, method="hidden", rngs=rngs)

    def _losses(self, params, hidden, codes, weights):
        objective = self.objective
        sizes = objective.cluster_sizes
        loss, losses = cluster_loss(
            hidden,
            params["head"],
            codes,
            [(size, weights[i]) for i, size in enumerate(sizes)],
            neighbours=objective.soft,
            neighbour_weight=objective.neighbour_weight,
            num_chunks=objective.loss_chunks,
        )
        return loss, losses.named(sizes)

    def _held(self, params, batch, key, weights, teacher):
        """What the head is applied to, and the losses that hidden states are held to, added and by their names."""
        network, objective, heads = self.network, self.objective, params[AUXILIARY]
        layers = functools.partial(auxiliary.layers_at, num_layers=network.num_layers)
        regression = layers(auxiliary.REGRESSION_DEPTH) if objective.regression_weight else 0
        lookahead = layers(auxiliary.LOOKAHEAD_DEPTH) if objective.lookahead_weight else 0
        depths = sorted({regression, lookahead} - {0})
        context = batch.get("context", batch["codes"])
        embedded, kept, hidden = auxiliary.states_at(network, params, batch["label"], context, depths, key)
        states, added, found = dict(zip(depths, kept, strict=True)), jnp.float32(0.0), {}
        if regression:
            value = auxiliary.regression_loss(
                heads, embedded, states[regression], batch["codes"], objective.vectors, network.dtype
            )
            added, found["regression_loss"] = added + objective.regression_weight * value, value
        if lookahead:
            goal = auxiliary.teacher_states(network, teacher, batch["label"], batch["codes"], lookahead)
            value = auxiliary.lookahead_loss(heads, states[lookahead], goal, network.grid_size, network.dtype)
            added, found["lookahead_loss"] = added + weights.lookahead * value, value
        return hidden, added, found

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
