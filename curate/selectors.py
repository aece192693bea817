"""The selection steps: each looks at the rows still alive and says which of them stay.

A step is a function of the frame, its place in the funnel (which seeds its random draws) and its arguments. Its
signature is the schema of how it is written. Here are the table of all steps and those that rest on near-duplicates and
mismatches; steps by value are in `ranks`, steps with a budget in `budgets` and `representatives`, steps over captions
in `vocabulary`, steps that compare with another set in `targets`.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from curate import budgets, duplicates, evidence, ranks, relate, representatives, targets, vocabulary
from curate.budgets import preference
from curate.errors import UsageError, unknown
from curate.frame import AUTO, CLUSTER_FIRST, Count, Frame, Group, Keep, Share, Threshold, Verdict
from curate.ranks import descending, value_range

SURELY, ROOM = 2.0, 1.5  # of the mismatched share, and of the budget: see mismatch


def dedup(
    frame: Frame, number: int, threshold: Threshold = 0.86, keep: Keep = "middle", rule: str = "components"
) -> Verdict:
    """Keep one row of each group of near-duplicates (cosine > threshold; "auto": by the pool's own pixels)."""
    if rule not in duplicates.RULES:
        raise unknown("rule of dedup", rule, duplicates.RULES)
    if frame.edges is None:
        raise UsageError("dedup needs clusters; this directory has none.", CLUSTER_FIRST)
    a, b, similarity, bits = frame.edges()
    threshold, above, facts = _linked(frame, "dedup", threshold, similarity, bits)
    order = preference(frame, "near" if keep in ("middle", "inner-middle") else keep, number)
    found = duplicates.resolve(
        (a[above], b[above], similarity[above]), frame.alive, order, rule, keep, threshold, frame.vectors
    )
    gone = frame.alive & ~found.keep
    seen = np.full(len(found.component), -1) if frame.component is None else frame.component
    frame.component = np.where(found.component >= 0, found.component, seen)  # an earlier dedup's rows keep theirs
    frame.twin[gone] = found.twin[gone]
    frame.twin_similarity[gone] = found.similarity[gone]
    return Verdict(found.keep, {"threshold": threshold, **facts, **found.facts, **_compared(frame, threshold)})


def _linked(
    frame: Frame, name: str, threshold: Threshold, similarity: np.ndarray, bits: np.ndarray
) -> tuple[float, np.ndarray, dict[str, Any]]:
    """Say above which cosine edges join near-duplicates, which ones do, bool, and what was found out for it."""
    if threshold == AUTO:
        told = evidence.find_threshold(similarity, bits, frame.floor)
        return told.threshold, told.linked(similarity, bits), told.facts()
    if threshold < frame.floor:
        raise UsageError(
            f"{name}: the threshold {threshold} lies under the floor of these clusters, {frame.floor}.",
            f"run `curate cluster … --floor {threshold}`, or use a threshold of at least {frame.floor}",
        )
    return threshold, similarity > threshold, {}


def _compared(frame: Frame, threshold: float) -> dict[str, Any]:
    """Say which share of the pairs above a threshold clustering compared, by its estimate at the next lower level."""
    levels = [level for level in frame.recall.get("levels", []) if level["above"] <= threshold]
    return {"pairs_compared": levels[-1]["found"]} if levels and levels[-1]["pairs"] else {}


def mismatch(frame: Frame, number: int, share: Share = AUTO, factor: float = 3.0, budget: Count = 0) -> Verdict:
    """Drop the lowest clip_scores: `factor` times the share of mismatched pairs, estimated from shuffled pairs.

    With a budget, what lies beyond twice the share goes only while half as many again as the budget stay, so that later
    steps can choose, and never so many that fewer than the budget do. The numbers were chosen on toy pools, whose
    selector overlaps clean and faulty pairs (pipelines/LOG.md); where nothing looks mismatched, nothing is dropped.
    """
    scores = frame.column("clip_score")
    rows = np.flatnonzero(frame.alive)
    known = rows[~np.isnan(scores[rows])]
    facts: dict[str, Any] = {}
    if share == AUTO:
        if frame.edges is None:
            raise UsageError("mismatch() needs the scores of shuffled pairs, which clusters have.", CLUSTER_FIRST)
        share, facts = 0.0, {"why": "there are no two pairs to shuffle"}
        if frame.shuffled is not None:
            share, facts = evidence.mismatch_share(scores[known], np.asarray(frame.shuffled))
    wanted, size = frame.count(budget), len(rows)
    surely = round(min(factor, SURELY) * share * size)
    drop = max(0, min(round(factor * share * size), max(surely, size - round(ROOM * wanted)), size - wanted))
    if drop < round(share * size):
        facts["why"] = f"{round(share * size):,} look mismatched, but the budget leaves only {drop:,} to drop"
    chosen = descending(scores, frame.alive)[: len(rows) - drop]
    return Verdict(frame.mask(chosen), {"share": share, "factor": factor, **facts, **value_range(scores, chosen)})


def placeholders(
    frame: Frame,
    number: int,
    copies: int = 50,
    captions: float = 0.5,
    threshold: Threshold = AUTO,
    by: Group = "caption",
    exact: bool = False,
) -> Verdict:
    """Drop every row of a picture that stands under many captions ("image not found", a logo): not even one stays.

    A picture is a component of near-duplicates above the threshold whose pixels agree, too, as far as they are known;
    exact: rows of the same bytes, for which no clusters are needed. It goes if at least `copies` good rows of the pool
    have it, earlier steps or not, and at least the share `captions` of them have a caption of their own. by: another
    column than the caption, such as url, for pools where an error picture stands under one alt text.
    """
    if not 0 <= captions <= 1:
        raise UsageError(f"placeholders: captions={captions}; expected a share between 0 and 1.")
    rows = np.flatnonzero(frame.good)
    facts: dict[str, Any] = {}
    if exact:
        labels = frame.group("uid")
    elif frame.edges is None:
        raise UsageError("placeholders needs clusters, or exact=True; this directory has none.", CLUSTER_FIRST)
    else:
        a, b, similarity, bits = frame.edges()
        threshold, linked, _ = _linked(frame, "placeholders", threshold, similarity, bits)
        linked &= (bits <= evidence.TWIN_BITS) | (bits > 64)
        labels = relate.components(a[linked], b[linked], len(frame.good))
        facts["threshold"] = threshold
    picture = np.unique(labels[rows], return_inverse=True)[1]
    told = np.unique(frame.group(by)[rows], return_inverse=True)[1]
    distinct = np.unique(picture * (int(told.max(initial=0)) + 1) + told) // (int(told.max(initial=0)) + 1)
    sizes = np.bincount(picture)
    bad = (sizes >= copies) & (np.bincount(distinct, minlength=len(sizes)) >= captions * sizes)
    facts |= {"pictures": int(bad.sum()), "largest": int(sizes[bad].max(initial=0))}
    return Verdict(frame.alive & ~frame.mask(rows[bad[picture]]), facts)


STEPS: dict[str, Callable[..., Verdict]] = {
    step.__name__: step
    for step in (
        *(dedup, ranks.rank, ranks.above, ranks.at_least, ranks.below, ranks.at_most, ranks.top, ranks.bottom),
        *(budgets.sample, budgets.balance, budgets.balance_tree, budgets.cap),
        *(representatives.typical, representatives.coincide),
        *(vocabulary.noun_phrases, vocabulary.metaclip),
        *(mismatch, placeholders, targets.exclude, targets.image_based, targets.subset),
    )
}
