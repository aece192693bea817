"""Clusters whose pictures contradict their captions: captions like those of other clusters, but different pictures.

A picture that merely prints its caption gets a high clip_score if the embedder can read. Such pictures form clusters of
their own, and balancing over clusters alone would give each of these an even share. They can be recognised: the
captions of such a cluster are like those of clusters that score lower, but its pictures are unlike theirs. So each
cluster is compared with the `NEIGHBOURS` clusters that have the nearest captions, by the mean cosine of their mean
pictures, the `likeness`.

The usual likeness is that of the lower half of the clusters by clip_score, which holds no printed captions. With its
median m and its 16 % quantile q (for a normal distribution m - q is one standard deviation), a cluster of the upper
half with likeness f is (m - f) / (m - q) deviations too low. Up to `DOUBTED` deviations it counts in full, from
`CONTRADICTING` on not at all, in between linearly.

On a natural pool, a well-separated topic looks the same: cars, beaches, football. So a cluster is only doubted if it
also looks like printed words: at least `WRITTEN` of its sampled rows are writing, thin strokes on a plain ground
(curate/embed/details.py). Rows for which this was not recorded do not count as writing.

Arrays in, arrays out. The mean of a few rows stands for a cluster, so that what is read does not grow with the pool.
O(g² d) time for g clusters of d dimensions, little more than that of one product of all their captions, which is made
`BLOCK` clusters at a time; above 32,768 clusters O(16,384 g d), by comparing with a sample of the lower half. Source:
ours; pipelines/LOG.md says how the numbers were found.
"""

from collections.abc import Iterator

import numpy as np

from curate.select.frame import Fetch
from curate.select.steps.group_parts import GroupParts
from curate.select.steps.quotas import position_in_group
from curate.vectors.kmeans import unit_rows

ROWS_EACH, LEAST_EACH = 32, 8  # rows that represent a cluster, at most and at least
MAX_ROWS = 1 << 18  # of all clusters together
STRETCH = 1024  # rows that lie side by side on disk and are read together
NEIGHBOURS = 10  # clusters with the nearest captions
LEAST_GROUPS = 2 * NEIGHBOURS + 2  # so that the lower half has enough neighbours for each
DOUBTED, CONTRADICTING = 2.0, 4.0  # deviations
WRITTEN = 0.5  # share of a cluster's rows
LEAST_SPREAD = 1e-3  # of the likeness: less is rounding
BLOCK = 256
STRIP = 64  # adjacent cosines whose highest is taken first
CROWDED = 8  # if more values than this times those wanted are left, they are not sorted


