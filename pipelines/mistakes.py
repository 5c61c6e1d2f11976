"""Mistakes of the user, told apart from those of the program: one line says what to mend, without a traceback."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from pipelines import tracking

DISK = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)  # full, or not ours to write on
UNREACHABLE = (ConnectionError, TimeoutError)  # a server, of images or of a classifier


class UserError(ValueError):
    """A mistake that the user can mend; shown as one line without a traceback."""


class Damaged(OSError):
    """A file of the run folder that is damaged, by its name; no fault of the options."""


@contextmanager
def in_a_line() -> Iterator[None]:
    """A program within: a mistake of its user ends it with one line, with CAE_TRACEBACK set with the traceback."""
    try:
        yield
    except Exception as error:
        reason = user_error(error)
        if reason is None or os.environ.get("CAE_TRACEBACK"):
            raise
        sys.exit(f"error: {reason}")


def user_error(error: BaseException) -> str | None:
    """The one-line reason when an error, or what caused it in a worker, is the user's to mend; else None."""
    found = mistake(error)
    if _of_s3(found):
        return f"S3: {found}"
    if isinstance(found, Damaged):
        return str(found)
    if isinstance(found, UNREACHABLE):
        return f"no connection: {' '.join(str(found).split())}; the same command goes on from here"
    if isinstance(found, OSError):
        return f"{found.strerror}: {found.filename or 'the run folder'}"
    if found is None:
        return None
    return tracking.failure(found) or str(found)


def mistake(error: BaseException | None) -> BaseException | None:
    """Of an error and what caused it, in a worker perhaps, the one that the user can mend, if any."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, Damaged) or (isinstance(error, OSError) and error.errno in DISK):
            return error
        if isinstance(error, UNREACHABLE) and not isinstance(error, BrokenPipeError):  # that is who reads our words
            return error
        if tracking.failure(error) or _of_s3(error):
            return error
        # Pillow's, torch's and our own ValueErrors look alike; ours fit one line.
        if isinstance(error, ValueError) and "\n" not in str(error):
            return error
        failures = getattr(error, "worker_failures", None)
        error = next(iter(failures.values())) if failures else getattr(error, "cause", None) or error.__cause__
    return None


def _of_s3(error: BaseException | None) -> bool:
    """Whether S3 refused, or could not be asked: no credentials, no connection, no such bucket."""
    return type(error).__module__ == "botocore.exceptions"
