"""Pools: webdataset tars read sample by sample with nothing lost, and written byte for byte.

In: a tar as img2dataset writes it (`key.jpg`, `key.txt`, `key.json`). Out: one `Sample` per key, in the order in which
keys first appear, with the bytes' positions, so that any later stage can fetch exactly the original members.

A thin reader of our own instead of webdataset's, because rows are the contract here: webdataset groups only adjacent
members, drops incomplete samples, stops at a truncation without saying so, and its default decoders unpickle `.pyd`.
Headers are parsed here too: `tarfile` takes more than twice as long, hides where an archive broke, and reads whatever
length an extension header claims. Members are never extracted to disk, links and devices are never followed.
"""

import io
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO, Any

from curate.errors import ShardError, UsageError
from curate.storage import paths
from pipelines import records

IMAGE_SUFFIXES = records.IMAGE_SUFFIXES
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
UNSAFE_SUFFIXES = ("pyd", "pickle", "pkl", "pth", "pt")
MAX_MEMBER_BYTES = 256 << 20
MAX_TEXT_BYTES = 1 << 20
BLOCK = 512
BODILESS = (b"1", b"2", b"3", b"4", b"5", b"6")  # links, devices, directories, pipes: nothing follows their header
EXTENSIONS = (b"x", b"g", b"L", b"K")  # pax for the next member and for all, GNU's long name and long link


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
        images = self.images
        return images[0] if images else None

    @property
    def images(self) -> list[Member]:
        """The image members in their order: `key.jpg`, then `key.0.jpg`, `key.1.jpg`, … (or `key.img0.jpg`, …)."""
        suffixes = records.ordered_pictures([member.suffix for member in self.members])
        return [member for suffix in suffixes for member in self.members if member.suffix == suffix]


@dataclass(slots=True)
class Index:
    """What a shard holds: its samples in row order, and what could not be read or was passed over, in words."""

    samples: list[Sample]
    notes: list[str]
    size: int


@dataclass(frozen=True, slots=True)
class Shard:
    """A tar of a pool. stem: its unique name, which every sidecar carries."""

    stem: str
    location: str
    size: int


def list_pool(pool: str) -> list[Shard]:
    """List a pool's tars (directory, glob, brace pattern, fsspec URL) with unique stems, in sorted order.

    Tars of one name in several directories get their directory into the stem (`part1__00000`).
    Raises: UsageError when nothing matches, saying what was there instead.
    """
    found = [location for location in paths.expand(pool, ".tar") if location.endswith(".tar")]
    if not found:
        inside = paths.listdir(pool) if paths.is_dir(pool) else []
        seen = f"; it holds {', '.join(inside[:5])}{' …' if len(inside) > 5 else ''}" if inside else ""
        raise UsageError(
            f"no .tar shards match {pool}{seen}.", "a pool is a directory of webdataset tars: POOL/00000.tar …"
        )
    stems = [paths.name(location)[:-4] for location in found]
    if len(set(stems)) < len(stems):
        stems = [f"{paths.name(paths.parent(location))}__{stem}" for location, stem in zip(found, stems, strict=True)]
    if len(set(stems)) < len(stems):
        shared = next(stem for stem in stems if stems.count(stem) > 1)
        raise UsageError(f"{pool} matches several shards named {shared}.tar; embed them as separate pools")
    return [Shard(stem, location, paths.size(location)) for stem, location in zip(stems, found, strict=True)]


def split_name(name: str) -> tuple[str, str]:
    """Split a member's name into key and suffix at the first dot of its last part, as webdataset does."""
    head, _, tail = name.rpartition("/")
    base, _, suffix = tail.partition(".")
    return (f"{head}/{base}" if head else base), suffix.lower()


def suffix_of(image: bytes, otherwise: str = "jpg") -> str:
    """Tell an image's format by how it begins; what is none is `jpg`, and is judged when it is decoded."""
    if image[:4] == b"RIFF" and image[8:12] == b"WEBP":
        return "webp"
    if image[4:8] == b"ftyp" and image[8:12] in BRANDS:
        return BRANDS[image[8:12]]
    return next((suffix for magic, suffix in MAGIC.items() if image.startswith(magic)), otherwise)


def is_safe(key: str) -> bool:
    """Say whether a key is UTF-8 and stays inside the folder it is written to."""
    parts = key.replace("\\", "/").split("/")
    stays = ".." not in parts and not key.startswith(("/", "\\")) and ":" not in parts[0] and "\0" not in key
    return bool(key) and stays and not any("\ud800" <= letter <= "\udfff" for letter in key)


def read_index(file: IO[bytes]) -> Index:
    """Read a shard's headers and group its members into samples.

    file: seekable. A key that reappears after others is joined to its first row; a repeated member starts a new row,
    marked as repeated. A truncation or a foreign stretch ends the reading there and leaves a note.
    Raises: ShardError when not a single member can be read.
    """
    total = file.seek(0, io.SEEK_END)
    file.seek(0)
    rows: list[Sample] = []
    latest: dict[str, Sample] = {}
    passed: dict[str, int] = {}
    notes: list[str] = []
    for name, offset, length, trouble in _headers(file, total, notes):
        key, suffix = split_name(name)
        if trouble or not suffix:
            reason = trouble or "without a suffix"
            passed[reason] = passed.get(reason, 0) + 1
            continue
        if suffix.rpartition(".")[2] in UNSAFE_SUFFIXES:
            passed[f"pickled ({suffix})"] = passed.get(f"pickled ({suffix})", 0) + 1
            continue
        sample = latest.get(key)
        if sample is None or any(member.suffix == suffix for member in sample.members):
            sample = Sample(key, repeated=sample is not None)
            rows.append(sample)
            latest[key] = sample
        sample.members.append(Member(name, suffix, offset, length))
    notes += [f"passed over {count} member(s): {reason}" for reason, count in sorted(passed.items())]
    if not rows and (notes or total):
        raise ShardError(f"no sample can be read ({'; '.join(notes) or 'not a tar of key.suffix members'})")
    return Index(rows, notes, total)


