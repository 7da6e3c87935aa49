"""The processes of one run: joining them, agreeing, and stopping together.

One process is the usual case, and everything here is then a plain call. With several, each owns its machine's devices;
they share a workdir; process 0 alone writes small files and speaks.
"""

import os
import signal
import sys
from typing import Any, NoReturn

import jax
import jax._src.distributed
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from iar_jax.runtime.errors import UserError, brief
from iar_jax.runtime.watch import Watch

# JAX's own limit for a process that is gone: `watch` has noticed before, and says more.
HEARTBEAT_SECONDS = 100

COORDINATOR = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def initialise() -> Watch | None:
    """Joins the other processes where the environment says that there are any, and returns what keeps watch over them.
    Call it before anything uses a device.

    * JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID: set by launch/local_processes.sh.
    * SLURM: a step of more than one task (launch/slurm.sbatch).
    * IAR_JAX_CLUSTER=auto: whatever JAX finds by itself, as on TPU pods (launch/tpu_pod.sh).

    Raises:
        UserError: the variables are incomplete, or the others cannot be reached.
    """
    environment = os.environ
    given = [name for name in COORDINATOR if environment.get(name)]
    arguments: dict[str, Any] = {}
    if given:
        missing = sorted(set(COORDINATOR) - set(given))
        if missing:
            raise UserError(f"{', '.join(given)} set, and {', '.join(missing)} not; set all three or none")
        address, count, index = (environment[name] for name in COORDINATOR)
        arguments = {"coordinator_address": address, "num_processes": _number(count), "process_id": _number(index)}
        if arguments["num_processes"] == 1:
            return None
    elif not _in_slurm(environment) and environment.get("IAR_JAX_CLUSTER") != "auto":
        return None
    logging.set_verbosity(logging.WARNING)
    try:
        jax.distributed.initialize(**arguments, heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"the processes of this run did not come together: {brief(error)}") from error
    # JAX has no public name for the store of its coordinator.
    state = jax._src.distributed.global_state
    return Watch(state.client, state.process_id, state.num_processes) if state.num_processes > 1 else None


def _in_slurm(environment: Any) -> bool:
    # A shell inside an allocation has SLURM's variables too, but no step of its own with several tasks.
    return int(environment.get("SLURM_STEP_NUM_TASKS") or 1) > 1


def _number(text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise UserError(f"{', '.join(COORDINATOR[1:])} must be integers; one is {text!r}") from error


def joined() -> bool:
    """Whether this process is one of several. Unlike jax.process_count it starts no backend."""
    return jax.distributed.is_initialized()


def is_first() -> bool:
    """Whether this process writes and speaks for all."""
    return jax.process_index() == 0


def wait_for_all(name: str) -> None:
    """Returns when every process is here; `name` is the same for all."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def any_process(value: bool) -> bool:
    """Whether it is true on any of the processes; the same answer on all of them."""
    if jax.process_count() == 1:
        return value
    return bool(np.any(multihost_utils.process_allgather(np.asarray(value))))


def from_first(value: int) -> int:
    """A number as the first process has it."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.asarray(value)))


def to_host(tree: Any) -> Any:
    """Arrays of a tree as numpy, whole on every process, however they are sharded."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return jax.tree.map(np.asarray, multihost_utils.process_allgather(tree, tiled=True))


def asked_to_stop(step: int, signal_number: int | None) -> int | None:
    """The signal that asks for a stop after this step, the same answer on every process.

    A signal to one process stops all of them at a step that they agree on; call it once a step.
    """
    if jax.process_count() == 1:
        return signal_number
    return signal.SIGTERM if multihost_utils.reached_preemption_sync_point(step) else None


def leave(code: int) -> NoReturn:
    """Ends this process without waiting for the others, which may never come."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
