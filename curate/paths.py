"""Locations: local paths and fsspec URLs under one small set of verbs.

A location is a `str`. Local files are mapped, fsynced and renamed into place; a remote object appears whole when its
upload ends, which is the same promise: that a name exists means that its content is complete.
"""

import glob
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from curate.errors import UsageError


def is_remote(location: str) -> bool:
    """Say whether a location is an fsspec URL such as `s3://bucket/pool`."""
    return "://" in location and not location.startswith(("file://", "local://"))


def local(location: str) -> str:
    """Strip `file://` from a local location."""
    return re.sub(r"^(file|local)://", "", location)


def _remote(location: str) -> tuple[Any, str]:
    import fsspec

    try:
        fs, path = fsspec.core.url_to_fs(location)
    except ImportError as error:
        raise UsageError(
            f"cannot open {location}: {error}", "install the fsspec driver, e.g. `pip install s3fs`"
        ) from None
    except ValueError as error:
        raise UsageError(f"cannot open {location}: {error}") from None
    return fs, path


def join(directory: str, *names: str) -> str:
    """Append names to a directory location."""
    return "/".join([directory.rstrip("/") if directory != "/" else "", *names])


def name(location: str) -> str:
    """Return the last part of a location."""
    return location.rstrip("/").rsplit("/", 1)[-1]


def parent(location: str) -> str:
    """Return the directory a location lies in (`.` for a bare name)."""
    head, _, _ = location.rstrip("/").rpartition("/")
    return head or ("/" if location.startswith("/") else ".")


def relative(target: str, start: str) -> str:
    """Write `target` as seen from the directory `start`; a URL stays as it is."""
    if is_remote(target) or is_remote(start):
        return target if is_remote(target) else os.path.abspath(local(target))
    return os.path.relpath(os.path.realpath(local(target)), os.path.realpath(local(start)))


def resolve(written: str, start: str) -> str:
    """Undo `relative`: the location that `written` means as seen from `start`."""
    if is_remote(written) or os.path.isabs(written):
        return written
    return os.path.normpath(os.path.join(local(start), written))


def exists(location: str) -> bool:
    """Say whether a file or directory is there."""
    if is_remote(location):
        fs, path = _remote(location)
        return bool(fs.exists(path))
    return os.path.exists(local(location))


def is_dir(location: str) -> bool:
    """Say whether a location is a directory (for object stores: a prefix with objects)."""
    if is_remote(location):
        fs, path = _remote(location)
        return bool(fs.isdir(path))
    return os.path.isdir(local(location))


def size(location: str) -> int:
    """Return a file's size in bytes."""
    if is_remote(location):
        fs, path = _remote(location)
        return int(fs.size(path))
    return os.path.getsize(local(location))


def listdir(directory: str) -> list[str]:
    """List the names in a directory, sorted; none where it does not exist."""
    if is_remote(directory):
        fs, path = _remote(directory)
        if not fs.isdir(path):
            return []
        return sorted(name(entry) for entry in fs.ls(path, detail=False) if name(entry) != name(path))
    return sorted(os.listdir(local(directory))) if os.path.isdir(local(directory)) else []


def make_dir(directory: str) -> None:
    """Create a directory and its parents."""
    if not is_remote(directory):
        try:
            os.makedirs(local(directory), exist_ok=True)
        except OSError as error:
            raise UsageError(f"cannot create the directory {directory}: {error.strerror}") from None


def remove(location: str) -> None:
    """Delete a file or a whole directory, if it is there."""
    if is_remote(location):
        fs, path = _remote(location)
        if fs.exists(path):
            fs.rm(path, recursive=True)
        return
    path = local(location)
    if os.path.isdir(path) and not os.path.islink(path):
        import shutil

        shutil.rmtree(path)
    elif os.path.lexists(path):
        os.unlink(path)


def open_read(location: str) -> IO[bytes]:
    """Open a file for reading bytes; seekable, local or remote."""
    if is_remote(location):
        fs, path = _remote(location)
        return cast(IO[bytes], fs.open(path, "rb"))
    return open(local(location), "rb")


def read_text(location: str) -> str:
    """Read a small UTF-8 file."""
    with open_read(location) as file:
        return file.read().decode("utf-8")


@contextmanager
def atomic_write(location: str) -> Iterator[IO[bytes]]:
    """Open a file that appears under its name only when it is complete and on disk.

    On an error nothing appears, and what was there before stays.
    """
    if is_remote(location):
        fs, path = _remote(location)
        file = fs.open(path, "wb")
        try:
            yield file
        except BaseException:
            if hasattr(file, "discard"):
                file.discard()
            raise
        file.close()
        return
    path = local(location)
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    sync_dir(os.path.dirname(path) or ".")


def sync_dir(directory: str) -> None:
    """Make renames in a local directory durable."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def clear_temporaries(directory: str) -> None:
    """Delete what a killed run left half written in a directory."""
    if not is_remote(directory):
        for entry in listdir(directory):
            if entry.endswith(".tmp"):
                remove(join(directory, entry))


def braces(pattern: str) -> list[str]:
    """Expand `{00000..00010}` and `{a,b}` as a shell would, keeping zero padding.

    Bounded: more than 10,000,000 names are refused.
    """
    match = re.search(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}", pattern)
    if match is None:
        return [pattern]
    head, tail = pattern[: match.start()], braces(pattern[match.end() :])
    if match[3] is not None:
        middles: Sequence[str] = match[3].split(",")
    else:
        first, last = int(match[1]), int(match[2])
        if (abs(last - first) + 1) * len(tail) > 10_000_000:
            raise UsageError(f"the pattern {pattern} names more than 10,000,000 files")
        step = 1 if last >= first else -1
        width = len(match[1]) if match[1].startswith("0") or match[2].startswith("0") else 0
        middles = [str(number).zfill(width) for number in range(first, last + step, step)]
    return [head + middle + rest for middle in middles for rest in tail]


def expand(pattern: str, suffix: str) -> list[str]:
    """List the files that a directory, a glob, a brace pattern or a single name stands for, sorted and unique.

    Raises: UsageError when a brace names a file that does not exist, or nothing matches.
    """
    found: list[str] = []
    for location in braces(pattern):
        if is_remote(location):
            fs, path = _remote(location)
            scheme = location.split("://", 1)[0]
            if any(mark in path for mark in "*?["):
                found += [f"{scheme}://{match}" for match in fs.glob(path)]
            elif fs.isdir(path):
                found += [join(location, entry) for entry in listdir(location) if entry.endswith(suffix)]
            elif fs.exists(path):
                found.append(location)
            else:
                raise UsageError(f"{location} does not exist")
        else:
            path = local(location)
            if os.path.isdir(path):
                found += [join(path, entry) for entry in listdir(path) if entry.endswith(suffix)]
            elif any(mark in path for mark in "*?[") and not os.path.exists(path):
                found += glob.glob(path, recursive=True)
            elif os.path.exists(path):
                found.append(path)
            else:
                raise UsageError(f"{location} does not exist")
    return sorted(set(found))
