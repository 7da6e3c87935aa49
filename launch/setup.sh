# Makes .venv with the given requirements unless it is there already. Sourced by demo.sh and tests/run.sh:
#     . launch/setup.sh REQUIREMENTS_FILE...
# Sets nothing up again while the files and the Python are the same.

for candidate in python3 python3.13 python3.12 python3.11; do
    if command -v "$candidate" >/dev/null 2>&1 &&
        "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
        python=$candidate
        break
    fi
done
if [ -z "${python:-}" ]; then
    echo "iar_jax needs Python 3.11, 3.12 or 3.13; install one (Debian, Ubuntu: apt install python3 python3-venv)" >&2
    exit 2
fi
if ! "$python" -c 'import venv, ensurepip' 2>/dev/null; then
    echo "Python's venv is missing; install it (Debian, Ubuntu: apt install python3-venv)" >&2
    exit 2
fi

stamp=".venv/set-up-with"
wanted=$("$python" -c 'import sys; print(sys.version)'; pwd; cat "$@")
have=$(cat "$stamp"-* 2>/dev/null || true)
case "$have" in
*"$wanted"*) ;;
*)
    echo "setting up .venv with $* (once; about 3 GB) ..."
    [ -x .venv/bin/python ] && [ "$(.venv/bin/python -c 'import sys; print(sys.version)' 2>/dev/null)" = "$("$python" -c 'import sys; print(sys.version)')" ] ||
        "$python" -m venv --clear .venv
    files=()
    for file in "$@"; do files+=(-r "$file"); done
    .venv/bin/python -m pip install --quiet --disable-pip-version-check "${files[@]}"
    printf '%s\n' "$wanted" >"$stamp-$(basename "${@: -1}")"
    ;;
esac
. .venv/bin/activate
