"""Find the rows nearest to texts and pictures, by one pass over the stored image vectors.

    score of a row for a query = cosine(row, query) - max over the texts of `without` of cosine(row, text)

Rows are read block by block; the f32 product finds all that may be among the best, exact f64 products decide, and ties
go by row order. So the answer does not depend on blocks, threads or the processor. Cost: one read of the vectors and
one product with a column per query; memory for a block.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from curate.ask import prompts
from curate.ask.matches import F32_ERROR
from curate.ask.reading import scored
from curate.errors import UsageError
from curate.storage.manifest import Artefact, open_input
from curate.vectors.exact import widen
from curate.vectors.narrow import products

MAX_FOUND = 10_000


@dataclass(frozen=True)
class Hit:
    """A row that was found. stem, row: its place; facts: what its sidecars say (key, caption, kept, dropped_by, …)."""

    score: float
    stem: str
    row: int
    facts: dict[str, Any]


def find(
    directory: str,
    texts: Sequence[str],
    pictures: Sequence[str],
    without: Sequence[str],
    n: int,
    model: str = "",
    pretrained: str = "",
) -> tuple[Artefact, dict[str, list[Hit]]]:
    """Find the n rows nearest to each text and each picture. Returns the embeddings and the hits of each.

    directory: of embed, import, cluster or select. without: texts that rows should be unlike. model, pretrained: needed
    where the embeddings do not say which model made them. Raises: UsageError.
    """
    if not texts and not pictures:
        raise UsageError("nothing is asked for.", 'give a text such as "a photo of a watermark", or --image FILE')
    source = open_input(directory, "embed", "import", "cluster", "select")
    embedded = source.embeddings()
    named = (model, pretrained)
    queries = [*(prompts.embed_texts(embedded, texts, *named) if texts else [])]
    queries += [prompts.embed_image(embedded, picture, *named) for picture in pictures]
    against = prompts.embed_texts(embedded, without, *named) if without else np.empty((0, len(queries[0])), np.float32)
    found = nearest(embedded, np.stack(queries), against, n)
    return embedded, {
        asked: describe(source, embedded, rows) for asked, rows in zip((*texts, *pictures), found, strict=True)
    }


def nearest(
    embedded: Artefact, queries_qd: np.ndarray, without_wd: np.ndarray, n: int
) -> list[list[tuple[float, str, int]]]:
    """Find the n best rows for each query, best first: (score, stem, row). queries, without: unit rows f32."""
    if not 0 < n <= MAX_FOUND:
        raise UsageError(f"n={n}; expected 1 to {MAX_FOUND:,} rows.")
    best = [_Best(n) for _ in queries_qd]
    against = np.concatenate([queries_qd, without_wd]).astype(np.float32)
    exact = against.astype(np.float64)
    num = len(queries_qd)

    def score(x_nd: np.ndarray) -> np.ndarray:
        if x_nd.shape[1] != against.shape[1]:
            dims = f"{x_nd.shape[1]} dimensions; the model gives {against.shape[1]}"
            raise UsageError(f"{embedded.directory} has vectors of {dims}.")
        return products(x_nd, against)

    for block, cosines in scored(embedded, score):
        unlike = cosines[:, num:].max(axis=1) if len(without_wd) else np.float32(0)
        for number, found in enumerate(best):
            rows = _highest(cosines[:, number] - unlike, block.good, n, found.least)
            if len(rows):
                x = widen(block.x_nd[rows]).astype(np.float64)
                penalty = (x @ exact[num:].T).max(axis=1) if len(without_wd) else 0
                found.add(x @ exact[number] - penalty, block.stem, block.first + rows)
    return [found.rows for found in best]


def _highest(scores: np.ndarray, good: np.ndarray, n: int, least: float) -> np.ndarray:
    """List the good rows that may be among the n best of a block, where others have scores of at least `least`."""
    rows = np.flatnonzero(scores > least - 4 * F32_ERROR)
    rows = rows[good[rows]]
    if len(rows) > n:
        own = scores[rows]
        rows = rows[own > float(np.partition(own, -n)[-n]) - 4 * F32_ERROR]
    return np.asarray(rows)


class _Best:
    """The n best rows so far."""

    def __init__(self, n: int) -> None:
        self.n, self.least = n, -np.inf
        self.rows: list[tuple[float, str, int]] = []

    def add(self, scores: np.ndarray, stem: str, rows: np.ndarray) -> None:
        self.rows += [(float(score), stem, int(row)) for score, row in zip(scores, rows, strict=True)]
        self.rows = sorted(self.rows, key=lambda each: -each[0])[: self.n]  # stable: the earlier row first
        self.least = self.rows[-1][0] if len(self.rows) == self.n else -np.inf


def describe(source: Artefact, embedded: Artefact, found: Sequence[tuple[float, str, int]]) -> list[Hit]:
    """Look up what the sidecars say of rows: key and caption, the cluster, and whether a selection kept them."""
    tables: list[tuple[Artefact, tuple[str, ...]]] = [(embedded, ("key", "caption", "status", "clip_score"))]
    tables += [(each, names) for each, names in _above(source)]
    facts: dict[tuple[str, int], dict[str, Any]] = {(stem, row): {} for _, stem, row in found}
    rows_of: dict[str, list[int]] = {}
    for stem, row in facts:
        rows_of.setdefault(stem, []).append(row)
    for stem, rows in rows_of.items():
        for artefact, names in tables:
            table = artefact.table(stem, names).take(rows)
            for name in names:
                for row, value in zip(rows, table[name].to_pylist(), strict=True):
                    facts[stem, row][name] = value
    return [Hit(score, stem, row, facts[stem, row]) for score, stem, row in found]


def _above(source: Artefact) -> Iterator[tuple[Artefact, tuple[str, ...]]]:
    """Yield the clusters and the selection that a directory is or rests on, with the columns to report of each."""
    for command, names in (("cluster", ("cluster",)), ("select", ("kept", "dropped_by"))):
        try:
            yield source.source(command), names
        except LookupError:
            continue
