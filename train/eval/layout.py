"""The folder that holds the benchmarks' files, and readers for them: JSON, JSON lines, tab-separated tables.

The layouts of both LLaVA's `playground/data/eval` and Bunny's `eval` are found.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.errors import DataError, UsageError
from train.eval.scoring import Item


@dataclass(frozen=True)
class Layout:
    """The folder with all benchmarks, as one of them uses it."""

    root: Path
    task: str

    def find(self, *names: str) -> Path:
        """Return the first of these files or folders that exists.  Raises: UsageError naming them."""
        for name in names:
            if (self.root / name).exists():
                return self.root / name
        raise UsageError(f"--eval-root {self.root}: {self.task} needs {' or '.join(names)}")

    def lines(self, *names: str) -> list[dict[str, Any]]:
        """Read the first of these JSON-lines files."""
        path = self.find(*names)
        return [parse_json(path, line) for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip()]

    def json(self, *names: str) -> Any:
        """Read the first of these JSON files."""
        path = self.find(*names)
        return parse_json(path, path.read_text(encoding="utf-8-sig"))

    def ask(
        self, questions: Sequence[dict[str, Any]], images: Path, truth: Callable[[dict[str, Any]], Any]
    ) -> list[Item]:
        """Make items from lines in LLaVA's form (question_id, image, text, category)."""
        return [
            Item(q["question_id"], q["text"], str(images / q["image"]), truth(q), str(q.get("category", "")))
            for q in questions
        ]


def parse_json(path: Path, text: str) -> Any:
    """Read JSON.  Raises: DataError naming the file."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON: {error}") from None


def read_tsv(path: Path) -> Iterator[dict[str, str]]:
    """Yield the rows of a tab-separated file by column name; a missing cell is ""."""
    csv.field_size_limit(1 << 28)  # fields may hold images
    with path.open(encoding="utf-8-sig", newline="") as file:
        for row in csv.DictReader(file, delimiter="\t"):
            yield {key: value or "" for key, value in row.items() if key is not None}


def read_mmbench(path: Path) -> Iterator[dict[str, str]]:
    """Yield the rows of a TSV of MMBench; fixes row numbers that pandas wrote as "3.0" when a subset was saved."""
    for row in read_tsv(path):
        yield {**row, **{key: re.sub(r"^(\d{1,15})\.0+$", r"\1", row[key]) for key in ("index", "image")}}
