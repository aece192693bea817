"""Steps that keep an exact number of rows, at random or shared evenly among groups.

`balance` fills the groups like connected vessels. There is one level L; a group of s rows keeps min(L, s) of them, and
L is the highest for which these quotas do not exceed the budget; the few rows still missing are taken from random
groups, one each. So small groups are kept whole, and large ones cut to the same size. Inside a group a preference
decides. Any budget is met to the row (quotas.py has the proof and the other ways of sharing). O(n log n) time. Groups
are processed a few at a time (group_parts), so that beside the columns a row takes a dozen bytes: for its random draw,
its part and its verdict.

A step with a budget reports how many rows there were if they do not suffice, and lists the rows that would come next.
"""

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from curate import naming
from curate.errors import UsageError, unknown
from curate.select.frame import CLUSTER_FIRST, Count, Frame, Group, Keep, Levels, Verdict, reserve_size, shortage
from curate.select.steps import contradicting_clusters
from curate.select.steps.group_parts import GroupParts, Part
from curate.select.steps.quotas import position_in_group, water_fill, water_fill_tree, weighted_fill
from curate.select.steps.ranks import highest, next_in_rank
from curate.vectors import kmeans

KEPT_BY = re.compile("(max|min|better):.")
KEEPS = ("near", "far", "random", "max:COLUMN", "min:COLUMN", "better:COLUMN")
TENTHS = 10
NAMED, CAPTIONS_EACH = 8, 32  # groups whose captions are named, and captions read of each


def sample(frame: Frame, number: int, n: Count, seed: int | None = None) -> Verdict:
    """Keep n rows at random, each with the same chance."""
    lots = frame.random(number) if seed is None else np.random.default_rng(seed).random(len(frame.good))
    wanted, there = frame.count(n), int(frame.alive.sum())
    np.negative(lots, out=lots)  # the lowest lots stay
    keep = highest(lots, frame.alive, min(wanted, there))
    return Verdict(keep, shortage(wanted, there), next_in_rank(lots, frame.alive & ~keep, reserve_size(wanted)))


def balance(
    frame: Frame,
    number: int,
    column: Group,
    n: Count,
    keep: Keep = "random",
    contradicting_last: bool = False,
    written: bool = True,
    among: Count = 0,
) -> Verdict:
    """Keep exactly n rows, as evenly over the groups as their sizes allow (water-filling), at random inside each.

    keep: inside a group prefer the rows with the highest `max:column` or lowest `min:column`, or `near` the centroid;
    `better:column` takes rows at random from the group's highest tenth, then from the next tenth, and so on: better
    rows, but not only the extremes, among which are pictures that show their own caption.
    contradicting_last: take few rows or none from groups of printed words as long as other groups have rows left. Such
    groups are writing that scores high although its pictures are unlike those of similar captions
    (contradicting_clusters); finding them reads 8 to 32 rows of each group. No group is doubted if captions have no
    embeddings, or if there are fewer than 22 groups. written=False also doubts such groups if they show no writing; on
    natural pools these are mostly topics of their own.
    among: only this many rows, the best by keep's column (at least n, without those of doubted groups), share the
    budget; 0: all rows. If n is as large, the best rows stay and groups do not matter.
    """
    if among and not KEPT_BY.match(keep):
        raise UsageError(f"balance: among= needs keep to name a column, not {keep!r}.", 'keep="better:clip_score"')
    parts = GroupParts(frame.group(column), frame.alive)
    sizes, wanted = parts.sizes, min(frame.count(n), parts.num_rows)
    rng = np.random.default_rng([frame.seed, number, 1])
    quotas, level = water_fill(sizes, wanted, rng)
    facts: dict[str, Any] = {"groups": len(sizes), "level": level}
    doubted = np.zeros(len(sizes), bool)
    if contradicting_last:
        weights, reason = _weights(frame, parts, rng, written=written)
        doubted = weights < 1
        if doubted.any():
            quotas = weighted_fill(sizes, weights, wanted)
        facts |= reason | {
            "contradicting_groups": int(doubted.sum()),
            "contradicting_rows": int(sizes[doubted].sum()),
            "contradicting_kept": int(quotas[doubted].sum()),
        }
        if doubted.any():
            facts["contradicting"] = _named(frame, parts, np.where(doubted, sizes, 0))
    best = max(wanted, frame.count(among))
    if among and best < sizes[~doubted].sum():
        parts = GroupParts(frame.group(column), _best(frame, parts, doubted, keep, best))
        quotas, level = water_fill(parts.sizes, wanted, rng)
        facts |= {"level": level, "among": best} | ({"contradicting_kept": 0} if contradicting_last else {})
    facts["groups_taken_whole"] = int((parts.sizes <= quotas).sum())
    return _fill(frame, number, keep, (parts, quotas), facts | shortage(frame.count(n), wanted))


