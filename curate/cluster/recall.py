"""Estimate on a sample, by brute force, what share of near pairs a clustering can find at all.

Pairs are searched inside clusters, so two near rows in different clusters are missed. A sample of the pool is compared
with itself, every row with every other, and for each near pair it is checked whether its rows share a cluster. Cost: up
to 65,536 rows times 512 at a time, until 50,000 pairs are found.
"""

from typing import Any

import numpy as np

from curate.vectors import kmeans, near_pairs

RECALL_LEVELS = (0.85, 0.90, 0.95, 0.98)
RECALL_ROWS = 512  # of the sample, compared at a time
RECALL_PAIRS = 50_000  # the comparison ends at this many near pairs


def recall(images_nd: np.ndarray, centroids_kd: np.ndarray, neighbours: int, floor: float) -> dict[str, Any]:
    """Estimate how many of the pool's near pairs share a cluster, so that they were compared, against brute force.

    images_nd: f16, a sample of the pool in random order. Compares rows with the whole sample until there are enough
    pairs. Returns the rows compared, and for levels of cosine the pairs above and the share of them that was found.
    """
    levels = [floor, *(level for level in RECALL_LEVELS if level > floor)]
    places = kmeans.nearest_two(images_nd, centroids_kd)[0] if len(centroids_kd) > 1 else None
    pairs, found = np.zeros(len(levels), np.int64), np.zeros(len(levels), np.int64)
    compared = 0
    while compared < len(images_nd) and pairs[0] < RECALL_PAIRS:
        rows = np.arange(compared, len(images_nd))
        chunk = min(RECALL_ROWS, len(rows))  # compared with all rows from here on: no pair is counted twice
        for a, b, cosine in near_pairs.near_pairs(images_nd, rows, [0, len(rows)], floor, members=np.array([chunk])):
            met = np.ones(len(a), bool)
            if places is not None:
                home, other = places
                a, b = rows[a], rows[b]
                met = home[a] == home[b]
                if neighbours == 2:
                    met |= (home[a] == other[b]) | (other[a] == home[b])
            pairs += [int((cosine > level).sum()) for level in levels]
            found += [int((met & (cosine > level)).sum()) for level in levels]
        compared += chunk
    shares = [
        {"above": level, "pairs": int(all_), "found": round(int(some) / int(all_), 4) if all_ else None}
        for level, all_, some in zip(levels, pairs, found, strict=True)
    ]
    return {"sample": len(images_nd), "compared": compared, "levels": shares}
