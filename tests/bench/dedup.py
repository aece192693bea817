"""Deduplication against SemDeDup's loop over clusters, on the same rows, clusters and order, to the same survivors.

    python tests/bench/dedup.py [--rows 200000] [--dim 512] [--k 2000] [--threshold 0.95]

The loop is written from the description of SemDeDup's released code, mended so that it runs: for each cluster find its
members among all rows, sort them by distance to the centroid, fetch them from a memory map, multiply all with all
in f32, cut the upper triangle, take each column's maximum, compare. Ours is the forest of `curate cluster` (every
threshold above the floor) and then the rule `semdedup` on it. The bare products of the clusters are timed beside both.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

from curate import duplicates, kmeans, relate, store  # noqa: E402

FLOOR = 0.80


def clock(work):
    wall, cpu = time.perf_counter(), time.process_time()
    made = work()
    return made, {"wall_s": round(time.perf_counter() - wall, 2), "cpu_s": round(time.process_time() - cpu, 2)}


def semdedup_loop(memory, clusters, similarity, k, threshold):
    """One cluster after the other, as released: O(rows) to find each cluster, its whole product at once."""
    import torch

    keep = np.ones(len(memory), bool)
    for number in range(k):
        members = np.flatnonzero(clusters == number)
        if len(members) < 2:
            continue
        members = members[np.argsort(similarity[members], kind="stable")]
        rows = torch.from_numpy(np.asarray(memory[members], np.float32))
        products = rows @ rows.T
        products.fill_diagonal_(0.0)
        highest = torch.triu(products, diagonal=1).max(dim=0).values
        keep[members[(highest > threshold).numpy()]] = False
    return keep


def ours(x16, clusters, similarity, threshold):
    order = np.argsort(clusters, kind="stable")
    bounds = np.concatenate([[0], np.flatnonzero(np.diff(clusters[order])) + 1, [len(order)]])
    a, b, cosine = relate.relate_clusters(x16[order], bounds, FLOOR)
    a, b = order[a], order[b]
    above = cosine > threshold
    edges = (np.minimum(a, b)[above], np.maximum(a, b)[above], cosine[above])
    everyone = np.ones(len(x16), bool)
    found = duplicates.resolve(edges, everyone, similarity, "semdedup", "far", threshold, lambda rows: x16[rows])
    return found.keep


def products_alone(x16, clusters, k):
    order = np.argsort(clusters, kind="stable")
    bounds = np.searchsorted(clusters[order], np.arange(k + 1))
    x = x16[order[: 1 << 15]].astype(np.float32)

    def work():
        for size in np.diff(bounds).tolist():
            rows = x[: min(size, len(x))]
            rows @ rows.T

    return work


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--k", type=int, default=2_000)
    parser.add_argument("--threshold", type=float, default=0.95)
    chosen = parser.parse_args()
    rng = np.random.default_rng(0)
    clouds = 20_000
    weights = 1 / np.arange(1, clouds + 1) ** 0.7
    centers = rng.normal(size=(clouds, chosen.dim)).astype(np.float32)
    x = centers[rng.choice(clouds, chosen.rows, p=weights / weights.sum())]
    x += 0.8 * rng.normal(size=x.shape).astype(np.float32)
    copy = np.flatnonzero(rng.random(chosen.rows) < 0.3)
    x[copy] = x[rng.integers(0, chosen.rows // 5, len(copy))] + 0.1 * rng.normal(size=(len(copy), chosen.dim))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    x16 = x.astype(np.float16)
    centroids = kmeans.fit(x[:100_000], chosen.k, 5, 0, backend="superkmeans").centroids
    clusters, similarity = kmeans.assign(x16, centroids)
    with tempfile.NamedTemporaryFile() as file:
        memory = np.memmap(file, np.float32, "w+", shape=x.shape)
        memory[:] = x16
        semdedup_loop(memory[:500], clusters[:500] % 5, similarity[:500], 5, chosen.threshold)  # imports are not work
        ours(x16[:500], clusters[:500] % 5, similarity[:500], chosen.threshold)
        loop, loop_time = clock(lambda: semdedup_loop(memory, clusters, similarity, chosen.k, chosen.threshold))
    mine, my_time = clock(lambda: ours(x16, clusters, similarity, chosen.threshold))
    _, product_time = clock(products_alone(x16, clusters, chosen.k))
    found = {
        **vars(chosen),
        "kept": int(mine.sum()),
        "differing_rows": int((mine != loop).sum()),
        "semdedup_loop": loop_time,
        "ours": my_time,
        "products_alone": product_time,
        "times_faster": round(loop_time["cpu_s"] / my_time["cpu_s"], 2),
        "to_products": round(my_time["cpu_s"] / product_time["cpu_s"], 2),
        "date": date.today().isoformat(),
        "cores": os.cpu_count(),
        "versions": store.versions("torch", "numpy", "scipy"),
    }
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
