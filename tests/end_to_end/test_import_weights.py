"""If these fail, imported weights are not what the other stages run, or a wrong mapping goes unnoticed."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from iar_jax.data.preprocessing import to_uint8
from iar_jax.generators.autoregressive.decoding import generate
from iar_jax.generators.autoregressive.transformer import Transformer
from iar_jax.generators.masked.generator import Masked
from iar_jax.generators.masked.transformer import MaskedTransformer
from iar_jax.interop import llamagen, maskgit
from iar_jax.interop.torch_files import read_torch_file
from iar_jax.runtime import sharding
from tests.stages import call

CONFIG = "configs/imagenet.py:B,256"

# The golden tokenizer: 32 pixels, 16 x 16 of 256 codes; and a small transformer for it.
OPTIONS = [
    "--config.data.resolution=32",
    "--config.tokenizer.channels=32",
    "--config.tokenizer.channel_multipliers=(1,2)",
    "--config.tokenizer.z_channels=32",
    "--config.tokenizer.codebook_size=256",
    "--config.codebook.cluster_sizes=(32,)",
    "--config.codes.crops=mirror",
    "--config.codes.batch_size=4",
    "--config.model.dim=32",
    "--config.model.num_layers=2",
    "--config.model.num_heads=4",
    "--config.model.dtype=float32",
    "--config.training.num_steps=2",
    "--config.training.batch_size=4",
    "--config.sampling.num_images=3",
    "--config.sampling.batch_size=3",
]


@pytest.fixture(scope="module")
def files(tmp_path_factory, golden):
    """A tokenizer as LlamaGen has it, IAR's reordered one with its mapping, and a transformer."""
    directory = tmp_path_factory.mktemp("files")
    _, params = llamagen.load_tokenizer(golden("vq_tiny.pt"))
    llamagen.save_tokenizer(params, directory / "vq.safetensors")
    mapping = np.random.default_rng(0).permutation(256)
    save_file({"mapping": mapping}, directory / "mapping.safetensors")
    reordered = np.empty_like(params["quantizer"]["codebook"])
    reordered[mapping] = params["quantizer"]["codebook"]
    llamagen.save_tokenizer(params | {"quantizer": {"codebook": reordered}}, directory / "reordered.safetensors")
    model = Transformer(256, 5, 16, 32, 2, 4, 256, init_std=0.2)
    labels, codes = jnp.zeros((1,), jnp.int32), jnp.zeros((1, 256), jnp.int32)
    params = sharding.unbox(model.init(jax.random.key(0), labels, codes))["params"]
    params |= {"head": 0.3 * jax.random.normal(jax.random.key(1), params["head"].shape)}
    llamagen.save_transformer(jax.device_get(params), directory / "gpt.safetensors")
    return directory


def importing(files, workdir, *arguments, **options):
    return call("import_weights", workdir, *OPTIONS, *arguments, config=CONFIG, **options)


@pytest.fixture(scope="module")
def imported(files, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "imported"
    importing(
        files,
        workdir,
        f"--tokenizer={files / 'vq.safetensors'}",
        f"--reordered_tokenizer={files / 'reordered.safetensors'}",
        f"--mapping={files / 'mapping.safetensors'}",
        f"--transformer={files / 'gpt.safetensors'}",
    )
    return workdir


@pytest.mark.slow
def test_samples_of_imported_weights_are_those_of_the_files(files, imported):
    call("sample", imported, *OPTIONS, config=CONFIG)
    (directory,) = (imported / "samples").iterdir()
    labels = np.load(directory / "labels.npy")
    model, params = llamagen.load_transformer(files / "gpt.safetensors", num_heads=4, grid_size=16)
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(0), i))(jnp.arange(3))
    codes = generate(model, jax.tree.map(jnp.asarray, params), labels, keys, cfg_scale=2.0)
    # IAR's transformer speaks the reordered ids: the reordered tokenizer decodes them as they are.
    vq, vq_params = llamagen.load_tokenizer(files / "reordered.safetensors")
    expected = vq.apply({"params": vq_params}, codes.reshape(-1, 16, 16), method="decode_codes")
    found = np.load(directory / "samples.npz")["arr_0"]
    assert np.abs(found.astype(int) - to_uint8(expected)).max() <= 1  # float32 convolutions round at their will


