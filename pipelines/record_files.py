"""Files of records, read one record at a time: JSON lists, JSON lines, `{"data": [...]}`, and records by their id.

In: a seekable file of bytes in UTF-8 or UTF-16, with or without a byte order mark, whatever its suffix. Out: each
record with its place in the file, so that it can be read again by itself. A file of any length needs only the memory of
its largest record, since text is decoded in chunks and records are parsed one after the other.
"""

import codecs
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import IO, Any

from pipelines.record_forms import FORM_KEYS, has_turns
from pipelines.tar_headers import packed_by

CHUNK_BYTES = 4 << 20
MAX_RECORD_CHARS = 64 << 20
MAX_LINE_BYTES = 4 * MAX_RECORD_CHARS
_SPACE = " \t\r\n"
UNCLOSED = "it ends within the list: no ] closes it"
_DECODER = json.JSONDecoder()


class Broken(ValueError):
    """A file breaks off or holds something that is not JSON: what follows cannot be found."""


@dataclass(frozen=True, slots=True)
class Item:
    """A value of a file, or why a line has none; offset, size: its bytes in the file (with its key, if any)."""

    value: Any
    fault: str
    offset: int
    size: int


def encoding_of(head: bytes) -> tuple[str, int]:
    """Tell a file's encoding from its first bytes. Returns (codec, length of its byte order mark)."""
    for mark, codec in (
        (codecs.BOM_UTF8, "utf-8"),
        (codecs.BOM_UTF16_LE, "utf-16-le"),
        (codecs.BOM_UTF16_BE, "utf-16-be"),
    ):
        if head.startswith(mark):
            return codec, len(mark)
    if len(head) > 1 and 0 in head[:2] and head[0] != head[1]:  # JSON begins with an ASCII character
        return ("utf-16-le" if head[1] == 0 else "utf-16-be"), 0
    return "utf-8", 0


def parse(data: bytes, codec: str) -> Any:
    """Parse the bytes of one `Item` again; a record with its id before it gets that as its `id`.

    Raises: ValueError or RecursionError.
    """
    text = data.decode(codec).strip("\ufeff" + _SPACE)
    if text[:1] == '"':
        key, after = _DECODER.raw_decode(text)
        rest = text[after:].lstrip(_SPACE)
        return _with_id(key, json.loads(rest[1:])) if rest[:1] == ":" else json.loads(text)
    return json.loads(text)


def read_items(file: IO[bytes], where: str, chunk_bytes: int | None = None) -> Iterator[Item]:
    """Yield the records of a file; for a line that is not JSON, its fault.

    where: the file's name for messages; if it ends in .jsonl, a list that cannot be read counts as lines.
    Raises: Broken if a list, or a table of records, breaks off or holds something that is not JSON.
    """
    file.seek(0)
    head = file.read(64)
    if packed := packed_by(head):
        raise Broken(f"{where} is packed by {packed[0]}: unpack it first ({packed[1]})")
    codec, mark = encoding_of(head)
    text = _Text(file, where, codec, mark, chunk_bytes or CHUNK_BYTES)
    opened = text.peek()
    if opened == "[" and (not where.endswith(".jsonl") or _begins_whole(text)):
        text.restart()
        text.expect("[")
        yield from _elements(text)
        if text.peek():
            yield Item(None, "not JSON: text after the end of the list", text.position(text.at), 0)
        return
    kind, key = _kind(text) if opened == "{" else ("record", "")
    if kind != "record":
        text.restart()
        yield from _members(text, keyed=kind == "keyed", among=key)
    elif opened == "{" and not _is_lines(file, codec, mark) and _is_value(text):
        text.restart()
        yield from _values(text)
    else:
        yield from _lines(file, codec, mark)


