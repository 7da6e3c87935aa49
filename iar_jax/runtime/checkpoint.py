"""Checkpoints of a training run: Orbax, asynchronous, whole or absent, checked when they are read.

A checkpoint has three items: `state` (everything but the averaged weights), `ema_params` (what the later stages
read, and all that imported weights have) and `info` (plain numbers: the data position, the time spent, checksums).

The order of resuming: build the abstract state with its shardings; restore the latest checkpoint that can be read;
start the data at its step.
"""

import asyncio
import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from jaxtyping import Array, UInt32
from orbax.checkpoint import checkpoint_managers
from orbax.checkpoint.path import atomicity

from iar_jax.runtime import distributed
from iar_jax.runtime.errors import UserError, brief, file_system_reason
from iar_jax.runtime.files import absolute, flush, flush_tree, in_bucket
from iar_jax.runtime.progress import say


def abstract_tree(tree: Any, shardings: Any) -> Any:
    """Shapes, dtypes and shardings of a tree (of arrays or of shapes) to restore into."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree, shardings
    )


@dataclasses.dataclass(frozen=True)
class Retention:
    """Which checkpoints stay.

    Attributes:
        latest: so many of the last ones, 1 at least.
        every: all whose step is a multiple of it; 0 is none.
        best: and the one with the lowest of this validation metric, "" for none, as "token_loss"; "-psnr" is the
            highest PSNR. Only checkpoints whose step was validated take part.
    """

    latest: int
    every: int = 0
    best: str = ""

    def policy(self) -> checkpoint_managers.AnyPreservationPolicy:
        policies: list[Any] = [checkpoint_managers.LatestN(self.latest)]
        if self.every:
            policies.append(checkpoint_managers.EveryNSteps(self.every))
        if self.best:
            # Orbax keeps the last of those sorted from low to high.
            policies.append(
                checkpoint_managers.BestN(
                    get_metric_fn=self._badness, n=1, reverse=True, keep_checkpoints_without_metrics=False
                )
            )
        return checkpoint_managers.AnyPreservationPolicy(policies)

    def _badness(self, metrics: dict[str, float]) -> float:
        value = metrics[self.best.removeprefix("-")]
        return -value if self.best.startswith("-") else value


class FlushedPath(atomicity.AtomicRenameTemporaryPath):
    """A checkpoint's directory under its temporary name, on the disk before it gets its own."""

    async def finalize(self) -> None:
        """Flushes, renames, and flushes what Orbax writes in between."""
        await asyncio.to_thread(flush_tree, self.get())
        await super().finalize()
        await asyncio.to_thread(flush_tree, self.get_final())
        await asyncio.to_thread(flush, self.get_final().parent)


def temporary_path(directory: epath.Path) -> type[FlushedPath] | None:
    """How checkpoints become whole; None is Orbax's own way, which in a bucket is a file that says so."""
    return None if in_bucket(directory) else FlushedPath


