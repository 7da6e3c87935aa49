"""Sizes that Halton-MaskGIT's code names (tiny, small, base, large, xlarge); the published weights are L's."""

from iar_jax.generators.autoregressive.sizes import Size

SIZES = {
    "T": Size(6, 6, 384),
    "S": Size(12, 6, 512),
    "B": Size(12, 12, 768),
    "L": Size(24, 16, 1024),
    "XL": Size(28, 16, 1152),
}
