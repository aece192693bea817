"""Find where copies begin from cosines alone, for embeddings that came without pixels.

Distinct pictures become rarer towards a cosine of 1: among points in D dimensions, the number with a neighbour nearer
than r falls like r^D, which over s = -log(1 - cosine) is an exponential. Copies, made by rescaling or recompressing,
are at small distances of their own. If the two are apart, the histogram of s over the near-duplicate forest's edges
falls, has a valley, and rises again. (Each edge of the forest is a row that deduplication drops, and each row's nearest
neighbour is joined by one, so the histogram counts rows.)

A cut at v is accepted if
    it lies in a valley: some stretch to its right is at least twice as dense and `SIGMAS` standard deviations above,
    the exponential fitted to the falling flank left of v (its upper third, less the valley's own density; a truncated
    exponential's mean gives the rate, one standard error taken off) leaves few look-alikes beyond v: at most `IMPURE`
    of the pairs there, and at most `WRONGED` of the pool's rows, and
    at most `MOST` of the rows lie beyond: more than that are not copies, but a pool that the embedder sees as one.
The lowest accepted cut from `LEAST_COSINE` on is taken. If the valley ends before that, LEAST_COSINE is taken, provided
that hardly a pair lies between. If there is no valley, there is no result: look-alikes that blend into copies cannot be
told apart by their cosines. O(m) time for m edges. Source: ours; pipelines/README.md says how well it does.
"""

from dataclasses import dataclass

import numpy as np

BIN = 0.1  # of s: a twentieth less distance
FARTHEST = 9.2  # s of a cosine of .9999; what is nearer is rounding
LEAST_PAIRS = 10
LEAST_COSINE = 0.945  # SemDeDup's threshold for CLIP ViT-L/14 at which half of LAION goes (arXiv:2303.09540)
LEAST_RATE = 2.0  # of the exponential where look-alikes are too few to fit it: four dimensions
SIGMAS = 3.0
IMPURE, WRONGED, MOST, BETWEEN = 0.1, 0.005, 2 / 3, 0.1
WINDOWS = (1, 3, 7)  # bins, of the stretch that is denser than the valley


@dataclass(frozen=True)
class Gap:
    """The cosine from which on pairs are copies; how many pairs lie above, and how many of them may be look-alikes."""

    threshold: float
    pairs: int
    look_alikes: float


def find_gap(similarity: np.ndarray, rows: int, floor: float) -> Gap | None:
    """Find the cosine that separates look-alikes from copies, or None if nothing shows it.

    similarity: f32 [m], the near-duplicate forest's edges above the floor. rows: of the pool.
    """
    s = -np.log(np.maximum(1 - similarity.astype(np.float64), np.exp(-FARTHEST)))
    edges = np.arange(-np.log(1 - floor), FARTHEST + 2 * BIN, BIN)
    counts = np.histogram(s, edges)[0].astype(np.float64)
    beyond = np.cumsum(counts[::-1])[::-1]
    look_alikes = np.full(len(counts), np.inf)
    for cut in range(WINDOWS[1], len(counts)):
        if beyond[cut] >= LEAST_PAIRS and _is_valley(counts, cut):
            look_alikes[cut] = _look_alikes_beyond(counts, cut)
    accepted = look_alikes <= np.minimum(IMPURE * beyond, WRONGED * rows)
    accepted &= beyond <= MOST * rows
    least = int(np.searchsorted(1 - np.exp(-edges[:-1]), LEAST_COSINE))
    late, early = np.flatnonzero(accepted[least:]) + least, np.flatnonzero(accepted[:least])
    if len(late):
        cut = before = int(late[0])
    elif len(early) and beyond[least] >= (1 - BETWEEN) * beyond[early[-1]]:
        cut, before = least, int(early[-1])
    else:
        return None
    return Gap(float(1 - np.exp(-edges[cut])), int(beyond[cut]), float(look_alikes[before]))


def _smooth(counts: np.ndarray) -> np.ndarray:
    return np.convolve(counts, np.ones(3) / 3, "same")


def _is_valley(counts: np.ndarray, cut: int) -> bool:
    """Say whether some stretch beyond the cut is significantly denser than the three bins at it."""
    here = counts[cut - 2 : cut + 1].mean()
    for window in WINDOWS:
        densest = np.convolve(counts[cut:], np.ones(window), "valid").max(initial=0)
        expected = window * here
        if densest >= 2 * window * (here + 1 / 3) and densest - expected >= SIGMAS * np.sqrt(densest + expected):
            return True
    return False


def _look_alikes_beyond(counts: np.ndarray, cut: int) -> float:
    """Extrapolate the falling flank left of the cut: how many look-alikes are to be expected beyond it."""
    left, smooth = counts[:cut], _smooth(counts)
    if left.sum() < LEAST_PAIRS:  # the look-alikes lie under the floor
        return float((left.sum() + 1) / np.expm1(LEAST_RATE * cut * BIN))
    peak = cut + int(smooth[cut:].argmax())
    flank = np.maximum(left - smooth[cut : peak + 1].min(), 0)  # the valley's own density is copies'
    from_right = np.cumsum(flank[::-1])[::-1]
    first = max(int(smooth[:cut].argmax()), int((from_right >= flank.sum() / 3).sum()) - 1)
    first = min(first, cut - 3)
    size, length = flank[first:].sum(), (cut - first) * BIN
    if size <= 0:
        return np.inf
    mean = float(flank[first:] @ (np.arange(cut - first) + 0.5)) * BIN / size
    rate = _truncated_rate(mean, length) * (1 - 1 / np.sqrt(max(size, 4)))
    return float((size + 1) / np.expm1(min(rate * length, 700))) if rate > 0 else np.inf


def _truncated_rate(mean: float, length: float) -> float:
    """Solve for the rate of an exponential, truncated at `length`, that has this mean; 0 where it does not fall.

    The mean is 1 / rate - length / (exp(rate length) - 1), which falls as the rate grows: bisection.
    """
    if mean >= length / 2:
        return 0.0
    low, high = 1e-6, 1e4
    for _ in range(80):
        middle = np.sqrt(low * high)
        larger = 1 / middle - length / np.expm1(min(middle * length, 700)) > mean
        low, high = (middle, high) if larger else (low, middle)
    return float(low)
