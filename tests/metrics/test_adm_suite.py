"""If these fail, the FID job gives other figures than the ADM suite, or does not say what they depend on."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from etils import epath
from PIL import Image
from safetensors.numpy import save_file

from iar_jax.evaluate.files import load_reference, open_set
from iar_jax.interop import downloads, lpips
from iar_jax.metrics import adm_suite
from iar_jax.metrics.frechet import RunningStatistics, feature_statistics
from iar_jax.metrics.inception_score import inception_score
from iar_jax.metrics.kernel_distance import kernel_distance
from iar_jax.models.inception import InceptionV3
from iar_jax.runtime.errors import UserError
from tests import random_inception
from tests.stages import ROOT, environment


def test_the_golden_inception_score_is_reproduced(golden):
    small = np.load(golden("metrics_small.npz"))
    found = inception_score(small["logits"], int(small["is_split"]))
    np.testing.assert_allclose(found, small["inception_score"], rtol=1e-5)


def test_the_score_of_one_class_is_one_and_of_n_certain_ones_n():
    certain = 1000.0 * np.eye(8)
    np.testing.assert_allclose(inception_score(certain, 8), 8.0)
    np.testing.assert_allclose(inception_score(np.repeat(certain, 4, axis=0), 4), 1.0)  # sorted by class
    with pytest.raises(ValueError, match="needs logits"):
        inception_score(np.zeros((0, 8)), 5)


def test_running_statistics_are_those_of_the_whole():
    rng = np.random.default_rng(0)
    # A mean far from zero: sums of squares would lose it.
    features = (1000.0 + rng.standard_normal((501, 6))).astype(np.float32)
    running = RunningStatistics(6)
    for part in np.split(features, [1, 1, 200, 350]):
        running.update(part)
    for ours, theirs in zip(running.result(), feature_statistics(features), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="finite"):
        running.update(np.full((1, 6), np.nan))


def test_the_kernel_distance_is_the_unbiased_estimate():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((60, 4)), rng.standard_normal((50, 4)) + 0.5
    kernel = lambda a, b: (a @ b / 4 + 1) ** 3  # noqa: E731
    within = [np.mean([kernel(s[i], s[j]) for i in range(50) for j in range(50) if i != j]) for s in (x[:50], y)]
    across = np.mean([kernel(a, b) for a in x[:50] for b in y])
    found, spread = kernel_distance(x[:50], y, num_subsets=3)
    np.testing.assert_allclose(found, sum(within) - 2 * across, rtol=1e-9)
    assert spread < 1e-9
    same = [kernel_distance(rng.standard_normal((200, 4)), rng.standard_normal((200, 4)))[0] for _ in range(20)]
    assert abs(np.mean(same)) < 4 * np.std(same) / np.sqrt(20)


def call(*options, check=True):
    done = subprocess.run(
        [sys.executable, "-m", "iar_jax.evaluate", *map(str, options)],
        cwd=ROOT, env=environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    if check:
        assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def files(tmp_path_factory, golden):
    path = tmp_path_factory.mktemp("suite")
    save_file(random_inception.state_dict(golden("inception_shapes.json")), path / "inception.safetensors")
    rng = np.random.default_rng(0)
    for name, count in (("samples", 12), ("other", 10)):
        np.savez(path / f"{name}.npz", rng.integers(0, 256, (count, 16, 16, 3)).astype(np.uint8))
    np.save(path / "labels.npy", np.repeat(np.arange(3), 4))
    return path


@pytest.mark.slow
def test_files_are_scored_and_a_reference_is_made_of_one(files, tmp_path):
    weights = f"--inception_weights={files / 'inception.safetensors'}"
    options = [weights, "--batch_size=8"]
    call(f"--samples={files / 'other.npz'}", f"--make-reference={tmp_path / 'reference.npz'}", *options)
    output = call(f"--samples={files / 'samples.npz'}", f"--reference={tmp_path / 'reference.npz'}", *options).stdout
    made = json.loads((files / "samples.npz.evaluation" / "scores.json").read_text())
    assert made["reference"]["name"] == "other.npz"
    assert made["reference"]["statistics_of"] == 10
    assert made["labels"] == "balanced, 4 a class"
    assert made["samples"]["images"] == 12
    for deviation in ("12 samples instead of 50,000", "singular", "10 reference images", "sorted by class"):
        assert any(deviation in line for line in made["deviations"]), deviation
        assert deviation in output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--reference=r.npz"], "give --config=configs/FILE.py and --workdir=DIR"),
        (["--samples={files}/samples.npz"], "give one of --reference"),
        (["--samples=nowhere.npz", "--reference={files}/other.npz"], "nowhere.npz is not there"),
        (["--samples={files}/labels.npy", "--reference={files}/other.npz"], "images are uint8 [N, H, W, 3]"),
        (["--samples={files}/samples.npz", "--reference=r.npz", "--inception_weights=no.pth"], "no such file"),
        (["--samples={files}/samples.npz", "--reference={files}/other.npz", "--batch_size=0"], "batch_size"),
    ],
)  # fmt: skip
def test_wrong_calls_are_answered_in_a_sentence(files, options, message):
    done = call(*(option.format(files=files) for option in options), check=False)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def fake_network(monkeypatch, stop_after=None):
    """Features that are cheap; the numbers of the images asked for, and an end after some of them."""
    asked = []

    def features(module, params, images, batch_size):
        if stop_after is not None and len(asked) == stop_after:
            raise KeyboardInterrupt
        asked.append(len(images))
        flat = images.reshape(len(images), -1).astype(np.float32)
        return {name: np.resize(flat[:, :9], (len(images), size)) for name, size in adm_suite.DIMENSIONS.items()}

    monkeypatch.setattr(adm_suite, "PART", 4)
    monkeypatch.setattr(adm_suite, "inception_features", features)
    return adm_suite.Network(InceptionV3(), {}, "file", "weights"), asked


def image_set(path, sha256="sha", **facts):
    return adm_suite.ImageSet(adm_suite.open_images(path), path.name, sha256, **facts)


def test_a_killed_evaluation_goes_on_where_it_was(files, tmp_path, monkeypatch):
    path, directory = epath.Path(files) / "samples.npz", epath.Path(tmp_path) / "kept"
    network, asked = fake_network(monkeypatch, stop_after=2)
    with pytest.raises(KeyboardInterrupt):
        adm_suite.features_of(image_set(path), network, directory, 8)
    # Killed between the parts of one step, too.
    next(iter(directory.glob("*/logits/from-00000004.npy"))).unlink()
    network, asked = fake_network(monkeypatch)
    found = adm_suite.features_of(image_set(path), network, directory, 8)
    assert asked == [4, 4]
    whole = adm_suite.features_of(image_set(path), network, epath.Path(tmp_path) / "whole", 8)
    jax.tree.map(np.testing.assert_array_equal, found, whole)
    # Another file, or other weights: nothing is taken from there.
    adm_suite.features_of(image_set(path, "another"), network, directory, 8)
    assert asked == [4, 4, 4, 4, 4, 4, 4, 4]
    adm_suite.forget(image_set(path), network, directory)
    assert len(list(directory.iterdir())) == 1


@pytest.mark.slow
def test_a_set_against_itself_and_images_in_place_of_statistics(files, tmp_path, monkeypatch):
    network, asked = fake_network(monkeypatch)
    samples, other = (epath.Path(files) / f"{name}.npz" for name in ("samples", "other"))
    kept = epath.Path(tmp_path) / "kept"
    reference = load_reference(other, network, kept, 8)
    made = epath.Path(tmp_path) / "reference.npz"
    adm_suite.make_reference(made, image_set(other), "val", network, kept, 8)
    before = len(asked)
    of_statistics = adm_suite.load_reference(made, network, kept, 8)
    assert len(asked) == before  # the features of its images are in it
    assert reference.about["statistics_of"] == of_statistics.about["statistics_of"] == 10
    assert of_statistics.about["split"] == "val"
    found = adm_suite.features_of(image_set(samples), network, kept, 8)
    expected = adm_suite.score(found, reference)
    for name, value in adm_suite.score(found, of_statistics).items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-6, err_msg=name)
    itself = adm_suite.score(adm_suite.features_of(image_set(other, "other"), network, kept, 8), reference)
    assert abs(itself["fid"]) < 1e-6 * expected["fid"]
    assert (itself["precision"], itself["recall"]) == (1.0, 1.0)
    with pytest.raises(UserError, match="distances between the two mean nothing"):
        adm_suite.load_reference(made, network._replace(sha256="others"), kept, 8)


@pytest.mark.parametrize(
    ("kind", "split", "said"),
    [
        ("samples", "train", None),
        ("samples", "val", "gFID against a val split"),
        ("reconstructions", "train", "rFID against the training set"),
        ("reconstructions", "val", None),
        ("samples", None, "which split the reference is of is not known"),
    ],
)
def test_what_is_compared_with_which_split_is_said(files, kind, split, said):
    about = {"name": "r", "split": split, "statistics_of": None, "images": 10_000}
    found = adm_suite.deviations(image_set(epath.Path(files) / "samples.npz", kind=kind), about)
    about_split = [line for line in found if "split" in line or "training set" in line]
    assert len(about_split) == (said is not None)
    assert said is None or about_split[0].startswith(said)
    assert any(
        "JPEG" in line for line in adm_suite.deviations(image_set(epath.Path(files) / "samples.npz", lossy=True), about)
    )


def test_a_folder_of_pictures_is_a_set(files, tmp_path):
    images = np.load(files / "samples.npz")["arr_0"]
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{i:03d}.png")
    found = open_set(epath.Path(tmp_path), "samples")
    assert found.rows.shape == images.shape
    np.testing.assert_array_equal(np.concatenate(list(found.rows.batches(5))), images)
    np.testing.assert_array_equal(np.concatenate(list(found.rows.batches(5, first=7))), images[7:])
    assert not found.lossy
    Image.fromarray(images[0]).save(tmp_path / "012.jpg")
    again = open_set(epath.Path(tmp_path), "samples")
    assert again.lossy
    assert again.sha256 != found.sha256
    Image.fromarray(images[0][:8]).save(tmp_path / "013.png")
    with pytest.raises(UserError, match=r"013.png is 16 x 8, and 000.png 16 x 16"):
        list(open_set(epath.Path(tmp_path), "samples").rows.batches(5))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no picture in it"):
        open_set(epath.Path(tmp_path) / "empty", "samples")


def png(path, image, **options):
    Image.fromarray(image).save(path, options.pop("format", "PNG"), **options)


@pytest.mark.parametrize(
    ("name", "options", "lossy"),
    [
        ("a.png", {}, False),
        ("a.jpg", {"format": "JPEG"}, True),
        ("a.png", {"format": "JPEG"}, True),
        ("a.jpg", {"format": "PNG"}, False),
        ("a.webp", {"format": "WEBP"}, True),
        ("a.png", {"format": "WEBP"}, True),
        ("a.webp", {"format": "WEBP", "lossless": True}, False),
    ],
)
def test_losses_are_told_by_content(files, tmp_path, name, options, lossy):
    images = np.load(files / "samples.npz")["arr_0"]
    png(tmp_path / name, images[0], **options)
    png(tmp_path / "other.png", images[1])
    found = open_set(epath.Path(tmp_path), "samples")
    assert found.lossy is lossy
    about = {"name": "r", "split": "train", "statistics_of": None, "images": 10_000}
    assert any("JPEG or lossy WebP" in line for line in adm_suite.deviations(found, about)) is lossy


def test_a_folder_of_one_picture_has_no_statistics(files, tmp_path):
    png(tmp_path / "a.png", np.load(files / "samples.npz")["arr_0"][0])
    with pytest.raises(UserError, match="1 image; two are the least that have statistics"):
        open_set(epath.Path(tmp_path), "samples")


def test_pixels_that_were_not_scaled_are_said(files, tmp_path, capsys):
    np.savez(tmp_path / "unscaled.npz", np.random.default_rng(0).integers(0, 2, (4, 8, 8, 3)).astype(np.uint8))
    found = open_set(epath.Path(tmp_path) / "unscaled.npz", "samples")
    assert "all pixels are 0 or 1" in capsys.readouterr().out
    about = {"name": "r", "split": "train", "statistics_of": None, "images": 10_000}
    assert any(line.startswith("all pixels are 0 or 1") for line in adm_suite.deviations(found, about))
    others = image_set(epath.Path(files) / "samples.npz")
    assert not any("0 or 1" in line for line in adm_suite.deviations(others, about))
    np.savez(tmp_path / "floats.npz", np.random.default_rng(0).random((4, 8, 8, 3)))
    with pytest.raises(UserError, match=r"np.round\(255 \* images\)"):
        open_set(epath.Path(tmp_path) / "floats.npz", "samples")


def statistics(seed=0):
    rng = np.random.default_rng(seed)
    found = {}
    for mean, covariance, size in (("mu", "sigma", 2048), ("mu_s", "sigma_s", 2023)):
        found |= {mean: rng.standard_normal(size), covariance: np.diag(rng.random(size))}
    return found


@pytest.mark.parametrize("whole", [False, True])
def test_statistics_of_one_layer_give_one_distance(files, tmp_path, monkeypatch, whole):
    network, asked = fake_network(monkeypatch)
    given = statistics()
    np.savez(tmp_path / "r.npz", **(given if whole else {name: given[name] for name in ("mu", "sigma")}))
    reference = load_reference(epath.Path(tmp_path) / "r.npz", network, epath.Path(tmp_path) / "kept", 8)
    assert not asked
    images = image_set(epath.Path(files) / "samples.npz")
    scores = adm_suite.score(adm_suite.features_of(images, network, epath.Path(tmp_path) / "kept", 8), reference)
    there = {name for name, value in scores.items() if value is not None}
    assert there == {"fid", "inception_score"} | ({"sfid"} if whole else set())
    no_sfid = "the reference has no mu_s and sigma_s: no sFID"
    assert (no_sfid in adm_suite.deviations(images, reference.about)) is not whole


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mu": np.zeros(64)}, r"mu is float64 \[64\]; it should be float \[2048\]"),
        ({"sigma": np.zeros((2048, 64))}, r"sigma is float64 \[2048, 64\]; it should be float \[2048, 2048\]"),
        ({"mu_s": np.full(2023, np.nan)}, "mu_s has entries that are not finite"),
        ({"sigma": None, "arr_0": None}, "has mu, mu_s, sigma_s; a reference has mu and sigma"),
        ({"mu": np.array(["a"] * 2048)}, "mu is <U1"),
        ({"about": np.array("[1")}, "about is damaged"),
        ({"about": np.array("[1]")}, "about is damaged"),
        ({"arr_0": np.zeros((4, 8, 8), np.uint8)}, r"images are uint8 \[N, H, W, 3\]"),
        ({"pool": np.zeros((4, 7))}, r"pool has shape \(4, 7\)"),
    ],
)
def test_references_are_looked_at_before_the_network_runs(files, tmp_path, monkeypatch, change, message):
    network, asked = fake_network(monkeypatch)
    content = statistics() | {"arr_0": np.load(files / "samples.npz")["arr_0"]} | change
    np.savez(tmp_path / "r.npz", **{name: value for name, value in content.items() if value is not None})
    with pytest.raises(UserError, match=message):
        load_reference(epath.Path(tmp_path) / "r.npz", network, epath.Path(tmp_path) / "kept", 8)
    assert not asked


@pytest.mark.parametrize("form", ["npz", "npy", "fortran", "folder"])
def test_every_form_of_the_same_images_is_the_same_reference_and_scores_zero(files, tmp_path, monkeypatch, form):
    network, _ = fake_network(monkeypatch)
    images = np.load(files / "samples.npz")["arr_0"]
    path = epath.Path(tmp_path) / f"r.{form}"
    if form == "folder":
        path.mkdir()
        for i, image in enumerate(images):
            png(path / f"{i:03d}.png", image)
    elif form == "npy":
        np.save(path, images)
    else:
        path = path.with_suffix(".npz")
        np.savez(path, np.asfortranarray(images) if form == "fortran" else images)
    kept = epath.Path(tmp_path) / "kept"
    reference = load_reference(path, network, kept, 8)
    scores = adm_suite.score(adm_suite.features_of(open_set(path, "samples"), network, kept, 8), reference)
    assert (scores["fid"], scores["sfid"], scores["kid"]) == (0.0, 0.0, 0.0)
    assert (scores["precision"], scores["recall"]) == (1.0, 1.0)
    itself = image_set(epath.Path(files) / "samples.npz")
    assert adm_suite.score(adm_suite.features_of(itself, network, kept, 8), reference) == scores


def test_lpips_weights_are_asked_for_by_name_too(tmp_path, monkeypatch):
    monkeypatch.setenv("IAR_JAX_CACHE", str(tmp_path))
    for name in ("VGG", "LPIPS"):
        (file,) = getattr(downloads, name)
        monkeypatch.setattr(downloads, name, (file._replace(address=f"file://{tmp_path}/nowhere"),))
    assert not lpips.available("", "")
    with pytest.raises(UserError, match="VGG-16 weights are neither here nor could be fetched"):
        lpips.load_lpips("", "")
    (tmp_path / "vgg16-397923af.pth").write_bytes(b"")
    assert not lpips.available("", "")
    assert lpips.available("", "given")


def test_the_published_check_says_what_holds():
    published = {name: value for name, (value, _) in adm_suite.PUBLISHED.items()}
    assert all(" holds" in line for line in adm_suite.self_check(published))
    assert "DOES NOT HOLD" in adm_suite.self_check(published | {"fid": 4.02})[1]
