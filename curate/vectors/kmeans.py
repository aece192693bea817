"""Spherical k-means: centroids fitted on a sample, and the nearest centroid of every row.

Rows and centroids are unit vectors and closeness is the cosine, so the nearest centroid is the one with the
highest dot product, and the best centroid of a set of rows is their mean, scaled to unit length. Lloyd's algorithm
repeats the two from k random rows on; neither step can lower the objective, the mean cosine of rows and their
centroids.

The fit is done by one entry of a table, `BACKENDS`: Lloyd's algorithm with products of int8 or bf16 if measured to be
the processor's fastest; else FAISS's `SuperKmeans` (pruned distances) for many clusters; FAISS's `Kmeans` for few
clusters; on GPUs torch's products of halves (`on_device`), or FAISS's if torch sees none. A fit may multiply rounded
numbers; what it reports, and every assignment, is as accurate as f32.

Shapes: rows x_nd f16 or f32 [n, d], centroids f32 [k, d]. Cost: 2 n k d operations for an iteration or an assignment;
memory: the sample in f32 for a fit, one block of rows times centroids for an assignment. Source: S. P. Lloyd, 1982;
I. S. Dhillon, D. S. Modha, 2001 (spherical k-means).
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

from curate.vectors import on_device
from curate.vectors.exact import widen
from curate.vectors.products import fastest_product, multiply
from curate.vectors.screen import round_rows

FIT_BYTES = 1 << 30
POINTS_PER_CENTROID = 256  # FAISS's own default bound; its silent subsampling is switched off below
LEAST_POINTS_PER_CENTROID = 39  # with fewer, FAISS warns of a poor fit
BLOCK_ELEMENTS = 1 << 22  # products held at a time
TILE_CENTROIDS = 1 << 13
ROUNDED_K = 256  # number of clusters from which loading torch pays off
PRODUCT_COLUMNS = 1024  # most centroids with which products are measured
LLOYD_ROWS = 2048
PRUNED_DIM = 32  # SuperKmeans refuses fewer dimensions
PRUNED_K = 1000  # its pruning gains 1.4 to 1.9 times at k = 2,000 and loses up to 3 times at k = 600 (bench/cluster.py)
SHUFFLES = 8  # captions of others that each image is scored against


def default_k(rows: int) -> int:
    """Choose the number of clusters: a hundredth of the rows, at most 10,000, or 2 sqrt(rows) if that is more.

    The last gives 90,000 for the 2.05 billion rows on which Bunny's authors used 100,000.
    """
    return max(1, min(rows // 100, max(10_000, math.isqrt(4 * rows))))


def default_sample(rows: int, k: int, dim: int) -> int:
    """Choose how many rows to fit on: 256 a centroid within 1 GiB of f32, but no fewer than 39 a centroid."""
    wanted = min(POINTS_PER_CENTROID * k, FIT_BYTES // (4 * dim))
    return min(rows, max(wanted, LEAST_POINTS_PER_CENTROID * k))


def unit_rows(x_nd: np.ndarray) -> np.ndarray:
    """Scale rows to unit length, f32; zero rows stay zero."""
    wide = x_nd.astype(np.float32)
    norms = np.linalg.norm(wide, axis=1, keepdims=True)
    return np.asarray(wide / np.where(norms > 0, norms, 1))


def as_centroids(x_kd: np.ndarray) -> np.ndarray:
    """Scale rows to unit length, f32; those that have it within rounding stay as they are stored."""
    wide = x_kd.astype(np.float32)
    norms = np.linalg.norm(wide.astype(np.float64), axis=1, keepdims=True)
    return np.where(np.abs(norms - 1) < 1e-6, wide, unit_rows(wide))


@dataclass(frozen=True)
class Fit:
    """Centroids f32 [k, d] of unit length, and how good they are on the rows that they were fitted on."""

    centroids: np.ndarray
    backend: str
    mean_similarity: float
    empty: int


def _faiss(kind: str, x_nd: np.ndarray, k: int, iters: int, seed: int, **more: bool) -> np.ndarray:
    """Fit by FAISS. kind: Kmeans, or SuperKmeans, whose distances are pruned."""
    import faiss

    every_row = {"max_points_per_centroid": len(x_nd), "min_points_per_centroid": 1}
    fit = getattr(faiss, kind)(
        x_nd.shape[1], k, niter=iters, seed=seed % (1 << 31), spherical=True, **every_row, **more
    )
    fit.train(x_nd)
    return np.asarray(fit.centroids)


def _lloyd(x_nd: np.ndarray, k: int, iters: int, seed: int, *, product: str) -> np.ndarray:
    """Fit by Lloyd's algorithm from k random rows: rows are assigned by products of int8 or bf16, means are f32.

    With a rounded product a row may go to a centroid that is farther than the nearest by a thousandth or so. That does
    not harm the objective: measured in f32, it is .12 % above FAISS's (tests/bench/cluster.py). An empty cluster takes
    half of the largest, as in FAISS. Returns f32 [k, d].
    """
    import torch

    rng = np.random.default_rng(seed)
    rows = torch.from_numpy(x_nd)
    centroids = x_nd[np.sort(rng.permutation(len(x_nd))[:k])]

    def rounded(matrix: np.ndarray) -> torch.Tensor:
        everything, origin = np.arange(len(matrix)), np.zeros((1, matrix.shape[1]), np.float32)
        tensor: torch.Tensor = round_rows(matrix, everything, origin, np.zeros(len(matrix), np.int64), product).rows
        return tensor

    coarse = rounded(x_nd) if product == "int8" else rows.bfloat16()
    for _ in range(iters):
        columns = rounded(centroids) if product == "int8" else torch.from_numpy(centroids).bfloat16()
        sums, counts = torch.zeros(k, rows.shape[1]), torch.zeros(k, dtype=torch.int64)
        for first in range(0, len(rows), LLOYD_ROWS):
            block = slice(first, first + LLOYD_ROWS)
            nearest = torch.from_numpy(multiply(coarse[block], columns, product).argmax(axis=1))
            sums.index_add_(0, nearest, rows[block])
            counts += torch.bincount(nearest, minlength=k)
        centroids = _means(sums.numpy(), counts.numpy(), rng)
    return centroids


def _on_gpus(x_nd: np.ndarray, k: int, iters: int, seed: int) -> np.ndarray:
    """Fit on all GPUs that are seen."""
    return on_device.lloyd(on_device.devices(), x_nd.astype(np.float16, copy=False), k, iters, seed, _means)


def _means(sums_kd: np.ndarray, counts: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Turn sums of rows f32 [k, d] into unit centroids; empty clusters split the largest ones.

    An empty cluster gets a large one's centroid, moved by a thousandth in random directions: the next assignment then
    divides the large cluster's rows between the two.
    """
    empty = np.flatnonzero(counts == 0)
    largest = np.argsort(-counts, kind="stable")[: len(empty)]
    centroids = unit_rows(sums_kd)
    centroids[empty[: len(largest)]] = centroids[largest] * (
        1 + rng.choice([-1e-3, 1e-3], (len(largest), sums_kd.shape[1]))
    )
    return unit_rows(centroids)


