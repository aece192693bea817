"""The sidecars of a finished directory: remote ones are read several at a time, and each footer only once.

A directory does not change while a run reads it, so the metadata of remote files is kept: some KB each, for the first
few thousand. It is not sent to other processes.
"""

import os
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
import pyarrow as pa

from curate.errors import ContractError
from curate.storage import paths, ranges, sidecar
from curate.storage.remote_arrow import RemoteFile

MOST_OPENED = 4096
TINY_ROWS, BLOCK = 64, 4096  # rows of a tiny sidecar, on average; sidecars that are copied together


class Sidecars:
    """The sidecars of a directory. rows: of each stem, by its manifest; mend: what to type if a sidecar disagrees."""

    def __init__(self, directory: str, rows: Mapping[str, int], mend: str) -> None:
        self.directory, self.rows, self.mend = directory, rows, mend
        self._opened: dict[str, RemoteFile] = {}
        self._kept: _Kept | None = None
        self._at_once: Sequence[str] = ()
        self._held: pa.Table | None = None

    def __reduce__(self) -> tuple[type["Sidecars"], tuple[str, Mapping[str, int], str]]:
        return Sidecars, (self.directory, self.rows, self.mend)

    def _place(self, stem: str) -> sidecar.Place:
        location = paths.join(self.directory, f"{stem}.arrow")
        if not paths.is_remote(location):
            return location
        found = self._opened.get(stem)
        if found is None:
            found = cast(RemoteFile, sidecar.opened(location))
            if len(self._opened) < MOST_OPENED:
                self._opened[stem] = found
        return found

    def opened(self, stem: str) -> sidecar.Opened:
        """Open a stem's sidecar, to read it in several ways."""
        return sidecar.opened(self._place(stem))

    def keep(self, at_once: Sequence[str] = ()) -> None:
        """From now on keep columns of remote sidecars that are read as tables in a temporary file, for the next time.

        at_once: of tiny local sidecars, these columns are all read with the first of them, and kept in memory.
        """
        if paths.is_remote(self.directory) and self._kept is None:
            self._kept = _Kept(self.rows)
        elif not paths.is_remote(self.directory) and sum(self.rows.values()) < TINY_ROWS * len(self.rows):
            self._at_once, self._held = at_once, None

    def schema(self, stem: str) -> pa.Schema:
        """Read the schema of a stem's sidecar."""
        return sidecar.schema(self._place(stem))

    def facts(self, stem: str) -> dict[str, Any]:
        """Return the JSON facts stored with a stem's sidecar."""
        return sidecar.facts(self._place(stem))

    def table(self, stem: str, columns: Sequence[str] | None = None) -> pa.Table:
        """Read a stem's sidecar, or some columns. Raises: ContractError if it has not as many rows as the manifest."""
        kept = self._kept if columns is not None else None
        found = (
            sidecar.table(self._place(stem), columns)
            if kept is None
            else kept.table(stem, columns or (), lambda names: sidecar.table(self._place(stem), names))
        )
        if found.num_rows != self.rows[stem]:
            where = paths.join(self.directory, f"{stem}.arrow")
            told = f"{where} has {found.num_rows:,} rows but the manifest says {self.rows[stem]:,}."
            raise ContractError(told, self.mend)
        return found

    def tables(self, columns: Sequence[str], stems: Iterable[str] | None = None) -> Iterator[tuple[str, pa.Table]]:
        """Yield each stem with its table, as `table` reads it; remote ones are read ahead, several at a time."""

        def read(stem: str) -> tuple[str, pa.Table]:
            return stem, self.table(stem, columns)

        if set(columns) <= set(self._at_once) and (stems is None or list(stems) == list(self.rows)):
            return self._tables_held(columns)
        return ranges.ahead(self.directory, read, self.rows if stems is None else stems)

    def _tables_held(self, columns: Sequence[str]) -> Iterator[tuple[str, pa.Table]]:
        """Yield each stem with its table, of columns that are read at once."""
        if self._held is None:
            stems, blocks = list(self.rows), []
            for first in range(0, len(stems), BLOCK):
                tables = [self.table(stem, self._at_once) for stem in stems[first : first + BLOCK]]
                blocks.append(pa.concat_tables(tables).combine_chunks())
            self._held = pa.concat_tables(blocks).combine_chunks()
        chosen, first = self._held.select(list(columns)), 0
        for stem, count in self.rows.items():
            yield stem, chosen.slice(first, count)
            first += count

    def batches(self, stem: str, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
        """Yield the record batches of a stem's sidecar, or some columns of them."""
        return sidecar.batches(self._place(stem), columns)

    def take_vectors(self, stem: str, column: str, rows: np.ndarray) -> np.ndarray:
        """Gather rows of a stem's embedding column, f16 [len(rows), d]; see `sidecar.take_vectors`."""
        return sidecar.take_vectors(self._place(stem), column, rows)


class _Kept:
    """Columns of sidecars in a temporary file; takes 16 bytes of memory per column and shard. Safe in threads."""

    def __init__(self, stems: Iterable[str]) -> None:
        self.numbers = {stem: number for number, stem in enumerate(stems)}
        self.places: dict[str, np.ndarray] = {}  # i64 [shards, 2] of each column: where it begins and ends
        self.file, self.end, self.lock = tempfile.TemporaryFile(), 0, threading.Lock()

    def table(self, stem: str, columns: Sequence[str], read: Callable[[Sequence[str]], pa.Table]) -> pa.Table:
        """Return some columns of a shard: as they are kept, or as `read` reads them, to be kept from then on."""
        number = self.numbers[stem]
        new = [name for name in columns if name not in self.places or not self.places[name][number, 1]]
        found = read(new) if new else None
        parts: dict[str, pa.ChunkedArray] = {}
        for name in columns:
            if found is not None and name in new:
                parts[name] = found[name]
                self._add(name, number, found.select([name]))
            else:
                first, last = self.places[name][number].tolist()
                parts[name] = pa.ipc.open_stream(os.pread(self.file.fileno(), last - first, first)).read_all()[name]
        return pa.table(parts)

    def _add(self, name: str, number: int, table: pa.Table) -> None:
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        data = sink.getvalue()
        with self.lock:
            self.file.write(data)
            self.file.flush()
            places = self.places.setdefault(name, np.zeros((len(self.numbers), 2), np.int64))
            places[number] = self.end, self.end + len(data)
            self.end += len(data)
