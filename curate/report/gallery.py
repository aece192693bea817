"""Samples for the report: which rows to show, and their thumbnails.

In: a selection with its embeddings, clusters and pool. Out: `Card`s of text (untrusted: the page escapes it) and small
JPEGs as data URIs. Rows are taken from up to 48 shards, evenly spread, and pictures decoded one at a time under a pixel
limit, so that a page about any pool costs the same memory.
"""

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curate.embed import images
from curate.emit.kept_samples import Samples
from curate.errors import UsageError
from curate.report import concepts
from curate.select import cluster_shares
from curate.storage import manifest, tar

SIDE = 176
MAX_PIXELS = 40_000_000
MAX_CAPTION = 280
MAX_BYTES = 12 << 20
MAX_SAME_TWIN = 2
LOST = "not in the pool any more"
TROUBLES = {"shard_missing": LOST, "gone": LOST, "changed": "the image has changed since"}

Place = tuple[str, int]
Twin = tuple[str, int | None]  # key and component: shards may use a key again
Item = TypeVar("Item")


@dataclass
class Card:
    """A sample to show. twin: the card beside it; cosine: of the two images; similarity: what select recorded."""

    key: str
    stem: str
    row: int
    caption: str = ""
    status: str = "ok"
    kept: bool = False
    dropped_by: str = ""
    score: float | None = None
    cluster: int | None = None
    similarity: float | None = None
    cosine: float | None = None
    picture: str = ""
    trouble: str = ""
    twin: "Card | None" = None


