"""Brace patterns: many names in one, as `{00000..00999}.tar`."""

import re
from collections.abc import Sequence

from curate.errors import UsageError


def braces(pattern: str) -> list[str]:
    """Expand `{00000..00010}` and `{a,b}` as a shell would, keeping zero padding.

    Bounded: more than 10,000,000 names are refused.
    """
    match = re.search(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}", pattern)
    if match is None:
        return [pattern]
    head, tail = pattern[: match.start()], braces(pattern[match.end() :])
    if match[3] is not None:
        middles: Sequence[str] = match[3].split(",")
    else:
        first, last = int(match[1]), int(match[2])
        if (abs(last - first) + 1) * len(tail) > 10_000_000:
            raise UsageError(f"the pattern {pattern} names more than 10,000,000 files")
        step = 1 if last >= first else -1
        width = len(match[1]) if match[1].startswith("0") or match[2].startswith("0") else 0
        middles = [str(number).zfill(width) for number in range(first, last + step, step)]
    return [head + middle + rest for middle in middles for rest in tail]
