"""All tests see eight virtual CPU devices, and every annotated shape is checked at run time."""

import os

# Convolutions and products of virtual devices share one pool of threads, and whatever follows one of them runs on its
# thread: all-reduces that wait there for each other can fill the pool, and nobody is left to compute what they wait
# for. Without the pool each device computes on its own thread. And to optimise the machine code of programs as small as
# these takes longer than to run what is not optimised. Child processes inherit both.
FLAGS = "--xla_cpu_multi_thread_eigen=false --xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + f" {FLAGS}"

# Stages that tests start again and again compile the same programs: they are kept here.
CACHE = os.path.join(os.path.dirname(__file__), "..", ".pytest_cache", "compiled")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.abspath(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also the tests that are marked slow")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        skip = pytest.mark.skip(reason="slow: run with --slow, or bash tests/run.sh --all")
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(skip)


GOLDEN = os.path.join(os.path.dirname(__file__), "golden")


@pytest.fixture(scope="session")
def golden():
    """Path of a file of reference data."""
    return lambda name: os.path.join(GOLDEN, name)
