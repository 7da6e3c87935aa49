#!/usr/bin/env bash
# Sets up .venv once, then lint, import contracts, types and the quick tests. Options:
#     --all           the slow tests too, as CI does
#     --with-torch    installs PyTorch too, for the tests that need it
# Others go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
requirements=(requirements.txt requirements-gcs.txt requirements-dev.txt)
options=()
while [ $# -gt 0 ]; do
    case "$1" in
    --all) options+=(--slow) ;;
    --with-torch) requirements+=(requirements-torch.txt) ;;
    *) break ;;
    esac
    shift
done
. launch/setup.sh "${requirements[@]}"
ruff check .
ruff format --check .
lint-imports
mypy
# Two workers for two cores; a file of tests stays with one, for the runs its tests share. Files are taken in order:
# those of few tests, which are the longest, would come last otherwise.
exec python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "${options[@]}" "$@"
