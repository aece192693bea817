"""Samples of tar shards (`key.jpg|png|webp|…`, of several `key.0.jpg`, `key.1.jpg`, …, `key.json`, `key.txt`).

Only offsets are kept in memory, about 100 bytes a sample; members are read where they lie, by any process.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines import records, samples
from train.data import scratch
from train.data.prompts import Rejected
from train.data.reading import Files, Record, rejection
from train.data.tar_index import Keys, index_tar
from train.folder import stem_of

log = logging.getLogger("train")


class TarSource:
    """Samples in tar shards, in shard and tar order; what is packed by gzip is unpacked first.

    notes: what of the shards could not be read, or was passed over beside them, in words.
    """

    images_digest = ""  # images lie in the shards

    def __init__(self, shards: Sequence[Path], passed: Sequence[str] = ()) -> None:
        self.files, self.shards, self.notes = Files(), list(shards), list(passed)
        self.plain = [str(scratch.unpacked(path)) for path in shards]
        keys: list[list[str]] = []
        self.more: dict[int, list[tuple[int, int]]] = {}  # sample -> its images after the first
        parts: list[NDArray[np.int64]] = []
        before = 0
        for number, path in enumerate(self.plain):
            rows: list[tuple[int, ...]] = []
            keys.append([])
            for key, members in _scan_tar(Path(path), shards[number].name, self.notes):
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
        path, key = self.plain[shard], self.keys[index]
        spans = [(image_at, image_size)] if image_size else []
        images = tuple((path, *span) for span in [*spans, *self.more.get(index, ())])
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
        raise rejection(fields, reading.fault, len(images))

    def name(self, index: int) -> str:
        """Return shard/key."""
        return f"{self.shards[int(self.rows[index][0])].name}/{self.keys[index]}"

    def key(self, index: int) -> str:
        """Return the key."""
        return self.keys[index]

    def extents(self) -> Iterator[tuple[str, int, int]]:
        """Yield each shard's stem and rows."""
        edges = np.searchsorted(self.rows[:, 0], np.arange(len(self.shards) + 1)).tolist()
        for path, start, stop in zip(self.shards, edges[:-1], edges[1:], strict=True):
            yield stem_of(path), start, stop

    def image_bytes(self, location: Any) -> bytes:
        """Read an image member."""
        return self.files.read(*location)


def _scan_tar(path: Path, name: str, notes: list[str]) -> Iterator[tuple[str, dict[str, tuple[int, int]]]]:
    """Yield each sample's key with (offset, size) of its members by suffix; notes takes what is wrong with the tar.

    Members of one key are one sample wherever they lie; a suffix that it has already begins another, as in curate.
    """
    rows: list[tuple[str, dict[str, tuple[int, int]]]] = []
    latest: dict[str, dict[str, tuple[int, int]]] = {}
    found, fault = index_tar(path)
    for whole, offset, size in found:
        folder, _, last = whole.rpartition("/")
        stem, dot, suffix = last.partition(".")
        if dot and not samples.is_macos(whole):
            key, suffix = f"{folder}/{stem}" if folder else stem, suffix.lower()
            members = latest.get(key)
            if members is None or suffix in members:
                members = latest[key] = {}
                rows.append((key, members))
            members[suffix] = (offset, size)
    if fault:
        notes.append(f"{name}: {fault}; {len(rows)} samples of it are read")
        log.warning("%s", notes[-1])
    yield from rows
