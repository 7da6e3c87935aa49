"""The masked transformer as a generator: what stages ask of it, by the contract of `generators/generator.py`."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key
from ml_collections import ConfigDict

from iar_jax.config.checks import grid_size
from iar_jax.generators.code_layout import CodeLayout
from iar_jax.generators.guidance import is_guided
from iar_jax.generators.masked.masking import draw_masks
from iar_jax.generators.masked.sampling import sample_codes
from iar_jax.generators.masked.transformer import MaskedTransformer
from iar_jax.generators.settings import NETWORK_FIELDS, NO_OBJECTIVE, Facts, Objective, SamplingSettings, Weights, Work
from iar_jax.losses.cluster_loss import cluster_loss
from iar_jax.models.attention import Case, announced
from iar_jax.models.layers import swiglu_hidden_dim
from iar_jax.runtime.errors import UserError
from iar_jax.runtime.section import Section

# Fields of config.model that are the network's as they are.
FIELDS = (*NETWORK_FIELDS, "num_registers", "mask_output")


@dataclasses.dataclass(frozen=True)
class Masked:
    """Predicts the codes of masked positions from all others. The methods are those of `Generator`.

    Attributes:
        network: the transformer.
        objective: what `loss` and `score` measure; sampling needs none.
    """

    network: MaskedTransformer
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
            "heads": (network.num_heads, "tensor"),
            "hidden units": (network.hidden_dim, "tensor"),
            "clusters of codes": (self.objective.indivisible(network.vocab_size), "tensor"),
        }

    def flops(self, batch_size: int) -> float:
        """Of the products with weights, and attention's."""
        network, codes = self.network, self.layout.length
        positions, width = codes + network.num_registers, network.num_heads * (network.dim // network.num_heads)
        layer = 4 * network.dim * width + 3 * network.dim * network.hidden_dim
        a_picture = 2 * network.num_layers * (positions * layer + 6 * network.dim**2) + 4 * network.dim**2
        a_picture += 2 * codes * network.dim * network.vocab_size
        attention = 4 * network.num_layers * positions**2 * width
        return 3.0 * batch_size * (a_picture + attention)

    def init(self, key: Key[Array, ""]) -> Any:
        labels, codes = jnp.zeros((1,), jnp.int32), jnp.zeros((1, self.layout.length), jnp.int32)
        return self.network.init(key, labels, codes)["params"]

    def loss(
        self,
        params: Any,
        batch: Mapping[str, Any],
        key: Key[Array, ""],
        weights: Weights,
        teacher: Any = None,
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """Metrics are of the masked positions."""
        mask_key, dropout_key = jax.random.split(key)
        keys = jax.random.split(mask_key, batch["codes"].shape[0])
        masked = draw_masks(keys, self.layout.length, self.objective.mask_schedule, self.objective.mask_draw)
        loss, losses = self._losses(params, batch, masked, weights.clusters, {"dropout": dropout_key})
        count = jnp.maximum(jnp.sum(masked), 1)
        return loss, {name: jnp.sum(values * masked) / count for name, values in losses.items()}

    def score(self, params: Any, batch: Mapping[str, Any]) -> dict[str, Float[Array, " B"]]:
        """Of masked positions. A picture's mask depends on its codes alone, so that validations can be compared."""
        masked = draw_masks(
            keys_of(batch["codes"]),
            self.layout.length,
            self.objective.mask_schedule,
            self.objective.mask_draw,
            at_least_one=True,
        )
        _, losses = self._losses(params, batch, masked, jnp.zeros(len(self.objective.cluster_sizes)), {})
        count = jnp.sum(masked, axis=-1)
        return {name: jnp.sum(values * masked, axis=-1) / count for name, values in losses.items()}

    def _losses(self, params, batch, masked, weights, rngs):
        objective, codes = self.objective, batch["codes"]
        inputs = jnp.where(masked, self.network.mask, batch.get("context", codes))
        variables = {"params": params}
        hidden = self.network.apply(variables, batch["label"], inputs, method="hidden", rngs=rngs)
        other = self.network.apply(variables, hidden, method="mask_logits") if self.network.mask_output else None
        counted = None if objective.unmasked_weight == 1.0 else jnp.where(masked, 1.0, objective.unmasked_weight)
        loss, losses = cluster_loss(
            hidden,
            params["token_table"].T,
            codes,
            [(size, weights[i]) for i, size in enumerate(objective.cluster_sizes)],
            bias=params["head_bias"],
            other_logits=other,
            label_smoothing=objective.label_smoothing,
            neighbours=objective.soft,
            neighbour_weight=objective.neighbour_weight,
            position_weights=counted,
            mean_of_rows=objective.mean_of_pictures,
            num_chunks=objective.loss_chunks,
        )
        return loss, losses.named(objective.cluster_sizes)

    def sample(
        self, params: Any, labels: Int[Array, " B"], keys: Key[Array, " B"], settings: SamplingSettings
    ) -> Int[Array, "B L"]:
        dtype = settings.dtype
        network = self.network if dtype is None else self.network.clone(dtype=jnp.dtype(dtype))
        return sample_codes(network, params, labels, keys, settings)

    def decays(self, params: Any) -> Any:
        """Everything, as Halton-MaskGIT's trainer has it."""
        return jax.tree.map(lambda leaf: True, params)

    def with_vocabulary(self, params: Any, order: Int[np.ndarray, " N"]) -> Any:
        """Rows of the table, which is input and head at once; the mask stays what it is."""
        return params | {"token_table": params["token_table"][order], "head_bias": params["head_bias"][order]}


def keys_of(codes: Int[Array, "B L"]) -> Key[Array, " B"]:
    """A key for each picture, of its codes."""
    odd = (2 * jnp.arange(codes.shape[1], dtype=jnp.uint32) + 1) * jnp.uint32(2654435761)
    numbers = jnp.sum((codes.astype(jnp.uint32) + 1) * odd, axis=1)
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), numbers)