class _Text:
    """A file's text from `at` on, decoded as needed. number: how many records came before."""

    def __init__(self, file: IO[bytes], where: str, codec: str, mark: int, chunk_bytes: int) -> None:
        self.file, self.where, self.codec, self.mark, self.chunk_bytes = file, where, codec, mark, chunk_bytes
        self.restart()

    def restart(self) -> None:
        """Begin at the file's start."""
        self.file.seek(self.mark)
        self.decoder = codecs.getincrementaldecoder(self.codec)()
        self.text, self.at, self.number, self.ended = "", 0, 0, False
        self.known = 0, self.mark  # a character of the text, and its byte in the file

    def more(self, wanted: int) -> None:
        """Read more text; what is before `at` is forgotten. Raises: Broken at bytes that are not a character."""
        try:
            chunk = self.file.read(wanted)
            decoded = self.decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            name = self.codec.upper()
            raise Broken(f"{self.where} is not {name}: {error.reason} after record {self.number:,}") from None
        self.known = 0, self.position(self.at)
        self.text, self.at, self.ended = self.text[self.at :] + decoded, 0, not chunk

    def position(self, at: int) -> int:
        """Return the byte position of a character; must be called in ascending order."""
        start, byte = self.known
        self.known = at, byte + len(self.text[start:at].encode(self.codec, "surrogatepass"))
        return self.known[1]

    def peek(self) -> str:
        """Return the next character that is no space, or "" at the end; `at` moves to it."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in _SPACE:
                self.at += 1
            if self.at < len(self.text) or self.ended:
                return self.text[self.at : self.at + 1]
            self.more(self.chunk_bytes)

    def expect(self, character: str) -> None:
        """Move past a character. Raises: Broken if there is a different one."""
        if self.peek() != character:
            raise self.broken(f"no {character} after it" if self.peek() else UNCLOSED)
        self.at += 1

    def value(self) -> Any:
        """Parse the value at `at` and move past it. Raises: Broken."""
        wanted = self.chunk_bytes
        self.peek()
        while True:
            try:
                value, after = _DECODER.raw_decode(self.text, self.at)
                if after < len(self.text) or self.ended:  # else a number may go on in the next chunk
                    self.at = after
                    return value
                fault = UNCLOSED
            except (ValueError, RecursionError) as error:
                fault = UNCLOSED if self.ended and self.at >= len(self.text) else str(error)
            if self.ended or len(self.text) - self.at > MAX_RECORD_CHARS:
                raise self.broken(fault)
            self.more(wanted)
            wanted *= 2

    def broken(self, fault: str) -> Broken:
        """Describe a fault at the present record."""
        return Broken(f"{self.where} is not valid JSON: {fault} (record {self.number:,})")

    def item(self, start: int, value: Any) -> Item:
        """Make an item of what is between a byte and `at`."""
        self.number += 1
        return Item(value, "", start, self.position(self.at) - start)


def _elements(text: _Text) -> Iterator[Item]:
    """Yield the elements of a list whose [ has been read, and move past its end."""
    while text.peek() != "]":
        start = text.position(text.at)
        yield text.item(start, text.value())
        if text.peek() != "]":
            text.expect(",")
    text.at += 1


def _members(text: _Text, *, keyed: bool, among: str) -> Iterator[Item]:
    """Yield the records of an object: its values by their keys, or the elements of its lists of records."""
    text.expect("{")
    while text.peek() != "}":
        start = text.position(text.at)
        key = text.value()
        text.expect(":")
        if keyed:
            yield text.item(start, _with_id(key, text.value()))
        elif text.peek() == "[":
            text.at += 1
            yield from (item for item in _elements(text) if key == among or has_turns(item.value))
        else:
            text.value()
        if text.peek() != "}":
            text.expect(",")
    text.at += 1
    if text.peek():
        yield Item(None, "not JSON: text after the end of the object", text.position(text.at), 0)


def _values(text: _Text) -> Iterator[Item]:
    """Yield consecutive values, each of which may span several lines."""
    while text.peek():
        start = text.position(text.at)
        yield text.item(start, text.value())


def _kind(text: _Text) -> tuple[str, str]:
    """Tell what the object at the start of a file is: `record`, `keyed` (records by id), or `list` (with its key)."""
    try:
        text.expect("{")
        while text.peek() == '"':
            key = text.value()
            text.expect(":")
            if key in FORM_KEYS:
                return "record", ""
            if text.peek() == "[":
                text.at += 1
                if any(has_turns(item.value) for item in _elements(text)):
                    return "list", key
            elif has_turns(text.value()):
                return "keyed", ""
            if text.peek() == ",":
                text.at += 1
    except Broken:
        pass
    return "record", ""


def _with_id(key: Any, value: Any) -> Any:
    return {"id": key, **value} if isinstance(value, dict) else value


def _begins_whole(text: _Text) -> bool:
    """Say whether a list's first element can be read."""
    try:
        text.expect("[")
        return text.peek() == "]" or text.value() is not Ellipsis
    except Broken:
        return False


def _is_value(text: _Text) -> bool:
    """Say whether the file's first value can be read."""
    text.restart()
    try:
        return text.value() is not Ellipsis
    except Broken:
        return False


def _is_lines(file: IO[bytes], codec: str, mark: int) -> bool:
    """Say whether the first line, or a record among the first hundred, is JSON by itself."""
    for number, item in enumerate(islice(_lines(file, codec, mark), 100)):
        if not item.fault and (number == 0 or has_turns(item.value)):
            return True
    return False


def _lines(file: IO[bytes], codec: str, mark: int) -> Iterator[Item]:
    """Yield the lines that are not empty, parsed or with their fault."""
    for offset, line, size in _byte_lines(file, codec, mark):
        if line is None:
            yield Item(None, f"not JSON: a line of over {MAX_LINE_BYTES:,} bytes", offset, size)
            continue
        if codec == "utf-8" and not line.strip():
            continue
        try:
            # json decodes UTF-8 by itself, halves of characters too.
            text = (
                line.removeprefix(codecs.BOM_UTF8) if codec == "utf-8" else line.decode(codec).strip("\ufeff" + _SPACE)
            )
            if not text.strip():
                continue
            value, fault = json.loads(text), ""
        except (ValueError, RecursionError) as error:
            value, fault = None, f"not JSON: {str(error)[:80]}"
        yield Item(value, fault, offset, size)


def _byte_lines(file: IO[bytes], codec: str, mark: int) -> Iterator[tuple[int, bytes | None, int]]:
    """Yield each line's place, its bytes (None if too many for a record), and their number."""
    file.seek(mark)
    start = mark
    if codec == "utf-8":
        while line := file.readline(MAX_LINE_BYTES):
            size, ended = len(line), len(line) < MAX_LINE_BYTES or line.endswith(b"\n")
            size += 0 if ended else _pass_line(file)
            yield start, line if ended else None, size
            start += size
        return
    end = "\n".encode(codec)
    held, over = b"", 0  # of a line: its bytes, and how many of them were too many and are forgotten
    while chunk := file.read(CHUNK_BYTES):  # an even number of bytes
        held, look, at = held + chunk, len(held), 0
        while (found := held.find(end, look)) >= 0:
            look = found + 1
            if found % 2 == 0:  # else it is the halves of two characters
                size = over + found + 2 - at
                yield start, None if over else held[at : found + 2], size
                start, over, at, look = start + size, 0, found + 2, found + 2
        held = held[at:]
        if len(held) > MAX_LINE_BYTES:
            held, over = b"", over + len(held)
    if held or over:
        yield start, None if over else held, over + len(held)


def _pass_line(file: IO[bytes]) -> int:
    """Skip the rest of a line. Returns how many bytes it had."""
    size = 0
    while part := file.readline(CHUNK_BYTES):
        size += len(part)
        if part.endswith(b"\n"):
            break
    return size
