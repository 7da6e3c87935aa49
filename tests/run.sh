#!/usr/bin/env bash
# Sets up .venv once, then lint, import contracts, types and tests. Options go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/setup.sh requirements.txt requirements-dev.txt
ruff check .
ruff format --check .
lint-imports
mypy
exec python -m pytest "$@"
