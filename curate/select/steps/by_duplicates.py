"""Steps that drop near-duplicates: all but one of each group, or all copies of a picture that has many captions.

They read the near-duplicate forest that clustering stored. Which pairs count as near-duplicates is decided by a cosine,
or by the pool's own pixels (auto_threshold); which row of a group stays is decided in near_duplicates.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from curate.errors import UsageError, unknown
from curate.select.frame import AUTO, CLUSTER_FIRST, Count, Edges, Frame, Group, Keep, Threshold, Verdict
from curate.select.steps import auto_threshold
from curate.select.steps.by_budget import preference
from curate.select.steps.linked_pairs import PairRule, cosine_rule, linked_forest
from curate.select.steps.near_duplicates import RULES, resolve
from curate.select.steps.ranks import highest
from curate.select.steps.same_picture import CopyTest
from curate.select.steps.unrelated_captions import are_unrelated
from curate.vectors import forest

SPARED_AT = 1.5  # times the mismatched share counts as wrong when copies are spared (pipelines/LOG.md)
SURELY = 2  # but at most this many times the lower bound of that share
LEAST_CAPTIONS = 3  # least captions of a picture that can be called unrelated


def dedup(
    frame: Frame,
    number: int,
    threshold: Threshold = 0.86,
    keep: Keep = "middle",
    rule: str = "components",
    templates: bool = False,
    budget: Count = 0,
) -> Verdict:
    """Keep one row of each group of near-duplicates (cosine > threshold; "auto": copies, by the pool's own pixels).

    "auto" links two pictures whose hashes differ in at most 16 bits (8 if there is little evidence) and whose cosine is
    above the threshold of auto_threshold, or whose cosine leaves no doubt; linked_pairs has the rule.
    Only copies among these count: pairs with mostly the same words in their captions, or whose finer hashes agree.
    templates: pictures made from one template, such as T-shirts with different prints, count too, whatever they say.
    budget: rows that later steps keep. If fewer rows with matching captions are left, the missing number is made up by
    the copies with the highest clip_score: a right pair twice teaches more than a wrong one (`_spare`).
    """
    if rule not in RULES:
        raise unknown("rule of dedup", rule, RULES)
    if frame.edges is None:
        raise UsageError("dedup needs clusters; this directory has none.", CLUSTER_FIRST)
    pair_rule, facts = _pair_rule(frame, "dedup", threshold)
    test = None
    if threshold == AUTO and not templates:
        test, told = _copy_test(frame, frame.captions)
        facts |= told
    rows, edges = _joined_rows(frame, pair_rule.threshold)
    order = preference(frame, "near" if keep in ("middle", "inner-middle") else keep, number)(rows)
    resolved = resolve(
        edges, frame.alive[rows], order, rule, keep, pair_rule,
        lambda some: frame.vectors(rows[some]), lambda some: frame.hashes(rows[some]),
        None if test is None else lambda a, b: test(rows[a], rows[b]),
    )  # fmt: skip
    del edges, order
    gone = frame.alive[rows] & ~resolved.keep
    if budget:
        spared = _spare(frame, rows[gone], frame.count(budget))
        gone[gone] = ~spared
        facts |= {"copies_spared": int(spared.sum())} if spared.any() else {}
    own = np.arange(len(rows), dtype=resolved.component.dtype)
    told = gone | ((resolved.component >= 0) & (resolved.component != own))
    kept = np.where(gone[told], rows[resolved.duplicate_of[told]], -1)
    component, similarity = rows[resolved.component[told]], np.where(gone, resolved.similarity, np.nan)[told]
    frame.duplicates.add(frame.alive, rows[told], component, kept, similarity)
    share = {"largest_share": resolved.facts["largest_component"] / max(1, int(frame.alive.sum()))}
    stay = frame.alive.copy()
    stay[rows[gone]] = False
    return Verdict(stay, {**facts, **resolved.facts, **share, **_compared(frame, pair_rule.threshold)})


def _spare(frame: Frame, copies: np.ndarray, budget: int) -> np.ndarray:
    """Say which copies stay because the budget needs more rows than match, bool [copies]. copies: i64, rows.

    Of the rows that are not copies, SPARED_AT times the share that `mismatch` would estimate counts as wrong, but at
    most SURELY times the lower end of its interval: weak scores on a small pool say little. Without scores none stays.
    """
    spared = np.zeros(len(copies), bool)
    if frame.shuffled is None or frame.text_vectors is None:
        return spared
    scores = frame.column("clip_score")
    left = frame.alive & ~frame.mask(copies)
    share, facts = auto_threshold.mismatch_share(scores[left & ~np.isnan(scores)], np.asarray(frame.shuffled))
    doubtful = min(SPARED_AT * share, SURELY * facts.get("share_from", 0.0))
    lacking = budget - round((1 - doubtful) * int(left.sum()))
    return highest(scores[copies], ~spared, max(0, min(lacking, len(copies))))


def _joined_rows(frame: Frame, threshold: float) -> tuple[np.ndarray, Edges]:
    """List the rows with an edge above the threshold, i64 ascending, and these edges by the places in that list, i32.

    The cost of all further work grows with these rows, no longer with the pool.
    """
    assert frame.edges is not None
    a, b, similarity, bits = frame.edges()
    above = similarity > threshold
    a, b = a[above], b[above]
    joined = np.zeros(len(frame.good), bool)
    joined[a] = joined[b] = True
    rows = np.flatnonzero(joined)
    kind = np.int32 if len(rows) <= np.iinfo(np.int32).max else np.int64
    a, b = (np.searchsorted(rows, ends).astype(kind) for ends in (a, b))
    return rows, (a, b, similarity[above], bits[above])


def _pair_rule(frame: Frame, name: str, threshold: Threshold) -> tuple[PairRule, dict[str, Any]]:
    """Choose the rule that links pairs, and return its evidence. Raises: UsageError for a threshold under the floor."""
    assert frame.edges is not None
    if threshold == AUTO:
        _, _, similarity, bits = frame.edges()
        evidence = auto_threshold.find_threshold(similarity, bits, frame.floor, int(frame.good.sum()))
        return evidence.rule, {"threshold": evidence.threshold, **evidence.facts()}
    if threshold < frame.floor:
        raise UsageError(
            f"{name}: the threshold {threshold} is below the floor of these clusters, {frame.floor}.",
            f"run `curate cluster … --floor {threshold}`, or use a threshold of at least {frame.floor}",
        )
    return cosine_rule(threshold), {"threshold": threshold}


def _copy_test(
    frame: Frame, captions: Callable[[np.ndarray], list[str]] | None
) -> tuple[CopyTest | None, dict[str, Any]]:
    """Make the test for copies if the sidecars have finer hashes; else note that templates count as copies."""
    if frame.details is None:
        return None, {"templates": "count as copies: these embeddings have no finer hashes to tell them apart"}
    return CopyTest(frame.details, captions), {}


def _compared(frame: Frame, threshold: float) -> dict[str, Any]:
    """Say what share of the pairs above a threshold clustering compared, by its estimate at the next lower level."""
    levels = [level for level in frame.recall.get("levels", []) if level["above"] <= threshold]
    return {"pairs_compared": levels[-1]["found"]} if levels and levels[-1]["pairs"] else {}


def placeholders(
    frame: Frame,
    number: int,
    copies: int = 50,
    captions: float = 0.5,
    threshold: Threshold = AUTO,
    by: Group = "caption",
    exact: bool = False,
    unrelated: bool = False,
) -> Verdict:
    """Drop all rows of a picture that has many different captions ("image not found", a logo); not even one stays.

    A picture is a component of near-duplicates above the threshold whose pixels also agree, as far as they are known;
    exact: rows of the same bytes, for which no clusters are needed. It is dropped if at least `copies` good rows of the
    pool have it, whether or not earlier steps dropped them, and at least the share `captions` of them have a caption of
    their own. by: another column than the caption, such as url, for pools in which an error picture always has the same
    alt text. unrelated: only if its captions have no more in common than any captions of the pool (unrelated_captions);
    then a few copies are enough to tell, `placeholders(3, unrelated=True)`.
    """
    if not 0 <= captions <= 1:
        raise UsageError(f"placeholders: captions={captions}; expected a share between 0 and 1.")
    facts: dict[str, Any] = {}
    if exact:
        rows = np.flatnonzero(frame.good)
        labels = frame.group("uid")[rows]
    elif frame.edges is None:
        raise UsageError("placeholders needs clusters, or exact=True; this directory has none.", CLUSTER_FIRST)
    else:
        pair_rule, found = _pair_rule(frame, "placeholders", threshold)
        by_pixels = replace(pair_rule, anyhow=np.inf, bits=min(pair_rule.bits, auto_threshold.COPY_BITS))
        test, _ = _copy_test(frame, None)
        everyone = np.arange(len(frame.good) if copies < 2 else 0)  # else only rows that are joined can be many
        joined, edges = (everyone, frame.edges()) if copies < 2 else _joined_rows(frame, pair_rule.threshold)
        a, b, _ = linked_forest(
            edges, by_pixels, frame.good[joined],
            lambda some: frame.vectors(joined[some]), lambda some: frame.hashes(joined[some]),
            None if test is None else lambda a, b: test(joined[a], joined[b]),
        )  # fmt: skip
        good = frame.good[joined]
        rows, labels = joined[good], forest.components(a, b, len(joined))[good]
        facts["threshold"] = found["threshold"]
    picture = np.unique(labels, return_inverse=True)[1]
    known = by in frame.grouped
    caption = np.unique(frame.group(by)[rows], return_inverse=True)[1]
    if not known:  # no other step of the default asks for it
        del frame.grouped[by]
    distinct = np.unique(picture * (int(caption.max(initial=0)) + 1) + caption) // (int(caption.max(initial=0)) + 1)
    sizes = np.bincount(picture)
    captions_each = np.bincount(distinct, minlength=len(sizes))
    bad = (sizes >= copies) & (captions_each >= captions * sizes)
    if unrelated:
        bad &= captions_each >= LEAST_CAPTIONS
        members = np.flatnonzero(bad[picture])
        bad[bad] = are_unrelated(frame, number, rows[members], np.unique(picture[members], return_inverse=True)[1])
    facts |= {"pictures": int(bad.sum()), "largest": int(sizes[bad].max(initial=0))}
    return Verdict(frame.alive & ~frame.mask(rows[bad[picture]]), facts)