def few_of_each(parts: GroupParts, chosen: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Choose up to ROWS_EACH rows of each chosen group, MAX_ROWS in all. chosen: i64, groups, ascending.

    Returns the rows, i64 ascending, and their groups' places among the chosen. The stretches of rows are put in a
    random order and each group takes its first ones in that order, so that the rows of common groups come from a few
    stretches: a pool larger than memory is then read in a few places and not all over.
    """
    each = min(ROWS_EACH, MAX_ROWS // max(1, len(chosen)))
    number = np.full(len(parts.sizes), -1)
    number[chosen] = np.arange(len(chosen))
    last = max((int(rows.max(initial=-1)) for rows, _ in _of_chosen(parts, number)), default=-1)
    stretch_order = rng.random(last // STRETCH + 1)
    found = [(np.empty(0, np.int64), np.empty(0, np.int64))]
    for rows, own in _of_chosen(parts, number):
        few = position_in_group(own, stretch_order[rows // STRETCH]) < each
        found.append((rows[few], own[few]))
    rows, own = (np.concatenate(column) for column in zip(*found, strict=True))
    order = np.argsort(rows, kind="stable")
    return rows[order], own[order]


def _of_chosen(parts: GroupParts, number: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield of each part the rows of groups that have a number, and that number. number: i64 [groups], -1: none."""
    for part in parts:
        own = number[part.groups][part.place]
        yield part.rows[own >= 0], own[own >= 0]


def group_means(x_nd: np.ndarray, groups: np.ndarray, count: int) -> np.ndarray:
    """Average the rows of each group, f32 [count, d], brought to unit length. groups: i64 [n], each occurs.

    In f32, which 32 rows at most allow; coverage adds whole groups up, block by block, in f64.
    """
    order = np.argsort(groups, kind="stable")
    starts = np.append(np.searchsorted(groups[order], np.arange(count)), len(order))
    means = np.empty((count, x_nd.shape[1]), np.float32)
    for first in range(0, count, BLOCK):
        cuts = starts[first : first + BLOCK + 1]
        part = x_nd[order[cuts[0] : cuts[-1]]].astype(np.float32)
        np.add.reduceat(part, cuts[:-1] - cuts[0], axis=0, out=means[first : first + BLOCK])
    return unit_rows(means)


def likeness(
    image_gd: np.ndarray, text_gd: np.ndarray, plain: tuple[np.ndarray, np.ndarray], own_g: np.ndarray
) -> np.ndarray:
    """Score groups by how much their pictures look like those that go with captions like theirs.

    image_gd, text_gd: unit rows f32, the groups' mean picture and mean caption. plain: the two of the p groups that are
    compared with. own_g: i64, which of these a group is itself, -1: none. Returns f64 [g]: the mean cosine of a
    group's picture to those of the NEIGHBOURS other plain groups with the nearest captions (0 where there is none).
    O(g p d) time.
    """
    plain_image, plain_text = plain
    similar = np.zeros(len(text_gd))
    if not len(plain_text):
        return similar
    for first in range(0, len(text_gd), BLOCK):
        part = slice(first, first + BLOCK)
        cosines = text_gd[part] @ plain_text.T
        # A group is no neighbour of itself: -2 is below any cosine, and what is left at -2 was no neighbour.
        itself = np.flatnonzero(own_g[part] >= 0)
        cosines[itself, own_g[part][itself]] = -2
        nearest, cosine = _highest_of_rows(cosines, min(NEIGHBOURS, len(plain_text)))
        beside = np.einsum("gd,gnd->gn", image_gd[part], plain_image[nearest]).astype(np.float64)
        beside[cosine <= -2] = 0
        similar[part] = beside.sum(axis=1) / np.maximum(1, (cosine > -2).sum(axis=1))
    return similar


def _highest_of_rows(x_rc: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Find the columns of each row's `count` highest values: i64 [r, count], and these values. Of ties some are taken.

    The highest of each strip of STRIP columns is found first, at the speed of memory: no value below the count-th
    highest of these, or of the row where it has fewer strips, can be among those looked for. Few others are left.
    """
    rows, columns = x_rc.shape
    whole = columns // STRIP * STRIP
    tops = x_rc
    if whole // STRIP >= count:
        tops = x_rc[:, :whole].reshape(rows, -1, STRIP).max(axis=2)
    least = np.partition(tops, tops.shape[1] - count, axis=1)[:, tops.shape[1] - count]
    found = np.flatnonzero(x_rc >= least[:, None])
    if len(found) > CROWDED * count * rows:  # equal captions everywhere
        places = np.argpartition(-x_rc, count - 1, axis=1)[:, :count]
        return places, np.take_along_axis(x_rc, places, axis=1)
    row, column = np.divmod(found, columns)
    order = np.lexsort((column, -x_rc[row, column], row))
    row, column = row[order], column[order]
    starts = np.searchsorted(row, np.arange(rows))
    places = column[starts[:, None] + np.arange(count)]
    return places, np.take_along_axis(x_rc, places, axis=1)


def trust(similar_g: np.ndarray, plain_g: np.ndarray) -> np.ndarray:
    """Say how much each group counts, f64 [g] from 0 to 1, by its likeness. plain_g: bool, the groups to compare with.

    The groups with scores up to the median are compared with, and count in full: pictures that print their caption
    score high, and a rare kind of picture does not. The others count by how far their likeness lies below.
    """
    lower, middle = np.quantile(similar_g[plain_g], [0.16, 0.5])
    deviations = (middle - similar_g) / max(middle - lower, LEAST_SPREAD)
    weight = np.clip((CONTRADICTING - deviations) / (CONTRADICTING - DOUBTED), 0, 1)
    return np.asarray(np.where(plain_g, 1, weight))


def are_written(parts: GroupParts, asked_g: np.ndarray, writing: Fetch, rng: np.random.Generator) -> np.ndarray:
    """Say for the groups asked about whether at least WRITTEN of up to ROWS_EACH of their rows are writing, bool [g].

    asked_g: bool [g]. writing: row numbers to bool.
    """
    chosen = np.flatnonzero(asked_g)
    rows, own = few_of_each(parts, chosen, rng)
    seen, found = (np.bincount(own, each, len(chosen)) for each in (None, writing(rows)))
    written = np.zeros(len(asked_g), bool)
    written[chosen] = found >= WRITTEN * np.maximum(1, seen)
    return written


def weigh(parts: GroupParts, score_g: np.ndarray, fetch: tuple[Fetch, Fetch], rng: np.random.Generator) -> np.ndarray:
    """Say how much each group counts, f64 [g], from its mean clip_score and the vectors of a few rows.

    fetch: of pictures and of captions. If MAX_ROWS does not allow LEAST_EACH rows of each group, groups are processed
    in turns, all compared with a random sample of the plain ones, half as large as a turn: memory and the time per
    group do not grow.
    """
    plain = score_g <= np.median(score_g)
    turn = MAX_ROWS // LEAST_EACH
    every, compared = np.arange(len(score_g)), np.flatnonzero(plain)
    if len(every) <= turn:
        image, text = _means_of(every, parts, fetch, rng)
        yardstick = image[compared], text[compared]
    else:
        compared = np.sort(rng.choice(compared, min(turn // 2, len(compared)), replace=False))
        yardstick = _means_of(compared, parts, fetch, rng)
    own = np.full(len(every), -1)
    own[compared] = np.arange(len(compared))
    if len(every) <= turn:
        return trust(likeness(image, text, yardstick, own), plain)
    turns = [every[first : first + turn] for first in range(0, len(every), turn)]
    similar = [likeness(*_means_of(some, parts, fetch, rng), yardstick, own[some]) for some in turns]
    return trust(np.concatenate(similar), plain)


def _means_of(
    chosen: np.ndarray, parts: GroupParts, fetch: tuple[Fetch, Fetch], rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Average a few rows of each of the chosen groups: pictures and captions, unit rows f32 [chosen, d]."""
    rows, own = few_of_each(parts, chosen, rng)
    image, text = (group_means(of(rows), own, len(chosen)) for of in fetch)
    return image, text
