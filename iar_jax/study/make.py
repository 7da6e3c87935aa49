"""One run of a study, with what it shares with others: made where it is not there, whole and in any order."""

import functools
import hashlib
import json
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from iar_jax import extract_codes, rearrange_codebook, sample, train, train_tokenizer
from iar_jax.config.relevance import RelevantConfig, relevant
from iar_jax.data.array_files import RowReader, read_array
from iar_jax.generators.settings import samples_name
from iar_jax.metrics.features import ClassifierFeatures
from iar_jax.runtime import artifacts, lock, metric_log
from iar_jax.runtime.errors import UserError
from iar_jax.runtime.files import read_bytes, write_json
from iar_jax.runtime.progress import say
from iar_jax.study import judge as judging
from iar_jax.study.perturbed import perturbed_distances
from iar_jax.study.plan import MEASURED, Arm, Plan, Run, comparison_runs, digest, lowest, tuning_runs, twin_of
from iar_jax.training.loop import Diverged

# Between two looks at what another process is making.
PAUSE_SECONDS = 2.0

# Beside the training of a tuning run whose learning rate is too high: what stopped it.
DIVERGED_FILE = "diverged.json"


class Unfinished(UserError):
    """Something that others depend on is not there yet."""


class Tuned(NamedTuple):
    """What was chosen for an arm on the tuning seeds, and from what.

    Attributes:
        rates: (learning rate, seed, last value of the criterion); empty where it is fixed.
        guidance: (cfg_scale, Fréchet distance); empty where it is fixed.
        seconds: that the tuning runs, and the samples of them, took; runs that another arm tuned with are that one's.
    """

    learning_rate: float
    cfg_scale: float
    rates: tuple[tuple[float, int, float], ...] = ()
    guidance: tuple[tuple[float, float], ...] = ()
    seconds: float = 0.0

    def at_edge(self) -> bool:
        """Whether the best rate is the first or the last of several: a better one may lie beyond."""
        tried = {rate for rate, _, _ in self.rates}
        return len(tried) > 1 and self.learning_rate in (min(tried), max(tried))


def made(directory: epath.Path, finished: Callable[[], bool], make: Callable[[], None]) -> None:
    """Makes what is not finished, or waits for the process that is making it."""
    said = False
    while not finished():
        try:
            with lock.hold(directory):
                if not finished():
                    make()
            return
        except lock.InUse as error:
            if not said:
                say(f"waiting: {error}")
            said = True
            time.sleep(PAUSE_SECONDS)


def tokens_directory(config: ConfigDict, workdir: epath.Path) -> epath.Path:
    """The workdir of a tokenizer and the codes that it makes."""
    return workdir / "shared" / f"tokens-{digest(config, 'seed', 'data', 'tokenizer', 'tokenizer_training', 'codes')}"


def judge_directory(config: ConfigDict, workdir: epath.Path) -> epath.Path:
    """Where the features of the training images lie, and what they are taken with."""
    return workdir / "shared" / f"judge-{digest(config, 'seed', 'data', 'evaluation')}"


def shared_inputs(config: ConfigDict, workdir: epath.Path) -> dict[str, str]:
    """config.inputs of an arm's runs: as the study's config gives them, or where `make_shared` puts them."""
    tokens = tokens_directory(config, workdir)
    places = {"tokenizer": tokens, "codes": tokens, "codebook": tokens / f"partition-{digest(config, 'codebook')}"}
    return {name: config.inputs[name] or str(place / name) for name, place in places.items()}


def config_of(run: Run, workdir: epath.Path) -> ConfigDict:
    """The config that a run's stages are called with."""
    return given(run.config, **shared_inputs(run.arm.config, workdir))


def place_of(config: ConfigDict, workdir: epath.Path, name: str) -> epath.Path:
    """Where one of the inputs of an arm's runs lies; names are those of artifacts.INPUTS."""
    return artifacts.locate(given(config, **shared_inputs(config, workdir)).inputs, workdir, name)


def input_finished(config: ConfigDict, workdir: epath.Path, *names: str) -> bool:
    """Whether some of what an arm shares is there; names are those of artifacts.INPUTS."""
    return all(artifacts.read_finished(place_of(config, workdir, name)) is not None for name in names)