@pytest.mark.slow
def test_a_transformer_of_original_ids_is_rearranged_without_training(files, tmp_path):
    weights = [f"--tokenizer={files / 'vq.safetensors'}", f"--transformer={files / 'gpt.safetensors'}"]
    importing(files, tmp_path / "plain", *weights)
    importing(files, tmp_path / "rearranged", *weights, "--rearrange")
    for name in ("plain", "rearranged"):
        # The most likely codes: random bits belong to ids, and ids differ.
        call("sample", tmp_path / name, *OPTIONS, "--config.sampling.top_k=1", config=CONFIG)
    plain, rearranged = (
        np.load(next((tmp_path / name / "samples").iterdir()) / "samples.npz")["arr_0"]
        for name in ("plain", "rearranged")
    )
    np.testing.assert_array_equal(plain, rearranged)
    order = np.load(tmp_path / "rearranged" / "codebook" / "permutation.npz")["old_to_new"]
    assert (order != np.arange(256)).any()


@pytest.fixture(scope="module")
def masked_file(tmp_path_factory):
    """A masked transformer for the golden tokenizer's 256 codes, in the published form."""
    module = MaskedTransformer(256, 5, 16, 32, 2, 4, 256, mask_output=True)
    shapes = jax.eval_shape(lambda: sharding.unbox(Masked(module).init(jax.random.key(0))))
    leaves, structure = jax.tree.flatten(shapes)
    rng = np.random.default_rng(0)
    params = structure.unflatten([0.2 * rng.standard_normal(leaf.shape).astype(np.float32) for leaf in leaves])
    path = tmp_path_factory.mktemp("masked") / "masked.safetensors"
    maskgit.save_generator(params, path)
    return path


MASKED = ["--config.model.kind=masked", "--config.model.mask_output=true", "--config.sampling.mask_steps=4"]


@pytest.mark.slow
def test_a_masked_transformer_is_imported_rearranged_sampled_and_exported(files, masked_file, tmp_path):
    weights = [f"--tokenizer={files / 'vq.safetensors'}", f"--transformer={masked_file}", *MASKED]
    # The most likely codes: random bits belong to ids, and ids differ.
    draws = [*MASKED, "--config.sampling.top_k=1", "--config.sampling.mask_order=halton"]
    for name, more in (("plain", []), ("rearranged", ["--rearrange"])):
        importing(files, tmp_path / name, *weights, *more)
        call("sample", tmp_path / name, *OPTIONS, *draws, config=CONFIG)
    plain, rearranged = (
        np.load(next((tmp_path / name / "samples").iterdir()) / "samples.npz")["arr_0"]
        for name in ("plain", "rearranged")
    )
    np.testing.assert_array_equal(plain, rearranged)
    assert plain.std() > 0
    out = tmp_path / "out.safetensors"
    importing(files, tmp_path / "plain", f"--export={out}", *MASKED)
    expected, found = read_torch_file(masked_file), read_torch_file(out)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_a_kind_under_the_other_s_config_is_named(files, masked_file, tmp_path):
    tokenizer = f"--tokenizer={files / 'vq.safetensors'}"
    for file, options, said in (
        (masked_file, [], "it is a Halton-MaskGIT transformer: config.model.kind=masked reads it"),
        (files / "gpt.safetensors", MASKED, "it is a LlamaGen transformer: config.model.kind=autoregressive reads it"),
    ):
        done = importing(files, tmp_path / "run", tokenizer, f"--transformer={file}", *options, check=False)
        assert said in done.stderr
        assert done.returncode == 2
        assert not (tmp_path / "run" / "tokenizer").exists()


