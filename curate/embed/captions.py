"""A sample's caption: where it stands, which of several counts, and what of it is text.

By default the `.txt` member, else the JSON's `caption`, else what is said in its `conversations`. Where fields are
named (`--caption`) only those count, in their order: fields of the JSON, or members by their suffix. Of a list the
first text counts, or one by the seed and the sample's key, so that any run picks the same.
"""

import hashlib
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any

from curate.errors import ShardError
from curate.storage import records, tar

NOWHERE = ("\0", "\ufeff")  # no text has them on purpose: NUL, and the byte order mark that Windows puts first
EDGES = "\u200b\u200c\u200d\u2060\u00ad"  # invisible: they join or part letters, and mean nothing at the ends


@dataclass(frozen=True)
class Wanted:
    """Which captions are taken. fields: of the JSON, or suffixes; none: the usual places. pick: first or random."""

    fields: tuple[str, ...] = ()
    pick: str = "first"
    seed: int = 0


USUAL = Wanted()


def clean(text: Any) -> str | None:
    """Take a value for a caption: text without NUL, byte order marks and invisible ends; None where nothing is left."""
    if not isinstance(text, str):
        return None
    for mark in NOWHERE:
        text = text.replace(mark, "")
    text = text.strip()
    while text and (text[0] in EDGES or text[-1] in EDGES):
        text = text.strip(EDGES).strip()
    if all(unicodedata.category(letter) == "Cf" for letter in text):
        return None
    return records.usable_text(text)


def texts_in(value: Any) -> Iterator[str]:
    """Yield the texts of a field: itself, or those of a list."""
    for each in value if isinstance(value, list) else [value]:
        text = clean(each)
        if text is not None:
            yield text


def read_caption(
    file: IO[bytes], sample: tar.Sample, described: dict[str, Any], wanted: Wanted = USUAL
) -> tuple[str | None, str | None]:
    """Find a sample's caption. described: its JSON. Returns the caption, or the status it deserves."""
    if wanted.fields:
        return _named(file, sample, described, wanted)
    member = sample.member(tar.CAPTION_SUFFIX)
    caption, trouble = _text(file, member) if member is not None else (None, None)
    if caption or trouble:
        return caption, trouble
    caption = next(texts_in(described.get("caption")), None)
    if caption is None and records.conversations_of(described):
        caption = clean(records.whole_text(described))
    return caption, None if caption else "no_caption"


def _named(
    file: IO[bytes], sample: tar.Sample, described: dict[str, Any], wanted: Wanted
) -> tuple[str | None, str | None]:
    troubles = []
    for field in wanted.fields:
        texts = list(texts_in(described.get(field)))
        member = sample.member(field.lower().removeprefix("."))
        if not texts and member is not None:
            text, trouble = _text(file, member)
            texts = [text] if text else []
            troubles += [trouble] if trouble else []
        if texts:
            return _pick(texts, sample.key, wanted), None
    return None, troubles[0] if troubles else "no_caption"


def _pick(texts: Sequence[str], key: str, wanted: Wanted) -> str:
    if wanted.pick == "first":
        return texts[0]
    drawn = hashlib.blake2b(f"{wanted.seed}\0{key}".encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return texts[int.from_bytes(drawn, "big") % len(texts)]


def _text(file: IO[bytes], member: tar.Member) -> tuple[str | None, str | None]:
    """Read a text member: (caption, None), (None, None) for an empty one, or (None, "bad_caption")."""
    if member.size > tar.MAX_TEXT_BYTES:
        return None, "bad_caption"
    try:
        return clean(tar.read_member(file, member).decode("utf-8")), None
    except (ShardError, UnicodeDecodeError):
        return None, "bad_caption"
