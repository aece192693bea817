"""What an exception means for a run: its message, whether a retry may help, and whether anything else can go on."""

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from curate import processes
from curate.errors import RunError

ENDING = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.ESTALE, errno.ENOTCONN)
# Errors that no retry fixes.
LASTING = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)


def in_words(error: Exception) -> str:
    """Describe an exception that is not ours in one line."""
    if isinstance(error, processes.WorkerDied):
        return str(error)
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def ends_all(error: Exception) -> bool:
    """Say whether every other item would fail too: the fault lies with the disk or folder, not the file."""
    if isinstance(error, RunError):
        return True
    if not isinstance(error, OSError):
        return False
    if error.errno in ENDING:
        return True
    name = error.filename if isinstance(error.filename, str) and "://" not in error.filename else ""
    if not name or os.path.exists(name):
        return False
    folder = os.path.dirname(os.path.abspath(name))
    barred = error.errno in (errno.EACCES, errno.EPERM)  # from making a file, or from its folder
    return barred or not os.path.isdir(folder)


@contextmanager
def ending(what: str, *kinds: type[Exception]) -> Iterator[None]:
    """Turn errors of these kinds into a one-line RunError, after which a rerun can resume."""
    try:
        yield
    except kinds as error:
        raise RunError(f"{what}: {in_words(error)}", "run the same command again; it resumes from here") from error


class Standing:
    """Whether local directories are still the same: a lost mount leaves another one, or none, in its place."""

    def __init__(self, places: Sequence[str]) -> None:
        self.known = {place: _identity(place) for place in places if "://" not in place}

    def lost(self) -> str:
        """Say which directory is gone, the first if several; "" if none is."""
        gone = (place for place, before in self.known.items() if before is not None and _identity(place) != before)
        return next((f"{place} no longer exists (a lost mount?)." for place in gone), "")


def _identity(place: str) -> tuple[int, int] | None:
    try:
        found = os.stat(place)
    except OSError:
        return None
    return found.st_dev, found.st_ino
