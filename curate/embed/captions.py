"""A sample's caption: where it is found, which of several counts, and what of it is text.

By default it is the `.txt` member, else the JSON's `caption`, else the text of its `conversations`. If fields are
named (`--caption`), only those count, in their order: fields of the JSON, or members by their suffix. Of a list the
first text counts, or one drawn by the seed and the sample's key, so that every run picks the same.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any

from curate.errors import ShardError
from curate.storage import records, tar
from pipelines.samples import visible

# Fields that img2dataset and others put into a sample's JSON, and that hold text but no caption.
NO_CAPTIONS = frozenset("key url status error_message exif md5 sha256 uid id image source license filename".split())
MOST_NAMED = 3  # fields, in a reason


@dataclass(frozen=True)
class Wanted:
    """Which captions are taken. fields: of the JSON, or suffixes; none: the usual places. pick: first or random."""

    fields: tuple[str, ...] = ()
    pick: str = "first"
    seed: int = 0


USUAL = Wanted()


def clean(text: Any) -> str | None:
    """Return a value as a caption: text without NUL, byte order marks and invisible ends; None if nothing is left."""
    if not isinstance(text, str):
        return None
    seen = visible(text)
    return records.usable_text(seen) if seen else None


def texts_in(value: Any) -> Iterator[str]:
    """Yield the texts of a field: itself, or those of a list."""
    for each in value if isinstance(value, list) else [value]:
        text = clean(each)
        if text is not None:
            yield text


@dataclass(frozen=True)
class Caption:
    """A sample's caption, or the status of the sample without one, and why in a few words."""

    text: str | None
    status: str = ""
    reason: str = ""


NONE = Caption(None)


def read_caption(file: IO[bytes], sample: tar.Sample, described: dict[str, Any], wanted: Wanted = USUAL) -> Caption:
    """Find a sample's caption. described: its JSON."""
    if wanted.fields:
        return _named(file, sample, described, wanted)
    member = sample.member(tar.CAPTION_SUFFIX)
    caption = _text(file, member) if member is not None else NONE
    if caption.text or caption.status:
        return caption
    text = next(texts_in(described.get("caption")), None) or clean(records.spoken_text(described))
    return Caption(text) if text else Caption(None, "no_caption", _elsewhere(file, sample, described))


def _elsewhere(file: IO[bytes], sample: tar.Sample, described: dict[str, Any]) -> str:
    """Say where a sample without a caption has text: fields of its JSON, members of other suffixes; or nothing."""
    fields = [name for name, value in described.items() if name not in NO_CAPTIONS and any(texts_in(value))]
    known = (tar.CAPTION_SUFFIX, tar.JSON_SUFFIX, *tar.IMAGE_SUFFIXES)
    others = (each for each in sample.members if each.suffix not in known)
    texts = (each for each in others if each.suffix.rpartition(".")[2] not in known[1:])  # but `en.txt` is one
    members = [each.suffix for each in texts if _text(file, each).text]  # not vectors, or what gzip packed
    seen = list(dict.fromkeys([*fields, *members]))[:MOST_NAMED]
    return f"but it has {', '.join(seen)}, which --caption FIELD would take" if seen else ""


def _named(file: IO[bytes], sample: tar.Sample, described: dict[str, Any], wanted: Wanted) -> Caption:
    troubles = []
    for field in wanted.fields:
        texts = list(texts_in(described.get(field)))
        member = sample.member(field.lower().removeprefix("."))
        if not texts and member is not None:
            found = _text(file, member)
            texts = [found.text] if found.text else []
            troubles += [found] if found.status else []
        if texts:
            return Caption(_pick(texts, sample.key, wanted))
    return troubles[0] if troubles else Caption(None, "no_caption", f"no text in {', '.join(wanted.fields)}")


def _pick(texts: Sequence[str], key: str, wanted: Wanted) -> str:
    if wanted.pick == "first":
        return texts[0]
    drawn = hashlib.blake2b(f"{wanted.seed}\0{key}".encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return texts[int.from_bytes(drawn, "big") % len(texts)]


def _text(file: IO[bytes], member: tar.Member) -> Caption:
    """Read a text member; without text or status where it is empty."""
    if member.size > tar.MAX_TEXT_BYTES:
        return Caption(None, "bad_caption", f"over the limit of {tar.MAX_TEXT_BYTES:,} bytes")
    try:
        return Caption(clean(tar.read_member(file, member).decode("utf-8")))
    except UnicodeDecodeError:
        return Caption(None, "bad_caption", "not UTF-8: convert the file, e.g. with iconv")
    except ShardError:
        return Caption(None, "bad_caption", "the shard breaks off within it")
