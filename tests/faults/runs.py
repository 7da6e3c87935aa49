"""Runs that meet: second ones, dead ones, other configs; and workdirs that are moved or removed under a run."""

import json
import re
import signal
import subprocess

from tests.faults.kills import goes_on, has_begun, wait_for_step
from tests.faults.workdirs import (
    OPTIONS,
    STAGES,
    NotTried,
    OnDisk,
    Outcome,
    assert_refused,
    before,
    begin,
    compared,
    run,
    said_last,
)
from tests.stages import assert_same_metrics, inputs_of, wait_until

# Schedules that depend on the number of steps would make another run of a shorter one.
CONSTANT = ["--config.training.schedule=constant", "--config.training.warmup_steps=0"]


def a_second_run(reference, workdir, *other):
    """A second run in the same workdir is refused and leaves no trace, and the first one does not notice."""
    before(workdir, reference, "train")
    long = ["--config.training.num_steps=2400", *CONSTANT]
    first = begin("train", workdir, *long)
    wait_for_step(first, workdir, "train", 2)
    kept = {name: workdir.read(name) for name in ("config.json", "train/metadata.json", "train/metadata.copy.json")}
    done = run("train", workdir, *long, *other, check=False)
    said = assert_refused(done, "made with another config" if other else f"is in use by process {first.pid} on ")
    assert first.poll() is None
    assert kept == {name: workdir.read(name) for name in kept}
    first.send_signal(signal.SIGTERM)
    output, _ = first.communicate(timeout=60)
    assert first.returncode == 143, output
    assert "train/lock.json" not in workdir.names()
    return Outcome(said=said)


def two_at_once(reference, workdir, stage):
    """Of two that start at once one goes on to the end, and the other is told."""
    before(workdir, reference, stage)
    both = [begin(stage, workdir) for _ in range(2)]
    outputs = [process.communicate(timeout=240)[0] for process in both]
    codes = sorted(process.returncode for process in both)
    # One that came when the other had ended finds all done.
    assert codes in ([0, 2], [0, 0]), outputs
    assert not any("Traceback" in output for output in outputs), outputs
    said = [said_last(o) for o, process in zip(outputs, both, strict=True) if process.returncode]
    return compared(reference, workdir, stage, said=said[0] if said else "the second found it done")


def the_lock_of_a_dead_machine(reference, workdir):
    """A lock whose holder cannot be asked, and whose heartbeat has stopped, is taken over, and that is said."""
    before(workdir, reference, "train")
    holder = {"token": "x", "host": "elsewhere", "process": 1, "machine": "another", "since": "2026", "heartbeats": 9}
    workdir.write("train/lock.json", json.dumps(holder).encode())
    output = run("train", workdir).stdout
    (said,) = [line for line in output.splitlines() if "no heartbeat of process 1 on elsewhere" in line]
    assert "taking over" in said
    return compared(reference, workdir, "train", said=said)


def a_damaged_lock(reference, workdir, content):
    """A lock file that names nobody keeps nobody out."""
    before(workdir, reference, "train")
    workdir.write("train/lock.json", content)
    return goes_on(reference, workdir, "train")


def moved_or_removed(reference, workdir, stage, moved):
    """The artifact's directory goes away under the run, which stops; moved, the run goes on where it is now."""
    before(workdir, reference, stage)
    process = begin(stage, workdir, *(["--config.codes.batch_size=4"] if stage == "extract_codes" else []))
    wait_until(lambda: has_begun(process, workdir, stage), pause=0.005)
    (name,) = STAGES[stage]
    if moved:
        workdir.move(name, f"{name}-elsewhere")
    else:
        workdir.remove(name)
    output, _ = process.communicate(timeout=60)
    assert "Traceback" not in output, output
    if process.returncode == 0:
        raise NotTried("the stage had ended")
    assert process.returncode == 2, output
    assert "moved or removed" in output, output
    assert "same command" not in output.split("moved or removed")[-1], output
    # Nothing of a second tree is left but what was being written.
    assert f"{name}/metadata.json" not in workdir.names()
    if moved:
        workdir.remove(name)
        workdir.move(f"{name}-elsewhere", name)
    else:
        workdir.remove(name)
    return goes_on(reference, workdir, stage, said=said_last(output))


