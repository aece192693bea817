"""Columns of a sidecar as arrays and back: labels as codes, embeddings as matrices with no copy; and .npy files."""

import io
from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa

from curate import paths


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
    for first, last, part in zip(bounds[:-1], bounds[1:], parts, strict=True):
        here = np.flatnonzero((rows >= first) & (rows < last))
        found[here] = part[rows[here] - first]
    return found


def load_npy(location: str) -> np.ndarray:
    """Read a .npy file whole, unpickling nothing. Raises: OSError, or ValueError for what is none."""
    return np.asarray(np.load(io.BytesIO(paths.read_bytes(location)), allow_pickle=False))


def save_npy(location: str, array: np.ndarray) -> None:
    """Write a .npy file whole or not at all."""
    with paths.atomic_write(location) as file:
        np.save(file, array, allow_pickle=False)
