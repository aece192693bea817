"""The columns of a pool over all its shards, for selection: read on request, a few bytes per row.

Global row numbers count through the stems in the manifest's order. A missing number is NaN; a row without a value makes
a group of its own.
"""

from collections.abc import Callable, Iterator
from functools import cached_property, partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curate.ask import reading
from curate.ask.prompts import embed_texts, other_weights
from curate.ask.stored import stored_array
from curate.errors import ContractError, UsageError
from curate.select import computed_columns
from curate.select.frame import UNKNOWN_BITS, Edges, Frame
from curate.storage import manifest, paths, ranges, records, sidecar
from curate.storage.schema import (
    CAPTION,
    CENTROIDS,
    CLUSTER_SCHEMA,
    DETAIL_BYTES,
    EDGES,
    LOSS,
    SIZES,
    STATUSES,
    UID,
    extra_columns,
    uid_pairs,
)
from pipelines.terminal import first_line

LEAST_BITS = 8  # set in a hash, or fewer: two such hashes can never differ in more than the 16 bits that copies may
NUMBERS = ("clip_score", "width", "height")
HOST = r"^[A-Za-z][A-Za-z0-9+.-]*://(?:[^/@]*@)?(?P<host>[^/:?#]+)"
ABOUT = {
    "clip_score": "cosine of image and caption",
    "width, height": "pixels, as stored",
    "min_side, aspect_ratio": "the shorter side; the longer by the shorter",
    "caption_words, caption_chars": "how long the caption is",
    "centroid_similarity": "cosine to the cluster's centroid",
    "nearest_similarity": "highest cosine inside the cluster, or the clusters' floor if lower",
    "loss": "what training measured, if given by --losses",
}
GROUPS = ("uid", "caption", "url", "host", "phash", "shard")


