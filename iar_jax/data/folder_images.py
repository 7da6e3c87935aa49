"""A folder of images with one sub-folder for each class."""

import dataclasses
import functools
import hashlib
import os
import warnings
from concurrent import futures
from pathlib import Path

import numpy as np
from PIL import Image

from iar_jax.data import preprocessing
from iar_jax.data.image_source import Opened, centred
from iar_jax.data.imagenet import check_class_order
from iar_jax.runtime.errors import UserError
from iar_jax.runtime.progress import progress, say
from iar_jax.runtime.section import Section

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


@dataclasses.dataclass(frozen=True)
class FileSource:
    """Pictures decoded from files when asked for, cut to the centre square."""

    paths: tuple[str, ...]
    labels: np.ndarray
    resolution: int

    @functools.cached_property
    def image_ids(self) -> np.ndarray:
        return np.arange(len(self.paths))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict:
        return centred(self, index, self.resolution)

    def example(self, index: int) -> tuple[Image.Image, int]:
        return read_image(self.paths[index]), int(self.labels[index])


def read_image(path: str) -> Image.Image:
    """An upright RGB picture from a file; raises OSError or ValueError for what cannot be decoded."""
    with warnings.catch_warnings():
        # A header that promises an absurd size must fail before memory is taken.
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(path) as image:
                return preprocessing.to_rgb(image)
        except (Image.DecompressionBombError, Image.DecompressionBombWarning, SyntaxError) as error:
            raise OSError(str(error)) from error


def open_folder(path: str, section: Section) -> Opened:
    """A folder with one sub-folder a class; classes in the sorted order of their names.

    Every file is decoded once here, so that a broken one is known before anything trains. A link that leads out of
    the folder is refused.
    """
    resolution, max_unreadable = section["resolution"], section["max_unreadable"]
    root = Path(path).expanduser()
    if not root.is_dir():
        raise UserError(f"the image folder {path!r} does not exist or is not a folder")
    class_names = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if len(class_names) < 2:
        found = f"only {class_names[0]!r}" if class_names else "none"
        raise UserError(
            f"{path}: found {found} of the sub-folders that make classes; put the images of each class into a "
            "sub-folder of its own, two classes at least"
        )
    check_class_order(tuple(class_names), path)
    real_root = os.path.realpath(root)
    files = []
    for label, name in enumerate(class_names):
        for entry in sorted((root / name).rglob("*"), key=str):
            if entry.suffix.lower() not in IMAGE_SUFFIXES or not entry.is_file():
                continue
            if os.path.commonpath([real_root, os.path.realpath(entry)]) != real_root:
                raise UserError(f"{entry}: a link that leads out of the image folder {path}; copy the file instead")
            files.append((str(entry), label))
    if not files:
        raise UserError(f"{path}: no image in any of the {len(class_names)} sub-folders ({', '.join(IMAGE_SUFFIXES)})")

    def defect(file):
        try:
            read_image(file[0])
        except (OSError, ValueError) as error:
            return f"{file[0]}: {error}"
        return None

    defects = []
    with progress("reading images", len(files), "files") as seen, futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for found in pool.map(defect, files):
            defects.append(found)
            seen.update()
    unreadable = tuple(d for d in defects if d)
    if len(unreadable) > max_unreadable:
        shown = "\n  ".join(unreadable[:10])
        raise UserError(
            f"{path}: {len(unreadable)} of {len(files)} images cannot be read, and config.data.max_unreadable allows "
            f"{max_unreadable}:\n  {shown}"
        )
    for broken in unreadable:
        say(f"left out, not readable: {broken}")
    files = [file for file, broken in zip(files, defects, strict=True) if not broken]
    labels = np.array([label for _, label in files], np.int32)
    counts = np.bincount(labels, minlength=len(class_names))
    empty = [name for name, count in zip(class_names, counts, strict=True) if not count]
    if empty:
        raise UserError(f"{path}: class {empty[0]!r} has 0 readable images; each class needs two at least")
    names = f"{resolution} {class_names}".encode()
    contents = b"".join(
        os.fsencode(f"\n{label} {os.path.getsize(file_path)} {os.path.relpath(file_path, root)}")
        for file_path, label in files
    )
    return Opened(
        FileSource(tuple(file_path for file_path, _ in files), labels, resolution),
        None,
        tuple(class_names),
        lambda held_out: hashlib.sha256(names + held_out + contents).hexdigest(),
        unreadable,
    )
