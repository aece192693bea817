"""The rows of groups, a few groups at a time: beside its columns, a step needs memory for a part, not for the pool.

Sorting all rows by their group takes a hundred bytes per row. Decisions inside each group do not need that: the groups
are cut, by value, into up to `MAX_PARTS` parts of about equal numbers of rows, each row gets the number of its part
(one byte), and each part is processed as if it were the pool. Groups come in ascending order, and so do rows inside a
part, so no result depends on the cuts. A group that is larger than a part is a part by itself.

Cost: one byte a row, 16 a group, and some 100 for each row of the largest part. O(n log n) time.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

PART_ROWS = 1 << 16  # in a part at least, about
MAX_PARTS = 64
SAMPLE = 1 << 16  # of the values between which is cut
BLOCK = 1 << 16  # rows looked at at once
NO_PART = 255


@dataclass(frozen=True)
class Part:
    """Some complete groups. rows: i64 [m], ascending. place: i64 [m], each row's group, from 0. groups: their slice."""

    rows: np.ndarray
    place: np.ndarray
    groups: slice

    @property
    def size(self) -> int:
        """Return how many groups there are."""
        return int(self.groups.stop - self.groups.start)


class GroupParts:
    """Rows by their groups. names: the groups' values, ascending, [g]. sizes: their rows, i64 [g].

    Iterating yields the parts, any number of times; together they have each row and each group once.
    """

    def __init__(self, values: np.ndarray, among: np.ndarray) -> None:
        """values: whole numbers [n], equal ones are a group. among: bool [n], the rows that count."""
        self._values = values
        self.num_rows = int(np.count_nonzero(among))
        cuts = self._cuts(among)
        self._part = np.empty(len(values), np.uint8)
        for first in range(0, len(values), BLOCK):
            here = slice(first, first + BLOCK)
            number = np.searchsorted(cuts, values[here], side="right")
            self._part[here] = np.where(among[here], number, NO_PART)
        counted = [np.unique(values[self._rows(part)], return_counts=True) for part in range(len(cuts) + 1)]
        self._bounds = np.cumsum([0, *(len(names) for names, _ in counted)])
        self.names, self.sizes = (np.concatenate(each) for each in zip(*counted, strict=True))

    def _cuts(self, among: np.ndarray) -> np.ndarray:
        """Choose the values at which parts begin, but the first: ascending, at most MAX_PARTS - 1."""
        parts = min(MAX_PARTS, self.num_rows // PART_ROWS)
        if parts < 2:
            return self._values[:0]
        step = max(1, len(self._values) // SAMPLE)
        sampled = np.sort(self._values[::step][among[::step]])
        return np.unique(sampled[np.arange(1, parts) * len(sampled) // parts]) if len(sampled) else sampled

    def _rows(self, part: int) -> np.ndarray:
        """List the rows of a part, i64, ascending."""
        found = [
            np.flatnonzero(self._part[first : first + BLOCK] == part) + first
            for first in range(0, len(self._part), BLOCK)
        ]
        return np.concatenate(found) if found else np.empty(0, np.int64)

    def __iter__(self) -> Iterator[Part]:
        for number, (start, stop) in enumerate(zip(self._bounds[:-1].tolist(), self._bounds[1:].tolist(), strict=True)):
            rows = self._rows(number)
            yield Part(rows, np.searchsorted(self.names[start:stop], self._values[rows]), slice(start, stop))

    def first_rows(self, group: int, most: int) -> np.ndarray:
        """List the first rows of a group, i64, ascending."""
        part = int(np.searchsorted(self._bounds, group, side="right")) - 1
        rows = self._rows(part)
        return np.asarray(rows[self._values[rows] == self.names[group]][:most])

    def sums(self, values: np.ndarray) -> np.ndarray:
        """Add up a column's values by group, row after row, f64 [g]. values: [n]; a missing one (NaN) counts as -1."""
        total = np.empty(len(self.sizes))
        for part in self:
            known = np.nan_to_num(values[part.rows], nan=-1)
            total[part.groups] = np.bincount(part.place, known, minlength=part.size)
        return total
