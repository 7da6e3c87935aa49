"""Files that are empty, cut, or have a flipped bit: seen, said, and made again, or the one before is taken."""

import random
import re
import signal

from tests.faults.kills import steps_done, wait_for_step
from tests.faults.workdirs import Outcome, assert_refused, before, begin, compared, run, said_last
from tests.stages import wait_until

WAYS = ("flip", "cut", "empty")

# Of a finished workdir: the file (the largest that matches), the stage that makes it, and its next reader, which may
# be the first to see that it is damaged; "" where nothing reads it.
FILES = {
    "tokenizer's weights": (r"tokenizer/checkpoints/30/ema_params/.*", "train_tokenizer", "sample"),
    "tokenizer's metadata": (r"tokenizer/metadata\.json", "train_tokenizer", "sample"),
    "permutation": (r"codebook/permutation\.npz", "rearrange_codebook", "train"),
    "codebook's metadata": (r"codebook/metadata\.json", "rearrange_codebook", "train"),
    "code records": (r"codes/train/codes-00002.*", "extract_codes", "train"),
    "val code records": (r"codes/val/codes-.*", "extract_codes", "train"),
    "codes' metadata": (r"codes/train/metadata\.json", "extract_codes", "train"),
    "generator's weights": (r"train/checkpoints/24/ema_params/.*", "train", "sample"),
    "generator's metadata": (r"train/metadata\.json", "train", "sample"),
    "samples": (r"samples/.*/samples\.npz", "sample", "evaluate"),
    "labels": (r"samples/.*/labels\.npy", "sample", "evaluate"),
    "samples' metadata": (r"samples/.*/metadata\.json", "sample", "evaluate"),
    "grid": (r"samples/.*/grid\.png", "sample", ""),
    "scores": (r"evaluation/[^/]*seed0\.json", "evaluate", ""),
    "report": (r"evaluation/report\.html", "evaluate", ""),
    "evaluation's metadata": (r"evaluation/.*seed0/metadata\.json", "evaluate", ""),
    "classifier's weights": (r"evaluation/classifier/checkpoints/20/ema_params/.*", "evaluate", ""),
    "config": (r"config\.json", "train", ""),
}


def largest(workdir, pattern):
    """The largest file whose name matches."""
    names = [name for name in workdir.names() if re.fullmatch(pattern, name) and workdir.read(name)]
    assert names, f"no {pattern} in {workdir.names()}"
    return max(names, key=lambda name: len(workdir.read(name)))


def hit(workdir, name, rng, way, flips=1):
    """Flips bits of a file, cuts it, or empties it."""
    whole = bytearray(workdir.read(name))
    if way == "flip":
        for _ in range(flips):
            whole[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
    else:
        del whole[rng.randrange(1, len(whole)) if way == "cut" else 0 :]
    workdir.write(name, bytes(whole))


def of_a_file(reference, workdir, kind, way, seed):
    """A file of a finished workdir: its own stage makes it again, and everything ends as in the undisturbed run. A
    reader before that either says so and stops, or has another way to what the file held."""
    pattern, stage, reader = FILES[kind]
    workdir.take(reference)
    name = largest(workdir, pattern)
    # An artifact's weights lie in several small files and a large one: bits that mean nothing are few in that.
    hit(workdir, name, random.Random(seed), way, flips=30 if "record" in name or "ema_params" in name else 1)
    said = ""
    if reader:
        if reader == "evaluate":
            workdir.remove("evaluation")
        # Samples of other settings: those of the reference are there.
        done = run(reader, workdir, *["--config.sampling.num_images=8"] * (reader == "sample"), check=False)
        if done.returncode:
            said = assert_refused(done)
    output = run(stage, workdir).stdout
    warnings = [line for line in output.splitlines() if line.startswith("WARNING")]
    return compared(reference, workdir, stage, said=said or (warnings[0] if warnings else said_last(output)))


def of_both_metadata(reference, workdir, artifact, stage):
    """metadata.json and its copy: made again from the config and from what else is there."""
    workdir.take(reference)
    for name in ("metadata.json", "metadata.copy.json"):
        workdir.write(f"{artifact}/{name}", b'{"stage": "train", "finished": true}')
    output = run(stage, workdir).stdout
    assert "made again" in output, output
    return compared(reference, workdir, stage, said=said_last(output))


def of_the_latest_checkpoint(reference, workdir, item, way, seed):
    """The latest checkpoint of a killed run: the one before it is gone on from, and that is said."""
    before(workdir, reference, "train")
    process = begin("train", workdir)
    # The checkpoint of step 10 is there or under way, and a later one is made by the signal.
    wait_for_step(process, workdir, "train", 11)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 143, output
    latest = max(int(n.split("/")[2]) for n in workdir.names() if re.match(r"train/checkpoints/\d+/", n))
    hit(workdir, largest(workdir, rf"train/checkpoints/{latest}/{item}/.*"), random.Random(seed), way, flips=30)
    done = run("train", workdir, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (warning,) = [line for line in done.stdout.splitlines() if "WARNING: the checkpoint of step" in line]
    assert "going on from the checkpoint of step" in done.stdout, done.stdout
    return compared(reference, workdir, "train", latest % 10 or 10, warning)


def of_parts(reference, workdir, way, seed):
    """A part of interrupted samples: it, and those after it, are made again."""
    before(workdir, reference, "sample")
    process = begin("sample", workdir)
    wait_until(
        lambda: process.poll() is not None or sum("/parts/" in name for name in workdir.names()) > 1, pause=0.005
    )
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    if any("/parts/" in name for name in workdir.names()):
        hit(workdir, largest(workdir, r"samples/.*/parts/.*"), random.Random(seed), way)
    run("sample", workdir)
    return compared(reference, workdir, "sample")


def of_the_log(reference, workdir, way, seed):
    """The log of a stopped run: whole lines up to the checkpoint stay, and the run ends with the same weights."""
    before(workdir, reference, "train")
    process = begin("train", workdir)
    wait_until(lambda: steps_done(workdir, "train") >= 12 or process.poll() is not None, pause=0.005)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    hit(workdir, "train/metrics.jsonl", random.Random(seed), way)
    run("train", workdir)
    found = compared(reference, workdir, "train")
    # What the damage took of the log is gone; the weights are those of the undisturbed run.
    path = workdir.here()
    same = (path / "train/metadata.json").exists() and fingerprints_agree(path, reference)
    return Outcome(same, 0, 0 if same else found.examples_lost)


def fingerprints_agree(path, reference):
    from tests.faults.workdirs import fingerprint

    return fingerprint(path / "train") == fingerprint(reference / "train")
