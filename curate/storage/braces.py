"""Brace patterns: many names in one, as `{00000..00999}.tar`."""

import itertools
import math
import re
from collections.abc import Sequence

from curate.errors import UsageError

GROUP = re.compile(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}")
MOST = 10_000_000  # names of a pattern


def braces(pattern: str) -> list[str]:
    """Expand `{00000..00010}` and `{a,b}` as a shell would, keeping zero padding.

    Raises: UsageError where that would be more than MOST names.
    """
    groups = list(GROUP.finditer(pattern))
    if math.prod(map(_count, groups)) > MOST:
        raise UsageError(f"the pattern {pattern} names more than {MOST:,} files")
    edges = [0, *(at for group in groups for at in group.span()), len(pattern)]
    between = ([pattern[start:stop]] for start, stop in zip(edges[::2], edges[1::2], strict=True))
    pairs = itertools.zip_longest(between, map(_names, groups), fillvalue=[""])
    return list(map("".join, itertools.product(*itertools.chain(*pairs))))


def _count(group: re.Match[str]) -> int:
    return abs(int(group[2]) - int(group[1])) + 1 if group[3] is None else group[3].count(",") + 1


def _names(group: re.Match[str]) -> Sequence[str]:
    if group[3] is not None:
        return group[3].split(",")
    first, last = int(group[1]), int(group[2])
    step = 1 if last >= first else -1
    width = len(group[1]) if group[1].startswith("0") or group[2].startswith("0") else 0
    return [str(number).zfill(width) for number in range(first, last + step, step)]