def judge_of(config: ConfigDict, workdir: epath.Path) -> judging.Judge:
    """The judge of an arm's samples.

    Raises:
        UserError: it, or the codes that say how many classes there are, is not there or damaged.
    """
    codes = artifacts.require(place_of(config, workdir, "codes"), "extract_codes")
    return judging.read_judge(config, judge_directory(config, workdir), len(codes.figures["class_names"]))


def perturbed_path(config: ConfigDict, workdir: epath.Path) -> epath.Path:
    """The file with what `perturbed_distances` finds."""
    tokens, judge = tokens_directory(config, workdir), judge_directory(config, workdir)
    of = (tokens.name.partition("-")[2], digest(config, "codebook"), judge.name.partition("-")[2])
    return workdir / "shared" / f"perturbed-{'-'.join(of)}" / "found.json"


def perturbed_of(config: ConfigDict, workdir: epath.Path) -> list[dict[str, Any]] | None:
    """What `perturbed_distances` found for the partition of a config; None before it has."""
    content = read_bytes(perturbed_path(config, workdir))
    return json.loads(content) if content is not None else None


def shared_finished(arm: Arm, workdir: epath.Path) -> bool:
    """Whether all that an arm shares is there."""
    inputs = ("tokenizer", "codes", "val_codes", "codebook")
    judge = judging.is_made(arm.config, judge_directory(arm.config, workdir))
    return input_finished(arm.config, workdir, *inputs) and judge and perturbed_path(arm.config, workdir).exists()


def make_shared(arm: Arm, workdir: epath.Path) -> None:
    """The tokenizer, codes and partition of an arm, and the judge of its samples."""
    config, inputs = arm.config, shared_inputs(arm.config, workdir)
    tokens, judge = tokens_directory(config, workdir), judge_directory(config, workdir)
    partition = epath.Path(inputs["codebook"]).parent

    def make_tokens() -> None:
        if not config.inputs.tokenizer:
            train_tokenizer.run(config, tokens)
        if not config.inputs.codes:
            extract_codes.run(given(config, tokenizer=inputs["tokenizer"]), tokens)

    def make_partition() -> None:
        rearrange_codebook.run(given(config, tokenizer=inputs["tokenizer"]), partition)

    def make_judge() -> None:
        judging.make_judge(config, judge)

    def make_perturbed() -> None:
        found = perturbed_distances(given(config, **inputs), judge_of(config, workdir))
        write_json(perturbed_path(config, workdir), found)

    made(tokens, lambda: input_finished(config, workdir, "tokenizer", "codes", "val_codes"), make_tokens)
    if not config.inputs.codebook:
        made(partition, lambda: input_finished(config, workdir, "codebook"), make_partition)
    made(judge, lambda: judging.is_made(config, judge), make_judge)
    path = perturbed_path(config, workdir)
    made(path.parent, lambda: path.exists(), make_perturbed)


def given(config: ConfigDict, **inputs: str) -> ConfigDict:
    """A config with some of its inputs at other places."""
    changed = config.copy_and_resolve_references()
    changed.inputs.update(inputs)
    return changed


def make_tuning_run(run: Run, workdir: epath.Path) -> None:
    """Trains a run whose learning rate is one of those to choose from; too high a rate is an answer, too."""
    directory = workdir / "runs" / run.place

    def train_it() -> None:
        try:
            train.run(config_of(run, workdir), directory)
        except Diverged as error:
            say(f"WARNING: {error}; the rate counts as the worst")
            write_json(directory / DIVERGED_FILE, {"error": str(error)})

    made(directory, lambda: tuning_value(run, workdir) is not None, train_it)


def tuning_value(run: Run, workdir: epath.Path) -> float | None:
    """The last value of the criterion, infinite where the run diverged; None where it is not finished."""
    directory = workdir / "runs" / run.place
    if (directory / DIVERGED_FILE).exists():
        return math.inf
    found = artifacts.read_finished(directory / "train")
    return found.figures[run.config.study.criterion] if found is not None else None


