"""Sidecars: an Arrow IPC file per shard, with the shard's stem and exactly its rows in its order.

Local files are mapped to memory: an embedding column is viewed as a matrix without a copy. Small files are read whole,
which is quicker. Of remote files only the columns asked for are read, and of embeddings only the rows. Also here:
conversion of columns to arrays and back (labels as codes, embeddings as matrices), and .npy files.
"""

import io
import json
import os
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa

from curate.errors import ContractError
from curate.storage import paths
from curate.storage.remote_arrow import RemoteFile
from pipelines.terminal import first_line


def write_table(
    location: str, schema: pa.Schema, batches: Iterable[pa.RecordBatch], meta: Mapping[str, Any] | None = None
) -> int:
    """Write a sidecar whole or not at all. meta: JSON facts about the shard, kept in the schema. Returns the rows."""
    schema = schema.with_metadata({"curate": json.dumps(dict(meta or {}), sort_keys=True)})
    rows = 0
    with paths.atomic_write(location) as file, pa.ipc.new_file(file, schema) as writer:
        for batch in batches:
            writer.write_batch(batch.replace_schema_metadata(schema.metadata))
            rows += batch.num_rows
    return rows


SMALL_BYTES = 1 << 20  # a local file of at most this many is read whole: a map takes some five times as long to open
Opened: TypeAlias = RemoteFile | pa.ipc.RecordBatchFileReader
Place: TypeAlias = str | Opened  # where a sidecar is, or one that is open
UNREADABLE = (pa.ArrowInvalid, OSError, struct.error, KeyError)  # KeyError: of a column that is not there


@contextmanager
def _readable(place: Place) -> Iterator[None]:
    """Turn errors of reading a sidecar into one line. Raises: ContractError."""
    try:
        yield
    except UNREADABLE as error:
        location = place if isinstance(place, str) else getattr(place, "location", "a sidecar")
        missing = isinstance(error, FileNotFoundError)
        what = "does not exist" if missing else f"is not a readable Arrow file: {first_line(error)}"
        raise ContractError(f"{location} {what}") from None


def opened(place: Place) -> Opened:
    """Open a sidecar: on a URL its columns are read by ranges; a local file is mapped unless it is small.

    Raises: ContractError if it is not one.
    """
    if not isinstance(place, str):
        return place
    with _readable(place):
        if paths.is_remote(place):
            return RemoteFile(place)
        small = _read_small(place)
        return pa.ipc.open_file(pa.memory_map(paths.local(place)) if small is None else small)


def _read_small(location: str) -> bytes | None:
    """Read a local file whole where it is small."""
    with open(paths.local(location), "rb", buffering=0) as file:
        return file.read() if os.fstat(file.fileno()).st_size <= SMALL_BYTES else None


def batch(place: Place, index: int, columns: Sequence[str], names: Sequence[str]) -> pa.RecordBatch:
    """Read some columns of one record batch into memory; nothing stays mapped. names: of all columns, in order."""
    with _readable(place):
        if isinstance(place, str) and not paths.is_remote(place):
            options = pa.ipc.IpcReadOptions(included_fields=sorted(names.index(name) for name in columns))
            small = _read_small(place)
            with pa.OSFile(paths.local(place)) if small is None else pa.BufferReader(small) as file:
                return pa.ipc.open_file(file, options=options).get_batch(index).select(list(columns))
        source = opened(place)
        assert isinstance(source, RemoteFile)
        return source.batch(index, columns)


