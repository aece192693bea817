"""The selection steps: each looks at the rows still alive and says which of them stay.

A step is a function of the frame, its place in the funnel (which seeds its random draws) and its arguments. Its
signature is the schema of how it is written. Ranks count from the highest value, ties go by row order, and rows without
a value (NaN) rank last.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from curate import duplicates, evidence, relate
from curate.errors import UsageError, unknown
from curate.frame import AUTO, CLUSTER_FIRST, Column, Count, Frame, Group, Share, Threshold, Verdict


def rank(frame: Frame, number: int, column: Column, lo: float, hi: float) -> Verdict:
    """Keep round(lo N) <= rank < round(hi N), counted from the highest, of the N rows alive."""
    if not 0 <= lo < hi <= 1:
        raise UsageError(
            f"rank({column}, {lo}, {hi}): expected 0 <= lo < hi <= 1, shares counted from the highest value."
        )
    order = _descending(frame.column(column), frame.alive)
    chosen = order[round(lo * len(order)) : round(hi * len(order))]
    return Verdict(_mask(frame, chosen), _range(frame.column(column), chosen))


def above(frame: Frame, number: int, column: Column, x: float) -> Verdict:
    """Keep the rows whose value is greater than x."""
    return Verdict(frame.column(column) > x)


def below(frame: Frame, number: int, column: Column, x: float) -> Verdict:
    """Keep the rows whose value is less than x."""
    return Verdict(frame.column(column) < x)


def top(frame: Frame, number: int, column: Column, n: Count) -> Verdict:
    """Keep the n rows with the highest values."""
    wanted = frame.count(n)
    chosen = _descending(frame.column(column), frame.alive)[:wanted]
    return Verdict(_mask(frame, chosen), _range(frame.column(column), chosen) | _shortage(wanted, len(chosen)))


def sample(frame: Frame, number: int, n: Count, seed: int | None = None) -> Verdict:
    """Keep n rows at random, each as likely as the other."""
    lots = frame.random(number) if seed is None else np.random.default_rng(seed).random(len(frame.good))
    rows = np.flatnonzero(frame.alive)
    chosen = rows[np.argsort(lots[rows], kind="stable")[: frame.count(n)]]
    return Verdict(_mask(frame, chosen), _shortage(frame.count(n), len(chosen)))


def balance(frame: Frame, number: int, column: Group, n: Count) -> Verdict:
    """Keep exactly n rows, as evenly over the groups as their sizes allow, at random inside each (water-filling)."""
    rows = np.flatnonzero(frame.alive)
    groups = frame.group(column)[rows]
    lots = frame.random(number)[rows]
    wanted = min(frame.count(n), len(rows))
    names, place, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    quotas, level = water_fill(sizes, wanted, np.random.default_rng([frame.seed, number, 1]))
    chosen = rows[_position_in_group(place, lots) < quotas[place]]
    facts = {"groups": len(names), "level": level, "groups_taken_whole": int((sizes <= quotas).sum())}
    return Verdict(_mask(frame, chosen), facts | _shortage(frame.count(n), len(chosen)))


def cap(frame: Frame, number: int, column: Group, n: int, keep: str = "random") -> Verdict:
    """Keep at most n rows of each group: at random, or those with the highest `max:column` or lowest `min:column`."""
    if n < 1:
        raise UsageError(f"cap({column}, {n}): at least one row of a group must stay.")
    rows = np.flatnonzero(frame.alive)
    groups = np.unique(frame.group(column)[rows], return_inverse=True)[1]
    return Verdict(_mask(frame, rows[_position_in_group(groups, preference(frame, keep, number)[rows]) < n]))


def dedup(
    frame: Frame, number: int, threshold: Threshold = 0.86, keep: str = "middle", rule: str = "components"
) -> Verdict:
    """Keep one row of each group of near-duplicates (cosine > threshold inside a cluster)."""
    if rule not in duplicates.RULES:
        raise unknown("rule of dedup", rule, duplicates.RULES)
    if frame.edges is None:
        raise UsageError("dedup needs clusters; this directory has none.", CLUSTER_FIRST)
    a, b, similarity, bits = frame.edges()
    facts: dict[str, Any] = {}
    linked = np.ones(len(similarity), bool)
    if threshold == AUTO:
        found_at = evidence.find_threshold(similarity, bits, frame.floor)
        threshold, facts = found_at.threshold, found_at.facts()
        linked = (bits <= evidence.TWIN_BITS) | (bits > 64) if found_at.timid else linked
    if threshold < frame.floor:
        raise UsageError(
            f"dedup({threshold}) lies under the floor of these clusters, {frame.floor}.",
            f"run `curate cluster … --floor {threshold}`, or use a threshold of at least {frame.floor}",
        )
    above = (similarity > threshold) & linked
    order = preference(frame, "near" if keep in ("middle", "inner-middle") else keep, number)
    found = duplicates.resolve(
        (a[above], b[above], similarity[above]), frame.alive, order, rule, keep, threshold, frame.vectors
    )
    gone = frame.alive & ~found.keep
    frame.component = found.component
    frame.twin[gone] = found.twin[gone]
    frame.twin_similarity[gone] = found.similarity[gone]
    return Verdict(found.keep, {"threshold": threshold, **facts, **found.facts})


def preference(frame: Frame, keep: str, number: int) -> np.ndarray:
    """Return a number for each row, the smallest being the one to keep. Raises: UsageError for an unknown policy."""
    if keep == "random":
        return frame.random(number)
    if keep in ("near", "far"):
        closeness = frame.column("centroid_similarity")
        return -closeness if keep == "near" else closeness
    extreme, _, column = keep.partition(":")
    if extreme in ("max", "min") and column:
        values = frame.column(column).astype(np.float64)
        return -values if extreme == "max" else values
    raise unknown("policy keep=", keep, duplicates.KEEPS)


def mismatch(frame: Frame, number: int, share: Share = AUTO, factor: float = 0.0, budget: Count = 0) -> Verdict:
    """Drop the lowest clip_scores: `factor` times the share of mismatched pairs, estimated from shuffled pairs.

    factor 0: 2 where the budget is a small part of the pool, falling to 1.25 where half of it is wanted. Never drops so
    many that fewer than the budget stay.
    """
    scores = frame.column("clip_score")
    rows = np.flatnonzero(frame.alive)
    known = rows[~np.isnan(scores[rows])]
    facts: dict[str, Any] = {}
    if share == AUTO:
        if frame.shuffled is None:
            raise UsageError("mismatch() needs the scores of shuffled pairs; there are none here.", CLUSTER_FIRST)
        share, facts = evidence.mismatch_share(scores[known], np.asarray(frame.shuffled))
    wanted = frame.count(budget)
    factor = factor or budget_factor(wanted / max(1, len(rows)))
    drop = max(0, min(round(factor * share * len(rows)), len(rows) - wanted))
    chosen = _descending(scores, frame.alive)[: len(rows) - drop]
    return Verdict(_mask(frame, chosen), {"share": share, "factor": factor, **facts, **_range(scores, chosen)})


def budget_factor(share: float) -> float:
    """Choose how many times the mismatch share to drop: 2 up to a budget of 2 %, 1.25 from 50 % on, log-linear between.

    The two ends were measured on toy worlds only (2 % of 20,000; "most of the pool wanted").
    """
    position = np.log(np.clip(share, 0.02, 0.5) / 0.02) / np.log(0.5 / 0.02)
    return float(2 - 0.75 * position)


def exclude(frame: Frame, number: int, directory: str, threshold: float = 0.95) -> Verdict:
    """Drop the rows whose image has cosine > threshold to an image of another EMB, or the same bytes (its uid)."""
    if frame.foreign is None or frame.vectors is None:
        raise UsageError("exclude() needs embeddings to compare with.")
    vectors, uids = frame.foreign(directory)
    rows = np.flatnonzero(frame.alive)
    near = np.zeros(len(rows), bool)
    for first in range(0, len(rows), 1 << 14):
        part = slice(first, first + (1 << 14))
        near[part] = relate.nearest_similarity(frame.vectors(rows[part]), vectors) > threshold
    same = np.isin(frame.group("uid")[rows], uids)
    return Verdict(_mask(frame, rows[~near & ~same]), {"compared_with": len(vectors), "same_bytes": int(same.sum())})


def placeholders(
    frame: Frame, number: int, copies: int = 50, captions: Share = 0.5, threshold: Threshold = AUTO
) -> Verdict:
    """Drop every row of a picture that stands under many captions ("image not found", a logo): not even one stays.

    A picture is a component above the threshold; it goes if it has at least `copies` rows, of which at least the share
    `captions` have a caption of their own. Put it before dedup, which would leave one with a caption by chance.
    """
    if frame.edges is None:
        raise UsageError("placeholders needs clusters; this directory has none.", CLUSTER_FIRST)
    a, b, similarity, bits = frame.edges()
    threshold = evidence.find_threshold(similarity, bits, frame.floor).threshold if threshold == AUTO else threshold
    linked = (similarity > threshold) & frame.alive[a] & frame.alive[b]
    rows = np.flatnonzero(frame.alive)
    picture = np.unique(relate.components(a[linked], b[linked], len(frame.good))[rows], return_inverse=True)[1]
    distinct = np.unique(np.stack([picture, frame.group("caption")[rows]]), axis=1)[0]
    sizes = np.bincount(picture)
    bad = (sizes >= copies) & (np.bincount(distinct, minlength=len(sizes)) >= captions * sizes)
    facts = {"threshold": threshold, "pictures": int(bad.sum()), "largest": int(sizes[bad].max(initial=0))}
    return Verdict(_mask(frame, rows[~bad[picture]]), facts)


STEPS: dict[str, Callable[..., Verdict]] = {
    step.__name__: step
    for step in (dedup, rank, above, below, top, sample, balance, cap, mismatch, placeholders, exclude)
}


def water_fill(sizes: np.ndarray, total: int, rng: np.random.Generator) -> tuple[np.ndarray, int]:
    """Find quotas min(level, size) that sum to exactly `total`; what is left over goes to groups at random, one each.

    Returns i64 quotas and the level. Raises nothing: total is at most the sum of the sizes.
    """
    low, high = 0, int(sizes.max(initial=0))
    while low < high:  # the highest level that does not exceed the total
        middle = (low + high + 1) // 2
        low, high = (middle, high) if int(np.minimum(sizes, middle).sum()) <= total else (low, middle - 1)
    quotas = np.minimum(sizes, low).astype(np.int64)
    larger = np.flatnonzero(sizes > low)
    quotas[rng.permutation(larger)[: total - int(quotas.sum())]] += 1
    return quotas, low


def _descending(values: np.ndarray, alive: np.ndarray) -> np.ndarray:
    """List the alive rows by descending value, ties by row, NaN last."""
    rows = np.flatnonzero(alive)
    return np.asarray(rows[np.argsort(-values[rows], kind="stable")])


def _position_in_group(groups: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Rank each row inside its group by ascending `order`, ties by row."""
    arranged = np.lexsort((order, groups))
    starts = np.concatenate([[0], np.flatnonzero(np.diff(groups[arranged])) + 1]) if len(groups) else np.zeros(0, int)
    sizes = np.diff(np.append(starts, len(groups)))
    position = np.empty(len(groups), np.int64)
    position[arranged] = np.arange(len(groups)) - np.repeat(starts, sizes)
    return position


def _mask(frame: Frame, rows: np.ndarray) -> np.ndarray:
    keep = np.zeros(len(frame.good), bool)
    keep[rows] = True
    return keep


def _range(values: np.ndarray, rows: np.ndarray) -> dict[str, Any]:
    """Note between which values the kept rows lie."""
    kept = values[rows][~np.isnan(values[rows])] if values.dtype.kind == "f" else values[rows]
    return {"lowest": float(kept.min()), "highest": float(kept.max())} if len(kept) else {}


def _shortage(wanted: int, found: int) -> dict[str, Any]:
    return {"asked": wanted, "available": found} if found < wanted else {}