def _best(frame: Frame, parts: GroupParts, doubted: np.ndarray, keep: str, count: int) -> np.ndarray:
    """Mark the `count` best rows by keep's column, bool [n], whose group is not doubted, bool [groups]."""
    candidates = frame.alive.copy()
    for part in parts:
        candidates[part.rows[doubted[part.groups][part.place]]] = False
    extreme, _, column = keep.partition(":")
    values = frame.column(column)
    return highest(-values if extreme == "min" else values, candidates, count)


def _named(frame: Frame, parts: GroupParts, sizes: np.ndarray) -> str:
    """Write what the captions of the largest groups share, with their rows. sizes: i64 [groups], 0 leaves one out."""
    chosen = [g for g in np.argsort(-sizes, kind="stable")[:NAMED].tolist() if sizes[g]]
    try:  # the first rows of each, since reading rows from all over the pool would open every shard
        captions = {g: frame.captions(parts.first_rows(g, CAPTIONS_EACH)) for g in chosen}
        words = naming.names(captions, frame.captions(np.flatnonzero(frame.alive)[: NAMED * CAPTIONS_EACH]))
    except UsageError:  # rows without captions
        words = {}
    return "; ".join(f"{words.get(g) or 'no words in common'} ({sizes[g]:,} rows)" for g in chosen)


def _weights(
    frame: Frame, parts: GroupParts, rng: np.random.Generator, *, written: bool
) -> tuple[np.ndarray, dict[str, Any]]:
    """Say how much each group counts, f64 [groups], and why all count in full if nothing can be told."""
    groups = len(parts.sizes)
    why = ""
    if frame.text_vectors is None:
        why = "there are no caption embeddings to tell by"
    elif groups < contradicting_clusters.LEAST_GROUPS:
        why = f"{groups} are too few to see it"
    if why or frame.text_vectors is None:
        return np.ones(groups), {"why": f"no group's pictures seem to contradict its captions: {why}"}
    scores = parts.sums(frame.column("clip_score")) / parts.sizes
    weights = contradicting_clusters.weigh(parts, scores, (frame.vectors, frame.text_vectors), rng)
    unlike = weights < 1
    if not written or not unlike.any():
        return weights, {}
    doubted = unlike & False
    facts: dict[str, Any] = {}
    if frame.writing is not None:
        doubted = contradicting_clusters.are_written(parts, unlike, frame.writing, rng)
    else:
        facts["why"] = "these embeddings do not say which pictures are writing; see written=False"
    spared = np.where(unlike & ~doubted, parts.sizes, 0)
    facts |= {"unlike_but_kept_groups": int((spared > 0).sum()), "unlike_but_kept_rows": int(spared.sum())}
    facts |= {"unlike_but_kept": _named(frame, parts, spared)} if spared.any() else {}
    return np.where(doubted, weights, 1.0), facts


