"""The rows of imported embeddings, one sidecar at a time: a part of the source, or a shard of the pool joined to it.

In: a part's vectors and table, or a shard's samples and the index that join.py made of the source. Out: one
`EMB/{stem}.arrow`. published.py decides which there are, and accounts for them.
"""

import functools
import hashlib
from collections import Counter
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import pyarrow as pa

from curate import engine
from curate.embed import reader
from curate.embed.side_data import Extras, column_name, to_column_value
from curate.errors import ShardError
from curate.ingest import layouts
from curate.ingest.join import ROW_BITS, join_hash
from curate.storage import faults, manifest, members, paths, records, sidecar, tar
from curate.storage.json_files import file_digest
from curate.storage.schema import STATUSES, embedding_schema
from curate.vectors import exact

CHUNK_ROWS, OPEN_PARTS = 65_536, 4


def unit_rows(x_nd: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Normalise rows to f16 [n, d]; also returns which are sound (finite, not zero); the others become zero."""
    with np.errstate(all="ignore"):
        exponents = np.frexp(np.abs(x_nd).max(axis=1, keepdims=True, initial=0))[1]  # 1e20 squared is no number of f32
        x = np.ldexp(np.asarray(x_nd, np.float32), -exponents)
        norms = np.linalg.norm(x, axis=1, keepdims=True)
        sound = np.isfinite(norms) & (norms > 0)
        return np.where(sound, x / norms, 0).astype(np.float16), sound[:, 0]


def _vector_columns(image_nd: np.ndarray, text_nd: np.ndarray | None, ok: np.ndarray) -> dict[str, pa.Array]:
    """Build the vector columns and their score from unit rows f16 [n, d]; without text vectors, two are null."""
    none = np.zeros(len(ok), bool)
    text = np.zeros_like(image_nd) if text_nd is None else text_nd
    has_text = none if text_nd is None else ok
    return {
        "image_embedding": sidecar.vector_column(image_nd, ok),
        "text_embedding": sidecar.vector_column(text, has_text),
        "clip_score": pa.array(exact.cosines(image_nd, text), pa.float32(), mask=~has_text),
    }


@dataclass
class ImportPart:
    """The task without a pool: one part of the source to one sidecar."""

    parts: dict[str, layouts.Part]
    out: str
    extra: Extras

    def setup(self) -> None:
        """Nothing is shared between parts."""

    def __call__(self, stem: str) -> dict[str, Any]:
        """Import a part in chunks, however large it is."""
        table = self._open(stem)
        starts = range(0, max(1, table.rows), CHUNK_ROWS)  # one batch at least
        bad = sum(int((~self._vectors(table, start)[2]).sum()) for start in starts)
        statuses = {name: count for name, count in (("ok", table.rows - bad), ("bad_embedding", bad)) if count}
        dim = table.image.shape[1]
        schema = embedding_schema(dim, self.extra.fields)
        found = _text_faults(stem, table)
        if table.text is None and any(part.text for part in self.parts.values()):
            faults.add(
                found, "rows without text vectors: their part lacks the file that other parts have", stem, table.rows
            )
        meta = {"rows": table.rows, "statuses": statuses, "dim": dim, **({"faults": found} if found else {})}
        meta["digest"] = file_digest(*self.parts[stem].files)
        batches = (self._batch(stem, table, schema, start) for start in starts)
        sidecar.write_table(paths.join(self.out, f"{stem}.arrow"), schema, batches, meta)
        return {"rows": table.rows, "bad": bad}

    def _open(self, stem: str) -> layouts.Table:
        """Open a part; if it has no vector at all, it gets the dimensions of the others.

        Raises: ShardError if the part lacks the table that others have: its rows would get made-up keys.
        """
        part = self.parts[stem]
        if not part.table and any(other.table for other in self.parts.values()):
            raise ShardError(f"{part.image} has no table beside it, which the other parts have: get that file, too")
        table = layouts.open_part(part, tuple(self.extra.columns))
        if not table.image.shape[1]:
            others = (layouts.open_part(other).image.shape[1] for name, other in self.parts.items() if name != stem)
            dim = next((found for found in others if found), 0)
            if not dim:
                raise ShardError(f"{part.image} has no vectors, and no other part has")
            table.image = np.full((table.rows, dim), np.nan, np.float32)
        return table

    def _vectors(self, table: layouts.Table, start: int) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
        image, ok = unit_rows(table.image[start : start + CHUNK_ROWS])
        if table.text is None:
            return image, None, ok
        text, sound = unit_rows(table.text[start : start + CHUNK_ROWS])
        return image, text, ok & sound

    def _batch(self, stem: str, table: layouts.Table, schema: pa.Schema, start: int) -> pa.RecordBatch:
        image, text, ok = self._vectors(table, start)
        columns = _vector_columns(image, text, ok)
        columns["status"] = sidecar.labels(np.where(ok, "ok", "bad_embedding"), list(STATUSES))
        given = {name: column.slice(start, len(ok)).to_pylist() for name, column in table.columns.items()}
        for name in ("key", "caption", "url"):
            take = layouts.name_of if name == "key" else layouts.text_of
            texts = [take(value) for value in given.get(name, [None] * len(ok))]
            if name == "key":
                texts = [text or f"{stem}_{start + row:09d}" for row, text in enumerate(texts)]
            columns[name] = pa.array(texts, pa.string())
        for name in ("width", "height"):
            columns[name] = pa.array([_side(value) for value in given.get(name, [None] * len(ok))], pa.int32())
        columns["uid"] = pa.array(
            [records.uid_bytes(value) for value in given.get("uid", [None] * len(ok))], pa.binary(16)
        )
        for name in ("phash", "detail", "writing", "members"):
            columns[name] = pa.nulls(len(ok), schema.field(name).type)
        for name, kind in self.extra.columns.items():
            values = [to_column_value(value, kind) for value in given.get(name, [None] * len(ok))]
            columns[column_name(name)] = pa.array(values, self.extra.fields[column_name(name)])
        return pa.RecordBatch.from_arrays([columns[name] for name in schema.names], schema=schema)


def _text_faults(stem: str, table: layouts.Table) -> faults.Faults:
    """Count rows that are named by their number, and captions and urls that are not text."""
    found: faults.Faults = {}
    keys = table.columns.get("key")
    unnamed = table.rows if keys is None else sum(layouts.name_of(value) is None for value in keys.to_pylist())
    if unnamed:
        faults.add(found, "rows without a usable key: named by part and row number", stem, unnamed)
    for name in ("caption", "url"):
        for row, value in enumerate(table.columns[name].to_pylist() if name in table.columns else []):
            if value not in (None, "", b"", []) and layouts.text_of(value) is None:
                faults.add(found, f"values of {name} that are not text: left out", f"{stem}: row {row}")
    return found


def _side(value: Any) -> int | None:
    """Take a width or height that fits the column, whatever type the source gave it."""
    number = isinstance(value, int | float) and value == value
    return int(value) if number and 0 < value < 1 << 31 else None


@dataclass
class ImportShard:
    """The task with a pool: one of its shards to one sidecar, with vectors from wherever they lie in the source."""

    parts: list[layouts.Part]
    found: dict[str, tar.Shard]
    folder: str
    join: str
    form: str
    max_pixels: int
    out: str
    extra: Extras

    def setup(self) -> None:
        """Map the index of the source."""
        self.hashes = np.load(f"{self.folder}/hashes.npy", mmap_mode="r")
        self.places = np.load(f"{self.folder}/places.npy", mmap_mode="r")
        self.open = functools.lru_cache(OPEN_PARTS)(
            lambda number: layouts.open_part(self.parts[number], tuple(self.extra.columns))
        )

    def __call__(self, stem: str) -> dict[str, Any]:
        """Import the rows of one shard."""
        shard = self.found[stem]
        with tar.local_tar(shard.location) as path, open(path, "rb") as file:
            index = tar.read_index(file)
            none = self.extra.values()
            facts = []
            for sample in index.samples:
                facts.append(reader.read_row(file, sample, self.max_pixels)[0] | none)
                engine.advance(1)
            given = [self._value(file, sample) for sample in index.samples]
            content = tar.content_digest(shard, path)
        tar.refuse_changed(shard)
        wanted = np.array([join_hash(value, self.join, self.form) or 0 for value in given], np.uint64)
        at = np.minimum(np.searchsorted(self.hashes, wanted), len(self.hashes) - 1)
        matched = (wanted > 0) & (self.hashes[at] == wanted)
        image, text, ok = self._gather(facts, np.where(matched, self.places[at], -1))
        for row, fact in enumerate(facts):
            status = _status(fact, bool(matched[row]), bool(ok[row]), has_text=text is not None)
            fact |= {"status": status, "reason": fact.get("reason", "") if status == fact["status"] else ""}
        ok = np.array([fact["status"] == "ok" for fact in facts])
        columns = _vector_columns(image, text, ok)
        columns["status"] = sidecar.labels([fact["status"] for fact in facts], list(STATUSES))
        columns["members"] = members.column(index, shard.size)
        schema = embedding_schema(image.shape[1], self.extra.fields)
        scalars = ("key", "uid", "phash", "caption", "width", "height", "url", "detail", "writing")
        for name in (*scalars, *self.extra.fields):
            columns[name] = pa.array([fact[name] for fact in facts], schema.field(name).type)
        statuses = dict(Counter(fact["status"] for fact in facts))
        meta = {
            "rows": len(facts),
            "size": shard.size,
            "statuses": statuses,
            "dim": image.shape[1],
            "digest": content,
            "source": self._fingerprint(facts, image, text),
            "matched": int(matched.sum()),
            "example": next((str(value) for value in given if value), ""),
            "notes": index.notes,
        }
        bad = {"reasons": reader.reasons(facts), "faults": reader.row_faults(stem, facts)}
        meta |= {name: told for name, told in bad.items() if told}
        batch = pa.RecordBatch.from_arrays([columns[name] for name in schema.names], schema=schema)
        sidecar.write_table(paths.join(self.out, f"{stem}.arrow"), schema, [batch], meta)
        return {"rows": len(facts), "bad": len(facts) - statuses.get("ok", 0)}

    def _fingerprint(self, facts: list[dict[str, Any]], image: np.ndarray, text: np.ndarray | None) -> str:
        """Fingerprint what a shard's rows take from the source, which may change while the tar does not."""
        found = hashlib.blake2b(image.tobytes() + (b"" if text is None else text.tobytes()), digest_size=16)
        values = [[fact[name] for name in ("caption", *self.extra.fields)] for fact in facts]
        return manifest.digest([found.hexdigest(), values])

    def _value(self, file: IO[bytes], sample: tar.Sample) -> Any:
        """Find the value that a sample is joined by; a sha256 missing in its JSON is computed from the image."""
        if self.join == "key":
            return sample.key
        value = tar.describe(file, sample).get(self.join)
        if value is None and self.join == "sha256" and sample.image is not None:
            data = reader.read_bytes(file, sample.image)
            return hashlib.sha256(data).hexdigest() if data else None
        return value

    def _gather(
        self, facts: list[dict[str, Any]], places: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
        """Fetch vectors by place (−1: none): unit rows f16 [n, d], and which rows have sound ones.

        Captions that the pool lacks, and the extra columns, are taken from the source.
        """
        sample = self.open(0)
        image = np.zeros((len(facts), sample.image.shape[1]), np.float16)
        text = None if sample.text is None else np.zeros_like(image)
        ok = np.zeros(len(facts), bool)
        for number in np.unique(places[places >= 0] >> ROW_BITS):
            table = self.open(int(number))
            if table.image.shape[1] != image.shape[1] or (table.text is None) != (text is None):
                raise ShardError(f"{self.parts[number].image} is not from the same model as {self.parts[0].image}")
            at = np.flatnonzero((places >= 0) & (places >> ROW_BITS == number))
            rows_there = places[at] & ((1 << ROW_BITS) - 1)
            image[at], ok[at] = unit_rows(table.image[rows_there])
            if text is not None and table.text is not None:
                text[at], sound = unit_rows(table.text[rows_there])
                ok[at] &= sound
            for name, kind in self.extra.columns.items():
                held = table.columns[name].take(pa.array(rows_there)).to_pylist() if name in table.columns else []
                for row, value in zip(at, held, strict=False):
                    facts[row][column_name(name)] = to_column_value(value, kind)
            captions = table.columns.get("caption")
            for row, there in zip(at, rows_there, strict=True):
                if facts[row]["caption"] is None and captions is not None:
                    facts[row]["caption"] = layouts.text_of(captions[int(there)].as_py())
        return image, text, ok


def _status(fact: dict[str, Any], matched: bool, sound: bool, *, has_text: bool) -> str:
    """Decide a row's status: first a fault in the pool, then a missing partner, then a fault of the partner."""
    status = str(fact["status"])
    if status == "no_caption" and (fact["caption"] is not None or not has_text):
        status = "ok"
    if status != "ok":
        return status
    return "unmatched" if not matched else "ok" if sound else "bad_embedding"
