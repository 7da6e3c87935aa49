"""A generator of a kind of its own, added from outside of the package: each code is predicted from the one before it.

The config is that of configs/mnist.py with `config.model.kind = "neighbour"`. The docs show it as what a kind needs.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from configs import mnist
from iar_jax.generators import generator
from iar_jax.generators.code_layout import CodeLayout
from iar_jax.generators.settings import Facts, Objective
from iar_jax.losses.cluster_loss import cluster_loss


@dataclasses.dataclass(frozen=True)
class Neighbour:
    """The methods are those of `Generator`. Parameters: a vector of width D for each label and each code, and a
    head."""

    facts: Facts
    dim: int
    objective: Objective

    @property
    def layout(self) -> CodeLayout:
        return self.facts.layout

    @property
    def splits(self):
        return {"clusters of codes": (self.objective.indivisible(self.facts.vocab_size), "tensor")}

    def flops(self, batch_size):
        return 6.0 * batch_size * self.layout.length * self.dim * self.facts.vocab_size

    def init(self, key):
        def table(rows, *axes):
            values = jax.random.normal(jax.random.fold_in(key, rows), (rows, self.dim))
            return nn.LogicallyPartitioned(values, axes)

        return {
            "labels": table(self.facts.num_classes, None, "embed"),
            "codes": table(self.facts.vocab_size, "vocab", "embed"),
            "head": nn.LogicallyPartitioned(jnp.zeros((self.dim, self.facts.vocab_size)), ("embed", "vocab")),
        }

    def hidden(self, params, labels, codes):
        """What the head is applied to at each position, [B, L, D]: the label, plus the code before."""
        before = jnp.pad(params["codes"][codes[:, :-1]], ((0, 0), (1, 0), (0, 0)))
        return params["labels"][labels][:, None] + before

    def losses(self, params, batch, weights):
        hidden = self.hidden(params, batch["label"], batch["codes"])
        sizes = self.objective.cluster_sizes
        levels = [(size, weights[i]) for i, size in enumerate(sizes)]
        loss, losses = cluster_loss(hidden, params["head"], batch["codes"], levels)
        return loss, losses.named(sizes)

    def loss(self, params, batch, key, weights, teacher=None):
        loss, losses = self.losses(params, batch, weights.clusters)
        return loss, {name: jnp.mean(values) for name, values in losses.items()}

    def score(self, params, batch):
        _, losses = self.losses(params, batch, jnp.zeros(len(self.objective.cluster_sizes)))
        return {name: jnp.mean(values, axis=1) for name, values in losses.items()}

    def sample(self, params, labels, keys, settings):
        label_vectors = params["labels"][labels]

        def step(vectors, position):
            logits = (label_vectors + vectors) @ params["head"] / settings.temperature
            step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, position)
            codes = jax.vmap(jax.random.categorical)(step_keys, logits)
            return params["codes"][codes], codes

        nothing = jnp.zeros_like(label_vectors)
        return jax.lax.scan(step, nothing, jnp.arange(self.layout.length))[1].T.astype(jnp.int32)

    def decays(self, params):
        return jax.tree.map(lambda leaf: False, params)

    def with_vocabulary(self, params, order):
        return params | {"codes": params["codes"][order], "head": params["head"][:, order]}


def build(section: Any, facts: Facts, objective: Objective) -> Neighbour:
    return Neighbour(facts, section["dim"], objective)


generator.KINDS["neighbour"] = generator.Kind(build)


def get_config(arg: str = ""):
    config = mnist.get_config(arg)
    config.model.kind = "neighbour"
    return config