class Checkpoints:
    """The checkpoints of one run, in one directory."""

    def __init__(self, directory: epath.Path, retention: Retention):
        self.directory = directory
        with explained(f"{directory} cannot be opened"):
            self.manager = ocp.CheckpointManager(
                absolute(directory),
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=retention.policy(),
                    enable_async_checkpointing=True,
                    temporary_path_class=temporary_path(directory),
                    # What a killed save left.
                    cleanup_tmp_directories=True,
                ),
            )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.wait_until_finished()
        except UserError as error:
            if kind is None:
                raise
            say(f"WARNING: {error}")
        finally:
            self.manager.close()

    def save(
        self, step: int, state: Any, info: dict[str, int | float], metrics: dict[str, float] | None = None
    ) -> None:
        """Starts saving a state (a dataclass with `ema_params`); returns before it is on disk.

        Args:
            metrics: of the validation set, for the best one to be known by.

        Raises:
            UserError: this checkpoint, or the one before it, could not be written.
        """
        if step in self.manager.all_steps():
            return
        check_room(self.directory, sum(leaf.nbytes for leaf in jax.tree.leaves(state)))
        rest = dataclasses.replace(state, ema_params=None)
        info = {"data_position": step, **info}
        info |= {"state_checksum": int(checksum(rest)), "ema_checksum": int(checksum(state.ema_params))}
        with explained(f"{self.directory}: the checkpoint of step {step}, or the one before it, was not written"):
            self.manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(rest),
                    ema_params=ocp.args.StandardSave(state.ema_params),
                    info=ocp.args.JsonSave(sealed(info)),
                ),
                metrics=metrics,
            )

    def wait_until_finished(self) -> None:
        """Returns when what `save` started is on disk.

        Raises:
            UserError: it could not be written.
        """
        with explained(f"{self.directory}: the last checkpoint was not written"):
            self.manager.wait_until_finished()

    def restore_latest(self, abstract_state: Any) -> tuple[Any, dict[str, int | float]] | None:
        """State and info of the latest checkpoint that can be read; None where there is none.

        A damaged one is named, passed over, and removed once one before it has been read.

        Raises:
            UserError: there are checkpoints and none can be read; all are left as they are.
        """
        damaged: list[int] = []
        for step in sorted(self.manager.all_steps(), reverse=True):
            try:
                found = _restored(self.manager, step, abstract_state)
            except Exception as error:  # Orbax and TensorStore raise many kinds for a damaged file
                say(
                    f"WARNING: the checkpoint of step {step} in {self.directory} cannot be read ({brief(error)}); "
                    "falling back to the one before it"
                )
                damaged.append(step)
                continue
            for later in damaged:
                self.manager.delete(later)
            return found
        if damaged:
            raise UserError(
                f"{self.directory}: none of the checkpoints of steps {sorted(damaged)} can be read; they are left as "
                "they are, and nothing was changed. Put a copy of one back, or use another --workdir to start over"
            )
        return None


def save_params(directory: epath.Path, step: int, params: Any) -> None:
    """Writes a checkpoint that has weights alone, for `restore_params`."""
    info = sealed({"ema_checksum": int(checksum(params))})
    options = ocp.CheckpointManagerOptions(temporary_path_class=temporary_path(directory))
    with ocp.CheckpointManager(absolute(directory), options=options) as manager:
        manager.save(
            step, args=ocp.args.Composite(ema_params=ocp.args.StandardSave(params), info=ocp.args.JsonSave(info))
        )
        manager.wait_until_finished()


def steps_in(directory: epath.Path) -> list[int]:
    """Steps of the whole checkpoints in a directory, in their order."""
    return sorted(ocp.utils.checkpoint_steps(absolute(directory))) if directory.exists() else []


def read_info(directory: epath.Path, step: int) -> dict[str, int | float]:
    """Info of the checkpoint of a step; raises ValueError where it is damaged."""
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
        return opened(checkpointer.restore(absolute(directory / str(step) / "info")))


def restore_params(directory: epath.Path, abstract_params: Any, step: int | None = None) -> tuple[Any, int]:
    """The averaged weights of the checkpoint of a step (of the latest where None), and the step.

    Raises:
        UserError: no checkpoint, one that is damaged, or one that does not fit the model.
    """
    steps = steps_in(directory)
    if not steps:
        raise UserError(f"{directory}: no checkpoint in it")
    step = steps[-1] if step is None else step
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            params = checkpointer.restore(absolute(directory / str(step) / "ema_params"), abstract_params)
        compare("they", read_info(directory, step).get("ema_checksum"), params)
        return params, step
    except Exception as error:
        raise UserError(
            f"{directory}: the weights of step {step} cannot be read into this model ({brief(error)}). If they are "
            "damaged, the command of the stage that made them trains on from the checkpoint before"
        ) from error


def restore_state(directory: epath.Path, abstract_state: Any, step: int) -> tuple[Any, dict[str, int | float]]:
    """State and info of the checkpoint of a step.

    Raises:
        UserError: it is damaged, has weights alone, or does not fit the model and its optimizer.
    """
    options = ocp.CheckpointManagerOptions(read_only=True)
    try:
        with ocp.CheckpointManager(absolute(directory), options=options) as manager:
            return _restored(manager, step, abstract_state)
    except Exception as error:  # Orbax and TensorStore raise many kinds
        raise UserError(
            f"{directory}: the state of step {step} cannot be read into this model ({brief(error)})"
        ) from error


