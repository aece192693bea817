"""Pools: webdataset tars read sample by sample with nothing lost, and written byte for byte.

In: a tar as img2dataset writes it (`key.jpg`, `key.txt`, `key.json`). Out: one `Sample` per key, in the order in which
keys first appear, with the bytes' positions, so that any later stage can fetch exactly the original members.

This is a thin reader of our own instead of webdataset's, because every sample must keep its row: webdataset groups
only adjacent members, drops incomplete samples, stops at a truncation without saying so, and its default decoders
unpickle `.pyd`.
Headers are parsed by ourselves (`pipelines/tar_headers.py`): `tarfile` takes more than twice as long, hides where an
archive broke, and reads whatever length an extension header claims. Members of any kind are copied as bytes and none is
unpickled; none is extracted to disk, and links and devices are never followed.
"""

import itertools
import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import IO, Any

from curate.errors import ShardError, UsageError
from curate.storage import faults, paths
from curate.storage.faults import Faults
from curate.storage.json_files import file_digest
from curate.storage.renewal import Parts, settle_listed
from curate.storage.whole_files import passing
from pipelines import gzipped, samples
from pipelines.tar_headers import BLOCK, Headers

IMAGE_SUFFIXES, MACOS = samples.IMAGE_SUFFIXES, samples.MACOS
is_macos, without_suffix = samples.is_macos, samples.without_suffix
MAGIC = {
    b"\xff\xd8": "jpg",
    b"\x89PNG": "png",
    b"GIF8": "gif",
    b"BM": "bmp",
    b"II*\0": "tif",
    b"MM\0*": "tif",
    b"\xff\x0a": "jxl",
    b"\0\0\0\x0cJXL ": "jxl",
}
# The major brand of an ISO base media file, at byte 8 (ISO/IEC 23008-12, AV1 Image File Format).
BRANDS = {**dict.fromkeys((b"avif", b"avis"), "avif")}
BRANDS |= dict.fromkeys((b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1"), "heic")
CAPTION_SUFFIX, JSON_SUFFIX = "txt", "json"
MAX_MEMBER_BYTES, MAX_TEXT_BYTES = samples.MAX_MEMBER_BYTES, 1 << 20
TAR_SUFFIXES, OTHER_SUFFIXES = samples.TAR_SUFFIXES, samples.OTHER_ARCHIVES
GZIP_MAGIC = b"\x1f\x8b"
ELSEWHERE = re.compile("[A-Za-z]:|.*://")  # paths of Windows, URLs; another colon is a letter like any
UNSAFE = re.compile("[\0-\x1f\x7f\ud800-\udfff]")  # end lines of lists, command terminals, are no UTF-8


@dataclass(frozen=True, slots=True)
class Member:
    """One regular file inside a tar. offset, size: bytes of its content."""

    name: str
    suffix: str
    offset: int
    size: int


@dataclass(slots=True)
class Sample:
    """The members that share a key. repeated: the shard had used the key before, with such a member."""

    key: str
    members: list[Member] = field(default_factory=list)
    repeated: bool = False

    def member(self, *suffixes: str) -> Member | None:
        """Return the first member with one of the suffixes."""
        return next((member for member in self.members if member.suffix in suffixes), None)

    @property
    def image(self) -> Member | None:
        """The first image member, whatever its format."""
        return next(iter(self.images), None)

    @property
    def images(self) -> list[Member]:
        """The image members in their order: `key.jpg`, then `key.0.jpg`, `key.1.jpg`, … (or `key.img0.jpg`, …)."""
        held = {member.suffix: member for member in self.members}
        return [held[suffix] for suffix in samples.ordered_pictures(held)]


@dataclass(slots=True)
class Index:
    """What a shard holds: its samples in row order, and what could not be read or was passed over, in words."""

    samples: list[Sample]
    notes: list[str]
    size: int


@dataclass(frozen=True, slots=True)
class Shard:
    """A tar of a pool. stem: its unique name, which every sidecar carries. stamp: shows whether it has changed.

    beside: img2dataset's `{stem}.parquet` beside it; None if there is none, or it is not known.
    """

    stem: str
    location: str
    size: int
    stamp: str = ""
    beside: paths.Found | None = None


@dataclass(frozen=True)
class Pool:
    """What a pool's location holds. passed: archives that are not read, counted by kind."""

    shards: list[Shard]
    passed: Faults


def list_pool(pool: str) -> list[Shard]:
    """List a pool's tars with unique stems, in sorted order; see `survey_pool`."""
    return survey_pool(pool).shards


def survey_pool(pool: str) -> Pool:
    """List a pool's tars (directory, glob, brace pattern, fsspec URL) with unique stems, and what is passed over.

    A tar may be compressed by gzip. If tars in several directories have the same name, the directory goes into the stem
    (`part1__00000`). A swap that was decided there is finished first. Raises: UsageError if nothing matches, saying
    what is there instead; ContractError if a verb has not finished what is there.
    """
    passed: Faults = {}
    listed = paths.find(pool)
    chosen, others = samples.choose_tars(listed)
    found = {location: listed[location] for location in chosen}
    for location, why in others.items():
        faults.add(passed, f"archives passed over: {why}", paths.name(location))
    if settle_listed({paths.parent(location) for location in found}, listed):
        return survey_pool(pool)
    deeper = _folders_of_tars(pool)
    if not found:
        raise _no_shards(pool, listed, deeper)
    every = paths.join(pool, "**", "*.tar*")
    for name in deeper:
        faults.add(passed, f"folders of tars passed over: to include them, give '{every}'", name)
    stems = [paths.name(without_suffix(location)) for location in found]
    if len(set(stems)) < len(stems):
        stems = [f"{paths.name(paths.parent(location))}__{stem}" for location, stem in zip(found, stems, strict=True)]
    if len(set(stems)) < len(stems):
        shared = next(stem for stem, count in Counter(stems).items() if count > 1)
        raise UsageError(f"{pool} matches several shards named {shared}.tar; embed them as separate pools")
    tables = [listed.get(f"{without_suffix(location)}.parquet") for location in found]
    made = zip(stems, found.items(), tables, strict=True)
    return Pool([Shard(stem, place, held.size, held.stamp, table) for stem, (place, held), table in made], passed)


def _no_shards(pool: str, listed: Collection[str], deeper: Sequence[str]) -> UsageError:
    """Say that a pool has no tars, what it holds, and what makes a pool of that."""
    inside = paths.listdir(pool) if paths.is_dir(pool) else []
    seen = f"; it holds {', '.join(inside[:5])}{' …' if len(inside) > 5 else ''}" if inside else ""
    hint = "a pool is a directory of webdataset tars: POOL/00000.tar …"
    if any(name.lower().endswith(OTHER_SUFFIXES) for name in (*listed, *inside)):
        hint = "unpack the archives first: only .tar, .tar.gz and .tgz can be read"
    if deeper:
        hint = f"give '{paths.join(pool, '*', '*.tar*')}'"
    elif any(name.lower().endswith((".parquet", *(f".{kind}" for kind in IMAGE_SUFFIXES))) for name in inside):
        hint = f"make a pool of it: curate pack {pool} SHARDS"
    return UsageError(f"no .tar shards match {pool}{seen}.", hint)


def _folders_of_tars(pool: str) -> list[str]:
    """List the folders right below a local pool that hold tars."""
    if paths.is_remote(pool) or not paths.is_dir(pool):
        return []
    found = []
    for name in paths.entries(pool)[1]:
        with suppress(OSError), os.scandir(paths.local(paths.join(pool, name))) as inside:  # lost+found and its like
            if any(each.name.lower().endswith(TAR_SUFFIXES) for each in inside):
                found.append(name)
    return found


def parts_of(
    found: Sequence[Shard],
    contents: Callable[[Collection[str]], Mapping[str, str]] | None = None,
    beside: str = "",
    *,
    verify: bool = False,
) -> Parts:
    """Say what the sidecars of a pool's shards are made of. contents, beside, verify: see `Parts`."""
    seen = {}
    for shard in found:
        size, stamp = (shard.beside.size, f" {shard.beside.stamp}") if shard.beside else (-1, "")
        seen[shard.stem] = (shard.size, f"{shard.stamp}{stamp}", f"{beside}{size}")
    return Parts(("pool",), seen, paths.place(paths.parent(found[0].location)) if found else "", contents, verify)


def content_digest(shard: Shard, path: str) -> str:
    """Fingerprint a shard's bytes, and those of the side table that a listing showed. path: its plain tar, here."""
    beside = [f"{without_suffix(shard.location)}.parquet"] if shard.beside else []
    return file_digest(path, *beside)


def refuse_changed(shard: Shard) -> None:
    """Raise ShardError if a local shard has changed since it was listed: what was read may be old or new."""
    if shard.stamp and not paths.is_remote(shard.location):
        now = paths.look(shard.location)
        if (now.size, now.stamp) != (shard.size, shard.stamp):
            raise ShardError(f"{shard.location} has changed since this run began: run the same command again")


@contextmanager
def local_tar(location: str) -> Iterator[str]:
    """Give a local path to a shard as a plain tar: its own, or that of a fetched or unpacked copy, deleted afterwards.

    If the gzip file breaks off, so does the tar in it, which its reader notes. Raises: ShardError for a file that
    unpacks to far more than its size.
    """
    with paths.local_copy(location) as path:
        with open(path, "rb") as file:
            packed = file.read(len(GZIP_MAGIC)) == GZIP_MAGIC
        if not packed:
            yield path
            return
        with passing() as (plain, place):
            with open(path, "rb") as file:
                try:
                    gzipped.unpack(file, plain, location)
                except gzipped.Oversized as error:
                    raise ShardError(str(error)) from None
            plain.flush()
            yield place


@contextmanager
def open_tar(location: str) -> Iterator[IO[bytes]]:
    """Open a shard for reading at any position: a remote one is copied, one packed by gzip unpacked."""
    with local_tar(location) as path, open(path, "rb") as file:
        yield file


def split_name(name: str) -> tuple[str, str]:
    """Split a member's name into key and suffix at the first dot of its last part, as webdataset does."""
    head, _, tail = name.rpartition("/")
    base, _, suffix = tail.partition(".")
    return (f"{head}/{base}" if head else base), suffix.lower()


def suffix_of(image: bytes, otherwise: str = "jpg") -> str:
    """Tell an image's format by its first bytes; anything unknown is called `jpg`, and is judged when it is decoded."""
    if image[:4] == b"RIFF" and image[8:12] == b"WEBP":
        return "webp"
    if image[4:8] == b"ftyp" and image[8:12] in BRANDS:
        return BRANDS[image[8:12]]
    return next((suffix for magic, suffix in MAGIC.items() if image.startswith(magic)), otherwise)


def is_safe(key: str) -> bool:
    """Say whether a key is UTF-8 in one line and stays inside the folder it is written to."""
    parts = key.replace("\\", "/").split("/")
    stays = ".." not in parts and not key.startswith(("/", "\\")) and not ELSEWHERE.match(key)
    return bool(key) and stays and not UNSAFE.search(key)


def read_index(file: IO[bytes]) -> Index:
    """Read a shard's headers and group its members into samples.

    file: seekable. A key that reappears after others is joined to its first row; a repeated member starts a new row,
    marked as repeated. At a truncation or foreign bytes the reading ends, with a note. A complete tar without members
    has no rows. Raises: ShardError if there are members or damage, but no readable sample.
    """
    headers = Headers(file)
    rows: list[Sample] = []
    latest: dict[str, int] = {}  # key: its newest row
    held: set[tuple[int, str]] = set()  # the suffixes of every row: a key may have any number of them
    passed: dict[str, int] = {}
    for name, offset, length, trouble in headers:
        key, suffix = split_name(name)
        trouble = MACOS if is_macos(name) else trouble or ("" if suffix else "without a suffix")
        if trouble:
            passed[trouble] = passed.get(trouble, 0) + 1
            continue
        row = latest.get(key)
        if row is None or (row, suffix) in held:
            rows.append(Sample(key, repeated=row is not None))
            row = latest[key] = len(rows) - 1
        held.add((row, suffix))
        rows[row].members.append(Member(name, suffix, offset, length))
    notes = headers.notes
    if not rows and headers.whole and not passed.keys() - {MACOS}:
        notes.append("holds no member")
    notes += [f"passed over {count} member(s): {reason}" for reason, count in sorted(passed.items())]
    if not rows and (passed.keys() - {MACOS} or not headers.whole):
        raise ShardError(f"no sample can be read ({'; '.join(notes)})")
    return Index(rows, notes, headers.total)


def note_faults(stem: str, notes: Sequence[str]) -> Faults:
    """Count a shard's notes by kind: the words without the numbers."""
    found: Faults = {}
    for note in notes:
        kind = re.sub(r"\d[\d,]*", "N", re.sub(r" (at|from) byte .*", "", note))
        faults.add(found, f"shards: {kind}", f"{stem}: {note}")
    return found


def read_member(file: IO[bytes], member: Member) -> bytes:
    """Read a member's bytes. Raises: ShardError past `MAX_MEMBER_BYTES` or when the file ends early."""
    if member.size > MAX_MEMBER_BYTES:
        raise ShardError(f"member {member.name} has {member.size:,} bytes, over the limit of {MAX_MEMBER_BYTES:,}")
    file.seek(member.offset)
    data = file.read(member.size)
    if len(data) != member.size:
        raise ShardError(f"member {member.name} ends after {len(data):,} of {member.size:,} bytes")
    return data


def read_json(data: bytes) -> dict[str, Any] | None:
    """Parse a sample's JSON member; None when it is not a JSON object."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def describe(file: IO[bytes], sample: Sample) -> dict[str, Any]:
    """Read a sample's JSON member; empty where there is none that can be read."""
    return try_describe(file, sample)[0]


def try_describe(file: IO[bytes], sample: Sample) -> tuple[dict[str, Any], str]:
    """Read a sample's JSON member, and say why where there is one that cannot be read."""
    member = sample.member(JSON_SUFFIX)
    if member is None:
        return {}, ""
    if member.size > MAX_TEXT_BYTES:
        return {}, f"over the limit of {MAX_TEXT_BYTES:,} bytes"
    try:
        found = read_json(read_member(file, member))
    except ShardError:
        return {}, "the shard breaks off within it"
    return found or {}, "" if found is not None else "not a JSON object in UTF-8"


def _tar_info(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = size
    info.mode = 0o644
    return info.tobuf(tarfile.GNU_FORMAT)


_BLANK = _tar_info("", 0)


def _header(name: str, size: int) -> bytes:
    """Write a member's header as tarfile does; for a plain name by filling in a blank one, in a sixth of the time."""
    if not name.isascii() or len(name) > 100 or size >= 8**11:
        return _tar_info(name, size)
    head = name.encode().ljust(100, b"\0") + _BLANK[100:124] + b"%011o\0" % size + _BLANK[136:148]
    checksum = sum(head) + 8 * ord(" ") + sum(_BLANK[156:])  # its own eight bytes count as spaces
    return head + b"%06o\0 " % checksum + _BLANK[156:]


class TarWriter:
    """Write a tar whose bytes depend on nothing but names and contents (no times, owners or modes of the moment)."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.offset = 0

    def add(self, name: str, data: bytes) -> None:
        """Append a regular file."""
        block = _header(name, len(data)) + data + b"\0" * (-len(data) % BLOCK)
        self.file.write(block)
        self.offset += len(block)

    def copy(self, name: str, file: IO[bytes]) -> None:
        """Append a regular file of any length, a part at a time. Raises: ShardError where its length changes."""
        size = file.seek(0, os.SEEK_END)
        pad, end = b"\0" * (-size % BLOCK), self.offset + BLOCK + size + -size % BLOCK
        file.seek(0)
        for part in itertools.chain([_header(name, size)], iter(lambda: file.read(1 << 20), b""), [pad]):
            self.file.write(part)
            self.offset += len(part)
        if self.offset != end:
            raise ShardError(f"{name} has changed while it was read: run the same command again")

    def __enter__(self) -> "TarWriter":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:  # two zero blocks, padded to tar's record of 20 blocks
            self.file.write(b"\0" * (2 * BLOCK + -(self.offset + 2 * BLOCK) % (20 * BLOCK)))
