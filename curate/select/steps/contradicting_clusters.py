"""Clusters whose pictures contradict their captions: captions as other clusters have them, pictures unlike theirs.

A picture that merely prints its caption gets a high clip_score wherever the embedder can read. Such pictures gather in
clusters of their own, and balancing over clusters alone would give each of them its even share. They give themselves
away: the captions of such a cluster are like those of clusters that score lower, but its pictures are like none of
theirs. So each cluster is compared with the `NEIGHBOURS` clusters that have the nearest captions, by the mean cosine of
their mean pictures, `likeness`.

What is usual is read off the lower half of the clusters by clip_score, among which printed captions are not: with the
median m of their likeness and its 16 % quantile q (for a normal distribution m - q is one standard deviation), a
cluster of the upper half at likeness f lies (m - f) / (m - q) deviations too low. Up to `DOUBTED` deviations it counts
in full, from `CONTRADICTING` on not at all, in between linearly.

Arrays in, arrays out. The mean of a few rows stands for a cluster, so that what is read does not grow with the pool.
O(g² d) time for g clusters of d dimensions, blocks of `BLOCK` clusters at a time. Source: ours; pipelines/LOG.md has
how the numbers were found.
"""

import numpy as np

from curate.select.steps.quotas import position_in_group
from curate.vectors.kmeans import unit_rows

ROWS_EACH, LEAST_EACH = 32, 8  # rows that stand for a cluster, at most and at least
MAX_ROWS = 1 << 18  # of all clusters together
STRETCH = 1024  # rows that lie side by side on disk and are read together
NEIGHBOURS = 10  # clusters with the nearest captions
LEAST_GROUPS = 2 * NEIGHBOURS + 2  # so that the lower half has enough neighbours for each
DOUBTED, CONTRADICTING = 2.0, 4.0  # deviations
LEAST_SPREAD = 1e-3  # of the likeness: less is rounding
BLOCK = 1024


def few_of_each(groups: np.ndarray, rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Choose up to ROWS_EACH places of each group, MAX_ROWS in all. Returns them ascending, i64.

    groups: i64 [n] from 0. rows: i64 [n] ascending, where they lie in the pool. The stretches of rows are put in a
    random order and each group takes its first ones in that order, so that the rows of common groups come from a few
    stretches: a pool larger than memory is then read in a few places and not all over.
    """
    each = min(ROWS_EACH, MAX_ROWS // (int(groups.max(initial=0)) + 1))
    stretch_order = rng.random(int(rows.max(initial=-1)) // STRETCH + 1)
    return np.flatnonzero(position_in_group(groups, stretch_order[rows // STRETCH]) < each)


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
    similar = np.zeros(len(text_gd))
    if not len(plain):
        return similar
    for first in range(0, len(text_gd), BLOCK):
        part = slice(first, first + BLOCK)
        cosines, pictures = text_gd[part] @ text_gd[plain].T, image_gd[part] @ image_gd[plain].T
        # A group is no neighbour of itself: -2 is below any cosine, and what is left at -2 was no neighbour.
        cosines[np.arange(first, first + len(cosines))[:, None] == plain] = -2
        nearest = np.argpartition(-cosines, min(NEIGHBOURS, len(plain)) - 1, axis=1)[:, :NEIGHBOURS]
        taken = np.take_along_axis(cosines, nearest, axis=1) > -2
        total = (np.take_along_axis(pictures, nearest, axis=1) * taken).sum(axis=1, dtype=np.float64)
        similar[part] = total / np.maximum(1, taken.sum(axis=1))
    return similar


def trust(image_gd: np.ndarray, text_gd: np.ndarray, score_g: np.ndarray) -> np.ndarray:
    """Say how much groups shall count, f64 [g] from 0 to 1. score_g: their mean clip_score.

    The groups of a score up to the median count in full and are the yardstick: what prints its caption scores high, and
    a rare kind of picture does not. The others count by how far their likeness lies below the yardstick's.
    """
    plain = score_g <= np.median(score_g)
    similar = likeness(image_gd, text_gd, plain)
    lower, middle = np.quantile(similar[plain], [0.16, 0.5])
    deviations = (middle - similar) / max(middle - lower, LEAST_SPREAD)
    weight = np.clip((CONTRADICTING - deviations) / (CONTRADICTING - DOUBTED), 0, 1)
    return np.asarray(np.where(plain, 1, weight))
