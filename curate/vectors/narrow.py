"""A few columns beside very many stored rows: products that cost hardly more than reading the rows.

Rows are widened part by part into one buffer that stays in the processor's cache, by PyTorch's conversion (one pass
over memory where `exact.widen` takes four), and multiplied there, before the next part is fetched. Few columns are
multiplied row by row, by NumPy's dot product, which asks no second thread and is the same whatever rows stand beside.

Shapes: x_nd f16 [n, d]. Cost: one read of the rows; q d multiplications a row.
"""

import threading
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np

PART = 512  # rows widened at a time: 1 MiB at 512 dimensions
FEW = 3  # columns up to which a product of each is faster than one of all
_kept = threading.local()  # each thread's buffer: fetching its memory anew costs a third of the widening


def parts(x_nd: np.ndarray) -> Iterator[tuple[slice, Any]]:
    """Yield the rows part by part as f32 tensors [m, d], each in the place of the one before."""
    import torch

    with warnings.catch_warnings():  # of a mapped file, which is only read here
        warnings.filterwarnings("ignore", "The given NumPy array is not writ", UserWarning)
        rows = torch.from_numpy(x_nd)
    buffer = _buffer(x_nd.shape[1])
    for first in range(0, len(rows), PART):
        part = rows[first : first + PART]
        yield slice(first, first + len(part)), buffer[: len(part)].copy_(part)


def _buffer(dim: int) -> Any:
    import torch

    if getattr(_kept, "dim", None) != dim:
        _kept.dim, _kept.buffer = dim, torch.empty((PART, dim))
    return _kept.buffer


def product(part: Any, columns_qd: np.ndarray) -> np.ndarray:
    """Multiply a part's rows with each column, f32 [q, m]. columns: f32, contiguous."""
    import torch

    if len(columns_qd) > FEW:
        return np.asarray(torch.from_numpy(columns_qd) @ part.T)
    found = np.empty((len(columns_qd), len(part)), np.float32)
    for column, out in zip(columns_qd, found, strict=True):
        np.vecdot(part.numpy(), column, out=out)
    return found


def products(x_nd: np.ndarray, columns_qd: np.ndarray) -> np.ndarray:
    """Multiply each row with each column, f32 [n, q]. columns: f32, finite."""
    found = np.empty((len(columns_qd), len(x_nd)), np.float32)
    columns = np.ascontiguousarray(columns_qd, np.float32)
    for rows, part in parts(x_nd):
        found[:, rows] = product(part, columns)
    return found.T
