"""The headers of a tar, one after the other, for as long as they can be read.

In: a seekable file. Out: name, offset and size of each member. At a truncation or foreign bytes the reading ends with a
note. If another archive follows an end-of-archive mark, as `cat a.tar b.tar` makes it, it is read, too.
"""

import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO

BLOCK = 512
MAX_EXTENSION_BYTES = 1 << 20
NAME_BYTES = 100  # of a name in a plain header
BODILESS = (b"1", b"2", b"3", b"4", b"5", b"6")  # links, devices, directories, pipes: nothing follows their header
EXTENSIONS = (b"x", b"g", b"L", b"K")  # pax for the next member and for all, GNU's long name and long link
PACKED = {  # how packed files and other archives begin: what they are, and what unpacks them
    b"\x1f\x8b": ("gzip", "gunzip"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"),
    b"\xfd7zXZ\0": ("xz", "unxz"),
    b"BZh": ("bzip2", "bunzip2"),
    b"\x04\x22\x4d\x18": ("lz4", "lz4 -d"),
    b"PK\x03\x04": ("zip", "unzip"),
    b"7z\xbc\xaf": ("7z", "7z x"),
    b"Rar!": ("rar", "unrar x"),
}


@dataclass
class Headers:
    """The members of a tar, as an iterator of (name, offset, size, trouble); sizes in bytes.

    trouble: why a member cannot be read, or nothing. notes: what was wrong, in words. whole: an end-of-archive mark was
    reached and nothing but padding follows it.
    """

    file: IO[bytes]
    notes: list[str] = field(default_factory=list)
    whole: bool = False

    def __post_init__(self) -> None:
        self.total = self.file.seek(0, io.SEEK_END)

    def __iter__(self) -> Iterator[tuple[str, int, int, str]]:
        file, total, position = self.file, self.total, 0
        given: dict[str, str] = {}  # what extension headers say of the next member
        while True:
            file.seek(position)
            header = file.read(BLOCK)
            if len(header) < BLOCK:
                self.notes.append(
                    f"truncated at byte {total}: no end-of-archive mark" if total else "the file is empty"
                )
                return
            if not header.strip(b"\0"):
                following = self._next_archive(position)
                if following is None:
                    return
                position, given = following, {}
                continue
            try:
                kind, name, length = _parse(header)
                if kind not in EXTENSIONS:
                    name, length = given.get("path", name), _length(given["size"]) if "size" in given else length
            except ValueError:
                self.notes.append(f"unreadable from byte {position} of {total}" if position else not_a_tar(header))
                return
            start = position + BLOCK
            if kind not in BODILESS and start + length > total:
                self.notes.append(f"truncated at byte {total} inside {shown(name)}")
                return
            position = start if kind in BODILESS else start + -(-length // BLOCK) * BLOCK
            if kind in EXTENSIONS:
                if length <= MAX_EXTENSION_BYTES:
                    given.update(_extension(kind, file.read(length)))
                continue
            trouble = "sparse" if kind == b"S" or "sparse" in given else ""
            given = {}
            if kind in BODILESS and kind != b"5":
                yield name, 0, 0, "link or device"
            elif kind != b"5" and not name.endswith("/"):
                yield name, start, length, trouble

    def _next_archive(self, mark: int) -> int | None:
        """Find where another archive begins after an end-of-archive mark; None where there is none."""
        position = mark
        self.file.seek(position)
        while part := self.file.read(MAX_EXTENSION_BYTES):
            padding = len(part) - len(part.lstrip(b"\0"))
            if padding == len(part):
                position += len(part)
                continue
            position += padding // BLOCK * BLOCK
            self.file.seek(position)
            try:
                _parse(self.file.read(BLOCK).ljust(BLOCK, b"\0"))
            except ValueError:
                self.notes.append(f"not read: what follows the end-of-archive mark at byte {mark} of {self.total}")
                return None
            self.notes.append(f"several archives in one file, all of them read: another begins at byte {position}")
            return position
        self.whole = True
        return None


def packed_by(head: bytes) -> tuple[str, str] | None:
    """Tell from a file's first bytes what packed it, and what unpacks it; None for nothing known."""
    return next((each for magic, each in PACKED.items() if head.startswith(magic)), None)


def not_a_tar(head: bytes) -> str:
    """Say what kind of file it is if it does not begin as a tar does."""
    kind = packed_by(head)
    return f"not a tar but {kind[0]}: unpack it first ({kind[1]})" if kind else "not a tar"


def _parse(header: bytes) -> tuple[bytes, str, int]:
    """Read a header block: type, name and length. Raises: ValueError if it is not one."""
    stored = _number(header[148:156])
    if stored != 256 + sum(header[:148]) + sum(header[156:]):
        signed = 256 + sum(byte - 256 * (byte > 127) for byte in header[:148] + header[156:])
        if stored != signed:  # some old writers summed signed bytes
            raise ValueError("checksum")
    name = header[:NAME_BYTES].split(b"\0", 1)[0]
    if header[257:263] == b"ustar\0" and header[345]:
        name = header[345:500].split(b"\0", 1)[0] + b"/" + name
    return header[156:157], name.decode("utf-8", "surrogateescape"), _number(header[124:136])


def describes(header: bytes, name: str, size: int) -> bool:
    """Say whether a header is that of a member. A name that may be in an earlier extension is not compared."""
    try:
        _, found, length = _parse(header)
    except ValueError:
        return False
    return length == size and (found == name or len(name) > NAME_BYTES or not name.isascii())


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


def shown(name: str) -> str:
    """Write a member's name so that any terminal can show it and any file can hold it."""
    return name.encode("utf-8", "backslashreplace").decode()
