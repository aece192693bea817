"""Sidecars: an Arrow IPC file per shard, with the shard's stem and exactly its rows in its order.

Local files are mapped to memory: an embedding column is seen as a matrix with no copy. Also here: columns as arrays and
back (labels as codes, embeddings as matrices), and .npy files.
"""

import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from curate.errors import ContractError
from curate.storage import paths


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


def reader(location: str) -> pa.ipc.RecordBatchFileReader:
    """Open a sidecar; local files are mapped to memory. Raises: ContractError when it is not an Arrow file."""
    try:
        if paths.is_remote(location):
            return pa.ipc.open_file(pa.py_buffer(paths.read_bytes(location)))
        return pa.ipc.open_file(pa.memory_map(paths.local(location)))
    except FileNotFoundError:
        raise ContractError(f"{location} does not exist") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise ContractError(f"{location} is no readable Arrow file: {str(error).splitlines()[0]}") from None


def batches(location: str) -> Iterator[pa.RecordBatch]:
    """Yield a sidecar's record batches in row order."""
    source = reader(location)
    for index in range(source.num_record_batches):
        yield source.get_batch(index)


def table(location: str, columns: Sequence[str] | None = None) -> pa.Table:
    """Read a sidecar, or some columns of it, as a table over mapped memory."""
    whole = reader(location).read_all()
    return whole if columns is None else whole.select(list(columns))


def facts(location: str) -> dict[str, Any]:
    """Return the JSON facts that `write_table` stored with a sidecar."""
    stored = (reader(location).schema.metadata or {}).get(b"curate", b"{}")
    return dict(json.loads(stored))


def num_rows(location: str) -> int:
    """Count a sidecar's rows without reading its columns."""
    source = reader(location)
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


def take_vectors(batches: Iterable[pa.RecordBatch], column: str, rows: np.ndarray) -> np.ndarray:
    """Gather rows (numbers within the sidecar, in any order) of an embedding column as f16 [len(rows), d]."""
    parts = [vectors(batch.column(column)) for batch in batches]
    bounds = np.cumsum([0, *map(len, parts)])
    found = np.empty((len(rows), parts[0].shape[1]), np.float16)
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
    return np.asarray(np.load(io.BytesIO(paths.read_bytes(location)), allow_pickle=False))


def save_npy(location: str, array: np.ndarray) -> None:
    """Write a .npy file whole or not at all."""
    with paths.atomic_write(location) as file:
        np.save(file, array, allow_pickle=False)
