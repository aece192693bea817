"""Samples on disk: shards of tar files, or instruction records in a JSON or parquet with a folder of images.

Tar shards (`DIR/*.tar`, as `curate emit` and `curate mix` write them): tar_source.py. JSON and parquet: records of any
form that `curate mix` reads, through the same readers (pipelines/records.py, record_files.py): record_source.py.

A sample that cannot be used is skipped and counted by reason, never a crash: `measure` finds all but broken pixels
before the first step, and `check_bad` stops the run, with three examples, if there are more than a few.
"""

from __future__ import annotations

import io
import logging
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.pictures import FORMATS, MAX_PIXELS, visible, without_notes
from train.data.encoder import Encoded, Encoder
from train.data.message_tree import encode_tree
from train.data.prompts import Rejected, parse, parse_turn
from train.data.reading import Record
from train.data.record_source import JsonRows, RecordSource, TableRows
from train.data.tar_source import TarSource
from train.dist import Runtime
from train.errors import DataError, UsageError
from train.folder import refuse_half, shards_in

FEW = 3  # this many bad samples never stop a run, unless they are half of all
log = logging.getLogger("train")

Source = TarSource | RecordSource  # where training reads samples from; picklable, for worker processes


def open_source(
    data: str, images: str | None = None, *, digest: bool = False, runtime: Runtime | None = None
) -> Source:
    """Open a folder of shards, one shard, or records in a JSON or parquet file (or a folder of parquet files).

    digest: also digest the images of records, which looks up every one of them.  runtime: that of a run whose ranks all
    open the data; they share the reading and unpacking.
    Raises: UsageError that says what was found instead.
    """
    path = Path(data)
    if not path.exists():
        raise UsageError(f"--data {data}: no such file or folder")
    refuse_half(path if path.is_dir() else path.parent)
    shards, passed = shards_in(path)
    tables = sorted(path.glob("*.parquet")) if path.is_dir() else [path] if path.suffix == ".parquet" else []
    is_json = path.is_file() and not shards and not tables  # whatever its suffix
    if images and (shards or not (tables or is_json)):
        raise UsageError(f"--images {images} is for JSON or parquet only; shards hold their own images (--data {data})")
    source: Source
    if shards:
        source = TarSource(shards, passed, runtime)
    elif tables or is_json:
        home = path if path.is_dir() else path.parent
        folder = Path(images) if images else home / "images" if (home / "images").is_dir() else home
        if not folder.is_dir():
            raise UsageError(f"--images {folder}: no such folder")

        def read(local: int, _ranks_here: int) -> dict[str, JsonRows | TableRows]:
            return {} if local else {"rows": TableRows(tables) if tables else JsonRows(path)}

        rows = (read(0, 1) if runtime is None else runtime.share_here(read))["rows"]
        source = RecordSource(path, rows, folder, digest=digest)
    else:
        if not path.is_dir():
            raise UsageError(f"--data {data}: expected a folder of .tar shards, a .tar, a JSON or a .parquet")
        seen = ", ".join([*passed, *sorted(p.name for p in path.iterdir())][:5]) or "nothing"
        raise UsageError(f"--data {data}: no *.tar in that folder; it holds {seen}{_instead(path)}")
    if not len(source):
        raise UsageError(f"--data {data}: no samples in it")
    for note in passed:
        log.warning("%s", note)
    return source


def _instead(folder: Path) -> str:
    """Suggest what was meant by a folder without shards: its largest JSON, else a folder in it with data."""
    lists = [path for path in folder.iterdir() if path.suffix in (".json", ".jsonl") and path.is_file()]
    deeper = (path.parent for end in ("tar", "parquet") for path in sorted(folder.glob(f"*/*.{end}")))
    meant = max(lists, key=lambda path: path.stat().st_size) if lists else next(deeper, None)
    return f"; give --data {meant}" if meant else ""


def losses(source: Source, reasons: dict[int, str]) -> list[str]:
    """List what of a source is not used: samples by reason with an example, and what was passed over."""
    first = {reason: index for index, reason in sorted(reasons.items(), reverse=True)}
    counts = Counter(reasons.values()).most_common()
    return [f"{count:,} × {reason} (e.g. {source.name(first[reason])})" for reason, count in counts] + source.notes


def decode_image(data: bytes) -> Any:
    """Decode to an RGB PIL image; converts deep and transparent ones.  Raises: Rejected (bad_image, huge_image)."""
    from PIL import Image

    def decode(data: bytes) -> Any:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Rejected("huge_image")
            return visible(image).convert("RGB")

    try:
        try:
            return decode(data)
        except ValueError:  # e.g. for text chunks that are too long
            return decode(without_notes(data))
    except Rejected:
        raise
    except Exception:  # decoders raise almost any exception on hostile bytes
        raise Rejected("bad_image") from None


def encode(source: Source, encoder: Encoder, index: int, max_length: int) -> tuple[Record, Encoded]:
    """Read and encode one sample.  Raises: Rejected."""
    record = source.record(index)
    turns = parse(record.conversations, len(record.images))
    return record, encode_tree(encoder, turns, max_length) or encoder.encode(turns, max_length)


def loses_turns(record: Record) -> bool:
    """Whether `parse` drops a text: an answer before any question, a question without an answer, a late system text."""
    given = (parse_turn(entry, len(record.images) > 0)[1] for entry in record.conversations)
    kept = (turn.parts for turn in parse(record.conversations, len(record.images)))
    return sum(len(part or "") for parts in given for part in parts) > sum(
        len(p or "") for parts in kept for p in parts
    )


@dataclass
class Measured:
    """What each sample costs and why some cannot be used."""

    lengths: NDArray[np.int32]  # tokens, 0 where unusable
    supervised: NDArray[np.int32]  # positions with a target
    images: NDArray[np.int32]
    num_truncated: int
    reasons: dict[int, str]  # sample index -> why it is skipped
    num_thinking: int = 0  # samples whose last answer begins with thinking that the template knows
    num_shortened: int = 0  # samples from which the template leaves out a text
    num_unread: int = 0  # samples that lose a turn (`loses_turns`)
    num_trees: int = 0  # samples that are message trees

    @property
    def lost_turns(self) -> list[str]:
        """Return a line that says how many samples lose turns; no line if none does."""
        what = "an answer before any question, a question without an answer, or a system text in mid-conversation"
        return [f"turns of {self.num_unread:,} samples: {what}"] if self.num_unread else []

    @property
    def usable(self) -> NDArray[np.int64]:
        """The indices of the samples that can be trained on, in order."""
        return np.flatnonzero(self.lengths)


def check_bad(source: Source, reasons: dict[int, str], max_share: float) -> None:
    """Stop if more than `max_share` of the samples cannot be used, and they are more than FEW or half of all; or all.

    Raises: DataError with counts by reason and three examples.
    """
    n, bad = len(source), len(reasons)
    if bad < n and (bad <= max_share * n or (bad <= FEW and bad * 2 < n)):
        return
    counts = ", ".join(f"{count} {reason}" for reason, count in Counter(reasons.values()).most_common())
    examples = "; ".join(f"{source.name(index)} ({reasons[index]})" for index in sorted(reasons)[:3])
    advice = "; `curate mix` converts other forms of instruction data to LLaVA's"
    if bad < n:
        advice = f", or allow more with the stage's max_bad_share (now {max_share})"
    raise DataError(f"{bad:,} of {n:,} samples cannot be used: {counts}. Examples: {examples}. Fix the data{advice}")
