"""Which pairs of pictures are near-duplicates, and the forest of them among the rows that are still there.

The rule of a pair, written out: it is linked if

    its cosine is above `threshold` and its perceptual hashes differ in at most `bits` bits, or
    its cosine is above `anyhow`, or
    a hash of it is unknown and its cosine is above `unknown`;

and a `test` may refuse any of these (same_picture).

Groups of near-duplicates are the connected components of that graph over all pairs. Clustering stored the maximum
spanning forest of the cosines alone, in which a linked pair may be missing, because heavier edges that are not linked
join its two rows. So the forest is used as follows. Each linked pair lies inside one component of the edges above
`threshold` (a *whole*). Edges of the forest that are linked are taken as they are; they already join any two rows above
`anyhow`, unless a row between them was dropped or a link refused; in that case these rows are compared again. Pieces of
a whole that are still apart can be joined only by pixels: all its hashes are compared, and for pairs that agree the
exact cosine decides.

Cost: for wholes that are not one group, m² comparisons of hashes for m rows, and the vectors of the pairs that agree.
Memory: the edges above the threshold, and blocks.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from curate.select.frame import UNKNOWN_BITS, Edges, Fetch
from curate.select.steps.same_picture import PairTest
from curate.vectors import near_pairs
from curate.vectors.exact import exact_cosines
from curate.vectors.forest import Forest, components, spanning_forest

GATHER_ROWS = 1 << 16
BLOCK_PAIRS = 1 << 22  # hashes compared at once
BATCH_PAIRS = 1 << 16  # cosines decided at once
Joined = tuple[np.ndarray, np.ndarray, np.ndarray]  # a, b i32 or i64, cosine f32
Hashes = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]  # row numbers to hashes u64 [m] and known, bool [m]


@dataclass(frozen=True)
class PairRule:
    """When a pair is linked (see above). threshold <= anyhow, unknown; if all are equal, by cosine alone."""

    threshold: float
    anyhow: float
    bits: int
    unknown: float

    @property
    def by_cosine_alone(self) -> bool:
        """Say whether pixels play no part."""
        return self.threshold == self.anyhow == self.unknown

    def links(self, similarity: np.ndarray, bits: np.ndarray) -> np.ndarray:
        """Say which pairs are linked, bool. similarity: f32. bits: u8, above 64 where a hash is unknown."""
        agree = (similarity > self.threshold) & (bits <= self.bits)
        return np.asarray(agree | (similarity > self.anyhow) | ((bits > 64) & (similarity > self.unknown)))


def cosine_rule(threshold: float) -> PairRule:
    """Link every pair with cosine > threshold."""
    return PairRule(threshold, threshold, 64, threshold)


def differing(hashes: tuple[np.ndarray, np.ndarray], i: np.ndarray, j: np.ndarray) -> np.ndarray:
    """Count the differing bits of pairs of (hashes, known), u8; UNKNOWN_BITS where one is unknown."""
    values, known = hashes
    return np.where(known[i] & known[j], near_pairs.differing_bits(values[i], values[j]), np.uint8(UNKNOWN_BITS))


def linked_forest(
    edges: Edges, rule: PairRule, alive: np.ndarray, vectors: Fetch, hashes: Hashes, test: PairTest | None = None
) -> Joined:
    """Find the spanning forest of the linked pairs among the rows alive, for the components and their links.

    edges: the stored forest, over all rows. alive: bool [n]. While no row of a whole has been dropped it is the maximum
    spanning forest; else its components are exact, and a link between two rows may be a weaker chain than the best.
    """
    a, b, similarity, bits = edges
    above = similarity > rule.threshold
    a, b, similarity, bits = a[above], b[above], similarity[above], bits[above]
    linked = alive[a] & alive[b] & rule.links(similarity, bits)
    taken = tested(linked, a, b, test)
    joined = [(a[taken], b[taken], similarity[taken])]
    if taken.all():
        return joined[0]
    whole = components(a, b, len(alive))
    apart = _still_apart(whole, joined, alive)
    refused = linked & ~taken & (similarity > rule.anyhow)
    torn = np.isin(whole, whole[np.concatenate([a[~alive[a]], b[~alive[b]], a[refused]])])
    by_forest = _labels(joined, len(alive))
    joined += _join_by_cosine(np.where(torn, apart, -1), rule.anyhow, vectors, (test, by_forest))
    if not rule.by_cosine_alone:
        apart = _still_apart(whole, joined, alive)
        rows = np.flatnonzero(apart >= 0)
        known = np.zeros(len(alive), bool)
        known[rows] = hashes(rows)[1]
        labels = _labels(joined, len(alive))
        by_pixels = _join_by_pixels(np.where(known, apart, -1), labels, rule, vectors, hashes, test)
        some = rule.unknown < rule.anyhow
        unknown = _join_by_cosine(apart, rule.unknown, vectors, (test, by_forest), ~known) if some else ()
        joined += [*by_pixels, *unknown]
    a, b, similarity = (np.concatenate(column) for column in zip(*joined, strict=True))
    _, first = np.unique(a.astype(np.int64) * len(alive) + b, return_index=True)
    chosen = first[spanning_forest(a[first], b[first], similarity[first], len(alive))]
    return a[chosen], b[chosen], similarity[chosen]


def tested(linked: np.ndarray, a: np.ndarray, b: np.ndarray, test: PairTest | None) -> np.ndarray:
    """Say which of the linked pairs pass the test, bool [m]."""
    if test is None:
        return linked
    asked = np.flatnonzero(linked)
    passed = linked.copy()
    passed[asked] = test(a[asked], b[asked])
    return passed


def _labels(joined: list[Joined], num_rows: int) -> np.ndarray:
    a, b = (np.concatenate(column) for column in list(zip(*joined, strict=True))[:2])
    return components(a, b, num_rows)


def _still_apart(whole: np.ndarray, joined: list[Joined], alive: np.ndarray) -> np.ndarray:
    """Give the alive rows of wholes that are in more than one piece their whole's number, i64 [n]; the others -1."""
    rows = np.flatnonzero(alive)
    pieces = np.unique(np.stack([whole[rows], _labels(joined, len(alive))[rows]]), axis=1)[0]
    names, counts = np.unique(pieces, return_counts=True)
    return np.where(np.isin(whole, names[counts > 1]) & alive, whole, -1)


