"""Locations: local paths and fsspec URLs under one small set of verbs.

A location is a `str`. Local files are mapped, fsynced and renamed into place; a remote object is written to a local
temporary file and appears when its upload ends. Either way, if a name exists, its content is complete. What fails for a
moment (a 503, a cut connection, a silent server) is tried again after a pause; s3fs does so for single requests, this
module for whole reads and uploads, and for every driver.
"""

import errno
import glob
import io
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar, cast

from curate.errors import UsageError
from curate.faults import LASTING, in_words
from curate.storage import web, whole_files
from curate.storage.braces import braces as braces

TRIES, FIRST_PAUSE_S = 5, 0.5  # 0.5 + 1 + 2 + 4 s
CLIENTS = ("aiobotocore", "aiohttp", "azure", "botocore", "gcsfs", "google", "httpx", "httpx2", "requests", "urllib3")
MARKS = ("ETag", "etag", "md5Hash", "content_md5", "LastModified", "last_modified", "mtime", "created")
log = logging.getLogger("curate")
Result = TypeVar("Result")


def is_remote(location: str) -> bool:
    """Say whether a location is an fsspec URL such as `s3://bucket/pool`."""
    return "://" in location and not location.startswith(("file://", "local://"))


def local(location: str) -> str:
    """Strip `file://` from a local location."""
    return location.removeprefix("file://").removeprefix("local://")


def _remote(location: str) -> tuple[Any, str]:
    import fsspec

    try:
        # No cached listings: what another process has written since must be seen.
        fs, path = fsspec.core.url_to_fs(location, use_listings_cache=False)
    except ImportError as error:
        raise UsageError(f"cannot open {location}: {error}", "install the fsspec driver that it names") from None
    except ValueError as error:
        raise UsageError(f"cannot open {location}: {error}") from None
    return fs, path


def with_retries(location: str, work: Callable[[Any, str], Result]) -> Result:
    """Call work(filesystem, path) on a remote location; a failure that may pass is tried again after a pause.

    Raises: OSError if it keeps failing, or at once what the driver raises for good (no such file, no permission).
    """
    fs, path = _remote(location)
    for attempt in range(TRIES):
        try:
            return work(fs, path)
        except Exception as error:
            reason = in_words(error)
            if "Credentials" in type(error).__name__:
                raise UsageError(f"cannot open {location}: {reason}", "see the driver's own settings") from None
            if (status := web.refused(error)) is not None:
                raise PermissionError(errno.EACCES, f"the server answers {status}", location) from None
            if not _may_pass(error):
                raise
            if attempt + 1 == TRIES:
                raise OSError(f"{location}: {reason}, {TRIES} times over") from None
            log.info("%s: %s; trying again", location, reason)
            time.sleep(FIRST_PAUSE_S * 2**attempt)
    raise AssertionError("unreachable")


def _may_pass(error: Exception) -> bool:
    """Say whether an error may pass by itself: one of the network, or of a driver's client library."""
    if isinstance(error, OSError):
        return not isinstance(error, LASTING)
    return type(error).__module__.split(".")[0] in CLIENTS


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
    scheme, mark, place = local(start).rpartition("://")  # a tree that was copied to a URL is read there, too
    return scheme + mark + os.path.normpath(os.path.join(place, written))


def exists(location: str) -> bool:
    """Say whether a file or directory is there."""
    if is_remote(location):
        return with_retries(location, web.exists)
    return os.path.exists(local(location))


def is_dir(location: str) -> bool:
    """Say whether a location is a directory (for object stores: a prefix with objects)."""
    if is_remote(location):
        return bool(with_retries(location, lambda fs, path: fs.isdir(path)))
    return os.path.isdir(local(location))


def size(location: str) -> int:
    """Return a file's size in bytes."""
    if is_remote(location):
        return int(with_retries(location, lambda fs, path: fs.size(path)))
    return os.path.getsize(local(location))


def listdir(directory: str) -> list[str]:
    """List the names in a directory, sorted; none where it does not exist."""
    if is_remote(directory):
        return sorted(name(each["name"]) for each in _list(directory))
    return sorted(os.listdir(local(directory))) if os.path.isdir(local(directory)) else []


def _list(directory: str) -> list[dict[str, Any]]:
    """List a remote directory by one request (object stores: one for 1,000 names); empty where it does not exist."""

    def ask(fs: Any, path: str) -> list[dict[str, Any]]:
        try:
            return [each for each in fs.ls(path, detail=True) if each["name"].strip("/") != path.strip("/")]
        except (FileNotFoundError, NotADirectoryError):
            return []

    return with_retries(directory, ask)


