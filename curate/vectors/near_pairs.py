"""Near-duplicate pairs inside clusters: all pairs of rows of one cluster whose cosine is above a floor.

A cluster of m rows is compared tile by tile, 512 rows with 512: a fast product screens all pairs of a tile (`screen`),
and the exact cosine decides those that are left (`exact`). No result depends on the tiles, the library or the machine.
Four kinds of work are cheaper another way. All pairs of a cluster of up to 4 rows are decided exactly at once, together
with those of many other clusters. Clusters of up to 256 rows are screened in f32, those of similar size in one call:
preparing their rows for another product would take longer than it saves. A tile in which more than one pair in 32 may
be near is multiplied exactly as a whole. And if the pairs are wanted for a spanning forest (`forest`), pairs that the
forest cannot use are passed over: those below the level at which earlier edges already connect their rows; and a tile
full of edges is reduced to its own forest.

A group may hold rows that are not members of the cluster but probe it, as a query of an inverted-file index probes
lists beyond its nearest: each of them is compared with the members, not with other probing rows.

Shapes: x_nd f16 [n, d], in memory or mapped from disk. Cost: sum of m ** 2 d / 2 multiplications. Memory: one panel of
prepared rows on either side (2 ** 15 rows), one tile of products.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from curate.vectors import on_device
from curate.vectors.exact import exact_cosines, exact_products, widen
from curate.vectors.forest import Edges, Forest, edges_of_tile
from curate.vectors.products import fastest_product, is_right
from curate.vectors.screen import Screen

TILE = 512
PANEL = 1 << 15  # rows that are prepared for the fast product at a time
SMALL = 4  # most rows of a group whose pairs are all decided exactly at once
MEDIUM = 256  # most rows of a group that is screened in f32, together with others of its size
MEDIUM_ROWS = 1 << 12  # rows of such groups whose products are examined together
CACHED = 1 << 17  # numbers of such groups that are widened and multiplied together: they stay in the cache
STEP = 4  # such groups are filled up to a multiple of this, so that many have the same size
DENSE = 1 / 32  # share of a tile's pairs above which multiplying it exactly costs less than deciding them one by one
CENTRE_SAMPLE = 64  # rows of a group whose mean is taken as its centre
BATCH = 1 << 14  # pairs that are decided together
ROUNDED_WORK = 1e11  # multiplications above which loading torch pays off
MIRROR = np.uint64(0xAAAAAAAAAAAAAAAA)  # the bits of a perceptual hash that flip when its image is mirrored
Group = tuple[int, int, int]  # where its rows start, where its members end, where its rows end


def near_pairs(
    x_nd: np.ndarray,
    rows: np.ndarray,
    bounds: Sequence[int] | np.ndarray,
    floor: float,
    *,
    members: np.ndarray | None = None,
    across: bool = False,
    tile: int = TILE,
    product: str | None = None,
    forest: Forest | None = None,
    note: Callable[[int], None] | None = None,
) -> Iterator[Edges]:
    """Yield the pairs inside each group with cosine > floor, in batches: places a < b in `rows` and the cosine f32.

    x_nd: f16 [n, d], unit rows. rows: i64, which of them to compare; group g is rows[bounds[g] : bounds[g + 1]].
    members: i64, how many rows of each group, the first ones, are its members; the rest probe it. By default all are.
    across: compare members only with probing rows, not with one another.
    forest: over these places; the caller adds to it what is yielded, and pairs that it can never take are left out.
    product: by which to screen, one of `products.PRODUCTS`; by default the fastest, if the work is worth measuring.
    Or `gpu`: everything is computed on a GPU, in tiles of its own.
    note: called from time to time with how many more rows of large groups are fully compared; not with a GPU.
    Order: no pair comes before one whose b is its a.
    """
    bounds = np.asarray(bounds)
    sizes = np.diff(bounds)
    members = sizes if members is None else members
    product = product_for(x_nd.shape[1], sizes, members, product)
    if product == "gpu":
        on = on_device.device()
        assert on is not None
        yield from on_device.near_pairs_on(on, x_nd, rows, bounds, floor, members, across=across, forest=forest)
        return
    waiting, count = [], 0
    for a, b, cosine in _compare_groups(
        x_nd, rows, bounds, members, Screen(floor, product), tile, forest, note, across=across
    ):
        if cosine is None:
            waiting.append((a, b))
            count += len(a)
        if count and (count >= BATCH or cosine is not None):  # an exact tile must not overtake what waits
            yield _decide(x_nd, rows, waiting, floor)
            waiting, count = [], 0
        if cosine is not None:
            yield a, b, cosine
    if count:
        yield _decide(x_nd, rows, waiting, floor)


def product_for(dim: int, sizes: np.ndarray, members: np.ndarray, product: str | None) -> str:
    """Name the product by which to screen groups of these sizes: the one given, else the processor's fastest.

    If there is little to compare, it is f32, for which torch need not be loaded; a product that this machine computes
    wrongly is never used. If a machine with a GPU chose `gpu` and this one has none, the product is chosen anew.
    """
    if product is None or (product == "gpu" and on_device.device() is None):
        return fastest_product(dim) if is_worth_rounding(dim, sizes, members) else "f32"
    return product if is_right(product, dim) else "f32"


def is_worth_rounding(dim: int, sizes: np.ndarray, members: np.ndarray) -> bool:
    """Say whether comparing groups of these sizes takes longer than loading torch does."""
    return float((sizes.astype(np.float64) * members).sum()) * dim > ROUNDED_WORK


def batches_of_groups(bounds: np.ndarray, limit: int) -> Iterator[tuple[int, int]]:
    """Cut groups that lie one after the other into runs [first, last) of at most `limit` rows, or of one group."""
    first = 0
    while first + 1 < len(bounds):
        last = max(first + 1, int(np.searchsorted(bounds, bounds[first] + limit, side="right")) - 1)
        yield first, last
        first = last


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
    members: np.ndarray,
    screen: Screen,
    tile: int,
    forest: Forest | None,
    note: Callable[[int], None] | None,
    *,
    across: bool,
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray | None]]:
    """Compare each group with itself: pairs that may be near, without a cosine; of dense tiles those that are, with it.

    Rows are prepared a panel at a time: many groups, or a part of one.
    """
    panel = max(1, PANEL // tile) * tile
    for first, last in batches_of_groups(bounds, PANEL):
        cuts, own = bounds[first : last + 1], members[first:last]
        start, end = int(cuts[0]), int(cuts[-1])
        yield *_pairs_of_small_groups(cuts, own, across=across), None
        yield from _compare_medium_groups(x_nd, rows, cuts, own, screen.floor, across=across, reduce=forest is not None)
        if (np.diff(cuts) <= MEDIUM).all():
            continue
        groups = [*zip(cuts[:-1].tolist(), (cuts[:-1] + own).tolist(), cuts[1:].tolist(), strict=True)]
        centres = _centres(x_nd, rows, groups if screen.product != "f32" else [])
        numbers = np.repeat(np.arange(len(groups)), np.diff(cuts))
        for i in range(start, end if len(groups) > 1 else groups[0][1], panel):
            left = screen.prepare(x_nd, rows[i : min(i + panel, end)], centres, numbers[i - start :])
            rights = range(i, end, panel)
            for j in rights:
                right = left
                if j > i:
                    right = screen.prepare(x_nd, rows[j : min(j + panel, end)], centres, numbers[j - start :])
                for above, below in _tiles(groups, i, j, panel, tile, across=across):
                    p, q = slice(above.start - i, above.stop - i), slice(below.start - j, below.stop - j)
                    known = None if forest is None else forest.connected_levels()
                    levels = None if known is None else (known[above], known[below])
                    found = screen.candidates(left[p], right[q], levels)
                    if screen.product != "f32" and _is_dense(found, rows[above], rows[below]):
                        found = screen.candidates_in_f32(x_nd, rows[above], rows[below], levels)
                    if len(found):
                        a, b, cosine = _decide_tile(
                            x_nd, rows[above], rows[below], found, screen.floor, reduce=forest is not None
                        )
                        yield a + above.start, b + below.start, cosine
                if note is not None:
                    note((min(i + panel, end) - i) // len(rights))


def _pairs_of_small_groups(bounds: np.ndarray, members: np.ndarray, *, across: bool) -> tuple[np.ndarray, np.ndarray]:
    """List all pairs of the groups of 2 … SMALL rows, but those of two probing rows; across: nor of two members."""
    sizes = np.diff(bounds)
    left, right = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for size in range(2, SMALL + 1):
        starts = bounds[:-1][sizes == size][:, None]
        i, j = np.triu_indices(size, 1)
        own = members[sizes == size][:, None]
        wanted = (i < own) & (j >= own) if across else i < own
        left.append((starts + i)[wanted])
        right.append((starts + j)[wanted])
    return np.concatenate(left), np.concatenate(right)


def _compare_medium_groups(
    x_nd: np.ndarray,
    rows: np.ndarray,
    bounds: np.ndarray,
    members: np.ndarray,
    floor: float,
    *,
    across: bool,
    reduce: bool,
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray | None]]:
    """Compare each of the groups of SMALL + 1 … MEDIUM rows with itself, those of like size in one batched product.

    Yields as `_compare_groups`. Groups are filled up to a multiple of STEP rows, with their last row: a tile on the
    diagonal of g groups is [g, m, m].
    """
    sizes = np.diff(bounds)
    widths = np.where((sizes > SMALL) & (sizes <= MEDIUM), -(-sizes // STEP) * STEP, 0)
    # Memory that is fetched anew for each product costs as much as the product.
    dim = x_nd.shape[1]
    halves, space = (np.empty((max(MEDIUM, CACHED // dim), dim), dtype) for dtype in (x_nd.dtype, np.float32))
    for width in np.unique(widths[widths > 0]).tolist():
        groups = np.flatnonzero(widths == width)
        at_once, together, places = MEDIUM_ROWS // width, max(1, CACHED // (width * dim)), np.arange(width)
        tiles = np.empty((at_once, width, width), np.float32)
        for first in range(0, len(groups), at_once):
            here = groups[first : first + at_once]
            starts, size, own = bounds[here], sizes[here], members[here]
            taken = rows[starts[:, None] + np.minimum(places, size[:, None] - 1)].ravel()
            products = tiles[: len(here)]
            for part in range(0, len(here), together):
                into = products[part : part + together]
                some = taken[part * width : (part + len(into)) * width]
                x_md = widen(np.take(x_nd, some, axis=0, mode="clip", out=halves[: len(some)]), space[: len(some)])
                x_gmd = x_md.reshape(len(into), width, dim)
                np.matmul(x_gmd, x_gmd.swapaxes(1, 2), out=into)
            products.reshape(len(here), -1)[:, :: width + 1] = -2  # a row beside itself: below any floor
            # Positions in the flat array are listed many times faster than those of three dimensions.
            found = np.flatnonzero(products.ravel() > np.float32(floor - dim * 2.0**-23))
            if not len(found):
                continue
            group, a, b = _split(found, width)
            wanted = (a < b) & (a < own[group]) & (b < size[group])
            if across:
                wanted &= b >= own[group]
            group, a, b = group[wanted], a[wanted], b[wanted]
            dense = np.bincount(group, minlength=len(here)) > DENSE * size * size
            for number in np.flatnonzero(dense).tolist():
                mine, place = group == number, int(starts[number])
                yield _decide_medium_group(
                    x_nd, rows[place : place + int(size[number])], a[mine], b[mine], place, floor, reduce=reduce
                )
            few = ~dense[group]
            yield starts[group[few]] + a[few], starts[group[few]] + b[few], None


def _split(flat: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Split flat positions in [g, size, size] into their three indices."""
    group, rest = np.divmod(flat, size * size)
    return group, *np.divmod(rest, size)


