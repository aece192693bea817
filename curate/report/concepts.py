"""What captions mention and what pictures show, before and after the selection, with the share on each side.

What the pictures show was counted by the step `concepts`, if it ran. What the captions mention are frequent words and
two-word phrases:

In: captions of the pool and which of them were kept. Out: the phrases that most captions contain, and those that rose
or fell most, compared with what a random choice of as many captions would keep. A caption counts once for each phrase,
a word or two adjacent ones (naming.py). Memory is bounded: at most `MAX_CAPTIONS` captions are read, and rare phrases
are forgotten when there are too many.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from curate import naming
from curate.select.steps.by_concept import LISTED

MAX_CAPTIONS = 300_000
SHOWN = 14
IN_LINES = 5


@dataclass(frozen=True)
class Shares:
    """A phrase: how many of the pool's captions contain it, and how many of the kept ones."""

    phrase: str
    pool: int
    kept: int
    captions: int
    chosen: int

    @property
    def pool_share(self) -> float:
        """Share of the pool's captions that contain it."""
        return self.pool / self.captions

    @property
    def kept_share(self) -> float:
        """Share of the kept captions that contain it."""
        return self.kept / self.chosen

    @property
    def shift(self) -> float:
        """Return how far the number of kept captions is from what chance would keep, in standard deviations."""
        expected = self.pool_share * self.chosen
        return (self.kept - expected) / math.sqrt(expected)


def compare(captions: Iterable[tuple[str, bool]]) -> dict[str, Any] | None:
    """Compare the kept captions with all of them. captions: (caption, kept). None if there is nothing to compare."""
    pool: Counter[str] = Counter()
    kept: Counter[str] = Counter()
    seen = chosen = 0
    for caption, is_kept in captions:
        if seen >= MAX_CAPTIONS:
            break
        its = naming.phrases(caption)
        pool.update(its)
        seen += 1
        if is_kept:
            kept.update(its)
            chosen += 1
        if naming.forget_rare(pool):
            kept = Counter({phrase: kept[phrase] for phrase in kept.keys() & pool.keys()})
    if not seen or not chosen:
        return None
    least = max(5, seen // 1000)
    every = [Shares(phrase, count, kept[phrase], seen, chosen) for phrase, count in pool.items() if count >= least]
    frequent = list(_distinct(sorted(every, key=lambda s: (-s.pool, s.phrase))))
    moved = sorted(every, key=lambda s: (-s.shift, s.phrase))
    return {
        "captions": seen,
        "kept": chosen,
        "frequent": frequent,
        "gained": list(_distinct(s for s in moved if s.shift > 0)),
        "lost": list(_distinct(s for s in reversed(moved) if s.shift < 0)),
    }


def of_pictures(funnel: Mapping[str, Any]) -> dict[str, Any] | None:
    """Lay out what the last step `concepts` counted, in the form of `compare`; None if there was none."""
    told = [step["estimates"] for step in funnel.get("steps", []) if LISTED in (step.get("estimates") or {})]
    if not told:
        return None
    counted = told[-1][LISTED]
    rows, kept = counted["rows"]
    lists = {
        name: [Shares(concept, before, after, rows, kept) for concept, before, after in counted[name]]
        for name in ("frequent", "gained", "lost")
    }
    facts = {"vocabulary": told[-1]["vocabulary"], "concepts": told[-1]["concepts"]}
    even = {"before": told[-1]["effective_concepts"], "after": told[-1]["effective_after"]}
    return {"captions": rows, "kept": kept, **facts, **lists, "even": even}


def lines(funnel: Mapping[str, Any]) -> Iterator[str]:
    """Yield for the terminal what the pictures show, before and after the step that balanced it."""
    counted = of_pictures(funnel)
    if counted is None:
        return
    yield f"  concepts, before and after:  {counted['captions']:,} pictures, {counted['kept']:,} stay"
    for name, verb in (("frequent", "most frequent"), ("gained", "gained most"), ("lost", "lost most")):
        told = [
            f"{s.phrase} {two_digits(100 * s.pool_share)} % → {two_digits(100 * s.kept_share)} %"
            for s in counted[name][:IN_LINES]
        ]
        if told:
            yield f"    {verb:<14} {' · '.join(told)}"


def two_digits(value: float) -> str:
    """Write a number with two significant digits, without exponent; with three if it has three before the point."""
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"


def _distinct(ordered: Iterable[Shares]) -> Iterator[Shares]:
    """Take the first few, leaving out phrases that nearly always occur within, or around, one already taken."""
    taken: list[Shares] = []
    for shares in ordered:
        if len(taken) == SHOWN:
            return
        words = set(shares.phrase.split())
        akin = (t for t in taken if words <= set(t.phrase.split()) or words >= set(t.phrase.split()))
        if not any(min(t.pool, shares.pool) > 0.8 * max(t.pool, shares.pool) for t in akin):
            taken.append(shares)
            yield shares
