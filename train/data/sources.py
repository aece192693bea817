"""Samples on disk: shards of tar files, or a JSON of instruction records with a folder of images.

Tar shards (`DIR/*.tar`, as `curate emit` and `curate mix` write them): `key.jpg|png|webp|…` optional (of several
`key.0.jpg`, `key.1.jpg`, …), `key.json` with turns, else `key.txt` as the caption. JSON: records of any form that
`curate mix` reads, through the same readers (pipelines/records.py, pipelines/record_files.py).

Only offsets are kept in memory (about 100 bytes a sample); records and images are read where they lie, by any process.
A sample that cannot be used is a reason and a count, never a crash: `measure` finds all but broken pixels before the
first step, and `check_bad` stops the run, with three examples, when they are more than a few.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines import record_files, records, samples
from train.data.prompts import Encoded, Encoder, Rejected, parse
from train.data.tar_index import Keys, index_tar
from train.errors import DataError, UsageError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "MPO")  # Pillow's others run helpers (EPS) or fonts
MAX_PIXELS = 89_478_485  # as in curate: a larger image is taken for a decompression bomb
MAX_OPEN_FILES = 64
FEW = 3  # so many bad samples never stop a run
log = logging.getLogger("train")


@dataclass(frozen=True)
class Record:
    """One sample as read: its images are locations that the same source can open."""

    key: str
    conversations: Any
    images: tuple[Any, ...]
    fields: dict[str, Any] = field(default_factory=dict)


class Files:
    """Read byte ranges of many files through a few open descriptors."""

    def __init__(self) -> None:
        self._open: dict[str, int] = {}

    def read(self, path: str, offset: int, size: int) -> bytes:
        """Return exactly `size` bytes.  Raises: Rejected("unreadable")."""
        try:
            if path not in self._open:
                while len(self._open) >= MAX_OPEN_FILES:
                    os.close(self._open.pop(next(iter(self._open))))
                self._open[path] = os.open(path, os.O_RDONLY)
            data = os.pread(self._open[path], size, offset)
        except OSError:
            raise Rejected("unreadable") from None
        if len(data) != size:
            raise Rejected("unreadable")
        return data

    def __getstate__(self) -> dict[str, Any]:
        return {"_open": {}}


class TarSource:
    """Samples in tar shards, in shard and tar order."""

    images_digest = ""  # images lie in the shards

    def __init__(self, shards: Sequence[Path]) -> None:
        self.files, self.shards = Files(), [str(path) for path in shards]
        keys: list[list[str]] = []
        self.more: dict[int, list[tuple[int, int]]] = {}  # sample -> its images after the first
        parts: list[NDArray[np.int64]] = []
        before = 0
        for number, path in enumerate(shards):
            rows: list[tuple[int, ...]] = []
            keys.append([])
            for key, members in _scan_tar(path):
                keys[-1].append(key)
                images = [members[suffix] for suffix in samples.ordered_pictures(members)]
                if len(images) > 1:
                    self.more[before + len(rows)] = images[1:]
                image = images[0] if images else (0, 0)
                rows.append((number, *members.get("json", (0, 0)), *members.get("txt", (0, 0)), *image))
            parts.append(np.array(rows, np.int64).reshape(-1, 7))
            before += len(rows)
        self.keys = Keys(keys)
        self.rows: NDArray[np.int64] = np.concatenate(parts) if parts else np.zeros((0, 7), np.int64)

    def __len__(self) -> int:
        return len(self.keys)

    def record(self, index: int) -> Record:
        """Read the JSON or the caption of one sample.  Raises: Rejected."""
        shard, json_at, json_size, text_at, text_size, image_at, image_size = (int(x) for x in self.rows[index])
        path, key = self.shards[shard], self.keys[index]
        spans = [(image_at, image_size)] * bool(image_size) + self.more.get(index, [])
        images = tuple((path, *span) for span in spans)
        stored: Any = None
        with contextlib.suppress(ValueError, RecursionError):
            stored = json.loads(self.files.read(path, json_at, json_size)) if json_size else {}
        fields = stored if isinstance(stored, dict) else {}
        caption = self.files.read(path, text_at, text_size) if text_size else None
        names = [f"{PurePosixPath(key).name}.{number}" for number in range(len(images))]
        reading = samples.from_sample(fields, caption, names, key, "")
        if reading.record is not None:
            return Record(key, reading.record["conversations"], images, reading.record)
        if stored is None and caption is None:
            raise Rejected("bad_json")
        if reading.fault == records.MISSING and fields.get("conversations") is None:
            raise Rejected("no_image")
        raise _rejection(fields, reading.fault, len(images))

    def name(self, index: int) -> str:
        """Return shard/key."""
        return f"{Path(self.shards[int(self.rows[index][0])]).name}/{self.keys[index]}"

    def key(self, index: int) -> str:
        """Return the key."""
        return self.keys[index]

    def extents(self) -> Iterator[tuple[str, int, int]]:
        """Yield each shard's stem and rows."""
        edges = np.searchsorted(self.rows[:, 0], np.arange(len(self.shards) + 1)).tolist()
        for path, start, stop in zip(self.shards, edges[:-1], edges[1:], strict=True):
            yield Path(path).stem, start, stop

    def image_bytes(self, location: Any) -> bytes:
        """Read an image member."""
        return self.files.read(*location)