def _decide_medium_group(
    x_nd: np.ndarray, rows: np.ndarray, a: np.ndarray, b: np.ndarray, start: int, floor: float, *, reduce: bool
) -> Edges:
    """Multiply a group exactly. a, b: its pairs that may be near. start: the place of its first row."""
    exact = exact_products(x_nd[rows], x_nd[rows])
    products = np.full_like(exact, -2)  # below any floor
    products[a, b] = exact[a, b]
    a, b = edges_of_tile(products, floor, square=True, reduce=reduce)
    return a + start, b + start, products[a, b]


def _centres(x_nd: np.ndarray, rows: np.ndarray, groups: list[Group]) -> np.ndarray:
    """Estimate the mean of each group that is large enough to be screened, f32 [g, d], from a few of its rows."""
    centres = np.zeros((len(groups), x_nd.shape[1]), np.float32)
    for number, (start, _, end) in enumerate(groups):
        if end - start > MEDIUM:
            centres[number] = widen(x_nd[rows[start : end : -(-(end - start) // CENTRE_SAMPLE)]]).mean(axis=0)
    return centres


def _tiles(
    groups: list[Group], i: int, j: int, panel: int, tile: int, *, across: bool
) -> Iterator[tuple[slice, slice]]:
    """List the tiles that groups have in the panels that begin at rows i <= j, none below the diagonal, by their rows.

    A tile's lower side lies within the members or within the probing rows, so that a tile on the diagonal is square.
    """
    for start, members_end, end in groups:
        if end - start <= MEDIUM:
            continue
        for p in range(max(start, i), min(members_end, i + panel), tile):
            above = slice(p, min(p + tile, members_end, i + panel))
            last = min(end, j + panel)
            among_members = range(0) if across else range(max(p, j), min(members_end, last), tile)
            for q in (*among_members, *range(max(members_end, j), last, tile)):
                yield above, slice(q, min(q + tile, last, members_end if q < members_end else last))


def _is_dense(found: np.ndarray, above: np.ndarray, below: np.ndarray) -> bool:
    return len(found) > DENSE * len(above) * len(below)


def _decide_tile(
    x_nd: np.ndarray, above: np.ndarray, below: np.ndarray, found: np.ndarray, floor: float, *, reduce: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Turn a tile's candidates into places in it, without a cosine; a dense tile's near pairs come with theirs.

    above, below: the tile's rows of x_nd. reduce: of a dense tile's edges only its forest is wanted, if they are many.
    """
    square = bool(above[0] == below[0])
    if not _is_dense(found, above, below):
        a, b = np.divmod(found, len(below))
        upper = a < b if square else slice(None)
        return a[upper], b[upper], None
    products = exact_products(x_nd[above], x_nd[below])
    if square:
        products[np.tril_indices(len(above))] = -2  # below any floor
    a, b = edges_of_tile(products, floor, square=square, reduce=reduce)
    return a, b, products[a, b]


def differing_bits(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Count the bits in which perceptual hashes u64 differ, or, where fewer, one and the other's mirror image, u8.

    A hash's bits are the signs of an image's cosine frequencies. Mirroring an image turns the sign of the odd
    horizontal ones, which are every second bit: the mirror image's hash is `hash ^ MIRROR`.
    """
    return np.asarray(np.minimum(np.bitwise_count(left ^ right), np.bitwise_count(left ^ right ^ MIRROR)))


def nearest_similarity(x_nd: np.ndarray, targets_md: np.ndarray, block: int = 4096) -> np.ndarray:
    """Find each row's highest cosine to any target, f32 [n]; -1 without targets. Rows and targets are unit vectors.

    Both f16 or f32. On a GPU where there is one.
    """
    import torch

    on = on_device.device() or "cpu"
    best = torch.full((len(x_nd),), -1.0, device=on)
    rows = torch.tensor(x_nd, device=on).float()
    for first in range(0, len(targets_md), block):
        targets = torch.tensor(targets_md[first : first + block], device=on).float()
        torch.maximum(best, (rows @ targets.T).amax(dim=1), out=best)
    return np.asarray(best.cpu().numpy())
