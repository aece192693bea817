"""A fast product that finds every pair of rows that may lie above a floor, and few others.

The screen multiplies rounded vectors and compares the results with the floor less a bound on its own error. It can
report a pair that is not near, but never miss one that is; the exact cosine then decides (`exact`). So the screen
affects only the time that a comparison takes, not its result.

If the processor multiplies int8 or bf16 faster than f32 (`products`), rows are rounded to that. Two steps make the
rounding errors small. The rows of a cluster are near its centre c, so the differences x - c are short; these are
rounded instead, using

    x.y = (x - c).(y - c) + offset(x) + offset(y),        offset(x) = c.x - c.c / 2.

And for int8, which has one scale for all components, a rotation R, the same for all rows, spreads the size of a few
large components over all of them; it keeps dot products: (R u).(R v) = u.v. With r = R (x - c) and its rounded form
r - e, and s and f likewise for y, the Cauchy-Schwarz inequality gives

    |r.s - (r - e).(s - f)| = |r.f + e.s - e.f| <= |r||f| + |e||s| + |e||f|.

The lengths |r| and |e| are measured for each row when it is prepared, so that the bound holds for any input. A product
of int8 is exact; one of bf16 is itself rounded, by at most 2 ** -8 of |r||s|, which is added to the bound.

Shapes: rows [n, d]; products int32 or f32 [p, q]. Cost: p q d multiplications, and d (a + b) a row for the rotation,
a b = d. Everything that is added beside the products is accurate to a few units of 2 ** -23, which the bound includes.
"""

import math
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import numpy as np

from curate.vectors.exact import widen
from curate.vectors.products import multiply

PREPARE_ROWS = 256  # rounded at once: they stay in the cache
SCALE_SAMPLE = 16  # one row in this many is used to choose the scale
COMMON = 0.95  # share of rows whose components all fit a byte; the others are clipped, and their error measured
SMALLEST_SCALE = 2.0**-13  # with it the cosine 1, in units of scale ** 2, is 2 ** 26 and fits an i32
F32_ERROR = 2.0**-12  # relative, of a length computed in f32, with room to spare
BF16_ERROR = 2.0**-8  # relative, of a product summed in f32 and rounded to bf16, with room to spare
Levels = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Prepared:
    """Rows in the form that is multiplied.

    rows: [n, d], f32 as they are, or rounded: R (x - c) / scale in int8, x - c in bf16 (scale 1). The other fields
    belong to rounded rows, and are f64.
    error: a bound on the length of the rounding error that holds for most rows; excess [n]: by how much a row's own
    error may be longer. offset [n]: c.x - c.c / 2. length [n]: |x - c|.
    """

    rows: Any
    scale: float = 1.0
    error: float = 0.0
    excess: np.ndarray = field(default_factory=lambda: np.empty(0))
    offset: np.ndarray = field(default_factory=lambda: np.empty(0))
    length: np.ndarray = field(default_factory=lambda: np.empty(0))

    def __getitem__(self, part: slice) -> "Prepared":
        columns = {name: getattr(self, name)[part] for name in ("rows", "excess", "offset", "length")}
        return replace(self, **columns)

    def error_beside(self, other: "Prepared") -> np.ndarray:
        """Bound each row's share of the error of its products with the other's rows, f64 [n].

        The bound |r||f| + |e||s| + |e||f| of the module, split into a term for each row: the common errors times the
        lengths, and the excess times the longest row of the other side. `error * other.error` is left to the caller.
        """
        reach = float((other.length + other.excess).max(initial=0)) + other.error
        return self.length * other.error + self.excess * reach