def a_workdir_at_another_place(reference, workdir, elsewhere):
    """A killed run goes on where its workdir was moved to."""
    before(workdir, reference, "train")
    process = begin("train", workdir)
    wait_for_step(process, workdir, "train", 12)
    process.kill()
    process.communicate()
    workdir.path.rename(elsewhere)
    return goes_on(reference, OnDisk(elsewhere), "train")


def pictures_at_another_place(path):
    """A folder of pictures that was moved is the same set, with a slash behind it or not."""
    import numpy as np
    from PIL import Image

    rng, pictures = np.random.default_rng(0), path / "pictures"
    for name in ("a", "b"):
        (pictures / name).mkdir(parents=True)
        for i in range(12):
            Image.fromarray(rng.integers(0, 255, (32, 32, 3), np.uint8)).save(pictures / name / f"{i}.png")
    workdir, options = OnDisk(path / "run"), ["--config.sampling.num_images=8"]
    sizes = [
        "--config.codes.batch_size=4",
        "--config.tokenizer_training.batch_size=8",
        "--config.training.batch_size=8",
    ]
    run("pipeline", workdir, *options, *sizes, f"--config.data.source=folder:{pictures}")
    pictures.rename(path / "elsewhere")
    output = run("pipeline", workdir, *options, *sizes, f"--config.data.source=folder:{path / 'elsewhere'}/").stdout
    assert output.count("done, in") == 6, output
    (path / "elsewhere" / "a" / "0.png").unlink()
    more = [*options, *sizes, f"--config.data.source=folder:{path / 'elsewhere'}"]
    done = run("pipeline", workdir, *more, check=False)
    return Outcome(said=assert_refused(done, "config.data.source was"))


def other_devices(reference, path, options=()):
    """Begun on one device, gone on with on eight in another mesh, ended on one: the same batches, dropout and masks."""
    output = stopped_and_elsewhere(path, "run", [*inputs_of(reference), *options], MESH)
    assert_same_metrics(path / "run", reference)
    assert "going on from the checkpoint of step" in output
    return Outcome()


MESH = ["--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.mesh.tensor=2"]


def other_parts(reference, path):
    """Gradients in two parts for a while, without dropout, whose draws belong to the parts: the same losses."""
    still = [f"--config.model.{name}_dropout_rate=0.0" for name in ("token", "residual", "ffn", "class")]
    options = [*inputs_of(reference), *still]
    run("train", OnDisk(path / "one"), *options)
    output = stopped_and_elsewhere(path, "run", options, [*MESH, "--config.training.accumulation=2"])
    assert "noted, config.training.accumulation was 2, now 1" in output, output
    assert_same_metrics(path / "run", path / "one")
    return Outcome()


def stopped_and_elsewhere(path, name, options, elsewhere):
    """A training run in three pieces, the middle one on eight devices with the options `elsewhere`."""
    workdir = OnDisk(path / name)
    for last, devices, more in ((6, 1, []), (14, 8, elsewhere)):
        process = begin("train", workdir, *options, *more, devices=devices)
        wait_for_step(process, workdir, "train", last)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 143, output
    return run("train", workdir, *options).stdout


class mounted:
    """A file system of its own in memory, where this process may mount one."""

    def __init__(self, path, options):
        self.path, self.options = path, options

    def __enter__(self):
        import os

        self.path.mkdir(parents=True)
        if os.geteuid() != 0:
            raise NotTried("only root may mount")
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", self.options, "tmpfs", str(self.path)], check=False, capture_output=True
        )
        if done.returncode:
            raise NotTried("mounting is not allowed here")

    def __exit__(self, *_):
        subprocess.run(["umount", "-l", str(self.path)], check=False)


