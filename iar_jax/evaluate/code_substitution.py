"""What a wrong code costs: codes of val images are replaced by others, near and far ones."""

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from iar_jax.codebook.code_distance import change, first_visible_rank, num_decodings, substitution_study
from iar_jax.data import image_grids, preprocessing
from iar_jax.data.codes import read_permutation
from iar_jax.data.images import open_images
from iar_jax.interop.lpips import available as lpips_available
from iar_jax.interop.lpips import load_lpips
from iar_jax.metrics import code_substitution_report, features
from iar_jax.models.quantizer import normalize
from iar_jax.models.tokenizer import load_tokenizer
from iar_jax.runtime import artifacts, sharding
from iar_jax.runtime.files import write_bytes, write_json
from iar_jax.runtime.progress import progress, say


def run(config: ConfigDict, workdir: epath.Path) -> None:
    """Replaces codes of val images by others, and leaves report.html, pictures.png and figures.json in
    workdir/code_distance."""
    directory = workdir / "code_distance"
    inputs = artifacts.open_inputs(config.inputs, workdir, "tokenizer", "codebook")
    model, params, _ = load_tokenizer(inputs["tokenizer"].directory, sharding.make_mesh(**config.mesh))
    permutation = read_permutation(inputs["codebook"])
    images = open_images(config.data)
    count = min(config.evaluation.code_distance_images, len(images.val))
    # From all over the split, which may be sorted by class.
    chosen = np.linspace(0, len(images.val) - 1, count).round().astype(int)
    originals = np.stack([images.val[i]["image"] for i in chosen.tolist()])

    batch_size = min(config.evaluation.batch_size, count)
    encode = jax.jit(lambda batch: model.apply({"params": params}, batch, method="encode"))
    decode = jax.jit(lambda codes: model.apply({"params": params}, codes, method="decode_codes"))
    perceptual_distance = None
    weights = config.tokenizer_training
    if lpips_available(weights.vgg_weights, weights.lpips_weights):
        lpips = jax.jit(load_lpips(weights.vgg_weights, weights.lpips_weights))

        def perceptual_distance(first, second):
            def of_pairs(pairs):
                return np.ravel(lpips(*(preprocessing.to_unit_range(pairs[:, i]) for i in range(2))))

            return float(np.mean(features.in_batches(of_pairs, np.stack([first, second], axis=1), batch_size)))

    with progress("replacing codes", count * num_decodings(model.codebook_size), "pictures") as shown:

        def decoded(codes):
            found = features.in_batches(lambda part: preprocessing.to_uint8(decode(part)), codes, batch_size)
            shown.update(count)
            return found

        codes = features.in_batches(lambda part: encode(preprocessing.to_unit_range(part)), originals, batch_size)
        reconstructions = decoded(codes)
        codebook = np.asarray(normalize(params["quantizer"]["codebook"]))
        rng = np.random.default_rng(config.seed)
        substitutions = substitution_study(
            codes, reconstructions, codebook, permutation, decoded, perceptual_distance, rng
        )
    own_error = change(originals, reconstructions, perceptual_distance)
    visible = first_visible_rank(substitutions, own_error)

    directory.mkdir(parents=True, exist_ok=True)
    table = code_substitution_report.figures_table(substitutions, own_error)
    figures = {
        "images": count,
        "first_visible_rank": visible,
        "tokenizer": own_error._asdict(),
        "substitutions": [{"rank": s.rank, "title": s.title, **s.change._asdict()} for s in substitutions],
    }
    title = f"Code distance on {images.name}"
    page = code_substitution_report.page(title, originals, reconstructions, substitutions, own_error, visible)
    grid, rows = code_substitution_report.picture(originals, reconstructions, substitutions)
    image_grids.write_png(directory / "pictures.png", grid)
    write_json(directory / "figures.json", figures)
    write_bytes(directory / "report.html", page.encode(errors="replace"))
    say(f"{table.head[0]:32}" + "".join(f"{cell:>10}" for cell in table.head[1:]))
    for row in table.rows:
        say(f"{row[0]:32}" + "".join(f"{cell:>10}" for cell in row[1:]))
    say(code_substitution_report.verdict(visible, substitutions, own_error))
    say(f"pictures  {directory / 'pictures.png'} (from the top: {'; '.join(rows)})")
    say(f"report    {directory / 'report.html'}")
