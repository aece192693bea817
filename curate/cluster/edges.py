"""The near-duplicate edges of a clustered pool: buckets of clusters compared, and joined into one file.

A worker gathers one bucket of clusters from the scattered vectors (`scatter`), sorts it by cluster, and writes the
maximum spanning forest of each cluster's near-duplicates. Clusters that are too large for one worker are cut into
blocks (`giants`). With two neighbours a row also probes its second nearest cluster, as queries of an inverted-file
index do: it is compared with that cluster's members. A pair can then meet twice, and the edges of all clusters are
reduced to one forest over the whole pool, for which the driver holds them all.

Cost: the vectors are read once; comparing is `near_pairs`'. Memory: one bucket (about 128 MiB, or on disk where it is
much larger) for each worker, and as much again for the chunks of a giant cluster.
"""

import tempfile
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from curate.cluster import giants, scatter
from curate.cluster.giants import Chunks
from curate.cluster.scatter import BUCKETS, Rows
from curate.engine import advance
from curate.errors import ContractError
from curate.storage import manifest, paths, ranges, sidecar
from curate.storage.schema import EDGE_SCHEMA, EDGES
from curate.vectors import forest, near_pairs
from curate.vectors.duplicate_forest import near_duplicate_forest
from curate.vectors.forest import Edges
from curate.vectors.near_pairs import is_worth_rounding

BUCKET_BYTES = 128 << 20
RUN_ROWS = 1 << 15  # rows of clusters between two reports of progress within a bucket


@dataclass
class FindEdges:
    """Find the near-duplicate forests of all clusters of a bucket; cut giant ones into chunks."""

    emb: str
    out: str
    floor: float
    product: str = "f32"  # by which large clusters are screened
    chunk_rows: dict[int, int] = field(default_factory=dict)  # of each giant cluster

    def setup(self) -> None:
        """List the files of scattered vectors."""
        self.parts = list(scatter.parts(manifest.open_input(self.emb).rows))

    def __call__(self, bucket: int) -> dict[str, Any]:
        """Process one bucket. Returns its rows and edges."""
        rows = scatter.read_rows(self.out, self.parts, bucket)
        # Of each cluster its members, then the rows that probe it, each in the order of rows, which is that of reading.
        order = np.lexsort((rows.probe, rows.cluster))
        is_giant = np.isin(rows.cluster, list(self.chunk_rows))
        cut = self._giants(rows, order[is_giant[order]])
        order = order[~is_giant[order]]
        place = np.full(len(is_giant), -1)
        place[~is_giant] = np.arange(len(order))
        with _matrix(len(order), scatter.dimensions(self.out, self.parts[0])) as vectors:
            start = 0
            for part in scatter.read_vectors(self.out, self.parts, bucket):
                here = slice(start, start + len(part))
                start = here.stop
                kept = place[here]
                vectors[kept[kept >= 0]] = part[kept >= 0]
                for number, (chunks, at) in cut.items():
                    mine = rows.cluster[here] == number
                    if mine.any():
                        chunks.add(at[here][mine], part[mine])
            found = self._compare(rows[order], vectors, place[order])
        meta = {"giants": {str(number): chunks.finish() for number, (chunks, _) in cut.items()}}
        sidecar.write_table(edges_path(self.out, bucket), EDGE_SCHEMA, [found], meta)
        return {"rows": len(is_giant), "edges": found.num_rows}

    def _giants(self, rows: Rows, order: np.ndarray) -> dict[int, tuple[Chunks, np.ndarray]]:
        """Begin the chunks of the giants in a bucket. Returns with them the places of the bucket's rows, or -1."""
        found = {}
        for number in np.unique(rows.cluster[order]).tolist():
            here = order[rows.cluster[order] == number]
            at = np.full(len(rows.cluster), -1)
            at[here] = np.arange(len(here))
            found[int(number)] = Chunks(self.out, int(number), rows[here], self.chunk_rows[number]), at
        return found

    def _compare(self, rows: Rows, vectors: np.ndarray, order: np.ndarray) -> pa.RecordBatch:
        """Find the edges of rows that lie cluster by cluster. order: their places in `vectors`."""
        bounds = np.concatenate([[0], np.flatnonzero(np.diff(rows.cluster)) + 1, [len(order)]])
        members = np.add.reduceat(~rows.probe, bounds[:-1], dtype=np.int64) if len(order) else np.zeros(1, np.int64)
        product = self.product if is_worth_rounding(vectors.shape[1], np.diff(bounds), members) else "f32"
        found = [(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))]
        for first, last in near_pairs.batches_of_groups(bounds, RUN_ROWS):
            cuts, own = bounds[first : last + 1], members[first:last]
            found.append(near_duplicate_forest(vectors, order, cuts, self.floor, members=own, product=product))
            advance(int(cuts[-1] - cuts[0]))
        a, b, similarity = (np.concatenate(column) for column in zip(*found, strict=True))
        return edge_batch(rows, (a, b, similarity))