@pytest.mark.slow
def test_imported_weights_are_fine_tuned_on_a_folder(imported, tmp_path):
    for name in "abcde":
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(3):
            pixels = np.random.default_rng(i).integers(0, 256, (40, 36, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{i}.png")
    inputs = [f"--config.inputs.{name}={imported / name}" for name in ("tokenizer", "codebook")]
    data = f"--config.data.source=folder:{tmp_path / 'images'}"
    workdir = tmp_path / "tuned"
    call("extract_codes", workdir, *OPTIONS, *inputs, data, config=CONFIG)
    start = f"--config.inputs.transformer={imported / 'train'}"
    rate = "--config.training.learning_rate=1e-12"
    call("train", workdir, *OPTIONS, *inputs, data, start, rate, config=CONFIG)
    tuned = json.loads((workdir / "train" / "metadata.json").read_text())
    original = json.loads((imported / "train" / "metadata.json").read_text())
    assert tuned["inputs"]["transformer"] == original["fingerprint"]
    # With next to no learning rate the weights, and so the loss, are those that were imported, not a fresh head's.
    assert abs(tuned["figures"]["token_loss"] - np.log(256)) > 0.1
    done = call("train", tmp_path / "wide", *OPTIONS, *inputs, data, start, "--config.model.dim=64",
                f"--config.inputs.codes={workdir / 'codes'}", config=CONFIG, check=False)  # fmt: skip
    assert "is another model" in done.stderr
    assert done.returncode == 2


@pytest.mark.parametrize("what", ["transformer", "tokenizer", "rearranged_tokenizer"])
def test_what_goes_out_is_what_came_in(files, imported, tmp_path, what):
    out = tmp_path / "out.safetensors"
    importing(files, imported, f"--export={out}", f"--what={what}")
    source = {"transformer": "gpt", "tokenizer": "vq", "rearranged_tokenizer": "reordered"}[what]
    expected, found = read_torch_file(files / f"{source}.safetensors"), read_torch_file(out)
    if what != "transformer":
        assert found.pop("quantize.codebook_used").shape == (65536,)  # LlamaGen's strict loading asks for it
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_a_reordered_tokenizer_alone_is_put_back_in_order(files, imported, tmp_path):
    importing(
        files,
        tmp_path / "run",
        f"--reordered_tokenizer={files / 'reordered.safetensors'}",
        f"--mapping={files / 'mapping.safetensors'}",
    )
    fingerprints = [
        json.loads((path / "tokenizer" / "metadata.json").read_text())["fingerprint"]
        for path in (imported, tmp_path / "run")
    ]
    assert fingerprints[0] == fingerprints[1]


def broken_mapping(files, tmp_path, change):
    mapping = read_torch_file(files / "mapping.safetensors")["mapping"].copy()
    change(mapping)
    save_file({"mapping": mapping}, tmp_path / "broken.safetensors")
    return f"--mapping={tmp_path / 'broken.safetensors'}"


def swap(mapping):
    mapping[[3, 9]] = mapping[[9, 3]]


def repeat(mapping):
    mapping[7] = mapping[2]


def leave(mapping):
    mapping[5] = 256


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (swap, "code 3 should be code"),
        (repeat, "code 7 goes to"),
        (leave, r"code 5 goes to 256, which is outside [0, 256)"),
    ],
)
def test_a_wrong_mapping_is_refused_with_the_first_offending_id(files, tmp_path, change, message):
    done = importing(
        files,
        tmp_path / "run",
        f"--tokenizer={files / 'vq.safetensors'}",
        f"--reordered_tokenizer={files / 'reordered.safetensors'}",
        broken_mapping(files, tmp_path, change),
        check=False,
    )
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.returncode == 2
    assert not (tmp_path / "run" / "tokenizer").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --tokenizer=FILE"),
        (["--reordered_tokenizer={files}/reordered.safetensors"], "needs --mapping"),
        (["--tokenizer={files}/nowhere.pt"], "no such file"),
        (["--tokenizer={files}/gpt.safetensors"], "encoder.conv_in.weight is missing"),
        (
            [
                "--tokenizer={files}/vq.safetensors",
                "--transformer={files}/gpt.safetensors",
                "--config.model.num_layers=3",
            ],
            "config.model.num_layers is 3, and the file's model has 2",
        ),
        (
            ["--tokenizer={files}/vq.safetensors", "--mapping={files}/vq.safetensors"],
            "not hold a mapping of 256 ids",
        ),
        (
            ["--tokenizer={files}/vq.safetensors", "--config.tokenizer.z_channels=64"],
            "config.tokenizer.z_channels is 64, and the file's tokenizer has 32; set --config.tokenizer.z_channels=32",
        ),
        (["--export={files}/x.bin"], "is not there; run python -m iar_jax.train first"),
    ],
)
def test_wrong_files_are_refused(files, tmp_path, arguments, message):
    done = importing(files, tmp_path / "run", *[a.format(files=files) for a in arguments], check=False)
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.returncode == 2


