"""Samples of tar shards: `key.jpg|png|webp|…` (several images: `key.0.jpg`, `key.1.jpg`, …), `key.json`, `key.txt`.

Only offsets are kept in memory, about 100 bytes per sample; any process reads members directly from the shard.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines import records, samples
from train.data import scratch
from train.data.prompts import Rejected
from train.data.reading import Files, Record, rejection
from train.data.tar_index import Keys, index_tar
from train.dist import Runtime

log = logging.getLogger("train")


class TarSource:
    """Samples in tar shards, in shard and tar order; gzipped shards are unpacked first.

    notes: what could not be read in the shards, or was passed over beside them, in words.
    """

    images_digest = ""  # images lie in the shards

    def __init__(self, shards: Sequence[Path], passed: Sequence[str] = (), runtime: Runtime | None = None) -> None:
        """Unpack and scan every shard; each rank of a run does a share of them, for all ranks (a collective)."""
        self.files, self.shards, self.notes = Files(), list(shards), list(passed)
        unpacked = _unpacked(shards, runtime)
        self.plain = [place for place, _ in unpacked]
        first, every = (0, 1) if runtime is None else (runtime.rank, runtime.world)
        mine = range(first, len(shards), every)
        own = {n: _scan_tar(Path(unpacked[n][0]), shards[n].name, unpacked[n][1]) for n in mine}
        found = own if runtime is None else {n: scan for part in runtime.gather(own) for n, scan in part.items()}
        scans = [found.pop(number) for number in range(len(shards))]
        self.more: dict[int, list[tuple[int, int]]] = {}  # sample -> its images after the first
        before = 0
        for scan in scans:
            self.notes += scan.notes
            self.more |= {before + row: images for row, images in scan.more.items()}
            before += len(scan.rows)
        self.keys = Keys([scan.keys for scan in scans])
        parts = [np.insert(scan.rows, 0, number, axis=1) for number, scan in enumerate(scans)]
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
            return Record(key, reading.record["conversations"], reading.arrange(images), reading.record)
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
            yield samples.without_suffix(path.name), start, stop

    def image_bytes(self, location: Any) -> bytes:
        """Read an image member."""
        return self.files.read(*location)


def _unpacked(shards: Sequence[Path], runtime: Runtime | None) -> list[tuple[str, str]]:
    """Return where each shard can be read, and how it is torn, or "".

    The ranks of one machine share the unpacking and the unpacked files.
    """

    def own(first: int, every: int) -> dict[int, tuple[str, str]]:
        found = ((n, scratch.unpacked(shards[n])) for n in range(first, len(shards), every))
        return {n: (str(place), torn) for n, (place, torn) in found}

    found = own(0, 1) if runtime is None else runtime.share_here(own)
    return [found[n] for n in range(len(shards))]


@dataclass
class Scan:
    """What one shard holds: keys, (offset, size) of JSON, text and first image i64 [n, 6], and of further images."""

    keys: list[str]
    rows: NDArray[np.int64]
    more: dict[int, list[tuple[int, int]]]
    notes: list[str]  # what is wrong with it


def _scan_tar(path: Path, name: str, torn: str) -> Scan:
    """Find the samples of a tar. torn: what is known to be wrong with it, in words, or "".

    Members of one key form one sample wherever they lie; a suffix that the sample already has begins a new sample, as
    in curate.
    """
    keys: list[str] = []
    rows: list[dict[str, tuple[int, int]]] = []
    latest: dict[str, dict[str, tuple[int, int]]] = {}
    found, fault = index_tar(path)
    fault = "; ".join(filter(None, (torn, fault)))
    for whole, offset, size in found:
        folder, _, last = whole.rpartition("/")
        stem, dot, suffix = last.partition(".")
        if dot and not samples.is_macos(whole):
            key, suffix = f"{folder}/{stem}" if folder else stem, suffix.lower()
            members = latest.get(key)
            if members is None or suffix in members:
                members = latest[key] = {}
                keys.append(key)
                rows.append(members)
            members[suffix] = (offset, size)
    notes = [f"{name}: {fault}; {len(rows)} samples of it are read"] if fault else []
    for note in notes:
        log.warning("%s", note)
    images = [[members[suffix] for suffix in samples.ordered_pictures(members)] for members in rows]
    nothing = (0, 0)
    places = [
        (*members.get("json", nothing), *members.get("txt", nothing), *(shown[0] if shown else nothing))
        for members, shown in zip(rows, images, strict=True)
    ]
    more = {row: shown[1:] for row, shown in enumerate(images) if len(shown) > 1}
    return Scan(keys, np.array(places, np.int64).reshape(-1, 6), more, notes)
