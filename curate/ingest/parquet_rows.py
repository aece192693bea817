"""Rows of the parquet files that `pack` makes tars of: read a few at a time, and named by unique keys."""

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from curate.errors import ShardError
from curate.ingest.beside import File
from curate.ingest.layouts import name_of
from curate.storage import faults, paths
from curate.storage.faults import Faults
from curate.storage.renewal import Seen
from curate.storage.tar import is_safe
from pipelines.terminal import first_line

KEYS = ("key", "__key__", "image_id", "id", "uid")
ROWS = 64  # of parquet, in memory at a time


@dataclass(frozen=True)
class Part:
    """What one tar is made of: files by key and suffix under a folder, or rows start … stop of a parquet file.

    seen: how large that is and when it was written. keyed: the rows may have keys of their own. broken: why the file
    cannot be read.
    """

    source: str
    rows: int
    files: Sequence[File] = ()
    start: int = 0
    image: str = ""
    caption: str = ""
    root: str = ""  # the folder that names of files beside the table are relative to
    seen: Seen = (0, "", "")
    keyed: bool = False
    broken: str = ""


class Rows:
    """Reads rows of parquet files, a few in memory at a time; consecutive parts are read in one pass.

    A part is found by its row group. If the next part of the same file comes later in it, reading continues from the
    present position: a file of one large row group is decoded once by each worker, however many tars it gives.
    """

    def __init__(self, *, keys_only: bool = False) -> None:
        self.keys_only = keys_only
        self.source, self.at = "", 0
        self.batches: Iterator[pa.RecordBatch] = iter(())
        self.rest: pa.RecordBatch | None = None

    def read(self, part: Part) -> Iterator[dict[str, Any]]:
        """Yield a part's rows. Raises: ShardError when the file cannot be read."""
        stop = part.start + part.rows
        try:
            if part.source != self.source or part.start < self.at:
                self._open(part)
            while self.at < stop:
                batch = self.rest if self.rest is not None else next(self.batches)
                first, last = max(part.start - self.at, 0), min(stop - self.at, batch.num_rows)
                self.rest = batch.slice(last) if last < batch.num_rows else None
                self.at += last
                if last > first:
                    yield from batch.slice(first, last - first).to_pylist()
        except StopIteration:
            raise ShardError(
                f"{part.source} ends after {self.at:,} rows, {part.start + part.rows:,} expected"
            ) from None
        except (pa.ArrowException, OSError) as error:
            self.source = ""
            raise ShardError(f"{part.source} cannot be read: {first_line(error)}") from None

    def _open(self, part: Part) -> None:
        """Open a part's file at the row group that holds its first row."""
        import pyarrow.parquet as pq

        held = pq.ParquetFile(paths.open_read(part.source))
        sizes = [held.metadata.row_group(index).num_rows for index in range(held.metadata.num_row_groups)]
        group, self.at = 0, 0
        while group < len(sizes) and self.at + sizes[group] <= part.start:
            self.at += sizes[group]
            group += 1
        self.source, self.rest = part.source, None
        columns = [each for each in KEYS if each in held.schema_arrow.names and each != part.image]
        chosen = columns if self.keys_only else None
        self.batches = held.iter_batches(ROWS, row_groups=list(range(group, len(sizes))), columns=chosen)


def key_of(row: dict[str, Any], fallback: str, seen: set[str]) -> tuple[str, str]:
    """Name a row by its own key if that is safe and no earlier row has it; a key ends at its first dot.

    Returns the name, and, if the row's own key could not be used, why.
    """
    given = next((named for name in KEYS if (named := name_of(row.get(name))) is not None), "")
    key = re.sub(r"[./\\:]", "_", given)
    why = (
        "that an earlier row has, too" if key in seen else "that cannot name a file" if key and not is_safe(key) else ""
    )
    if not key or why:
        key = next(name for n in itertools.count() if (name := f"{fallback}{f'_{n}' * bool(n)}") not in seen)
    seen.add(key)
    return key, why


def count_keys(parts: Mapping[str, Part], told: Faults) -> None:
    """Count the rows of tables whose own keys could not be used.

    This happens at the end, over all tars, so that a run that was interrupted gives the same counts.
    """
    table = Rows(keys_only=True)
    for stem, part in parts.items():
        seen: set[str] = set()
        for number, row in enumerate(table.read(part) if part.keyed else (), part.start):
            name, why = key_of(row, f"{stem}_{number:09d}", seen)
            if why:
                faults.add(told, f"ids {why}: such rows are named by their number", f"{stem}: row {number}, {name}")
