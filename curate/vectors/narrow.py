"""A few columns beside very many stored rows: products that cost hardly more than reading the rows.

Rows are widened part by part into one buffer that stays in the processor's cache, by PyTorch's conversion (one pass
over memory where `exact.widen` takes four), and multiplied there, before the next part is fetched.

Shapes: x_nd f16 [n, d]. Cost: one read of the rows; q d multiplications a row.
"""

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np

PART = 512  # rows widened at a time: 1 MiB at 512 dimensions
FEW = 3  # columns up to which one product each is faster than one of all


def parts(x_nd: np.ndarray) -> Iterator[tuple[slice, Any]]:
    """Yield the rows part by part as f32 tensors [m, d], each in the place of the one before."""
    import torch

    with warnings.catch_warnings():  # of a mapped file, which is only read here
        warnings.filterwarnings("ignore", "The given NumPy array is not writ", UserWarning)
        rows = torch.from_numpy(x_nd)
    buffer = torch.empty((min(PART, len(x_nd)), x_nd.shape[1]))
    for first in range(0, len(x_nd), PART):
        part = rows[first : first + PART]
        yield slice(first, first + len(part)), buffer[: len(part)].copy_(part)


def products(x_nd: np.ndarray, columns_qd: np.ndarray) -> np.ndarray:
    """Multiply each row with each column, f32 [n, q]. columns: f32, finite."""
    import torch

    found = torch.empty((len(columns_qd), len(x_nd)))
    columns = torch.from_numpy(np.ascontiguousarray(columns_qd, np.float32))
    for part, wide in parts(x_nd):
        if len(columns) > FEW:
            found[:, part] = columns @ wide.T
            continue
        for number, column in enumerate(columns):
            torch.mv(wide, column, out=found[number, part])
    return np.asarray(found.numpy().T)