class JsonSource:
    """Records in one JSON or JSON-lines file, of any form that pipelines/records.py reads; images in a folder.

    images_digest: of the images that the records name, in their order, name and size, so that a copy counts as the
    same. A picture replaced by one of as many bytes goes unnoticed; to read them all would take as long as an epoch.
    """

    def __init__(self, path: Path, images: Path | None, *, digest: bool = False) -> None:
        self.path, self.images, self.files = str(path), images, Files()
        here = {os.path.abspath(images), os.path.realpath(images)} if images else set()
        self.folders = [folder.rstrip("/") + "/" for folder in here]
        spans: list[tuple[int, int]] = []
        seen = hashlib.blake2b(digest_size=16)
        value: Any = None
        with path.open("rb") as file:
            self.codec = record_files.encoding_of(file.read(64))[0]
            try:
                for item in record_files.read_items(file, str(path)):
                    value = item.value
                    spans.append((item.offset, item.size))
                    if digest:
                        seen.update(self._describe_images(len(spans) - 1, value).encode(errors="replace"))
            except record_files.Broken as broken:
                raise UsageError(str(broken)) from None
        if path.suffix == ".json" and len(spans) == 1 and not records.has_turns(value):
            raise UsageError(f"{path}: expected a JSON list of records, JSON lines, or an object that holds records")
        self.spans: NDArray[np.int64] = np.array(spans, np.int64).reshape(-1, 2)
        self.images_digest = seen.hexdigest() if digest else ""

    def __len__(self) -> int:
        return len(self.spans)

    def record(self, index: int) -> Record:
        """Read one record and look whether its images exist.  Raises: Rejected."""
        fields = self._fields(index)
        reading = records.read(fields, f"#{index}")
        if reading.record is None:
            named = records.as_list(fields.get("image"))
            if reading.fault in REASONS or reading.fault == records.NO_NAME:
                for name in named:  # an image's fault is told before the conversation's
                    self._locate(name)
            raise _rejection(fields, reading.fault, len(named))
        locations = tuple(self._locate(each.name)[0] if each.data is None else each.data for each in reading.pictures)
        key = _text(reading.record.get("id", f"#{index}"))
        return Record(key, reading.record["conversations"], locations, reading.record)

    def name(self, index: int) -> str:
        """Return file/key."""
        return f"{Path(self.path).name}/{self.key(index)}"

    def key(self, index: int) -> str:
        """Return the record's id, or #row where there is none."""
        try:
            return _text(self._fields(index).get("id", f"#{index}"))
        except Rejected:
            return f"#{index}"

    def extents(self) -> Iterator[tuple[str, int, int]]:
        """Yield the file's stem and records."""
        yield Path(self.path).stem, 0, len(self)

    def _fields(self, index: int) -> dict[str, Any]:
        offset, size = (int(x) for x in self.spans[index])
        data = self.files.read(self.path, offset, size)
        try:
            fields = record_files.parse(data, self.codec)
        except (ValueError, RecursionError):
            fields = None
        if not isinstance(fields, dict):
            raise Rejected("bad_json")
        return fields

    def _locate(self, image: Any) -> tuple[str, int]:
        """Return the path of an image below the folder, and its size.  Raises: Rejected."""
        if isinstance(image, str):
            image = next((image.removeprefix(each) for each in self.folders if image.startswith(each)), image)
        parts = PurePosixPath(image).parts if isinstance(image, str) else ("..",)
        if ".." in parts or PurePosixPath(image).is_absolute():
            raise Rejected("image_outside_folder")
        if self.images is None:
            raise Rejected("no_image_folder")
        found = _stat(self.images.joinpath(*parts))
        if found is None and "\\" in image:  # as Windows writes it
            return self._locate(image.replace("\\", "/"))
        if found is None:
            raise Rejected("missing_image")
        return found

    def _describe_images(self, index: int, value: Any) -> str:
        reading = records.read(value, "")
        fields = value if isinstance(value, dict) else {}
        names = [each.name for each in reading.pictures if each.data is None]
        names = names if reading.record is not None else records.as_list(fields.get("image"))
        try:
            sizes = [(name, self._locate(name)[1]) for name in names]
        except Rejected:
            return f"{index} Rejected\n"
        return "".join(f"{name} {size}\n" for name, size in sizes)

    def image_bytes(self, location: Any) -> bytes:
        """Read an image file, or return what the record itself holds."""
        try:
            return location if isinstance(location, bytes) else Path(location).read_bytes()
        except OSError:
            raise Rejected("unreadable") from None


