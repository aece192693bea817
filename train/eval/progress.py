"""Progress of an evaluation: a line on stderr every few seconds, and finished parts kept in a file of lines.

Each finished part is one synced write of whole lines; a partial last line left by a kill is cut off when the file is
opened again. Benchmarks keep their answers in this way (answers.py). Held-out questions keep in `.OUT.jsonl.unfinished`
the request and the results, one line per part, until OUT.jsonl is written.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from train.errors import DataError
from train.folder import alone, refuse_other, same_request

EVERY_S = 5.0
log = logging.getLogger("train")


class Pace:
    """Count what is done and log it now and then and, if asked for, at the end."""

    def __init__(self, name: str, total: int, *, at_end: bool = True) -> None:
        self.name, self.total, self.at_end = name, total, at_end
        self.done, self.said, self.started = 0, 0.0, time.monotonic()

    def add(self, count: int) -> None:
        """Add to the count."""
        self.done, spent = self.done + count, time.monotonic() - self.started
        ends = self.done >= self.total and self.at_end
        if self.done and (ends or spent - self.said > EVERY_S):
            self.said, rate = spent, self.done / max(spent, 1e-9)
            left = (self.total - self.done) / rate
            log.info("%s: %s of %s, %.1f/s, %.0f s left", self.name, f"{self.done:,}", f"{self.total:,}", rate, left)


def append_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Append rows as whole lines of JSON in one synced write."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    data = text.encode("utf-8", "backslashreplace")  # halves of surrogate pairs, which JSON may hold, become escapes
    with path.open("ab", buffering=0) as file:
        while data:
            try:
                data = data[file.write(data) :]
            except OSError as error:  # it does not name the file
                raise OSError(error.errno, error.strerror, str(path)) from None
        os.fsync(file.fileno())


def read_lines(
    path: Path, fits: Callable[[dict[str, Any]], bool], expected: str, *, mend: bool = False
) -> list[dict[str, Any]]:
    """Read rows that `append_lines` wrote; `mend` cuts the file off at the first incomplete line.

    fits: whether an object is a valid row.  expected: describes one, for the error.  Raises: DataError.
    """
    if mend and not path.exists():
        return []
    rows: list[dict[str, Any]] = []
    whole = 0
    with path.open("r+b" if mend else "rb") as file:
        for number, line in enumerate(file, 1):
            row = _row(line, fits) if line.strip() else {}
            if row is None or (mend and not line.endswith(b"\n")):
                if mend:
                    log.warning("%s: cut off after %d whole lines", path, len(rows))
                    file.truncate(whole)
                    break
                raise DataError(f"{path}, line {number}: expected {expected}")
            whole += len(line)
            rows += [row] if row else []
    return rows


def _row(line: bytes, fits: Callable[[dict[str, Any]], bool]) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and fits(row) else None


@dataclass
class Kept:
    """The results of an unfinished evaluation, by the name of the part."""

    path: Path | None = None  # None: another process, the first, keeps them
    parts: dict[str, Any] = field(default_factory=dict)

    def add(self, name: str, found: Any) -> None:
        """Keep the result of a part."""
        self.parts[name] = found
        if self.path is not None:
            append_lines(self.path, [{"part": name, "found": found}])


@contextmanager
def keeping(out: Path, request: dict[str, Any], *, overwrite: bool = False) -> Iterator[Kept]:
    """Continue from the results that a killed process kept for `out` and this same request; delete them at the end.

    Raises: UsageError if they belong to another request, or if another process is writing them.
    """
    path = out.with_name(f".{out.name}.unfinished")
    with alone(out.with_name(f".{out.name}.lock"), out):
        first, *parts = read_lines(path, bool, "an object", mend=True) or [{}]
        there = first.get("request", {})
        if parts and not overwrite and not same_request(there, request):
            refuse_other(there, request, out)
        if overwrite or not parts or there != request:
            path.unlink(missing_ok=True)
            append_lines(path, [{"request": request}])
            parts = []
        yield Kept(path, {part["part"]: part["found"] for part in parts})
        path.unlink()
