"""The command line that all stages share: --config, --workdir and overrides of single fields."""

import io
import logging as std_logging
import os
import pathlib
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from absl import app, flags, logging
from etils import epath
from ml_collections import ConfigDict, config_flags

from iar_jax.config.checks import check_config, field_names, unknown_field
from iar_jax.config.describe import help_text
from iar_jax.config.fields import default_config
from iar_jax.runtime import bucket, distributed
from iar_jax.runtime.errors import UserError, brief, file_system_reason
from iar_jax.runtime.files import in_bucket, write_bytes
from iar_jax.runtime.interruption import Interrupted, leave_at_once
from iar_jax.runtime.watch import Watch

EXIT_USER_ERROR = 2


def main(
    run: Callable[[Any, Any], None], reads: Sequence[str], needs_config: Callable[[], bool] = lambda: True
) -> NoReturn:
    """Parses and checks the command line, then calls run(config, workdir), or run(None, None) where `needs_config`,
    asked once options are parsed, says no. `reads` are the sections of the config that --help lists.

    A UserError, from here or from the stage, is printed in one piece and ends the program with exit code 2; a stop
    by signal with 128 plus the signal's number, as shells report it.
    """
    config_flags.DEFINE_config_file(
        "config", None, "Path of the config, with its argument after a colon.", lock_config=True
    )
    flags.DEFINE_string("workdir", None, "Directory of the experiment; made if it is not there.")

    # A terminal or a log that cannot show a letter shows a question mark.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")

    def guarded(_):
        watch = None
        try:
            watch = distributed.initialise()
            if not distributed.joined():
                signal.signal(signal.SIGTERM, leave_at_once)
            logging.set_verbosity(logging.WARNING)
            logging.get_absl_handler().addFilter(not_explained)
            keep_quiet()
            if not needs_config():
                run(None, None)
                return
            config = flags.FLAGS.config
            check_config(config)
            workdir = epath.Path(flags.FLAGS.workdir).expanduser()
            for name, path in {"--workdir": flags.FLAGS.workdir, **config.inputs}.items():
                if in_bucket(str(path)):
                    bucket.check(epath.Path(path), name if name == "--workdir" else f"config.inputs.{name}")
            open_workdir(config, workdir)
            run(config, workdir)
        except UserError as error:
            _fail(str(error), EXIT_USER_ERROR, watch)
        except Interrupted as stop:
            distributed.wait_for_all("stopped")
            _fail(str(stop) if distributed.is_first() else "", 128 + stop.signal_number)
        except KeyboardInterrupt:
            _fail("stopped; run the same command to go on", 128 + signal.SIGINT)
        except Exception as error:
            reason = file_system_reason(error)
            if reason is not None:
                where = getattr(error, "filename", None) or flags.FLAGS.workdir or "a file"
                _fail(
                    f"{where}: {reason}. What was finished before is whole; once that is put right, the same command "
                    "goes on",
                    EXIT_USER_ERROR,
                    watch,
                )
            if watch is not None:
                # A collective that broke off is the first that one hears of a process that was killed.
                watch.wait_for_news()
                traceback.print_exc()
                watch.leave_word(f"{type(error).__name__}: {brief(error)}")
                distributed.leave(1)
            raise

    app.run(guarded, flags_parser=lambda argv: _parse(argv, reads, needs_config))


def keep_quiet() -> None:
    """Keeps off the terminal what Orbax's unfinished reads print when one of them has failed, which is told once."""
    for name in ("asyncio", "concurrent.futures"):
        std_logging.getLogger(name).setLevel(std_logging.CRITICAL)

    def hook(unraisable: Any) -> None:
        code = getattr(unraisable.object, "cr_code", None)
        unfinished = code is not None and "orbax" in code.co_filename
        if not unfinished and "Event loop is closed" not in str(unraisable.exc_value):
            sys.__unraisablehook__(unraisable)

    sys.unraisablehook = hook


def not_explained(record: Any) -> bool:
    """Keeps out of the log what the user is told in a sentence: stack traces of a full disk, from each of Orbax's
    threads."""
    error = record.exc_info[1] if record.exc_info else None
    return error is None or file_system_reason(error) is None


def _parse(argv: list[str], reads: Sequence[str], needs_config: Callable[[], bool]) -> list[str]:
    if any(argument in ("--help", "-h", "-help") for argument in argv[1:]):
        try:
            print(help_text(sys.modules["__main__"].__doc__ or "", own_options(), reads), flush=True)
        except BrokenPipeError:  # `--help | head` has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    argv = with_equals_signs(argv)
    for argument in argv[1:]:
        option, _, value = argument.lstrip("-").partition("=")
        path = value.partition(":")[0]
        if option == "config" and not os.path.isfile(path):
            _fail(f"--config={value}: there is no file {path!r}", EXIT_USER_ERROR)
    try:
        rest = flags.FLAGS(last_overrides(argv))
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError, ImportError, UserError) as error:
        _fail(_explain(argv, error), EXIT_USER_ERROR)
    if needs_config() and (flags.FLAGS.config is None or not flags.FLAGS.workdir):
        _fail(
            "give --config=configs/FILE.py and --workdir=DIR; single fields are set by --config.section.field=value",
            EXIT_USER_ERROR,
        )
    if len(rest) > 1:
        _fail(f"{rest[1]!r} is not an option; fields are set by --config.section.field=value", EXIT_USER_ERROR)
    return rest


