#!/usr/bin/env bash
# Runs a command on all NVIDIA GPUs of this machine, in one process:
#     bash launch/gpu_node.sh python -m iar_jax.train --config=configs/imagenet.py:B,256 --workdir=runs/b256
# XLA's flags are those of launch/xla_flags_gpu.txt, each with its reason; IAR_JAX_XLA_FLAGS=off leaves them out.
# Set up with: python3 -m venv .venv && .venv/bin/pip install -r requirements.txt 'jax[cuda12]==0.10.2'
set -euo pipefail
cd "$(dirname "$0")/.."
if [ $# = 0 ]; then
    echo "usage: bash launch/gpu_node.sh COMMAND ..." >&2
    exit 2
fi
if ! command -v nvidia-smi >/dev/null || ! nvidia-smi -L | grep -q GPU; then
    echo "gpu_node.sh: no NVIDIA GPU here (nvidia-smi lists none); launch/local_processes.sh runs on CPUs" >&2
    exit 2
fi
if [ -f .venv/bin/activate ]; then . .venv/bin/activate; fi
# Without this a missing CUDA build of JAX would quietly train on the CPU.
export JAX_PLATFORMS="${JAX_PLATFORMS:-cuda}"
export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}"
. launch/xla_flags.sh gpu
exec "$@"