@dataclass
class Gallery:
    """The rows that may be shown: parallel arrays over sampled shards. reason: -1 kept, else an index of `reasons`."""

    samples: Samples
    selection: manifest.Artefact | None
    clusters: manifest.Artefact | None
    seed: int
    stems: list[str] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    columns: dict[str, np.ndarray] = field(default_factory=dict)
    cards: dict[Place, Card] = field(default_factory=dict)

    @property
    def embedded(self) -> manifest.Artefact:
        """The embeddings whose rows may be shown."""
        return self.samples.embedded

    def read_columns(self) -> None:
        """Read the scalar columns of the sampled shards."""
        self.stems = cluster_shares.spread_stems(self.embedded)
        parts = [self._columns(number, stem) for number, stem in enumerate(self.stems)]
        self.columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]} if parts else {}

    def _columns(self, number: int, stem: str) -> dict[str, np.ndarray]:
        table = self.embedded.table(stem, ["status", "clip_score"])
        size = table.num_rows
        columns = {
            "stem": np.full(size, number, np.int16),
            "row": np.arange(size),
            "score": _floats(table["clip_score"]),
            "cluster": np.full(size, -1, np.int32),
            "similarity": np.full(size, np.nan, np.float32),
        }
        reasons: Any = table["status"].cast(pa.string())
        if self.clusters is not None:
            columns["cluster"] = self.clusters.table(stem, ["cluster"])["cluster"].to_numpy()
        if self.selection is not None:
            chosen = self.selection.table(stem, ["dropped_by", "twin_similarity"])
            reasons = chosen["dropped_by"].cast(pa.string())
            columns["similarity"] = _floats(chosen["twin_similarity"])
        columns["reason"] = np.array([self._reason(text) for text in reasons.to_pylist()], np.int16)
        return columns

    def _reason(self, text: str | None) -> int:
        if text is None or text == "ok":
            return -1
        if text not in self.reasons:
            self.reasons.append(text)
        return self.reasons.index(text)

    def sample(self, where: np.ndarray, number: int, name: str) -> list[Card]:
        """Draw some of the rows at which `where` holds, in row order; the same ones each time."""
        places = np.flatnonzero(where)
        if len(places) > number:
            seed = [self.seed, *name.encode()]
            places = np.sort(np.random.default_rng(seed).choice(places, number, replace=False))
        return [self.card(self.stems[self.columns["stem"][i]], int(self.columns["row"][i])) for i in places]

    def dropped(self, reason: str, number: int) -> list[Card]:
        """Draw rows that a step, or a bad status, dropped."""
        if reason not in self.reasons:
            return []
        return self.sample(self.columns["reason"] == self.reasons.index(reason), number, reason)

    def card(self, stem: str, row: int) -> Card:
        """Ask for a row to be shown."""
        return self.cards.setdefault((stem, row), Card("", stem, row))

    def compare_captions(self) -> dict[str, Any] | None:
        """Compare what the sampled shards' usable captions mention with what the kept ones do."""
        return concepts.compare(self._captions())

    def _captions(self) -> Iterator[tuple[str, bool]]:
        most = -(-concepts.MAX_CAPTIONS // max(1, len(self.stems)))
        start = 0
        for stem, rows in ((stem, self.embedded.rows[stem]) for stem in self.stems):
            table = self.embedded.table(stem, ["status", "caption"]).slice(0, most)
            kept = self.columns["reason"][start : start + rows] < 0
            status = table["status"].cast(pa.string()).to_pylist()
            for i, caption in enumerate(table["caption"].to_pylist()):
                if status[i] == "ok" and caption:
                    yield caption, bool(kept[i])
            start += rows

    def name_clusters(self, chosen: Sequence[int]) -> tuple[Mapping[int, str], bool]:
        """Name clusters. Returns the names, and whether they are concepts of a vocabulary; else captions' words."""
        if self.clusters is None:
            return {}, False
        return cluster_shares.name(self.embedded, self.clusters, chosen)

    def cluster_facts(self, cluster: int) -> dict[str, Any]:
        """Say of a cluster's rows in the sampled shards: their mean clip_score, and which step dropped most of them."""
        here = self.columns["cluster"] == cluster
        scores, reasons = self.columns["score"][here], self.columns["reason"][here]
        dropped = np.bincount(reasons[reasons >= 0], minlength=1)
        return {
            "score": float(np.nanmean(scores)) if (~np.isnan(scores)).any() else None,
            "by": self.reasons[int(dropped.argmax())] if dropped.any() else "",
        }

    def cluster_keys(self, chosen: Sequence[int], most: int) -> Iterator[tuple[Any, ...]]:
        """Yield cluster, key, shard, row, and what dropped it, of the rows of some clusters in the sampled shards."""
        for number, stem in enumerate(self.stems):
            here = np.flatnonzero((self.columns["stem"] == number) & np.isin(self.columns["cluster"], chosen))[:most]
            keys = self.embedded.table(stem, ["key"])["key"].take(pa.array(self.columns["row"][here])).to_pylist()
            for i, key in zip(here.tolist(), keys, strict=True):
                reason = int(self.columns["reason"][i])
                by = "" if reason < 0 else self.reasons[reason]
                yield int(self.columns["cluster"][i]), key, stem, int(self.columns["row"][i]), reason < 0, by

    def twins(self, number: int) -> list[Card]:
        """Choose dropped rows, each with its kept twin, over the whole range of similarity, no twin too often.

        Twins that stayed to the end are preferred over those that a later step dropped.
        """
        if self.selection is None:
            return []
        similar = self.columns["similarity"]
        there = np.flatnonzero(~np.isnan(similar))
        nearest_last = there[np.argsort(similar[there], kind="stable")].tolist()
        pairs: list[tuple[Place, Twin]] = []
        for i in _spread(nearest_last, 8 * number):
            stem, row = self.stems[self.columns["stem"][i]], int(self.columns["row"][i])
            [told] = self.selection.table(stem, ["twin", "component"]).slice(row, 1).to_pylist()
            pairs.append(((stem, row), (told["twin"], told["component"])))
        places = self._find(self.selection, {twin for _, twin in pairs if twin[0] is not None})
        shown: list[tuple[Place, Twin]] = []
        for place, twin in pairs:
            if twin in places and sum(twin == other for _, other in shown) < MAX_SAME_TWIN:
                shown.append((place, twin))
        cards = []
        for stretch in filter(len, np.array_split(np.arange(len(shown)), number)):
            stay = [i for i in stretch if self.columns["reason"][self._index(*places[shown[i][1]])] < 0]
            place, twin = shown[stay[0] if stay else stretch[0]]
            card = self.card(*place)
            card.twin = self.card(*places[twin])
            card.cosine = float(np.clip(self._vector(*place) @ self._vector(*places[twin]), -1, 1))
            cards.append(card)
        return cards

    def _index(self, stem: str, row: int) -> int:
        """Find a row in the columns."""
        return int(np.searchsorted(self.columns["stem"], self.stems.index(stem))) + row

    def _vector(self, stem: str, row: int) -> np.ndarray:
        [vector] = self.embedded.sidecars.take_vectors(stem, "image_embedding", np.array([row]))
        return np.asarray(vector, np.float32)

    def _find(self, selection: manifest.Artefact, twins: set[Twin]) -> dict[Twin, Place]:
        """Find rows of the sampled shards by key and component, or by a key that one row alone has."""
        wanted = pa.array(sorted({key for key, _ in twins}), pa.string())
        places: dict[str, dict[Place, int | None]] = {}
        for stem in self.stems:
            table = selection.table(stem, ["key", "component", "twin"])
            stayed = pc.and_(pc.is_in(table["key"], value_set=wanted), pc.is_null(table["twin"]))
            for row in pc.indices_nonzero(stayed).to_pylist():
                places.setdefault(table["key"][row].as_py(), {})[stem, row] = table["component"][row].as_py()
        found: dict[Twin, Place] = {}
        for key, component in twins:
            there = places.get(key, {})
            same = [place for place, its in there.items() if its == component] or [*there] * (len(there) == 1)
            found |= {(key, component): same[0]} if same else {}
        return found

    def fill(self) -> int:
        """Read the text, the verdict and the picture of every card. Returns the bytes of the pictures."""
        spent = 0
        for stem in sorted({stem for stem, _ in self.cards}):
            cards = sorted((card for card in self.cards.values() if card.stem == stem), key=lambda card: card.row)
            self._read_facts(stem, cards)
            spent = read_pictures(self.samples, stem, cards, spent)
        return spent

    def _read_facts(self, stem: str, cards: Sequence[Card]) -> None:
        """Read what the sidecars say of the rows of one shard, whether it is among those that examples come from."""
        rows = pa.array([card.row for card in cards])
        facts = self.embedded.table(stem, ["key", "caption", "status", "clip_score"]).take(rows).to_pylist()
        clusters = self._taken(self.clusters, stem, ["cluster"], rows)
        verdicts = self._taken(self.selection, stem, ["dropped_by", "twin_similarity"], rows)
        for card, fact, cluster, verdict in zip(cards, facts, clusters, verdicts, strict=True):
            caption = fact["caption"] or ""
            card.key, card.status, card.score = fact["key"], fact["status"], fact["clip_score"]
            card.caption = caption if len(caption) <= MAX_CAPTION else caption[: MAX_CAPTION - 1] + "…"
            reason = verdict.get("dropped_by") if self.selection is not None else fact["status"]
            card.dropped_by = "" if reason in (None, "ok") else str(reason)
            card.kept = not card.dropped_by
            card.similarity = verdict.get("twin_similarity")
            card.cluster = cluster.get("cluster", -1)

    @staticmethod
    def _taken(
        source: manifest.Artefact | None, stem: str, columns: Sequence[str], rows: pa.Array
    ) -> list[dict[str, Any]]:
        if source is None:
            return [{}] * len(rows)
        return list(source.table(stem, columns).take(rows).to_pylist())


def open_samples(embedded: manifest.Artefact) -> tuple[Samples, str]:
    """Join embeddings to the tars of their pool; if it is gone, to none, and say so."""
    try:
        listed = tar.list_pool(embedded.input_path("pool"))
    except (KeyError, UsageError):
        return Samples(
            embedded, {}
        ), "The pool is not where it was when it was embedded, so there are no pictures here."
    return Samples(embedded, {shard.stem: shard for shard in listed}), ""


def read_pictures(samples: Samples, stem: str, cards: Sequence[Card], spent: int) -> int:
    """Read the pictures of rows of one shard, or why there are none. spent: the page's bytes so far; returns them.

    cards: by row. From a tar on a URL little more than these samples is read.
    """
    rows = np.array([card.row for card in cards])
    for card, fetched in zip(cards, samples.fetch(stem, rows), strict=True):
        if fetched.gone or fetched.image is None:
            card.trouble = TROUBLES.get(fetched.gone, fetched.gone.replace("_", " ")) or "no image"
        elif spent < MAX_BYTES:
            try:
                card.picture = thumbnail(fetched.image[2])
                spent += len(card.picture)
            except images.BadImage as error:
                card.trouble = error.status.replace("_", " ")
    return spent


def thumbnail(data: bytes) -> str:
    """Make a small JPEG of an image as a data URI. Raises: images.BadImage."""
    picture = images.decode(data, MAX_PIXELS)
    try:
        picture.thumbnail((SIDE, SIDE))
        buffer = io.BytesIO()
        picture.convert("RGBA" if "transparency" in picture.info else "RGB").convert("RGB").save(
            buffer, "JPEG", quality=72
        )
    except Exception:  # as hostile as decoding
        raise images.BadImage("decode_error") from None
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _spread(items: Sequence[Item], number: int) -> list[Item]:
    """Take evenly spaced items, the first and the last among them."""
    return [items[i] for i in sorted({*np.linspace(0, len(items) - 1, min(len(items), number)).astype(int)})]


def _floats(column: pa.ChunkedArray) -> np.ndarray:
    return np.asarray(column.cast(pa.float32()).to_numpy(), np.float32)
