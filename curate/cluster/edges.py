"""The near-duplicate edges of a clustered pool: rows gathered by cluster, compared, and joined into one file.

Shards hold rows in the order of the pool, near-duplicates are looked for inside clusters. So each shard's vectors are
first scattered by bucket, cluster modulo the number of buckets, under `CLU/.buckets`: one file a shard, one record
batch a bucket. A worker then gathers one bucket from all files, sorts it by cluster, and writes the maximum spanning
forest of each cluster's near-duplicates. With two neighbours a row also probes its second nearest cluster, as queries
of an inverted-file index do: it is compared with that cluster's members. A pair can then meet twice, and the edges of
all clusters are reduced to one forest over the whole pool, for which the driver holds them all.

Cost: the vectors are written once and read once; comparing is `near_pairs`'. Memory: one bucket (about 128 MiB, or on
disk where it is much larger) for each worker.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from curate.storage import manifest, paths, sidecar
from curate.storage.schema import EDGE_SCHEMA
from curate.vectors import forest, kmeans, near_pairs
from curate.vectors.duplicate_forest import near_duplicate_forest

EDGES, BUCKETS = "edges.arrow", ".buckets"
BUCKET_BYTES = 128 << 20
RECALL_LEVELS = (0.85, 0.90, 0.95, 0.98)
RECALL_ROWS = 512  # of the sample, compared at a time
RECALL_PAIRS = 50_000  # that are enough


def scatter_schema(dim: int) -> pa.Schema:
    """Describe a scattered row: its global number, a cluster, whether it only probes it, its hash and its vector."""
    return pa.schema(
        [
            ("row", pa.int64()),
            ("cluster", pa.int32()),
            ("probe", pa.bool_()),
            ("phash", pa.uint64()),
            ("vector", pa.list_(pa.float16(), dim)),
        ]
    )


def scatter(
    location: str, source: manifest.Artefact, stem: str, first_row: int, places: np.ndarray, buckets: int
) -> None:
    """Write a shard's good rows with their vectors, one record batch for each bucket.

    places: i32 [1 or 2, rows], the cluster of which a row is a member and the one that it probes; -1: none.
    """
    probe, row = np.nonzero(places >= 0)
    cluster = places[probe, row]
    order = np.argsort(cluster % buckets, kind="stable")
    bounds = np.searchsorted(cluster[order] % buckets, np.arange(buckets + 1))
    shard = list(source.batches(stem))
    hashes = source.table(stem, ["phash"])["phash"]
    schema = scatter_schema(sidecar.vectors(shard[0].column("image_embedding")).shape[1])

    def batches() -> Iterator[pa.RecordBatch]:
        for first, last in zip(bounds[:-1], bounds[1:], strict=True):
            here = order[first:last]
            vectors = sidecar.take_vectors(shard, "image_embedding", row[here])
            phash = hashes.take(pa.array(row[here])).combine_chunks()
            columns = [pa.array(row[here] + first_row), pa.array(cluster[here]), pa.array(probe[here] == 1), phash]
            yield pa.record_batch([*columns, sidecar.vector_column(vectors, np.ones(len(here), bool))], schema=schema)

    sidecar.write_table(location, schema, batches())


@dataclass
class FindEdges:
    """Find the near-duplicate forests of all clusters of a bucket."""

    emb: str
    out: str
    floor: float

    def setup(self) -> None:
        """List the shards."""
        self.stems = manifest.open_input(self.emb).stems

    def __call__(self, bucket: int) -> dict[str, Any]:
        """Work one bucket. Returns its rows and edges."""
        parts = [
            sidecar.reader(paths.join(self.out, BUCKETS, f"{stem}.arrow")).get_batch(bucket) for stem in self.stems
        ]
        table = pa.Table.from_batches(parts)
        clusters, probes = table["cluster"].to_numpy(), table["probe"].to_numpy()
        order = np.lexsort((probes, clusters))  # of each cluster its members, then the rows that probe it, each by row
        rows, clusters = table["row"].to_numpy()[order], clusters[order]
        bounds = np.concatenate([[0], np.flatnonzero(np.diff(clusters)) + 1, [len(clusters)]])
        members = np.add.reduceat(~probes[order], bounds[:-1], dtype=np.int64) if len(rows) else None
        with _matrix(len(rows), parts[0].schema.field("vector").type.list_size) as vectors:
            start = 0
            for part in parts:
                vectors[start : start + part.num_rows] = sidecar.vectors(part.column("vector"))
                start += part.num_rows
            a, b, similarity = near_duplicate_forest(vectors, order, bounds, self.floor, members=members)
        hashes, unknown = _hashes(table["phash"], order)
        bits = pa.array(near_pairs.differing_bits(hashes[a], hashes[b]), pa.uint8(), mask=unknown[a] | unknown[b])
        ends = np.minimum(rows[a], rows[b]), np.maximum(rows[a], rows[b])
        columns = [pa.array(clusters[a]), *map(pa.array, ends), pa.array(similarity), bits]
        found = pa.record_batch(columns, schema=EDGE_SCHEMA)
        sidecar.write_table(paths.join(self.out, BUCKETS, f"edges-{bucket}.arrow"), EDGE_SCHEMA, [found])
        return {"rows": len(rows), "edges": len(a)}


class _matrix:
    """An f16 matrix in memory, or on disk where it is larger than a few buckets (a giant cluster)."""

    def __init__(self, rows: int, dim: int) -> None:
        self.shape = (rows, dim)
        self.file = tempfile.TemporaryFile() if rows * dim * 2 > 8 * BUCKET_BYTES else None

    def __enter__(self) -> np.ndarray:
        if self.file is None:
            return np.empty(self.shape, np.float16)
        return np.memmap(self.file, np.float16, "w+", shape=self.shape)

    def __exit__(self, *_: object) -> None:
        if self.file is not None:
            self.file.close()


def _hashes(column: pa.ChunkedArray, order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return perceptual hashes u64 in the given order, and which are unknown."""
    unknown = column.is_null().to_numpy()[order]
    return column.fill_null(0).to_numpy()[order], unknown


