# Sourced with tpu or gpu: the flags of xla_flags_tpu.txt or xla_flags_gpu.txt, before those that are set already, which
# win. IAR_JAX_XLA_FLAGS=off leaves them out.
LIBTPU_INIT_ARGS="${LIBTPU_INIT_ARGS:-}" XLA_FLAGS="${XLA_FLAGS:-}"
if [ "${IAR_JAX_XLA_FLAGS:-}" != off ]; then
    flags=$(sed 's/#.*//' "$(dirname "${BASH_SOURCE[0]}")/xla_flags_$1.txt" | xargs)
    case $1 in
    tpu) LIBTPU_INIT_ARGS="$flags${LIBTPU_INIT_ARGS:+ $LIBTPU_INIT_ARGS}" ;;
    gpu) XLA_FLAGS="$flags${XLA_FLAGS:+ $XLA_FLAGS}" ;;
    esac
fi
export LIBTPU_INIT_ARGS XLA_FLAGS
