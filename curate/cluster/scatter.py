"""Scatter the vectors of a pool to buckets of clusters: the external sort between assigning and comparing.

Shards hold rows in the order of the pool; near-duplicates are searched inside clusters. Assigning therefore writes
every good row's vector a second time, under `CLU/.buckets`: one file for each part of the pool (a few consecutive
shards) with one record batch for each bucket, which is cluster modulo the number of buckets. Within a batch, rows are
sorted by cluster, then members before rows that probe the cluster, then by row. A worker gathers a bucket by reading
its batch from each file, one after another, so that nothing is held open.

Tiny shards are combined, into parts of about a thousand rows if there are many, and there are at most 8,192 files: a
pool of a quarter million large shards is processed in parts of some thirty.
Cost: the vectors are written once and read once, and take their size on disk meanwhile. Memory: one part's vectors.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from curate.storage import paths, ranges, sidecar
from curate.vectors.duplicate_forest import row_hashes

BUCKETS = ".buckets"
MAX_FILES = 8192
PART_ROWS, MANY = 1024, 256  # rows of a part, if that gives at least this many parts


def parts(rows: Mapping[str, int]) -> dict[str, list[str]]:
    """Cut a pool's shards into parts of about as many rows, each named by its first stem."""
    total = sum(rows.values())
    least = max(-(-total // MAX_FILES), min(PART_ROWS, total // MANY))
    found: dict[str, list[str]] = {}
    here: list[str] = []
    held = 0
    for stem, count in rows.items():
        if not here or (held + count > least and len(found) < MAX_FILES):
            here, held = [], 0
            found[stem] = here
        here.append(stem)
        held += count
    return found


def is_scratch(name: str) -> bool:
    """Say whether a file is one that this version writes to BUCKETS."""
    return name.startswith(("part-", "edges-", "giant-", "block-")) or name.endswith(".tmp")


def location(out: str, part: str) -> str:
    """Locate the scattered vectors of a part."""
    return paths.join(out, BUCKETS, f"part-{part}.arrow")


def missing(out: str, named: Sequence[str]) -> list[str]:
    """List the parts whose vectors are not scattered yet. One listing."""
    present = set(paths.listdir(paths.join(out, BUCKETS)))
    return [part for part in named if f"part-{part}.arrow" not in present]


def schema(dim: int) -> pa.Schema:
    """Describe a scattered row: its global number, a cluster, whether it only probes it, its hashes, its vector."""
    return pa.schema(
        [
            ("row", pa.int64()),
            ("cluster", pa.int32()),
            ("probe", pa.bool_()),
            ("phash", pa.uint64()),
            ("vector_hash", pa.uint64()),
            ("vector", pa.list_(pa.float16(), dim)),
        ]
    )


@dataclass
class Rows:
    """Rows of one bucket, without their vectors. phash is 0 where `unknown`."""

    row: np.ndarray  # i64 [n]
    cluster: np.ndarray  # i32 [n]
    probe: np.ndarray  # bool [n]
    phash: np.ndarray  # u64 [n]
    unknown: np.ndarray  # bool [n]
    vector_hash: np.ndarray  # u64 [n]

    def __getitem__(self, chosen: np.ndarray) -> "Rows":
        return Rows(**{name: column[chosen] for name, column in vars(self).items()})


def write(where: str, places: np.ndarray, first_row: int, vectors: np.ndarray, phash: pa.Array, buckets: int) -> None:
    """Scatter a part. places: i32 [1 or 2, n], the cluster of which a row is a member and the one it probes, or -1.

    first_row: the part's first global row. vectors: f16 [n, d]. phash: u64 [n], null where unknown.
    """
    probe, row = np.nonzero(places >= 0)
    cluster = places[probe, row]
    order = np.lexsort((row, probe, cluster, cluster % buckets))
    bounds = np.searchsorted(cluster[order] % buckets, np.arange(buckets + 1))
    hashes, described = row_hashes(vectors), schema(vectors.shape[1])

    def batches() -> Iterator[pa.RecordBatch]:
        for first, last in zip(bounds[:-1], bounds[1:], strict=True):
            here = order[first:last]
            rows = row[here]
            columns = [pa.array(rows + first_row), pa.array(cluster[here]), pa.array(probe[here] == 1)]
            columns += [phash.take(pa.array(rows)), pa.array(hashes[rows])]
            columns.append(sidecar.vector_column(vectors[rows], np.ones(len(rows), bool)))
            yield pa.record_batch(columns, schema=described)

    sidecar.write_table(where, described, batches())


def dimensions(out: str, part: str) -> int:
    """Read the dimensions of the scattered vectors."""
    return int(sidecar.schema(location(out, part)).field("vector").type.list_size)


def read_rows(out: str, named: Sequence[str], bucket: int) -> Rows:
    """Read a bucket's rows without their vectors, part by part: in the order in which `read_vectors` yields them."""
    columns = [name for name in schema(1).names if name != "vector"]
    found: list[Rows] = []
    for batch in _batches(out, named, bucket, columns):
        phash = batch["phash"]
        found.append(
            Rows(
                batch["row"].to_numpy(),
                batch["cluster"].to_numpy(),
                batch["probe"].to_numpy(zero_copy_only=False),
                phash.fill_null(0).to_numpy(),
                phash.is_null().to_numpy(zero_copy_only=False),
                batch["vector_hash"].to_numpy(),
            )
        )
    names: Any = vars(found[0])
    return Rows(**{name: np.concatenate([getattr(rows, name) for rows in found]) for name in names})


def read_vectors(out: str, named: Sequence[str], bucket: int) -> Iterator[np.ndarray]:
    """Yield a bucket's vectors, f16 [m, d], part by part."""
    for batch in _batches(out, named, bucket, ["vector"]):
        yield sidecar.vectors(batch["vector"])


def _batches(out: str, named: Sequence[str], bucket: int, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Read some columns of a bucket from each part. Nothing is mapped; from remote files only ranges are read."""
    names = schema(1).names
    return ranges.ahead(out, lambda part: sidecar.batch(location(out, part), bucket, columns, names), named)
