"""Cosines of stored unit vectors: screened by a fast product that may err, decided by an exact one.

The cosine of two stored f16 vectors is their exact dot product, rounded once to f32. Exact it can be: the product of
two f16 numbers fits an f32, all of them are multiples of 2 ** -48, and by Cauchy and Schwarz no partial sum of unit
vectors' products reaches 2, so that an f64 adds them without loss in any order. What is decided by it is therefore the
same for any block size, library and machine.

The fast product is one of bytes where the processor has instructions for it (four times the speed of f32), else of
f32. It errs by less than its slack (rows move by the length of their rounding errors, which is measured), so that
whatever it puts under a floor minus the slack is under the floor. The rows of a cluster lie near its centre; what is
rounded to bytes is a row's difference from it, turned: half as long, it loses half as much, and the loss counts half.
"""

import math
from dataclasses import dataclass, field, replace
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    pass

PREPARE_ROWS = 256
SAMPLED = 16  # every so manieth row is looked at to choose the bytes' scale
EXACT_ROWS = 512  # pairs decided at once: both sides stay in the cache
COMMON = 0.95  # share of rows that fit the bytes whole
SMALLEST = 2.0**-13  # scale: cosines in units of its square fit an i32
Levels = tuple[np.ndarray, np.ndarray]
F32_ERROR = 2.0**-12  # relative, of a length computed in f32, and to spare


def widen(x_nd: np.ndarray) -> np.ndarray:
    """Convert finite f16 to f32, exactly, at four times the speed of `astype`; f32 passes through.

    Moves exponent and fraction to their places in an f32 and mends the exponent's bias by a multiplication.
    """
    if x_nd.dtype != np.float16:
        return x_nd.astype(np.float32, copy=False)
    bits = x_nd.view(np.int16).astype(np.int32)
    np.left_shift(bits, 13, out=bits)
    np.bitwise_and(bits, np.int32(-0x70000001), out=bits)  # the sign extension fills the three bits above the exponent
    wide = bits.view(np.float32)
    return np.multiply(wide, np.float32(2.0**112), out=wide)