def entries(directory: str) -> tuple[list[str], list[str]]:
    """List the files and the folders in a directory, each sorted. Links to folders are in neither list."""
    if is_remote(directory):
        named = [(name(each["name"]), each["type"]) for each in _list(directory)]
        files, folders = ([each for each, kind in named if kind == wanted] for wanted in ("file", "directory"))
        return sorted(files), sorted(folders)
    with os.scandir(local(directory)) as found:
        listed = [(each.name, each.is_dir(follow_symlinks=False), _is(each, os.path.isfile)) for each in found]
    return sorted(each for each, _, file in listed if file), sorted(each for each, folder, _ in listed if folder)


def linked(directory: str) -> tuple[list[str], list[str]]:
    """List the links in a directory to folders, and those that lead nowhere, each sorted; object stores have none."""
    if is_remote(directory):
        return [], []
    with os.scandir(local(directory)) as found:
        links = sorted((e.name, os.path.isdir(e.path), os.path.exists(e.path)) for e in found if e.is_symlink())
    return [name for name, folder, _ in links if folder], [name for name, _, there in links if not there]


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
        with_retries(location, lambda fs, path: fs.rm(path, recursive=True) if fs.exists(path) else None)
        return
    whole_files.delete(local(location))


def open_read(location: str) -> IO[bytes]:
    """Open a file for reading bytes; seekable, local or remote."""
    if is_remote(location):
        return with_retries(location, lambda fs, path: cast(IO[bytes], fs.open(path, "rb")))
    return open(local(location), "rb")


def read_bytes(location: str) -> bytes:
    """Read a file whole."""
    if is_remote(location):
        return with_retries(location, _whole)
    return Path(local(location)).read_bytes()


def _whole(fs: Any, path: str) -> bytes:
    """Read a remote file whole, without a request for its size where it has a first byte to begin at."""
    [found] = fs.cat_ranges([path], [0], [None], on_error="return")
    if isinstance(found, LASTING):
        raise found
    return cast(bytes, fs.cat_file(path) if isinstance(found, BaseException) else found)


def read_text(location: str) -> str:
    """Read a small UTF-8 file."""
    return read_bytes(location).decode("utf-8")


def read_lines(location: str) -> list[str]:
    """Read the lines of a small UTF-8 file as editors count them: U+2028, U+0085 and their like end none."""
    lines = io.StringIO(read_text(location), newline=None).read().split("\n")
    return lines if lines[-1] else lines[:-1]


@contextmanager
def local_copy(location: str) -> Iterator[str]:
    """Give a local path to a file: its own, or for a remote one that of a copy, which is deleted afterwards."""
    if not is_remote(location):
        yield local(location)
        return
    with whole_files.passing() as (_, copy):
        with_retries(location, lambda fs, path: fs.get_file(path, copy))
        yield copy


@contextmanager
def atomic_write(location: str) -> Iterator[IO[bytes]]:
    """Open a file that appears under its name only when it is complete and on disk; see also `whole_files.together`.

    On an error no file appears, and what was there before stays.
    """
    if is_remote(location):
        with whole_files.passing() as (file, copy):
            yield file
            file.flush()
            with_retries(location, lambda fs, path: fs.put_file(copy, path))
        return
    with whole_files.write(local(location)) as file:
        yield file


def write_plain(location: str, data: bytes) -> None:
    """Write a file of an unfinished directory without waiting for the disk: a rerun would write it again."""
    if is_remote(location):
        with atomic_write(location) as file:
            file.write(data)
        return
    os.makedirs(os.path.dirname(local(location)), exist_ok=True)
    Path(local(location)).write_bytes(data)


def clear_temporaries(directory: str, but: tuple[str, ...] = ()) -> None:
    """Delete the half-written files of killed runs in a directory. but: prefixes of the names to keep."""
    if not is_remote(directory):
        for entry in listdir(directory):
            if entry.endswith(".tmp") and not entry.startswith(but):
                remove(join(directory, entry))


def expand(pattern: str, suffix: str) -> list[str]:
    """List the files that `find` finds; of a directory those whose names end in `suffix`."""
    return list(find(pattern, suffix))


@dataclass(frozen=True, slots=True)
class Found:
    """A file as a listing shows it. stamp: when it was written, or a store's own mark of its content (ETag)."""

    size: int
    stamp: str


