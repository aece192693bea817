"""Local files that appear under their names only when complete and on disk, one at a time or many together."""

import errno
import os
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, cast

from curate.errors import UsageError

DATA = (".arrow", ".json", ".jsonl", ".tar", ".gz", ".parquet", ".npy", ".npz", ".toml", ".tsv", ".csv", ".txt", ".jpg")
MOST_WAITING, SYNCERS = 512, 16  # files that are synced together, and how many of them at once
EMPTYINGS, FIRST_PAUSE_S = 6, 0.05  # 0.05 + 0.1 + … + 0.8 s
_group = threading.local()  # waiting: {temporary: path} of what this thread has written and not named yet


@contextmanager
def write(path: str) -> Iterator[IO[bytes]]:
    """Open a file that gets its name once it is complete and on disk; within `together`, at the end of that block.

    On an error nothing appears, and what was there before stays. Raises: IsADirectoryError.
    """
    if path.endswith("/") or os.path.isdir(path):
        raise IsADirectoryError(errno.EISDIR, "expected the name of a file, got a folder", path)
    if os.path.exists(path) and not os.path.isfile(path):  # a rename would put a file in the place of /dev/stdout
        raise UsageError(f"{path} is a device or a pipe, not a plain file.", "name the file to write")
    # Several machines may write the same file at once, and in containers every process has the number 1.
    temporary = f"{path}.{socket.gethostname()[:16]}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp"
    mine: dict[str, str] = {}
    waiting: dict[str, str] = getattr(_group, "waiting", mine)
    try:
        with _begun(temporary) as file:
            yield file
            file.flush()
        waiting[temporary] = path
        if waiting is mine or len(waiting) >= MOST_WAITING:
            _name(waiting)
    except BaseException as error:
        waiting.pop(temporary, None)
        with suppress(OSError):
            os.unlink(temporary)
        if isinstance(error, OSError) and error.filename == temporary:
            error.filename = path  # the name that somebody gave
        raise


@contextmanager
def passing() -> Iterator[tuple[IO[bytes], str]]:
    """Make a temporary file (in TMPDIR), and a path by which this process and those that it starts can open it.

    It has no name, so it disappears however this process ends (workers get killed, by this program, too).
    """
    with tempfile.TemporaryFile() as file:
        path = f"/proc/{os.getpid()}/fd/{file.fileno()}"
        if os.path.exists(path):
            yield file, path
            return
    with tempfile.NamedTemporaryFile() as named:  # no /proc, as on macOS
        yield cast(IO[bytes], named), named.name


def _begun(temporary: str) -> IO[bytes]:
    """Open a new file, in a new folder where there is none."""
    try:
        return open(temporary, "wb")
    except FileNotFoundError:
        os.makedirs(os.path.dirname(temporary), exist_ok=True)
        return open(temporary, "wb")


def delete(path: str) -> None:
    """Delete a file or a whole folder, if it is there, also while others delete from it or write into it."""
    if not os.path.isdir(path) or os.path.islink(path):
        Path(path).unlink(missing_ok=True)
        return
    import shutil

    filled = 0
    while os.path.lexists(path):
        try:
            shutil.rmtree(path)
        except FileNotFoundError:  # another process deletes it, too
            continue
        except OSError as error:
            filled += 1
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or filled == EMPTYINGS:
                raise
            time.sleep(FIRST_PAUSE_S * 2 ** (filled - 1))  # another process has just written into it


def refuse_data(path: str) -> None:
    """Refuse to write a page over a data file, such as an input given in its place. Raises: UsageError."""
    if path.lower().endswith(DATA) and os.path.exists(path):
        raise UsageError(f"{path} exists already and holds data.", "name the file to write")


@contextmanager
def together() -> Iterator[None]:
    """Name the files that this thread writes in the block at its end, in the order of writing; on an error, not at all.

    A disk syncs many files in little more time than one. Not for files that are read again within the block.
    """
    waiting: dict[str, str] = {}
    _group.waiting = waiting
    try:
        yield
        _name(waiting)
    finally:
        del _group.waiting
        for temporary in waiting:
            Path(temporary).unlink(missing_ok=True)


def _name(waiting: dict[str, str]) -> None:
    """Sync files, several at a time, and give them their names."""
    written = list(waiting)
    if len(written) == 1:
        _sync(written)
    else:
        with ThreadPoolExecutor(SYNCERS) as syncers:
            list(syncers.map(_sync, (written[first::SYNCERS] for first in range(min(SYNCERS, len(written))))))
    folders = {os.path.dirname(path) or "." for path in waiting.values()}
    for temporary, path in list(waiting.items()):
        os.replace(temporary, path)
        del waiting[temporary]
    for folder in folders:
        sync_dir(folder)


def _sync(files: Sequence[str]) -> None:
    for path in files:
        with open(path, "rb") as file:
            os.fsync(file.fileno())


def sync_dir(directory: str) -> None:
    """Make renames in a local directory durable."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
