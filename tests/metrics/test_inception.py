"""If these fail, FID is taken in other features than everyone else's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iar_jax.interop import inception
from iar_jax.metrics.features import inception_features
from iar_jax.models.inception import legacy_resize
from iar_jax.runtime.errors import UserError
from tests import random_inception


@pytest.fixture(scope="module")
def weights(golden):
    return random_inception.state_dict(golden("inception_shapes.json"))


@pytest.fixture(scope="module")
def network(weights):
    return inception.load(weights)


@pytest.mark.parametrize("size", ["0", "1"])  # 32 and 256 pixels
def test_features_are_those_of_the_reference(golden, network, size):
    expected = np.load(golden("inception_random.npz"))
    found = inception_features(*network, expected[f"images_{size}"], batch_size=8)
    for name, theirs in (("pool", "2048"), ("logits", "logits_unbiased"), ("spatial", "spatial7")):
        reference = expected[f"{theirs}_{size}"].reshape(len(found[name]), -1)
        assert found[name].shape == reference.shape
        # Asked for are 1e-3; the order of float32 sums makes 1e-6.
        assert np.abs(found[name] - reference).max() < 1e-5 * np.abs(reference).max(), name


@pytest.mark.slow
def test_features_of_an_image_do_not_depend_on_its_batch(network):
    images = np.random.default_rng(0).integers(0, 256, (3, 20, 31, 3)).astype(np.uint8)
    together = inception_features(*network, images, batch_size=16)
    alone = inception_features(*network, images[2:], batch_size=8)
    for name, found in alone.items():
        np.testing.assert_allclose(found[0], together[name][2], rtol=1e-4, atol=1e-4 * np.abs(together[name]).max())


@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (32, 32), (299, 299), (256, 300), (600, 400)])
def test_the_resize_is_that_of_tensorflow_1(shape):
    images = np.random.default_rng(0).integers(0, 256, (2, *shape, 3)).astype(np.float32)
    expected = images.astype(np.float64)
    for axis in (1, 2):
        length = expected.shape[axis]
        places = np.arange(299, dtype=np.float32) * np.float32(length / 299)
        low = np.floor(places).astype(int)
        high = np.minimum(low + 1, length - 1)
        share = (places - low).reshape([-1 if a == axis else 1 for a in range(4)])
        expected = np.take(expected, low, axis) * (1 - share) + np.take(expected, high, axis) * share
    np.testing.assert_allclose(jax.jit(legacy_resize, static_argnums=1)(images, 299), expected, atol=1e-5 * 255)


def test_constant_images_stay_constant():
    np.testing.assert_array_equal(legacy_resize(jnp.full((1, 7, 9, 3), 200.0), 299), 200.0)


def test_the_graph_of_tensorflow_gives_the_same_network(weights, network, tmp_path):
    path = tmp_path / "classify_image_graph_def.pb"
    path.write_bytes(random_inception.unit_fixed(9, 1.5) + random_inception.graph(weights))
    _, params = inception.load(path)
    jax.tree.map(np.testing.assert_array_equal, params, network[1])


def test_other_files_are_refused_by_name(weights, tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.pth: no such file"):
        inception.load(tmp_path / "nowhere.pth")
    content = random_inception.graph(weights)
    (tmp_path / "cut.pb").write_bytes(content[:-1000])
    with pytest.raises(UserError, match=r"cut\.pb is not a TensorFlow graph, or is damaged"):
        inception.load(tmp_path / "cut.pb")
    (tmp_path / "text.pb").write_bytes(b"no graph at all")
    with pytest.raises(UserError, match=r"text\.pb"):
        inception.load(tmp_path / "text.pb")
    missing = {name: value for name, value in weights.items() if name != "Mixed_7c.branch_pool.bn.bias"}
    with pytest.raises(UserError, match=r"the tensor Mixed_7c\.branch_pool\.bn\.bias is missing"):
        inception.load(missing)
    with pytest.raises(UserError, match=r"fc\.weight has shape \(1000, 2048\); it should be \(1008, 2048\)"):
        inception.load(weights | {"fc.weight": np.zeros((1000, 2048), np.float32)})
