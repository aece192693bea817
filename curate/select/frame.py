"""The pool as selection steps see it: columns over all rows, which rows are alive, and what else a step may request.

Everything is an array over all n rows of the pool, in row order; no row is ever removed from the arrays.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import numpy as np

from curate.ask import vocabularies
from curate.errors import UsageError, unknown

Column = Annotated[str, "column"]  # numbers, stored or computed
Group = Annotated[str, "group"]  # any column; equal values make a group
Count = Annotated[float, "count"]  # rows, or a share of the good rows
Threshold = Annotated[float, "threshold"]  # a cosine, or "auto" (AUTO)
Share = Annotated[float, "share"]  # 0 … 1, or "auto" (AUTO)
Levels = Annotated[tuple[int, ...], "levels"]  # falling numbers of clusters
Texts = Annotated[tuple[str, ...], "texts"]  # the last parameter: all further arguments
Keep = Annotated[str, "keep"]  # which row of a group stays; includes max:COLUMN and min:COLUMN
Directory = Annotated[str, "directory"]  # made by embed or import
File = Annotated[str, "file"]
POOL = vocabularies.POOL  # in place of a file: derived from the pool itself
AUTO = -1.0
CLUSTER_FIRST = "run `curate cluster EMB CLU`, then `curate select CLU …`"
NO_CAPTIONS = """without caption embeddings, choose steps such as 'dedup("auto")' and 'balance(cluster, 30%)'"""
UNKNOWN_BITS = 255
LEAST_RESERVE, MAX_RESERVE = 100, 100_000  # rows that a verdict lists as those that come next
FROM_CLUSTERS = ("cluster", "centroid_similarity", "nearest_similarity")
Fetch = Callable[[np.ndarray], np.ndarray]  # row numbers to vectors f16 [m, d]
Edges = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # a, b, similarity, phash_bits (255: unknown)


def _nothing(*_: Any) -> Any:
    raise UsageError("these rows lack what the step reads.")


def no_hashes(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Stand in for a pool without perceptual hashes: none is known."""
    return np.zeros(len(rows), np.uint64), np.zeros(len(rows), bool)


def _compute(about: Mapping[str, Any], make: Callable[[], np.ndarray], rows: int = 0) -> np.ndarray:
    return make()


@dataclass
class Duplicates:
    """What dedup decided, only for rows in groups: a few dozen bytes for each of those, and one per row of the pool.

    asked: bool [n], rows that a dedup looked at; one that is not in `rows` is a group of its own. rows: i64 [m],
    ascending. component: i64, the smallest row of the group. kept: i64, the row that stayed in place of a dropped one,
    else -1. similarity: f32, to that row; NaN: unknown.
    """

    asked: np.ndarray
    rows: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    component: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    kept: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    similarity: np.ndarray = field(default_factory=lambda: np.empty(0, np.float32))

    def add(
        self, alive: np.ndarray, rows: np.ndarray, component: np.ndarray, kept: np.ndarray, similarity: np.ndarray
    ) -> None:
        """Note what a dedup decided on the rows alive, bool [n]; for rows dropped earlier, the earlier note stays."""
        stands = ~alive[self.rows]
        self.asked |= alive
        merged = np.concatenate([self.rows[stands], rows])
        order = np.argsort(merged, kind="stable")
        self.rows = merged[order]
        self.component = np.concatenate([self.component[stands], component])[order]
        self.kept = np.concatenate([self.kept[stands], kept])[order]
        self.similarity = np.concatenate([self.similarity[stands], similarity.astype(np.float32)])[order]

    def components(self, first: int, last: int) -> np.ndarray:
        """Return for the rows from first to last the smallest row of their group, i64; -1 if no dedup looked at it."""
        found = np.where(self.asked[first:last], np.arange(first, last), -1)
        here = slice(*np.searchsorted(self.rows, [first, last]))
        found[self.rows[here] - first] = self.component[here]
        return found