def tuned_rate(arm: Arm, workdir: epath.Path) -> tuple[float, list[tuple[float, int, float]]]:
    """The learning rate that an arm's tuning runs choose, and what they ended with.

    Raises:
        Unfinished: one of them is not there.
        UserError: each rate diverged with some seed.
    """
    found = []
    for run in tuning_runs(arm):
        value = tuning_value(run, workdir)
        if value is None:
            raise Unfinished(f"the run {run.name} is not finished; --run={run.name} makes it")
        found.append((run.config.training.learning_rate, run.seed, value))
    if not found:
        return float(arm.config.training.learning_rate), []
    best = lowest([(rate, value) for rate, _, value in found])
    if any(rate == best and math.isinf(value) for rate, _, value in found):
        rates = ", ".join(f"{rate:g}" for rate in dict.fromkeys(rate for rate, _, _ in found))
        raise UserError(f"{arm.name}: the loss is not finite at any of the learning rates {rates}; give lower ones")
    return best, found


def make_guidance(arm: Arm, workdir: epath.Path) -> None:
    """Samples the arm's first tuning run with its best rate at each scale of guidance, and scores that."""
    directory = guidance_directory(arm, workdir)
    made(directory, lambda: artifact_of(directory) is not None, functools.partial(measure_guidance, arm, workdir))


def guided_run(arm: Arm, workdir: epath.Path) -> Run:
    """The tuning run that guidance is chosen on."""
    rate, _ = tuned_rate(arm, workdir)
    return next(run for run in tuning_runs(arm) if run.learning_rate == rate)


def guidance_directory(arm: Arm, workdir: epath.Path) -> epath.Path:
    section, run = arm.config.study, guided_run(arm, workdir)
    asked = hashlib.sha256(json.dumps([list(section.cfg_scales), section.cfg_images]).encode()).hexdigest()[:8]
    return workdir / "runs" / run.place / f"guidance-{digest(run.config, *MEASURED)}-{asked}"


def measure_guidance(arm: Arm, workdir: epath.Path) -> None:
    run = guided_run(arm, workdir)
    config, place, start = config_of(run, workdir), workdir / "runs" / run.place, time.monotonic()
    config.sampling.num_images = config.study.cfg_images
    judge = judge_of(arm.config, workdir)
    found = []
    for scale in config.study.cfg_scales:
        config.sampling.cfg_scale = scale
        samples, _ = sampled(config, place, judge)
        found.append((scale, judging.frechet_distance(judge, samples)))
        say(f"guidance {scale:g}: Fréchet distance {found[-1][1]:.3f}")
    figures = {"guidance": found, "seconds": time.monotonic() - start}
    keep(guidance_directory(arm, workdir), relevant(config, MEASURED), place, figures)


def tuned(arm: Arm, workdir: epath.Path) -> Tuned:
    """What the tuning runs of an arm choose; the config's own values where nothing is tuned.

    Raises:
        Unfinished: one of them is not there.
        UserError: each rate diverged with some seed.
    """
    rate, rates = tuned_rate(arm, workdir)
    trainings = [artifacts.read_finished(workdir / "runs" / run.place / "train") for run in tuning_runs(arm)]
    own = arm.trained_as == arm.name
    seconds = sum(training.figures["seconds"] for training in trainings if training is not None) if own else 0.0
    if len(arm.config.study.cfg_scales) < 2:
        return Tuned(rate, float(arm.config.sampling.cfg_scale), tuple(rates), seconds=seconds)
    found = artifact_of(guidance_directory(arm, workdir))
    if found is None:
        raise Unfinished(f"the guidance of {arm.name} is not chosen; --run={arm.name}/guidance does that")
    guidance = tuple((scale, distance) for scale, distance in found.figures["guidance"])
    return Tuned(rate, lowest(guidance), tuple(rates), guidance, seconds + found.figures.get("seconds", 0.0))


def make_run(run: Run, workdir: epath.Path) -> None:
    """Trains a run, samples it, and leaves what was measured."""
    directory = workdir / "runs" / run.place
    made(directory, lambda: result_of(run, workdir) is not None, functools.partial(measure_run, run, workdir))


