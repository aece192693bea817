"""What tells similar pictures apart: finer hashes than `phash`, and whether a picture is writing on a plain ground.

Two T-shirts of one model have the same coarse shape, and so the same `phash`; the print tells them apart. `detail` sees
the print: it hashes the first 12 × 12 frequencies of the same 32 × 32 grey values instead of 8 × 8, for the whole
picture and for its middle without a margin of 2, 4 and 6 %. A copy that was cropped or framed by up to 7 % on all sides
agrees, whole against middle, with its original; one that was cropped on one side only does not (same_picture in
curate/select/steps compares them).

`writing` says whether a picture looks like printed words (line drawings and icons do, too): thin strokes, far darker or
brighter than the plain ground that most of the picture consists of.
"""

import functools
from typing import Any

import numpy as np
from PIL import Image

from curate.embed.images import HASH_SIDE, LEAST_CONTRAST, grey_cells, hash_cells

MARGINS = (0.0, 0.02, 0.04, 0.06)  # cut off on all sides
FREQUENCIES = 12
HASH_BYTES = FREQUENCIES**2 // 8
DETAIL_BYTES = HASH_BYTES * len(MARGINS)
WRITING_SIDE = 64
GROUND, LEAST_GROUND = 20, 0.7  # of 255: how far the ground's cells lie from its tone; the share of all cells they are
CONTRAST, LEAST_INK, LEAST_STRONG = 100, 0.05, 0.4  # far from that tone: how far; of all cells, and of those off ground
STROKE, MOST_THICK = 7, 0.3  # cells that no stroke covers squarely; the share of what is off the ground that may


def describe(image: Image.Image) -> dict[str, Any]:
    """Compute the columns phash, detail and writing of a decoded image. Raises: BadImage `decode_error`."""
    return describe_cells(grey_cells(image, HASH_SIDE), grey_cells(image, WRITING_SIDE))


def describe_cells(small: np.ndarray, large: np.ndarray) -> dict[str, Any]:
    """Compute the same of an image's grey cells, i64: 32 × 32 and 64 × 64 of them."""
    return {"phash": hash_cells(small), "detail": detail_hash(small), "writing": is_writing(large)}


@functools.cache
def _waves() -> list[np.ndarray]:
    """Return for each margin the waves of frequency 1 to 12 over the cells inside it, f64 [12, 32], times 4096.

    A cell inside the margin is made of those that it covers, by the area of each. Whole numbers: see images; all sums
    with them stay below 2 ** 53, so that f64 is exact, and three times as fast as i64.
    """
    frequency, position = np.arange(1, FREQUENCIES + 1)[:, None], np.arange(HASH_SIDE)
    waves = np.cos(np.pi * frequency * (2 * position + 1) / (2 * HASH_SIDE))
    made = []
    for margin in MARGINS:
        edges = np.linspace(margin, 1 - margin, HASH_SIDE + 1) * HASH_SIDE
        covered = np.minimum(edges[1:, None], position + 1) - np.maximum(edges[:-1, None], position)
        covered = np.maximum(covered, 0)
        made.append(np.rint(4096 * waves @ (covered / covered.sum(axis=1, keepdims=True))))
    return made


def detail_hash(small: np.ndarray) -> bytes | None:
    """Hash 32 × 32 grey values, i64, into 144 bits for each of MARGINS; None for a picture without structure.

    As `perceptual_hash` does: a bit is 1 where its coefficient is above the median of the 144.
    """
    if small.max() - small.min() < LEAST_CONTRAST:
        return None
    hashes = []
    for waves in _waves():
        coefficients = (waves @ small @ waves.T).reshape(-1)
        middle = len(coefficients) // 2
        bits = 2 * coefficients > np.sort(coefficients)[middle - 1 : middle + 1].sum()
        hashes.append(np.packbits(bits).tobytes())
    return b"".join(hashes)


def is_writing(cells: np.ndarray) -> bool:
    """Say whether 64 × 64 grey values, i64, are thin strokes on a plain ground.

    The ground is the commonest tone. Of the cells that differ from it, a share of at most MOST_THICK may be the centre
    of a square of STROKE cells without ground: cells of a shape are, cells of a stroke are not.
    """
    counts = np.bincount(cells.reshape(-1) // 8, minlength=32)
    tone = 8 * int((counts + np.concatenate([[0], counts[:-1]])).argmax())
    off = (cells < tone - GROUND) | (cells >= tone + GROUND)
    strong = int((np.abs(cells - tone) > CONTRAST).sum())
    ink = int(off.sum())
    if cells.size - ink < LEAST_GROUND * cells.size or strong < max(LEAST_INK * cells.size, LEAST_STRONG * ink):
        return False
    total = np.pad(off.astype(np.int64), ((1, 0), (1, 0))).cumsum(0).cumsum(1)
    squares = total[STROKE:, STROKE:] - total[:-STROKE, STROKE:] - total[STROKE:, :-STROKE] + total[:-STROKE, :-STROKE]
    return bool((squares == STROKE**2).sum() <= MOST_THICK * ink)
