"""Near-duplicates inside clusters: the cosine graph of each cluster, reduced to its maximum spanning forest.

Two rows of a cluster are joined by an edge where their cosine is above a floor. Of that graph only a maximum spanning
forest is kept (at most n - 1 edges of n rows): the connected components at any threshold above the floor are those of
the forest's edges above it, so that every threshold and a whole retention curve cost no second look at the vectors.

A cluster is compared tile by tile: a fast product screens, an exact one decides (`exact`), so that no byte depends
on the tiles, the library or the machine. Tiles full of edges are multiplied exactly and thinned to their own forest. A
cluster of any size needs memory for one panel of rows, one tile and one forest. Equal edges are ordered by row numbers.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from curate.vectors.exact import Screen, exact_cosines, exact_products, has_int8, widen
from curate.vectors.forest import MIRROR, Edges, Forest, tile_forest

TILE = 512
PANEL = 1 << 15  # rows that are prepared for the fast product at a time
SMALL = 32  # up to so many rows all pairs are decided exactly at once
LARGE = 1024  # rows of a cluster from which equal rows are looked for first
DENSE = 1 / 32  # share of a tile's pairs from which multiplying it exactly costs less than deciding them one by one
CROWDED = 8  # edges a row of a tile above which the tile is thinned to its forest
CENTRED = 64  # rows of a group whose mean is taken for its centre
BATCH = 1 << 14  # pairs that are decided together
GROUP_ROWS = 1 << 11  # rows of clusters whose forests are found together; a large one has its own
INT8_WORK = 1e11  # products from which loading torch pays


def near_pairs(
    x_nd: np.ndarray,
    rows: np.ndarray,
    bounds: Sequence[int] | np.ndarray,
    floor: float,
    *,
    heads: np.ndarray | None = None,
    tile: int = TILE,
    int8: bool | None = None,
    forest: Forest | None = None,
) -> Iterator[Edges]:
    """Yield the pairs inside each group with cosine > floor, in batches: places a < b in `rows` and the cosine f32.

    x_nd: f16 [n, d], unit rows; may lie on disk. rows: i64, which of them to compare; group g is
    rows[bounds[g] : bounds[g + 1]]. heads: i64, of each group compare its first so many rows with all of it, and the
    rest not with one another; by default all. forest: of these places; the caller adds to it what is yielded, and pairs
    that it never takes are left out. int8: how to screen; by default where the processor has it and the work is worth
    loading torch.
    No pair comes before one whose b is its a. O(sum of m^2 d) time, memory for a panel of prepared rows and a tile.
    """
    bounds = np.asarray(bounds)
    sizes = np.diff(bounds)
    heads = sizes if heads is None else heads
    int8 = _pays(x_nd, sizes, heads) if int8 is None else int8
    waiting, count = [], 0
    for a, b, cosine in _compare_groups(x_nd, rows, bounds, heads, Screen(floor, int8=int8), tile, forest):
        if cosine is None:
            waiting.append((a, b))
            count += len(a)
        if count and (count >= BATCH or cosine is not None):
            yield _decide(x_nd, rows, waiting, floor)
            waiting, count = [], 0
        if cosine is not None:
            yield a, b, cosine
    if count:
        yield _decide(x_nd, rows, waiting, floor)


def _pairs_of_small_groups(bounds: np.ndarray, heads: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """List all pairs of the groups of 2 … SMALL rows."""
    sizes = np.diff(bounds)
    left, right = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for size in range(2, SMALL + 1):
        starts = bounds[:-1][sizes == size][:, None]
        i, j = np.triu_indices(size, 1)
        wanted = i < heads[sizes == size][:, None]
        left.append((starts + i)[wanted])
        right.append((starts + j)[wanted])
    return np.concatenate(left), np.concatenate(right)


def _pays(x_nd: np.ndarray, sizes: np.ndarray, heads: np.ndarray) -> bool:
    """Say whether to screen by bytes."""
    return float((sizes.astype(np.float64) * heads).sum()) * x_nd.shape[1] > INT8_WORK and has_int8()


def _decide(x_nd: np.ndarray, rows: np.ndarray, pairs: list[tuple[np.ndarray, np.ndarray]], floor: float) -> Edges:
    """Keep the pairs whose exact cosine is above the floor."""
    a, b = (np.concatenate(parts) for parts in zip(*pairs, strict=True))
    cosine = exact_cosines(x_nd, rows[a], rows[b])
    above = cosine > floor
    return a[above], b[above], cosine[above]


def _compare_groups(
    x_nd: np.ndarray,
    rows: np.ndarray,
    bounds: np.ndarray,
    heads: np.ndarray,
    screen: Screen,
    tile: int,
    forest: Forest | None,
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray | None]]:
    """Compare each group with itself. Yields pairs that may be near; of dense tiles those that are, with their cosine.

    Rows are prepared a panel at a time: many groups, or a part of one.
    """
    panel = max(1, PANEL // tile) * tile
    for first, last in batches_of_groups(bounds, PANEL):
        cuts, own = bounds[first : last + 1], heads[first:last]
        start, end = int(cuts[0]), int(cuts[-1])
        yield *_pairs_of_small_groups(cuts, own), None
        if (np.diff(cuts) <= SMALL).all():
            continue
        groups = [*zip(cuts[:-1].tolist(), own.tolist(), cuts[1:].tolist(), strict=True)]
        centres = _centres(x_nd, rows, groups if screen.int8 else [])
        numbers = np.repeat(np.arange(len(groups)), np.diff(cuts))
        for i in range(start, end if len(groups) > 1 else start + groups[0][1], panel):
            left = screen.prepare(x_nd, rows[i : min(i + panel, end)], centres, numbers[i - start :])
            for j in range(i, end, panel):
                right = left
                if j > i:
                    right = screen.prepare(x_nd, rows[j : min(j + panel, end)], centres, numbers[j - start :])
                for above, below in _tiles(groups, i, j, panel, tile):
                    p, q = slice(above.start - i, above.stop - i), slice(below.start - j, below.stop - j)
                    levels = None if forest is None else forest.settled()
                    settled = None if levels is None else (levels[above], levels[below])
                    found = screen.near(left[p], right[q], settled)
                    if screen.int8 and len(found) > DENSE * (p.stop - p.start) * (q.stop - q.start):
                        found = screen.look_closer(x_nd, rows[above], rows[below], settled)
                    if len(found):
                        thin = forest is not None
                        a, b, cosine = _judge_tile(x_nd, rows[above], rows[below], found, screen.floor, thin)
                        yield a + above.start, b + below.start, cosine


def _centres(x_nd: np.ndarray, rows: np.ndarray, groups: list[tuple[int, int, int]]) -> np.ndarray:
    """Estimate the mean of each group (start, heads, end) that is large enough to be screened, f32 [g, d]."""
    centres = np.zeros((len(groups), x_nd.shape[1]), np.float32)
    for number, (start, _, end) in enumerate(groups):
        if end - start > SMALL:
            centres[number] = widen(x_nd[rows[start : end : -(-(end - start) // CENTRED)]]).mean(axis=0)
    return centres


def _tiles(groups: list[tuple[int, int, int]], i: int, j: int, panel: int, tile: int) -> Iterator[tuple[slice, slice]]:
    """List the tiles that groups (start, heads, end) have in two panels, none below the diagonal, by their rows."""
    for start, heads, end in groups:
        if end - start <= SMALL:
            continue
        head_end = start + heads
        for p in range(max(start, i), min(head_end, i + panel), tile):
            above = slice(p, min(p + tile, head_end, i + panel))
            last = min(end, j + panel)
            for q in (*range(max(p, j), min(head_end, last), tile), *range(max(head_end, j), last, tile)):
                yield above, slice(q, min(q + tile, last, head_end if q < head_end else last))


def batches_of_groups(bounds: np.ndarray, limit: int) -> Iterator[tuple[int, int]]:
    """Cut groups that lie one after the other into runs [first, last) of at most `limit` rows, or of one group."""
    first = 0
    while first + 1 < len(bounds):
        last = max(first + 1, int(np.searchsorted(bounds, bounds[first] + limit, side="right")) - 1)
        yield first, last
        first = last


def _judge_tile(
    x_nd: np.ndarray, above: np.ndarray, below: np.ndarray, found: np.ndarray, floor: float, thin: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Turn what was found in a tile into places in it; where it is much, multiply the tile exactly."""
    if len(found) > DENSE * len(above) * len(below):
        return _multiply_exactly(x_nd, above, below, floor, thin)
    a, b = np.divmod(found, len(below))
    if above[0] == below[0]:
        upper = a < b
        a, b = a[upper], b[upper]
    return a, b, None


