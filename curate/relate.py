"""Near-duplicates inside clusters: the cosine graph of each cluster, reduced to its maximum spanning forest.

Two rows of a cluster are joined by an edge where their cosine is above a floor. Of that graph only a maximum spanning
forest is kept (at most n - 1 edges of n rows): the connected components at any threshold above the floor are those of
the forest's edges above it, so that every threshold and a whole retention curve cost no second look at the vectors.

Products are made block by block, and a forest is merged with what a block adds (an edge that closes a cycle and is its
weakest can never be needed), so a cluster of any size needs memory for one block and one forest. A block full of edges
is thinned to its own forest first. Edges are ordered by their cosine on a grid of 2 ** -20, ties by row numbers: which
of two equal edges stays does not depend on the blocks.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from curate.kmeans import widen

BLOCK = 1024
LARGE = 1024  # rows of a cluster from which equal rows are looked for first
MERGE_AT = 1 << 20
BLOCK_BITS = 11  # a block's rows are numbered within 2 ** 11
NO_EDGE = np.iinfo(np.int64).min
GRID = np.float32(1 << 20)  # similarities closer than this count as equal when the forest is chosen
DENSE = 8  # edges a row of a block above which the block is thinned first


class Forest:
    """A maximum spanning forest that grows by edges. Rows are numbered 0 … num_rows - 1."""

    def __init__(self, num_rows: int, merge_at: int = MERGE_AT) -> None:
        self.num_rows = num_rows
        self.merge_at = merge_at
        self.kept = np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32)
        self.pending: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self.num_pending = 0

    def add(self, a: np.ndarray, b: np.ndarray, similarity: np.ndarray) -> None:
        """Offer edges a < b (each pair at most once over the forest's life) with their cosine f32."""
        self.pending.append((a, b, similarity))
        self.num_pending += len(a)
        if self.num_pending >= self.merge_at:
            self._merge()

    def edges(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the forest: a, b i64 and similarity f32, sorted by a, then b."""
        self._merge()
        a, b, similarity = self.kept
        order = np.lexsort((b, a))
        return a[order], b[order], similarity[order]

    def _merge(self) -> None:
        if self.pending:
            a, b, similarity = (np.concatenate(parts) for parts in zip(self.kept, *self.pending, strict=True))
            chosen = spanning_forest(a, b, similarity, self.num_rows)
            self.kept = a[chosen], b[chosen], similarity[chosen]
            self.pending, self.num_pending = [], 0


def spanning_forest(a: np.ndarray, b: np.ndarray, similarity: np.ndarray, num_rows: int) -> np.ndarray:
    """Choose the edges of the maximum spanning forest. Pairs are distinct. Returns their indices, ascending."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import minimum_spanning_tree

    if not len(a):
        return np.empty(0, np.int64)
    order = np.lexsort((b, a, -np.rint(similarity * GRID)))
    names, ends = np.unique(np.concatenate([a, b]), return_inverse=True)
    place = np.empty(len(a))
    place[order] = np.arange(1, len(a) + 1)  # weight 0 would mean that there is no edge
    graph = coo_array((place, (ends[: len(a)], ends[len(a) :])), shape=(len(names), len(names))).tocsr()
    tree = minimum_spanning_tree(graph)
    return np.sort(order[tree.data.astype(np.int64) - 1])


def components(a: np.ndarray, b: np.ndarray, num_rows: int) -> np.ndarray:
    """Label connected components. Returns i64 [num_rows]: the smallest row number of each row's component."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    labels = np.arange(num_rows)
    if not len(a):
        return labels
    names, ends = np.unique(np.concatenate([a, b]), return_inverse=True)
    graph = coo_array((np.ones(len(a), np.int8), (ends[: len(a)], ends[len(a) :])), shape=(len(names), len(names)))
    count, found = connected_components(graph, directed=False)
    first = np.full(count, num_rows, np.int64)
    np.minimum.at(first, found, names)
    labels[names] = first[found]
    return labels


def near_pairs(
    x_nd: np.ndarray, members: np.ndarray, floor: float, block: int = BLOCK, *, thin: bool = False
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield the pairs of members with cosine > floor, block by block, as (a, b, cosine) with a before b.

    x_nd: f16 or f32 [n, d], unit rows; may lie on disk. members: i64 [m], the rows to compare, by their numbers in
    x_nd, which are also what is yielded. thin: of a block with very many pairs yield only its maximum spanning forest.
    O(m^2 d) time, memory for two blocks and their product.
    """
    from scipy.linalg.blas import ssyrk

    for i in range(0, len(members), block):
        left = widen(x_nd[members[i : i + block]])
        for j in range(i, len(members), block):
            if j == i:  # half the work: only the upper triangle is computed, the rest is zero
                products = ssyrk(1.0, left.T, trans=1, lower=1).T
            else:
                products = left @ widen(x_nd[members[j : j + block]]).T
            found = np.flatnonzero(products.ravel() > floor)
            a, b = np.divmod(found, products.shape[1])
            if j == i:
                upper = a < b
                a, b, found = a[upper], b[upper], found[upper]
            if thin and len(found) > DENSE * sum(products.shape):
                a, b = block_forest(products, floor, square=j == i)
                found = a * products.shape[1] + b
            if len(a):
                yield members[a + i], members[b + j], products.ravel()[found]


def block_forest(products: np.ndarray, floor: float, *, square: bool) -> tuple[np.ndarray, np.ndarray]:
    """Find the maximum spanning forest of a block of products, in the same order of edges as `spanning_forest`.

    products: f32 [p, q], of left with right rows; square: left and right are the same rows, and only entries above the
    diagonal count. Returns the edges' positions. Prim's algorithm on the dense matrix: O((p + q)^2) and no sorting.
    """
    p, q = products.shape
    rank = np.rint(products * GRID).astype(np.int64) << 2 * BLOCK_BITS
    rank -= (np.arange(p)[:, None] << BLOCK_BITS) + np.arange(q)
    rank[products <= floor] = NO_EDGE
    if square:
        rank[np.tril_indices(p)] = NO_EDGE
        rank = np.maximum(rank, rank.T)
        ends = [(rank, slice(0, p))] * p
    else:
        backward = np.ascontiguousarray(rank.T)
        ends = [(rank, slice(p, p + q))] * p + [(backward, slice(0, p))] * q
    count = len(ends)
    best, parent = np.full(count, NO_EDGE), np.full(count, -1)
    waiting = np.ones(count, bool)
    for _ in range(count):
        node = int(best.argmax())
        if best[node] == NO_EDGE:  # a new tree begins
            node = int(waiting.argmax())
        waiting[node], best[node] = False, NO_EDGE
        matrix, other = ends[node]
        row, reached = matrix[node if node < p else node - p], best[other]
        better = (row > reached) & waiting[other]
        np.copyto(reached, row, where=better)
        parent[other][better] = node
    child = np.flatnonzero(parent >= 0)
    low, high = np.minimum(child, parent[child]), np.maximum(child, parent[child])
    return low, high if square else high - p


def relate_clusters(
    x_nd: np.ndarray, bounds: Sequence[int] | np.ndarray, floor: float, *, block: int = BLOCK, merge_at: int = MERGE_AT
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Find the forests of clusters that lie one after the other.

    x_nd: f16 [n, d], unit rows; cluster c is rows bounds[c] … bounds[c + 1] - 1.
    Returns a, b i64 (a < b, positions in x_nd) and the cosine f32, sorted by a, then b; the same for any block size.
    """
    forest = Forest(len(x_nd), merge_at)
    for first, last in zip(bounds[:-1], bounds[1:], strict=True):
        members = np.arange(first, last)
        if last - first > LARGE:
            # one picture under many keys can fill a giant cluster: its equal copies hang on the first of them
            copies, originals = _copies(x_nd, members)
            for at in range(0, len(copies), block):
                a, b = originals[at : at + block], copies[at : at + block]
                norms = np.einsum("nd,nd->n", widen(x_nd[a]), widen(x_nd[b]))
                forest.add(a[norms > floor], b[norms > floor], norms[norms > floor])
            members = np.setdiff1d(members, copies, assume_unique=True)
        for edges in near_pairs(x_nd, members, floor, block, thin=True):
            forest.add(*edges)
    return forest.edges()


def _copies(x_nd: np.ndarray, members: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find the rows that equal an earlier one, by a 64-bit hash of their bytes: (copies, the first row like each)."""
    weights = np.random.default_rng(0).integers(1 << 63, size=x_nd.shape[1], dtype=np.uint64) * 2 + 1
    words = np.dtype(f"u{x_nd.itemsize}")
    hashes = np.empty(len(members), np.uint64)
    for at in range(0, len(members), BLOCK):
        rows = np.ascontiguousarray(x_nd[members[at : at + BLOCK]])
        hashes[at : at + BLOCK] = (rows.view(words).astype(np.uint64) * weights).sum(axis=1, dtype=np.uint64)
    _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    original = first[inverse]
    copies = np.flatnonzero(original != np.arange(len(members)))
    return members[copies], members[original[copies]]


def hamming(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Count the differing bits of u64 hashes, u8."""
    return np.asarray(np.bitwise_count(left ^ right))


def nearest_similarity(x_nd: np.ndarray, targets_md: np.ndarray, block: int = 4096) -> np.ndarray:
    """Find each row's highest cosine to any target, f32 [n]; -1 without targets. Rows and targets are unit vectors."""
    best = np.full(len(x_nd), -1, np.float32)
    rows = widen(x_nd)
    for first in range(0, len(targets_md), block):
        np.maximum(best, (rows @ widen(targets_md[first : first + block]).T).max(axis=1), out=best)
    return best
