"""Samples of tar shards as records: which members are pictures, in which order, and the text that belongs to them."""

import re
import unicodedata
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from pipelines.record_forms import FORM_KEYS, Turns, as_list, is_answered
from pipelines.records import IMAGE_MARK, MAX_IMAGES, MISSING, NO_PICTURE, NOT_UTF8, TOO_MANY, Picture, Reading, read

IMAGE_SUFFIXES = tuple("jpg jpeg png webp gif bmp tif tiff avif jfif jpe heic heif jxl".split())
TAR_SUFFIXES, GZIP_SUFFIXES = (".tar", ".tar.gz", ".tgz"), (".tar.gz", ".tgz", ".gz")
MACOS = "macOS's own (._name, __MACOSX)"
MAX_MEMBER_BYTES = 256 << 20  # of a member, a picture or a record; larger ones are counted and never read
# Archives that are not read, and are reported if they lie among tars.
OTHER_ARCHIVES = (".zst", ".zstd", ".tzst", ".xz", ".txz", ".bz2", ".tbz", ".tbz2", ".lz4", ".zip", ".7z", ".rar")
# Spaces by `str.isspace`; one strip of all is linear, whereas a search for `\\s+$` tries every space within a text.
SPACES = "\t\n\v\f\r\x1c\x1d\x1e\x1f \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a"
SPACES += "\u2028\u2029\u202f\u205f\u3000"
_NOWHERE = ("\0", "\ufeff")  # no text has them on purpose: NUL, and the byte order mark that Windows puts first
_EDGES = SPACES + "\u200b\u200c\u200d\u2060\u00ad"  # these join or separate letters, and mean nothing at the ends


def visible(text: str) -> str:
    """Remove NUL and byte order marks from a text, and invisible characters at its ends; "" if nothing else is left."""
    for mark in _NOWHERE:
        text = text.replace(mark, "")
    text = text.strip(_EDGES)
    return "" if all(unicodedata.category(letter) == "Cf" for letter in text) else text


def without_suffix(name: str, suffixes: Sequence[str] = TAR_SUFFIXES) -> str:
    """Strip a tar's suffix, in upper or lower case: its sidecars and its side table are named after the rest."""
    end = next((end for end in suffixes if name.lower().endswith(end)), "")
    return name[: len(name) - len(end)]


def choose_tars(names: Collection[str]) -> tuple[list[str], dict[str, str]]:
    """Choose the tars to be read among file names, in their order; for other archives, say why they are passed over.

    A gzipped tar counts only if the same tar does not lie beside it unpacked.
    """
    plain = {without_suffix(name) for name in names if name.lower().endswith(".tar") and not is_macos(name)}
    chosen: list[str] = []
    passed: dict[str, str] = {}
    for name in names:
        lower = name.lower()
        if lower.endswith(TAR_SUFFIXES) and is_macos(name):
            passed[name] = MACOS
        elif lower.endswith(GZIP_SUFFIXES) and without_suffix(name, GZIP_SUFFIXES) in plain:
            passed[name] = "packed by gzip beside the same tar unpacked"
        elif lower.endswith(TAR_SUFFIXES):
            chosen.append(name)
        elif lower.endswith(OTHER_ARCHIVES):
            passed[name] = "only .tar, .tar.gz and .tgz are read, unpack the others"
    return chosen, passed


def is_macos(name: str) -> bool:
    """Say whether a file is one that macOS puts beside every other: `._name`, or anything in `__MACOSX`."""
    *folders, last = name.split("/")
    return last.startswith("._") or "__MACOSX" in folders


def from_sample(stored: Any, caption: bytes | None, names: Sequence[str], key: str, prompt: str) -> Reading:
    """Make a record of a tar's sample: of its JSON's turns, else of its caption, else of a question with its answer.

    stored: the parsed JSON member, or None. caption: the text member, or None. names: of its pictures, in order.
    prompt: what to ask for a caption.
    """
    fields = stored if isinstance(stored, dict) else {}
    spoken = any(fields.get(name) is not None for name in FORM_KEYS[:3])
    try:
        said = "" if spoken else caption_of(fields, caption)
    except UnicodeDecodeError:
        return Reading(None, fault=NOT_UTF8)
    if spoken or (not said and is_answered(fields)):
        reading = read(fields, key, given=names)
        named = len(as_list(fields.get("image")) or as_list(fields.get("images")))
        missing = (reading.fault == NO_PICTURE and named > len(names)) or len(reading.pictures) > len(names)
        return Reading(None, fault=MISSING) if missing else reading
    if not said or not names:
        return Reading(None, fault=MISSING if said else "no conversation and no caption")
    if len(names) > MAX_IMAGES:
        return Reading(None, fault=TOO_MANY)
    image = names[0] if len(names) == 1 else list(names)
    turns = caption_turns(said, prompt, len(names))
    return Reading({"id": key, "image": image, "conversations": turns}, tuple(Picture(name) for name in names))


def caption_of(fields: Mapping[str, Any], caption: bytes | None) -> str:
    """Return a sample's caption, "" without one: its text member, else that of its JSON (of a list, the first).

    Raises: UnicodeDecodeError.
    """
    texts = (visible(each) for each in as_list(fields.get("caption")) if isinstance(each, str))
    return visible((caption or b"").decode()) or next(filter(None, texts), "")


def caption_turns(caption: str, prompt: str, images: int = 1) -> Turns:
    """Ask for the caption of one or more images (without words if there is no prompt), and answer with it."""
    asked = [IMAGE_MARK] * images + ([prompt] if prompt else [])
    return [{"from": "human", "value": "\n".join(asked)}, {"from": "gpt", "value": caption}]


def ordered_pictures(suffixes: Iterable[str]) -> list[str]:
    """Choose, of a sample's suffixes, those of its pictures, in their order: `jpg`, then `0.jpg`, `1.jpg`, ...

    The first plain one counts, whatever its format. Numbered ones may be written as Energon does (`img0.jpg`).
    """
    plain: list[str] = []
    numbered: dict[int, str] = {}
    for suffix in suffixes:
        head, _, kind = suffix.rpartition(".")
        if kind in IMAGE_SUFFIXES and not head:
            plain.append(suffix)
        elif kind in IMAGE_SUFFIXES and (match := re.fullmatch(r"(?:img|image)?[_.-]?(\d{1,6})", head)):
            numbered.setdefault(int(match[1]), suffix)
    return [*plain[:1], *(numbered[number] for number in sorted(numbered))]