@dataclass
class Frame:
    """The pool as the steps see it. Columns are loaded on request; n is the number of all its rows."""

    good: np.ndarray  # bool [n]
    columns: Mapping[str, Callable[[], np.ndarray]]
    groups: Mapping[str, Callable[[], np.ndarray]]
    seed: int = 0
    edges: Callable[[], Edges] | None = None
    floor: float = 1.0
    hashes: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]] = no_hashes  # row numbers to u64 [m], known bool [m]
    details: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]] | None = None  # row numbers to u8 [m, 72], known
    writing: Callable[[np.ndarray], np.ndarray] | None = None  # row numbers to bool [m]: strokes on a plain ground
    vectors: Fetch = _nothing
    scored: Callable[..., Iterator[np.ndarray]] = _nothing  # by a function of vectors f16 [m, d]: all rows, in order
    text_vectors: Fetch | None = None
    captions: Callable[[np.ndarray], list[str]] = _nothing
    centroids: Callable[[], np.ndarray] | None = None  # f32 [k, d]
    shuffled: Sequence[float] | None = None  # clip_score of shuffled pairs, 0 … 100 % quantiles
    recall: Mapping[str, Any] = field(default_factory=dict)  # of near pairs, as the clusters' manifest has it
    foreign: Callable[[str], Iterator[tuple[np.ndarray, np.ndarray]]] = _nothing  # another EMB's vectors and uids
    lines: Callable[[str], list[str]] = _nothing  # of a text file
    embed_texts: Callable[..., np.ndarray] = _nothing  # prompts to unit rows f32 [m, d], by their model
    text_weights: dict[str, str] = field(default_factory=dict)  # their digest, where the embeddings do not say it
    stored: Callable[..., np.ndarray] = _compute  # what is made once: see ask/stored.py
    listed: Callable[[str], np.ndarray] = _nothing  # bool [n]: the rows whose uid a DataComp subset file has
    alive: np.ndarray = field(init=False)
    duplicates: Duplicates = field(init=False)
    cache: dict[str, np.ndarray] = field(default_factory=dict)  # columns, and beside them groups
    grouped: dict[str, np.ndarray] = field(default_factory=dict)
    compute: Callable[["Frame", str], np.ndarray] | None = None  # a column that is not stored, by how it is written

    def __post_init__(self) -> None:
        self.alive = self.good.copy()
        self.duplicates = Duplicates(np.zeros(len(self.good), bool))

    def column(self, name: str) -> np.ndarray:
        """Return a column of numbers [n], stored or computed.

        Raises: UsageError if it is unknown, or has no value on any good row.
        """
        if self.compute is not None and name not in self.columns and name not in self.cache:
            self.cache[name] = self.compute(self, name)
        return self._load(name, self.columns, self.cache)

    def group(self, name: str) -> np.ndarray:
        """Return a column as group numbers i64 [n]."""
        return self._load(name, self.groups, self.grouped)

    def _load(
        self, name: str, known: Mapping[str, Callable[[], np.ndarray]], cache: dict[str, np.ndarray]
    ) -> np.ndarray:
        if name not in cache:
            self.known(name, known)
            values = known[name]()
            if values.dtype.kind == "f" and self.good.any() and np.isnan(values[self.good]).all():
                hint = NO_CAPTIONS if name == "clip_score" else None
                raise UsageError(f"the column {name} has no value on any good row.", hint)
            cache[name] = values
        return cache[name]

    def known(self, name: str, columns: Iterable[str], also: Iterable[str] = ()) -> None:
        """Refuse an unknown column. also: what else could have been written."""
        if name not in columns and self.edges is None and name in FROM_CLUSTERS:
            raise UsageError(f"the column {name} needs clusters.", CLUSTER_FIRST)
        if name not in columns:
            raise unknown("column", name, [*columns, *also])

    def mask(self, rows: np.ndarray) -> np.ndarray:
        """Turn row numbers into bool [n]."""
        keep = np.zeros(len(self.good), bool)
        keep[rows] = True
        return keep

    def count(self, n: float) -> int:
        """Turn a count into rows; a float up to 1 is a share of the good rows."""
        return round(n * int(self.good.sum())) if isinstance(n, float) and n <= 1 else int(n)

    def random(self, number: int) -> np.ndarray:
        """Return f64 [n] in [0, 1), by the seed and the step's number."""
        return np.random.default_rng([self.seed, number]).random(len(self.good))


@dataclass(frozen=True)
class Verdict:
    """Which rows stay, bool [n]; facts that the step found, for the funnel; and which rows would come next.

    reserve: i64, of the rows that the step drops, those next in its rank, best first; at least `reserve_size` of them,
    if there are as many; none if the step has no rank.
    """

    keep: np.ndarray
    estimates: dict[str, Any] = field(default_factory=dict)
    reserve: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))


def reserve_size(kept: int) -> int:
    """Say how many rows are in reserve for those of a selection that `emit` finds gone: a fiftieth, within bounds."""
    return min(MAX_RESERVE, max(LEAST_RESERVE, kept // 50))


def shortage(wanted: int, found: int) -> dict[str, Any]:
    """Note that fewer rows were found than wanted."""
    return {"asked": wanted, "available": found} if found < wanted else {}
