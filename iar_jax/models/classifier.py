"""A small image classifier whose features judge samples where no Inception weights are at hand."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float


class Classifier(nn.Module):
    """Convolutions of stride 2 down to 4x4, global mean, one hidden layer: the features; then a linear head.

    Images [B, R, R, 3] in [-1, 1] with R a power of two times 4 at least roughly: the number of halvings follows
    from `resolution`.
    """

    num_classes: int
    resolution: int
    channels: int = 32
    feature_dim: int = 128
    dropout_rate: float = 0.3

    @nn.compact
    def __call__(self, images: Float[Array, "B R R 3"]) -> tuple[Float[Array, "B F"], Float[Array, "B C"]]:
        """Features, float32 and not negative, and logits over the classes."""
        x = nn.Conv(self.channels, (5, 5), strides=2, name="stem")(images)
        side, channels = self.resolution // 2, self.channels
        while side > 4:
            x = nn.relu(nn.GroupNorm(num_groups=8)(x))
            channels = min(2 * channels, 256)
            x = nn.Conv(channels, (3, 3), strides=2)(x)
            side //= 2
        x = nn.relu(nn.GroupNorm(num_groups=8)(x))
        x = x.reshape(x.shape[0], -1) if side**2 * channels <= 4096 else jnp.mean(x, axis=(1, 2))
        features = nn.relu(nn.Dense(self.feature_dim, name="features")(x))
        x = features
        if self.has_rng("dropout"):
            x = nn.Dropout(self.dropout_rate, deterministic=False)(x)
        return features, nn.Dense(self.num_classes, name="head")(x)
