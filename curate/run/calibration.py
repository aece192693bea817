"""Short measurements of this machine, using the stages' own code, for the plan of a pipeline.

In: how wide the embeddings are and how many clusters there would be. Out: seconds per unit of work, each measured on a
few thousand made-up rows of that width in a second or two.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from curate.vectors import duplicate_forest, kmeans, on_device

PROBE_ROWS, PROBE_ITERS = 16_384, 4
PROBE_K = {"superkmeans": 4_000}  # whose pruning begins at a quarter of it; else PROBE_ROWS // 16
LARGEST_GROUP = 4_096  # rows of a cluster that is really compared; larger ones are scaled
SPREAD = 0.9  # made-up rows lie at a cosine of about 0.5 to their like, below any floor


@dataclass(frozen=True)
class ClusterRates:
    """Seconds: fit_row per row and iteration, fit per centroid besides; assign per row and centroid; relate per row."""

    fit_row: float
    fit: float
    assign: float
    relate: float
    backend: str


def cluster_rates(dim: int, k: int, rows: int, floor: float, *, gpu: bool) -> ClusterRates:
    """Measure k-means, assignment and the comparison inside clusters of the size that rows / k makes."""
    backend = kmeans.choose_backend(dim, k, gpu=gpu)
    on = on_device.device() if gpu else None
    most = min(k, PROBE_K.get(backend, PROBE_ROWS // 16))
    few = -(-most // 4)
    group = max(2, min(LARGEST_GROUP, rows // max(k, 1), PROBE_ROWS))
    x = _made_up(PROBE_ROWS, dim, group)
    narrow = x.astype(np.float16)
    assigns, fits = [], []
    for count in (few, most):
        assigns.append(_seconds(partial(kmeans.finder(x[:count], on=on), narrow)))
        whole = _seconds(partial(kmeans.fit, narrow, count, PROBE_ITERS, 0, backend=backend))
        fits.append(max(whole - assigns[-1], 1e-9) / (PROBE_ROWS * PROBE_ITERS))
    each = max(fits[1] - fits[0], 0) / max(most - few, 1)
    bounds = np.arange(0, PROBE_ROWS - PROBE_ROWS % group + 1, group)
    find_edges = partial(duplicate_forest.near_duplicate_forest, product="gpu" if on else None)
    compare = _seconds(lambda: find_edges(narrow, np.arange(PROBE_ROWS), bounds, floor))
    grown = max(1.0, rows / max(k, 1) / group)
    return ClusterRates(
        max(fits[1] - each * most, 0),
        each,
        assigns[1] / (PROBE_ROWS * most),
        compare / int(bounds[-1]) * grown,
        backend,
    )


def _made_up(rows: int, dim: int, group: int) -> np.ndarray:
    """Draw unit rows f32 [rows, dim] around a centre for every `group` of them."""
    rng = np.random.default_rng(0)
    centres = np.repeat(rng.standard_normal((-(-rows // group), dim), np.float32), group, axis=0)[:rows]
    return kmeans.unit_rows(centres + SPREAD * rng.standard_normal((rows, dim), np.float32))


def _seconds(work: Callable[[], object]) -> float:
    """Time a function, the second time that it runs."""
    work()
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
