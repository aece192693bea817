"""A folder for files that must be unpacked for random access; it is deleted when the process ends.

One rank unpacks for all ranks of its machine: they all end together, after a barrier.
"""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import tempfile
from pathlib import Path

from pipelines import gzipped
from train.errors import UsageError

GZIP = b"\x1f\x8b"


@functools.cache
def folder() -> Path:
    """Return this process's folder among the temporary files (TMPDIR)."""
    place, owner = tempfile.mkdtemp(prefix="train-"), os.getpid()
    atexit.register(lambda: shutil.rmtree(place, ignore_errors=True) if os.getpid() == owner else None)
    return Path(place)


def clear() -> None:
    """Delete the folder now, for a process that ends without running its exit handlers."""
    if folder.cache_info().currsize:
        shutil.rmtree(folder(), ignore_errors=True)


def fresh(suffix: str) -> Path:
    """Make a new, empty file in the folder."""
    handle, name = tempfile.mkstemp(suffix, "", folder())
    os.close(handle)
    return Path(name)


def unpacked(path: Path) -> tuple[Path, str]:
    """Return an unpacked copy of a gzip file, or any other file as it is; and what is wrong with it, or "".

    The copy of a torn file ends at the damage.  Raises: UsageError if it unpacks to far more than its size.
    """
    with path.open("rb") as file:
        if file.read(len(GZIP)) != GZIP:
            return path, ""
    place = fresh(".tar")
    try:
        with path.open("rb") as packed, place.open("wb") as plain:
            whole = gzipped.unpack(packed, plain, str(path))
    except gzipped.Oversized as error:
        raise UsageError(str(error)) from None
    return place, "" if whole else "torn: gzip cannot unpack all of it; download it again"