Source = TarSource | JsonSource  # what training needs of samples; picklable, for worker processes
# Faults of records under the names by which samples are counted; others become names as they are.
REASONS = {
    "not a JSON object": "bad_json",
    "no list of turns": "no_conversation",
    "no turns": "no_conversation",
    records.NO_FORM: "no_conversation",
    "no conversation and no caption": "no_caption",
    "a turn without from and value": "bad_turn",
    "a turn by an unknown speaker": "bad_turn",
    records.NO_PICTURE: "image_mark_without_image",
    records.NO_MARK: "image_without_image_mark",
    records.NOT_UTF8: "bad_utf8",
}


def _rejection(fields: dict[str, Any], fault: str, num_images: int) -> Rejected:
    """Name what is wrong with a record; of LLaVA's form as `parse` names it, where that refuses it too."""
    try:
        if isinstance(fields.get("conversations"), list):
            parse(fields["conversations"], num_images)
    except Rejected as reason:
        return reason
    return Rejected(REASONS.get(fault, re.sub(r"\W+", "_", fault).strip("_")))


def _stat(path: Path) -> tuple[str, int] | None:
    """Return a regular file's path and size, or None."""
    try:
        found = path.stat()
    except (OSError, ValueError):  # also a name that no file can have
        return None
    return (str(path), found.st_size) if stat.S_ISREG(found.st_mode) else None


def _text(value: Any) -> str:
    """Write a value as text that any file can hold: JSON may have halves of characters."""
    return str(value).encode(errors="replace").decode()


