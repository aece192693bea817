"""Whether the captions of one picture are related to one another: those of "image not found" are not.

Two captions of one photograph share words and have similar embeddings; the captions of a placeholder are arbitrary. So
the captions of a picture are compared pair by pair, and so are random pairs of the pool's captions: a picture's
captions are unrelated if the mean over their pairs is at most the random pairs' mean plus ABOVE standard deviations,
first by the share of words that they have in common, which may be MOST_COMMON at most, and then, if captions have
embeddings, by their cosines as well: by words alone, captions in a script without spaces, or in two languages, would
seem unrelated.

Up to MOST_EACH rows of a picture are read, and SAMPLE rows of the pool, from STRETCHES places.
"""

import numpy as np

from curate.errors import UsageError
from curate.select.frame import Fetch, Frame
from curate.select.steps.quotas import position_in_group
from curate.select.steps.same_picture import word_overlap

ABOVE = 0.75
MOST_COMMON = 0.25  # captions that differ in three words of four
MOST_EACH = 8
SAMPLE, STRETCHES = 2048, 32


def are_unrelated(frame: Frame, number: int, rows: np.ndarray, pictures: np.ndarray) -> np.ndarray:
    """Say of each picture whether its captions are unrelated, bool [pictures]. rows: i64 [m]; pictures: i64, from 0."""
    count = int(pictures.max(initial=-1)) + 1
    if not count:
        return np.zeros(0, bool)
    rng = np.random.default_rng([frame.seed, number, 2])
    few = position_in_group(pictures, rng.random(len(rows))) < MOST_EACH
    rows, pictures = rows[few], pictures[few]
    i, j = _pairs(pictures)
    good = np.flatnonzero(frame.good)
    starts = np.linspace(0, max(0, len(good) - SAMPLE // STRETCHES), STRETCHES).astype(np.int64)
    sample = good[np.unique(np.minimum(starts[:, None] + np.arange(SAMPLE // STRETCHES), len(good) - 1))]
    p, q = rng.integers(0, len(sample), (2, SAMPLE))
    p, q = p[p != q], q[p != q]
    usual = _common_words(frame, sample, p, q)
    most = min(MOST_COMMON, usual.mean() + ABOVE * usual.std()) if len(usual) else -1.0
    unrelated = _means(_common_words(frame, rows, i, j), pictures[i], count) <= most
    left = unrelated[pictures[i]]
    if frame.text_vectors is None or not left.any():
        return unrelated
    i, j = i[left], j[left]
    usual = _cosines(frame.text_vectors, sample, p, q)
    means = _means(_cosines(frame.text_vectors, rows, i, j), pictures[i], count)
    return np.asarray(unrelated & (means <= usual.mean() + ABOVE * usual.std()))


def _means(values: np.ndarray, groups: np.ndarray, count: int) -> np.ndarray:
    return np.asarray(np.bincount(groups, values, count) / np.maximum(1, np.bincount(groups, minlength=count)))


def _pairs(groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """List all pairs of places of one group, i64 [m] each; a group has at most MOST_EACH."""
    order = np.argsort(groups, kind="stable")
    held = groups[order]
    left, right = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for step in range(1, MOST_EACH):
        same = held[:-step] == held[step:]
        left.append(order[:-step][same])
        right.append(order[step:][same])
    return np.concatenate(left), np.concatenate(right)


def _common_words(frame: Frame, rows: np.ndarray, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    """Return what share of a pair's words both captions have, f64 [m]; rows without captions have no words."""
    try:
        texts = np.array(frame.captions(rows), object)
    except UsageError:
        texts = np.full(len(rows), "", object)
    return word_overlap(texts[i], texts[j])


def _cosines(fetch: Fetch, rows: np.ndarray, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    """Return the cosines of pairs of rows, f32 [m]."""
    some, place = np.unique(np.stack([i, j]), return_inverse=True)
    x = fetch(rows[some]).astype(np.float32)
    a, b = place.reshape(2, -1)
    parts = [slice(at, at + SAMPLE) for at in range(0, len(a), SAMPLE)]
    return np.concatenate([np.empty(0, np.float32), *((x[a[one]] * x[b[one]]).sum(axis=1) for one in parts)])
