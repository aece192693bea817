"""Odd groups: captions as other groups have them, and pictures unlike theirs.

Where a selector reads, pictures that merely print their caption score highest and gather in clusters of their own, so
that balance alone gives them their even share. Such a cluster shows: its captions speak of what others' captions speak
of, its pictures look like none of theirs, and yet its pairs score high. Means over its rows decide it. Arrays in,
arrays out. It errs where a topic has so few groups that the nearest captions are about something else.
"""

import numpy as np

from curate.kmeans import unit_rows
from curate.quotas import position_in_group

ROWS_EACH = 32  # of a group, at most; they stand for it
NEIGHBOURS = 10  # groups with the nearest captions
LEAST_GROUPS = 2 * NEIGHBOURS  # among fewer, all captions are near
DOUBTED, ODD = (
    2.0,
    3.0,
)  # spreads below the middle: from the first on a group counts less, from the second on not at all
BLOCK = 1024


def few_of_each(groups: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Choose up to ROWS_EACH places of each group at random. Returns them ascending, i64."""
    return np.flatnonzero(position_in_group(groups, rng.random(len(groups))) < ROWS_EACH)


def group_means(x_nd: np.ndarray, groups: np.ndarray, count: int) -> np.ndarray:
    """Average the rows of each group, f32 [count, d], brought to unit length. groups: i64 [n], each occurs."""
    order = np.argsort(groups, kind="stable")
    starts = np.searchsorted(groups[order], np.arange(count))
    return unit_rows(np.add.reduceat(x_nd[order].astype(np.float32), starts, axis=0))


def likeness(image_gd: np.ndarray, text_gd: np.ndarray) -> np.ndarray:
    """Score groups by how much their pictures look like those that go with captions like theirs.

    image_gd, text_gd: unit rows f32, the groups' mean picture and mean caption. Returns f64 [g]: the mean cosine of a
    group's picture to those of the NEIGHBOURS other groups with the nearest captions, ties by number. O(g^2 d) time.
    """
    count = min(NEIGHBOURS, len(text_gd) - 1)
    found = np.empty(len(text_gd))
    for first in range(0, len(text_gd), BLOCK):
        cosines = text_gd[first : first + BLOCK] @ text_gd.T
        own = np.arange(len(cosines))
        cosines[own, first + own] = -2
        nearest = np.argsort(-cosines, axis=1, kind="stable")[:, :count]
        pictures = image_gd[first : first + BLOCK] @ image_gd.T
        found[first : first + BLOCK] = np.take_along_axis(pictures, nearest, axis=1).mean(axis=1, dtype=np.float64)
    return found


def trust(likeness_g: np.ndarray, score_g: np.ndarray) -> np.ndarray:
    """Say how much groups shall count, f64 [g] from 0 to 1; score_g: their mean clip_score.

    In full down to DOUBTED spreads of likeness below its median, at ODD not at all. The spread is that of the upper
    side, from the median to where a normal distribution has one standard deviation, since odd groups widen the lower
    one. Groups of a score up to the median count in full, too: a rare kind of picture is no cheat.
    """
    middle, upper = np.quantile(likeness_g, [0.5, 0.84])
    if upper - middle < 1e-6:
        return np.ones(len(likeness_g))
    below = (middle - likeness_g) / (upper - middle)
    weights = np.clip((ODD - below) / (ODD - DOUBTED), 0, 1)
    return np.asarray(np.where(score_g > np.median(score_g), weights, 1))
