"""The near-duplicate forest of every cluster: its cosine graph above a floor, reduced to a maximum spanning forest.

`near_pairs` finds the pairs of a cluster's rows above the floor; `Forest` keeps those that determine the components at
any higher threshold. One picture under many keys can fill a large cluster. Exact copies are therefore found first, by
hashes of the vectors: each is joined by one edge to the first row equal to it, and is not compared. Many small clusters
are processed together, in one forest, so that each costs microseconds.

Shapes: x_nd f16 [n, d]; edges as places in `rows`. Cost: that of the pairs. Memory: one forest, and what pairs need.
"""

from collections.abc import Sequence

import numpy as np

from curate.vectors.exact import exact_cosines
from curate.vectors.forest import Edges, Forest
from curate.vectors.near_pairs import MEDIUM, TILE, batches_of_groups, near_pairs, product_for

MIXER = np.uint64(0xFF51AFD7ED558CCD)  # odd, of MurmurHash3's finalizer
LARGE = 1024  # rows of a cluster from which on equal rows are searched first
MEDIUM_ROWS = 1 << 15  # rows of small clusters whose forests are found together
LARGE_ROWS = 1 << 11  # of larger ones; one of more rows has its own, so that all its rows can pass over pairs


def near_duplicate_forest(
    x_nd: np.ndarray,
    rows: np.ndarray,
    bounds: Sequence[int] | np.ndarray,
    floor: float,
    *,
    members: np.ndarray | None = None,
    tile: int = TILE,
    merge_at: int | None = None,
    product: str | None = None,
) -> Edges:
    """Find the near-duplicate forests of clusters.

    x_nd: f16 [n, d], unit rows. rows: i64; cluster c is rows[bounds[c] : bounds[c + 1]], of which the first members[c]
    belong to it and the rest probe it (by default none; see `near_pairs`).
    Returns places a < b in `rows`, i64, and the cosine f32, sorted by a, then b; the same for any tile, merge_at (edges
    that wait before they are merged) and product by which pairs are screened.
    """
    bounds = np.asarray(bounds)
    sizes = np.diff(bounds)
    members = sizes if members is None else members
    product = product_for(x_nd.shape[1], sizes, members, product)
    found = [(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))]
    for chosen, limit in ((sizes <= MEDIUM, MEDIUM_ROWS), (sizes > MEDIUM, LARGE_ROWS)):
        places = np.flatnonzero(np.repeat(chosen, sizes)) + int(bounds[0])
        cuts, own = np.append(0, np.cumsum(sizes[chosen])), members[chosen]
        for first, last in batches_of_groups(cuts, limit):
            here = places[cuts[first] : cuts[last]]
            parts = cuts[first : last + 1] - cuts[first]
            a, b, similarity = _forest_of_groups(
                x_nd, rows[here], parts, floor, own[first:last], tile=tile, merge_at=merge_at, product=product
            )
            found.append((here[a], here[b], similarity))
    a, b, similarity = (np.concatenate(column) for column in zip(*found, strict=True))
    order = np.lexsort((b, a))
    return a[order], b[order], similarity[order]


def _forest_of_groups(
    x_nd: np.ndarray,
    rows: np.ndarray,
    bounds: np.ndarray,
    floor: float,
    members: np.ndarray,
    *,
    tile: int,
    merge_at: int | None,
    product: str,
) -> Edges:
    """Do what `near_duplicate_forest` does, with one forest for all groups; edges come in any order."""
    copies, originals = _copies(x_nd, rows, bounds)
    norms = exact_cosines(x_nd, rows[originals], rows[copies])
    stars = originals[norms > floor], copies[norms > floor], norms[norms > floor]
    different = np.ones(len(rows), bool)
    different[copies] = False
    # Compared rows are renumbered without the copies: place p among them is place left[p] among all rows, and
    # before[p] counts the distinct rows before place p.
    left, before = np.flatnonzero(different), np.append(0, np.cumsum(different))
    own = before[bounds[:-1] + members] - before[bounds[:-1]]
    forest = Forest(len(left), floor, merge_at)
    pairs = near_pairs(x_nd, rows[left], before[bounds], floor, members=own, tile=tile, product=product, forest=forest)
    for edges in pairs:
        forest.add(*edges)
    a, b, similarity = forest.edges()
    a, b, similarity = (np.concatenate(both) for both in zip((left[a], left[b], similarity), stars, strict=True))
    return a, b, similarity


def row_hashes(x_nd: np.ndarray) -> np.ndarray:
    """Hash rows f16 linearly to u64 [n]: equal rows have equal hashes, others only once in 2 ** 64.

    The hash is the sum of a row's 8-byte words times odd random weights, modulo 2 ** 64. (Rows of other than a multiple
    of 8 bytes are hashed by their single numbers.)
    """
    words = np.dtype(np.uint64 if x_nd.shape[1] * x_nd.itemsize % 8 == 0 else f"u{x_nd.itemsize}")
    weights = np.asarray(np.random.default_rng(0).integers(1 << 63, size=x_nd.shape[1], dtype=np.uint64)) * 2 + 1
    hashes = np.empty(len(x_nd), np.uint64)
    for at in range(0, len(x_nd), TILE):
        values = np.ascontiguousarray(x_nd[at : at + TILE]).view(words).astype(np.uint64, copy=False)
        values = (
            values ^ (values >> np.uint64(33))
        ) * MIXER  # else two turned signs, the words' top bits, would cancel
        values ^= values >> np.uint64(29)
        hashes[at : at + TILE] = np.einsum("nw,w->n", values, weights[: values.shape[1]])
    return hashes


def copies_of(hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find the rows that equal an earlier one, by their hashes: places of copies, and of the first row like each."""
    _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    original = first[inverse]
    copies = np.flatnonzero(original != np.arange(len(original)))
    return copies, original[copies]


def _copies(x_nd: np.ndarray, rows: np.ndarray, bounds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find the copies of every large cluster, as `copies_of`."""
    copies, originals = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for group in np.flatnonzero(np.diff(bounds) > LARGE).tolist():
        here = rows[bounds[group] : bounds[group + 1]]
        hashes = [row_hashes(x_nd[here[at : at + TILE]]) for at in range(0, len(here), TILE)]
        copy, original = copies_of(np.concatenate(hashes))
        copies.append(copy + bounds[group])
        originals.append(original + bounds[group])
    return np.concatenate(copies), np.concatenate(originals)
