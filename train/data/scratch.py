"""A folder for what must be unpacked before it can be read at any place; it is deleted when the process ends.

Of a run's ranks one unpacks for those of its machine: all end together, behind a barrier.
"""

from __future__ import annotations

import atexit
import functools
import gzip
import os
import shutil
import tempfile
import zlib
from pathlib import Path

from train.errors import UsageError

GZIP = b"\x1f\x8b"


@functools.cache
def folder() -> Path:
    """Return this process's folder among the temporary files (TMPDIR)."""
    place, owner = tempfile.mkdtemp(prefix="train-"), os.getpid()
    atexit.register(lambda: shutil.rmtree(place, ignore_errors=True) if os.getpid() == owner else None)
    return Path(place)


def clear() -> None:
    """Delete the folder now, for a process that ends without what it has registered for its end."""
    if folder.cache_info().currsize:
        shutil.rmtree(folder(), ignore_errors=True)


def fresh(suffix: str) -> Path:
    """Make a new, empty file in the folder."""
    handle, name = tempfile.mkstemp(suffix, "", folder())
    os.close(handle)
    return Path(name)


def unpacked(path: Path) -> Path:
    """Return an unpacked copy of what gzip packed, any other file as it is.  Raises: UsageError where it is torn."""
    with path.open("rb") as file:
        if file.read(len(GZIP)) != GZIP:
            return path
    place = fresh(".tar")
    try:
        with gzip.open(path) as packed, place.open("wb") as plain:
            shutil.copyfileobj(packed, plain, 1 << 20)
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise UsageError(f"{path} is torn: gzip cannot unpack it whole; fetch it again") from None
    return place
