"""Products on a GPU: the nearest centroids of rows, and the near-duplicate pairs of clusters.

A GPU multiplies halves, with sums in f32, some ten times as fast as f32 by f32. Both tasks are put in that form:

- Stored vectors are halves already. Their products screen pairs; a pair that may be near is decided by its exact
  cosine, summed in f64, which is the same number for any device (`exact`). So edges are the same bytes everywhere.
- A centroid c, f32, is split into two halves, c S = hi + lo with S = 2 ** 10, so that neither is subnormal; then
  x.c = (x.hi + x.lo) / S to about 2 ** -22, the accuracy of an f32 product at twice the cost of a product of halves.
  Which of two centroids is nearest can differ from another device's answer where the two are equal within rounding.

Rows come from memory or disk a block at a time, the next block's copy beside this block's products. On a device without
products of halves with f32 sums (a processor, older PyTorch) both sides are widened to f32 first: the same results.

Shapes: rows x_nd f16 [n, d], centroids f32 [k, d]. Cost: 4 n k d operations to assign, 2 d a pair to compare. Memory of
the device: twice the centroids, or two panels of 2 ** 15 rows, and about 1 GiB; none of it grows with the pool.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import numpy as np

from curate.vectors.exact import widen
from curate.vectors.forest import Edges, Forest, edges_of_tile

if TYPE_CHECKING:
    from torch import Tensor

SPLIT_SCALE = 2.0**10
BLOCK_ROWS = 1 << 14
TILE_CENTROIDS = 1 << 13
PANEL = 1 << 15  # rows of a cluster on the device at a time, on either side
TILE = 1 << 11  # rows multiplied with as many others: their products take 16 MiB
SUM_ERROR = 2.0**-21  # per component: bounds the error of an f32 sum of exact products, however it is rounded
DENSE = 1 / 32  # share of a tile's pairs from which all of them are multiplied exactly
DECIDE_PAIRS = 1 << 18  # pairs whose exact cosines are computed at once
Means = Callable[[np.ndarray, np.ndarray, np.random.Generator], np.ndarray]


@cache
def device() -> str | None:
    """Name the GPU that this process may use, cuda, or None; asked by the worker itself."""
    import torch

    return "cuda" if torch.cuda.is_available() else None


def describe(on: str) -> str:
    """Name a device and its model, for a manifest."""
    if not on.startswith("cuda"):
        return on
    import torch

    return f"{on} ({torch.cuda.get_device_name()})"


def devices() -> list[str]:
    """Name all GPUs that this process may use."""
    import torch

    return [f"cuda:{number}" for number in range(torch.cuda.device_count())]


def let_go() -> None:
    """Release GPU memory that torch caches for this process and no longer uses: workers share a card."""
    import torch

    torch.cuda.empty_cache()


@cache
def _sums_halves_in_f32(on: str) -> bool:
    """Say whether the device returns products of halves as f32 sums."""
    import torch

    ones = torch.ones((16, 16), dtype=torch.float16, device=on)
    try:
        return bool((torch.mm(ones, ones, out_dtype=torch.float32) == 16).all())
    except (RuntimeError, TypeError, NotImplementedError):
        return False


@cache
def _sums_segments(on: str) -> bool:
    """Say whether torch has `segment_reduce`, which it does not document, and sums by it on the device."""
    import torch

    rows, lengths = torch.ones((3, 2), device=on), torch.tensor([1, 0, 2], device=on)
    try:
        return torch.segment_reduce(rows, "sum", lengths=lengths, unsafe=True)[:, 0].tolist() == [1, 0, 2]
    except (AttributeError, TypeError, RuntimeError):
        return False


def _sums_of_segments(rows_nd: "Tensor", of_n: "Tensor", count: int) -> "Tensor":
    """Sum rows f32 [n, d] that are sorted by their segment, i64 [n]; returns f32 [count, d], the same bytes each time.

    By halving: rows 1, 3, 5, … of a segment are added to those before them, until each segment has one row. In a round
    no two additions touch the same row, so no order is left to chance.
    """
    import torch

    while True:
        place = torch.arange(len(of_n), device=of_n.device)
        first = torch.searchsorted(of_n, of_n)  # where each row's segment begins
        odd = (place - first) % 2 == 1
        if not bool(odd.any()):
            break
        at = odd.nonzero().flatten()
        rows_nd = rows_nd.index_copy(0, at - 1, rows_nd[at - 1] + rows_nd[at])
        rows_nd, of_n = rows_nd[~odd], of_n[~odd]
    return torch.zeros((count, rows_nd.shape[1]), device=rows_nd.device).index_copy(0, of_n, rows_nd)


def half_products(left_pd: "Tensor", right_qd: "Tensor") -> "Tensor":
    """Multiply rows of halves, all with all, summed in f32: f32 [p, q] on their device."""
    import torch

    if _sums_halves_in_f32(left_pd.device.type):
        return torch.mm(left_pd, right_qd.T, out_dtype=torch.float32)
    return left_pd.float() @ right_qd.float().T


def blocks_on(on: str, x_nd: np.ndarray, rows: int = BLOCK_ROWS) -> Iterator["Tensor"]:
    """Yield rows of a matrix as tensors on a device, one block at a time; the next is copied while this one is used."""
    import torch

    firsts = range(0, len(x_nd), rows)
    if not on.startswith("cuda"):
        for first in firsts:
            yield torch.from_numpy(np.require(x_nd[first : first + rows], requirements=["C", "W"]))
        return
    copying, using = torch.cuda.Stream(on), torch.cuda.current_stream(on)  # type: ignore[no-untyped-call]

    def send(first: int) -> "Tensor":
        part = x_nd[first : first + rows]
        pinned = torch.empty(part.shape, dtype=torch.from_numpy(part[:0].copy()).dtype, pin_memory=True)
        pinned.numpy()[...] = part
        with torch.cuda.stream(copying):
            return pinned.to(on, non_blocking=True)

    coming = [send(first) for first in firsts[:1]]
    for following in range(1, len(firsts) + 1):
        using.wait_stream(copying)
        here = coming.pop()
        here.record_stream(using)
        coming = [send(first) for first in firsts[following : following + 1]]
        yield here


class Centroids:
    """Centroids on a device, ready to be asked for the nearest of many rows."""

    def __init__(self, centroids_kd: np.ndarray, on: str, *, coarse: bool = False) -> None:
        """centroids_kd: f32 [k, d], unit rows. on: a device of torch. coarse: round centroids to halves."""
        import torch

        self.on, self.count, self.coarse = on, len(centroids_kd), coarse
        scaled = torch.from_numpy(np.ascontiguousarray(centroids_kd, np.float32)).to(on) * SPLIT_SCALE
        high = scaled.half()
        self.halves = high if coarse else torch.cat([high, (scaled - high.float()).half()], dim=1)

    def nearest(self, x_nd: np.ndarray, neighbours: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """Find the nearest centroids of rows, ties by the lowest number.

        x_nd: f16 [n, d], unit rows. neighbours: one, or two of at least two centroids.
        Returns i32 [neighbours, n], and the cosine to the nearest, f32 [n].
        """
        found = [
            self.nearest_of_block(rows, neighbours) for rows in blocks_on(self.on, x_nd)
        ]  # small, and not waited for
        numbers = [each.int().cpu().numpy() for each, _ in found]
        cosines = [each.cpu().numpy() for _, each in found]
        nothing = np.zeros((neighbours, 0), np.int32), np.zeros(0, np.float32)
        return np.concatenate([nothing[0], *numbers], axis=1), np.concatenate([nothing[1], *cosines])

    def nearest_of_block(self, rows: "Tensor", neighbours: int = 1) -> tuple["Tensor", "Tensor"]:
        """Do what `nearest` does for rows on the device; returns i64 [neighbours, n] and f32 [n] there."""
        import torch

        best = torch.zeros((neighbours, len(rows)), dtype=torch.int64, device=rows.device)
        score = torch.full((neighbours, len(rows)), -torch.inf, device=rows.device)
        rows = rows if self.coarse else rows.repeat(1, 2)
        for first in range(0, self.count, TILE_CENTROIDS):
            scores = half_products(rows, self.halves[first : first + TILE_CENTROIDS])
            for _ in range(min(neighbours, scores.shape[1])):
                value, at = scores.max(dim=1)
                scores.scatter_(1, at[:, None], -torch.inf)
                at = at + first
                nearer = value > score[0]  # tiles come by number: a tie stays with the lower one
                if neighbours == 2:
                    second = value > score[1]
                    best[1] = torch.where(nearer, best[0], torch.where(second, at, best[1]))
                    score[1] = torch.where(nearer, score[0], torch.where(second, value, score[1]))
                best[0] = torch.where(nearer, at, best[0])
                score[0] = torch.where(nearer, value, score[0])
        return best, score[0] / SPLIT_SCALE


def lloyd(on: Sequence[str], x_nd: np.ndarray, k: int, iters: int, seed: int, means: Means) -> np.ndarray:
    """Fit k centroids to unit rows f16 [n, d] by Lloyd's algorithm on one or several devices; returns f32 [k, d].

    Each device has a part of the rows, in its memory if they take less than half of what is free, else streamed anew in
    each iteration. Rows go to the nearest of the centroids rounded to halves; sums are f32. The order of additions is
    fixed on each device, and so is that of the devices: same rows, seed and devices, same bytes.
    means: turns sums f32 [k, d] and counts i64 [k] into unit centroids.
    """
    import torch

    rng = np.random.default_rng(seed)
    centroids = widen(x_nd[np.sort(rng.permutation(len(x_nd))[:k])])
    parts = np.array_split(x_nd, len(on))
    held = [list(blocks_on(each, part)) if _fits(each, part) else None for each, part in zip(on, parts, strict=True)]
    for _ in range(iters):
        steps = [_Step(each, centroids) for each in on]
        blocks = [
            here if here is not None else blocks_on(each, part)
            for each, part, here in zip(on, parts, held, strict=True)
        ]
        for at_once in zip_longest(*blocks):  # no step waits for its device, so that all of them work
            for step, rows in zip(steps, at_once, strict=True):
                if rows is not None:
                    step.add(rows)
        sums = sum((step.sums.to(on[0]) for step in steps[1:]), steps[0].sums)
        counts = sum((step.counts.to(on[0]) for step in steps[1:]), steps[0].counts)
        assert isinstance(sums, torch.Tensor) and isinstance(counts, torch.Tensor)
        centroids = means(sums.cpu().numpy(), counts.cpu().numpy(), rng)
    return centroids


def _fits(on: str, part: np.ndarray) -> bool:
    """Say whether a matrix takes less than half of a device's free memory."""
    import torch

    return not on.startswith("cuda") or part.nbytes < torch.cuda.mem_get_info(on)[0] / 2


