"""All tests see eight virtual CPU devices, and every annotated shape is checked at run time."""

import os

import jax
import pytest

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

GOLDEN = os.path.join(os.path.dirname(__file__), "golden")


@pytest.fixture(scope="session")
def golden():
    """Path of a file of reference data."""
    return lambda name: os.path.join(GOLDEN, name)
