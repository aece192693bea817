"""How a budget is shared among groups: evenly, by weight, or down a tree, and always exactly.

All three are water-filling. Groups are vessels of size s_i, the budget B is water, and the water has the same level L
in all of them: q_i = min(L w_i, s_i) with sum q_i = B, where every w_i is 1 for even shares. The sum grows with L, so
there is one such level: `water_fill` finds the whole-numbered one by bisection and gives what is left over to random
groups, one row each; `weighted_fill` sorts the groups by the level s_i / w_i at which they are full, finds the two of
these between which L lies, and rounds by largest fractions. Down a tree, each node's quota is shared among its children
the same way.

Quotas are whole numbers, at most a group's size, that sum to the budget exactly. Arrays in, arrays out. O(k log k) time
for k groups.
"""

from collections.abc import Sequence

import numpy as np

LEAST_WEIGHT = 1e-250  # below it a size divided by a weight is no number any more


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


def water_fill_tree(
    sizes: np.ndarray, parents: Sequence[np.ndarray], total: int, rng: np.random.Generator
) -> np.ndarray:
    """Share a budget down a tree: evenly over the top's nodes, each node's part evenly over its children, and so on.

    sizes: i64 [k], rows of the leaves. parents: for each level from the leaves up, the node above each node of that
    level; parents[0] is i64 [k]. Returns i64 [k] quotas that sum to `total`, at most the sum of the sizes.
    Source: hierarchical sampling of ssl-data-curation (arXiv:2405.15613, section 3.4), without repeats.
    """
    levels = [np.asarray(sizes, np.int64)]
    for above in parents:
        levels.append(np.bincount(above, levels[-1], minlength=int(above.max(initial=-1)) + 1).astype(np.int64))
    quotas = water_fill(levels[-1], total, rng)[0]
    for below, above in zip(levels[-2::-1], parents[::-1], strict=True):
        order = np.argsort(above, kind="stable")
        bounds = np.searchsorted(above[order], np.arange(len(quotas) + 1))
        shared = np.zeros(len(below), np.int64)
        for node, part in enumerate(quotas):
            children = order[bounds[node] : bounds[node + 1]]
            shared[children] = water_fill(below[children], int(part), rng)[0]
        quotas = shared
    return quotas


def weighted_fill(sizes: np.ndarray, weights: np.ndarray, total: int) -> np.ndarray:
    """Find quotas min(level * weight, size) that sum to exactly `total`, in whole rows.

    What a full group cannot take goes to the others by their weights. Rounding favours the largest fractions, ties the
    lowest number, by at most one row per group; a cluster's number is an accident of its fit, so no kind of picture is
    favoured. Groups of weight 0 (or nearly 0) share evenly what no other group can take.
    total: at most the sum of the sizes. Returns i64 [k]. O(k log k) time.
    """
    sizes, weights = np.asarray(sizes, np.int64), np.where(weights > LEAST_WEIGHT, weights, 0.0)
    weighty = weights > 0
    if not weighty.all() and total > sizes[weighty].sum():
        quotas = np.where(weighty, sizes, 0)
        if (~weighty).any():
            quotas[~weighty] = weighted_fill(sizes[~weighty], np.ones((~weighty).sum()), total - int(quotas.sum()))
        return quotas
    # The level at which a group is full; groups that fill up first come first.
    full_at = np.divide(sizes, weights, out=np.full(len(sizes), np.inf), where=weighty)
    order = np.argsort(full_at, kind="stable")
    before = np.concatenate([[0], np.cumsum(sizes[order])[:-1]])  # rows of the groups that fill up earlier
    weight = np.cumsum(weights[order][::-1])[::-1]  # of this group and the later ones
    level = np.divide(total - before, weight, out=np.full(len(sizes), np.inf), where=weight > 0)
    fits = np.flatnonzero((level <= full_at[order]) & (weight > 0))
    exact = np.minimum(sizes, level[fits[0]] * weights) if len(fits) else np.where(weighty, sizes, 0).astype(np.float64)
    quotas = np.minimum(np.floor(exact + 1e-9).astype(np.int64), sizes)  # 1e-9: 3 may have come out as 2.9999999999
    missing = total - int(quotas.sum())
    by_fraction = np.argsort(quotas - exact, kind="stable")
    quotas[by_fraction[(quotas < sizes)[by_fraction]][:missing]] += 1
    return np.asarray(quotas)


def position_in_group(groups: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Rank each row inside its group by ascending `order`, ties by row. Returns i64 [n], from 0."""
    arranged = np.lexsort((order, groups))
    starts = np.concatenate([[0], np.flatnonzero(np.diff(groups[arranged])) + 1]) if len(groups) else np.zeros(0, int)
    sizes = np.diff(np.append(starts, len(groups)))
    position = np.empty(len(groups), np.int64)
    position[arranged] = np.arange(len(groups)) - np.repeat(starts, sizes)
    return position
