"""Exact cosines of stored f16 vectors: the numbers that decide which rows are near-duplicates.

The cosine of two stored unit vectors is their exact dot product, rounded once to f32. Summing in f64 is exact, in any
order: the product of two f16 numbers has at most 22 significant bits and is a multiple of 2 ** -48, and by the
Cauchy-Schwarz inequality no partial sum of the products of two unit vectors reaches 2, so every intermediate sum fits
the 53 bits of an f64. Decisions by these cosines are therefore the same for any block size, BLAS library, number of
threads and processor.

Shapes: x_nd f16 [n, d]. Cost: d multiplications a pair, in f32 for listed pairs and in f64 for whole blocks.
"""

import sys

import numpy as np

EXACT_ROWS = 512  # pairs computed at once: both sides stay in the cache


def widen(x_nd: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """Convert finite f16 to f32, exactly, at four times the speed of `astype`; f32 passes through.

    If PyTorch is loaded anyway, it converts, in one pass over memory instead of three, to the same bytes.

    out: f32 of the same shape to write into, which saves allocating memory each time.

    Shifts sign, exponent and fraction to their places in an f32, then multiplies by 2 ** 112, the ratio of the two
    exponents' biases (2 ** (127 - 15)); that product also turns subnormal halves into normal f32.
    """
    if x_nd.dtype != np.float16:
        return x_nd.astype(np.float32, copy=False)
    out = np.empty(x_nd.shape, np.float32) if out is None else out
    if "torch" in sys.modules and x_nd.flags.c_contiguous and x_nd.flags.writeable:
        import torch

        torch.from_numpy(out).copy_(torch.from_numpy(x_nd))
        return out
    bits = out.view(np.int32)
    np.left_shift(x_nd.view(np.int16), 13, out=bits, dtype=np.int32)
    np.bitwise_and(bits, np.int32(-0x70000001), out=bits)  # the sign extension fills the three bits above the exponent
    np.multiply(out, np.float32(2.0**112), out=out)
    return out


def exact_cosines(x_nd: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Compute the cosine of row a[i] and row b[i] of x_nd (f16, unit rows), f32 [len(a)]."""
    found = np.empty(len(a), np.float32)
    for first in range(0, len(a), EXACT_ROWS):
        part = slice(first, first + EXACT_ROWS)
        left = widen(x_nd[a[part]])
        left *= widen(x_nd[b[part]])  # exact in f32: two fractions of 11 bits make one of 22
        found[part] = np.add.reduce(left, axis=1, dtype=np.float64)
    return found


def exact_products(left_pd: np.ndarray, right_qd: np.ndarray) -> np.ndarray:
    """Compute all cosines of two sets of f16 unit rows, f32 [p, q], equal to those of `exact_cosines`."""
    return (widen(left_pd).astype(np.float64) @ widen(right_qd).astype(np.float64).T).astype(np.float32)


def cosines(a_nd: np.ndarray, b_nd: np.ndarray) -> np.ndarray:
    """Compute the cosine of each row of a with the same row of b, of any length, in f32: f32 [n]."""
    a, b = a_nd.astype(np.float32), b_nd.astype(np.float32)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return np.asarray(np.einsum("nd,nd->n", a, b) / np.maximum(norms, 1e-12), np.float32)
