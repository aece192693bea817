"""Deduplication against SemDeDup's loops over clusters, on the same rows, clusters and order, at several thresholds.

    python tests/bench/dedup.py [--rows 100000] [--dim 512] [--k 1000]

The baseline does the work of SemDeDup's published code, written from its description and changed only so that it runs:

    sort    for each cluster: find its rows by a scan of all rows; fetch them from an f32 memory map; their cosines to
            the centroid; sort tuples (path, row, distance, cluster); save them as an array of strings
    dedup   for each cluster: load that array; fetch the rows again; the full n x n product in f32, its diagonal zeroed,
            its upper triangle, each column's highest value; for each threshold a column of verdicts; pickle them

Its data frames are pandas' where that is installed, else plain arrays, which are faster; the result says which. Left
out: starting jobs, computing the clusters, and writing the lists of what stays. Ours is what `curate cluster`
does (finding the near-duplicates of each cluster for every threshold above the floor at once, and writing the edges),
then for each threshold what `dedup(threshold, keep="far", rule="semdedup")` does. Two more lines bound both from below:
a bare loop (one scan, one product, triangle and maximum per cluster, one threshold, nothing stored) and the f32
products of the clusters alone. CPU seconds on one thread count: on a busy machine only they are steady.
"""

import argparse
import json
import os
import pickle
import statistics
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

from curate.select.frame import UNKNOWN_BITS, no_hashes  # noqa: E402
from curate.select.steps import near_duplicates  # noqa: E402
from curate.select.steps.linked_pairs import cosine_rule  # noqa: E402
from curate.storage import manifest  # noqa: E402
from curate.vectors import (  # noqa: E402
    duplicate_forest,  # noqa: E402
    kmeans,  # noqa: E402
    products,  # noqa: E402
)

FLOOR = 0.80
THRESHOLDS = (0.86, 0.90, 0.93, 0.95, 0.97)


def clock(work):
    wall, cpu = time.perf_counter(), time.process_time()
    made = work()
    return made, {"wall_s": round(time.perf_counter() - wall, 3), "cpu_s": round(time.process_time() - cpu, 3)}


def frames():
    """Return pandas, or None where it is not installed."""
    try:
        import pandas
    except ImportError:
        return None
    return pandas


def sort_clusters(memory, names, nearest, centroids, folder):
    """Write each cluster's rows, farthest from the centroid first, as SemDeDup's first loop does."""
    import torch

    distances = np.zeros(len(memory), np.float32)
    pandas = frames()
    frame = pandas and pandas.DataFrame({"row": np.arange(len(memory)), "nearest": nearest})
    for number in range(len(centroids)):
        if pandas:
            rows = list(frame.loc[frame["nearest"] == number].index)
        else:
            rows = np.flatnonzero(nearest == number).tolist()
        cosine = torch.nn.CosineSimilarity(dim=1)(torch.Tensor(memory[rows]), torch.Tensor(centroids[number])[None])
        distance = (1 - cosine).tolist()
        distances[rows] = distance
        listed = zip(names[rows], rows, distance, [number] * len(rows), strict=True)
        np.save(folder / f"sorted-{number}.npy", sorted(listed, key=lambda item: item[2], reverse=True))
    return distances


def dedup_clusters(memory, k, folder):
    """Judge each cluster's rows at every threshold, as SemDeDup's second loop does. Returns the dropped rows."""
    import torch

    gone, pandas = {threshold: [] for threshold in THRESHOLDS}, frames()
    for number in range(k):
        listed = np.load(folder / f"sorted-{number}.npy")
        if not len(listed):
            continue
        verdicts = {"indices": list(range(len(listed)))}
        verdicts = pandas.DataFrame(verdicts) if pandas else verdicts
        rows = listed[:, 1].astype(np.int64)
        x = torch.from_numpy(memory[rows])
        similarity = x @ x.T
        similarity.fill_diagonal_(0.0)
        assert len(set(listed[:, 0])) == len(listed)
        highest = torch.triu(similarity, diagonal=1).max(dim=0).values
        for threshold in THRESHOLDS:
            verdicts[f"eps={1 - threshold}"] = (highest > threshold).numpy()
            gone[threshold].append(rows[(highest > threshold).numpy()])
        (folder / f"cluster-{number}.pkl").write_bytes(pickle.dumps(verdicts))
    return {threshold: np.concatenate(found) for threshold, found in gone.items()}


def bare_loop(memory, nearest, distances, k, threshold):
    """Do only what one threshold needs; store nothing."""
    import torch

    keep = np.ones(len(memory), bool)
    for number in range(k):
        rows = np.flatnonzero(nearest == number)
        rows = rows[np.argsort(-distances[rows], kind="stable")]
        x = torch.from_numpy(memory[rows])
        if len(rows) > 1:
            highest = torch.triu(x @ x.T, diagonal=1).max(dim=0).values
            keep[rows[(highest > threshold).numpy()]] = False
    return keep


def find_edges(memory16, nearest, folder):
    """Find and write the edges of all clusters."""
    order = np.argsort(nearest, kind="stable")
    bounds = np.concatenate([[0], np.flatnonzero(np.diff(nearest[order])) + 1, [len(order)]])
    a, b, cosine = duplicate_forest.near_duplicate_forest(memory16, order, bounds, FLOOR)
    a, b = order[a], order[b]
    np.savez(folder / "edges.npz", a=a, b=b, cosine=cosine)
    return a, b, cosine


