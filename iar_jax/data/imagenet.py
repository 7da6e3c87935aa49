"""The 1,000 classes of ImageNet (ILSVRC 2012): their WordNet ids in the order of the labels, and names for people."""

import difflib
import functools
from importlib import resources

from iar_jax.runtime.errors import UserError


@functools.cache
def classes() -> tuple[tuple[str, str], ...]:
    """(WordNet id, name) by label; ids are in sorted order, as ImageFolder and TFDS have them."""
    text = resources.files("iar_jax.data").joinpath("imagenet_classes.txt").read_text()
    found = (line.split(" ", 1) for line in text.splitlines())
    return tuple((wnid, name) for wnid, name in found)


def class_index(name: str) -> int:
    """Label of a class by its name or WordNet id, such as "golden retriever" or "n02099601".

    Raises:
        UserError: there is no such class; names the nearest ones.
    """
    wnids, names = zip(*classes(), strict=True)
    wanted = name.strip().lower()
    if wanted in wnids:
        return wnids.index(wanted)
    lower = [known.lower() for known in names]
    if wanted in lower:
        return lower.index(wanted)
    near = [names[lower.index(known)] for known in difflib.get_close_matches(wanted, lower, n=3, cutoff=0.4)]
    near += [known for known in names if wanted in known.lower().split() and known not in near][:3]
    raise UserError(f"ImageNet has no class {name!r}; the nearest are {', '.join(map(repr, near)) or 'none'}")


def check_class_order(names: tuple[str, ...], where: str) -> None:
    """Refuses what is nearly ImageNet: a thousand WordNet ids that are not its, which would shift labels.

    Raises:
        UserError: names the first one that differs.
    """
    if len(names) != 1000 or not all(len(name) == 9 and name[0] == "n" and name[1:].isdigit() for name in names):
        return
    for label, (found, (wnid, _)) in enumerate(zip(names, classes(), strict=True)):
        if found != wnid:
            raise UserError(
                f"{where}: its 1,000 classes look like ImageNet's and are not: label {label} is {found}, ImageNet's is "
                f"{wnid}"
            )
