"""A folder of images with one sub-folder for each class."""

import collections
import dataclasses
import functools
import hashlib
import os
from concurrent import futures
from pathlib import Path

import numpy as np
from PIL import Image

from iar_jax.data.image_source import Opened, centred
from iar_jax.data.imagenet import check_class_order
from iar_jax.data.pictures import SUFFIXES, Unreadable, read_image
from iar_jax.runtime.errors import UserError
from iar_jax.runtime.progress import progress, say
from iar_jax.runtime.section import Section

# Of entries that are no pictures, wherever they lie: those of archives and disk stations; hidden ones begin with a dot.
NOT_PICTURES = ("__MACOSX", "@eaDir", "lost+found")
# Folders of these names hold splits, and not classes.
SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}


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


def passed_over(name: str) -> bool:
    """Whether an entry of this name, and all that is in it, is no picture."""
    return name.startswith(".") or name in NOT_PICTURES


def pictures_in(folder: Path) -> tuple[list[Path], collections.Counter[str]]:
    """Files with a picture's suffix, at any depth, in the order of their names; and the suffixes of the others."""
    found, others = [], collections.Counter[str]()
    for parent, directories, names in os.walk(folder):
        directories[:] = [name for name in directories if not passed_over(name)]
        for name in names:
            if passed_over(name):
                continue
            path = Path(parent, name)
            if path.suffix.lower() in SUFFIXES:
                found.append(path)
            else:
                others[path.suffix.lower() or "none"] += 1
    return sorted(found, key=str), others


def class_order(names: list[str]) -> list[str]:
    """Names of classes in the order of their labels: sorted, by value where they are the numbers 0 to N - 1."""
    numbers = {str(number) for number in range(len(names))}
    return sorted(names, key=int) if set(names) == numbers else sorted(names)


def open_folder(path: str, section: Section) -> Opened:
    """A folder with one sub-folder a class; classes in the sorted order of their names.

    Every file is decoded once here, so that a broken one is known before anything trains. A link that leads out of
    the folder is refused.
    """
    resolution, max_unreadable = section["resolution"], section["max_unreadable"]
    root = Path(path).expanduser()
    if not root.is_dir():
        raise UserError(f"the image folder {path!r} does not exist or is not a folder")
    class_names = class_order(
        [entry.name for entry in root.iterdir() if entry.is_dir() and not passed_over(entry.name)]
    )
    if class_names and {name.lower() for name in class_names} <= SPLITS:
        one = next((name for name in class_names if name.lower().startswith("train")), class_names[0])
        raise UserError(
            f"{path}: its sub-folders {', '.join(class_names)} are splits, and not classes; give one of them, as "
            f"folder:{root / one}"
        )
    if len(class_names) < 2:
        found = f"only {class_names[0]!r}" if class_names else "none"
        raise UserError(
            f"{path}: found {found} of the sub-folders that make classes; put the images of each class into a "
            "sub-folder of its own, two classes at least"
        )
    check_class_order(tuple(class_names), path)
    real_root = os.path.realpath(root)
    files, others = [], collections.Counter[str]()
    for label, name in enumerate(class_names):
        pictures, not_read = pictures_in(root / name)
        others += not_read
        if not pictures and not_read:
            raise UserError(
                f"{path}: class {name!r} has {not_read.total()} files, of the kinds {', '.join(sorted(not_read))}, and "
                f"none of those that are read ({', '.join(SUFFIXES)}); convert them, or take the folder away"
            )
        for entry in pictures:
            if os.path.commonpath([real_root, os.path.realpath(entry)]) != real_root:
                raise UserError(f"{entry}: a link that leads out of the image folder {path}; copy the file instead")
            files.append((str(entry), label))
    if not files:
        raise UserError(f"{path}: no image in any of the {len(class_names)} sub-folders ({', '.join(SUFFIXES)})")

    if others:
        kinds = ", ".join(f"{count:,} {suffix}" for suffix, count in others.most_common(5))
        say(f"{path}: {others.total():,} files are no pictures of those that are read, and passed over ({kinds})")

    def defect(file):
        try:
            read_image(file[0])
        except Unreadable as error:
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