def judge(edges, memory16, distances, threshold):
    """Resolve one threshold by SemDeDup's rule. Returns what stays."""
    known = *edges, np.full(len(edges[0]), UNKNOWN_BITS, np.uint8)
    everyone, rule = np.ones(len(memory16), bool), cosine_rule(threshold)
    return near_duplicates.resolve(
        known, everyone, -distances, "semdedup", "far", rule, memory16.__getitem__, no_hashes
    ).keep


def products_alone(memory, sizes):
    rows = memory[: 1 << 15].copy()

    def work():
        for size in sizes:
            x = rows[: min(size, len(rows))]
            x @ x.T

    return work


def draw(rows, dim):
    """Draw rows from 20,000 clouds; three in ten are near-copies of one of the first fifth."""
    rng = np.random.default_rng(0)
    weights = 1 / np.arange(1, 20_001) ** 0.7
    x = rng.standard_normal((20_000, dim), np.float32)[rng.choice(20_000, rows, p=weights / weights.sum())]
    x += 0.8 * rng.standard_normal(x.shape, np.float32)
    copy = np.flatnonzero(rng.random(rows) < 0.3)
    x[copy] = x[rng.integers(0, rows // 5, len(copy))] + 0.1 * rng.standard_normal((len(copy), dim), np.float32)
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16)


def one_round(memory, memory16, names, nearest, centroids, folder):
    """Time every way once, in turn. Returns the times, and for how many rows the verdicts differ."""
    k = len(centroids)
    distances, sort = clock(lambda: sort_clusters(memory, names, nearest, centroids, folder))
    gone, dedup = clock(lambda: dedup_clusters(memory, k, folder))
    bare, bare_time = clock(lambda: bare_loop(memory, nearest, distances, k, 0.95))
    edges, finding = clock(lambda: find_edges(memory16, nearest, folder))
    kept, judging = clock(lambda: {t: judge(edges, memory16, distances, t) for t in THRESHOLDS})
    _, alone = clock(products_alone(memory, np.bincount(nearest).tolist()))
    times = {"sort": sort, "dedup": dedup, "bare_loop": bare_time}
    times |= {"edges": finding, "judge": judging, "products_alone": alone}
    differing = sum(int((~kept[t][gone[t]]).sum() != (~kept[t]).sum()) for t in THRESHOLDS)
    differing += sum(int(kept[t][gone[t]].sum()) for t in THRESHOLDS) + int((bare != kept[0.95]).sum())
    return times, {"differing_rows": differing, "kept": {str(t): int(kept[t].sum()) for t in THRESHOLDS}}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in (("rows", 100_000), ("dim", 512), ("k", 1_000), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=value)
    chosen = parser.parse_args()
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    x16 = draw(chosen.rows, chosen.dim)
    backend = kmeans.choose_backend(chosen.dim, chosen.k, gpu=False)
    centroids = kmeans.fit(x16[:100_000].astype(np.float32), chosen.k, 5, 0, backend=backend).centroids
    nearest, _ = kmeans.assign(x16, centroids)
    names = np.array([f"sample-{row:015d}" for row in range(chosen.rows)], "S24")
    rounds = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        memory = np.memmap(folder / "f32", np.float32, "w+", shape=x16.shape)
        memory16 = np.memmap(folder / "f16", np.float16, "w+", shape=x16.shape)
        memory[:], memory16[:] = x16, x16
        one_round(memory[:900], memory16[:900], names, nearest[:900] % 5, centroids[:5], folder)  # imports are not work
        for _ in range(chosen.rounds):
            times, same = one_round(memory, memory16, names, nearest, centroids, folder)
            rounds.append(times)
    median = {
        name: {kind: statistics.median(found[name][kind] for found in rounds) for kind in ("wall_s", "cpu_s")}
        for name in rounds[0]
    }
    cpu = {name: found["cpu_s"] for name, found in median.items()}
    ours = cpu["edges"] + cpu["judge"]
    found = {
        "command": "OMP_NUM_THREADS=1 python tests/bench/dedup.py " + " ".join(sys.argv[1:]),
        **vars(chosen),
        **same,
        "thresholds": len(THRESHOLDS),
        "largest_cluster": int(np.bincount(nearest).max()),
        "data_frames": "pandas" if frames() else "plain arrays",
        "screened_in": products.fastest_product(chosen.dim),
        **median,
        "times_faster_than_semdedup": round((cpu["sort"] + cpu["dedup"]) / ours, 2),
        "times_faster_than_its_dedup_loop": round(cpu["dedup"] / ours, 2),
        "times_faster_than_bare_loop_at_each_threshold": round(len(THRESHOLDS) * cpu["bare_loop"] / ours, 2),
        "edges_to_products": round(cpu["edges"] / cpu["products_alone"], 2),
        "date": date.today().isoformat(),
        "cores": os.cpu_count(),
        "versions": manifest.versions("torch", "numpy", "scipy", "pandas"),
    }
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