def open_source(data: str, images: str | None = None, *, digest: bool = False) -> Source:
    """Open a folder of shards, one shard, or a LLaVA JSON.

    digest: identify the images of a JSON too, which looks at every one of them.
    Raises: UsageError that says what was found instead.
    """
    path = Path(data)
    if images and path.suffix not in (".json", ".jsonl"):
        raise UsageError(f"--images {images} goes with a LLaVA JSON; the shards of --data {data} hold theirs")
    if path.is_dir():
        shards = sorted(path.glob("*.tar"))
        if not shards:
            seen = ", ".join(sorted(p.name for p in path.iterdir())[:5]) or "nothing"
            raise UsageError(f"--data {data}: no *.tar in that folder; it holds {seen}")
        source: Source = TarSource(shards)
    elif not path.is_file():
        raise UsageError(f"--data {data}: no such file or folder")
    elif path.suffix == ".tar":
        source = TarSource([path])
    elif path.suffix in (".json", ".jsonl"):
        beside = path.parent / "images"
        folder = Path(images) if images else beside if beside.is_dir() else path.parent
        if not folder.is_dir():
            raise UsageError(f"--images {folder}: no such folder")
        source = JsonSource(path, folder, digest=digest)
    else:
        raise UsageError(f"--data {data}: expected a folder of .tar shards, a .tar, a .json or a .jsonl")
    if not len(source):
        raise UsageError(f"--data {data}: no samples in it")
    return source


def _scan_tar(path: Path) -> Iterator[tuple[str, dict[str, tuple[int, int]]]]:
    """Yield each sample's key with (offset, size) of its members by suffix; a torn tail is dropped with a warning.

    Members of one key are one sample wherever they lie; a suffix that it has already begins another, as in curate.
    """
    rows: list[tuple[str, dict[str, tuple[int, int]]]] = []
    latest: dict[str, dict[str, tuple[int, int]]] = {}
    found, fault = index_tar(path)
    for whole, offset, size in found:
        folder, _, name = whole.rpartition("/")
        stem, dot, suffix = name.partition(".")
        if dot:
            key, suffix = f"{folder}/{stem}" if folder else stem, suffix.lower()
            members = latest.get(key)
            if members is None or suffix in members:
                members = latest[key] = {}
                rows.append((key, members))
            members[suffix] = (offset, size)
    if fault:
        log.warning("%s is torn (%s): %d samples were read before that", path, fault, len(rows))
    yield from rows


def decode_image(data: bytes) -> Any:
    """Decode to an RGB PIL image.  Raises: Rejected("bad_image" or "huge_image")."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Rejected("huge_image")
            return image.convert("RGB")
    except Rejected:
        raise
    except Exception:  # decoders answer hostile bytes with nearly every exception there is
        raise Rejected("bad_image") from None


def encode(source: Source, encoder: Encoder, index: int, max_length: int) -> tuple[Record, Encoded]:
    """Read and encode one sample.  Raises: Rejected."""
    record = source.record(index)
    turns = parse(record.conversations, len(record.images))
    return record, encoder.encode(turns, max_length)


@dataclass
class Measured:
    """What each sample costs and why some cannot be used."""

    lengths: NDArray[np.int32]  # tokens, 0 where unusable
    supervised: NDArray[np.int32]  # positions with a target
    images: NDArray[np.int32]
    num_truncated: int
    reasons: dict[int, str]  # sample index -> why it is skipped
    num_thinking: int = 0  # samples whose last answer thinks first
    num_shortened: int = 0  # samples of which the template leaves a text out

    @property
    def usable(self) -> NDArray[np.int64]:
        """The indices of the samples that can be trained on, in order."""
        return np.flatnonzero(self.lengths)


def check_bad(source: Source, reasons: dict[int, str], max_share: float) -> None:
    """Stop when more than `max_share` of the samples cannot be used, and they are more than a few or half; or all are.

    Raises: DataError with counts by reason and three examples.
    """
    n, bad = len(source), len(reasons)
    if bad < n and (bad <= max_share * n or (bad <= FEW and bad * 2 < n)):
        return
    counts = ", ".join(f"{count} {reason}" for reason, count in Counter(reasons.values()).most_common())
    examples = "; ".join(f"{source.name(index)} ({reasons[index]})" for index in sorted(reasons)[:3])
    form, more = "; `curate mix` turns other forms of instruction data into LLaVA's", "the stage's max_bad_share"
    advice = f", or allow more with {more} (now {max_share})" if bad < n else form
    raise DataError(f"{bad:,} of {n:,} samples cannot be used: {counts}. Examples: {examples}. Mend the data{advice}")