def edge_batch(rows: Rows, edges: Edges) -> pa.RecordBatch:
    """Describe edges by places in `rows` as a batch of EDGE_SCHEMA."""
    a, b, similarity = edges
    bits = near_pairs.differing_bits(rows.phash[a], rows.phash[b])
    ends = np.minimum(rows.row[a], rows.row[b]), np.maximum(rows.row[a], rows.row[b])
    columns = [pa.array(rows.cluster[a]), *map(pa.array, ends), pa.array(similarity)]
    columns.append(pa.array(bits, pa.uint8(), mask=rows.unknown[a] | rows.unknown[b]))
    return pa.record_batch(columns, schema=EDGE_SCHEMA)


class _matrix:
    """An f16 matrix in memory, or on disk where it is larger than a few buckets."""

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


def edges_path(out: str, bucket: int) -> str:
    """Locate the edges of a bucket."""
    return paths.join(out, BUCKETS, f"edges-{bucket}.arrow")


def missing(output: manifest.Output, buckets: int) -> list[int]:
    """List the buckets whose edges are not there yet. One listing."""
    present = set(paths.listdir(output.path(BUCKETS)))
    return [bucket for bucket in range(buckets) if f"edges-{bucket}.arrow" not in present]


def are_joined(output: manifest.Output) -> bool:
    """Say whether this run or another slice has joined the edges; the buckets are then removed."""
    return paths.exists(output.path(EDGES)) or output.overtaken()


def blocks(output: manifest.Output, buckets: int) -> list[giants.Block]:
    """List the blocks of the giant clusters, as the buckets record them; none once these are removed at the end."""
    try:
        places = [edges_path(output.directory, bucket) for bucket in range(buckets)]
        facts = list(ranges.ahead(output.directory, sidecar.facts, places))
    except ContractError:
        if are_joined(output):
            return []
        raise
    return giants.blocks({number: chunks for each in facts for number, chunks in each["giants"].items()})


def missing_blocks(output: manifest.Output, wanted: list[giants.Block]) -> list[giants.Block]:
    """List the blocks whose edges are not there yet. One listing."""
    present = set(paths.listdir(output.path(BUCKETS)))
    return [block for block in wanted if paths.name(giants.block_path("", block)) not in present]


def _bucket_edges(out: str, bucket: int, floor: float) -> pa.RecordBatch:
    """Read a bucket's edges, with those of its giant clusters in their places by cluster."""
    where = edges_path(out, bucket)
    parts = list(sidecar.batches(where))
    for number, chunks in sidecar.facts(where).get("giants", {}).items():
        parts.append(edge_batch(*giants.joined(out, int(number), chunks, floor)))
    table = pa.Table.from_batches([part.replace_schema_metadata() for part in parts], EDGE_SCHEMA).combine_chunks()
    if len(parts) > 1:
        table = table.take(pa.array(np.argsort(table["cluster"].to_numpy(), kind="stable"))).combine_chunks()
    return pa.record_batch([column.combine_chunks() for column in table.columns], schema=EDGE_SCHEMA)


def join_edges(output: manifest.Output, buckets: int, neighbours: int, floor: float) -> None:
    """Write the buckets' edges into one file: bucket after bucket, or, where clusters overlap, as one forest by row."""
    parts = (_bucket_edges(output.directory, bucket, floor) for bucket in range(buckets))
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
