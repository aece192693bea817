"""Steps that keep an exact number of rows: at random, or shared evenly among groups.

`balance` fills the groups like connected vessels. There is one level L; a group of s rows keeps min(L, s) of them, and
L is the highest for which these quotas do not exceed the budget; the few rows still wanting go to random groups, one
each. Small groups are so taken whole, large ones cut to the same size. Inside a group a preference decides. Any budget
is met to the row (quotas.py has the proof and the other ways of sharing). O(n log n) time, a few arrays over the rows.

A step with a budget says how many rows there were where they do not suffice, and names who would come next.
"""

from typing import Any

import numpy as np

from curate import naming
from curate.errors import UsageError, unknown
from curate.select.frame import CLUSTER_FIRST, Count, Frame, Group, Keep, Levels, Verdict, shortage
from curate.select.steps import contradicting_clusters
from curate.select.steps.quotas import position_in_group, water_fill, water_fill_tree, weighted_fill
from curate.vectors import kmeans

KEEPS = ("near", "far", "random", "max:COLUMN", "min:COLUMN", "better:COLUMN")
TENTHS = 10
NAMED, CAPTIONS_EACH = 8, 32  # groups whose captions are named, and captions read of each


def sample(frame: Frame, number: int, n: Count, seed: int | None = None) -> Verdict:
    """Keep n rows at random, each as likely as the other."""
    lots = frame.random(number) if seed is None else np.random.default_rng(seed).random(len(frame.good))
    rows = np.flatnonzero(frame.alive)
    order = rows[np.argsort(lots[rows], kind="stable")]
    wanted = frame.count(n)
    return Verdict(frame.mask(order[:wanted]), shortage(wanted, len(order)), order[wanted:])


def balance(
    frame: Frame, number: int, column: Group, n: Count, keep: Keep = "random", contradicting_last: bool = False
) -> Verdict:
    """Keep exactly n rows, as evenly over the groups as their sizes allow (water-filling), at random inside each.

    keep: inside a group rather those with the highest `max:column` or lowest `min:column`, or `near` the centroid;
    `better:column` takes from the group's highest tenth at random, then from the next, and so on: better rows, and not
    the extremes alone, among which are pictures that show their own caption.
    contradicting_last: few rows, or none, of groups whose pictures are unlike those that go with captions like theirs
    and yet score high (contradicting_clusters), while other groups have rows left; reads 8 to 32 rows of each group. No
    group is doubted where captions have no embeddings, or where there are fewer than 22 groups.
    """
    rows = np.flatnonzero(frame.alive)
    names, place, sizes = np.unique(frame.group(column)[rows], return_inverse=True, return_counts=True)
    wanted = min(frame.count(n), len(rows))
    rng = np.random.default_rng([frame.seed, number, 1])
    quotas, level = water_fill(sizes, wanted, rng)
    facts: dict[str, Any] = {"groups": len(names), "level": level}
    if contradicting_last:
        weights, reason = _weights(frame, rows, place, rng)
        doubted = weights < 1
        if doubted.any():
            quotas = weighted_fill(sizes, weights, wanted)
        facts |= reason | {
            "contradicting_groups": int(doubted.sum()),
            "contradicting_rows": int(sizes[doubted].sum()),
            "contradicting_kept": int(quotas[doubted].sum()),
        }
        if doubted.any():
            facts["contradicting"] = _named(frame, rows, place, np.where(doubted, sizes, 0))
    return _fill(frame, number, keep, (rows, place, quotas), facts, frame.count(n))


def _named(frame: Frame, rows: np.ndarray, place: np.ndarray, sizes: np.ndarray) -> str:
    """Write what the captions of the largest groups share, with their rows. sizes: i64 [groups], 0 leaves one out."""
    chosen = [g for g in np.argsort(-sizes, kind="stable")[:NAMED].tolist() if sizes[g]]
    try:  # the first rows of each, since reading rows from all over the pool would open every shard
        captions = {g: frame.captions(rows[np.flatnonzero(place == g)[:CAPTIONS_EACH]]) for g in chosen}
        words = naming.names(captions, frame.captions(rows[: NAMED * CAPTIONS_EACH]))
    except UsageError:  # rows without captions
        words = {}
    return "; ".join(f"{words.get(g) or 'no words in common'} ({sizes[g]:,} rows)" for g in chosen)


