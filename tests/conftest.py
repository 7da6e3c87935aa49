"""All tests see eight virtual CPU devices, and every annotated shape is checked at run time."""

import os

# Convolutions and products of virtual devices share one pool of threads, and whatever follows one of them runs on its
# thread: all-reduces that wait there for each other can fill the pool, and nobody is left to compute what they wait
# for. Without the pool each device computes on its own thread. Child processes inherit this.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_multi_thread_eigen=false"

import jax
import pytest

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

GOLDEN = os.path.join(os.path.dirname(__file__), "golden")


@pytest.fixture(scope="session")
def golden():
    """Path of a file of reference data."""
    return lambda name: os.path.join(GOLDEN, name)
