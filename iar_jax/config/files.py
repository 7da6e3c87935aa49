"""A config that another one starts from."""

import importlib.util
import os
from pathlib import Path

from ml_collections import ConfigDict

from iar_jax.runtime.errors import UserError


def config_beside(file: str, argument: str) -> ConfigDict:
    """The config NAME:REST of the directory above that of `file`, which is one of configs/studies: `mnist` is
    configs/mnist.py, and `cifar10:PATH` configs/cifar10.py:PATH.

    Raises:
        UserError: no such file.
    """
    name, _, rest = argument.partition(":")
    directory = Path(file).resolve().parents[1]
    path = directory / f"{name}.py"
    if not path.is_file():
        known = ", ".join(sorted(other.stem for other in directory.glob("*.py")))
        own = f"configs/studies/{os.path.basename(file)}"
        raise UserError(
            f"{own}:{argument}: there is no config {name!r}; write {own}:NAME or NAME:ARGUMENT with one of {known}"
        )
    return config_at(path, rest)


def config_at(path: Path, argument: str) -> ConfigDict:
    """The config of a file, with an argument.

    Raises:
        UserError: it cannot be read.
    """
    spec = importlib.util.spec_from_file_location(f"iar_jax_config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path} cannot be read as a config")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(argument)
