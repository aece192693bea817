"""Where the members of a tar file lie, read from its headers, a thousand at a time.

A tar is a chain of 512-byte headers, each followed by its member's bytes, padded to 512: the next header is at
`offset + 512 + ceil(size / 512) * 512`. So the sizes alone are enough to follow the chain; names, kinds and checksums
are then checked for all headers of the file at once, in arrays. A tar with anything else (long names, links, sizes in
base 256, a damaged header) is read by `pipelines/tar_headers.py` from the start instead: same members, slower.

Archives that follow each other in one file are all read, and reported, as is what is passed over.

Cost: about 1 µs per member, where tarfile takes 20.  Source of the format: POSIX.1-2001, pax interchange format.
"""

from __future__ import annotations

import mmap
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from pipelines.tar_headers import BLOCK, Headers

CHUNK = 1 << 20
SIZE, CHECKSUM, KIND, MAGIC, PREFIX = slice(124, 136), slice(148, 156), 156, slice(257, 263), slice(345, 500)
REGULAR, FOLDER, EXTENDED = b"0\0", ord("5"), ord("x")
Member = tuple[str, int, int]  # name, offset of its bytes, their number


def index_tar(path: Path) -> tuple[list[Member], str]:
    """Return the regular members of a tar in their order, and what is odd about it in words, or "".

    It may be torn, or hold several archives in one file.
    """
    found = _index_plain(path)
    return (found, "") if found is not None else _index_any(path)


def _index_any(path: Path) -> tuple[list[Member], str]:
    try:
        with path.open("rb") as file:
            headers = Headers(file)
            members = list(headers)
    except OSError as error:
        return [], f"cannot be read: {error.strerror}"
    passed = Counter(trouble for *_, trouble in members if trouble)
    notes = [*headers.notes, *(f"passed over {count} member(s): {why}" for why, count in sorted(passed.items()))]
    found = [(_printable(name), offset, size) for name, offset, size, trouble in members if not trouble]
    return found, "; ".join(notes)


def _printable(name: str) -> str:
    return name.encode(errors="surrogateescape").decode(errors="replace")


def _index_plain(path: Path) -> list[Member] | None:
    """Index a tar of plain members and extended headers that change neither name nor size; None: not such a tar."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            chain = _follow(data)
            if chain is None:
                return None
            offsets, sizes = chain
            headers = np.empty((len(offsets), BLOCK), np.uint8)
            for row, offset in zip(headers, offsets, strict=True):
                row[:] = np.frombuffer(data[offset : offset + BLOCK], np.uint8)
            return _members(data, headers, offsets, sizes)
    except (OSError, ValueError):
        return None


def _follow(data: mmap.mmap) -> tuple[list[int], list[int]] | None:
    offsets: list[int] = []
    sizes: list[int] = []
    at, end, zeros = 0, len(data), bytes(BLOCK)
    while at + BLOCK <= end:
        if data[at] == 0:
            if data[at : at + BLOCK] != zeros:
                return None
            return (offsets, sizes) if _after_zeros(data, at) + BLOCK > end else None
        digits = data[at + SIZE.start : at + SIZE.stop].rstrip(b"\0 ")
        if not digits.isdigit():  # int() also accepts a sign, and a negative size would lead backwards
            return None
        size = int(digits, 8)
        offsets.append(at)
        sizes.append(size)
        at += BLOCK + -(-size // BLOCK) * BLOCK
    return None  # no empty block at its end


def _after_zeros(data: mmap.mmap, at: int) -> int:
    """Return the offset of the first block that is not empty, from `at` on, or the end."""
    while at < len(data):
        found = np.flatnonzero(np.frombuffer(data[at : at + CHUNK], np.uint8))
        if len(found):
            return at + int(found[0]) // BLOCK * BLOCK
        at += CHUNK
    return len(data)


def _members(data: mmap.mmap, headers: np.ndarray, offsets: Sequence[int], sizes: Sequence[int]) -> list[Member] | None:
    if len(headers) and headers[-1, KIND] == EXTENDED:  # the member that it describes is missing
        return None
    stated = headers[:, CHECKSUM]
    # The sum of a header's bytes counts the eight of the checksum itself as spaces.
    sums = headers.sum(1, dtype=np.int64) - stated.sum(1, dtype=np.int64) + 8 * ord(" ")
    found: list[Member] = []
    for header, total, offset, size in zip(headers, sums.tolist(), offsets, sizes, strict=True):
        raw = header.tobytes()
        if int(raw[CHECKSUM].rstrip(b"\0 "), 8) != total:
            return None
        kind = raw[KIND]
        if kind == EXTENDED:
            body = data[offset + BLOCK : offset + BLOCK + size]
            if any(key in body for key in (b" path=", b" size=", b" linkpath=", b" GNU.", b" hdrcharset=")):
                return None
        elif kind in REGULAR:
            name = raw[:100].split(b"\0", 1)[0]
            prefix = raw[PREFIX].split(b"\0", 1)[0] if raw[MAGIC] == b"ustar\0" else b""  # GNU tar stores times there
            whole = b"/".join(part for part in (prefix, name) if part).decode(errors="replace")
            if not whole.endswith("/"):  # in the oldest format that is a folder, as tarfile reads it
                found.append((whole, offset + BLOCK, size))
        elif kind != FOLDER or size:
            return None
    return found


class Keys(Sequence[str]):
    """Strings in one UTF-8 array, with 8 bytes of overhead each, where a list of them takes some 60."""

    def __init__(self, parts: Iterable[Sequence[str]]) -> None:
        texts, lengths = [], [np.zeros(1, np.int64)]
        for part in parts:
            encoded = [key.encode(errors="replace") for key in part]
            texts.append(b"".join(encoded))
            lengths.append(np.fromiter(map(len, encoded), np.int64, len(encoded)))
        self._text = b"".join(texts)
        self._edges = np.cumsum(np.concatenate(lengths))

    def __len__(self) -> int:
        return len(self._edges) - 1

    def __getitem__(self, index: int) -> str:  # type: ignore[override]
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._text[self._edges[index] : self._edges[index + 1]].decode()