def _multiply_exactly(x_nd: np.ndarray, above: np.ndarray, below: np.ndarray, floor: float, thin: bool) -> Edges:
    """Find the near pairs of a tile from its exact products; where they are very many, if wanted, its forest only."""
    square = bool(above[0] == below[0])
    products = exact_products(x_nd[above], x_nd[below])
    if square:
        products[np.tril_indices(len(above))] = -2
    found = np.flatnonzero(products.ravel() > floor)
    if thin and len(found) > CROWDED * sum(products.shape):
        a, b = tile_forest(products, floor, square=square)
    else:
        a, b = np.divmod(found, len(below))
    return a, b, products[a, b]


def relate_clusters(
    x_nd: np.ndarray,
    rows: np.ndarray,
    bounds: Sequence[int] | np.ndarray,
    floor: float,
    *,
    heads: np.ndarray | None = None,
    tile: int = TILE,
    merge_at: int | None = None,
    int8: bool | None = None,
) -> Edges:
    """Find the forests of clusters.

    x_nd: f16 [n, d], unit rows. rows: i64; cluster c is rows[bounds[c] : bounds[c + 1]], of which the first heads[c]
    belong to it and the rest, which belong to others, are not compared with one another.
    Returns places a < b in `rows`, i64, and the cosine f32, sorted by a, then b; the same for any tile and however the
    tiles are screened.
    """
    bounds = np.asarray(bounds)
    if int8 is None:
        int8 = _pays(x_nd, np.diff(bounds), np.diff(bounds) if heads is None else heads)
    found = [(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))]
    for first, last in batches_of_groups(bounds, GROUP_ROWS):
        start, parts = int(bounds[first]), bounds[first : last + 1] - bounds[first]
        here = rows[start : bounds[last]]
        copies, originals = _copies(x_nd, here, parts)
        norms = exact_cosines(x_nd, here[originals], here[copies])
        stars = originals[norms > floor], copies[norms > floor], norms[norms > floor]
        different = np.ones(len(here), bool)
        different[copies] = False
        left, before = np.flatnonzero(different), np.append(0, np.cumsum(different))
        own = None if heads is None else before[parts[:-1] + heads[first:last]] - before[parts[:-1]]
        forest = Forest(len(left), floor, merge_at)
        for edges in near_pairs(x_nd, here[left], before[parts], floor, heads=own, tile=tile, int8=int8, forest=forest):
            forest.add(*edges)
        a, b, similarity = forest.edges()
        a, b, similarity = (np.concatenate(both) for both in zip((left[a], left[b], similarity), stars, strict=True))
        order = np.lexsort((b, a))
        found.append((a[order] + start, b[order] + start, similarity[order]))
    a, b, similarity = (np.concatenate(column) for column in zip(*found, strict=True))
    return a, b, similarity