BACKENDS: dict[str, Callable[[np.ndarray, int, int, int], np.ndarray]] = {
    "bytes": partial(_lloyd, product="int8"),
    "bf16": partial(_lloyd, product="bf16"),
    "superkmeans": partial(_faiss, "SuperKmeans"),
    "kmeans": partial(_faiss, "Kmeans"),
    "kmeans-gpu": partial(_faiss, "Kmeans", gpu=True),
    "torch-gpu": _on_gpus,
}


def choose_backend(dim: int, k: int, *, gpu: bool) -> str:
    """Name the backend for this machine: a GPU if one is wanted and seen, else the fastest on its CPU.

    The fastest product on blocks of this k is measured (a tenth of a second), if there are enough clusters for loading
    torch to pay off. On an AMD with VNNI, at k = 2,000, `bytes` is 3.26 times as fast as `kmeans` and `superkmeans`
    1.97 times (tests/bench/cluster.py); the latter is slower for few clusters.
    """
    import faiss

    if gpu and on_device.device() is not None:
        return "torch-gpu"
    if gpu and getattr(faiss, "get_num_gpus", int)() > 0:
        return "kmeans-gpu"
    if k >= ROUNDED_K:
        product = fastest_product(dim, min(k, PRODUCT_COLUMNS), argmax=True)
        if product != "f32":
            return {"int8": "bytes", "bf16": "bf16"}[product]
    pruned = dim >= PRUNED_DIM and k >= PRUNED_K and hasattr(faiss, "SuperKmeans")
    return "superkmeans" if pruned else "kmeans"


def fit(x_nd: np.ndarray, k: int, iters: int, seed: int, *, backend: str) -> Fit:
    """Fit k centroids to unit rows f16 or f32 [n, d], n >= k. Same rows, seed and backend: same bytes.

    On GPUs rows are taken as f16, which stored vectors are, and assigned there at the end, too.
    """
    assert k <= len(x_nd)
    on = on_device.device() if backend == "torch-gpu" else None
    x_nd = np.ascontiguousarray(x_nd, np.float16) if on else np.ascontiguousarray(widen(x_nd))
    centroids = unit_rows(BACKENDS[backend](x_nd, k, iters, seed))
    clusters, similarity = finder(centroids, on=on)(x_nd)
    for _ in range(3):
        empty = np.flatnonzero(np.bincount(clusters, minlength=k) == 0)
        worst = np.argsort(similarity, kind="stable")[: len(empty)]
        if not len(empty) or similarity[worst[0]] > 1 - 1e-6:
            break  # there are fewer distinct rows than clusters: empty ones stay empty
        centroids[empty] = unit_rows(x_nd[worst])  # the rows farthest from their centroids start new clusters
        clusters, similarity = finder(centroids, on=on)(x_nd)
    if on:  # up to half of the card, which the workers that assign are about to share
        on_device.let_go()
    empty_count = int((np.bincount(clusters, minlength=k) == 0).sum())
    return Fit(centroids, backend, float(similarity.mean(dtype=np.float64)), empty_count)