class _Step:
    """An iteration's sums of rows by their nearest centroid, on one device."""

    def __init__(self, on: str, centroids_kd: np.ndarray) -> None:
        import torch

        self.centroids = Centroids(centroids_kd, on, coarse=True)
        self.sums = torch.zeros(centroids_kd.shape, device=on)
        self.counts = torch.zeros(len(centroids_kd), dtype=torch.int64, device=on)

    def add(self, rows: "Tensor") -> None:
        """Assign a block of rows f16 and add them up: sorted by centroid, for atomic sums would differ run by run."""
        import torch

        nearest = self.centroids.nearest_of_block(rows)[0][0]
        here = torch.zeros_like(self.counts).scatter_add_(0, nearest, torch.ones_like(nearest))
        order = nearest.argsort(stable=True)
        if _sums_segments(rows.device.type):
            self.sums += torch.segment_reduce(rows[order].float(), "sum", lengths=here, unsafe=True)
        else:
            self.sums += _sums_of_segments(rows[order].float(), nearest[order], len(here))
        self.counts += here


def near_pairs_on(
    on: str,
    x_nd: np.ndarray,
    rows: np.ndarray,
    bounds: np.ndarray,
    floor: float,
    members: np.ndarray,
    *,
    across: bool = False,
    forest: Forest | None = None,
    tile: int = TILE,
    panel: int = PANEL,
) -> Iterator[Edges]:
    """Yield what `near_pairs.near_pairs` yields, computed on a device.

    Groups of up to a tile's rows are multiplied with those beside them, and pairs of two groups struck out: to find
    which groups fit together would take longer than the device needs for the pairs.
    """
    import torch

    groups = [*zip(bounds[:-1].tolist(), (bounds[:-1] + members).tolist(), bounds[1:].tolist(), strict=True)]
    compare = _Comparison(on, floor, forest, across=across)

    def load(first: int, last: int) -> "Tensor":
        return torch.from_numpy(np.ascontiguousarray(x_nd[rows[first:last]])).to(on)

    at = 0
    while at < len(groups):
        start, members_end, end = groups[at]
        if end - start > panel:
            for i in range(start, members_end, panel):
                left = load(i, min(i + panel, end))
                for j in range(i, end, panel):
                    right = left if j == i else load(j, min(j + panel, end))
                    yield from compare.panels(left, i, right, j, members_end, tile)
            at += 1
            continue
        last = at  # as many whole groups as a panel holds
        while last < len(groups) and groups[last][2] - start <= panel:
            last += 1
        here = load(start, groups[last - 1][2])
        while at < last:
            first, members_end, end = groups[at]
            window = at
            while window < last and groups[window][2] - first <= tile:
                window += 1
            if window > at:
                part = here[first - start : groups[window - 1][2] - start]
                yield from compare.window(part, groups[at:window])
                at = window
            else:
                part = here[first - start : end - start]
                yield from compare.panels(part, first, part, first, members_end, tile)
                at += 1


