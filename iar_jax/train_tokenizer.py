"""Stage 1: images -> VQ tokenizer.

python -m iar_jax.train_tokenizer --config=configs/mnist.py --workdir=runs/mnist
"""

import functools
from collections.abc import Callable

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from iar_jax.config import command_line
from iar_jax.config.relevance import relevant
from iar_jax.data import image_grids, loader, preprocessing
from iar_jax.data.images import ImageDataset, open_images
from iar_jax.data.preprocessing import AUGMENTATIONS
from iar_jax.interop.lpips import load_lpips
from iar_jax.models.discriminator import PatchDiscriminator
from iar_jax.models.tokenizer import build_tokenizer, load_tokenizer
from iar_jax.models.vqgan import VQModel
from iar_jax.runtime import artifacts, checkpoint, distributed, sharding
from iar_jax.runtime.errors import refusal
from iar_jax.runtime.progress import say
from iar_jax.training import tokenizer_steps
from iar_jax.training.loop import TrainingRun
from iar_jax.training.optimizer import optimizer_of
from iar_jax.training.state import TokenizerState, skip_unless_finite, state_shardings

READS = ("seed", "mesh", "data", "tokenizer", "tokenizer_training")
MADE_BY = ("seed", "data", "tokenizer", "tokenizer_training")


def run(config: ConfigDict, workdir: epath.Path, thorough: bool = False) -> None:
    """Trains the tokenizer of config.tokenizer and leaves it in workdir/tokenizer.

    A thorough run reads a finished one's weights, and trains on from the checkpoint before where they are damaged.
    """
    directory = workdir / "tokenizer"
    made_by, mesh = relevant(config, MADE_BY), sharding.make_mesh(**config.mesh)
    if artifacts.finished(directory, made_by, {}, lambda: contents_of(config, open_images(config.data))):
        problem = refusal(lambda: load_tokenizer(directory, mesh)) if thorough else ""
        if not problem:
            say(f"train_tokenizer: done, in {directory}")
            return
        say(f"WARNING: {problem}")
    section = config.tokenizer_training
    sharding.check_batch_size(mesh, section.batch_size, "config.tokenizer_training.batch_size")
    images = open_images(config.data)
    contents = contents_of(config, images)
    model, discriminator, init, make_step = make_steps(config)
    key = jax.random.key(config.seed)

    with (
        sharding.use_mesh(mesh),
        TrainingRun.of(section, directory, "train_tokenizer") as training,
    ):
        command_line.save_config(config, workdir)
        if artifacts.begin(directory, "train_tokenizer", made_by, {"images": images.fingerprint}, contents):
            artifacts.reopen(directory)
        state, shardings = sharding.initialise_sharded(init, mesh, key, shardings_of=state_shardings)
        state = training.resume(state, checkpoint.abstract_tree(state, shardings))
        compile_step = functools.partial(
            jax.jit, donate_argnums=0, out_shardings=(shardings, sharding.replicated(mesh))
        )
        plain_step = compile_step(make_step(adversarial=False))
        adversarial_step = compile_step(make_step(adversarial=True)) if discriminator else plain_step
        tend = codebook_care(model, config, images, key, shardings)
        evaluate = jax.jit(tokenizer_steps.make_tokenizer_eval_step(model), out_shardings=sharding.replicated(mesh))
        part, num_parts = sharding.local_part(mesh)
        batches = loader.train_batches(
            images.train,
            functools.partial(augment, config.data),
            seed=config.seed,
            batch_size=section.batch_size,
            first_step=training.step,
            part=part,
            num_parts=num_parts,
        )

        def validated(state: TokenizerState) -> tuple[dict, np.ndarray, np.ndarray]:
            return validate(evaluate, state.ema_params, images, mesh, section.batch_size)

        for step in training.steps():
            batch = sharding.global_batch(mesh, training.next_batch(batches)["image"])
            state = tend(state, batch, step)
            train_step = adversarial_step if step >= section.adversarial_from_step else plain_step
            state, metrics = train_step(state, batch)
            training.finished_step(state, metrics, lambda state: validated(state)[0])
        figures, originals, reconstructions = validated(state)
        about = {"seconds": training.seconds, "unreadable": list(images.unreadable)}
        figures = training.log_validation(figures) | about
        path = directory / "samples" / f"reconstructions-{section.num_steps:07d}.png"
        write_pairs(path, originals[:10], reconstructions[:10])
        training.wait_until_saved()
        artifacts.finish(directory, artifacts.fingerprint_arrays(distributed.to_host(state.ema_params)), figures)
    say(
        f"train_tokenizer: PSNR {figures['psnr']:.2f} dB, {figures['codebook_usage']:.1%} of the codebook used on val; "
        f"pictures in {path}"
    )


def contents_of(config: ConfigDict, images: ImageDataset) -> dict[str, str]:
    """Fingerprints of what the config's paths name."""
    section = config.tokenizer_training
    files = {name: section[name] for name in ("vgg_weights", "lpips_weights") if section[name]}
    return {"images": images.fingerprint, **{n: artifacts.sha256_of(epath.Path(p)) for n, p in files.items()}}


