"""Assign every row to its nearest centroid: clusters go to the shard's sidecar, vectors to buckets of clusters.

In: `EMB/{stem}.arrow`, read once, and `CLU/centroids.npy`. Out: `CLU/{stem}.arrow` for each shard, and one file of
scattered vectors for each part of the pool (`scatter`). Cost: 2 k d operations a row.
"""

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from curate.cluster import scatter
from curate.engine import advance
from curate.errors import ContractError
from curate.storage import paths, sidecar, whole_files
from curate.storage.manifest import open_input
from curate.storage.schema import CENTROIDS, CLUSTER_SCHEMA
from curate.vectors import kmeans, on_device


def is_ok(table: pa.Table) -> np.ndarray:
    """Return which rows of an embedding sidecar are good, bool, from its column `status`."""
    return np.asarray(sidecar.codes(table["status"], ["ok"]) == 0)


def digest(centroids_kd: np.ndarray) -> str:
    """Fingerprint centroids: blake2b-128 in hex over their numbers."""
    return hashlib.blake2b(np.ascontiguousarray(centroids_kd).tobytes(), digest_size=16).hexdigest()


@dataclass
class Assign:
    """Assign the rows of a part of the pool to centroids, write its shards' sidecars, and scatter its vectors.

    kept: shards that are already assigned to these centroids in the directory `home`; they are only scattered.
    """

    emb: str
    out: str
    buckets: int
    neighbours: int
    home: str = ""
    kept: frozenset[str] = frozenset()
    gpu: bool = False  # use one where the worker sees one

    def setup(self) -> None:
        """Load the centroids."""
        on = on_device.device() if self.gpu else None
        self.source = open_input(self.emb)
        self.centroids = sidecar.load_npy(paths.join(self.out, CENTROIDS))
        self.facts = {"centroids": digest(self.centroids), "device": on_device.describe(on or "cpu")}
        self.find = kmeans.finder(self.centroids, self.neighbours, on)
        rows = self.source.rows
        self.parts = scatter.parts(rows)
        self.first_row = dict(zip(rows, np.cumsum([0, *rows.values()]).tolist(), strict=False))

    def __call__(self, part: str) -> dict[str, Any]:
        """Process one part, named by its first stem. Returns rows and good rows."""
        tables = self.source.sidecars.tables(["status", "phash", "image_embedding"], self.parts[part])
        shards = [_columns(stem, table, self.centroids.shape[1]) for stem, table in tables]
        found = [self._shard(stem, *shard[:2]) for stem, shard in zip(self.parts[part], shards, strict=True)]
        places = np.concatenate([places for places, _ in found], axis=1)
        vectors = np.concatenate([vectors for _, vectors, _ in shards])
        phash = pa.concat_arrays([phash for _, _, phash in shards])
        with whole_files.together():
            where = scatter.location(self.out, part)
            scatter.write(where, places, self.first_row[part], vectors, phash, self.buckets)
            for stem, (_, table) in zip(self.parts[part], found, strict=True):
                if stem in self.kept:
                    continue
                good = table.num_rows - table["centroid_similarity"].null_count
                facts = {"rows": table.num_rows, "ok": good, **self.facts}
                sidecar.write_table(paths.join(self.out, f"{stem}.arrow"), CLUSTER_SCHEMA, [table], facts)
        return {"rows": places.shape[1], "ok": int((places[0] >= 0).sum())}

    def _shard(self, stem: str, ok: np.ndarray, vectors: np.ndarray) -> tuple[np.ndarray, pa.RecordBatch | pa.Table]:
        """Assign one shard. Returns i32 [neighbours, rows], -1 for bad rows, and the columns of its sidecar."""
        if stem in self.kept and self.neighbours == 1:
            stands = sidecar.table(paths.join(self.home, f"{stem}.arrow"))
            advance(len(ok))
            return stands["cluster"].to_numpy()[None], stands
        nearest, similarity = self.find(vectors)
        advance(len(ok))
        places = np.array(nearest, ndmin=2)
        places[:, ~ok] = -1
        columns = [pa.array(places[0]), pa.array(similarity, mask=~ok)]
        return places, pa.record_batch(columns, schema=CLUSTER_SCHEMA)


def _columns(stem: str, table: pa.Table, dim: int) -> tuple[np.ndarray, np.ndarray, pa.Array]:
    """Tell which rows of a shard are good, bool [n], its image vectors f16 [n, dim], and its perceptual hashes."""
    batches = table.to_batches()
    width = table.schema.field("image_embedding").type.list_size
    if width != dim:
        raise ContractError(f"{stem}.arrow has {width} dimensions, the centroids {dim}")
    parts = [np.empty((0, dim), np.float16), *(sidecar.vectors(batch["image_embedding"]) for batch in batches)]
    phash = pa.concat_arrays([pa.array([], pa.uint64()), *table["phash"].chunks])
    return is_ok(table), parts[1] if len(batches) == 1 else np.concatenate(parts), phash
