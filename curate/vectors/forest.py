"""The maximum spanning forest of a graph of cosines, built piece by piece; and connected components.

Instead of the whole graph that joins every two rows with a cosine above a floor, a maximum spanning forest is enough:
for any threshold t, the rows connected through edges above t are the same in the forest as in the whole graph. (If the
forest leaves out an edge, a path of edges at least as heavy already joins its ends: the cycle property.) A forest of n
rows has at most n - 1 edges, so n ** 2 / 2 cosines are never held.

Edges have one strict order: by falling cosine, then by smaller a, then by smaller b. Under a strict order the forest
is unique, and the forest of a union is the forest of the union of forests:

    F(E1 + E2) = F(F(E1) + F(E2)).

So edges may arrive in any pieces, each may be reduced by itself, and the result is the same to the byte. `Forest`
collects edges and reduces them from time to time (SciPy's Kruskal, O(E log E)); `tile_forest` reduces a whole tile of
products by Prim's algorithm (O(p + q) ** 2, no sorting).

Shapes: edges are three arrays a, b (i64, a < b) and similarity (f32). Source: J. B. Kruskal, 1956; R. C. Prim, 1957.
"""

import numpy as np

MERGE_LEAST, MERGE_AT = 1 << 12, 1 << 20  # edges that wait before a merge: as many as rows, within these bounds
LEVELS = 24  # levels between the floor and 1 at which connected rows are tracked
CROWDED = 8  # edges per row of a tile above which the tile is reduced to its forest
TILE_BITS = 11  # a tile's rows are numbered within 2 ** 11
NO_EDGE = np.iinfo(np.int64).min
Edges = tuple[np.ndarray, np.ndarray, np.ndarray]


class Forest:
    """A maximum spanning forest that grows by edges with a cosine above a floor. Rows are 0 … num_rows - 1."""

    def __init__(self, num_rows: int, floor: float, merge_at: int | None = None) -> None:
        self.num_rows = num_rows
        self.floor = floor
        self.merge_at = merge_at or min(max(num_rows, MERGE_LEAST), MERGE_AT)
        self.kept: Edges = np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32)
        self.pending: list[Edges] = []
        self.num_pending = 0
        self._levels: np.ndarray | None = None

    def add(self, a: np.ndarray, b: np.ndarray, similarity: np.ndarray) -> None:
        """Offer edges a < b (each pair at most once over the forest's life) with their cosine f32."""
        self.pending.append((a, b, similarity))
        self.num_pending += len(a)
        if self.num_pending >= self.merge_at:
            self.merge()

    def connected_levels(self) -> np.ndarray | None:
        """Give each row the highest level, f64 [num_rows], above which edges already connect it to most others.

        An edge whose cosine is not above the level of both its ends closes a cycle of heavier edges, and is in no
        maximum spanning forest: it need not be looked for. At every level there is one set of rows that counts as
        connected, the largest component within that of the level before. Other rows have the floor. None: no edge yet.
        """
        a, b, similarity = self.kept
        if self._levels is None and len(a):
            self._levels = np.full(self.num_rows, self.floor)
            inside = np.ones(self.num_rows, bool)
            for level in np.linspace(self.floor, 1, LEVELS + 1)[1:-1]:
                within = (similarity > level) & inside[a] & inside[b]
                labels = components(a[within], b[within], self.num_rows)
                inside &= labels == np.bincount(labels[inside]).argmax()
                self._levels[inside] = level
        return self._levels

    def edges(self) -> Edges:
        """Return the forest: a, b i64 and similarity f32, sorted by a, then b."""
        self.merge()
        a, b, similarity = self.kept
        order = np.lexsort((b, a))
        return a[order], b[order], similarity[order]

    def merge(self) -> None:
        """Reduce the added edges to the forest now; this also happens by itself as edges accumulate."""
        if self.pending:
            a, b, similarity = (np.concatenate(parts) for parts in zip(self.kept, *self.pending, strict=True))
            chosen = spanning_forest(a, b, similarity, self.num_rows)
            self.kept = a[chosen], b[chosen], similarity[chosen]
            self.pending, self.num_pending = [], 0
            self._levels = None