def _headers(file: IO[bytes], total: int, notes: list[str]) -> Iterator[tuple[str, int, int, str]]:
    """Yield (name, offset, size, trouble) per member until the end, or until nothing more can be read."""
    position = 0
    given: dict[str, str] = {}  # what extension headers say of the next member
    while True:
        file.seek(position)
        header = file.read(BLOCK)
        if len(header) < BLOCK:
            notes.append(f"truncated at byte {total}: no end-of-archive mark" if total else "the file is empty")
            return
        if not header.strip(b"\0"):
            _note_ending(file, position, total, notes)
            return
        try:
            kind, name, length = _parse(header)
            if kind not in EXTENSIONS:
                name, length = given.get("path", name), _length(given["size"]) if "size" in given else length
        except ValueError:
            notes.append(f"unreadable from byte {position} of {total}" if position else "not a tar")
            return
        start = position + BLOCK
        if kind not in BODILESS and start + length > total:
            notes.append(f"truncated at byte {total} inside {shown(name)}")
            return
        position = start if kind in BODILESS else start + -(-length // BLOCK) * BLOCK
        if kind in EXTENSIONS:
            if length <= MAX_TEXT_BYTES:
                given.update(_extension(kind, file.read(length)))
            continue
        trouble = "sparse" if kind == b"S" or "sparse" in given else ""
        given = {}
        if kind in BODILESS and kind != b"5":
            yield name, 0, 0, "link or device"
        elif kind != b"5" and not name.endswith("/"):
            yield name, start, length, trouble


def _parse(header: bytes) -> tuple[bytes, str, int]:
    """Read a header block: type, name and length. Raises: ValueError when it is none."""
    stored = _number(header[148:156])
    if stored != 256 + sum(header[:148]) + sum(header[156:]):
        signed = 256 + sum(byte - 256 * (byte > 127) for byte in header[:148] + header[156:])
        if stored != signed:  # some old writers summed signed bytes
            raise ValueError("checksum")
    name = header[:100].split(b"\0", 1)[0]
    if header[257:263] == b"ustar\0" and header[345]:
        name = header[345:500].split(b"\0", 1)[0] + b"/" + name
    return header[156:157], name.decode("utf-8", "surrogateescape"), _number(header[124:136])


def _number(data: bytes) -> int:
    """Read a number field: octal text, or base 256 as GNU tar writes what does not fit. Raises: ValueError."""
    return int.from_bytes(data[1:], "big") if data[0] == 0x80 else _length(data.split(b"\0", 1)[0].strip() or b"0", 8)


def _length(digits: str | bytes, base: int = 10) -> int:
    if not digits.isdigit():
        raise ValueError("digits")
    return int(digits, base)


def _extension(kind: bytes, data: bytes) -> dict[str, str]:
    """Take from a GNU long name or a pax header what concerns the next member: path, size, whether it is sparse."""
    if kind == b"L":
        return {"path": data.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")}
    found = {}
    at = 0
    while kind == b"x" and at < len(data):
        digits = data[at : at + 20].split(b" ", 1)[0]
        if not digits.isdigit() or not len(digits) < int(digits) <= len(data) - at:
            break
        key, _, value = data[at + len(digits) + 1 : at + int(digits) - 1].partition(b"=")
        if key in (b"path", b"size"):
            found[key.decode()] = value.decode("utf-8", "surrogateescape")
        elif key.startswith(b"GNU.sparse"):
            found["sparse"] = "yes"
        at += int(digits)
    return found


def _note_ending(file: IO[bytes], position: int, total: int, notes: list[str]) -> None:
    """Record what comes after the end-of-archive mark, where it is more than padding."""
    file.seek(position)
    while part := file.read(MAX_TEXT_BYTES):
        if part.strip(b"\0"):
            notes.append(f"not read: what follows the end-of-archive mark at byte {position} of {total}")
            return


def shown(name: str) -> str:
    """Write a member's name so that any terminal and any file can hold it."""
    return name.encode("utf-8", "backslashreplace").decode()


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
    member = sample.member(JSON_SUFFIX)
    if member is None or member.size > MAX_TEXT_BYTES:
        return {}
    try:
        return read_json(read_member(file, member)) or {}
    except ShardError:
        return {}


def _tar_info(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = size
    info.mode = 0o644
    return info.tobuf(tarfile.GNU_FORMAT)


_BLANK = _tar_info("", 0)


def _header(name: str, size: int) -> bytes:
    """Write a member's header as tarfile does; of a plain name by filling a blank one in, in a sixth of the time."""
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

    def __enter__(self) -> "TarWriter":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:  # two zero blocks, padded to tar's record of 20 blocks
            self.file.write(b"\0" * (2 * BLOCK + -(self.offset + 2 * BLOCK) % (20 * BLOCK)))