def test_a_second_import_does_not_overwrite_the_first(files, imported, tmp_path):
    shutil.copytree(imported, tmp_path / "copy")
    done = importing(files, tmp_path / "copy", f"--tokenizer={files / 'vq.safetensors'}", check=False)
    assert "is there already" in done.stderr
    assert done.returncode == 2


@pytest.mark.slow
def test_an_import_that_failed_leaves_nothing_and_one_that_was_made_is_found(files, tmp_path):
    weights = [f"--tokenizer={files / 'vq.safetensors'}", f"--transformer={files / 'gpt.safetensors'}"]
    broken = read_torch_file(files / "gpt.safetensors")
    broken["output.weight"][3, 4] = np.nan
    save_file(broken, tmp_path / "nan.safetensors")
    done = importing(files, tmp_path / "run", weights[0], f"--transformer={tmp_path / 'nan.safetensors'}", check=False)
    assert "are not finite: output.weight (1 of 8,192)" in done.stderr
    assert done.returncode == 2
    assert not any((tmp_path / "run" / name).exists() for name in ("tokenizer", "codebook", "train"))
    # One that was killed while it wrote the transformer.
    importing(files, tmp_path / "run", *weights)
    train = tmp_path / "run" / "train"
    for name in ("metadata.json", "metadata.copy.json"):
        content = json.loads((train / name).read_text())
        (train / name).write_text(json.dumps(content | {"finished": False, "fingerprint": ""}))
    importing(files, tmp_path / "run", *weights)
    assert json.loads((train / "metadata.json").read_text())["finished"]
    made = [(path.stat().st_mtime_ns, path) for path in sorted(train.glob("checkpoints/**/*"))]
    importing(files, tmp_path / "run", *weights)
    assert [(path.stat().st_mtime_ns, path) for path in sorted(train.glob("checkpoints/**/*"))] == made


@pytest.mark.slow
def test_the_pipeline_goes_on_from_imported_weights(imported, tmp_path):
    shutil.copytree(imported, tmp_path / "run")
    for name in "abcde":
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (33, 40), (50 * i, 80, 10)).save(tmp_path / "images" / name / f"{i}.png")
    data = f"--config.data.source=folder:{tmp_path / 'images'}"
    small = ["--config.evaluation.classifier_steps=3", "--config.evaluation.classifier_batch_size=4"]
    output = call("pipeline", tmp_path / "run", *OPTIONS, *small, data, config=CONFIG).stdout
    for stage in ("train_tokenizer", "rearrange_codebook", "train"):
        assert f"{stage}: done" in output
    assert (tmp_path / "run" / "evaluation" / "report.html").exists()
    other = call(
        "train_tokenizer", tmp_path / "run", *OPTIONS, "--config.tokenizer.z_channels=64", config=CONFIG, check=False
    )
    assert "config.tokenizer.z_channels was 32, now 64" in other.stderr
