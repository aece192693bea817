"""Samples of a pool's good rows: those that k-means is fitted on, and those by which a pool's scores are estimated."""

from collections.abc import Sequence

import numpy as np

from curate.cluster.assign import is_ok
from curate.storage import ranges
from curate.storage.manifest import Artefact
from curate.vectors import kmeans


def sample_rows(
    source: Artefact, rows_ok: dict[str, int], sizes: Sequence[int], seed: int, column: str = "image_embedding"
) -> list[np.ndarray]:
    """Draw samples of good rows without replacement, f16 [size, d] each, in row order; each row is read once."""
    total = sum(rows_ok.values())
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
        wanted = np.unique(np.concatenate(own))
        good = np.flatnonzero(is_ok(source.table(stem, ["status"])))
        vectors = source.sidecars.take_vectors(stem, column, good[wanted])
        return [vectors[np.searchsorted(wanted, rows)] for rows in own]

    parts = ranges.ahead(source.directory, read, drawn)
    return [np.concatenate(sample) for sample in zip(*parts, strict=True)]


def shuffled_quantiles(image: np.ndarray, text: np.ndarray, seed: int) -> list[float] | None:
    """Score images against the captions of others: the 0 … 100 % quantiles; None without captions' vectors."""
    paired = np.abs(text).max(axis=1) > 0
    if paired.sum() < 2:
        return None
    scores = kmeans.shuffled_scores(image[paired], text[paired], seed)
    return [float(value) for value in np.quantile(scores, np.linspace(0, 1, 101))]
