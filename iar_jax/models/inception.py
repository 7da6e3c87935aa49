"""InceptionV3 of 2015-12-05, whose features FID is defined in.

Not torchvision's network: average pools leave padding out of the mean, the last block pools by the maximum, and there
are 1008 classes. Batch norms are folded into the convolutions (interop.inception does that). Names are those of the
network's PyTorch ports.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

SIZE = 299


class InceptionOutputs(NamedTuple):
    """What the metrics are made from, float32.

    Attributes:
        pool: the last features, averaged over positions (the graph's pool_3).
        spatial: the first 7 channels of the 17 x 17 map mixed_6/conv, after its ReLU, flattened; for sFID.
        logits: without the bias, as the Inception score of the ADM suite takes them.
    """

    pool: Float[Array, "B 2048"]
    spatial: Float[Array, "B 2023"]
    logits: Float[Array, "B 1008"]


class Conv(nn.Module):
    """Convolution and ReLU; `same` pads to keep the size, otherwise there is no padding.

    The same sums in forms that XLA's CPU backend is two to three times faster with: kernels of one pixel as a matrix
    product, and an unpadded convolution as the middle of a padded one.
    """

    features: int
    kernel: tuple[int, int]
    stride: int
    same: bool
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H2 W2 F"]:
        shape = (*self.kernel, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape).astype(self.dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.features,)).astype(self.dtype)
        if self.kernel == (1, 1):
            return nn.relu(x @ kernel[0, 0] + bias)
        middle = not self.same and self.stride == 1
        padding = [(size // 2, size // 2) if self.same or middle else (0, 0) for size in self.kernel]
        strides = (self.stride, self.stride)
        x = jax.lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return nn.relu((x[:, 1:-1, 1:-1] if middle else x) + bias)


class InceptionV3(nn.Module):
    """Images of 299 x 299 as (pixel - 128) / 128 to features and logits.

    Attributes:
        dtype: of activations; bfloat16 changes FID in the second decimal.
    """

    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B 299 299 3"]) -> InceptionOutputs:
        def conv(x, name, features, kernel, stride=1, same=True):
            kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
            return Conv(features, kernel, stride, same, self.dtype, name=name)(x)

        x = conv(x.astype(self.dtype), "Conv2d_1a_3x3", 32, 3, stride=2, same=False)
        x = conv(x, "Conv2d_2a_3x3", 32, 3, same=False)
        x = reduced(conv(x, "Conv2d_2b_3x3", 64, 3))
        x = conv(x, "Conv2d_3b_1x1", 80, 1)
        x = reduced(conv(x, "Conv2d_4a_3x3", 192, 3, same=False))

        for name, pool_features in (("Mixed_5b", 32), ("Mixed_5c", 64), ("Mixed_5d", 64)):
            one = conv(x, f"{name}.branch1x1", 64, 1)
            five = conv(conv(x, f"{name}.branch5x5_1", 48, 1), f"{name}.branch5x5_2", 64, 5)
            double = conv(conv(x, f"{name}.branch3x3dbl_1", 64, 1), f"{name}.branch3x3dbl_2", 96, 3)
            double = conv(double, f"{name}.branch3x3dbl_3", 96, 3)
            pool = conv(averaged(x), f"{name}.branch_pool", pool_features, 1)
            x = jnp.concatenate([one, five, double, pool], axis=-1)

        three = conv(x, "Mixed_6a.branch3x3", 384, 3, stride=2, same=False)
        double = conv(conv(x, "Mixed_6a.branch3x3dbl_1", 64, 1), "Mixed_6a.branch3x3dbl_2", 96, 3)
        double = conv(double, "Mixed_6a.branch3x3dbl_3", 96, 3, stride=2, same=False)
        x = jnp.concatenate([three, double, reduced(x)], axis=-1)

        spatial = x
        for name, width in (("Mixed_6b", 128), ("Mixed_6c", 160), ("Mixed_6d", 160), ("Mixed_6e", 192)):
            one = conv(x, f"{name}.branch1x1", 192, 1)
            if name == "Mixed_6d":
                spatial = one[..., :7]
            seven = conv(conv(x, f"{name}.branch7x7_1", width, 1), f"{name}.branch7x7_2", width, (1, 7))
            seven = conv(seven, f"{name}.branch7x7_3", 192, (7, 1))
            double = conv(x, f"{name}.branch7x7dbl_1", width, 1)
            for place, features in ((2, width), (3, width), (4, width), (5, 192)):
                double = conv(double, f"{name}.branch7x7dbl_{place}", features, (1, 7) if place % 2 else (7, 1))
            pool = conv(averaged(x), f"{name}.branch_pool", 192, 1)
            x = jnp.concatenate([one, seven, double, pool], axis=-1)

        three = conv(conv(x, "Mixed_7a.branch3x3_1", 192, 1), "Mixed_7a.branch3x3_2", 320, 3, stride=2, same=False)
        seven = conv(x, "Mixed_7a.branch7x7x3_1", 192, 1)
        seven = conv(conv(seven, "Mixed_7a.branch7x7x3_2", 192, (1, 7)), "Mixed_7a.branch7x7x3_3", 192, (7, 1))
        seven = conv(seven, "Mixed_7a.branch7x7x3_4", 192, 3, stride=2, same=False)
        x = jnp.concatenate([three, seven, reduced(x)], axis=-1)

        for name in ("Mixed_7b", "Mixed_7c"):
            one = conv(x, f"{name}.branch1x1", 320, 1)
            three = conv(x, f"{name}.branch3x3_1", 384, 1)
            threes = [conv(three, f"{name}.branch3x3_2{side}", 384, kernel) for side, kernel in SIDES]
            double = conv(conv(x, f"{name}.branch3x3dbl_1", 448, 1), f"{name}.branch3x3dbl_2", 384, 3)
            doubles = [conv(double, f"{name}.branch3x3dbl_3{side}", 384, kernel) for side, kernel in SIDES]
            smoothed = averaged(x) if name == "Mixed_7b" else nn.max_pool(x, (3, 3), (1, 1), ((1, 1), (1, 1)))
            pool = conv(smoothed, f"{name}.branch_pool", 192, 1)
            x = jnp.concatenate([one, *threes, *doubles, pool], axis=-1)

        pool = jnp.mean(x.astype(jnp.float32), axis=(1, 2))
        logits = nn.Dense(1008, use_bias=False, name="fc")(pool)
        return InceptionOutputs(pool, spatial.astype(jnp.float32).reshape(len(x), -1), logits)


SIDES = (("a", (1, 3)), ("b", (3, 1)))


def averaged(x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
    """Mean of the 3 x 3 neighbours that there are."""
    return nn.avg_pool(x, (3, 3), (1, 1), ((1, 1), (1, 1)), count_include_pad=False)


def reduced(x: Float[Array, "B H W C"]) -> Float[Array, "B H2 W2 C"]:
    """Maximum of 3 x 3 at every other place."""
    return nn.max_pool(x, (3, 3), (2, 2))


def legacy_resize(images: Float[Array, "B H W C"], size: int) -> Float[Array, "B S S C"]:
    """Bilinear resize as TensorFlow 1 did it: no half-pixel centres, no smoothing when shrinking.

    Output place i looks at i * H / S in float32, between its floor and the next place, which is the last one at the
    edge; along the width first.
    """
    for axis in (2, 1):
        length = images.shape[axis]
        # In numpy: a compiler may join product and difference, and round another way.
        places = np.arange(size, dtype=np.float32) * (np.float32(length) / np.float32(size))
        low = np.floor(places).astype(np.int32)
        high = np.minimum(low + 1, length - 1)
        share = (places - low.astype(np.float32)).reshape([-1 if a == axis else 1 for a in range(4)])
        first, second = (jnp.take(images, index, axis=axis) for index in (low, high))
        images = first + (second - first) * share
    return images