def missing(output: manifest.Output, buckets: int) -> list[int]:
    """List the buckets whose edges are not there yet. One listing."""
    present = set(paths.listdir(output.path(BUCKETS)))
    return [bucket for bucket in range(buckets) if f"edges-{bucket}.arrow" not in present]


def join_edges(output: manifest.Output, buckets: int, neighbours: int) -> None:
    """Write the buckets' edges into one file: bucket after bucket, or, where clusters overlap, as one forest by row."""
    scattered = output.path(BUCKETS)
    parts = (batch for b in range(buckets) for batch in sidecar.batches(paths.join(scattered, f"edges-{b}.arrow")))
    if neighbours == 1:
        sidecar.write_table(output.path(EDGES), EDGE_SCHEMA, parts)
        return
    table = pa.Table.from_batches(parts, EDGE_SCHEMA)
    a, b = table["a"].to_numpy(), table["b"].to_numpy()
    order = np.lexsort((b, a))
    met_before = np.append(False, (np.diff(a[order]) == 0) & (np.diff(b[order]) == 0))[: len(order)]
    order = order[~met_before]  # two rows may meet in both their clusters; a forest takes a pair once
    chosen = order[
        forest.spanning_forest(a[order], b[order], table["similarity"].to_numpy()[order], int(b.max(initial=-1)) + 1)
    ]
    sidecar.write_table(output.path(EDGES), EDGE_SCHEMA, table.take(pa.array(chosen)).combine_chunks().to_batches())


def recall(images_nd: np.ndarray, centroids_kd: np.ndarray, neighbours: int, floor: float) -> dict[str, Any]:
    """Estimate how many of the pool's near pairs share a cluster, so that they were compared, against brute force.

    images_nd: f16, a sample of the pool in random order. Compares rows with the whole sample until there are pairs
    enough. Returns the rows compared, and for levels of cosine the pairs above and the share of them that was found.
    """
    levels = [floor, *(level for level in RECALL_LEVELS if level > floor)]
    places = kmeans.nearest_two(images_nd, centroids_kd)[0] if len(centroids_kd) > 1 else None
    pairs, found = np.zeros(len(levels), np.int64), np.zeros(len(levels), np.int64)
    compared = 0
    while compared < len(images_nd) and pairs[0] < RECALL_PAIRS:
        rows = np.arange(compared, len(images_nd))
        chunk = min(RECALL_ROWS, len(rows))  # compared with all rows from here on: no pair is counted twice
        for a, b, cosine in near_pairs.near_pairs(images_nd, rows, [0, len(rows)], floor, members=np.array([chunk])):
            met = np.ones(len(a), bool)
            if places is not None:
                home, other = places
                a, b = rows[a], rows[b]
                met = home[a] == home[b]
                if neighbours == 2:
                    met |= (home[a] == other[b]) | (other[a] == home[b])
            pairs += [int((cosine > level).sum()) for level in levels]
            found += [int((met & (cosine > level)).sum()) for level in levels]
        compared += chunk
    shares = [
        {"above": level, "pairs": int(all_), "found": round(int(some) / int(all_), 4) if all_ else None}
        for level, all_, some in zip(levels, pairs, found, strict=True)
    ]
    return {"sample": len(images_nd), "compared": compared, "levels": shares}
