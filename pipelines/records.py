"""Instruction records: every written form is converted to LLaVA's. Both programs read records through this file.

Out: `{"id", "image"?, "conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}, ...]}`.
`image` is a name, or a list of names for several pictures; without it the record is text-only. Each picture has one
mark `<image>` in a human turn, and the n-th mark stands for the n-th picture. A record that already has this form stays
unchanged, with its key order and unknown fields. Turns may have any form of record_forms.py; pictures may be in `image`
or `images`, in content parts, in Qwen's `<img>NAME</img>`, or in a binary column.

A mark without a picture, a picture without a mark, video or sound make a record unusable: it is never treated as text.
"""

import base64
import binascii
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pipelines.record_forms import HUMAN, Turns, Unusable, as_list, conversation_fault, turns_of, unpacked

T = TypeVar("T")
IMAGE_MARK = "<image>"
IMAGE_KEYS = ("image", "images")
OTHER_MEDIA = {"video": "video", "videos": "video", "audio": "sound", "audios": "sound"}
NO_PICTURE, NO_MARK = "an image mark without an image", "an image without an image mark"
MAX_IMAGES = 64  # a record; more are a fault
TOO_MANY = f"more than {MAX_IMAGES} images"
MISSING, NOT_UTF8, NO_NAME = "missing image", "the caption is not UTF-8", "image is not a name"
_INLINE = re.compile(r"<img>([^<>\n]{1,4096})</img>|<image>")
_IMAGE_PARTS = ("image", "image_url", "input_image")
_NAME_KEYS = ("path", "url", "image", "image_url")
# How files of pictures begin, for binary columns that no field's name tells.
_MAGIC = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"RIFF", b"\0\0\0")


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture of a record: its name as written, or its bytes if the record holds them, or both."""

    name: str
    data: bytes | None = None


@dataclass(frozen=True, slots=True)
class Reading:
    """The result of reading a record: its LLaVA form with its pictures in the order of marks, or why it is unusable.

    dropped: fields with bytes that are not a picture of the record and that JSON cannot hold. order: for each picture,
    which of those beside the record it is, counted from 0.
    """

    record: dict[str, Any] | None
    pictures: tuple[Picture, ...] = ()
    fault: str = ""
    dropped: tuple[str, ...] = ()
    order: tuple[int, ...] = ()

    def arrange(self, beside: Sequence[T]) -> tuple[T, ...]:
        """Reorder what lies beside the record from the order of a tar to that of the marks: parts may be numbered."""
        return tuple(beside[number] for number in self.order or range(len(self.pictures)))


Mark = Picture | int | None  # its own picture, the n-th of those beside the turns, or the next of these


def read(
    value: Any,
    default_id: str,
    *,
    given: Sequence[str] = (),
    suffix_of: Callable[[bytes], str] = lambda data: "jpg",
) -> Reading:
    """Convert a record of any known form to LLaVA's.

    given: names of pictures that lie beside the record (in a tar), which it need not name. suffix_of: tells a format
    from its bytes, for pictures without a name, which are then named after the record.
    """
    if not isinstance(value, dict):
        return Reading(None, fault="not a JSON object")
    try:
        return _read(value, default_id, given, suffix_of)
    except Unusable as unusable:
        return Reading(None, fault=str(unusable))
    except RecursionError:
        return Reading(None, fault="nested too deep")


def _read(value: dict[str, Any], default_id: str, given: Sequence[str], suffix_of: Callable[[bytes], str]) -> Reading:
    value = unpacked(value)
    turns, form = turns_of(value)
    for key, kind in OTHER_MEDIA.items():
        if value.get(key):
            raise Unusable(f"it has {kind}, which is not read")
    named, place, dropped = _record_pictures(value)
    listed = named or [Picture(name) for name in given]
    written, pictures = _place(turns, listed, first="texts" in form)
    if given and len(pictures) != len(given):
        raise Unusable(NO_MARK if len(pictures) < len(given) else NO_PICTURE)
    number_of = {id(picture): number for number, picture in enumerate(listed)}
    order = tuple(number_of.get(id(picture), number) for number, picture in enumerate(pictures))
    fault = TOO_MANY if len(pictures) > MAX_IMAGES else conversation_fault(written)
    if fault:
        raise Unusable(fault)
    names = [picture.name for picture in pictures]
    unnamed = [number for number, name in enumerate(names) if not name]
    for number in unnamed:
        more = f"_{number}" if len(pictures) > 1 else ""
        names[number] = f"{default_id}{more}.{suffix_of(pictures[number].data or b'')}"
    pictures = [Picture(name, picture.data) for name, picture in zip(names, pictures, strict=True)]
    image = [] if not names else names[0] if len(names) == 1 else names
    same_images = place in (None, "image") and not unnamed and not dropped and as_list(value.get("image")) == names
    if form == ("conversations",) and written is value["conversations"] and same_images:
        return Reading(value, tuple(pictures), order=order)
    gone = {*form, *dropped} | ({"images", place} - {"image"} if names else set())
    kept = {key: image if key == "image" else item for key, item in value.items() if key not in gone}
    added = {"image": image} if names else {}
    return Reading(
        {"id": default_id, **kept, **added, "conversations": written},
        tuple(pictures),
        dropped=tuple(dropped),
        order=order,
    )


def said_in(value: Mapping[str, Any]) -> Turns | None:
    """Return the turns of a record of any form, as LLaVA's, whether its pictures exist or not.

    None if there is no conversation. Turns in LLaVA's form are returned as they are.
    """
    try:
        turns, _ = turns_of(unpacked(dict(value)))
        texts = [_text_of(turn, []) for turn in turns]
    except (Unusable, RecursionError):
        return None
    if not all(isinstance(turn, dict) and text is turn.get("value") for turn, text in zip(turns, texts, strict=True)):
        turns = [{**turn, "value": text} for turn, text in zip(turns, texts, strict=True)]
    return None if conversation_fault(turns) else turns


def _record_pictures(value: Mapping[str, Any]) -> tuple[list[Picture], str | None, list[str]]:
    """Find the pictures that a record names beside its turns. Returns (pictures, their field, fields to drop)."""
    held = {key: as_list(value.get(key)) for key in IMAGE_KEYS}
    held = {key: items for key, items in held.items() if items}
    if len(held) == 2 and held["image"] != held["images"]:
        raise Unusable("image and images differ")
    place = next(iter(held), None)
    binary = [key for key, item in value.items() if key not in IMAGE_KEYS and _holds_bytes(item)]
    if place is None:
        columns = [key for key in binary if all(_is_picture(item) for item in as_list(value[key]))]
        if len(columns) > 1:
            raise Unusable(f"several columns of images: {', '.join(map(str, columns))[:80]}")
        place = columns[0] if columns else None
    found = [_picture(item) for item in as_list(value[place])] if place is not None else []
    return found, place, [key for key in binary if key != place]


def _holds_bytes(item: Any) -> bool:
    inner = item.values() if isinstance(item, dict) else item if isinstance(item, list | tuple) else ()
    return isinstance(item, bytes) or any(_holds_bytes(each) for each in inner)


def _is_picture(item: Any) -> bool:
    data = item.get("bytes") if isinstance(item, dict) else item
    return isinstance(data, bytes) and data.startswith(_MAGIC)


def _picture(item: Any) -> Picture:
    """Read a picture from a name, a data URI, bytes, or a table with one of these."""
    if isinstance(item, bytes) and item:
        return Picture("", item)
    if isinstance(item, dict):
        name = next((item[key] for key in _NAME_KEYS if item.get(key) is not None), "")
        if isinstance(item.get("bytes"), bytes) and item["bytes"]:
            return Picture(name if isinstance(name, str) else "", item["bytes"])
        if not isinstance(name, str):
            return _picture(name)
        item = name
    if not isinstance(item, str) or not item:
        raise Unusable(NO_NAME)
    if item.startswith("data:"):
        head, comma, body = item.partition(",")
        try:
            data = base64.b64decode(body, validate=True) if head.endswith(";base64") and comma else b""
        except (binascii.Error, ValueError):
            data = b""
        if not data:
            raise Unusable("a data: image that cannot be decoded")
        return Picture("", data)
    if item.startswith("file://"):
        return Picture(item.removeprefix("file://"))
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", item):
        raise Unusable("image is a URL; download it first")
    return Picture(item)


def _place(turns: list[Any], listed: list[Picture], *, first: bool) -> tuple[list[Any], list[Picture]]:
    """Give each mark its picture, in order; marks of their own (content parts, `<img>`) keep theirs.

    first: the form has no marks (`texts`): without any, all pictures come before the first question.
    Returns the turns with a text each, the list itself where no turn changed, and the pictures in order of their marks.
    """
    marks: list[Mark] = []
    texts = [_text_of(turn, marks) for turn in turns]
    own = [mark for mark in marks if isinstance(mark, Picture)]
    if own and listed == own:
        listed = []  # named twice: in the turns and beside them
    if first and not marks and listed:
        place = next((n for n, turn in enumerate(turns) if turn["from"] == "human" and isinstance(texts[n], str)), None)
        if place is not None:
            texts[place] = "\n".join([IMAGE_MARK] * len(listed) + ([texts[place]] if texts[place] else []))
            marks = [None] * len(listed)
    pictures = _match(marks, listed)
    if all(isinstance(turn, dict) and text is turn.get("value") for turn, text in zip(turns, texts, strict=True)):
        return turns, pictures
    return [{**turn, "value": text} for turn, text in zip(turns, texts, strict=True)], pictures


def _match(marks: list[Mark], listed: list[Picture]) -> list[Picture]:
    """Return the picture of each mark; every listed picture must have one."""
    numbers = [mark for mark in marks if isinstance(mark, int)]
    wanting = len(marks) - sum(isinstance(mark, Picture) for mark in marks)
    if len(numbers) == wanting and set(numbers) == set(range(len(listed))):
        return [mark if isinstance(mark, Picture) else listed[mark] for mark in marks if mark is not None]
    if wanting != len(listed):
        raise Unusable(NO_PICTURE if wanting > len(listed) else NO_MARK)
    following = iter(listed)
    return [mark if isinstance(mark, Picture) else next(following) for mark in marks]


def _text_of(turn: Any, marks: list[Mark]) -> Any:
    """Write a turn as one text; appends its marks, with their own pictures if they have any."""
    said = turn.get("value") if isinstance(turn, dict) else None
    asks = isinstance(turn, dict) and turn.get("from") in HUMAN
    if isinstance(said, str):
        return _marked(said, marks) if asks else said
    if not isinstance(said, list):
        return said
    texts = []
    for part in said:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in _IMAGE_PARTS or (kind is None and isinstance(part, dict) and part.get("image")):
            if not asks:
                raise Unusable("an image in an answer")
            number = part.get("index")
            named = any(part.get(key) for key in (*_NAME_KEYS, "bytes"))
            marks.append(_picture(part) if named else number if type(number) is int else None)
            texts.append(IMAGE_MARK)
        elif isinstance(part, str) or (isinstance(part, dict) and isinstance(part.get("text"), str)):
            text = part if isinstance(part, str) else part["text"]
            texts.append(_marked(text, marks) if asks else text)
        else:
            other = OTHER_MEDIA.get(str(kind).removesuffix("_url").removeprefix("input_"))
            raise Unusable(f"it has {other}, which is not read" if other else "a content part without text")
    return "\n".join(texts)


def _marked(text: str, marks: list[Mark]) -> str:
    """Append a text's marks, writing Qwen's `<img>NAME</img>` as a mark; returns the same text if it has none."""
    found = list(_INLINE.finditer(text))
    marks += [_picture(match[1].strip()) if match[1] else None for match in found]
    return _INLINE.sub(IMAGE_MARK, text) if any(match[1] for match in found) else text


def split_at_marks(text: str) -> tuple[str | None, ...]:
    """Split a text at its image marks: the texts between them, without surrounding spaces, and None for each mark."""
    between = [part.strip() for part in text.split(IMAGE_MARK)]
    return tuple(part for each in between for part in (None, each) if part != "")[1:]