def _weights(
    frame: Frame, rows: np.ndarray, place: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, dict[str, Any]]:
    """Say how much each group counts, f64 [groups], and why all count in full where nothing can be seen."""
    groups = int(place.max(initial=-1)) + 1
    why = ""
    if frame.text_vectors is None:
        why = "there are no captions' embeddings to see it by"
    elif groups < contradicting_clusters.LEAST_GROUPS:
        why = f"{groups} are too few to see it"
    if why or frame.text_vectors is None:
        return np.ones(groups), {"why": f"no group's pictures seem to contradict its captions: {why}"}
    scores = np.bincount(place, np.nan_to_num(frame.column("clip_score")[rows], nan=-1)) / np.bincount(place)
    return contradicting_clusters.weigh(place, rows, scores, (frame.vectors, frame.text_vectors), rng), {}


def balance_tree(frame: Frame, number: int, n: Count, levels: Levels = (), keep: Keep = "random") -> Verdict:
    """Keep exactly n rows, as evenly as can be over a tree: clusters of clusters, the clusters inside, their rows.

    levels: how many clusters of clusters, the finest first, as in [1000, 100]; the root of the number of clusters where
    not told. The centroids are clustered again by spherical k-means, each level by that below.
    Source: hierarchical k-means and sampling (arXiv:2405.15613), without its resampling and without repeats.
    """
    if frame.centroids is None:
        raise UsageError("balance_tree needs clusters; this directory has none.", CLUSTER_FIRST)
    rows = np.flatnonzero(frame.alive & (frame.group("cluster") >= 0))
    place = frame.group("cluster")[rows]
    points, parents = frame.centroids(), []
    sizes = np.bincount(place, minlength=len(points))
    for k in levels or (max(1, round(len(points) ** 0.5)),):
        if k > len(points):
            raise UsageError(f"balance_tree: a level of {k} clusters over {len(points)}; expected fewer than that.")
        points_above = kmeans.fit(points, k, 20, frame.seed, backend="kmeans").centroids
        parents.append(kmeans.assign(points, points_above)[0].astype(np.int64))
        points = points_above
    wanted = min(frame.count(n), len(rows))
    quotas = water_fill_tree(sizes, parents, wanted, np.random.default_rng([frame.seed, number, 1]))
    facts = {"groups": int((sizes > 0).sum()), "nodes": [len(np.unique(above)) for above in parents]}
    return _fill(frame, number, keep, (rows, place, quotas), facts, frame.count(n))


def _fill(
    frame: Frame,
    number: int,
    keep: str,
    shared: tuple[np.ndarray, np.ndarray, np.ndarray],
    facts: dict[str, Any],
    asked: int,
) -> Verdict:
    """Keep of each group its quota, by preference; the rest come next level by level."""
    rows, place, quotas = shared
    order = _preference_in_group(frame, keep, number, rows, place)
    position = position_in_group(place, order)
    left = position >= quotas[place]
    whole = int((np.bincount(place, minlength=len(quotas)) <= quotas).sum())
    return Verdict(
        frame.mask(rows[~left]),
        facts | {"groups_taken_whole": whole} | shortage(asked, len(rows)),
        rows[left][np.lexsort((rows[left], order[left], position[left]))],
    )


def _preference_in_group(frame: Frame, keep: str, number: int, rows: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Return a number for each of the rows, the smallest of a group being the one to keep; groups: i64 from 0."""
    better, _, column = keep.partition(":")
    if better != "better" or not column:
        return np.asarray(preference(frame, keep, number)[rows])
    values = frame.column(column)[rows]
    position = position_in_group(groups, np.where(np.isnan(values), np.inf, -values))
    tenth = np.floor(position * TENTHS / np.bincount(groups)[groups])
    return np.asarray(tenth + frame.random(number)[rows])


def cap(frame: Frame, number: int, column: Group, n: int, keep: Keep = "random") -> Verdict:
    """Keep at most n rows of each group: at random, or those with the highest `max:column` or lowest `min:column`."""
    if n < 1:
        raise UsageError(f"cap({column}, {n}): at least one row of a group must stay.")
    rows = np.flatnonzero(frame.alive)
    groups = np.unique(frame.group(column)[rows], return_inverse=True)[1]
    order = _preference_in_group(frame, keep, number, rows, groups)
    return Verdict(frame.mask(rows[position_in_group(groups, order) < n]))


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
    raise unknown("policy keep=", keep, KEEPS)
