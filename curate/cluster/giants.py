"""Split a giant cluster into many pieces of work: its rows are cut into chunks, and chunks compared two by two.

A cluster that holds a large share of all comparisons would keep one worker busy alone. Its distinct rows are therefore
written in chunks of a few thousand, and an item of work is a block: a chunk with itself, or two chunks across. Each
block gives a maximum spanning forest, and the forest of all blocks' edges is the cluster's, to the byte: the forest of
a union is the forest of the union of forests (`curate.vectors.forest`). A block of two chunks starts from the forests
of the chunks themselves, if they exist already: pairs that those connect at a higher cosine are passed over.

Files under `CLU/.buckets`: `giant-{cluster}.arrow`, all rows in their order of places (members by row, then probing
rows by row); `giant-{cluster}-{chunk}.arrow`, places and vectors of a chunk; `block-{cluster}-{i}-{j}.arrow`, the edges
of a block by places. Memory: two chunks and their forest for a worker; one cluster's forest, and as many edges again,
for the driver, which joins blocks one after another.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from curate.cluster.scatter import BUCKETS, Rows
from curate.engine import advance
from curate.storage import paths, sidecar
from curate.vectors.duplicate_forest import copies_of
from curate.vectors.exact import exact_cosines
from curate.vectors.forest import Edges, Forest
from curate.vectors.near_pairs import near_pairs

GIANT_ROWS = 1 << 14  # a cluster is cut up if it has more members than this
GIANT_SHARE = 1 / 4096  # and a larger share of all comparisons than this
CHUNK_ROWS = 1 << 13
MAX_CHUNKS = 64  # of members: at most 2,080 blocks a cluster
BLOCK_SCHEMA = pa.schema([("a", pa.int64()), ("b", pa.int64()), ("similarity", pa.float32())])
Block = tuple[int, int, int]  # a cluster, and two of its chunks


def choose(sizes: np.ndarray) -> dict[int, int]:
    """Name the clusters that are cut up, and the rows of their chunks. sizes: the members of every cluster, i64 [k]."""
    work = sizes.astype(np.float64) ** 2
    giant = np.flatnonzero((sizes > GIANT_ROWS) & (work > GIANT_SHARE * work.sum()))
    return {int(number): max(CHUNK_ROWS, -(-int(sizes[number]) // MAX_CHUNKS)) for number in giant}


class Chunks:
    """Writes a giant cluster's rows and chunks as its vectors arrive, in the order of rows."""

    def __init__(self, out: str, number: int, rows: Rows, chunk_rows: int) -> None:
        """rows: the cluster's, by place. chunk_rows: different rows of a chunk."""
        self.folder, self.number, self.rows = paths.join(out, BUCKETS), number, rows
        count = len(rows.row)
        copies, originals = copies_of(rows.vector_hash)
        self.original = np.arange(count)
        self.original[copies] = originals
        self.similarity = np.ones(count, np.float32)  # of a copy and its original: |v|^2, which f16 rounds off 1
        num_members = int((~rows.probe).sum())
        different = np.flatnonzero(self.original == np.arange(count))
        cut = int(np.searchsorted(different, num_members))
        sides = different[:cut], different[cut:]  # no chunk holds both members and probing rows
        parts = [side[at : at + chunk_rows] for side in sides for at in range(0, len(side), chunk_rows)]
        self.num_member_chunks = -(-len(sides[0]) // chunk_rows)
        self.parts = parts
        self.chunk = np.full(count, -1, np.int32)
        for index, part in enumerate(parts):
            self.chunk[part] = index
        self.held: dict[int, list[np.ndarray]] = {index: [] for index in range(len(parts))}

    def add(self, places: np.ndarray, vectors: np.ndarray) -> None:
        """Take vectors f16 [m, d] of some places; over all calls members come by place, and so do probing rows."""
        self.similarity[places] = exact_cosines(vectors, np.arange(len(vectors)), np.arange(len(vectors)))
        for index in np.unique(self.chunk[places]).tolist():
            if index >= 0:
                self.held[index].append(vectors[self.chunk[places] == index])
                if sum(map(len, self.held[index])) == len(self.parts[index]):
                    self._write(index)

    def _write(self, index: int) -> None:
        vectors = np.concatenate(self.held.pop(index))
        column = sidecar.vector_column(vectors, np.ones(len(vectors), bool))
        table = pa.table({"place": pa.array(self.parts[index]), "vector": column})
        sidecar.write_table(_chunk_path(self.folder, self.number, index), table.schema, table.to_batches())

    def finish(self) -> list[int]:
        """Write the table of rows. Returns the number of chunks of members, and of all chunks."""
        assert not self.held
        rows = self.rows
        columns = {
            "row": pa.array(rows.row),
            "phash": pa.array(rows.phash, mask=rows.unknown),
            "original": pa.array(self.original),
            "similarity": pa.array(self.similarity),
        }
        table = pa.table(columns)
        sidecar.write_table(paths.join(self.folder, f"giant-{self.number}.arrow"), table.schema, table.to_batches())
        return [self.num_member_chunks, len(self.parts)]


def blocks(giants: Mapping[str, list[int]]) -> list[Block]:
    """List the blocks of giants, by their chunks of members and of all rows: every chunk with itself, then two across.

    Two chunks of probing rows are not compared.
    """
    counted = [(int(number), *chunks) for number, chunks in giants.items()]
    alone = [(number, i, i) for number, members, _ in counted for i in range(members)]
    return alone + [
        (number, i, j) for number, members, all_ in counted for i in range(members) for j in range(i + 1, all_)
    ]


def block_path(folder: str, block: Block) -> str:
    """Locate the edges of a block."""
    return paths.join(folder, "block-{}-{}-{}.arrow".format(*block))


def _chunk_path(folder: str, number: int, index: int) -> str:
    return paths.join(folder, f"giant-{number}-{index}.arrow")


def _read_block(folder: str, block: Block) -> Edges:
    table = sidecar.table(block_path(folder, block))
    a, b, similarity = (table[name].to_numpy() for name in BLOCK_SCHEMA.names)
    return a, b, similarity


@dataclass
class CompareBlocks:
    """Find the near-duplicate forest of a block of a giant cluster."""

    out: str
    floor: float
    product: str

    def setup(self) -> None:
        """Nothing is kept between blocks."""
        self.folder = paths.join(self.out, BUCKETS)

    def __call__(self, block: Block) -> dict[str, Any]:
        """Process one block. Returns its rows and edges."""
        number, i, j = block
        chunks = [sidecar.table(_chunk_path(self.folder, number, index)).combine_chunks() for index in sorted({i, j})]
        places = np.concatenate([chunk["place"].to_numpy() for chunk in chunks])
        vectors = np.concatenate([sidecar.vectors(chunk["vector"].chunk(0)) for chunk in chunks])
        first = chunks[0].num_rows
        forest = Forest(len(places), self.floor)
        if i != j:
            for part in ((number, i, i), (number, j, j)):
                if paths.exists(block_path(self.folder, part)):
                    a, b, similarity = _read_block(self.folder, part)
                    forest.add(np.searchsorted(places, a), np.searchsorted(places, b), similarity)
            forest.merge()
        how: dict[str, Any] = {
            "members": np.array([first]),
            "across": i != j,
            "forest": forest,
            "product": self.product,
            "note": advance,
        }
        for edges in near_pairs(vectors, np.arange(len(places)), [0, len(places)], self.floor, **how):
            forest.add(*edges)
        a, b, similarity = forest.edges()
        new = (a < first) & (b >= first) if i != j else np.ones(len(a), bool)  # others are the single chunks' own
        columns = [pa.array(places[a[new]]), pa.array(places[b[new]]), pa.array(similarity[new])]
        found = pa.record_batch(columns, schema=BLOCK_SCHEMA)
        sidecar.write_table(block_path(self.folder, block), BLOCK_SCHEMA, [found])
        return {"rows": len(places), "edges": int(new.sum())}


def joined(out: str, number: int, chunks: list[int], floor: float) -> tuple[Rows, Edges]:
    """Join the blocks of a giant cluster. Returns its rows by place, and its edges by places a < b, sorted."""
    folder = paths.join(out, BUCKETS)
    table = sidecar.table(paths.join(folder, f"giant-{number}.arrow"))
    row, original = table["row"].to_numpy(), table["original"].to_numpy()
    phash, count = table["phash"], table.num_rows
    forest = Forest(count, floor)
    for block in blocks({str(number): chunks}):
        forest.add(*_read_block(folder, block))
    similarity = table["similarity"].to_numpy()
    copies = np.flatnonzero((original != np.arange(count)) & (similarity > floor))
    stars: Edges = original[copies], copies, similarity[copies]
    a, b, found = (np.concatenate(both) for both in zip(forest.edges(), stars, strict=True))
    order = np.lexsort((b, a))
    unknown = phash.is_null().to_numpy()
    nothing = np.zeros(count, np.uint64)
    rows = Rows(row, np.full(count, number, np.int32), nothing > 0, phash.fill_null(0).to_numpy(), unknown, nothing)
    return rows, (a[order], b[order], found[order])