def finder(
    centroids_kd: np.ndarray, neighbours: int = 1, on: str | None = None
) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Prepare centroids for finding the nearest of many rows: `assign` or `nearest_two`, or the same on a GPU.

    on: a device of torch, which takes rows f16; there two nearly equal cosines may change places.
    """
    if on is None:
        return partial(assign if neighbours == 1 else nearest_two, centroids_kd=centroids_kd)
    prepared = on_device.Centroids(centroids_kd, on)

    def find(x_nd: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        numbers, cosine = prepared.nearest(x_nd, neighbours)
        return (numbers[0] if neighbours == 1 else numbers), cosine

    return find


def assign(x_nd: np.ndarray, centroids_kd: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find each row's nearest centroid by cosine, ties by the lowest number.

    x_nd: f16 or f32 [n, d], unit rows. centroids_kd: f32 [k, d], unit rows. Returns i32 [n] and the cosine f32 [n].
    """
    clusters, similarity = np.zeros(len(x_nd), np.int32), np.full(len(x_nd), -np.inf, np.float32)
    for rows, first, scores in _scores(x_nd, centroids_kd):
        best, cosine = _take_best(scores)
        nearer = cosine > similarity[rows]  # tiles come by number: a tie stays with the lower one
        np.copyto(clusters[rows], best + first, where=nearer, casting="same_kind")
        np.copyto(similarity[rows], cosine, where=nearer)
    return clusters, similarity


def nearest_two(x_nd: np.ndarray, centroids_kd: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find each row's nearest and second nearest of at least two centroids: i32 [2, n], and the first's cosine f32 [n].

    The first is `assign`'s.
    """
    clusters, similarity = np.zeros((2, len(x_nd)), np.int32), np.full((2, len(x_nd)), -np.inf, np.float32)
    for rows, first, scores in _scores(x_nd, centroids_kd):
        for _ in range(min(2, scores.shape[1])):
            best, cosine = _take_best(scores)
            number = (best + first).astype(np.int32)
            nearest, second = cosine > similarity[0, rows], cosine > similarity[1, rows]
            # What is nearer than the first pushes it to the second place.
            clusters[1, rows] = np.where(nearest, clusters[0, rows], np.where(second, number, clusters[1, rows]))
            similarity[1, rows] = np.where(nearest, similarity[0, rows], np.where(second, cosine, similarity[1, rows]))
            np.copyto(clusters[0, rows], number, where=nearest)
            np.copyto(similarity[0, rows], cosine, where=nearest)
    return clusters, similarity[0]


def _take_best(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find each row's highest score, i64 and f32 [n], and remove it from the scores."""
    rows, best = np.arange(len(scores)), scores.argmax(axis=1)
    cosine = scores[rows, best]
    scores[rows, best] = -np.inf
    return best, cosine


def _scores(x_nd: np.ndarray, centroids_kd: np.ndarray) -> Iterator[tuple[slice, int, np.ndarray]]:
    """Yield the cosines of a block of rows with a tile of centroids, and its first number, in reused memory.

    With very many centroids a block with all of them would be only a few rows high, and its product half as fast: so
    centroids are taken in tiles, which keeps blocks roughly square.
    """
    n, k = len(x_nd), len(centroids_kd)
    tile = min(k, TILE_CENTROIDS)
    block = max(16, BLOCK_ELEMENTS // tile)
    centroids_dk = np.ascontiguousarray(centroids_kd.T) if k == tile else centroids_kd.T  # a copy pays if it is small
    products = np.empty(min(block, n) * tile, np.float32)
    for start in range(0, n, block):
        rows = widen(x_nd[start : start + block])
        for first in range(0, k, tile):
            columns = centroids_dk[:, first : first + tile]
            out = products[: len(rows) * columns.shape[1]].reshape(len(rows), -1)
            yield slice(start, start + len(rows)), first, np.matmul(rows, columns, out=out)


def shuffled_scores(image_nd: np.ndarray, text_nd: np.ndarray, seed: int) -> np.ndarray:
    """Score every image against the captions of others: the scores that mismatched pairs would have.

    image_nd, text_nd: [n, d], unit rows, n >= 2. Shuffle s pairs image i with caption i + offset of a random order, so
    that none meets its own. Returns f32 [s * n], unsorted: SHUFFLES of them, or for few pairs all n - 1 that exist.
    """
    n = len(image_nd)
    rng = np.random.default_rng([seed, 0x5CA1E])
    order = rng.permutation(n)
    offsets = rng.choice(n - 1, min(SHUFFLES, n - 1), replace=False) + 1
    image, text = image_nd[order], text_nd[order]
    scores = np.empty((len(offsets), n), np.float32)
    for s, offset in enumerate(offsets):
        for first in range(0, n, 4096):
            rows = np.arange(first, min(first + 4096, n))
            scores[s, rows] = np.einsum("nd,nd->n", widen(image[rows]), widen(text[(rows + offset) % n]))
    return scores.ravel()