@cache
def _rotation(dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw two rotations f32, [a, a] and [b, b], a b = dim, where a is the largest divisor up to the square root."""
    a = next(a for a in range(math.isqrt(dim), 0, -1) if dim % a == 0)
    rng = np.random.default_rng(0)
    first, second = (np.linalg.qr(rng.standard_normal((n, n)))[0].astype(np.float32) for n in (a, dim // a))
    return first, second


def rotate(x_nd: np.ndarray) -> np.ndarray:
    """Turn rows f32 by one rotation that mixes all components; it keeps dot products.

    The components of embeddings differ in size, some tenfold, and the largest decides how coarse a byte is. The
    rotation is the Kronecker product of two small ones, which costs d (a + b) multiplications a row and not d ** 2:
    a row is seen as an [a, b] matrix M and becomes second^T M^T first.
    """
    first, second = _rotation(x_nd.shape[1])
    a, b = len(first), len(second)
    turned = (x_nd.reshape(-1, b) @ second).reshape(-1, a, b).swapaxes(1, 2)
    return np.reshape(turned.reshape(-1, a) @ first, x_nd.shape)


def round_rows(
    x_nd: np.ndarray, rows: np.ndarray, centres_gd: np.ndarray, groups: np.ndarray, product: str
) -> Prepared:
    """Round rows of x_nd (f16 or f32), less the centre of each one's group, to int8 with one scale, or to bf16.

    rows: i64, at least one. centres_gd: f32, any; the nearer a centre is to its rows, the smaller is their error.
    groups: i64, the centre of each row; may be longer than `rows`.
    """
    import torch

    int8 = product == "int8"
    groups = groups[: len(rows)]
    scale = _scale(x_nd, rows, centres_gd, groups) if int8 else 1.0
    found = torch.empty((len(rows), x_nd.shape[1]), dtype=torch.int8 if int8 else torch.bfloat16)
    errors, offset, length = np.empty((3, len(rows)))
    for first in range(0, len(rows), PREPARE_ROWS):
        part = slice(first, first + PREPARE_ROWS)
        centre = centres_gd[groups[part]]
        left = widen(x_nd[rows[part]])
        offset[part] = np.einsum("nd,nd->n", left - centre / 2, centre)
        left -= centre
        length[part] = np.sqrt(np.einsum("nd,nd->n", left, left))
        if int8:
            left = rotate(left)
            left *= np.float32(1 / scale)
            whole = np.clip(np.rint(left), -127, 127)
            found[part] = torch.from_numpy(whole)
        else:
            found[part] = torch.from_numpy(left)
            whole = found[part].float().numpy()
        left -= whole  # what is left is the error, in units of the scale, clipping included
        errors[part] = np.einsum("nd,nd->n", left, left)
    # The last two terms bound what f32 loses in the rotation and in x - c, whose components are below 2.
    errors = np.sqrt(errors) * scale * (1 + F32_ERROR) + F32_ERROR / 16 + x_nd.shape[1] * 2.0**-23
    error = float(np.quantile(errors, COMMON))
    return Prepared(found, scale, error, np.maximum(errors - error, 0), offset, length)


def _scale(x_nd: np.ndarray, rows: np.ndarray, centres_gd: np.ndarray, groups: np.ndarray) -> float:
    """Choose the unit of a byte so that the largest components of most rows are 127 units."""
    sampled = np.abs(rotate(widen(x_nd[rows[::SCALE_SAMPLE]]) - centres_gd[groups[::SCALE_SAMPLE]])).max(axis=1)
    return max(float(np.quantile(sampled, COMMON)) / 127, SMALLEST_SCALE)


class Screen:
    """Finds the pairs of rows that may lie above a floor: `prepare` each side, then compare any two parts of them."""

    def __init__(self, floor: float, product: str = "f32") -> None:
        """product: one of `products.PRODUCTS`."""
        self.floor = floor
        self.product = product

    def prepare(self, x_nd: np.ndarray, rows: np.ndarray, centres_gd: np.ndarray, groups: np.ndarray) -> Prepared:
        """Bring rows of x_nd, unit rows, into the form that is multiplied (the last two: see `round_rows`)."""
        if self.product != "f32" and len(rows):
            return round_rows(x_nd, rows, centres_gd, groups, self.product)
        return Prepared(widen(x_nd[rows]))

    def candidates(self, left: Prepared, right: Prepared, levels: Levels | None = None) -> np.ndarray:
        """Compare all rows on the left with all on the right: flat positions in [p, q], i64, of pairs that may be near.

        With rounded rows, the same centre must have been taken off both sides. levels: f64 [p] and [q], the floor or
        more for each row; a pair that is not above the lower of its two levels is not wanted.
        """
        products = multiply(left.rows, right.rows, self.product)
        dim = left.rows.shape[1]
        if self.product == "f32":
            error = dim * 2.0**-23
            wanted = self.floor - error if levels is None else np.minimum.outer(*levels) - error
            return np.flatnonzero((products > np.float32(wanted)).ravel())
        if self.product == "bf16":
            return self._above_bf16(products, left, right, levels)
        # Compared are whole numbers, in units of scale * scale: the products come as int32, and stay so. Offsets and
        # bounds are rounded up, thresholds down, so that the rounding never loses a pair.
        unit = left.scale * right.scale
        raise_p = np.ceil((left.offset + left.error_beside(right)) / unit).astype(np.int32)
        raise_q = np.ceil((right.offset + right.error_beside(left)) / unit).astype(np.int32)
        error = left.error * right.error + dim * 2.0**-22  # the last: of the offsets, summed in f32
        products += raise_p[:, None]
        if levels is None:
            return np.flatnonzero((products > math.floor((self.floor - error) / unit) - 1 - raise_q).ravel())
        products += raise_q
        wanted_p, wanted_q = (np.floor((level - error) / unit - 1).astype(np.int32) for level in levels)
        return np.flatnonzero((products > np.minimum.outer(wanted_p, wanted_q)).ravel())

    def _above_bf16(self, products: np.ndarray, left: Prepared, right: Prepared, levels: Levels | None) -> np.ndarray:
        """Do the comparing of `candidates` for products of bf16."""
        raise_p = (left.offset + left.error_beside(right)).astype(np.float32)
        raise_q = (right.offset + right.error_beside(left)).astype(np.float32)
        reach = float((left.length + left.excess).max(initial=0) + left.error)
        reach *= float((right.length + right.excess).max(initial=0) + right.error)
        # The products' own rounding; then that of the offsets and of what is added up here, in f32.
        error = left.error * right.error + BF16_ERROR * reach + left.rows.shape[1] * 2.0**-22 + 2.0**-20
        products += raise_p[:, None]
        products += raise_q
        wanted = self.floor - error if levels is None else np.minimum.outer(*levels) - error
        return np.flatnonzero((products > np.float32(wanted)).ravel())

    def candidates_in_f32(
        self, x_nd: np.ndarray, above: np.ndarray, below: np.ndarray, levels: Levels | None
    ) -> np.ndarray:
        """Do what `candidates` does for rows `above` and `below` of x_nd, with the smaller error of f32."""
        left, right = Prepared(widen(x_nd[above])), Prepared(widen(x_nd[below]))
        return Screen(self.floor).candidates(left, right, levels)
