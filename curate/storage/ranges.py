"""Byte ranges of a file: which are joined into one read, and how they are fetched, several at a time.

On a URL every request costs a round trip, and every byte between two joined ranges costs its transfer: ranges are
joined across the smallest gaps first, as long as the gaps are a small part of what is wanted.
"""

import functools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np

from curate.storage import paths, web

WASTE = 0.03  # bytes that may be read besides those wanted, as a share of those
PART_BYTES = 8 << 20  # a longer range is fetched as several
AHEAD = 16  # files read at a time
In = TypeVar("In")
Result = TypeVar("Result")


def join(starts: np.ndarray, stops: np.ndarray, waste: float = WASTE) -> tuple[np.ndarray, np.ndarray]:
    """Join ranges i64 [n], in any order, into fewer that cover them. Returns (starts, stops) i64, ascending, disjoint.

    waste: how many bytes may be read besides those wanted, as a share of those wanted.
    """
    order = np.lexsort((stops, starts))
    starts, stops = starts[order], np.maximum.accumulate(stops[order])
    if not len(starts):
        return starts, stops
    gaps = np.maximum(0, starts[1:] - stops[:-1])
    wanted = int(stops[-1] - starts[0] - gaps.sum())
    by_size = np.argsort(gaps, kind="stable")
    bridged = np.zeros(len(gaps), bool)
    bridged[by_size] = np.cumsum(gaps[by_size]) <= waste * wanted
    return starts[np.append(True, ~bridged)], stops[np.append(~bridged, True)]


class Pieces:
    """Stretches of a file in memory. starts: i64 [n], ascending; parts: their bytes."""

    def __init__(self, starts: Sequence[int] | np.ndarray, parts: Sequence[bytes]) -> None:
        self.starts, self.parts = np.asarray(starts, np.int64), parts

    def __call__(self, start: int, size: int) -> memoryview:
        """Return a stretch that lies within one of the parts. Raises: OSError if the file ends before it."""
        found = self.find(start, size)
        if found is None:
            raise OSError(f"bytes {start:,} to {start + size:,} are not there")
        return found

    def find(self, start: int, size: int) -> memoryview | None:
        """Return a stretch that lies within one of the parts, or None."""
        place = int(np.searchsorted(self.starts, start, side="right")) - 1
        if place < 0:
            return None
        begin = start - int(self.starts[place])
        found = memoryview(self.parts[place])[begin : begin + size]
        return found if len(found) == size else None


def read(location: str, starts: np.ndarray, stops: np.ndarray, waste: float = WASTE) -> Pieces:
    """Read ranges of a file, i64 [n] each, joined by `join`; of a remote one several at a time."""
    starts, stops = join(starts, stops, waste)
    if not paths.is_remote(location):
        with open(paths.local(location), "rb") as file:
            spans = zip(starts.tolist(), stops.tolist(), strict=True)
            return Pieces(starts, [os.pread(file.fileno(), stop - start, start) for start, stop in spans])
    cuts = [
        (part, min(part + PART_BYTES, stop))
        for start, stop in zip(starts.tolist(), stops.tolist(), strict=True)
        for part in range(start, stop, PART_BYTES)
    ]
    parts = read_remote(location, [start for start, _ in cuts], [stop for _, stop in cuts])
    held = np.searchsorted(starts, [start for start, _ in cuts], side="right") - 1
    bounds = np.searchsorted(held, np.arange(len(starts) + 1)).tolist()
    whole = zip(bounds[:-1], bounds[1:], strict=True)
    return Pieces(starts, [parts[first] if last == first + 1 else b"".join(parts[first:last]) for first, last in whole])


def read_remote(location: str, starts: Sequence[int], stops: Sequence[int | None]) -> list[bytes]:
    """Read ranges of a remote file as they are, all at once; a range in which the file ends comes back shorter.

    A negative start, whose stop is None, counts from the end.
    """
    found: dict[int, bytes] = {}

    def fetch(fs: Any, path: str) -> list[bytes]:
        left = [place for place in range(len(starts)) if place not in found]
        spans = [(starts[place], stops[place]) for place in left]
        answers = dict(zip(left, web.cat_ranges(fs, path, spans), strict=True))
        found.update({place: answer for place, answer in answers.items() if not isinstance(answer, BaseException)})
        for answer in answers.values():
            if isinstance(answer, BaseException):
                raise answer
        return [found[place] for place in range(len(starts))]

    return paths.with_retries(location, fetch)


def map_ahead(pool: Executor, work: Callable[[In], Result], items: Iterable[In], depth: int) -> Iterator[Result]:
    """Map over items in a pool, in order, with at most `depth` of them started ahead."""
    waiting: deque[Future[Result]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) >= depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def ahead(location: str, work: Callable[[In], Result], items: Iterable[In], depth: int = AHEAD) -> Iterator[Result]:
    """Map over items in order: if `location` is remote, in threads, `depth` at a time; else one by one."""
    if not paths.is_remote(location):
        yield from map(work, items)
        return
    yield from map_ahead(_threads(), work, items, depth)


@functools.cache
def _threads() -> ThreadPoolExecutor:
    """Return the threads of `ahead`, always the same, since s3fs makes a client for each. Not to be called in them."""
    return ThreadPoolExecutor(AHEAD)