def with_equals_signs(argv: Sequence[str]) -> list[str]:
    """The command line with `--name value` as `--name=value`, for all that takes a value: what follows looks at single
    arguments."""
    found, rest = list(argv[:1]), list(argv[1:])
    while rest:
        argument = rest.pop(0)
        if argument.startswith("-") and rest and not rest[0].startswith("--") and takes_value(argument.lstrip("-")):
            argument = f"{argument}={rest.pop(0)}"
        found.append(argument)
    return found


def takes_value(option: str) -> bool:
    """Whether an option, or a field of the config, is followed by a value; fields that do not exist are, too."""
    if not option.startswith("config."):
        return option in flags.FLAGS and not flags.FLAGS[option].boolean
    known = default_config()
    return option not in field_names(known) or not isinstance(value_of(known, option), bool)


def value_of(config: ConfigDict, field: str) -> Any:
    """The value of config.<section>.<field>."""
    value: Any = config
    for part in field.split(".")[1:]:
        value = value[part]
    return value


def last_overrides(argv: list[str]) -> list[str]:
    """Without overrides of a field that comes again later: ml_collections would put the tuples together."""
    last = {argument.partition("=")[0]: place for place, argument in enumerate(argv) if "=" in argument}
    return [
        argument
        for place, argument in enumerate(argv)
        if not argument.lstrip("-").startswith("config.") or last.get(argument.partition("=")[0], place) == place
    ]


def _explain(argv: list[str], error: Exception) -> str:
    """What is wrong with an override, in our words; for anything else the error's own."""
    known = default_config()
    names = field_names(known)
    for argument in argv[1:]:
        option, _, text = argument.lstrip("-").partition("=")
        if not option.startswith("config."):
            continue
        if option not in names:
            return unknown_field(option, names)
        value = value_of(known, option)
        if isinstance(value, ConfigDict):
            return f"{option} is a section; set one of its fields: {', '.join(value)}"
        try:
            {int: int, float: float}.get(type(value), str)(text)
        except ValueError:
            kind = {int: "an integer", float: "a number"}[type(value)]
            return f"{option} is {text!r}; allowed is {kind}, such as {value}"
        if isinstance(value, bool) and text.lower() not in ("true", "false", "1", "0", ""):
            return f"{option} is {text!r}; allowed are true and false"
        if isinstance(value, tuple) and not text.strip().startswith("("):
            return f"{option} is {text!r}; allowed is a tuple, such as '{value}'"
    return " ".join(str(error).split()) or type(error).__name__


def own_options() -> list[tuple[str, str]]:
    """The options of the program that runs, besides --config and --workdir: (option with its default, meaning)."""
    found = []
    for flag in flags.FLAGS.get_key_flags_for_module("__main__"):
        shown = f"--{flag.name}" if flag.boolean else f"--{flag.name}={'' if flag.default is None else flag.default}"
        found.append((shown, " ".join(flag.help.split())))
    return found


def open_workdir(config: ConfigDict, workdir: epath.Path) -> None:
    """Makes a new workdir and writes its config.json; one that is there is left as it is until a stage has its lock.

    Raises:
        UserError: it cannot be made.
    """
    try:
        if not (workdir / "config.json").exists():
            save_config(config, workdir)
    except OSError as error:
        raise UserError(f"--workdir={workdir} cannot be written: {error.strerror or brief(error)}") from error


def save_config(config: ConfigDict, workdir: epath.Path) -> None:
    """Writes the resolved config to workdir/config.json. A stage calls it when it has its lock: a run that is refused
    leaves no trace."""
    write_bytes(workdir / "config.json", (config.to_json_best_effort(indent=2) + "\n").encode())


def _fail(message: str, code: int, watch: Watch | None = None) -> NoReturn:
    if watch is not None:
        # Others may wait for this process in a collective: they are to hear of its end at once.
        watch.leave_word(message)
    if message:
        program = pathlib.Path(sys.argv[0])
        name = program.parent.name if program.name == "__main__.py" else program.name
        print(f"\n{name}: {message}", file=sys.stderr, flush=True)
    # Threads of a save that failed wait for each other for ten minutes.
    waiting = any(not thread.daemon for thread in threading.enumerate() if thread is not threading.main_thread())
    if distributed.joined() or waiting:
        distributed.leave(code)
    sys.exit(code)
