"""Checkpoints of a training run: Orbax, asynchronous, whole or absent.

A checkpoint has three items: `state` (everything but the averaged weights), `ema_params` (what the later stages
read, and all that imported weights have) and `info` (plain numbers: the data position and the time spent).

The order of resuming: build the abstract state with its shardings; restore the latest checkpoint that can be read;
start the data at its step.
"""

import dataclasses
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from iar_jax.runtime.errors import UserError
from iar_jax.runtime.progress import say


def abstract_tree(tree: Any, shardings: Any) -> Any:
    """Shapes, dtypes and shardings of a tree (of arrays or of shapes) to restore into."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree, shardings
    )


class Checkpoints:
    """The checkpoints of one run, in one directory."""

    def __init__(self, directory: epath.Path, keep: int):
        self.directory = directory
        self.manager = ocp.CheckpointManager(
            directory.resolve(),
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True),
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self.manager.wait_until_finished()
        self.manager.close()

    def save(self, step: int, state: Any, info: dict[str, int | float]) -> None:
        """Starts saving a state (a dataclass with `ema_params`); returns before it is on disk."""
        if step in self.manager.all_steps():
            return
        self.manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(dataclasses.replace(state, ema_params=None)),
                ema_params=ocp.args.StandardSave(state.ema_params),
                info=ocp.args.JsonSave({"data_position": step, **info}),
            ),
        )

    def restore_latest(self, abstract_state: Any) -> tuple[Any, dict[str, int | float]] | None:
        """State and info of the latest checkpoint that can be read; None where there is none.

        A damaged one is named, passed over, and removed once one before it has been read.

        Raises:
            UserError: there are checkpoints and none can be read; all are left as they are.
        """
        damaged: list[int] = []
        for step in sorted(self.manager.all_steps(), reverse=True):
            try:
                restored = self.manager.restore(
                    step,
                    args=ocp.args.Composite(
                        state=ocp.args.StandardRestore(dataclasses.replace(abstract_state, ema_params=None)),
                        ema_params=ocp.args.StandardRestore(abstract_state.ema_params),
                        info=ocp.args.JsonRestore(),
                    ),
                )
            except Exception as error:  # Orbax and TensorStore raise many kinds for a damaged file
                reason = " ".join(str(error).split())[:200]
                say(
                    f"WARNING: the checkpoint of step {step} in {self.directory} cannot be read ({reason}); "
                    "falling back to the one before it"
                )
                damaged.append(step)
                continue
            for later in damaged:
                self.manager.delete(later)
            return dataclasses.replace(restored["state"], ema_params=restored["ema_params"]), restored["info"]
        if damaged:
            raise UserError(
                f"{self.directory}: none of the checkpoints of steps {sorted(damaged)} can be read; they are left as "
                "they are. Delete the directory to start over"
            )
        return None


def save_params(directory: epath.Path, step: int, params: Any) -> None:
    """Writes a checkpoint that has weights alone, for `restore_params`."""
    with ocp.CheckpointManager(directory.resolve()) as manager:
        manager.save(step, args=ocp.args.Composite(ema_params=ocp.args.StandardSave(params)))
        manager.wait_until_finished()


def restore_params(directory: epath.Path, abstract_params: Any) -> tuple[Any, int]:
    """The averaged weights of the latest checkpoint in `directory`, and its step.

    Raises:
        UserError: no checkpoint, or one that does not fit the model.
    """
    steps = ocp.utils.checkpoint_steps(directory.resolve()) if directory.exists() else []
    if not steps:
        raise UserError(f"{directory}: no checkpoint in it")
    step = max(steps)
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore((directory / str(step) / "ema_params").resolve(), abstract_params), step
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{directory}: the weights of step {step} cannot be read into this model ({reason})") from error
