"""Sizes of the models that Halton-MaskGIT's code names; the published weights are those of large."""

from iar_jax.generators.autoregressive.sizes import Size

SIZES = {
    "tiny": Size(6, 6, 384),
    "small": Size(12, 6, 512),
    "base": Size(12, 12, 768),
    "large": Size(24, 16, 1024),
    "xlarge": Size(28, 16, 1152),
}
