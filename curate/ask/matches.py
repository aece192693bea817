"""Which concepts of a vocabulary an image shows: the nearest few, if nearer than images are to others' concepts.

An image has up to `per_image` concepts, those whose texts have the highest cosines with it, above a cut. The cut is
read off the pool: each of `SAMPLE` images is compared with the nearest concepts of `SHIFTS` others (shuffled pairs); a
cosine that is not `SPREADS` robust standard deviations above the median of these counts as chance. (The median and
its spread tolerate that some of the others do show the same.)

Images are taken in panels of a bounded size: one product; the highest cosine of each of many groups of concepts, the
`per_image`-th of which an image's best concepts reach at least; and one comparison with that and the cut, which leaves
a few. f32 products find all that may count, f64 products decide where two are too close to tell apart, so the answer
depends neither on panels nor on threads. O(n m d) time for n images and m concepts; memory for one panel
and the concepts' vectors.
"""

from collections.abc import Callable, Iterator

import numpy as np

from curate.vectors.exact import widen

SAMPLE, SHIFTS = 4096, 16
SPREADS = 2.0  # on the demo, 2 leaves hardly an image without a concept, 3 every second (pipelines/LOG.md)
PANEL = 1 << 25  # cosines at a time, 128 MiB
READ_ROWS = 1 << 13
GROUP = 64  # concepts, of which only the highest cosine is looked at first
F32_ERROR = 2.0**-16  # of a dot product of unit vectors in f32, with room: d * 2 ** -24 is half of it at d = 2,048
MAD = 1.4826  # a normal distribution's standard deviation by its median absolute deviation
Fetch = Callable[[np.ndarray], np.ndarray]  # row numbers to unit vectors f16 [m, d]


def read_cut(fetch: Fetch, rows: np.ndarray, concepts_md: np.ndarray) -> float:
    """Estimate on a sample the cosine that chance reaches; -1 where all images have the same nearest concept.

    rows: i64 [n], ascending. concepts: unit rows f32. The sample is drawn by a fixed seed: the same for any request.
    """
    rng = np.random.default_rng(0)
    sample = np.sort(rng.choice(rows, min(SAMPLE, len(rows)), replace=False))
    x_sd = widen(fetch(sample))[rng.permutation(len(sample))]
    nearest = np.empty(len(x_sd), np.int64)
    for part in _panels(len(x_sd), len(concepts_md)):
        nearest[part] = (x_sd[part] @ concepts_md.T).argmax(axis=1)
    shuffled = [np.empty(0)]
    for shift in range(1, min(SHIFTS, len(x_sd) - 1) + 1):
        others = np.roll(nearest, shift)
        foreign = np.flatnonzero(others != nearest)
        shuffled.append(_cosines(x_sd, concepts_md, foreign, others[foreign]))
    cosines = np.concatenate(shuffled)
    if not len(cosines):
        return -1.0
    middle = float(np.median(cosines))
    return round(middle + SPREADS * MAD * float(np.median(np.abs(cosines - middle))), 6)


def match(fetch: Fetch, rows: np.ndarray, concepts_md: np.ndarray, cut: float, per_image: int) -> np.ndarray:
    """Find each row's nearest concepts above the cut, at most `per_image`: i32 [n, per_image], ascending, -1 for none.

    rows: i64 [n], ascending. Of equal cosines the earlier concept wins.
    """
    found = np.full((len(rows), per_image), -1, np.int32)
    across = np.ascontiguousarray(concepts_md.T)
    buffer = panel_buffer(min(len(rows), READ_ROWS), len(concepts_md))
    for first in range(0, len(rows), READ_ROWS):
        x_nd = widen(fetch(rows[first : first + READ_ROWS]))
        for part in _panels(len(x_nd), len(concepts_md)):
            panel = np.matmul(x_nd[part], across, out=buffer[: part.stop - part.start])
            at = np.flatnonzero(panel > np.maximum(cut - F32_ERROR, _least(panel, per_image) - 4 * F32_ERROR))
            image, concept = np.divmod(at, len(concepts_md))
            chosen = _best(x_nd[part], concepts_md, (image, concept, panel.ravel()[at]), cut, per_image)
            found[first + part.start + image[chosen], _position(image[chosen])] = concept[chosen]
    return found


def _least(panel_nm: np.ndarray, per_image: int) -> np.ndarray:
    """Find a cosine that the best `per_image` of each row reach, f32 [n, 1]: that many groups hold one that does."""
    groups = panel_nm.shape[1] // GROUP
    if groups < per_image:
        return np.full((len(panel_nm), 1), -np.inf, np.float32)
    highest = panel_nm[:, : GROUP * groups].reshape(-1, GROUP, groups).max(axis=1)
    return np.partition(highest, -per_image, axis=1)[:, -per_image, None]


def _best(
    x_nd: np.ndarray, concepts_md: np.ndarray, pairs: tuple[np.ndarray, ...], cut: float, per_image: int
) -> np.ndarray:
    """Choose the best `per_image` candidate pairs of each image above the cut: their numbers, ascending.

    pairs: image, concept and f32 cosine, sorted by image and concept.
    """
    image, concept = pairs[:2]
    cosine = pairs[2].astype(np.float64)
    order = np.lexsort((-cosine, image))  # stable: of equal ones the earlier concept first
    place, sorted_cosine = _position(image[order]), cosine[order]
    # Rounding may matter where an image's last chosen pair is too close to the next one, or any pair to the cut.
    doubtful = np.zeros(len(x_nd), bool)
    close = (place[1:] == per_image) & (sorted_cosine[:-1] - sorted_cosine[1:] < 2 * F32_ERROR)
    doubtful[image[order][1:][close]] = True
    doubtful[image[np.abs(cosine - cut) < 2 * F32_ERROR]] = True
    here = np.flatnonzero(doubtful[image])
    if len(here):
        cosine[here] = _cosines(x_nd, concepts_md, image[here], concept[here])
        order = np.lexsort((-cosine, image))
        place, sorted_cosine = _position(image[order]), cosine[order]
    return np.sort(order[(place < per_image) & (sorted_cosine > cut)])


def _cosines(x_nd: np.ndarray, concepts_md: np.ndarray, image: np.ndarray, concept: np.ndarray) -> np.ndarray:
    """Compute the cosines of pairs in f64, [m]."""
    found = np.empty(len(image))
    for first in range(0, len(image), READ_ROWS):
        part = slice(first, first + READ_ROWS)
        left, right = x_nd[image[part]].astype(np.float64), concepts_md[concept[part]].astype(np.float64)
        found[part] = np.einsum("nd,nd->n", left, right)
    return found


def _position(labels: np.ndarray) -> np.ndarray:
    """Count through each run of equal labels, from 0."""
    starts = np.flatnonzero(np.diff(labels, prepend=-1))
    return np.arange(len(labels)) - np.repeat(starts, np.diff(np.append(starts, len(labels))))


def panel_buffer(rows: int, columns: int) -> np.ndarray:
    """Allocate the largest panel for so many rows and columns, f32; a new one each time costs a tenth of a product."""
    return np.empty((min(rows, _panel_rows(columns)), columns), np.float32)


def _panel_rows(columns: int) -> int:
    return max(16, PANEL // max(1, columns))


def _panels(rows: int, columns: int) -> Iterator[slice]:
    """Cut rows so that a panel of so many columns stays within PANEL."""
    step = _panel_rows(columns)
    for first in range(0, rows, step):
        yield slice(first, min(rows, first + step))