def balance_tree(frame: Frame, number: int, n: Count, levels: Levels = (), keep: Keep = "random") -> Verdict:
    """Keep exactly n rows, as evenly as possible over a tree: clusters of clusters, the clusters inside, their rows.

    levels: how many clusters of clusters, the finest first, as in [1000, 100]; by default the square root of the number
    of clusters. The centroids are clustered again by spherical k-means, each level from the one below.
    Source: hierarchical k-means and sampling (arXiv:2405.15613), without its resampling and without repeats.
    """
    if frame.centroids is None:
        raise UsageError("balance_tree needs clusters; this directory has none.", CLUSTER_FIRST)
    parts = GroupParts(frame.group("cluster"), frame.alive & (frame.group("cluster") >= 0))
    points, parents = frame.centroids(), []
    sizes = np.zeros(len(points), np.int64)
    sizes[parts.names] = parts.sizes
    for k in levels or (max(1, round(len(points) ** 0.5)),):
        if k > len(points):
            raise UsageError(f"balance_tree: a level of {k} clusters over {len(points)}; expected fewer than that.")
        points_above = kmeans.fit(points, k, 20, frame.seed, backend="kmeans").centroids
        parents.append(kmeans.assign(points, points_above)[0].astype(np.int64))
        points = points_above
    wanted = min(frame.count(n), parts.num_rows)
    quotas = water_fill_tree(sizes, parents, wanted, np.random.default_rng([frame.seed, number, 1]))
    facts = {"groups": int((sizes > 0).sum()), "nodes": [len(np.unique(above)) for above in parents]}
    facts["groups_taken_whole"] = int((sizes <= quotas).sum())
    return _fill(frame, number, keep, (parts, quotas[parts.names]), facts | shortage(frame.count(n), wanted))


def _fill(
    frame: Frame,
    number: int,
    keep: str,
    shared: tuple[GroupParts, np.ndarray],
    facts: dict[str, Any],
) -> Verdict:
    """Keep of each group its quota, by preference; the rest come next level by level."""
    parts, quotas = shared
    stay = np.zeros(len(frame.good), bool)
    order_of = preference_in_group(frame, keep, number)
    most = reserve_size(int(quotas.sum()))
    following = np.zeros((2, 0)), np.zeros(0, np.int64)  # order and position, and the rows, of who comes next
    for part in parts:
        order = order_of(part)
        position = position_in_group(part.place, order)
        left = position >= quotas[part.groups][part.place]
        stay[part.rows[~left]] = True
        ranks = np.concatenate([following[0], [order[left], position[left]]], axis=1)
        rows = np.concatenate([following[1], part.rows[left]])
        first = np.lexsort((rows, *ranks))[:most]
        following = ranks[:, first], rows[first]
    return Verdict(stay, facts, following[1])


def preference_in_group(frame: Frame, keep: str, number: int) -> Callable[[Part], np.ndarray]:
    """Make a function that numbers the rows of a part; a group's smallest is the one to keep."""
    better, _, column = keep.partition(":")
    if better != "better" or not column:
        preferred = preference(frame, keep, number)
        return lambda part: preferred(part.rows)
    values, lots = frame.column(column), frame.random(number)

    def by_tenths(part: Part) -> np.ndarray:
        own = values[part.rows]
        position = position_in_group(part.place, np.where(np.isnan(own), np.inf, -own))
        tenth = np.floor(position * TENTHS / np.bincount(part.place)[part.place])
        return np.asarray(tenth + lots[part.rows])

    return by_tenths


def cap(frame: Frame, number: int, column: Group, n: int, keep: Keep = "random") -> Verdict:
    """Keep at most n rows of each group: at random, or those with the highest `max:column` or lowest `min:column`."""
    if n < 1:
        raise UsageError(f"cap({column}, {n}): at least one row of a group must stay.")
    stay = np.zeros(len(frame.good), bool)
    order_of = preference_in_group(frame, keep, number)
    for part in GroupParts(frame.group(column), frame.alive):
        stay[part.rows[position_in_group(part.place, order_of(part)) < n]] = True
    return Verdict(stay)


def preference(frame: Frame, keep: str, number: int) -> Callable[[np.ndarray], np.ndarray]:
    """Make a function that numbers rows, i64 [m]; the smallest is the one to keep.

    Raises: UsageError for an unknown policy.
    """
    if keep == "random":
        return frame.random(number).__getitem__
    if keep in ("near", "far"):
        closeness = frame.column("centroid_similarity")
        return lambda rows: -closeness[rows] if keep == "near" else closeness[rows]
    extreme, _, column = keep.partition(":")
    if extreme in ("max", "min") and column:
        values = frame.column(column)
        sign = -1.0 if extreme == "max" else 1.0
        return lambda rows: np.asarray(sign * values[rows].astype(np.float64))
    raise unknown("policy keep=", keep, KEEPS)
