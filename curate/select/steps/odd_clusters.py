"""Odd groups: captions as other groups have them, and pictures unlike theirs.

Where a selector reads, pictures that merely print their caption score highest and gather in clusters of their own, so
that balance alone gives them their even share. Such a cluster shows: its captions speak of what lower scoring clusters'
captions speak of, but its pictures look like none of theirs. Means of a few rows of each group decide it. Arrays in,
arrays out.
"""

import numpy as np

from curate.select.steps.quotas import position_in_group
from curate.vectors.kmeans import unit_rows

ROWS_EACH, LEAST_EACH = 32, 8  # of a group, at most and at least; they stand for it
MAX_ROWS = 1 << 18  # of all groups together: what is read does not grow with the pool
STRETCH = 1024  # rows
NEIGHBOURS = 10  # groups with the nearest captions
LEAST_GROUPS = 2 * NEIGHBOURS + 2  # so that the plainer half has enough neighbours for each
DOUBTED, ODD = 2.0, 4.0  # spreads below the middle: a group begins to count less, and no longer counts
LEAST_SPREAD = 1e-3
BLOCK = 1024


def few_of_each(groups: np.ndarray, rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Choose up to ROWS_EACH places of each group, MAX_ROWS in all. Returns them ascending, i64.

    rows: i64 [n] ascending, where they lie. Stretches of rows are put in a random order and each group takes its first
    there: of a pool that is no longer in memory, common groups are then read in a few stretches, not all over it.
    """
    each = min(ROWS_EACH, MAX_ROWS // (int(groups.max(initial=0)) + 1))
    lots = rng.random(int(rows.max(initial=-1)) // STRETCH + 1)
    return np.flatnonzero(position_in_group(groups, lots[rows // STRETCH]) < each)


def group_means(x_nd: np.ndarray, groups: np.ndarray, count: int) -> np.ndarray:
    """Average the rows of each group, f32 [count, d], brought to unit length. groups: i64 [n], each occurs.

    In f32, which 32 rows at most allow; coverage adds whole groups up, block by block, in f64.
    """
    order = np.argsort(groups, kind="stable")
    starts = np.searchsorted(groups[order], np.arange(count))
    return unit_rows(np.add.reduceat(x_nd[order].astype(np.float32), starts, axis=0))


def likeness(image_gd: np.ndarray, text_gd: np.ndarray, plain_g: np.ndarray) -> np.ndarray:
    """Score groups by how much their pictures look like those that go with captions like theirs.

    image_gd, text_gd: unit rows f32, the groups' mean picture and mean caption. plain_g: bool, who is compared with.
    Returns f64 [g]: the mean cosine of a group's picture to those of the NEIGHBOURS other plain groups with the nearest
    captions (0 where there is none). O(g^2 d) time.
    """
    plain = np.flatnonzero(plain_g)
    found = np.zeros(len(text_gd))
    if not len(plain):
        return found
    for first in range(0, len(text_gd), BLOCK):
        part = slice(first, first + BLOCK)
        cosines, pictures = text_gd[part] @ text_gd[plain].T, image_gd[part] @ image_gd[plain].T
        cosines[np.arange(first, first + len(cosines))[:, None] == plain] = -2
        nearest = np.argpartition(-cosines, min(NEIGHBOURS, len(plain)) - 1, axis=1)[:, :NEIGHBOURS]
        taken = np.take_along_axis(cosines, nearest, axis=1) > -2
        total = (np.take_along_axis(pictures, nearest, axis=1) * taken).sum(axis=1, dtype=np.float64)
        found[part] = total / np.maximum(1, taken.sum(axis=1))
    return found


def trust(image_gd: np.ndarray, text_gd: np.ndarray, score_g: np.ndarray) -> np.ndarray:
    """Say how much groups shall count, f64 [g] from 0 to 1; score_g: their mean clip_score.

    The groups of a score up to the median count in full and are the yardstick: what cheats scores high, and a rare kind
    of picture does not. The others count in full down to DOUBTED spreads of the yardstick's likeness below its median,
    at ODD not at all; the spread is from there down to where a normal distribution has one standard deviation.
    """
    plain = score_g <= np.median(score_g)
    found = likeness(image_gd, text_gd, plain)
    lower, middle = np.quantile(found[plain], [0.16, 0.5])
    below = (middle - found) / max(middle - lower, LEAST_SPREAD)
    return np.asarray(np.where(plain, 1, np.clip((ODD - below) / (ODD - DOUBTED), 0, 1)))