def make_steps(config: ConfigDict) -> tuple[VQModel, PatchDiscriminator | None, Callable, Callable]:
    """The tokenizer of a config, its discriminator (None where the adversarial loss is off), how its state begins (a
    function of a key), and `make_step(adversarial=...)`, which makes its train step."""
    section = config.tokenizer_training
    model = build_tokenizer(config.tokenizer)
    discriminator = None
    if section.adversarial_weight > 0.0:
        discriminator = PatchDiscriminator(section.discriminator_channels, section.discriminator_layers)
    perceptual_distance = None
    if section.perceptual_weight > 0.0:
        perceptual_distance = load_lpips(section.vgg_weights, section.lpips_weights)
    optimizer = optimizer_of(section)
    init = functools.partial(
        tokenizer_steps.init_tokenizer_state,
        model=model,
        discriminator=discriminator,
        optimizer=optimizer,
        resolution=config.data.resolution,
    )
    make_train_step = functools.partial(
        tokenizer_steps.make_tokenizer_train_step,
        model,
        discriminator,
        optimizer,
        tokenizer_steps.TokenizerLossWeights(
            l1=section.l1_weight,
            l2=section.l2_weight,
            perceptual=section.perceptual_weight,
            codebook=section.codebook_weight,
            commitment=section.commitment_weight,
            entropy=section.entropy_weight,
            adversarial=section.adversarial_weight,
        ),
        perceptual_distance=perceptual_distance,
        ema_decay=section.ema_decay,
        usage_decay=0.99,
        quantize_from_step=section.quantize_from_step,
    )

    def make_step(*, adversarial: bool) -> Callable:
        step = make_train_step(adversarial=adversarial)
        return skip_unless_finite(step) if section.max_skipped_steps else step

    return model, discriminator, init, make_step


def codebook_care(model: VQModel, config: ConfigDict, images: ImageDataset, key, shardings) -> Callable:
    """(state, batch, step) -> state: seeds the codebook from encoder outputs and restarts codes that are hardly used,
    at the steps that config.tokenizer_training says."""
    section = config.tokenizer_training
    seed = jax.jit(functools.partial(tokenizer_steps.seed_codebook, model), out_shardings=shardings)
    restart = jax.jit(
        functools.partial(tokenizer_steps.restart_dead_codes, model, dead_below=section.dead_below),
        out_shardings=shardings,
    )

    def tend(state, batch, step):
        if step == section.quantize_from_step and step > 0:
            state = seed(state, seed_images(config, images), jax.random.fold_in(key, step))
        if (
            section.restart_every
            and section.quantize_from_step < step < section.restart_until_step
            and step % section.restart_every == 0
        ):
            state = restart(state, batch, jax.random.fold_in(key, step))
        return state

    return tend


def write_pairs(path: epath.Path, originals: np.ndarray, reconstructions: np.ndarray) -> None:
    """Images above their reconstructions, as a PNG."""
    pairs = np.stack([originals, reconstructions]).reshape(-1, *originals.shape[1:])
    scale = image_grids.scale_to_see(originals.shape[1])
    image_grids.write_png(path, image_grids.image_grid(pairs, columns=len(originals), scale=scale))


def augment(section: ConfigDict, record: dict, rng: np.random.Generator) -> dict:
    """A training image in [-1, 1], moved or cropped as config.data says."""
    pixels = AUGMENTATIONS[section.augmentation].of_tokenizer(record["image"], section, rng)
    return {"image": preprocessing.to_unit_range(pixels), "image_id": record["image_id"]}


def seed_images(config: ConfigDict, images: ImageDataset) -> np.ndarray:
    """The training pictures, the same in every run, whose encoder outputs become the first codes."""
    count = min(config.tokenizer_training.seed_images, len(images.train))
    chosen = np.random.default_rng(config.seed).permutation(len(images.train))[:count]
    return np.stack([preprocessing.to_unit_range(images.train[int(i)]["image"]) for i in chosen])


def validate(evaluate, params, images: ImageDataset, mesh, batch_size: int) -> tuple[dict, np.ndarray, np.ndarray]:
    """PSNR and codebook use over the val split, and its first batch before and after the tokenizer, uint8."""
    psnrs: list[np.ndarray] = []
    firsts: list[np.ndarray] = []
    counts = np.zeros(())
    for batch in loader.eval_batches(images.val, batch_size):
        inputs = {"image": preprocessing.to_unit_range(batch["image"]), "valid": batch["valid"]}
        inputs = sharding.global_batch(mesh, sharding.part_of(mesh, inputs))
        reconstructions, psnr, uses = evaluate(params, inputs["image"], inputs["valid"])
        psnrs.append(np.asarray(psnr)[batch["valid"]])
        counts = counts + np.asarray(uses)
        if not firsts:
            firsts = [batch["image"][batch["valid"]], preprocessing.to_uint8(reconstructions)[batch["valid"]]]
    share = counts / counts.sum()
    figures = {
        "psnr": float(np.concatenate(psnrs).mean()),
        "codebook_usage": float(np.mean(counts > 0)),
        "codebook_perplexity": float(np.exp(-np.sum(share[share > 0] * np.log(share[share > 0])))),
    }
    return figures, firsts[0], firsts[1]


if __name__ == "__main__":
    command_line.main(functools.partial(run, thorough=True), READS)