def measure_run(run: Run, workdir: epath.Path) -> None:
    """Trains, samples and scores; leaves the result as an artifact."""
    directory, config = workdir / "runs" / run.place, config_of(run, workdir)
    train.run(config, directory, thorough=True)
    start = time.monotonic()
    judge = judge_of(run.arm.config, workdir)
    trained = artifacts.require(directory / "train", "train").figures
    section, along = config.study, []
    every = section.sample_every
    for step in range(every, config.training.num_steps, every) if every else ():
        config.sampling.step, config.sampling.num_images = step, section.curve_images
        samples, labels = sampled(config, directory, judge)
        along.append({"step": step, **judging.scores(judge, samples, labels)})
    config.sampling.step, config.sampling.num_images = 0, run.config.sampling.num_images
    samples, labels = sampled(config, directory, judge)
    last = judging.scores(judge, samples, labels)
    if every:
        # Image i is the same however many there are: the last point has as many as those before it.
        few = ClassifierFeatures(*(part[: section.curve_images] for part in samples))
        scored = judging.scores(judge, few, labels[: section.curve_images])
        along.append({"step": config.training.num_steps, **scored})
    result = {
        "learning_rate": config.training.learning_rate,
        "cfg_scale": config.sampling.cfg_scale,
        "validation": validations(directory),
        "samples": along,
        "scores": last,
        "grid": str(samples_place(config, directory).relative_to(workdir) / "grid.png"),
        "num_params": trained["num_params"],
        "training_seconds": trained["seconds"],
        "measuring_seconds": time.monotonic() - start,
    }
    keep(result_directory(run, workdir), relevant(config, MEASURED), directory, result)


def validations(directory: epath.Path) -> list[dict[str, float]]:
    """Losses and accuracies of a finished training on val, step by step."""
    lines = [line for line in metric_log.read_metrics(directory / "train") if any(n.startswith("val/") for n in line)]
    return [{name.removeprefix("val/"): found for name, found in line.items()} for line in lines]


def samples_place(config: ConfigDict, directory: epath.Path) -> epath.Path:
    """Where `sample` leaves the samples of a run at config.sampling."""
    step = config.sampling.step or config.training.num_steps
    return directory / "samples" / samples_name(config.sampling, step)


def sampled(config: ConfigDict, directory: epath.Path, judge: judging.Judge) -> tuple[ClassifierFeatures, np.ndarray]:
    """Features of the samples of config.sampling, which are made, and their labels."""
    sample.run(config, directory)
    place = samples_place(config, directory)
    return judge.features_of(RowReader(place / "samples.npz")), read_array(place / "labels.npy")


def result_directory(run: Run, workdir: epath.Path) -> epath.Path:
    section = run.config.study
    asked = hashlib.sha256(json.dumps([section.sample_every, section.curve_images]).encode()).hexdigest()[:8]
    return workdir / "runs" / run.place / f"result-{digest(run.config, *MEASURED)}-{asked}"


def keep(directory: epath.Path, made_by: RelevantConfig, run: epath.Path, figures: dict[str, Any]) -> None:
    """Leaves figures as a finished artifact, tied to the weights that they are of."""
    given = {"transformer": artifacts.require(run / "train", "train").fingerprint}
    if directory.exists():
        artifacts.clear(directory)  # what is damaged
    artifacts.begin(directory, "study", made_by, given)
    artifacts.finish(directory, hashlib.sha256(json.dumps(figures).encode()).hexdigest(), figures)


def artifact_of(directory: epath.Path) -> artifacts.Metadata | None:
    """A finished artifact that `keep` left, and whose run is still there; says where it is damaged."""
    found, run = artifacts.read_finished(directory), artifacts.read_finished(directory.parent / "train")
    if found is None:
        return None
    sound = hashlib.sha256(json.dumps(found.figures).encode()).hexdigest() == found.fingerprint
    if not sound or run is None or found.inputs.get("transformer") != run.fingerprint:
        what = "its training is gone or another one" if sound else "its figures are not those that were measured"
        say(f"WARNING: {directory}: {what}; the run is made again")
        return None
    return found


def result_of(run: Run, workdir: epath.Path) -> dict[str, Any] | None:
    """What was measured of a run; None where it is not finished, or damaged."""
    found = artifact_of(result_directory(run, workdir))
    return found.figures if found is not None else None


def run_of(plan: Plan, arm: Arm, seed: int, workdir: epath.Path) -> Run:
    """A run that counts, with the rate and guidance that are chosen for its arm."""
    found = tuned(twin_of(plan, arm) or arm, workdir)
    runs = comparison_runs(plan, arm, found.learning_rate, found.cfg_scale)
    return next(run for run in runs if run.seed == seed)