def _copies(x_nd: np.ndarray, rows: np.ndarray, bounds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find the rows that equal an earlier one of their large cluster: places of copies, and of the first like each.

    One picture under many keys can fill a giant cluster: its copies hang on the first of them, and need no comparing.
    """
    copies, originals = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    words = np.dtype(np.uint64 if x_nd.shape[1] * x_nd.itemsize % 8 == 0 else f"u{x_nd.itemsize}")
    weights = np.asarray(np.random.default_rng(0).integers(1 << 63, size=x_nd.shape[1], dtype=np.uint64)) * 2 + 1
    for group in np.flatnonzero(np.diff(bounds) > LARGE).tolist():
        here = rows[bounds[group] : bounds[group + 1]]
        hashes = np.empty(len(here), np.uint64)
        for at in range(0, len(here), TILE):
            values = x_nd[here[at : at + TILE]].view(words).astype(np.uint64, copy=False)
            hashes[at : at + TILE] = np.einsum("nw,w->n", values, weights[: values.shape[1]])
        _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
        original = first[inverse]
        copy = np.flatnonzero(original != np.arange(len(original)))
        copies.append(copy + bounds[group])
        originals.append(original[copy] + bounds[group])
    return np.concatenate(copies), np.concatenate(originals)


def differing_bits(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Count the bits in which perceptual hashes u64 differ, or, where fewer, one and the other's mirror image, u8.

    To mirror an image turns the signs of the odd horizontal frequencies, which are every second bit.
    """
    return np.asarray(np.minimum(np.bitwise_count(left ^ right), np.bitwise_count(left ^ right ^ MIRROR)))


def nearest_similarity(x_nd: np.ndarray, targets_md: np.ndarray, block: int = 4096) -> np.ndarray:
    """Find each row's highest cosine to any target, f32 [n]; -1 without targets. Rows and targets are unit vectors."""
    best = np.full(len(x_nd), -1, np.float32)
    rows = widen(x_nd)
    for first in range(0, len(targets_md), block):
        np.maximum(best, (rows @ widen(targets_md[first : first + block]).T).max(axis=1), out=best)
    return best
