"""Public weight files: where they may lie, and how to get them once."""

import hashlib
import http.client
import urllib.request
from pathlib import Path
from typing import NamedTuple

from iar_jax.interop.graph_def import read_constants
from iar_jax.interop.torch_files import read_torch_file
from iar_jax.runtime.errors import UserError, brief
from iar_jax.runtime.files import cache_directory, writing
from iar_jax.runtime.progress import say


class PublicFile(NamedTuple):
    """A file by its name, its address, and as much of its SHA-256 as is published: eight digits in its name, or none
    ("")."""

    name: str
    address: str
    sha256: str


INCEPTION = (
    PublicFile(
        "weights-inception-2015-12-05-6726825d.pth",
        "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
        "6726825d",
    ),
    PublicFile(
        "pt_inception-2015-12-05-6726825d.pth",
        "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
        "6726825d",
    ),
    PublicFile(
        "classify_image_graph_def.pb",
        "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/classify_image_graph_def.pb",
        "",
    ),
)

VGG = (PublicFile("vgg16-397923af.pth", "https://download.pytorch.org/models/vgg16-397923af.pth", "397923af"),)
LPIPS = (
    PublicFile(
        "lpips-vgg-v0.1.pth",
        "https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/weights/v0.1/vgg.pth",
        "",
    ),
)


def find(given: str, files: tuple[PublicFile, ...], what: str) -> Path:
    """The given path; else one of the files in the cache directory; else the first of them, fetched.

    Raises:
        UserError: it is nowhere and cannot be fetched; says which file to put where.
    """
    if given:
        path = Path(given).expanduser()
        if not path.is_file():
            raise UserError(f"{path}: no such file; {what} may be any of {', '.join(file.name for file in files)}")
        return path
    return here(files) or fetch(files, what)


def here(files: tuple[PublicFile, ...]) -> Path | None:
    """The first of some files that lies in the cache directory."""
    paths = (Path(cache_directory() / file.name) for file in files)
    return next((path for path in paths if path.is_file()), None)


def fetch(files: tuple[PublicFile, ...], what: str) -> Path:
    """Fetches the first of some files that can be had into the cache directory, whole or not at all: of the length that
    the server names, of the published SHA-256, and one that can be read."""
    reasons = []
    for file in files:
        path = cache_directory() / file.name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            say(f"fetching {file.address}")
            with writing(path) as local:
                digest = download(file.address, local)
                if not digest.startswith(file.sha256):
                    raise OSError(f"its SHA-256 begins {digest[:8]}, not {file.sha256}")
                # Where a server names no length, reading it tells whether it is whole.
                (read_constants if file.name.endswith(".pb") else read_torch_file)(local)
        except UserError as error:
            reasons.append(f"{file.address}: {str(error).replace(f'{path}.partial', 'what came')}")
            continue
        except (OSError, http.client.HTTPException, ValueError) as error:
            reasons.append(f"{file.address}: {brief(getattr(error, 'reason', None) or error)}")
            continue
        return Path(path)
    raise UserError(
        f"{what} are neither here nor could be fetched:\n  "
        + "\n  ".join(reasons)
        + f"\nPut one of {', '.join(file.name for file in files)} into {cache_directory()}, or give its path"
    )


def download(address: str, path: Path) -> str:
    """Writes what lies at an address to a local file; returns its SHA-256.

    Raises:
        OSError, http.client.HTTPException, ValueError: it cannot be had, or what came has another length than the
            server said.
    """
    digest, received = hashlib.sha256(), 0
    with urllib.request.urlopen(address, timeout=30) as response, path.open("wb") as target:
        promised = response.headers.get("Content-Length")
        while block := response.read(1 << 20):
            target.write(block)
            digest.update(block)
            received += len(block)
    if promised is not None and received != int(promised):
        raise OSError(f"{received:,} of {int(promised):,} bytes came; the connection broke off")
    return digest.hexdigest()
