"""Rows by their rank in a column, without sorting the whole column if only part of the order is needed.

Ranks count from the highest value, ties go by row order, and rows without a value (NaN) rank last.
"""

import numpy as np


def descending(values: np.ndarray, alive: np.ndarray) -> np.ndarray:
    """List the alive rows by descending value, ties by row, NaN last."""
    rows = np.flatnonzero(alive)
    return np.asarray(rows[np.argsort(-values[rows], kind="stable")])


def highest(values: np.ndarray, alive: np.ndarray, count: int) -> np.ndarray:
    """Mark the first `count` rows of `descending`, bool [n], without sorting them: twice the column's own bytes."""
    keep = alive & ~np.isnan(values)
    known = values[keep]
    if count < len(known):
        lowest = np.inf
        if count:
            known.partition(len(known) - count)
            lowest = known[len(known) - count]
        del known
        keep &= values >= lowest
        _unmark_last(keep, keep & (values == lowest), int(keep.sum()) - count)
    else:
        rest = alive & np.isnan(values)
        _unmark_last(rest, rest, int(rest.sum()) - (count - len(known)))
        keep |= rest
    return np.asarray(keep)


def _unmark_last(keep: np.ndarray, among: np.ndarray, number: int) -> None:
    """Take the last `number` rows of those `among` out of keep."""
    if number > 0:
        keep[np.flatnonzero(among)[-number:]] = False


def next_in_rank(values: np.ndarray, alive: np.ndarray, most: int) -> np.ndarray:
    """List the first `most` rows of `descending`, i64, and sort no more than these."""
    return descending(values, highest(values, alive, most))
