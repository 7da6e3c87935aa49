#!/usr/bin/env bash
# Sets up .venv once and runs the whole pipeline on real MNIST digits. Options are passed on, for instance
#     bash launch/demo.sh --config.sampling.cfg_scale=2.0
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/setup.sh requirements.txt
# Large pages for malloc: a tenth less time a step on CPUs.
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"
exec python -m iar_jax.pipeline --config=configs/mnist.py --workdir=runs/mnist "$@"
