"""Runs of two processes, of which one is killed or hangs: the other ends within a minute and names it."""

import os
import re
import signal
import time

from tests.faults.kills import goes_on, has_begun, steps_done
from tests.faults.workdirs import OPTIONS, Outcome, before, said_last
from tests.stages import assert_same_metrics, children, start_processes, wait_until

MOST_SECONDS = 60


def one_is_lost(reference, workdir, stage, which, number):
    """One of two processes gets a signal that nobody can catch; then one process alone goes on."""
    before(workdir, reference, stage)
    options = [*OPTIONS, *(["--config.codes.batch_size=4"] if stage == "extract_codes" else [])]
    process = start_processes(2, 1, workdir.address, *options, stage=stage, **workdir.environment)
    if stage.startswith("train"):
        wait_until(lambda: steps_done(workdir, stage) >= 12 or process.poll() is not None, pause=0.005)
    else:
        wait_until(lambda: has_begun(process, workdir, stage), pause=0.005)
    ended = process.poll() is not None
    last, since = steps_done(workdir, stage), time.monotonic()
    if not ended:
        os.kill(children(process)[which], number)
    output, _ = process.communicate(timeout=MOST_SECONDS + 30)
    seconds = time.monotonic() - since
    said = said_last(output)
    if not ended and process.returncode:
        assert seconds < MOST_SECONDS, f"{seconds:.0f} s: {output}"
        assert re.search(rf"process {which} of 2", said), output
    if stage.startswith("train"):
        # Sums over two devices round in another way than those over one.
        from tests.faults.workdirs import run

        run(stage, workdir)
        assert_same_metrics(workdir.here(), reference, "train" if stage == "train" else "tokenizer")
        return Outcome(steps_again=last % 10, said=f"{seconds:.0f} s: {said}")
    found = goes_on(reference, workdir, stage)
    if stage == "evaluate":
        # A mean over two devices, too.
        return Outcome(found.same or scores_are_near(workdir, reference), said=f"{seconds:.0f} s: {said}")
    return found._replace(said=f"{seconds:.0f} s: {said}")


def scores_are_near(workdir, reference):
    from tests.faults.workdirs import content

    found, expected = (content(path, "evaluate")[1]["scores"]["samples"] for path in (workdir.here(), reference))
    return all(abs(found[name] - value) <= 0.02 * abs(value) + 0.01 for name, value in expected.items())


def all_stages(reference, workdir):
    """The whole pipeline with two processes of two devices each: every stage, evaluation included."""
    process = start_processes(2, 2, workdir.address, *OPTIONS, stage="pipeline", **workdir.environment)
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output
    path = workdir.here()
    # The codes are those of a tokenizer whose sums over four devices round in another way: a few are others.
    assert_same_metrics(path, reference, rtol=5e-3)
    assert (path / "evaluation" / "report.html").exists()
    return Outcome(scores_are_near(workdir, reference), said=said_last(output))


def stopped_by_a_signal(reference, workdir, which):
    """SIGTERM to one of two processes stops both at the same step, which is saved."""
    before(workdir, reference, "train")
    process = start_processes(2, 1, workdir.address, *OPTIONS, **workdir.environment)
    wait_until(lambda: steps_done(workdir, "train") >= 6 or process.poll() is not None, pause=0.005)
    os.kill(children(process)[which], signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 143, output
    from tests.faults.workdirs import run

    run("train", workdir)
    assert_same_metrics(workdir.here(), reference)
    return Outcome(said=said_last(output))
