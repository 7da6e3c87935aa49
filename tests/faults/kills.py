"""Processes that end at a bad moment: SIGKILL at renames, uploads and steps; signals that ask for a stop."""

import os
import re
import signal
import time

from tests.faults.workdirs import STAGES, Outcome, before, begin, compared, log_lines, run, said_last
from tests.stages import ROOT, wait_until

HOOK = str(ROOT / "tests" / "faults" / "hook")


def resumed_at(output):
    """The step that a run went on from, by what it said."""
    said = re.search(r"going on from the checkpoint of step (\d+)", output)
    return int(said[1]) if said else 0


def steps_done(workdir, stage):
    """The last step that a killed run has logged."""
    name = f"{STAGES[stage][0]}/metrics.jsonl"
    if not stage.startswith("train") or name not in workdir.names():
        return 0
    # Of a log in a bucket, or one that a killed run is writing, the last line may be half of one.
    return max(map(int, re.findall(r'"step": (\d+)', workdir.read(name).decode(errors="replace"))), default=0)


def goes_on(reference, workdir, stage, last_step=0, said=""):
    """Runs a disturbed stage to its end and compares. `last_step` is the last one that it had logged."""
    output = run(stage, workdir).stdout
    done = f"{stage}: done, in" in output
    again = 0 if done or not stage.startswith("train") else max(0, last_step - resumed_at(output))
    return compared(reference, workdir, stage, again, said)


def wait_for_step(process, workdir, stage, step):
    """Returns when a step is logged, or the process has ended."""
    wait_until(lambda: steps_done(workdir, stage) >= step or process.poll() is not None, pause=0.005)


def has_begun(process, workdir, stage):
    """Whether a stage has something to keep, or has ended."""
    if process.poll() is not None:
        return True
    if stage.startswith("train"):
        return steps_done(workdir, stage) >= 2
    kept = {"sample": r"samples/.*/parts/", "extract_codes": r"codes/train/.*record$", "evaluate": r"classifier/.*json"}
    return any(re.match(kept.get(stage, ".*lock.json"), name) for name in workdir.names())


def renames(reference, workdir, stage, count_in):
    """How often an undisturbed run of a stage renames a file."""
    before(workdir, reference, stage)
    run(stage, workdir, PYTHONPATH=HOOK, FAULT_COUNT=str(count_in))
    return int(count_in.read_text())


def at_a_rename(reference, workdir, stage, number, moment):
    """SIGKILL just before or just after a rename."""
    before(workdir, reference, stage)
    done = run(stage, workdir, check=False, PYTHONPATH=HOOK, FAULT_RENAME=f"{number}:{moment}")
    assert done.returncode == -signal.SIGKILL, f"rename {number} did not come: {done.stdout}{done.stderr}"
    return goes_on(reference, workdir, stage, steps_done(workdir, stage))


def in_a_step(reference, workdir, stage, step, delay):
    """SIGKILL a moment after a step is logged."""
    before(workdir, reference, stage)
    process = begin(stage, workdir)
    wait_for_step(process, workdir, stage, step)
    time.sleep(delay)
    process.kill()
    process.communicate()
    return goes_on(reference, workdir, stage, steps_done(workdir, stage))


def at_an_upload(reference, workdir, stage, share):
    """SIGKILL while a request that changes the bucket is on its way, so many of them into an undisturbed run's."""
    before(workdir, reference, stage)
    total = counted_uploads(workdir, lambda: run(stage, workdir))
    workdir.remove("")
    before(workdir, reference, stage)
    number = max(1, round(share * total))
    process = begin(stage, workdir)
    workdir.bucket.strike(number, lambda: os.kill(process.pid, signal.SIGKILL))
    process.communicate(timeout=240)
    assert process.returncode in (0, -signal.SIGKILL)
    # Heartbeats count too, whose number depends on time: the run may have ended before.
    return goes_on(reference, workdir, stage, steps_done(workdir, stage))


def counted_uploads(workdir, action):
    """How many requests that change the bucket an action makes."""
    first = workdir.bucket.changing
    action()
    return workdir.bucket.changing - first


def by_a_signal(reference, workdir, stage, number):
    """A signal as soon as the stage has something to keep; it says so and ends with 128 + the signal."""
    before(workdir, reference, stage)
    process = begin(stage, workdir, *(["--config.codes.batch_size=16"] if stage == "extract_codes" else []))
    wait_until(lambda: has_begun(process, workdir, stage), pause=0.005)
    process.send_signal(number)
    output, _ = process.communicate(timeout=120)
    assert "Traceback" not in output, output
    # A stage that was about to end has ended.
    assert process.returncode in (0, 128 + number), output
    if process.returncode:
        assert re.search("same command (to go on|goes on)", output), output
    return goes_on(reference, workdir, stage, steps_done(workdir, stage), said_last(output))


def by_two_signals(reference, workdir):
    """The second signal ends the process at once, in the middle of whatever the first one made it do."""
    before(workdir, reference, "train")
    process = begin("train", workdir)
    wait_for_step(process, workdir, "train", 2)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=30)
    assert process.returncode in (128 + signal.SIGINT, 128 + signal.SIGTERM)
    return goes_on(reference, workdir, "train", steps_done(workdir, "train"), said_last(output))


def of_a_watch(reference, workdir):
    """A watch of a training is killed after it has scored a checkpoint, and goes on with the others."""
    workdir.take(reference)
    options = ["--watch", "--watch_seconds=0.2"]
    process = begin("evaluate", workdir, *options)
    wait_until(lambda: "evaluation/watch.jsonl" in workdir.names() or process.poll() is not None, pause=0.02)
    process.kill()
    process.communicate()
    run("evaluate", workdir, *options)
    lines = log_lines(workdir.here() / "evaluation" / "watch.jsonl")
    steps = [line["step"] for line in lines]
    return Outcome(sorted(set(steps)) == steps and steps[-1] == 24, said=f"scored {steps}")
