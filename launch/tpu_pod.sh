#!/usr/bin/env bash
# A Cloud TPU slice from creation to deletion, with gcloud:
#     bash launch/tpu_pod.sh create NAME ZONE v5litepod-16     (SPOT=1 for a preemptible one)
#     bash launch/tpu_pod.sh setup  NAME ZONE                  copies this directory to all workers, makes .venv there
#     bash launch/tpu_pod.sh run    NAME ZONE python -m iar_jax.train --config=... --workdir=gs://bucket/run
#     bash launch/tpu_pod.sh keep   NAME ZONE v5litepod-16 python -m iar_jax.train ...    run, and after a preemption
#                                                              create, set up and run again until it ends
#     bash launch/tpu_pod.sh delete NAME ZONE
# The compiler's flags are those of launch/xla_flags_tpu.txt, each with its reason; IAR_JAX_XLA_FLAGS=off leaves them
# out.
# DRY_RUN=1 prints the commands instead of running them.
set -euo pipefail
cd "$(dirname "$0")/.."
usage() { sed -n '2,11s/^# \{0,1\}//p' "$0" >&2; exit 2; }
[ $# -ge 3 ] || usage
action=$1 name=$2 zone=$3
shift 3

do_it() {
    if [ "${DRY_RUN:-}" = 1 ]; then printf '%q ' "$@"; printf '\n'; else "$@"; fi
}
tpu() { do_it gcloud compute tpus tpu-vm "$@"; }
on_all() { tpu ssh "$name" --zone="$zone" --worker=all --command="$1"; }

create() {
    local spot=()
    [ "${SPOT:-}" != 1 ] || spot=(--spot)
    tpu create "$name" --zone="$zone" --accelerator-type="$1" --version="${TPU_VERSION:-v2-alpha-tpuv5-lite}" "${spot[@]}"
}
setup() {
    tpu scp --recurse --worker=all --zone="$zone" . "$name:~/iar_jax"
    on_all "cd ~/iar_jax && rm -rf .venv && python3 -m venv .venv && .venv/bin/pip install --quiet -r requirements.txt 'jax[tpu]==0.10.2'"
}
run() {
    # IAR_JAX_CLUSTER=auto: the workers find each other by the slice's own metadata.
    local off="IAR_JAX_XLA_FLAGS=${IAR_JAX_XLA_FLAGS:-}"
    on_all "cd ~/iar_jax && . .venv/bin/activate && export $off && . launch/xla_flags.sh tpu && IAR_JAX_CLUSTER=auto $(printf '%q ' "$@")"
}
alive() { [ "$(gcloud compute tpus tpu-vm describe "$name" --zone="$zone" --format='value(state)' 2>/dev/null)" = READY ]; }

case $action in
create) [ $# = 1 ] || usage; create "$1" ;;
setup) setup ;;
run) [ $# -ge 1 ] || usage; run "$@" ;;
keep)
    [ $# -ge 2 ] || usage
    type=$1
    shift
    while :; do
        if [ "${DRY_RUN:-}" = 1 ] || ! alive; then
            tpu delete "$name" --zone="$zone" --quiet || true
            create "$type"
            setup
        fi
        status=0
        run "$@" || status=$?
        # A run that failed by itself fails again: only a slice that is gone is made anew.
        if [ "$status" = 0 ] || [ "${DRY_RUN:-}" = 1 ] || alive; then exit "$status"; fi
        echo "the slice is gone; making it again" >&2
    done
    ;;
delete) tpu delete "$name" --zone="$zone" --quiet ;;
*) usage ;;
esac
