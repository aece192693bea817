"""What to do with groups of near-duplicates: which rows make a group, and which of them stays.

In: the stored near-duplicate forest, the rule of a pair (linked_pairs), and the rows still alive. Three rules of a
group, named because they differ (their survivors grow in this order):

    components  one row of each connected component, as Bunny's coreset was made; removes most, since components chain
    semdedup    drop a row if it is linked to a row before it, dropped or not, as in SemDeDup's code (arXiv:2303.09540)
    greedy      drop a row if it is linked to a row kept before it: no two survivors are linked

The forest alone decides `components` if pairs are linked by cosine alone and no row of a component has been dropped
before. Everything else needs the products of the rows concerned, which are all inside components: `vectors` fetches
only these.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from curate.select.frame import Edges, Fetch
from curate.select.steps.linked_pairs import (
    Hashes,
    Joined,
    PairRule,
    differing,
    fetch_groups,
    groups_of,
    linked_forest,
    tested,
)
from curate.select.steps.same_picture import PairTest
from curate.vectors import near_pairs
from curate.vectors.exact import widen
from curate.vectors.forest import components

RULES = ("components", "semdedup", "greedy")


@dataclass(frozen=True)
class Resolved:
    """keep: bool [n]. component: [n], -1 where not alive. duplicate_of: [n], the row that stays for a dropped one, -1:
    none; both as wide as the edges' ends. similarity: f32 [n], to it.
    """

    keep: np.ndarray
    component: np.ndarray
    duplicate_of: np.ndarray
    similarity: np.ndarray
    facts: dict[str, Any] = field(default_factory=dict)


def resolve(
    edges: Edges,
    alive: np.ndarray,
    preference: np.ndarray,
    rule: str,
    keep: str,
    pair_rule: PairRule,
    vectors: Fetch,
    hashes: Hashes,
    test: PairTest | None = None,
) -> Resolved:
    """Decide which near-duplicates stay.

    edges: the stored forest over all rows. preference: f64 [n], the smallest is kept first; for the keepers
    `middle` and `inner-middle` it is the distance to the centroid, up to a monotone map. test: see linked_pairs.
    For `components` a dropped row's similarity is the weakest link of the chain that joins it to the row that
    stays: the threshold at which they would part.
    """
    links = linked_forest(edges, pair_rule, alive, vectors, hashes, test)
    component = components(links[0], links[1], len(alive)).astype(links[0].dtype)
    component[~alive] = -1
    rows, bounds = groups_of(component)
    rows = rows[np.lexsort((rows, preference[rows], component[rows]))]
    sizes = np.diff(bounds)
    if keep == "inner-middle":
        rows = _by_inner_distance(rows, bounds, vectors)
    result = Resolved(
        alive.copy(), component, np.full(len(alive), -1, component.dtype), np.full(len(alive), np.nan, np.float32),
        _describe(links[2], sizes, int(alive.sum())),
    )  # fmt: skip
    if not len(rows):
        return result
    if rule == "components":
        chosen = rows[bounds[:-1] + (sizes // 2 if keep in ("middle", "inner-middle") else 0)]
        result.keep[rows] = False
        result.keep[chosen] = True
        result.duplicate_of[rows] = np.repeat(chosen, sizes)
        result.similarity[:] = weakest_links(links, chosen, len(alive))
    else:
        if keep in ("middle", "inner-middle"):
            rows = _from_the_middle(rows, bounds)
        pairs = np.repeat(sizes == 2, sizes)
        _drop_seconds(rows[pairs], links, result)
        larger = np.concatenate([[0], np.cumsum(sizes[sizes > 2])])
        _drop_in_order(rows[~pairs], larger, rule == "greedy", pair_rule, (vectors, hashes, test), result)
    return result


def _describe(similarity: np.ndarray, sizes: np.ndarray, alive: int) -> dict[str, Any]:
    """Summarise the components: many rows in one, or weak links, show that the threshold chains."""
    return {
        "components": len(sizes),
        "rows_in_components": int(sizes.sum()),
        "largest_component": int(sizes.max(initial=0)),
        "largest_share": float(sizes.max(initial=0) / max(1, alive)),
        "mean_link": float(similarity.mean(dtype=np.float64)) if len(similarity) else None,
    }


def _by_inner_distance(rows: np.ndarray, bounds: np.ndarray, vectors: Fetch) -> np.ndarray:
    """Order each group by the distance to its own mean, ties by row; in a pair both are equally far."""
    arranged = [rows[:0]]
    for part, cuts, x in fetch_groups(rows, bounds, vectors):
        sizes = np.diff(cuts)
        group = np.repeat(np.arange(len(sizes)), sizes)
        x = widen(x)
        mean = np.add.reduceat(x, cuts[:-1], axis=0, dtype=np.float64) / sizes[:, None]
        parts = [slice(at, at + 4096) for at in range(0, len(x), 4096)]
        distance = np.concatenate([np.linalg.norm(x[one] - mean[group[one]], axis=1) for one in parts])
        arranged.append(part[np.lexsort((part, np.where(sizes[group] == 2, 0, distance), group))])
    return np.concatenate(arranged)


def _from_the_middle(rows: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """Reorder each group so that its middle member comes first, then its neighbours in turn."""
    sizes = np.diff(bounds)
    position = np.arange(len(rows)) - np.repeat(bounds[:-1], sizes)
    offset = np.abs(position - np.repeat(sizes // 2, sizes))
    return rows[np.lexsort((position, offset, np.repeat(np.arange(len(sizes)), sizes)))]


def _drop_seconds(rows: np.ndarray, links: Joined, result: Resolved) -> None:
    """Drop the second row of each pair: one edge joins the two, and no rule could judge otherwise."""
    link = np.full(len(result.keep), np.nan, np.float32)
    link[links[0]], link[links[1]] = links[2], links[2]
    first, second = rows[::2], rows[1::2]
    result.keep[second] = False
    result.duplicate_of[second], result.similarity[second] = first, link[second]


def _drop_in_order(
    rows: np.ndarray,
    bounds: np.ndarray,
    greedy: bool,
    pair_rule: PairRule,
    fetch: tuple[Fetch, Hashes, PairTest | None],
    result: Resolved,
) -> None:
    """Apply semdedup or greedy to each group, whose rows stand in the order of preference; fills in the result."""
    for part, cuts, x in fetch_groups(rows, bounds, fetch[0]):
        hashes = fetch[1](part)
        dropped = np.zeros(len(part), bool)
        stays = np.full(len(part), len(part))
        cosine = np.full(len(part), np.nan, np.float32)
        for i, j, similarity in near_pairs.near_pairs(x, np.arange(len(part)), cuts, pair_rule.threshold):
            linked = tested(pair_rule.links(similarity, differing(hashes, i, j)), part[i], part[j], fetch[2])
            i, j, similarity = i[linked], j[linked], similarity[linked]
            if greedy:
                _drop_greedily(i, j, dropped)
                kept = ~dropped[i]
                i, j, similarity = i[kept], j[kept], similarity[kept]
            dropped[j] = True
            np.minimum.at(stays, j, i)  # the first in the order of preference
            nearest = stays[j] == i
            cosine[j[nearest]] = similarity[nearest]
        gone = np.flatnonzero(dropped)
        while len(chained := gone[dropped[stays[gone]]]):  # what it resembles may be gone, too: take that one's
            stays[chained] = stays[stays[chained]]
            cosine[chained] = np.nan
        result.keep[part[gone]] = False
        result.duplicate_of[part[gone]] = part[stays[gone]]
        result.similarity[part[gone]] = cosine[gone]


def _drop_greedily(i: np.ndarray, j: np.ndarray, dropped: np.ndarray) -> None:
    """Drop every j that is near a row kept before it. Each i's own fate follows from pairs seen before or here.

    Round by round, the rows that no undecided row precedes are decided for all groups at once.
    """
    while True:
        open_pairs = ~dropped[i] & ~dropped[j]
        i, j = i[open_pairs], j[open_pairs]
        if not len(i):
            return
        preceded = np.zeros(len(dropped), bool)
        preceded[j] = True
        dropped[j[~preceded[i]]] = True


def weakest_links(edges: Joined, starts: np.ndarray, num_rows: int) -> np.ndarray:
    """Find for each row the weakest edge on the forest's path to its tree's start, f32 [n]; NaN off the trees.

    starts: i64, one row for each tree. Leaves are removed round by round, then visited from the last round to the
    first. Each row holds the exclusive or of the numbers of its remaining edges, which at a leaf is the number of its
    only edge: 12 bytes a row, and O(n log n).
    """
    a, b, similarity = edges
    weakest = np.full(num_rows, np.nan, np.float32)
    degree, edge, numbers = np.zeros(num_rows, np.int32), np.zeros(num_rows, a.dtype), np.arange(len(a), dtype=a.dtype)
    for ends in (a, b):
        np.add.at(degree, ends, 1)
        np.bitwise_xor.at(edge, ends, numbers)
    degree[starts] += 2  # a start is never a leaf
    rounds = []
    leaves = np.flatnonzero(degree == 1).astype(a.dtype)
    while len(leaves):
        rounds.append(leaves)
        mine = edge[leaves]
        above = a[mine] ^ b[mine] ^ leaves
        np.subtract.at(degree, above, 1)
        np.bitwise_xor.at(edge, above, mine)
        above = np.unique(above)
        leaves = above[degree[above] == 1]
    weakest[starts] = np.inf
    for leaves in reversed(rounds):
        mine = edge[leaves]
        weakest[leaves] = np.minimum(similarity[mine], weakest[a[mine] ^ b[mine] ^ leaves])
    weakest[starts] = np.nan
    return weakest
