"""All stages in order; finished ones are skipped. The main job.

python -m iar_jax.pipeline --config=configs/mnist.py --workdir=runs/mnist
"""

from etils import epath
from ml_collections import ConfigDict

from iar_jax import evaluate, extract_codes, rearrange_codebook, sample, train, train_tokenizer
from iar_jax.config import command_line
from iar_jax.config.fields import SECTIONS


def run(config: ConfigDict, workdir: epath.Path) -> None:
    """Runs every stage whose artifact is not given by config.inputs."""
    if not config.inputs.tokenizer:
        train_tokenizer.run(config, workdir)
    if not config.inputs.codebook:
        rearrange_codebook.run(config, workdir)
    if not config.inputs.codes:
        extract_codes.run(config, workdir)
    # With a step, the transformer is what training branches off.
    if not config.inputs.transformer or config.inputs.step:
        train.run(config, workdir)
    sample.run(config, workdir)
    evaluate.run(config, workdir)


if __name__ == "__main__":
    command_line.main(run, tuple(SECTIONS))
