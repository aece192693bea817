"""K-means to an equal objective against faiss.Kmeans, and assignment against the bare matrix product.

    python tests/bench/cluster.py [--rows 200000] [--dim 512] [--k 2000] [--iters 8] [--rounds 3]
    OMP_NUM_THREADS=1 python tests/bench/cluster.py --many 100000 [--rounds 9]

Everything runs in one process on the same rows, in turns, and the median of the rounds counts. CPU seconds are given
beside wall seconds: on a busy machine only they are steady.

With --many instead: the speed of assigning and of finding near pairs with that many clusters, relative to a large
product, one of 512 rows with many. The clusters for the pairs have 200, 41, 20, 8 and 3 rows, spread like the images
of one subject. As a bound, one batched product is timed with the rows in f32 and ready in memory.
"""

import argparse
import json
import os
import statistics
import sys
import time
from datetime import date
from functools import partial
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

from curate.storage import manifest  # noqa: E402
from curate.vectors import kmeans  # noqa: E402
from curate.vectors.duplicate_forest import near_duplicate_forest  # noqa: E402


def mixture(rows, dim, clouds):
    """Draw rows whose spectrum falls like that of image embeddings: a few directions hold much of the variance."""
    rng = np.random.default_rng(0)
    spectrum = (np.arange(1, dim + 1) ** -0.5).astype(np.float32)
    centers = rng.standard_normal((clouds, dim), np.float32) * spectrum
    weights = 1 / np.arange(1, clouds + 1) ** 0.7
    x = centers[rng.choice(clouds, rows, p=weights / weights.sum())]
    x += 0.5 * rng.standard_normal((rows, dim), np.float32) * spectrum
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def clock(work):
    wall, cpu = time.perf_counter(), time.process_time()
    made = work()
    return made, time.perf_counter() - wall, time.process_time() - cpu


def bare(x16, centroids, block):
    """Multiply all rows with the centroids, f32, blocks ready in memory, and nothing else."""
    rows, out = x16[:block].astype(np.float32), np.empty((block, len(centroids)), np.float32)
    right = np.ascontiguousarray(centroids.T)

    def work():
        for _ in range(0, len(x16), block):
            np.matmul(rows, right, out=out)

    return work


def beside(rounds, work):
    """Time each work in turns, and return the speed of each relative to the first: {name: median ratio}.

    work: {name: (operations, callable)}. Times are those of processors.
    """
    speeds = {name: [] for name in work}
    for each in work.values():
        each[1]()  # warms up: memory is allocated, libraries are loaded
    for _ in range(rounds):
        for name, (operations, each) in work.items():
            speeds[name].append(operations / clock(each)[2])
    first = next(iter(work))
    ratios = {name: [a / b for a, b in zip(found, speeds[first], strict=True)] for name, found in speeds.items()}
    return {name: round(statistics.median(found), 2) for name, found in ratios.items() if name != first}


def large_product(x, y, columns=512):
    """Prepare the product of all rows of x with some of y; returns its operations, and the function."""
    right, out = y[:columns].T, np.empty((len(x), columns), np.float32)
    return 2 * out.size * x.shape[1], lambda: np.matmul(x, right, out=out)


def many_clusters(chosen):
    """Compare the speed with very many clusters to that of a large product."""
    rng, d = np.random.default_rng(0), chosen.dim
    x = kmeans.unit_rows(rng.standard_normal((chosen.rows, d), np.float32))
    product = large_product(x[:4096], x[-512:])
    work = {"product": product}
    for k in (chosen.k, chosen.many):
        centroids, rows = np.resize(x, (k, d)), x[: max(256, 4096 * 2000 // k)].astype(np.float16)
        for name, assign in (("assign", kmeans.assign), ("nearest_two", kmeans.nearest_two)):
            work[f"{name}_k_{k}"] = 2 * len(rows) * k * d, partial(assign, rows, centroids)
    found = beside(chosen.rounds, work)
    for size in (200, 41, 20, 8, 3):
        count = 4096 // size
        y = np.repeat(x[:count], size, axis=0) + 0.8 * d**-0.5 * rng.standard_normal((count * size, d))
        y = kmeans.unit_rows(y)
        blocks, out = y.reshape(count, size, d), np.empty((count, size, size), np.float32)
        halves, order = np.empty(y.shape, np.float16), rng.permutation(len(y))
        halves[order] = y
        relate = partial(near_duplicate_forest, halves, order, np.arange(0, len(y) + 1, size), 0.85)
        operations = 2 * len(y) * size * d
        bare = operations, partial(np.matmul, blocks, blocks.swapaxes(1, 2), out=out)
        ratios = beside(chosen.rounds, {"product": product, "bare": bare, "relate": (operations, relate)})
        found |= {f"{name}_{size}_rows": ratio for name, ratio in ratios.items()}
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in (("rows", 200_000), ("dim", 512), ("k", 2_000), ("iters", 8), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--many", type=int, default=0)
    chosen = parser.parse_args()
    if chosen.many:
        about = {"date": date.today().isoformat(), "versions": manifest.versions("torch", "numpy")}
        found = {**vars(chosen), "of_the_large_product": many_clusters(chosen), **about}
        print(json.dumps(found, indent=1))
        return
    x = mixture(chosen.rows, chosen.dim, 2_000)
    x16 = x.astype(np.float16)
    backends = [*dict.fromkeys(["kmeans", "superkmeans", kmeans.choose_backend(chosen.dim, chosen.k, gpu=False)])]
    times = {name: [] for name in (*backends, "product", "assign")}
    quality = {}
    for _ in range(chosen.rounds):
        for backend in backends:
            centroids, *spent = clock(lambda b=backend: kmeans.BACKENDS[b](x, chosen.k, chosen.iters, 0))
            times[backend].append(spent)
            centroids = kmeans.unit_rows(centroids)
            quality[backend] = float(kmeans.assign(x16, centroids)[1].mean(dtype=np.float64))
        work = bare(x16, centroids, max(16, kmeans.BLOCK_ELEMENTS // chosen.k))
        times["product"].append(clock(work)[1:])
        times["assign"].append(clock(lambda c=centroids: kmeans.assign(x16, c))[1:])
    median = {
        name: {
            kind: round(statistics.median(spent[i] for spent in found), 3) for i, kind in enumerate(("wall_s", "cpu_s"))
        }
        for name, found in times.items()
    }
    found = {
        **vars(chosen),
        **median,
        "mean_similarity": quality,
        "backend": backends[-1],
        "objective_difference": round(quality[backends[-1]] / quality["kmeans"] - 1, 6),
        "fit_times_faiss_kmeans": round(median["kmeans"]["cpu_s"] / median[backends[-1]]["cpu_s"], 2),
        "assign_to_product": round(median["assign"]["cpu_s"] / median["product"]["cpu_s"], 3),
        "date": date.today().isoformat(),
        "cores": os.cpu_count(),
        "versions": manifest.versions("faiss-gpu", "faiss-cpu", "numpy"),
    }
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