def _restored(manager: ocp.CheckpointManager, step: int, abstract_state: Any) -> tuple[Any, dict[str, int | float]]:
    """State and info of the checkpoint of a step, held to their checksums; raises what Orbax raises, or ValueError."""
    restored = manager.restore(
        step,
        args=ocp.args.Composite(
            state=ocp.args.StandardRestore(dataclasses.replace(abstract_state, ema_params=None)),
            ema_params=ocp.args.StandardRestore(abstract_state.ema_params),
            info=ocp.args.JsonRestore(),
        ),
    )
    info = opened(restored["info"])
    compare("its state", info.get("state_checksum"), restored["state"])
    compare("its averaged weights", info.get("ema_checksum"), restored["ema_params"])
    return dataclasses.replace(restored["state"], ema_params=restored["ema_params"]), info


@jax.jit
def checksum(tree: Any) -> UInt32[Array, ""]:
    """A number that another bit anywhere in the arrays, or two entries swapped, would change.

    Orbax's files have no checksums of their own: a flipped bit in them is read as another weight. The sum is over
    integers, so that it is the same for any sharding, and an odd factor for each place keeps every bit in it.
    """
    total = jnp.uint32(0)
    for index, leaf in enumerate(jax.tree.leaves(tree)):
        width = leaf.dtype.itemsize * 8
        bits = leaf if leaf.dtype == bool else jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{width}"))
        place = jnp.zeros(leaf.shape, jnp.uint32)
        for axis, size in enumerate(leaf.shape):
            place = place * size + jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
        total += jnp.uint32(2 * index + 1) * jnp.sum(bits.astype(jnp.uint32) * (2 * place + 1), dtype=jnp.uint32)
    return total


def compare(what: str, expected: int | float | None, tree: Any) -> None:
    if expected is not None and int(checksum(tree)) != expected:
        raise ValueError(f"{what} changed since they were written")


def sealed(info: dict[str, int | float]) -> dict[str, Any]:
    """Info with a digest of itself."""
    return {**info, "digest": digest(info)}


def opened(info: dict[str, Any]) -> dict[str, int | float]:
    """Undoes `sealed`; raises ValueError where the digest is another. Checkpoints from before there were digests and
    checksums are taken as they are."""
    content = {name: value for name, value in info.items() if name != "digest"}
    without = not {"digest", "state_checksum", "ema_checksum"} & info.keys()
    if not without and info.get("digest") != digest(content):
        raise ValueError("its info changed since it was written")
    return content


def digest(info: dict[str, int | float]) -> str:
    return hashlib.sha256(json.dumps(info, sort_keys=True).encode()).hexdigest()


def check_room(directory: epath.Path, num_bytes: int) -> None:
    """Raises UserError where a disk has too little room for a checkpoint: before a save rather than in it, where each
    of the threads of Orbax and TensorStore would complain by itself. Not every file system tells."""
    try:
        stats = os.statvfs(directory)
    except OSError:
        return
    free = stats.f_bavail * stats.f_frsize
    if distributed.any_process(free < num_bytes):
        raise UserError(
            f"{directory}: no space left for another checkpoint, which takes {num_bytes / 1e6:.1f} MB; "
            f"{free / 1e6:.1f} MB are free. Those written before are whole; make room and run the same command to go "
            "on from the last one"
        )


@contextlib.contextmanager
def explained(what: str) -> Iterator[None]:
    """Turns a failure of the file system into a UserError, whichever exception Orbax raises for it."""
    try:
        yield
    except Exception as error:
        reason = file_system_reason(error)
        if reason is None:
            raise
        raise UserError(
            f"{what}: {reason}. Checkpoints written before are whole; run the same command to go on from the last one"
        ) from error
