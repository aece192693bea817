"""Texts that repeat others: near-duplicates among conversations, and benchmark questions that appear in them.

Near-duplicates are decided by the exact Jaccard similarity of their three-word shingles; MinHash (128 hashes, banded)
only proposes which pairs to look at, so that nothing is dropped below the threshold and a pair above it is missed with
the banding's small chance (about 5 % at the threshold, next to none above it). A benchmark question is found by a run
of 13 words that a record's question shares with it (the rule of GPT-3's report, arXiv:2005.14165, appendix C).
"""

import zlib
from collections.abc import Hashable, Iterator, Mapping
from typing import Any

import numpy as np

from curate.words import pieces
from pipelines.record_forms import HUMAN
from pipelines.records import IMAGE_MARK

SHINGLE, RUN, HASHES = 3, 13, 128
# Lines that say how to answer or what an OCR system read: the same under thousands of questions.
FORMAT_LINES = ("Answer the question using", "Answer with the option", "Reference OCR token")
_FACTORS, _OFFSETS = np.random.default_rng(0).integers(1, 2**63, (2, HASHES), dtype=np.uint64)


class Remembered:
    """Texts seen so far, by group; 4 bytes per shingle, and another 2 kB per text without a group."""

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self.shingles: list[np.ndarray] = []
        self.buckets: dict[Hashable, list[int]] = {}

    def near(self, text: str, group: Hashable = None) -> bool:
        """Say whether an earlier text of the group has Jaccard >= threshold to this one; remember it if none has.

        group: None compares with all texts without a group, through MinHash; within a group all texts are compared.
        """
        own = shingles(text)
        keys = list(_bands(own, self.threshold)) if group is None else [group]
        seen = sorted({number for key in keys for number in self.buckets.get(key, ())})
        if any(jaccard(own, self.shingles[number]) >= self.threshold for number in seen):
            return True
        for key in keys:
            self.buckets.setdefault(key, []).append(len(self.shingles))
        self.shingles.append(own)
        return False


def words(text: str) -> list[str]:
    """Split a text into its words, without case and punctuation."""
    return pieces(text.replace(IMAGE_MARK, " "))


def shingles(text: str) -> np.ndarray:
    """Hash each run of three words (of fewer words, the whole). Returns u32, ascending and distinct."""
    found = words(text)
    runs = (" ".join(found[start : start + SHINGLE]) for start in range(max(1, len(found) - SHINGLE + 1)))
    return np.unique(np.array([zlib.crc32(run.encode("utf-8", "surrogatepass")) for run in runs], np.uint32))


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """Compute the share of shingles that two texts have in common."""
    common = len(np.intersect1d(a, b, assume_unique=True))
    return common / (len(a) + len(b) - common)


def _bands(own: np.ndarray, threshold: float) -> Iterator[bytes]:
    """Yield the banded MinHash of a text: texts near each other are very likely to share a band."""
    if threshold >= 1:
        yield own.tobytes()
        return
    least = np.full(HASHES, np.iinfo(np.uint64).max, np.uint64)
    for start in range(0, len(own), 1024):  # multiply-shift hashing, modulo 2^64
        hashed = own[start : start + 1024, None].astype(np.uint64) * _FACTORS + _OFFSETS
        least = np.minimum(least, hashed.min(axis=0))
    rows = _rows_a_band(threshold)
    for start in range(0, HASHES, rows):
        yield bytes([start]) + least[start : start + rows].tobytes()


def _rows_a_band(threshold: float) -> int:
    """Choose the longest band by which a pair at the threshold is missed in at most 6 of 100 cases."""
    fitting = [rows for rows in (32, 16, 8, 4, 2) if (1 - threshold**rows) ** (HASHES // rows) <= 0.06]
    return max(fitting, default=1)


def questions(record: Mapping[str, Any]) -> Iterator[str]:
    """Yield the questions of a record: human turns, or the `text` or `question` of a benchmark's line."""
    turns = record.get("conversations")
    asked = (
        [turn.get("value") for turn in turns if isinstance(turn, dict) and turn.get("from") in HUMAN] if turns else []
    )
    for text in (*asked, record.get("text"), record.get("question")):
        if isinstance(text, str):
            yield "\n".join(line for line in text.split("\n") if not line.lstrip().startswith(FORMAT_LINES))


def runs(record: Mapping[str, Any]) -> Iterator[str]:
    """Yield every run of 13 words in a record's questions; a shorter question yields none, since it proves nothing."""
    for question in questions(record):
        found = words(question)
        yield from (" ".join(found[start : start + RUN]) for start in range(len(found) - RUN + 1))
