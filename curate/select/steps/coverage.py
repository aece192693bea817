"""Which rows represent their group: typicality, density, kernel herding, and how redundant a row is.

Typicality: 1 / mean distance to the k nearest neighbours, which is high where the group is dense. Density: the mean of
the Gaussian kernel exp(-|x - y|² / 2σ²) over a group's pairs. Herding: rows are chosen one by one, each time the one
that brings the chosen rows' distribution nearest to the whole group's (maximum mean discrepancy). Redundancy: how much
a row points in the same direction as the others, after subtracting the mean, by one sum of unit vectors instead of all
pairs. Each function names its paper, its formula and its cost.

Numerics on unit vectors. `fetch` returns the vectors of some rows, f16 or f32 [m, d]: an array's `x.__getitem__`, or
what reads them from disk. `groups` says which cluster each row belongs to; rows of a negative group are left out. Only
rows of one group are ever compared. A group of more than `PART` rows is cut at random into parts of about equal size
that are worked one by one, so that no matrix is larger than PART x PART; smaller groups are exact.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from curate.select.frame import Fetch
from curate.select.steps.quotas import position_in_group, weighted_fill
from curate.vectors.exact import widen
from curate.vectors.kmeans import unit_rows

PART = 4096
READ_ROWS = 1 << 16  # rows of many small groups are fetched at once
BLOCK = 1 << 14
NEAREST = 1e-4  # a mean distance below it is rounding: equal rows
SAME_CONCEPT = 0.9  # COINCIDE: centroids closer than this are no other concept


@dataclass(frozen=True)
class Chosen:
    """Rows chosen, and those that would come next, each in order of rank. facts: for the funnel."""

    rows: np.ndarray
    reserve: np.ndarray
    facts: dict[str, Any] = field(default_factory=dict)


def parts_of(groups: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Arrange the rows by group, larger groups cut at random into equal parts of at most `PART` rows.

    groups: i64 [n], negative: none. Returns rows i64 [m] and where each part begins, i64 [parts + 1]. Groups ascend,
    and inside a part so do the rows.
    """
    rows = np.flatnonzero(groups >= 0)
    _, place, sizes = np.unique(groups[rows], return_inverse=True, return_counts=True)
    pieces = -(-sizes // PART)
    lots = np.zeros(len(rows), np.int64)
    large = np.flatnonzero(pieces[place] > 1)
    lots[large] = position_in_group(place[large], rng.random(len(large))) % pieces[place[large]]
    order = np.lexsort((rows, lots, place))
    first = (np.diff(place[order], prepend=-1) != 0) | (np.diff(lots[order], prepend=-1) != 0)
    return rows[order], np.append(np.flatnonzero(first), len(rows))


def each_part(fetch: Fetch, rows: np.ndarray, bounds: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Yield for each part the place where it begins, its rows and its vectors, f32 and of unit length."""
    first = 0
    while first + 1 < len(bounds):
        last = max(first + 1, int(np.searchsorted(bounds, bounds[first] + READ_ROWS, side="right")) - 1)
        x = fetch(rows[bounds[first] : bounds[last]])
        for start, end in zip(bounds[first:last], bounds[first + 1 : last + 1], strict=True):
            yield start, rows[start:end], unit_rows(widen(x[start - bounds[first] : end - bounds[first]]))
        first = last


def typicality(fetch: Fetch, groups: np.ndarray, neighbours: int, rng: np.random.Generator) -> np.ndarray:
    """Score how typical a row is of its group: one over the mean distance to its nearest neighbours there.

    Distances are Euclidean between unit vectors; a group of m rows has at most m - 1 neighbours. Returns f32 [n], at
    most 1 / NEAREST; NaN outside groups, 0 for a row alone in its group. O(n PART d) time.
    Source: TypiClust (arXiv:2202.02794), equation 4, there with 20 neighbours; PreSel (arXiv:2503.07591) takes 5.
    """
    scores = np.full(len(groups), np.nan, np.float32)
    for _, rows, x in each_part(fetch, *parts_of(groups, rng)):
        count = min(neighbours, len(rows) - 1)
        if not count:
            scores[rows] = 0
            continue
        products = x @ x.T
        np.fill_diagonal(products, -2)
        nearest = np.partition(products, len(rows) - count, axis=1)[:, len(rows) - count :]
        distance = np.sqrt(np.maximum(0, 2 - 2 * nearest.astype(np.float64))).mean(axis=1)
        scores[rows] = 1 / np.maximum(distance, NEAREST)
    return scores


def most_typical(
    fetch: Fetch, groups: np.ndarray, n: int, neighbours: int, rng: np.random.Generator, *, even: bool = False
) -> Chosen:
    """Choose n rows: of each group its most typical ones, as many as its share of the rows asks for.

    even: equally many of each group, as far as their sizes allow. n is at most the number of rows in groups.
    Source: PreSel (arXiv:2503.07591), quotas in proportion; TypiClust takes one of each group.
    """
    score = typicality(fetch, groups, neighbours, rng)
    rows = np.flatnonzero(groups >= 0)
    _, place, sizes = np.unique(groups[rows], return_inverse=True, return_counts=True)
    weights = np.ones(len(sizes)) if even else sizes.astype(np.float64)
    quotas = weighted_fill(sizes, weights, n)
    position = position_in_group(place, -score[rows].astype(np.float64))
    return _by_quota(rows, place, position, quotas, weights, {"groups": len(sizes)})


def _by_quota(
    rows: np.ndarray,
    place: np.ndarray,
    position: np.ndarray,
    quotas: np.ndarray,
    weights: np.ndarray,
    facts: dict[str, Any],
) -> Chosen:
    """Split rows, ranked inside their groups, at the quotas; the group least served by its weight comes first."""
    served = (position + 1) / np.maximum(weights[place], np.finfo(np.float64).tiny)
    order = np.lexsort((rows, served))
    taken = (position < quotas[place])[order]
    return Chosen(rows[order][taken], rows[order][~taken], facts)


def density(fetch: Fetch, groups: np.ndarray, sigma: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Measure each group's density: the mean of the Gaussian kernel over its pairs, a row with itself included.

    The kernel of two rows is exp(-distance ** 2 / (2 sigma ** 2)), between exp(-2 / sigma ** 2) and 1. A group worked
    in parts gets the mean of its parts. Returns f64 [g], one for each group in ascending order, and the groups' mean
    directions, unit rows f32 [g, d]. Source: COINCIDE (arXiv:2406.10995).
    """
    rows, bounds = parts_of(groups, rng)
    names, place = np.unique(groups[rows], return_inverse=True)
    total, size = np.zeros(len(names)), np.bincount(place, minlength=len(names))
    means: np.ndarray | None = None
    for first, members, x in each_part(fetch, rows, bounds):
        group = place[first]
        total[group] += gaussian_kernel(x, sigma).mean(dtype=np.float64) * len(members)
        means = np.zeros((len(names), x.shape[1])) if means is None else means
        means[group] += x.sum(axis=0, dtype=np.float64)
    return total / np.maximum(size, 1), unit_rows(np.zeros((0, 1)) if means is None else means)


def gaussian_kernel(x_md: np.ndarray, sigma: float) -> np.ndarray:
    """Compute the Gaussian kernel of unit rows among themselves, f32 [m, m]."""
    kernel = x_md @ x_md.T
    kernel -= 1
    kernel *= 1 / sigma**2
    return np.asarray(np.exp(kernel, out=kernel))


def transferability(centroids_gd: np.ndarray) -> np.ndarray:
    """Score how near a group is to other concepts: its mean cosine to the centroids that are not (nearly) its own.

    Centroids at a cosine above SAME_CONCEPT are left out, as in COINCIDE's released code; the paper's formula has the
    plain mean. Returns f64 [g]; 0 where there is no other. O(g^2 d) time, in blocks.
    """
    unit = unit_rows(centroids_gd)
    scores = np.zeros(len(unit))
    block = max(16, (1 << 24) // max(1, len(unit)))
    for first in range(0, len(unit), block):
        cosine = unit[first : first + block] @ unit.T
        other = cosine <= SAME_CONCEPT
        scores[first : first + block] = np.where(other, cosine, 0).sum(axis=1) / np.maximum(1, other.sum(axis=1))
    return scores


def herd(kernel_mm: np.ndarray, count: int) -> np.ndarray:
    """Choose rows one by one so that their distribution comes as near the whole group's as it can (greedy MMD).

    Each step takes the row that makes the squared maximum mean discrepancy between chosen and all rows smallest, ties
    by row. Returns i64 [count] in the order chosen, so that a shorter choice is its beginning. O(m count) time.
    """
    wanted = kernel_mm.mean(axis=1, dtype=np.float64)  # how near a row is to all
    own = np.diagonal(kernel_mm).astype(np.float64) / 2
    near_chosen = np.zeros(len(kernel_mm))
    chosen = np.empty(count, np.int64)
    for step in range(count):
        gain = wanted - (near_chosen + own) / (step + 1)
        gain[chosen[:step]] = -np.inf
        chosen[step] = gain.argmax()
        near_chosen += kernel_mm[chosen[step]]
    return chosen


def coincide(
    fetch: Fetch, groups: np.ndarray, n: int, rng: np.random.Generator, *, temperature: float = 0.1, sigma: float = 1.0
) -> Chosen:
    """Choose n rows: more of sparse groups that transfer well, and inside each the rows that stand for it.

    Group i gets a share of exp(S_i / (temperature D_i)), with its transferability S_i and density D_i, never more than
    it has; inside, kernel herding. n is at most the number of rows in groups. Reads the vectors twice.
    Source: COINCIDE (arXiv:2406.10995), on stored embeddings instead of a model's activations.
    # Differs from its release: quotas are exact for any n (capped shares, largest fractions), where the release rounds
    # group by group; and a group of more than PART rows is herded in random parts.
    """
    state = rng.bit_generator.state
    dense, centroids = density(fetch, groups, sigma, rng)
    transfer = transferability(centroids)
    exponent = transfer / (temperature * dense)
    weights = np.exp(exponent - exponent.max(initial=0)) if len(exponent) else exponent
    rng.bit_generator.state = state  # the same parts again
    rows, bounds = parts_of(groups, rng)
    place = np.unique(groups[rows], return_inverse=True)[1]
    quotas = weighted_fill(np.bincount(place, minlength=len(dense)), weights, n)
    position = np.full(len(rows), len(rows))
    part_group = place[bounds[:-1]]
    part_quotas = _share_among_parts(quotas, part_group, np.diff(bounds))
    for part, (first, members, x) in enumerate(each_part(fetch, rows, bounds)):
        count = min(len(members), int(part_quotas[part]) + 1)  # and who comes next
        if part_quotas[part]:
            position[first + herd(gaussian_kernel(x, sigma), count)] = np.arange(count)
    taken = position < np.repeat(part_quotas, np.diff(bounds))
    next_rows = np.flatnonzero(~taken & (position < len(rows)))
    chosen = np.flatnonzero(taken)
    facts = {"groups": len(dense), "density": _spread(dense), "transferability": _spread(transfer)}
    return Chosen(
        rows[chosen[np.lexsort((rows[chosen], place[chosen], position[chosen]))]],
        rows[next_rows[np.lexsort((rows[next_rows], -weights[place[next_rows]]))]],
        facts | {"groups_taken_whole": int((quotas == np.bincount(place, minlength=len(dense))).sum())},
    )


def _share_among_parts(quotas: np.ndarray, part_group: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Split each group's quota over its parts by their sizes."""
    shared = np.zeros(len(sizes), np.int64)
    bounds = np.searchsorted(part_group, np.arange(len(quotas) + 1))
    for group, (first, last) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        shared[first:last] = weighted_fill(sizes[first:last], sizes[first:last].astype(np.float64), int(quotas[group]))
    return shared


def _spread(values: np.ndarray) -> list[float]:
    return [round(float(value), 4) for value in np.quantile(values, [0, 0.5, 1])] if len(values) else []


def redundancy(fetch: Fetch, groups: np.ndarray, block: int = BLOCK) -> np.ndarray:
    """Score how much a row points where the other rows of its group point, once the group's mean is taken away.

    With u the unit vector of a row minus the mean: the mean of u_i . u_j over the others, (u_i . sum(u) - 1) / (N - 1).
    Returns f32 [n]; NaN outside groups, 0 for a row alone. O(n d) time, three readings of the vectors in row order.
    Source: PRISM (arXiv:2502.12119), which keeps the lowest; there on a model's shallow visual features, per data set.
    """
    rows = np.flatnonzero(groups >= 0)
    _, place, sizes = np.unique(groups[rows], return_inverse=True, return_counts=True)
    scores = np.full(len(groups), np.nan, np.float32)
    if not len(rows):
        return scores
    cuts = [slice(first, first + block) for first in range(0, len(rows), block)]
    dim = fetch(rows[:1]).shape[1]
    means, directions = np.zeros((len(sizes), dim)), np.zeros((len(sizes), dim))
    for cut in cuts:
        _add_by_group(means, place[cut], widen(fetch(rows[cut])))
    means = (means / sizes[:, None]).astype(np.float32)
    for cut in cuts:
        _add_by_group(directions, place[cut], _centred(fetch(rows[cut]), means, place[cut]))
    for cut in cuts:
        u = _centred(fetch(rows[cut]), means, place[cut])
        along = (u @ directions[0]) if len(sizes) == 1 else np.einsum("nd,nd->n", u, directions[place[cut]])
        along -= np.einsum("nd,nd->n", u, u)
        scores[rows[cut]] = along / np.maximum(1, sizes[place[cut]] - 1)
    return scores


def _add_by_group(totals: np.ndarray, place: np.ndarray, values: np.ndarray) -> None:
    """Add rows to the totals f64 [g, d] of their groups."""
    if len(totals) == 1:
        totals[0] += values.sum(axis=0, dtype=np.float64)
        return
    order = np.argsort(place, kind="stable")
    names, starts = np.unique(place[order], return_index=True)
    totals[names] += np.add.reduceat(values[order], starts, axis=0, dtype=np.float64)


def _centred(x: np.ndarray, means: np.ndarray, place: np.ndarray) -> np.ndarray:
    """Point from the groups' means to the rows, unit f32; a row that is its mean points nowhere."""
    moved = widen(x) - (means if len(means) == 1 else means[place])
    norms = np.linalg.norm(moved, axis=1, keepdims=True)
    return np.asarray(moved / np.where(norms > 1e-6, norms, 1))
