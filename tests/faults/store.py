"""Faults of the store itself: answers that are errors, late, broken off, or not there; listings that lag."""

from tests.faults.workdirs import Outcome, assert_refused, before, compared, run, said_last

# What a store does to a share of its requests. Clients try again; the stage ends as if nothing had been.
TROUBLES = {
    "503": {"unavailable": 0.1, "at_most": 30},
    "connections refused": {"refused": 0.1, "at_most": 30},
    "answers broken off": {"broken": 0.1, "at_most": 30},
    "slow answers": {"delay": 1.0, "delayed": 0.1, "at_most": 60},
    "listings that lag 3 s": {"lag": 3.0},
}


def in_trouble(reference, workdir, stage, trouble, seed):
    """A stage runs while the store is in trouble."""
    before(workdir, reference, stage)
    made = workdir.bucket.make_trouble(**TROUBLES[trouble], seed=seed)
    try:
        done = run(stage, workdir, check=False)
        said = f"{made.times} requests hit"
        if done.returncode:
            # Where a client gives up, a person is told, and the same command goes on.
            said += f"; {assert_refused(done)}"
            workdir.bucket.make_trouble()
            run(stage, workdir)
    finally:
        workdir.bucket.make_trouble()
    return compared(reference, workdir, stage, said=said)


def gone(reference, workdir, stage, seconds_of_patience=60):
    """The store stops answering in the middle of a stage: it ends within a minute, and says so."""
    import time

    from tests.faults.kills import has_begun
    from tests.faults.workdirs import begin
    from tests.stages import wait_until

    before(workdir, reference, stage)
    process = begin(stage, workdir, *(["--config.codes.batch_size=4"] if stage == "extract_codes" else []))
    wait_until(lambda: has_begun(process, workdir, stage), pause=0.02)
    workdir.bucket.make_trouble(unavailable=1.0)
    since = time.monotonic()
    try:
        output, _ = process.communicate(timeout=seconds_of_patience + 30)
    finally:
        workdir.bucket.make_trouble()
    seconds = time.monotonic() - since
    assert "Traceback" not in output, output
    if process.returncode:
        assert process.returncode == 2, output
        assert seconds < seconds_of_patience, f"{seconds:.0f} s"
        assert "same command" in output, output
    run(stage, workdir)
    return compared(reference, workdir, stage, said=f"{seconds:.0f} s: {said_last(output)}")


def not_there(reference, workdir):
    """No such bucket, no name in it, another kind of address: one line each, before anything runs."""
    del reference
    lines = []
    for address, message in (
        ("gs://", "give a name inside of the bucket"),
        ("gs://bucket", "give a name inside of the bucket"),
        ("s3://bucket/run", "it may be a directory, or gs://"),
    ):
        workdir.address = address
        lines.append(assert_refused(run("train_tokenizer", workdir, check=False), message))
    return Outcome(said=lines[-1])


def without_credentials(reference, workdir):
    """No credentials: one line that says how to get some."""
    from tests.stages import call

    del reference
    environment = {"NO_GCE_CHECK": "true", "GOOGLE_APPLICATION_CREDENTIALS": "", "CLOUDSDK_CONFIG": "/nowhere"}
    done = call("train_tokenizer", workdir.address, check=False, **environment)
    return Outcome(said=assert_refused(done, "no credentials for Google Cloud Storage"))
