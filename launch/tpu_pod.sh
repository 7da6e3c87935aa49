#!/usr/bin/env bash
# A Cloud TPU slice from creation to deletion, with gcloud:
#     bash launch/tpu_pod.sh create NAME ZONE v5litepod-16     (SPOT=1 for a preemptible one)
#     bash launch/tpu_pod.sh setup  NAME ZONE                  copies this directory to all workers, makes .venv there
#     bash launch/tpu_pod.sh run    NAME ZONE python -m iar_jax.train --config=... --workdir=gs://bucket/run
#     bash launch/tpu_pod.sh keep   NAME ZONE v5litepod-16 python -m iar_jax.train ...    run, and after a preemption
#                                                              create, set up and run again until it ends
#     bash launch/tpu_pod.sh delete NAME ZONE
# Without capacity, `create` and `keep` try again after PAUSE seconds (60). QUEUED=1 asks for the slice by a queued
# resource and waits for it. `keep` makes a slice anew only where gcloud says that it is gone or preempted; while gcloud
# does not answer, nothing is deleted.
# The compiler's flags are those of launch/xla_flags_tpu.txt, each with its reason; IAR_JAX_XLA_FLAGS=off leaves them
# out.
# DRY_RUN=1 prints the commands instead of running them.
set -euo pipefail
cd "$(dirname "$0")/.."
usage() { sed -n '2,14s/^# \{0,1\}//p' "$0" >&2; exit 2; }
[ $# -ge 3 ] || usage
action=$1 name=$2 zone=$3
shift 3
pause=${PAUSE:-60}

do_it() {
    if [ "${DRY_RUN:-}" = 1 ]; then printf '%q ' "$@"; printf '\n'; else "$@"; fi
}
tpu() { do_it gcloud compute tpus tpu-vm "$@"; }
queued() { do_it gcloud compute tpus queued-resources "$@"; }
on_all() { tpu ssh "$name" --zone="$zone" --worker=all --command="$1"; }
say() { echo "$@" >&2; }

# What gcloud says of something: its state, GONE where it says that there is none, UNKNOWN where it does not answer.
state_of() {
    local said status=0
    said=$("$@" --zone="$zone" --format='value(state)' 2>&1) || status=$?
    if [ "$status" = 0 ]; then
        said=${said##*$'\n'}
        said=${said#*state=}
        echo "${said%%[;, ]*}"
    elif grep -qiE 'NOT_FOUND|not found' <<<"$said"; then
        echo GONE
    else
        say "${said##*$'\n'}"
        echo UNKNOWN
    fi
}

# The state of the slice, once gcloud answers and nothing is under way.
settled() {
    local state
    while :; do
        state=$(state_of gcloud compute tpus tpu-vm describe "$name")
        case $state in
        UNKNOWN) say "whether $name is there is not known; asking again in $pause s" ;;
        CREATING | STARTING | RESTARTING | REPAIRING | DELETING | STOPPING | HIDING | UNHIDING | '')
            say "$name is ${state:-in no state}; asking again in $pause s" ;;
        *) echo "$state"; return ;;
        esac
        sleep "$pause"
    done
}

# Runs a command until it succeeds or fails for another reason than too little capacity or no answer.
patiently() {
    local said status
    while :; do
        status=0
        said=$("$@" 2>&1) || status=$?
        [ -z "$said" ] || say "$said"
        [ "$status" != 0 ] || return 0
        grep -qiE 'capacity|RESOURCE_EXHAUSTED|stockout|UNAVAILABLE|DEADLINE_EXCEEDED|INTERNAL|timed out|connection' <<<"$said" ||
            return "$status"
        say "trying again in $pause s"
        sleep "$pause"
        # What a failed creation left would be in the way.
        remove >/dev/null 2>&1 || true
    done
}

create() {
    local spot=() version="${TPU_VERSION:-v2-alpha-tpuv5-lite}"
    [ "${SPOT:-}" != 1 ] || spot=(--spot)
    if [ "${QUEUED:-}" != 1 ]; then
        ask() { tpu create "$name" --zone="$zone" --accelerator-type="$1" --version="$version" "${spot[@]}"; }
    else
        ask() {
            queued create "$name" --node-id="$name" --zone="$zone" --accelerator-type="$1" \
                --runtime-version="$version" "${spot[@]}"
        }
    fi
    if [ "${DRY_RUN:-}" = 1 ]; then ask "$1"; return; fi
    patiently ask "$1"
    [ "${QUEUED:-}" = 1 ] || return 0
    local state
    while :; do
        state=$(state_of gcloud compute tpus queued-resources describe "$name")
        case $state in
        ACTIVE) return ;;
        FAILED | SUSPENDED | GONE) say "the queued resource $name is $state"; return 1 ;;
        *) say "the queued resource $name is $state; asking again in $pause s" ;;
        esac
        sleep "$pause"
    done
}
remove() {
    if [ "${QUEUED:-}" = 1 ]; then
        queued delete "$name" --zone="$zone" --quiet --force
    else
        tpu delete "$name" --zone="$zone" --quiet
    fi
}
setup() {
    tpu scp --recurse --worker=all --zone="$zone" . "$name:~/iar_jax"
    on_all "cd ~/iar_jax && rm -rf .venv && python3 -m venv .venv && .venv/bin/pip install --quiet -r requirements.txt -r requirements-gcs.txt 'jax[tpu]==0.10.2'"
}
run() {
    # IAR_JAX_CLUSTER=auto: the workers find each other by the slice's own metadata.
    local off="IAR_JAX_XLA_FLAGS=${IAR_JAX_XLA_FLAGS:-}"
    on_all "cd ~/iar_jax && . .venv/bin/activate && export $off && . launch/xla_flags.sh tpu && IAR_JAX_CLUSTER=auto $(printf '%q ' "$@")"
}

case $action in
create) [ $# = 1 ] || usage; create "$1" ;;
setup) setup ;;
run) [ $# -ge 1 ] || usage; run "$@" ;;
keep)
    [ $# -ge 2 ] || usage
    type=$1
    shift
    if [ "${DRY_RUN:-}" = 1 ]; then remove; create "$type"; setup; run "$@"; exit; fi
    state=$(settled)
    while :; do
        if [ "$state" != READY ]; then
            say "$name is $state; making it"
            [ "$state" = GONE ] || remove || true
            create "$type"
            setup
        fi
        status=0
        run "$@" || status=$?
        [ "$status" != 0 ] || exit 0
        # A run that failed by itself fails again: only a slice that is not there any more is made anew.
        state=$(settled)
        [ "$state" != READY ] || exit "$status"
    done
    ;;
delete) remove ;;
*) usage ;;
esac
