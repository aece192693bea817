"""Cosines of stored unit vectors: screened by a fast product that may err, decided by an exact one.

The cosine of two stored f16 vectors is their exact dot product, rounded once to f32. Exact it can be: the product of
two f16 numbers fits an f32, all of them are multiples of 2 ** -48, and by Cauchy and Schwarz no partial sum of unit
vectors' products reaches 2, so that an f64 adds them without loss in any order. What is decided by it is therefore the
same for any block size, library and machine.

The fast product is one of bytes where the processor has instructions for it (four times the speed of f32), else of
f32. It errs by less than its slack (rows move by the length of their rounding errors, which is measured), so that
whatever it puts under a floor minus the slack is under the floor.
"""

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

PREPARE_ROWS = 256
SAMPLED = 16  # every so manieth row is looked at to choose the bytes' scale
EXACT_ROWS = 512  # pairs decided at once: both sides stay in the cache
LONGEST = 1.002  # of unit rows, rounded to f16
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
    """Rows in the form that is multiplied: f32, or bytes times `scale`, at most `error` in length from the rows."""

    rows: Any
    scale: float = 1.0
    error: float = 0.0


def to_bytes(x_nd: np.ndarray, rows: np.ndarray) -> Prepared:
    """Round these rows of x_nd (f16 or f32, at least one) to bytes of one scale, a torch tensor; measure the error."""
    import torch

    scale = float(np.abs(widen(x_nd[rows[::SAMPLED]])).max()) / 127 or 1.0  # what is larger is cut, and counted
    found = np.empty((len(rows), x_nd.shape[1]), np.int8)
    error = 0.0
    for first in range(0, len(rows), PREPARE_ROWS):
        exact = widen(x_nd[rows[first : first + PREPARE_ROWS]]) * np.float32(1 / scale)
        whole = np.clip(np.rint(exact), -127, 127)
        exact -= whole
        error = max(error, float(np.einsum("nd,nd->n", exact, exact).max()))
        found[first : first + PREPARE_ROWS] = whole
    return Prepared(torch.from_numpy(found), scale, math.sqrt(error) * scale * (1 + F32_ERROR) + F32_ERROR / 16)


class Screen:
    """Finds the pairs of rows that may lie above a floor: `prepare` each side, then look at any two parts of them."""

    def __init__(self, floor: float, *, int8: bool) -> None:
        self.floor = floor
        self.int8 = int8

    def prepare(self, x_nd: np.ndarray, rows: np.ndarray) -> Prepared:
        """Bring these rows of x_nd, unit rows, into the form that is multiplied."""
        if self.int8 and len(rows):
            return to_bytes(x_nd, rows)
        return Prepared(widen(x_nd[rows]))

    def bound(self, left: Prepared, right: Prepared) -> np.int32 | np.float32:
        """Say which products of the two the pairs above the floor exceed."""
        if not self.int8:
            return np.float32(self.floor - left.rows.shape[1] * 2.0**-23)
        slack = LONGEST * left.error + (LONGEST + left.error) * right.error
        return np.int32(math.floor((self.floor - slack) / (left.scale * right.scale)) - 1)

    def near(self, left: Any, right: Any, bound: np.int32 | np.float32) -> np.ndarray:
        """Compare prepared rows, all with all: the flat positions in [p, q], i64, of the pairs that may be near."""
        if not self.int8:
            return np.flatnonzero((left @ right.T).ravel() > bound)
        import torch

        return np.flatnonzero(torch._int_mm(left, right.T).numpy().ravel() > bound)
