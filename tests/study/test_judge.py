"""If these fail, a study scores its samples in other features than it says."""

import shutil

import numpy as np
import pytest
from etils import epath
from PIL import Image
from safetensors.numpy import save_file

from iar_jax.config.fields import default_config
from iar_jax.config.relevance import relevant
from iar_jax.data.array_files import write_npz
from iar_jax.data.image_source import ArraySource
from iar_jax.data.image_streams import SourceStream
from iar_jax.metrics.frechet import feature_statistics, frechet_distance
from iar_jax.runtime import artifacts
from iar_jax.study.judge import FEATURES_FILE, is_made, make_judge, read_judge, scores
from tests import random_inception


@pytest.mark.slow
def test_scores_in_inceptions_features(tmp_path, golden):
    images = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
    for i, image in enumerate(images):
        path = tmp_path / "images" / f"class-{i % 2}" / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    save_file(random_inception.state_dict(golden("inception_shapes.json")), tmp_path / "inception.safetensors")
    config = default_config()
    config.data.source, config.data.resolution, config.data.val_fraction = f"folder:{tmp_path / 'images'}", 32, 1 / 3
    config.data.augmentation = "none"
    config.evaluation.features = "inception"
    config.evaluation.inception_weights = str(tmp_path / "inception.safetensors")
    config.evaluation.batch_size = 6

    place = epath.Path(tmp_path / "judge")
    assert not is_made(config, place)
    make_judge(config, place)
    assert is_made(config, place)
    shutil.rmtree(tmp_path / "images")  # what is kept is enough
    judge = read_judge(config, place, num_classes=2)
    assert judge.about["features"] == "inception"
    assert judge.reference.shape == (8, 2048)

    def taken(pixels):
        return judge.features_of(SourceStream(ArraySource(pixels, np.zeros(len(pixels), int))))

    # Every validation image is another picture than all training images; all of them together hold the latter.
    everything = taken(images)
    found = scores(judge, everything, np.zeros(12, int))
    expected = frechet_distance(*feature_statistics(judge.reference), *feature_statistics(everything.features))
    assert found["frechet_distance"] == pytest.approx(expected, rel=1e-6)
    assert (found["count"], found["class_accuracy"]) == (12, None)
    same = [i for i, row in enumerate(everything.features) if np.abs(judge.reference - row).max(axis=1).min() < 1e-4]
    assert len(same) == 8


def test_a_judge_whose_classifier_is_damaged_is_made_again(tmp_path):
    config, place = default_config(), epath.Path(tmp_path)
    write_npz(place / FEATURES_FILE, {"features": np.zeros((2, 3), np.float32)})
    assert not is_made(config, place)
    artifacts.begin(place / "classifier", "evaluate", relevant(config, ("evaluation",)), {})
    assert not is_made(config, place)
    artifacts.finish(place / "classifier", "0" * 64, {})
    assert is_made(config, place)
    for name in ("metadata.json", "metadata.copy.json"):
        (place / "classifier" / name).write_text("{")
    assert not is_made(config, place)
