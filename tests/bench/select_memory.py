"""Memory per row of `select`'s driver: the peak within each step of some recipes, and what is held between steps.

    python tests/bench/select_memory.py [--rows 1000000]

Columns are made up (clusters of 100 rows, 30 % near-duplicates, 5 % mismatched pairs) and counted as if read from the
sidecars; embeddings have 8 dimensions, so that what is counted grows only with the rows. NumPy's allocations are
traced; the near-duplicate edges are mapped from their file in a real run, and are not counted.
"""

import argparse
import sys
import tracemalloc
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from curate.select import catalogue, recipes  # noqa: E402
from curate.select.frame import Frame  # noqa: E402


def made_up(n):
    rng = np.random.default_rng(0)
    k = max(1, n // 100)
    cluster = rng.integers(0, k, n).astype(np.int32)
    score = rng.normal(0.3, 0.05, n).astype(np.float32)
    score[: n // 20] -= 0.3
    near = rng.random(n).astype(np.float32)
    order = np.argsort(cluster, kind="stable")
    first = np.flatnonzero((np.diff(cluster[order]) == 0) & (rng.random(n - 1) < 0.3))
    a, b = np.sort([order[first], order[first + 1]], axis=0)
    similarity = rng.uniform(0.8, 1, len(a)).astype(np.float32)
    bits = np.where(similarity > 0.95, rng.integers(0, 12, len(a)), rng.integers(20, 40, len(a))).astype(np.uint8)
    values = rng.normal(size=(997, 8)).astype(np.float16)
    values /= np.linalg.norm(values.astype(np.float32), axis=1, keepdims=True)
    columns = {"clip_score": score, "centroid_similarity": near}
    return columns, cluster, (a, b, similarity, bits), lambda rows: values[rows % 997]


def make_frame(n):
    columns, cluster, edges, fetch = made_up(n)
    return Frame(
        good=np.ones(n, bool),
        columns={name: values.copy for name, values in columns.items()},
        groups={"cluster": cluster.copy, "caption": lambda: np.random.default_rng(2).integers(0, n, n)},
        captions=lambda rows: [f"a thing called {row}" for row in rows.tolist()],
        edges=lambda: edges,
        floor=0.8,
        vectors=fetch,
        text_vectors=fetch,
        shuffled=np.quantile(np.random.default_rng(1).normal(0, 0.05, 9_999), np.linspace(0, 1, 101)),
    )


CHAINS = {
    "balanced": lambda budget: recipes.steps("balanced", budget),
    "bunny": lambda budget: recipes.steps("bunny", 0.1),  # of the 4 % that its bands leave
    "cap": lambda budget: ["cap(cluster, 30)"],
}


def run(frame, texts):
    """Yield each step's name, the rows alive before it, and the most that was allocated in it and after it."""
    base = tracemalloc.get_traced_memory()[0] - 3 * len(frame.good)  # good, alive, asked
    for step in catalogue.parse(texts):
        tracemalloc.reset_peak()
        alive = int(frame.alive.sum())
        verdict = step.run(frame)
        peak = tracemalloc.get_traced_memory()[1] - base
        frame.alive &= verdict.keep
        del verdict
        yield step.name, alive, peak, tracemalloc.get_traced_memory()[0] - base


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--n", default="30%")
    options = parser.parse_args()
    for chain, steps in CHAINS.items():
        list(run(make_frame(20_000), steps(options.n)))  # imports on the way are not counted
        frame = make_frame(options.rows)
        print(chain)
        tracemalloc.start()
        for name, alive, peak, held in run(frame, steps(options.n)):
            print(f"  {name:10s} {alive:,} rows alive · {peak / options.rows:.1f} bytes per row at most", end=" · ")
            print(f"{held / options.rows:.1f} after it")
        tracemalloc.stop()


if __name__ == "__main__":
    main()