def spanning_forest(a: np.ndarray, b: np.ndarray, similarity: np.ndarray, num_rows: int) -> np.ndarray:
    """Choose the edges of the maximum spanning forest. Pairs are distinct. Returns their indices, ascending."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import minimum_spanning_tree

    if not len(a):
        return np.empty(0, np.int64)
    order = np.lexsort((b, a, -similarity))
    names, i, j = _renumber(a, b, num_rows)
    # An edge's weight is its place in the strict order, from 1 (SciPy reads a weight of 0 as "no edge"): the minimum
    # spanning tree of places is the maximum one of cosines, and its weights name the edges.
    place = np.empty(len(a))
    place[order] = np.arange(1, len(a) + 1)
    graph = coo_array((place, (i, j)), shape=(len(names), len(names))).tocsr()
    tree = minimum_spanning_tree(graph)
    return np.sort(order[tree.data.astype(np.int64) - 1])


def components(a: np.ndarray, b: np.ndarray, num_rows: int) -> np.ndarray:
    """Label connected components. Returns i64 [num_rows]: the smallest row number of each row's component."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    labels = np.arange(num_rows)
    if not len(a):
        return labels
    names, i, j = _renumber(a, b, num_rows)
    graph = coo_array((np.ones(len(a), np.int8), (i, j)), shape=(len(names), len(names)))
    count, found = connected_components(graph, directed=False)
    first = np.full(count, num_rows, np.int64)
    np.minimum.at(first, found, names)
    labels[names] = first[found]
    return labels


def _renumber(a: np.ndarray, b: np.ndarray, num_rows: int) -> Edges:
    """List the rows that have an edge, ascending, and number the edges' ends by their places in that list, i32.

    Most rows of a pool have no near-duplicate: SciPy then works on a graph of the few that have.
    """
    touched = np.zeros(num_rows, bool)
    touched[a] = touched[b] = True
    names = np.flatnonzero(touched)
    place = np.empty(num_rows, np.int32)
    place[names] = np.arange(len(names), dtype=np.int32)
    return names, place[a], place[b]


def tile_forest(products: np.ndarray, floor: float, *, square: bool) -> tuple[np.ndarray, np.ndarray]:
    """Find the maximum spanning forest of a tile of products, under the same strict order as `spanning_forest`.

    products: f32 [p, q] of left with right rows, p, q <= 2 ** TILE_BITS. square: left and right are the same rows, and
    only entries above the diagonal count. Returns the edges' positions. Prim's algorithm on the dense matrix.

    Every entry becomes one i64 whose order is the strict order of edges: the cosine's 32 bits in front, and behind them
    a * 2 ** TILE_BITS + b, subtracted, so that one comparison of integers settles ties too.
    """
    p, q = products.shape
    # The bits of positive f32 rise with their value; those of negative ones fall, and flipping all but the sign bit
    # mends that.
    bits = products.view(np.int32)
    rank = np.where(bits < 0, bits ^ np.int32(0x7FFFFFFF), bits).astype(np.int64) << 2 * TILE_BITS
    rank -= (np.arange(p)[:, None] << TILE_BITS) + np.arange(q)
    rank[products <= floor] = NO_EDGE
    # ends[node]: the matrix in which the node's edges are a row, and the nodes at their other ends. Nodes are the left
    # rows, then, where they are others, the right ones.
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
        if best[node] == NO_EDGE:  # nothing more can be reached: a new tree begins
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


def edges_of_tile(products: np.ndarray, floor: float, *, square: bool, reduce: bool) -> tuple[np.ndarray, np.ndarray]:
    """List the entries of exact products [p, q] above the floor; reduce: if they are very many, only their forest."""
    found = np.flatnonzero(products.ravel() > floor)
    if reduce and len(found) > CROWDED * sum(products.shape):
        return tile_forest(products, floor, square=square)
    a, b = np.divmod(found, products.shape[1])
    return a, b