def batches(place: Place, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
    """Yield a sidecar's record batches in row order, or some columns of them."""
    source = opened(place)
    if isinstance(source, RemoteFile):
        with _readable(place):
            yield from source.batches(columns)
        return
    for index in range(source.num_record_batches):
        with _readable(place):
            found = source.get_batch(index)
            found = found if columns is None else found.select(list(columns))
        yield found


def table(place: Place, columns: Sequence[str] | None = None) -> pa.Table:
    """Read a sidecar, or some columns of it, as a table; a local one as mapped memory."""
    source = opened(place)
    if isinstance(source, RemoteFile):
        with _readable(place):
            kept = source.schema if columns is None else pa.schema([source.schema.field(name) for name in columns])
            return pa.Table.from_batches(source.batches(columns), kept.with_metadata(source.schema.metadata))
    with _readable(place):
        whole = source.read_all()
        return whole if columns is None else whole.select(list(columns))


def schema(place: Place) -> pa.Schema:
    """Read a sidecar's schema."""
    return opened(place).schema


def facts(place: Place) -> dict[str, Any]:
    """Return the JSON facts that `write_table` stored with a sidecar."""
    return facts_of(opened(place).schema)


def facts_of(known: pa.Schema) -> dict[str, Any]:
    """Return the JSON facts in the schema of a sidecar or of a table of it."""
    return dict(json.loads((known.metadata or {}).get(b"curate", b"{}")))


def num_rows(place: Place) -> int:
    """Count a sidecar's rows without reading its columns."""
    source = opened(place)
    if isinstance(source, RemoteFile):
        with _readable(place):
            return source.num_rows()
    with _readable(place):
        return sum(source.get_batch(index).num_rows for index in range(source.num_record_batches))


def labels(values: Sequence[str | None] | np.ndarray, names: Sequence[str]) -> pa.DictionaryArray:
    """Build a label column. values: names, or None for null; names: the dictionary, in a fixed order."""
    place = {name: index for index, name in enumerate(names)}
    codes = pa.array([None if value is None else place[value] for value in values], pa.int16())
    return pa.DictionaryArray.from_arrays(codes, pa.array(list(names), pa.string()))


def label_codes(codes: np.ndarray, names: Sequence[str]) -> pa.DictionaryArray:
    """Build a label column from integer codes i16 [n]; a negative code is null."""
    indices = pa.array(codes.astype(np.int16), mask=codes < 0)
    return pa.DictionaryArray.from_arrays(indices, pa.array(list(names), pa.string()))


def codes(column: pa.ChunkedArray, names: Sequence[str]) -> np.ndarray:
    """Read a label column as positions in `names`, i16 [n]; -1 for a null and for what is not among them."""
    place = {name: index for index, name in enumerate(names)}
    parts = [np.empty(0, np.int16)]
    for chunk in column.chunks:
        lookup = np.array([*(place.get(name, -1) for name in chunk.dictionary.to_pylist()), -1], np.int16)
        indices = chunk.indices if chunk.null_count == 0 else chunk.indices.fill_null(-1)
        parts.append(lookup[indices.to_numpy()])
    return np.concatenate(parts)


def vector_column(x_nd: np.ndarray, valid_n: np.ndarray) -> pa.FixedSizeListArray:
    """Build an embedding column from f16 [n, d]; rows that are not valid are null (and zero underneath)."""
    values = np.ascontiguousarray(np.where(valid_n[:, None], x_nd, 0), dtype=np.float16)
    return pa.FixedSizeListArray.from_arrays(
        pa.array(values.reshape(-1)), values.shape[1], mask=pa.array(~np.asarray(valid_n, dtype=bool))
    )


def vectors(column: pa.FixedSizeListArray) -> np.ndarray:
    """View an embedding column of one record batch as f16 [n, d] with no copy; null rows are zero."""
    if isinstance(column, pa.ChunkedArray):
        raise TypeError("vectors() takes the array of one record batch")
    dim = column.type.list_size
    flat: np.ndarray = column.values.to_numpy(zero_copy_only=True)
    return flat[column.offset * dim : (column.offset + len(column)) * dim].reshape(len(column), dim)


def take_vectors(place: Place, column: str, rows: np.ndarray) -> np.ndarray:
    """Gather rows (numbers within the sidecar, in any order) of an embedding column as f16 [len(rows), d].

    From a remote sidecar little more than the bytes of these rows is read.
    """
    source = opened(place)
    if isinstance(source, RemoteFile):
        with _readable(place):
            return source.vectors(column, rows)
    with _readable(place):
        parts = [vectors(source.get_batch(index).column(column)) for index in range(source.num_record_batches)]
    bounds = np.cumsum([0, *map(len, parts)])
    found = np.empty((len(rows), source.schema.field(column).type.list_size), np.float16)
    ascending = bool((np.diff(rows) > 0).all())
    for first, last, part in zip(bounds[:-1], bounds[1:], parts, strict=True):
        if ascending:  # as whole columns are read: no list of places, and no copy of what is read
            here = slice(*np.searchsorted(rows, [first, last]))
            np.take(part, rows[here] - first, axis=0, out=found[here], mode="clip")
        else:
            places = np.flatnonzero((rows >= first) & (rows < last))
            found[places] = part[rows[places] - first]
    return found


def load_npy(location: str) -> np.ndarray:
    """Read a .npy file whole, unpickling nothing. Raises: OSError, or ValueError for what is none."""
    data = io.BytesIO(paths.read_bytes(location))
    try:
        return np.asarray(np.load(data, allow_pickle=False))
    except Exception as error:  # numpy parses headers as Python text: hostile ones raise nearly anything
        raise ValueError(str(error) or type(error).__name__) from None


def save_npy(location: str, array: np.ndarray) -> None:
    """Write a .npy file whole or not at all."""
    with paths.atomic_write(location) as file:
        np.save(file, array, allow_pickle=False)
