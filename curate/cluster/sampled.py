"""Samples of a pool's good rows, for fitting k-means and for estimating a pool's scores."""

from collections.abc import Sequence

import numpy as np

from curate.cluster.assign import is_ok
from curate.storage import ranges, sidecar
from curate.storage.manifest import Artefact
from curate.vectors import kmeans


def sample_rows(
    source: Artefact, rows_ok: dict[str, int], sizes: Sequence[int], seed: int, columns: Sequence[str] = ()
) -> list[np.ndarray]:
    """Draw samples of good rows without replacement, f16 [size, d] each, in row order; each row is read once.

    columns: one for each sample, by default the images' vectors; samples of the same size have the same rows.
    """
    total, columns = sum(rows_ok.values()), columns or ["image_embedding"] * len(sizes)
    draws = [
        np.sort(np.random.default_rng(seed).choice(total, min(size, total), replace=False, shuffle=False))
        for size in sizes
    ]
    bounds = np.cumsum([0, *rows_ok.values()])
    cuts = [np.split(draw, np.searchsorted(draw, bounds[1:-1])) for draw in draws]
    drawn = [
        (stem, [part - first for part in own])
        for stem, first, own in zip(rows_ok, bounds[:-1].tolist(), zip(*cuts, strict=True), strict=True)
        if any(map(len, own))
    ]

    def read(drawn: tuple[str, list[np.ndarray]]) -> list[np.ndarray]:
        stem, own = drawn
        place, good = source.sidecars.opened(stem), np.arange(source.rows[stem])
        if rows_ok[stem] < len(good):
            good = np.flatnonzero(is_ok(sidecar.table(place, ["status"])))
        found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for column in dict.fromkeys(columns):
            wanted = np.unique(np.concatenate([rows for rows, of in zip(own, columns, strict=True) if of == column]))
            found[column] = wanted, sidecar.take_vectors(place, column, good[wanted])
        sought = [(*found[column], rows) for column, rows in zip(columns, own, strict=True)]
        return [vectors[np.searchsorted(wanted, rows)] for wanted, vectors, rows in sought]

    parts = ranges.ahead(source.directory, read, drawn)
    return [np.concatenate(sample) for sample in zip(*parts, strict=True)]


def shuffled_quantiles(image: np.ndarray, text: np.ndarray, seed: int) -> list[float] | None:
    """Score images against the captions of others: the 0 … 100 % quantiles; None without caption vectors."""
    paired = np.abs(text).max(axis=1) > 0
    if paired.sum() < 2:
        return None
    scores = kmeans.shuffled_scores(image[paired], text[paired], seed)
    return [float(value) for value in np.quantile(scores, np.linspace(0, 1, 101))]
