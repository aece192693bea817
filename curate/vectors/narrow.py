"""Multiply very many stored rows with a few columns, at hardly more cost than reading the rows.

Up to three columns are multiplied by faiss, one after the other: its scan of stored halves widens eight numbers in a
register, adds their products in f32, and writes only the sums. More columns, and widths that faiss would process number
by number, are done in parts: PyTorch widens rows into one buffer that stays in the processor's cache, and multiplies
them there by one matrix product.

Shapes: x_nd f16 [n, d]. Cost: one read of the rows; q d multiplications a row.
"""

import threading
import warnings
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np

PART = 512  # rows widened at a time: 1 MiB at 512 dimensions
FEW = 3  # most columns for which a scan each is faster than one product of all
LANES = 8  # numbers that faiss takes at once; if the width is not a multiple, a product takes five times as long
_kept = threading.local()  # a thread's scanner, and its buffer: fetching memory anew costs a third of the widening


def products(x_nd: np.ndarray, columns_qd: np.ndarray) -> np.ndarray:
    """Multiply each row with each column, f32 [n, q], summed in f32. columns: f32, finite."""
    columns = np.ascontiguousarray(columns_qd, np.float32)
    found = np.empty((len(columns), len(x_nd)), np.float32)
    stored = x_nd.dtype == np.float16 and x_nd.flags.c_contiguous
    if stored and len(columns) <= FEW and _scans(x_nd.shape[1]):
        if all(_scan(x_nd, column, out) for column, out in zip(columns, found, strict=True)):
            return found.T
    import torch

    for rows, part in _parts(x_nd):
        found[:, rows] = torch.from_numpy(columns) @ part.T
    return found.T


def _scan(x_nd: np.ndarray, column: np.ndarray, out: np.ndarray) -> bool:
    """Multiply each row with a column, into out f32 [n]. Returns False if a product is NaN or -inf.

    Done as a range search for all rows, with a range that leaves out nothing else.
    """
    faiss = _faiss()
    scanner = _scanner(x_nd.shape[1])
    scanner.set_query(faiss.swig_ptr(column))
    whole = faiss.RangeSearchResult(1)
    whole.buffer_size = len(x_nd) + 1  # rows for which memory is fetched at once
    result = faiss.RangeSearchPartialResult(whole)
    row = result.new_result(0)
    scanner.scan_codes_range(len(x_nd), faiss.swig_ptr(x_nd.view(np.uint8).reshape(-1)), None, -np.inf, row)
    if row.nres != len(x_nd):
        return False
    places = np.empty(len(x_nd), np.int64)  # ascending
    result.copy_range(0, len(x_nd), faiss.swig_ptr(places), faiss.swig_ptr(out))
    return True


def _faiss() -> Any:
    """Return faiss as Any: its type stubs leave out half of it."""
    import faiss

    return faiss


def _scanner(dim: int) -> Any:
    """Return this thread's scanner of halves, which holds the column that is multiplied."""
    if getattr(_kept, "scans", None) != dim:
        faiss = _faiss()
        kind = faiss.ScalarQuantizer(dim, faiss.ScalarQuantizer.QT_fp16)
        scanner = kind.select_InvertedListScanner(faiss.METRIC_INNER_PRODUCT, None, True, None)
        scanner.set_list(0, 0.0)
        _kept.scans, _kept.scanner, _kept.kind = dim, scanner, kind
    return _kept.scanner


@cache
def _scans(dim: int) -> bool:
    """Say whether this faiss multiplies as `_scan` promises, and at once; another version may have other names."""
    if dim % LANES:
        return False
    rng = np.random.default_rng(0)
    x_nd, column = rng.standard_normal((16, dim)).astype(np.float16), rng.standard_normal(dim, np.float32)
    found = np.empty(16, np.float32)
    try:
        done = _scan(x_nd, column, found)
    except (ImportError, AttributeError, TypeError, RuntimeError):
        return False
    wide = x_nd.astype(np.float64)
    most = 2.0**-16 * np.linalg.norm(wide, axis=1) * np.linalg.norm(column)
    return done and bool((np.abs(found - wide @ column) <= most).all())


def _parts(x_nd: np.ndarray) -> Iterator[tuple[slice, Any]]:
    """Yield the rows part by part as f32 tensors [m, d], each in the place of the one before."""
    import torch

    with warnings.catch_warnings():  # of a mapped file, which is only read here
        warnings.filterwarnings("ignore", "The given NumPy array is not writ", UserWarning)
        rows = torch.from_numpy(x_nd)
    dim = x_nd.shape[1]
    if getattr(_kept, "dim", None) != dim:
        _kept.dim, _kept.buffer = dim, torch.empty((PART, dim))
    for first in range(0, len(rows), PART):
        part = rows[first : first + PART]
        yield slice(first, first + len(part)), _kept.buffer[: len(part)].copy_(part)
