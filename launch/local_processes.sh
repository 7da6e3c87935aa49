#!/usr/bin/env bash
# Runs a command as N processes with M virtual CPU devices each: the multi-process code path on one machine.
#     bash launch/local_processes.sh N M python -m iar_jax.train --config=... --workdir=...
# The first process speaks on the terminal, the others into a file of their own; when one fails, all are stopped and its
# error is shown.
set -euo pipefail
if [ $# -lt 3 ] || ! [ "$1" -ge 1 ] 2>/dev/null || ! [ "$2" -ge 1 ] 2>/dev/null; then
    echo "usage: bash launch/local_processes.sh PROCESSES DEVICES_EACH COMMAND ..." >&2
    exit 2
fi
processes=$1 devices=$2
shift 2
logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT
# Below the ports that systems hand out by themselves, so that no connection made before the first process listens has it.
port=$(python3 - <<'EOF'
import contextlib, random, socket

while True:
    port = random.randrange(20000, 32768)
    with contextlib.suppress(OSError), socket.socket() as probe:
        probe.bind(("127.0.0.1", port))
        print(port)
        break
EOF
)
export JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=$devices JAX_COORDINATOR_ADDRESS=127.0.0.1:$port
export JAX_NUM_PROCESSES=$processes JAX_CPU_COLLECTIVES_IMPLEMENTATION=gloo
# Virtual devices share one pool of threads, and all-reduces that wait in it can fill it (see tests/conftest.py).
export XLA_FLAGS="${XLA_FLAGS:-} --xla_cpu_multi_thread_eigen=false"

declare -A index
for ((i = 0; i < processes; i++)); do
    if [ "$i" = 0 ]; then
        JAX_PROCESS_ID=0 "$@" &
    else
        JAX_PROCESS_ID=$i "$@" >"$logs/$i" 2>&1 &
    fi
    index[$!]=$i
done
stop() { kill -"$1" "${!index[@]}" 2>/dev/null || true; }
trap 'stop TERM' TERM INT

code=0 how=
for ((left = processes; left > 0; left--)); do
    # A signal wakes `wait` without a process having ended: wait again.
    while :; do
        status=0
        wait -n -p ended "${!index[@]}" 2>/dev/null || status=$?
        [ -n "${ended:-}" ] && break
    done
    failed=${index[$ended]}
    unset "index[$ended]"
    if [ "$status" != 0 ] && [ "$code" = 0 ]; then
        code=$status
        # After a signal that asks for a stop each has said so.
        case $failed/$status in 0/* | */130 | */143) ;; *) cat "$logs/$failed" >&2 ;; esac
        [ "$status" -le 128 ] || how="process $failed of $processes was ended by signal $((status - 128)) ($(kill -l $((status - 128))))"
        # After SIGINT or SIGTERM the others are saving their state too.
        case $status in 130 | 143) ;; *) stop TERM; (sleep 10; stop KILL) >/dev/null 2>&1 & ;; esac
    fi
done
case $code in
0 | 1 | 2 | 130 | 143) ;;
*) echo "${how:-process $failed of $processes ended with status $code}; the others were stopped. Run the same command to go on" >&2 ;;
esac
exit "$code"