class Pool:
    """The scalar columns of a pool over all its shards, in stem order; each is read when it is asked for."""

    def __init__(self, source: manifest.Artefact, losses: manifest.Artefact | None = None) -> None:
        self.losses = losses
        self.clu = source if source.command == "cluster" else None
        self.emb = source.embeddings()
        if not self.emb.stems:
            raise UsageError(f"{self.emb.directory} has no shard to select from.", "embed again: it says what failed")
        if self.clu is not None:
            manifest.check_aligned(self.emb, self.clu)
        self.bounds = np.cumsum([0, *self.emb.rows.values()])
        self.emb.sidecars.keep(["status", "clip_score", "phash"])
        if self.clu is not None:
            self.clu.sidecars.keep(CLUSTER_SCHEMA.names)

    def extents(self) -> Iterator[tuple[str, int, int]]:
        """Yield each stem with its first row and the one after its last."""
        bounds = self.bounds.tolist()
        yield from zip(self.emb.stems, bounds[:-1], bounds[1:], strict=True)

    def _columns(self, name: str) -> Iterator[tuple[slice, pa.ChunkedArray]]:
        """Yield each shard's rows and its part of a column, memory-mapped: what is to be kept must be copied out.

        Keeping one map open per shard fails with "Cannot allocate memory" at 65,000 (Linux' vm.max_map_count).
        """
        source = self.clu if self.clu is not None and name in CLUSTER_SCHEMA.names else self.emb
        tables = source.sidecars.tables([name], self.emb.stems)
        for (_, first, last), (_, table) in zip(self.extents(), tables, strict=True):
            yield slice(first, last), table[name]

    def _gather(self, name: str, dtype: type, values: Callable[[pa.ChunkedArray], np.ndarray]) -> np.ndarray:
        """Read a column over all shards into one array; values: a shard's part as numbers."""
        gathered: np.ndarray = np.empty(int(self.bounds[-1]), dtype)
        for rows, column in self._columns(name):
            gathered[rows] = values(column)
        return gathered

    @cached_property
    def _status(self) -> tuple[np.ndarray, list[str]]:
        names = list(STATUSES)
        return self._gather("status", np.int8, lambda column: sidecar.codes(column, names)), names

    @property
    def statuses(self) -> dict[str, int]:
        """Count the rows of each status that occurs."""
        codes, names = self._status
        return {name: int((codes == i).sum()) for i, name in enumerate(names) if (codes == i).any()}

    def status_rows(self, status: str) -> np.ndarray:
        """Say which rows have a status, bool."""
        codes, names = self._status
        return np.asarray(codes == names.index(status))

    def numbers(self, name: str) -> np.ndarray:
        """Read a column as f32 [n] (clusters: i32, the pool's own numbers: f64); a null is NaN."""
        if name in CAPTION:
            return self._gather("caption", np.float32, partial(_caption_length, words=name == "caption_words"))
        if name in SIZES:
            sides = self.numbers("width"), self.numbers("height")
            low = np.minimum(*sides)  # of two sides one of which is unknown, neither is known to be the shorter
            return np.asarray(low if name == "min_side" else np.maximum(*sides) / low)
        if name == "nearest_similarity":
            return self._nearest()
        if name == LOSS:
            return self._loss()
        if name == "cluster" or name in extra_columns(self._schema):  # f32 would round ids and dates from 2 ** 24 on
            return self._gather(name, np.int32 if name == "cluster" else np.float64, lambda column: column.to_numpy())
        return self._gather(name, np.float32, lambda column: column.cast(pa.float32(), safe=False).to_numpy())

    def _loss(self) -> np.ndarray:
        """Read each row's value from the trainer's sidecar. Raises: ContractError if it has other rows."""
        assert self.losses is not None
        losses = np.empty(int(self.bounds[-1]), np.float32)
        for stem, first, last in self.extents():
            recorded = self.losses.table(stem, ["key", LOSS]) if stem in self.losses.rows else None
            if recorded is None or not recorded["key"].equals(self.emb.table(stem, ["key"])["key"]):
                raise ContractError(
                    f"the rows of {stem} in {self.losses.directory} are not those in {self.emb.directory}.",
                    "embed the same shards that were trained on: `curate embed DATA EMB`",
                )
            losses[first:last] = recorded[LOSS].to_numpy()
        return losses

    def _nearest(self) -> np.ndarray:
        """Find each row's highest cosine inside its cluster; the floor stands for anything below it."""
        assert self.clu is not None
        nearest = np.full(int(self.bounds[-1]), self.floor, np.float32)
        a, b, similarity, _ = self.edges()
        np.maximum.at(nearest, a, similarity)
        np.maximum.at(nearest, b, similarity)
        return nearest

    def groups(self, name: str) -> np.ndarray:
        """Read a column as group numbers, i64 (clusters, shards: i32); a row without a value is a group of its own."""
        if name == "shard":
            return np.repeat(np.arange(len(self.emb.stems), dtype=np.int32), np.diff(self.bounds))
        if name == "cluster":
            return self.numbers(name)
        source = "url" if name == "host" else name
        kind = pa.string() if name == "host" else self._schema.field(name).type
        empty = np.empty(int(self.bounds[-1]), bool)
        parts: list[Any] = []
        for rows, column in self._columns(source):
            if name == "host":
                column = pc.struct_field(pc.extract_regex(column, HOST), "host")
            empty[rows] = column.is_null().to_numpy()
            parts += map(partial(_group_part, name=name, kind=kind), column.chunks)
        codes = _joined_codes(parts, kind)
        return np.where(empty, -2 - np.arange(len(codes)), codes)

    @property
    def floor(self) -> float:
        """The cosine above which edges were kept."""
        return float(self.clu.manifest["options"].get("floor", 1)) if self.clu is not None else 1.0

    @cached_property
    def _edges(self) -> Edges:
        assert self.clu is not None
        table = sidecar.table(self.clu.path(EDGES), ["a", "b", "similarity", "phash_bits"])
        a, b = table["a"].to_numpy(), table["b"].to_numpy()
        bits = table["phash_bits"].fill_null(UNKNOWN_BITS).to_numpy()
        known = self._has_structure
        return a, b, table["similarity"].to_numpy(), np.where(known[a] & known[b], bits, np.uint8(UNKNOWN_BITS))

    @cached_property
    def _has_structure(self) -> np.ndarray:
        """Say which rows have an informative perceptual hash, bool [n]: not flat pictures, gradients or stripes.

        The hash of such a picture has few or no bits set (an ordinary one has 32), so any two of them agree.
        """
        return self._gather(
            "phash", np.bool_, lambda column: np.bitwise_count(column.fill_null(0).to_numpy()) > LEAST_BITS
        )

    def hashes(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Read perceptual hashes by global row numbers, u64 [m], and which of them are informative, bool [m]."""
        values = np.zeros(len(rows), np.uint64)
        for stem, here, own in self._by_stem(rows):
            values[here] = self.emb.table(stem, ["phash"])["phash"].take(pa.array(own)).fill_null(0).to_numpy()
        return values, np.bitwise_count(values) > LEAST_BITS

    def details(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Read finer hashes by global row numbers, u8 [m, 72], and which of them exist, bool [m]."""
        values, known = np.zeros((len(rows), DETAIL_BYTES), np.uint8), np.zeros(len(rows), bool)
        for stem, here, own in self._having("detail", rows):
            column = self.emb.table(stem, ["detail"])["detail"].take(pa.array(own)).combine_chunks()
            known[here] = column.is_valid().to_numpy(zero_copy_only=False)
            filled = column.fill_null(bytes(DETAIL_BYTES))
            values[here] = np.frombuffer(b"".join(filled.to_pylist()), np.uint8).reshape(-1, DETAIL_BYTES)
        return values, known

    def writing(self, rows: np.ndarray) -> np.ndarray:
        """Say by global row numbers which pictures are known to be strokes on a plain ground, bool [m]."""
        found = np.zeros(len(rows), bool)
        for stem, here, own in self._having("writing", rows):
            column = self.emb.table(stem, ["writing"])["writing"].take(pa.array(own))
            found[here] = column.fill_null(False).to_numpy()
        return found

    def edges(self) -> Edges:
        """Read the near-duplicate forest."""
        return self._edges

    def _by_stem(self, rows: np.ndarray) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        """Yield each stem that has some of these global rows: which of them, ascending, and their numbers in it."""
        stem_of = np.searchsorted(self.bounds, rows, side="right") - 1
        order = np.argsort(stem_of, kind="stable")
        stems, starts = np.unique(stem_of[order], return_index=True)
        for index, here in zip(stems, np.split(order, starts[1:]), strict=False):
            yield self.emb.stems[index], here, rows[here] - self.bounds[index]

    def _having(self, name: str, rows: np.ndarray) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        """As `_by_stem`, for the shards that have a column: those embedded by an older version may lack it."""
        return (each for each in self._by_stem(rows) if name in self.emb.sidecars.schema(each[0]).names)

    def keys(self, rows: np.ndarray) -> pa.Array:
        """Look up keys by global row numbers, as large_string: Arrow's string holds 2 GB, some 100 million keys."""
        parts, places = [pa.array([], pa.large_string())], [np.empty(0, np.int64)]
        for stem, here, own in self._by_stem(rows):
            keys = self.emb.table(stem, ["key"])["key"].take(pa.array(own))
            parts.append(keys.combine_chunks().cast(pa.large_string()))
            places.append(here)
        return pa.concat_arrays(parts).take(pa.array(np.argsort(np.concatenate(places))))

    def vectors(self, rows: np.ndarray, column: str = "image_embedding") -> np.ndarray:
        """Read embeddings by global row numbers, f16 [len(rows), d]."""
        vectors: np.ndarray | None = None

        def read(each: tuple[str, np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
            stem, here, own = each
            return here, self.emb.sidecars.take_vectors(stem, column, own)

        for here, part in ranges.ahead(self.emb.directory, read, self._by_stem(rows)):
            vectors = np.empty((len(rows), part.shape[1]), np.float16) if vectors is None else vectors
            vectors[here] = part
        return np.empty((0, 1), np.float16) if vectors is None else vectors

    def captions(self, rows: np.ndarray) -> list[str]:
        """Read captions by global row numbers; "" where there is none."""
        texts = np.empty(len(rows), object)
        for stem, here, own in self._by_stem(rows):
            column = self.emb.table(stem, ["caption"])["caption"]
            texts[here] = column.take(pa.array(own)).fill_null("").to_pylist()
        return list(texts)

    def foreign(self, directory: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield another EMB's good image embeddings f16 [m, d], mapped where they can be, and uid numbers i64 [m].

        Raises: UsageError if it was made by another model, as far as that is recorded.
        """
        other = Pool(manifest.open_input(directory, "embed", "import"))
        (ours, our_model), (theirs, their_model) = self._embedder, other._embedder
        if ours != theirs or (our_model and their_model and our_model != their_model):
            raise UsageError(
                f"{directory} has {theirs} dimensions of {their_model or 'an unnamed model'}, "
                f"this pool has {ours} of {our_model or 'an unnamed model'}.",
                "embed both with one model",
            )
        uids, good = other.groups("uid"), other.status_rows("ok")
        for stem, first, _ in other.extents():
            for batch in other.emb.batches(stem, ["image_embedding"]):
                here = slice(first, first + batch.num_rows)
                first = here.stop
                vectors = sidecar.vectors(batch.column("image_embedding"))
                yield vectors if good[here].all() else vectors[good[here]], uids[here][good[here]]

    def centroids(self) -> np.ndarray:
        """Read the clusters' centroids, f32 [k, d]."""
        assert self.clu is not None
        return sidecar.load_npy(self.clu.path(CENTROIDS))

    @property
    def _embedder(self) -> tuple[int, str]:
        """Return the embeddings' dimensions and the model's name, empty if it is not recorded."""
        options = self.emb.manifest.get("options", {})
        named = [str(options[key]) for key in ("model", "pretrained", "weights") if options.get(key)]
        return self._schema.field("image_embedding").type.list_size, " ".join(named)

    @cached_property
    def _schema(self) -> pa.Schema:
        return self.emb.sidecars.schema(self.emb.stems[0])

    def listed(self, location: str) -> np.ndarray:
        """Say which rows' uids are in a DataComp subset file, bool: the uids of the pool's own JSON, if it has them.

        Raises: UsageError if the file is not one.
        """
        try:
            subset = sidecar.load_npy(location)
        except (OSError, ValueError) as error:
            raise UsageError(f"{location} cannot be read: {first_line(error)}") from None
        if subset.dtype != UID or subset.ndim != 1:
            raise UsageError(f"{location} holds {subset.dtype} {subset.shape}, not a subset of uids, u8,u8 [n].")
        own = "source_uid" if "source_uid" in self._schema.names else "uid"
        return self._gather(own, np.bool_, partial(_is_listed, subset=np.unique(subset)))

    def frame(self, seed: int, model: str = "", pretrained: str = "") -> Frame:
        """Make the frame that the steps see. model, pretrained: for texts, if the embeddings do not name a model."""
        asked = other_weights(self.emb, model, pretrained)
        extra = extra_columns(self._schema)
        scored = any(column.null_count < len(column) for _, column in self._columns("clip_score"))
        numbers = [*NUMBERS, *CAPTION, *SIZES]
        numbers += [each for each in extra if self._schema.field(each).type == pa.float64()]
        named = [*GROUPS, *extra]
        numbers += [LOSS] if self.losses is not None else []
        if self.clu is not None:
            numbers += ["cluster", "centroid_similarity", "nearest_similarity"]
            named += ["cluster"]
        return Frame(
            good=self.status_rows("ok"),
            columns={name: partial(self.numbers, name) for name in numbers},
            groups={name: partial(self.groups, name) for name in named},
            seed=seed,
            edges=self.edges if self.clu is not None and paths.exists(self.clu.path(EDGES)) else None,
            floor=self.floor,
            vectors=self.vectors,
            scored=lambda score: (scores for _, scores in reading.scored(self.emb, score)),
            hashes=self.hashes,
            details=self.details if "detail" in self._schema.names else None,
            writing=self.writing if "writing" in self._schema.names else None,
            text_vectors=partial(self.vectors, column="text_embedding") if scored else None,
            captions=self.captions,
            centroids=self.centroids if self.clu is not None else None,
            lines=_lines,
            recall={} if self.clu is None else self.clu.manifest.get("recall", {}),
            listed=self.listed,
            shuffled=None if self.clu is None else self.clu.manifest.get("fit", {}).get("shuffled_clip_score"),
            foreign=self.foreign,
            compute=computed_columns.compute,
            text_weights=asked,
            embed_texts=partial(embed_texts, self.emb, model=model, pretrained=pretrained),
            stored=lambda about, *made: stored_array(self.emb, {**about, **asked}, *made),
        )


def _lines(location: str) -> list[str]:
    """Read a text file's lines, or the texts of a JSON list. Raises: UsageError if it is neither."""
    try:
        if not location.endswith(".json"):
            return paths.read_lines(location)
        listed = manifest.load_json(location)
    except (FileNotFoundError, UnicodeDecodeError) as error:
        raise UsageError(f"{location} cannot be read as UTF-8 text: {error}") from None
    if not isinstance(listed, list) or not all(isinstance(each, str) for each in listed):
        raise UsageError(f"{location} is not a JSON list of texts.")
    return listed


def _caption_length(column: pa.ChunkedArray, words: bool) -> np.ndarray:
    """Count the words (what stands between spaces) or the characters of captions, f32; NaN where there is none."""
    parts = pc.list_value_length(pc.utf8_split_whitespace(pc.utf8_trim_whitespace(column)))
    counted = parts if words else pc.utf8_length(column)
    return np.asarray(counted.cast(pa.float32()).to_numpy())


def _group_part(chunk: pa.Array, name: str, kind: pa.DataType) -> Any:
    """Copy from a column's chunk what distinguishes its groups: numbers, or strings by a dictionary of the chunk."""
    if name == "uid":  # half of a 128-bit hash is a number good enough to tell images apart
        return _half_numbers(chunk)
    if pa.types.is_string(kind):  # the dictionary of 100 million captions is larger than 2 GB, too
        return chunk.cast(pa.large_string()).dictionary_encode()
    return np.array(chunk.fill_null(0).to_numpy(zero_copy_only=False))


def _joined_codes(parts: list[Any], kind: pa.DataType) -> np.ndarray:
    """Give numbers to all parts' groups, i64: strings by first appearance, floats by value, others as they are."""
    if pa.types.is_string(kind):
        encoded = pa.chunked_array(parts, pa.dictionary(pa.int32(), pa.large_string())).unify_dictionaries().chunks
        indices = pa.chunked_array([chunk.indices for chunk in encoded], pa.int32())
        return np.asarray(indices.fill_null(0).to_numpy().astype(np.int64))
    values = np.concatenate(parts) if parts else np.empty(0, np.int64)
    return np.unique(values, return_inverse=True)[1] if values.dtype.kind == "f" else values.astype(np.int64)


def _is_listed(column: pa.ChunkedArray, subset: np.ndarray) -> np.ndarray:
    """Say which uids of a shard are in a sorted subset (u8, u8), bool."""
    uids = [records.uid_bytes(uid) for uid in column.to_pylist()]
    own = uid_pairs([uid or bytes(16) for uid in uids])
    place = np.minimum(np.searchsorted(subset, own), len(subset) - 1) if len(subset) else np.zeros(len(own), np.int64)
    return np.array([uid is not None for uid in uids], bool) & (subset[place] == own if len(subset) else False)


def _half_numbers(chunk: pa.Array) -> np.ndarray:
    """Read the first 8 bytes of 16-byte values as numbers i64 >= 0; a null is 0."""
    filled = pa.concat_arrays([chunk.fill_null(bytes(16))])
    halves = np.frombuffer(filled.buffers()[1], "<i8").reshape(-1, 2)
    return halves[filled.offset : filled.offset + len(filled), 0] & np.int64(2**63 - 1)