def exact_cosines(x_nd: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Compute the cosine of row a[i] and row b[i] of x_nd (f16, unit rows), f32 [len(a)]."""
    found = np.empty(len(a), np.float32)
    for first in range(0, len(a), EXACT_ROWS):
        part = slice(first, first + EXACT_ROWS)
        left = widen(x_nd[a[part]])
        left *= widen(x_nd[b[part]])
        found[part] = np.add.reduce(left, axis=1, dtype=np.float64)
    return found


def exact_products(left_pd: np.ndarray, right_qd: np.ndarray) -> np.ndarray:
    """Compute all cosines of two sets of f16 unit rows, f32 [p, q], equal to `exact_cosines`'s."""
    return (widen(left_pd).astype(np.float64) @ widen(right_qd).astype(np.float64).T).astype(np.float32)


@cache
def has_int8() -> bool:
    """Say whether this processor multiplies bytes without overflow, by instructions of its own."""
    import torch

    return bool(getattr(torch.cpu, "_is_vnni_supported", bool)())


@dataclass(frozen=True)
class Prepared:
    """Rows in the form that is multiplied: f32, or the bytes of what is left of each when its centre is taken off.

    rows: [n, d]. The rest are for bytes only. x - c, turned, is `scale` times its bytes but for a difference of length
    `error` and, where it is more, `excess` [n]. x.y = (x - c).(y - c) + along of x + along of y, `along` [n] being
    c.x - c.c / 2. `length` [n] is that of x - c. All f64.
    """

    rows: Any
    scale: float = 1.0
    error: float = 0.0
    excess: np.ndarray = field(default_factory=lambda: np.empty(0))
    along: np.ndarray = field(default_factory=lambda: np.empty(0))
    length: np.ndarray = field(default_factory=lambda: np.empty(0))

    def __getitem__(self, part: slice) -> "Prepared":
        columns = {name: getattr(self, name)[part] for name in ("rows", "excess", "along", "length")}
        return replace(self, **columns)

    def slack_beside(self, other: "Prepared") -> np.ndarray:
        """Bound what each row adds to the error of its products with the other's, f64 [n], but for both `error`s' own.

        By Cauchy and Schwarz, of rows r, s with differences e, f: |r.s - (r - e).(s - f)| <= |r||f| + |s||e| + |e||f|.
        """
        reach = float((other.length + other.excess).max(initial=0)) + other.error
        return self.length * other.error + self.excess * reach


@cache
def _rotation(dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw two rotations f32, [a, a] and [b, b], a * b = dim, a the largest divisor up to the root."""
    a = next(a for a in range(math.isqrt(dim), 0, -1) if dim % a == 0)
    rng = np.random.default_rng(0)
    first, second = (np.linalg.qr(rng.standard_normal((n, n)))[0].astype(np.float32) for n in (a, dim // a))
    return first, second


def rotate(x_nd: np.ndarray) -> np.ndarray:
    """Turn rows f32, all alike, so that every component takes a share of every other's size. Keeps dot products.

    The components of embeddings differ in size, some tenfold, and the largest decides how coarse a byte is. The turn
    is a Kronecker product of two small ones: d (a + b) multiplications a row and not d * d.
    """
    first, second = _rotation(x_nd.shape[1])
    a, b = len(first), len(second)
    turned = (x_nd.reshape(-1, b) @ second).reshape(-1, a, b).swapaxes(1, 2)
    return np.reshape(turned.reshape(-1, a) @ first, x_nd.shape)


def to_bytes(x_nd: np.ndarray, rows: np.ndarray, centres_gd: np.ndarray, groups: np.ndarray) -> Prepared:
    """Round these rows of x_nd (f16 or f32, at least one), less the centre of each one's group, to bytes of one scale.

    centres_gd: f32, any; the nearer they are to their rows, the less is lost. groups: i64, one a row, or more.
    """
    import torch

    groups = groups[: len(rows)]
    sampled = np.abs(rotate(widen(x_nd[rows[::SAMPLED]]) - centres_gd[groups[::SAMPLED]])).max(axis=1)
    scale = max(float(np.quantile(sampled, COMMON)) / 127, SMALLEST)  # what is larger is cut, and counted
    found = np.empty((len(rows), x_nd.shape[1]), np.int8)
    errors, along, length = np.empty((3, len(rows)))
    for first in range(0, len(rows), PREPARE_ROWS):
        part = slice(first, first + PREPARE_ROWS)
        centre = centres_gd[groups[part]]
        left = widen(x_nd[rows[part]])
        along[part] = np.einsum("nd,nd->n", left - centre / 2, centre)
        left -= centre
        length[part] = np.sqrt(np.einsum("nd,nd->n", left, left))
        left = rotate(left)
        left *= np.float32(1 / scale)
        whole = np.clip(np.rint(left), -127, 127)
        left -= whole
        errors[part] = np.einsum("nd,nd->n", left, left)
        found[part] = whole
    errors = np.sqrt(errors) * scale * (1 + F32_ERROR) + F32_ERROR / 16 + x_nd.shape[1] * 2.0**-23  # and of the turn
    error = float(np.quantile(errors, COMMON))
    return Prepared(torch.from_numpy(found), scale, error, np.maximum(errors - error, 0), along, length)


class Screen:
    """Finds the pairs of rows that may lie above a floor: `prepare` each side, then look at any two parts of them."""

    def __init__(self, floor: float, *, int8: bool) -> None:
        self.floor = floor
        self.int8 = int8

    def prepare(self, x_nd: np.ndarray, rows: np.ndarray, centres_gd: np.ndarray, groups: np.ndarray) -> Prepared:
        """Bring these rows of x_nd, unit rows, into the form that is multiplied (the last two: see `to_bytes`)."""
        if self.int8 and len(rows):
            return to_bytes(x_nd, rows, centres_gd, groups)
        return Prepared(widen(x_nd[rows]))

    def near(self, left: Prepared, right: Prepared, settled: Levels | None = None) -> np.ndarray:
        """Compare prepared rows, all with all: the flat positions in [p, q], i64, of the pairs that may be near.

        With bytes, both sides must have had the same centre taken off. settled: of rows on the left and on the right,
        the floor or more: what is not above the lower of a pair's two is not asked for.
        """
        if not self.int8:
            slack = left.rows.shape[1] * 2.0**-23
            wanted = self.floor - slack if settled is None else np.minimum.outer(*settled) - slack
            return np.flatnonzero((left.rows @ right.rows.T > np.float32(wanted)).ravel())
        import torch

        unit = left.scale * right.scale
        gain_p = np.ceil((left.along + left.slack_beside(right)) / unit).astype(np.int32)
        gain_q = np.ceil((right.along + right.slack_beside(left)) / unit).astype(np.int32)
        slack = left.error * right.error + left.rows.shape[1] * 2.0**-22  # the last: of `along`, added up in f32
        products = torch._int_mm(left.rows, right.rows.T).numpy()
        products += gain_p[:, None]
        if settled is None:
            return np.flatnonzero((products > math.floor((self.floor - slack) / unit) - 1 - gain_q).ravel())
        products += gain_q
        wanted_p, wanted_q = (np.floor((level - slack) / unit - 1).astype(np.int32) for level in settled)
        return np.flatnonzero((products > np.minimum.outer(wanted_p, wanted_q)).ravel())

    def look_closer(self, x_nd: np.ndarray, above: np.ndarray, below: np.ndarray, settled: Levels | None) -> np.ndarray:
        """Do what `near` does for these rows of x_nd, in f32."""
        return Screen(self.floor, int8=False).near(Prepared(widen(x_nd[above])), Prepared(widen(x_nd[below])), settled)


def cosines(a_nd: np.ndarray, b_nd: np.ndarray) -> np.ndarray:
    """Compute the cosine of each row of a with its row of b: f32 [n]."""
    a, b = a_nd.astype(np.float32), b_nd.astype(np.float32)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return np.asarray(np.einsum("nd,nd->n", a, b) / np.maximum(norms, 1e-12), np.float32)
