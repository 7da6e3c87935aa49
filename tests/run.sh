#!/usr/bin/env bash
# Sets up .venv once, then lint, import contracts, types and tests. Options go to pytest, but for
#     --with-torch    installs PyTorch too, for the tests that need it
set -euo pipefail
cd "$(dirname "$0")/.."
requirements=(requirements.txt requirements-dev.txt)
if [ "${1:-}" = --with-torch ]; then
    requirements+=(requirements-torch.txt)
    shift
fi
. launch/setup.sh "${requirements[@]}"
ruff check .
ruff format --check .
lint-imports
mypy
# Two workers for two cores; a file of tests stays with one, for the runs its tests share.
exec python -m pytest -n 2 --dist loadfile "$@"
