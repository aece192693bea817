"""How well copies are told from look-alikes without pixels: clouds of several kinds with planted copies.

    python tests/bench/copies_by_cosine.py [CLOUD | VECTORS.npy …]

VECTORS.npy: embeddings [n, d] of distinct pictures, of which 1,000 and then all are taken. Prints for each cloud how
often `cosine_gap` sees a gap, the copies that it finds and the rows that it wrongly drops.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from curate.select.steps.cosine_gap import find_gap  # noqa: E402
from curate.vectors import kmeans  # noqa: E402
from curate.vectors.duplicate_forest import near_duplicate_forest  # noqa: E402
from curate.vectors.forest import components  # noqa: E402

DIM, FLOOR = 256, 0.8
PLANTED = [  # copies for each row, their cosine, the spread of log(1 - cosine)
    (0.3, 0.985, 0.0),
    (0.3, 0.985, 0.5),
    (0.03, 0.985, 0.3),
    (0.1, 0.97, 0.3),
    (0.1, 0.995, 0.7),
    (0.1, 0.999, 0.5),
    (0.02, 0.9999, 0.3),
]


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def isotropic(n, rng):
    return rng.normal(size=(n, DIM))


def cone(n, rng):
    return rng.normal(size=(n, DIM)) + 1.5 * rng.normal(size=(1, DIM))


def surface(dimensions):
    def cloud(n, rng):
        z, bend = rng.normal(size=(n, dimensions)), rng.normal(size=(dimensions, 128))
        bent = np.tanh(z @ bend / np.sqrt(dimensions) * 1.2) @ rng.normal(size=(128, DIM)) / np.sqrt(128)
        return bent + 0.8 * rng.normal(size=(1, DIM)) + 0.1 * rng.normal(size=(n, DIM))

    return cloud


def topics(n, rng):
    k = max(5, n // 60)
    centres, weights = unit(rng.normal(size=(k, DIM))), 1 / np.arange(1, k + 1)
    topic, width = rng.choice(k, n, p=weights / weights.sum()), rng.uniform(0.35, 0.8, k)
    noise = width[topic][:, None] * rng.normal(size=(n, DIM)) / np.sqrt(DIM)
    return centres[topic] + noise + 0.5 * unit(rng.normal(size=(1, DIM)))


def hierarchy(n, rng):
    x = np.zeros((n, DIM))
    for level, scale in enumerate([1, 0.7, 0.5, 0.35], 1):
        k = max(2, int(n ** (level / 5)))
        x += scale * unit(rng.normal(size=(k, DIM)))[rng.integers(0, k, n)]
    return x + 0.3 * rng.normal(size=(n, DIM)) / np.sqrt(DIM)


def templates(n, rng):
    x = unit(rng.normal(size=(n, DIM)) + rng.normal(size=(1, DIM)))
    rows, of = rng.choice(n, n // 3, replace=False), rng.integers(0, n, n // 3)
    x[rows] = unit(x[of] + rng.uniform(0.1, 1.2, n // 3)[:, None] * unit(rng.normal(size=(n // 3, DIM))))
    return x


CLOUDS: dict[str, Callable[[int, np.random.Generator], np.ndarray]] = {
    "isotropic": isotropic,
    "cone": cone,
    "surface-5": surface(5),
    "surface-10": surface(10),
    "surface-20": surface(20),
    "topics": topics,
    "hierarchy": hierarchy,
    "templates": templates,
}


def plant(x, count, cosine, spread, rng):
    """Add copies. Returns f16 rows, and for each the row it is a copy of."""
    source = rng.integers(0, len(x), count)
    cosines = np.clip(1 - (1 - cosine) * np.exp(spread * rng.normal(size=count)), -1, 1)[:, None]
    aside = rng.normal(size=(count, x.shape[1]))
    aside = unit(aside - (aside * x[source]).sum(axis=1, keepdims=True) * x[source]) if count else aside
    copies = cosines * x[source] + np.sqrt(1 - cosines**2) * aside
    return np.concatenate([x, copies]).astype(np.float16), np.append(np.arange(len(x)), source)


def forest(x):
    """Cluster the rows and find their near-duplicate forest, as `curate cluster` does."""
    k = max(1, len(x) // 100)
    centroids = kmeans.fit(x.astype(np.float32), k, 8, 0, backend="kmeans").centroids
    cluster = kmeans.assign(x, centroids)[0]
    order = np.argsort(cluster, kind="stable")
    bounds = np.concatenate([[0], np.cumsum(np.bincount(cluster, minlength=k))])
    a, b, similarity = near_duplicate_forest(x, order, bounds, FLOOR)
    return order[a], order[b], similarity


def judge(n, source, edges, threshold):
    """Return the share of copies joined with what they are copies of, and of rows joined with others."""
    a, b, similarity = edges
    above = similarity > threshold
    label = components(a[above], b[above], len(source))
    groups = np.unique(np.stack([label, source]), axis=1)[0]
    wronged = (np.unique(groups, return_counts=True)[1] - 1).sum() / n
    return (label[n:] == label[source[n:]]).mean() if len(source) > n else 1.0, wronged


def main(names):
    for name in names or CLOUDS:
        seen, recalls, worst, false, highest = 0, [], 0.0, 0, 0.0
        real = np.load(name) if name.endswith(".npy") else None
        for n in (1_000, 6_000 if real is None else len(real)):
            rng = np.random.default_rng(n)
            original = unit(CLOUDS[name](n, rng) if real is None else rng.permutation(real)[:n].astype(np.float64))
            for share, cosine, spread in [(0, 0, 0), *PLANTED]:
                x, source = plant(original, int(n * share), cosine, spread, rng)
                edges = forest(x)
                other = source[edges[0]] != source[edges[1]]
                highest = max(highest, float(edges[2][other].max(initial=0)))
                gap = find_gap(edges[2], len(x), FLOOR)
                if gap is None:
                    continue
                recall, wronged = judge(n, source, edges, gap.threshold)
                seen, false = seen + bool(share), false + (not share)
                recalls += [recall] if share else []
                worst = max(worst, wronged)
        total, well = 2 * len(PLANTED), sum(recall >= 0.95 for recall in recalls)
        low = ", ".join(f"{recall:.2f}" for recall in sorted(recalls) if recall < 0.95)
        print(
            f"{Path(name).stem:10s} highest natural {highest:.3f} · a gap in {seen} of {total}"
            f" · of these {well} find 95 % ({low}) · wronged {worst:.1%} at most · a gap without copies {false} of 2",
            flush=True,
        )


if __name__ == "__main__":
    main(sys.argv[1:])
