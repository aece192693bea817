"""Steps that select by the value of a column: bands, thresholds, the highest and the lowest.

Ranks count from the highest value, ties go by row order, and rows without a value (NaN) rank last.
"""

from typing import Any

import numpy as np

from curate.errors import UsageError
from curate.select.frame import AUTO, CLUSTER_FIRST, Column, Count, Frame, Share, Verdict, reserve_size, shortage
from curate.select.steps import auto_threshold
from curate.select.steps.ranks import highest, next_in_rank


def rank(frame: Frame, number: int, column: Column, lo: float, hi: float) -> Verdict:
    """Keep the rows with round(lo N) <= rank < round(hi N), counted from the highest, of the N rows left."""
    if not 0 <= lo < hi <= 1:
        raise UsageError(
            f"rank({column}, {lo}, {hi}): expected 0 <= lo < hi <= 1, shares counted from the highest value."
        )
    values, size = frame.column(column), int(frame.alive.sum())
    keep = highest(values, frame.alive, round(hi * size))
    rest = frame.alive & ~keep
    keep &= ~highest(values, frame.alive, round(lo * size))
    following = next_in_rank(values, rest, reserve_size(int(keep.sum())))
    return Verdict(keep, value_range(values, keep), following)


def above(frame: Frame, number: int, column: Column, x: float) -> Verdict:
    """Keep the rows whose value is greater than x."""
    return Verdict(frame.column(column) > x)


def at_least(frame: Frame, number: int, column: Column, x: float) -> Verdict:
    """Keep the rows whose value is x or greater."""
    return Verdict(frame.column(column) >= x)


def below(frame: Frame, number: int, column: Column, x: float) -> Verdict:
    """Keep the rows whose value is less than x."""
    return Verdict(frame.column(column) < x)


def at_most(frame: Frame, number: int, column: Column, x: float) -> Verdict:
    """Keep the rows whose value is x or less."""
    return Verdict(frame.column(column) <= x)


def top(frame: Frame, number: int, column: Column, n: Count) -> Verdict:
    """Keep the n rows with the highest values."""
    values = frame.column(column)
    return _first(frame, values, values, frame.count(n))


def bottom(frame: Frame, number: int, column: Column, n: Count) -> Verdict:
    """Keep the n rows with the lowest values."""
    values = frame.column(column)
    return _first(frame, values, -values, frame.count(n))


def _first(frame: Frame, values: np.ndarray, rank: np.ndarray, wanted: int) -> Verdict:
    keep = highest(rank, frame.alive, wanted)
    kept = int(keep.sum())
    following = next_in_rank(rank, frame.alive & ~keep, reserve_size(kept))
    return Verdict(keep, value_range(values, keep) | shortage(wanted, kept), following)


def value_range(values: np.ndarray, rows: np.ndarray) -> dict[str, Any]:
    """Report the range of values of the kept rows, given as bool [n] or row numbers."""
    kept = values[rows]
    kept = kept[~np.isnan(kept)] if values.dtype.kind == "f" else kept
    return {"lowest": float(kept.min()), "highest": float(kept.max())} if len(kept) else {}


ALWAYS_FACTOR = 2.0  # times the mismatched share is dropped whatever the budget
HEADROOM = 1.5  # beyond that, rows are dropped only down to this many times the budget


def mismatch(frame: Frame, number: int, share: Share = AUTO, factor: float = 3.0, budget: Count = 0) -> Verdict:
    """Drop the lowest clip_scores: `factor` times the share of mismatched pairs, estimated from shuffled pairs.

    Right and wrong captions overlap in their scores, so dropping only the estimated share p of the N rows would leave
    many wrong ones among the lowest that stay: therefore `factor` p N are dropped. With a budget B of rows that later
    steps keep, at most max(2 p N, N - 1.5 B) and never more than N - B are, so that those steps still have a choice. If
    nothing looks mismatched, nothing is dropped. The numbers were chosen on toy pools (pipelines/LOG.md). O(N log N).
    """
    if factor < 0:
        raise UsageError(f"mismatch(factor={factor}): expected 0 or more.")
    scores = frame.column("clip_score")
    facts: dict[str, Any] = {}
    if share == AUTO:
        if frame.edges is None:
            raise UsageError(
                "mismatch() needs the scores of shuffled pairs, which `curate cluster` stores.", CLUSTER_FIRST
            )
        share, facts = 0.0, {"why": "there are no two pairs to shuffle"}
        if frame.shuffled is not None:
            share, facts = auto_threshold.mismatch_share(
                scores[frame.alive & ~np.isnan(scores)], np.asarray(frame.shuffled)
            )
    wanted, size = frame.count(budget), int(frame.alive.sum())
    always = round(min(factor, ALWAYS_FACTOR) * share * size)
    drop = max(0, min(round(factor * share * size), max(always, size - round(HEADROOM * wanted)), size - wanted))
    if drop < round(share * size):
        facts["why"] = f"{round(share * size):,} look mismatched, but the budget leaves only {drop:,} to drop"
    keep = highest(scores, frame.alive, size - drop)
    return Verdict(keep, {"share": share, "factor": factor, **facts, **value_range(scores, keep)})