def groups_of(component: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """List the rows of components of two and more, by component, and where each begins. component: i64, < 0: none."""
    rows = np.flatnonzero(component >= 0)
    rows = rows[np.argsort(component[rows], kind="stable")]
    ordered = component[rows]
    starts = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1]))
    sizes = np.diff(starts, append=len(rows))
    several = np.repeat(sizes > 1, sizes)
    return rows[several], np.concatenate([[0], np.cumsum(sizes[sizes > 1])])


def fetch_groups(
    rows: np.ndarray, bounds: np.ndarray, vectors: Fetch
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield the rows of as many whole groups as are fetched at once, where each begins, and the vectors."""
    for first, last in near_pairs.batches_of_groups(bounds, GATHER_ROWS):
        part = rows[bounds[first] : bounds[last]]
        yield part, bounds[first : last + 1] - bounds[first], vectors(part)


def _join_by_cosine(
    component: np.ndarray,
    floor: float,
    vectors: Fetch,
    asked: tuple[PairTest | None, np.ndarray],
    some: np.ndarray | None = None,
) -> Iterator[Joined]:
    """Yield the forests of the pairs with cosine > floor inside components; component: i64 [n], negative: left out.

    asked: the test, and i64 [n], labels of what linked edges of the stored forest join: a pair inside one is no heavier
    than these. some: bool [n]: at least one row of a pair must be one of these; by default any may.
    """
    test, labels = asked
    if floor == np.inf:
        return
    rows, bounds = groups_of(component)
    first = np.ones(len(rows), bool) if some is None else some[rows]
    rows = rows[np.lexsort((rows, ~first, component[rows]))]  # of each group first the rows that are compared with all
    members = np.add.reduceat(first, bounds[:-1], dtype=np.int64) if len(rows) else np.empty(0, np.int64)
    place = 0
    for part, cuts, x in fetch_groups(rows, bounds, vectors):
        own, place = members[place : place + len(cuts) - 1], place + len(cuts) - 1
        forest = Forest(len(part), floor)
        known = forest if test is None else None  # a forest of cosines would hide pairs behind refused ones
        for i, j, cosine in near_pairs.near_pairs(x, np.arange(len(part)), cuts, floor, members=own, forest=known):
            passed = tested(labels[part[i]] != labels[part[j]], part[i], part[j], test) if test else slice(None)
            forest.add(i[passed], j[passed], cosine[passed])
        i, j, cosine = forest.edges()
        a, b = np.sort([part[i], part[j]], axis=0)
        yield a, b, cosine


def _join_by_pixels(
    component: np.ndarray,
    labels: np.ndarray,
    rule: PairRule,
    vectors: Fetch,
    hashes: Hashes,
    test: PairTest | None,
) -> Iterator[Joined]:
    """Yield the linked pairs of rows whose hashes agree, inside components and between unlike labels."""
    rows, bounds = groups_of(component)
    values, own = hashes(rows)[0], labels[rows]
    waiting: list[np.ndarray] = []
    for pairs in _agreeing(values, own, bounds, rule.bits):
        waiting.append(pairs)
        if sum(each.shape[1] for each in waiting) >= BATCH_PAIRS:
            yield _decide(rows, waiting, rule.threshold, vectors, test)
            waiting = []
    if waiting:
        yield _decide(rows, waiting, rule.threshold, vectors, test)


def _decide(
    rows: np.ndarray, waiting: list[np.ndarray], threshold: float, vectors: Fetch, test: PairTest | None
) -> Joined:
    """Keep of pairs of places in rows those that pass and whose exact cosine is above it, BATCH_PAIRS at a time."""
    pairs = np.sort(rows[np.concatenate(waiting, axis=1)], axis=0)
    cosine = np.empty(pairs.shape[1], np.float32)
    for at in range(0, len(cosine), BATCH_PAIRS):
        part = slice(at, at + BATCH_PAIRS)
        needed, place = np.unique(pairs[:, part], return_inverse=True)
        cosine[part] = exact_cosines(vectors(needed), *place.reshape(2, -1))
    near = tested(cosine > threshold, pairs[0], pairs[1], test)
    return pairs[0, near], pairs[1, near], cosine[near]


def _agreeing(hashes: np.ndarray, labels: np.ndarray, bounds: np.ndarray, bits: int) -> Iterator[np.ndarray]:
    """Yield the pairs of a group whose hashes differ in at most `bits` and whose labels differ: i < j, i64 [2, m].

    Groups of one size are compared together, up to BLOCK_PAIRS pairs at a time; a large group in blocks of its rows.
    """
    sizes = np.diff(bounds)
    for size in np.unique(sizes).tolist():
        starts = bounds[:-1][sizes == size]
        together = max(1, BLOCK_PAIRS // size**2)
        for first in range(0, len(starts), together):
            places = starts[first : first + together, None] + np.arange(size)
            step = max(1, BLOCK_PAIRS // (places.size))
            for row in range(0, size, step):
                left, right = places[:, row : row + step, None], places[:, None, row:]
                agree = near_pairs.differing_bits(hashes[left], hashes[right]) <= bits
                agree &= (labels[left] != labels[right]) & (left < right)
                group, i, j = np.nonzero(agree)
                yield np.stack([places[group, i + row], places[group, j + row]])
