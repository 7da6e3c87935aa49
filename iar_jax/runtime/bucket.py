"""What a bucket does beyond reading and writing: telling whether it can be reached, and writes under a condition."""

import functools
import os
from typing import Any, NamedTuple

from etils import epath

from iar_jax.runtime.errors import UserError, brief

SECONDS = 10.0


class Content(NamedTuple):
    """What an object held, and the number of that version; 0 is 'no object'."""

    content: bytes
    generation: int


def check(path: epath.Path, what: str) -> None:
    """Tells at once what a long start would end in.

    Raises:
        UserError: another kind of address, no client or credentials for Google Cloud Storage, no such bucket, no right
            to read it, or no answer.
    """
    scheme, _, rest = str(path).partition("://")
    if scheme != "gs":
        raise UserError(f"{what} is {path}; it may be a directory, or gs://BUCKET/NAME")
    name, _, prefix = rest.partition("/")
    if not prefix.strip("/"):
        raise UserError(f"{what} is {path}; give a name inside of the bucket, as gs://{name or 'BUCKET'}/NAME")
    try:
        client = _client()
    except UserError as error:
        raise UserError(f"{what}: {error}") from error
    from google.api_core import exceptions

    # TensorFlow's file system would go on seeing for five seconds what is not there any more.
    os.environ.setdefault("GCS_STAT_CACHE_MAX_AGE", "0")
    try:
        list(client.list_blobs(name, prefix=prefix, max_results=1, timeout=SECONDS, retry=_retry()))
    except exceptions.NotFound as error:
        raise UserError(f"{what} is {path}, and there is no bucket {name!r}") from error
    except exceptions.Forbidden as error:
        raise UserError(f"{what} is {path}, and these credentials may not read it ({brief(error)})") from error
    except Exception as error:  # of many kinds: names, connections, certificates, tokens
        raise UserError(f"{what} is {path}, and Google Cloud Storage does not answer ({brief(error)})") from error


def read(path: epath.Path) -> Content:
    """An object's content and its version.

    Raises:
        OSError: the bucket does not answer.
    """
    from google.api_core import exceptions

    blob = _blob(path)
    try:
        content = blob.download_as_bytes(timeout=SECONDS, retry=None)
        return Content(content, int(blob.generation or 0))
    except exceptions.NotFound:
        return Content(b"", 0)
    except Exception as error:
        raise OSError(f"{path}: {brief(error)}") from error


def write(path: epath.Path, content: bytes, generation: int) -> int | None:
    """Writes an object where its version is the given one (0: where there is none); the new version, or None where
    it is another.

    Raises:
        OSError: the bucket does not answer; whether it was written is not known.
    """
    from google.api_core import exceptions

    blob = _blob(path)
    try:
        blob.upload_from_string(content, if_generation_match=generation, timeout=SECONDS, retry=None)
    except exceptions.PreconditionFailed:
        return None
    except Exception as error:
        raise OSError(f"{path}: {brief(error)}") from error
    return int(blob.generation)


def remove(path: epath.Path, generation: int) -> None:
    """Deletes an object where its version is the given one.

    Raises:
        OSError: the bucket does not answer.
    """
    from google.api_core import exceptions

    try:
        _blob(path).delete(if_generation_match=generation, timeout=SECONDS, retry=None)
    except (exceptions.NotFound, exceptions.PreconditionFailed):
        return
    except Exception as error:
        raise OSError(f"{path}: {brief(error)}") from error


def _blob(path: epath.Path) -> Any:
    name, _, inside = str(path).partition("://")[2].partition("/")
    return _client().bucket(name).blob(inside)


@functools.cache
def _client() -> Any:
    try:
        from google.auth.exceptions import GoogleAuthError
        from google.cloud import storage
    except ImportError as error:
        raise UserError(
            "Google Cloud Storage needs its client; pip install 'iar_jax[gcs]' (or google-cloud-storage)"
        ) from error
    try:
        return storage.Client()
    except (GoogleAuthError, OSError) as error:
        raise UserError(
            "no credentials for Google Cloud Storage; run `gcloud auth application-default login`, name a "
            f"key file in GOOGLE_APPLICATION_CREDENTIALS, or run on a machine with a service account ({brief(error)})"
        ) from error


def _retry() -> Any:
    from google.cloud.storage import retry

    return retry.DEFAULT_RETRY.with_timeout(3 * SECONDS)
