"""What helps beyond the cluster loss? Each variant by itself on top of λ = 1, the best ones together, and the best
without the cluster loss, all beside λ = 0 (docs/variants.md).

    python -m iar_jax.study --config=configs/studies/beyond.py:cifar10:PATH --workdir=runs/beyond

With --config.study.runs=DIR of configs/studies/ablation.py's study it takes that one's runs of λ = 0 and 1.
"""

from ml_collections import ConfigDict

from iar_jax.config.files import config_beside

BASELINE, IAR = "training.cluster_weights=(0.0,)", "training.cluster_weights=(1.0,)"
VARIANTS = {
    "levels": ("codebook.cluster_sizes=(8, 64)", "training.cluster_weights=(0.5, 1.0)"),
    "coarse-first": (
        "codebook.cluster_sizes=(8, 64)",
        "training.cluster_weights=(0.0, 2.0)",
        "training.cluster_weights_end=(1.0, 0.0)",
        "training.cluster_weight_schedule=linear",
    ),
    "soft": (IAR, "training.neighbour_weight=0.3"),
    "noise": (IAR, "training.context_noise=1.0"),
    "near-noise": (IAR, "training.context_noise=1.0", "training.context_noise_draw=neighbours"),
    "regression": (IAR, "training.regression_weight=1.0"),
    "lookahead": (IAR, "training.lookahead_weight=2.0"),
    "linkage": (IAR, "codebook.assignment=average_linkage"),
    "pixels": (IAR, "codebook.points=pixels"),
    "together": (IAR, "training.regression_weight=1.0", "training.lookahead_weight=2.0"),
    "regression-pixels": (IAR, "training.regression_weight=1.0", "codebook.points=pixels"),
    "regression-alone": (BASELINE, "training.regression_weight=1.0"),
}


def get_config(arg: str = "mnist") -> ConfigDict:
    config = config_beside(__file__, arg)
    config.study.seeds = (0, 1, 2)
    config.study.arms = (
        ("baseline", BASELINE),
        ("iar", IAR),
        *((name, *overrides) for name, overrides in VARIANTS.items()),
    )
    return config