def check_masked(config: ConfigDict) -> None:
    """Raises UserError where fields do not go together."""
    model, sampling = config.model, config.sampling
    positions = grid_size(config) ** 2
    for name in ("regression_weight", "lookahead_weight"):
        if config.training[name]:
            raise UserError(
                f"config.training.{name} is {config.training[name]:g}, which holds an autoregressive model to what is "
                "to come; a masked one sees all around it: leave it at 0"
            )
    if model.dim < model.num_heads:
        raise UserError(f"config.model.num_heads is {model.num_heads}, more than config.model.dim ({model.dim})")
    if model.num_kv_heads not in (0, model.num_heads):
        raise UserError(
            f"config.model.num_kv_heads is {model.num_kv_heads}, and a masked model has one for each head; 0 is that"
        )
    if sampling.mask_steps > positions:
        raise UserError(
            f"config.sampling.mask_steps is {sampling.mask_steps}, more than the {positions} positions of a picture"
        )
    if sampling.cfg_schedule == "iar2":
        raise UserError(
            "config.sampling.cfg_schedule is iar2, which takes the attention to a class token that masked models do "
            "not have; linear is the nearest"
        )


def build_masked(section: Section, facts: Facts, objective: Objective) -> Masked:
    """The generator of config.model.

    Raises:
        ValueError: the layout is not one square.
    """
    network = MaskedTransformer(
        vocab_size=facts.vocab_size,
        num_classes=facts.num_classes,
        grid_size=facts.layout.only_side("masked"),
        hidden_dim=section["hidden_dim"] or swiglu_hidden_dim(section["dim"]),
        dtype=jnp.dtype(section["dtype"]),
        **{name: section[name] for name in FIELDS},
    )
    return Masked(network, objective)


def implementation(section: Section, facts: Facts, platform: str) -> str:
    """The attention that runs on a platform, and why faster ones of it do not."""
    positions = facts.layout.length + section["num_registers"]
    case = Case(platform, jnp.dtype(section["dtype"]), section["dim"] // section["num_heads"], positions)
    return announced(section["attention"], case)


def sampling_work(generator: Masked, batch_size: int, settings: SamplingSettings) -> Work:
    """The products of all passes, and the weights, which each pass reads once."""
    network = generator.network
    rows = batch_size * (2 if is_guided(settings.schedule, settings.cfg_scale) else 1)
    itemsize = jnp.dtype(settings.dtype or network.dtype).itemsize
    layer = 10 * network.dim**2 + 3 * network.dim * network.hidden_dim
    weights = network.num_layers * layer + network.dim * network.vocab_size
    return Work(settings.mask_steps * generator.flops(rows) / 3, settings.mask_steps * itemsize * weights)
