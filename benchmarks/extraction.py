"""Images a second through extraction at ImageNet's size: JPEG pictures, 20 crops each, LlamaGen's VQ-16 at 256 pixels.

    python -m benchmarks.extraction
    python -m benchmarks.extraction --pictures=512 --batch_size=32          on an accelerator

The stage itself runs, on a folder of synthetic pictures of ImageNet's usual size and with a random tokenizer. Beside
its speed stands what the host threads alone can prepare.
"""

import argparse
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax.core import meta
from ml_collections import ConfigDict
from PIL import Image

from configs import imagenet
from iar_jax import extract_codes, import_weights
from iar_jax.data import preprocessing
from iar_jax.data.images import read_image
from iar_jax.interop import llamagen
from iar_jax.models.tokenizer import build_tokenizer
from iar_jax.runtime import artifacts


def write_pictures(folder: epath.Path, count: int) -> list[str]:
    """JPEG pictures of 500 x 375 pixels, as detailed as photographs, in two classes; their paths."""
    rng = np.random.default_rng(0)
    paths = []
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (47, 63, 3), dtype=np.uint8)).resize((500, 375))
        noise = rng.normal(0, 8, (375, 500, 3))
        path = folder / str(i % 2) / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.clip(np.asarray(coarse) + noise, 0, 255).astype(np.uint8)).save(str(path), quality=90)
        paths.append(str(path))
    return paths


def prepared_per_second(paths: list[str], config: ConfigDict) -> float:
    """Pictures that all host threads together read and crop in a second."""

    def crops(path):
        views = preprocessing.Views(config.data.resolution, crop_ranges=config.codes.crop_ranges)
        return preprocessing.CROPS["ten_crop"](read_image(path), views).shape

    rounds = 1 + 100 // len(paths)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        start = time.perf_counter()
        list(pool.map(crops, paths * rounds))
        return rounds * len(paths) / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=16)
    parser.add_argument("--batch_size", type=int, default=2, help="pictures that are encoded together")
    options = parser.parse_args()
    if options.pictures < 4 or options.batch_size < 1:
        parser.error("--pictures is 4 at least (two classes, and one of each is kept for val), --batch_size 1")
    config = imagenet.get_config("B,256")
    with tempfile.TemporaryDirectory() as path:
        root = epath.Path(path)
        paths = write_pictures(root / "images", options.pictures)
        config.data.source = f"folder:{root / 'images'}"
        config.codes.batch_size = options.batch_size
        model = build_tokenizer(config.tokenizer.to_dict())
        pixels = jnp.zeros((1, config.data.resolution, config.data.resolution, 3))
        params = meta.unbox(jax.jit(model.init)(jax.random.key(0), pixels)["params"])
        llamagen.save_tokenizer(jax.tree.map(np.asarray, params), root / "random.safetensors")
        import_weights.import_tokenizer(config, root, str(root / "random.safetensors"), None, None)
        prepared = prepared_per_second(paths, config)
        extract_codes.run(config, root)
        train = artifacts.require(root / "codes" / "train", "extract_codes").figures
    crops = 10 * len(config.codes.crop_ranges)
    print(
        f"{train['images_per_second']:.3g} images ({crops * train['images_per_second']:.3g} crops) a second, devices "
        f"waited {train['device_wait']:.1%}; the host's {os.cpu_count()} threads alone prepare {prepared:.3g} images a "
        "second"
    )


if __name__ == "__main__":
    main()