class _Comparison:
    """Compares tiles of rows on a device. Places are those of the rows in the list that is compared."""

    def __init__(self, on: str, floor: float, forest: Forest | None, *, across: bool) -> None:
        self.on, self.floor, self.forest, self.across = on, floor, forest, across

    def panels(self, left: "Tensor", i: int, right: "Tensor", j: int, members_end: int, tile: int) -> Iterator[Edges]:
        """Compare the members on the left with the rows on the right, of one group, whose first places are i <= j."""
        middle = min(max(members_end - j, 0), len(right))  # no tile holds members and probing rows
        for p in range(0, min(len(left), members_end - i), tile):
            above, start = left[p : min(p + tile, members_end - i)], p if i == j else 0
            sides = ((start, 0 if self.across else middle), (max(start, middle), len(right)))
            for first, stop in sides:
                for q in range(first, stop, tile):
                    yield from self._tile(above, i + p, right[q : min(q + tile, stop)], j + q)

    def window(self, part: "Tensor", groups: Sequence[tuple[int, int, int]]) -> Iterator[Edges]:
        """Compare each of several groups, which lie one after the other, with itself."""
        import torch

        first = groups[0][0]
        sizes = torch.tensor([end - start for start, _, end in groups], device=self.on)
        number = torch.repeat_interleave(torch.arange(len(groups), device=self.on), sizes)
        ends = torch.tensor([end - first for _, end, _ in groups], device=self.on)[number]
        member = torch.arange(len(part), device=self.on) < ends
        wanted = (number[:, None] == number) & member[:, None]
        if self.across:
            wanted &= ~member
        yield from self._tile(part, first, part, first, wanted)

    def _tile(
        self, above: "Tensor", p: int, below: "Tensor", q: int, wanted: "Tensor | None" = None
    ) -> Iterator[Edges]:
        """Compare rows from place p on with rows from place q on. wanted: bool [p, q], which pairs; by default all."""
        import torch

        if not len(above) or not len(below):
            return
        error = above.shape[1] * SUM_ERROR
        levels = None if self.forest is None else self.forest.connected_levels()
        wanted_above: Any = self.floor - error
        if levels is not None:
            one, other = (
                torch.from_numpy(levels[first : first + len(side)]).to(self.on)
                for first, side in ((p, above), (q, below))
            )
            wanted_above = (torch.minimum(one[:, None], other) - error).float()
        if p == q:
            upper = torch.ones((len(above), len(below)), dtype=torch.bool, device=self.on).triu_(1)
            wanted = upper if wanted is None else wanted & upper
        near = half_products(above, below) > wanted_above
        if wanted is not None:
            near &= wanted
        found = near.flatten().nonzero().flatten()
        if not len(found):
            return
        if len(found) > DENSE * len(above) * len(below):
            yield self._dense(above, p, below, q, wanted)
            return
        a, b = found // len(below), found % len(below)
        parts = []
        for first in range(0, len(found), DECIDE_PAIRS):
            left, right = (side[at[first : first + DECIDE_PAIRS]].float() for side, at in ((above, a), (below, b)))
            parts.append((left * right).sum(dim=1, dtype=torch.float64).float())  # exact, as in `exact_cosines`
        cosine = torch.cat(parts)
        kept = cosine > np.float32(self.floor)
        yield (a[kept] + p).cpu().numpy(), (b[kept] + q).cpu().numpy(), cosine[kept].cpu().numpy()

    def _dense(self, above: "Tensor", p: int, below: "Tensor", q: int, wanted: "Tensor | None") -> Edges:
        """Multiply a tile exactly; of very many edges only their forest comes back, where that is what is wanted."""
        products = (above.double() @ below.double().T).float()
        if wanted is not None:
            products.masked_fill_(~wanted, -2)  # below any floor
        host = products.cpu().numpy()
        a, b = edges_of_tile(host, self.floor, square=p == q, reduce=self.forest is not None)
        return a + p, b + q, host[a, b]