def a_full_disk(reference, path, stage, room):
    """A disk with too little room, in KiB: the stage says so; with more room it goes on."""
    with mounted(path, f"size={room}k"):
        workdir = OnDisk(path / "run")
        options = inputs_of(reference) if stage != "train_tokenizer" else []
        if stage in ("sample", "evaluate"):
            options = [*inputs_of(reference), f"--config.inputs.transformer={reference / 'train'}"]
        if stage in ("rearrange_codebook", "extract_codes"):
            options = [f"--config.inputs.tokenizer={reference / 'tokenizer'}"]
        if stage == "evaluate":
            subprocess.run(["mount", "-o", "remount,size=400m", str(path)], check=True)
            run("sample", workdir, *options)
            used = int(subprocess.run(["du", "-sk", str(path)], capture_output=True, text=True).stdout.split()[0])
            subprocess.run(["mount", "-o", f"remount,size={used + room}k", str(path)], check=True)
        done = run(stage, workdir, *options, check=False)
        said = assert_refused(done, "no space left")
        assert not [name for name in workdir.names() if name.endswith(".partial")]
        subprocess.run(["mount", "-o", "remount,size=400m", str(path)], check=True)
        run(stage, workdir, *options)
        return compared(reference, workdir, stage, said=said)


def a_disk_that_becomes_read_only(reference, path):
    """The right to write checkpoints goes away while a stage runs."""
    with mounted(path, "size=400m"):
        workdir = OnDisk(path / "run")
        options = inputs_of(reference)
        process = begin("train", workdir, *options)
        saved = workdir.path / "train" / "checkpoints"
        wait_until(lambda: (saved / "10").exists() or process.poll() is not None, pause=0.002)
        # Files that are open for writing keep a mount from becoming read-only; those of a frozen process do not close.
        done = subprocess.run(["chattr", "-R", "+i", str(saved)], check=False, capture_output=True)
        if done.returncode:
            process.kill()
            process.communicate()
            raise NotTried("this file system has no immutable files")
        output, _ = process.communicate(timeout=120)
        subprocess.run(["chattr", "-R", "-i", str(saved)], check=True)
        assert process.returncode == 2, output
        assert "not permitted" in output or "denied" in output, output
        assert "Traceback" not in output, output
        run("train", workdir, *options)
        return compared(reference, workdir, "train", said=said_last(output))


def finished_on_a_read_only_disk(reference, path):
    """Nothing is left to do, and nothing is written: each stage says that it is done."""
    with mounted(path, "size=400m"):
        workdir = OnDisk(path / "run")
        workdir.take(reference)
        subprocess.run(["mount", "-o", "remount,ro", str(path)], check=True)
        output = run("pipeline", workdir).stdout
        assert output.count("done, in") == 6, output
        return Outcome(said=re.findall(r".*done, in.*", output)[-1])


def flushed_before_it_is_renamed(reference, workdir, stage, trace):
    """Every rename comes after an fsync of the file, and before one of its directory, as strace sees it."""
    before(workdir, reference, stage)
    import os

    from tests.stages import ROOT, command, environment

    try:
        subprocess.run(
            ["strace", "-f", "-y", "-e", "trace=fsync,fdatasync,rename,renameat,renameat2", "-o", str(trace),
             *command(stage, workdir.address, *OPTIONS)],
            cwd=ROOT, env=environment(), check=True, capture_output=True,
        )  # fmt: skip
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        raise NotTried("strace is not here, or may not trace") from error
    flushed, waiting, late = set(), {}, []
    for line in trace.read_text().splitlines():
        sync = re.search(r"f(?:data)?sync\(\d+<(.+?)>\)\s+= 0", line)
        if sync:
            flushed.add(sync[1])
            waiting = {target: source for target, source in waiting.items() if os.path.dirname(target) != sync[1]}
        rename = re.search(r'rename(?:at2?)?\((?:[^"]*, )?"(.+?)", (?:[^"]*, )?"(.+?)"', line)
        if rename and "lock.json" not in rename[2] and str(workdir.path) in rename[2]:
            waiting[rename[2]] = rename[1]
            if rename[1] not in flushed:
                late.append(rename[1])
    assert not late, late
    assert not waiting, waiting
    return compared(reference, workdir, stage, said=f"{len(flushed)} files and directories flushed")
