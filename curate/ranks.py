"""Steps by the value of a column: bands, thresholds, the highest and the lowest.

Ranks count from the highest value, ties go by row order, and rows without a value (NaN) rank last.
"""

from typing import Any

import numpy as np

from curate.errors import UsageError
from curate.frame import Column, Count, Frame, Verdict, shortage


def rank(frame: Frame, number: int, column: Column, lo: float, hi: float) -> Verdict:
    """Keep round(lo N) <= rank < round(hi N), counted from the highest, of the N rows alive."""
    if not 0 <= lo < hi <= 1:
        raise UsageError(
            f"rank({column}, {lo}, {hi}): expected 0 <= lo < hi <= 1, shares counted from the highest value."
        )
    values = frame.column(column)
    order = descending(values, frame.alive)
    first, last = round(lo * len(order)), round(hi * len(order))
    return Verdict(frame.mask(order[first:last]), value_range(values, order[first:last]), order[last:])


def above(frame: Frame, number: int, column: Column, x: float) -> Verdict:
    """Keep the rows whose value is greater than x."""
    return Verdict(frame.column(column) > x)


def at_least(frame: Frame, number: int, column: Column, x: float) -> Verdict:
    """Keep the rows whose value is x or greater."""
    return Verdict(frame.column(column) >= np.float32(x))


def below(frame: Frame, number: int, column: Column, x: float) -> Verdict:
    """Keep the rows whose value is less than x."""
    return Verdict(frame.column(column) < x)


def at_most(frame: Frame, number: int, column: Column, x: float) -> Verdict:
    """Keep the rows whose value is x or less."""
    return Verdict(frame.column(column) <= np.float32(x))


def top(frame: Frame, number: int, column: Column, n: Count) -> Verdict:
    """Keep the n rows with the highest values."""
    values = frame.column(column)
    return _first(frame, values, descending(values, frame.alive), frame.count(n))


def bottom(frame: Frame, number: int, column: Column, n: Count) -> Verdict:
    """Keep the n rows with the lowest values."""
    values = frame.column(column)
    return _first(frame, values, descending(-values, frame.alive), frame.count(n))


def _first(frame: Frame, values: np.ndarray, order: np.ndarray, wanted: int) -> Verdict:
    chosen = order[:wanted]
    return Verdict(frame.mask(chosen), value_range(values, chosen) | shortage(wanted, len(chosen)), order[wanted:])


def descending(values: np.ndarray, alive: np.ndarray) -> np.ndarray:
    """List the alive rows by descending value, ties by row, NaN last."""
    rows = np.flatnonzero(alive)
    return np.asarray(rows[np.argsort(-values[rows], kind="stable")])


def value_range(values: np.ndarray, rows: np.ndarray) -> dict[str, Any]:
    """Note between which values the kept rows lie."""
    kept = values[rows][~np.isnan(values[rows])] if values.dtype.kind == "f" else values[rows]
    return {"lowest": float(kept.min()), "highest": float(kept.max())} if len(kept) else {}
