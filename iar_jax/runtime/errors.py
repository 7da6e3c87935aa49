"""The one exception for mistakes that a person can put right."""

import errno
import os
import re
from collections.abc import Callable


class UserError(Exception):
    """Shown to the user as it is, without a stack trace; the program ends with exit code 2.

    The message says what was wrong, where, what is allowed and what to do.
    """


def file_system_reason(error: BaseException) -> str | None:
    """What the file system, or a bucket, said, where that is what an error is about; None otherwise."""
    text = str(error)
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.EFBIG):
        if getattr(error, "errno", None) == number or os.strerror(number) in text:
            return os.strerror(number)
    # Clients of a bucket have their own kinds: TensorFlow's, Google's, and TensorStore's in the text of a ValueError.
    kinds = isinstance(error, (OSError, ValueError, RuntimeError))
    ours = kinds or type(error).__module__.startswith(("google.", "requests.", "urllib3.", "tensorflow."))
    if ours and re.search(r"gs://|googleapis|storage/v1|GCS|Cloud Storage", text):
        return brief(error)
    cause = error.__cause__ or error.__context__
    return file_system_reason(cause) if cause is not None else None


def refusal(action: Callable[[], object]) -> str:
    """What a UserError of an action says; "" where there is none."""
    try:
        action()
    except UserError as error:
        return str(error)
    return ""


def brief(error: BaseException | str) -> str:
    """An error of a library in one line."""
    # TensorStore goes on with pages of its own settings.
    text = " ".join(str(error).split()).partition(" See full TensorStore details")[0]
    return text[:300] or type(error).__name__
