"""What a stage could not read, passed over or changed: counted by kind, with one example of each kind.

A kind is a few words without row-specific numbers (`decode_error: image file is truncated`), so that a million rows
give only a few kinds. The counts are in the manifest under `faults`, and in the closing lines of the run that made it.
"""

import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pipelines.terminal import printable

Faults = dict[str, dict[str, Any]]  # kind: {"count": int, "example": str}
MOST_SHOWN = 10


def add(faults: Faults, kind: str, example: str, count: int = 1) -> None:
    """Count a fault; of each kind the first example is kept."""
    faults.setdefault(kind, {"count": 0, "example": example})["count"] += count


def total(each: Iterable[Mapping[str, Mapping[str, Any]]]) -> Faults:
    """Add up the faults of several shards, kinds in alphabetical order."""
    found: Faults = {}
    for faults in each:
        for kind, fault in faults.items():
            add(found, kind, str(fault["example"]), int(fault["count"]))
    return dict(sorted(found.items()))


def lines(faults: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Yield a line for each kind, the most frequent first, with its example."""
    ordered = sorted(faults.items(), key=lambda pair: (-pair[1]["count"], pair[0]))
    for kind, fault in ordered[:MOST_SHOWN]:
        yield f"{fault['count']:,} × {kind}" + (f" (e.g. {fault['example']})" if fault["example"] else "")
    if len(ordered) > MOST_SHOWN:
        yield f"… and {len(ordered) - MOST_SHOWN:,} more kinds in manifest.json"


def write(stage: str, faults: Mapping[str, Mapping[str, Any]], *, quiet: bool = False) -> None:
    """Write the lines to stderr, each after the stage's name."""
    if not quiet:
        sys.stderr.write("".join(f"{stage}: {printable(line)}\n" for line in lines(faults)))