def find(pattern: str, suffix: str = "") -> dict[str, Found]:
    """List the files that a directory, a glob, a brace pattern or a single name stands for, with sizes and stamps.

    Sorted. suffix: of a directory only files whose names end so. A remote directory costs its listing and no request
    for each file. Raises: UsageError when a name does not exist.
    """
    found: dict[str, Found] = {}
    listings: dict[str, dict[str, Found]] = {}
    names = braces(pattern)
    for location in names:
        remote = is_remote(location)
        if remote and len(names) > 1 and not any(mark in location for mark in "*?["):  # one listing for all of a folder
            folder = parent(location)
            if folder not in listings:
                listings[folder] = {}
                with suppress(PermissionError):  # of a listing alone: each file is asked for
                    listings[folder] = files(folder)
            held = listings[folder].get(name(location))
            if held is not None:
                found[location] = held
                continue
        if any(mark in location for mark in "*?[") and (remote or not os.path.exists(local(location))):
            found |= _glob(location)
        elif (inside := files(location)) or is_dir(location):
            folder = location if remote else local(location)
            found |= {join(folder, file): held for file, held in inside.items() if file.endswith(suffix)}
        elif exists(location):
            found[location if remote else local(location)] = look(location)
        else:
            raise UsageError(f"{location} does not exist")
    return dict(sorted(found.items()))


def files(directory: str) -> dict[str, Found]:
    """List the files in a directory with their sizes and stamps; none where it does not exist."""
    if is_remote(directory):
        held = {join(directory, name(each["name"])): each for each in _list(directory) if each["type"] != "directory"}
        return {name(place): found for place, found in _measured(held).items()}
    if not os.path.isdir(local(directory)):
        return {}
    with os.scandir(local(directory)) as listed:
        return {each.name: _stated(_stat(each)) for each in listed if not _is(each, os.path.isdir)}


def _is(entry: os.DirEntry[str], kind: Callable[[str], bool]) -> bool:
    """Say whether an entry, or what a link leads to, is a file or folder. A link to itself leads nowhere."""
    own = entry.is_dir if kind is os.path.isdir else entry.is_file
    return kind(entry.path) if entry.is_symlink() else own()


def _stat(entry: os.DirEntry[str]) -> os.stat_result:
    """Stat a file, or, if it is a broken link, the link itself: whoever opens it then fails, naming it."""
    with suppress(OSError):
        return entry.stat()
    return entry.stat(follow_symlinks=False)


def look(location: str) -> Found:
    """Return a file's size and stamp."""
    if is_remote(location):
        return _described(with_retries(location, web.info))
    return _stated(os.stat(local(location)))


def place(folder: str) -> str:
    """Identify a folder, so that another one under its name, or a copy, is noticed: times compare within one only."""
    if is_remote(folder):
        return folder.rstrip("/")
    return f"inode {os.stat(local(folder)).st_ino}" if os.path.exists(local(folder)) else ""


def move(source: str, target: str) -> bool:
    """Rename a file, replacing any file of the new name; returns whether it existed."""
    try:
        if is_remote(source):
            with_retries(source, lambda fs, path: fs.mv(path, _remote(target)[1]))
        else:
            os.makedirs(os.path.dirname(local(target)) or ".", exist_ok=True)
            os.replace(local(source), local(target))
    except FileNotFoundError:
        return False
    return True


def _stated(found: os.stat_result) -> Found:
    return Found(found.st_size, str(found.st_mtime_ns))


def _described(info: Any) -> Found:
    """Read a driver's description of an object."""
    stamp = next((info[key] for key in MARKS if info.get(key)), "")
    return Found(int(info.get("size") or 0), str(stamp).strip('"'))


def _measured(held: Mapping[str, Any]) -> dict[str, Found]:
    """Read a listing; a web server's has no sizes, which show changes, so its files are asked, several at a time."""

    def measure(location: str) -> Found:
        with suppress(FileNotFoundError):  # a broken link: whoever opens it fails, naming it
            return look(location) if held[location].get("size") is None else _described(held[location])
        return _described(held[location])

    with ThreadPoolExecutor(16) as threads:
        return dict(zip(held, threads.map(measure, held), strict=True))


def _glob(pattern: str) -> dict[str, Found]:
    if not is_remote(pattern):
        return {path: look(path) for path in glob.glob(local(pattern), recursive=True)}
    scheme = pattern.split("://", 1)[0]
    matches = with_retries(pattern, lambda fs, path: fs.glob(path, detail=True))
    return _measured({path if is_remote(path) else f"{scheme}://{path}": each for path, each in matches.items()})
