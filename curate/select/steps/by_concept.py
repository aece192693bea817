"""A step that balances what the pictures show: concepts of a vocabulary, found by the stored vectors.

Each image has the few concepts that are nearest to it (ask/matches.py). A concept's rows are ordered best first; the
row at place r = 0, 1, … gets the share (r + 1) / q of the concept's quota q. A row counts by its smallest share in any
of its concepts, and the n rows with the smallest shares stay. So a row of a rare concept stays whatever else it shows,
and a row of common concepts only if it is among their best: MetaCLIP's balance (which draws with the chance
1 - prod(1 - t / count)), but by rank instead of chance, and exact to the row. Rows without any concept come last, best
first.

The quotas decide how flat the distribution becomes. Without t, q = 1 for all, and concepts are filled alike until the
budget is reached: MetaCLIP with the t at which its draw would give n rows. With t, q = min(count, t): concepts of up to
t rows keep the same share of their rows, larger ones as many rows as one of t rows.
"""

from typing import Any

import numpy as np

from curate.ask import matches, vocabularies
from curate.errors import UsageError
from curate.select.frame import Count, File, Frame, Keep, Share, Verdict, reserve_size, shortage
from curate.select.steps.by_budget import preference_in_group
from curate.select.steps.group_parts import Part
from curate.select.steps.quotas import position_in_group
from curate.storage.manifest import digest

MOST_EACH = 50
SHOWN = 14  # concepts in each of the lists that the funnel tells of
LISTED = "concepts_before_after"


def concepts(
    frame: Frame,
    number: int,
    vocabulary: File,
    n: Count,
    per_image: int = 5,
    t: int = 0,
    tail: Share = 0.0,
    keep: Keep = "max:clip_score",
) -> Verdict:
    """Keep exactly n rows, as evenly as possible over the concepts of a vocabulary that the pictures show, best first.

    vocabulary: a file, one concept a line or a JSON list; "imagenet-22k" (or -12k, -1k): its classes; "pool": the
    most frequent phrases of its captions. per_image: the most concepts that an image has. t: rows up to which a concept
    is rare, as in MetaCLIP; tail: the share of all mentions that rare concepts should have, which determines t
    (MetaCLIP 2). keep: which of a concept's rows come first, as in `balance`.
    Source: concept balance of LLaVA-OneVision-1.5, whose code is unpublished; MetaCLIP (arXiv:2309.16671).
    """
    if not 1 <= per_image <= MOST_EACH or (t and tail):
        raise UsageError(
            f"concepts: per_image={per_image}, t={t}, tail={tail}; expected 1 to {MOST_EACH} concepts an image, and t "
            "or tail, not both."
        )
    listed, found, facts = find(frame, vocabulary, per_image)
    rows = np.flatnonzero(frame.alive)
    own = found[rows]
    at, place = np.nonzero(own >= 0)
    concept = own[at, place].astype(np.int64)
    counts = np.bincount(concept, minlength=len(listed))
    rare = t or (tail_count(counts, tail) if tail else 0)
    order_of = preference_in_group(frame, keep, number)
    position = position_in_group(concept, order_of(Part(rows[at], concept, slice(0, len(listed)))))
    best = order_of(Part(rows, np.zeros(len(rows), np.int64), slice(0, 1)))
    share = least_shares(at, position, np.minimum(counts, rare)[concept] if rare else 1, len(rows))
    ranked = np.lexsort((best, share))
    wanted = frame.count(n)
    kept = np.sort(ranked[:wanted])
    after = np.bincount(concept[frame.mask(rows[kept])[rows[at]]], minlength=len(listed))
    facts |= {"mentions": len(at), "unmatched_rows": int((own < 0).all(axis=1).sum())}
    facts |= {"unmatched_kept": int((own[kept] < 0).all(axis=1).sum())} | ({"t": rare} if rare else {})
    facts |= account(listed, counts, after, len(rows), len(kept))
    return Verdict(
        frame.mask(rows[kept]), facts | shortage(wanted, len(rows)), rows[ranked[wanted:][: reserve_size(len(kept))]]
    )


def find(frame: Frame, name: str, per_image: int) -> tuple[tuple[str, ...], np.ndarray, dict[str, Any]]:
    """Find which concepts of a vocabulary each good row shows: i32 [n, per_image], -1 for none; computed once.

    Returns the concepts, this array, and what the vocabulary was.
    """
    good = np.flatnonzero(frame.good)

    def captions() -> list[str]:
        step = -(-len(good) // vocabularies.POOL_CAPTIONS)
        return frame.captions(good[::step])

    read = vocabularies.read(name, frame.lines, captions)
    listed = {"vocabulary": list(read.concepts)}
    vectors = frame.stored(listed, lambda: frame.embed_texts(read.concepts, listed=True), len(read.concepts))
    cut = matches.read_cut(frame.vectors, good, vectors)

    def make() -> np.ndarray:
        spread = np.full((len(frame.good), per_image), -1, np.int32)
        spread[good] = matches.match(frame.vectors, good, vectors, cut, per_image)
        return spread

    found = frame.stored({"concepts": digest(listed), "per_image": per_image, "cut": cut}, make)
    alike = {"share_a_vector": shared} if (shared := count_alike(vectors)) else {}
    return read.concepts, found, read.told | {"chance_below": cut} | alike


def count_alike(vectors_md: np.ndarray) -> int:
    """Count the concepts that share their vector with another: usually words that the model does not know."""
    _, counts = np.unique(np.ascontiguousarray(vectors_md, np.float32), axis=0, return_counts=True)
    return int(counts[counts > 1].sum())


def least_shares(row_of: np.ndarray, position: np.ndarray, quota: np.ndarray | int, num_rows: int) -> np.ndarray:
    """Find each row's least (position + 1) / quota over its mentions, f64 [num_rows]; infinite where it has none."""
    least = np.full(num_rows, np.inf)
    np.minimum.at(least, row_of, (position + 1) / quota)
    return least


def tail_count(counts: np.ndarray, share: float) -> int:
    """Find t: the least count for which concepts of up to t rows have at least `share` of all mentions; at least 1.

    Source: MetaCLIP 2 (arXiv:2507.22062), which takes for each language the t that gives the same share as t = 170,000
    gives in English.
    """
    ordered = np.sort(counts)
    mass = np.cumsum(ordered)
    place = np.searchsorted(mass, share * mass[-1]) if len(mass) else 0
    return max(1, int(ordered[min(place, len(ordered) - 1)])) if len(ordered) else 1


def account(
    listed: tuple[str, ...], before: np.ndarray, after: np.ndarray, num_before: int, num_after: int
) -> dict[str, Any]:
    """Describe the concepts before and after: over how many the rows are spread; the commonest, gained and lost."""
    there = np.flatnonzero(before)
    expected = before * (num_after / max(1, num_before))
    shift = (after - expected) / np.sqrt(np.maximum(expected, 1e-12))
    lists = {
        "frequent": there[np.argsort(-before[there], kind="stable")],
        "gained": there[np.argsort(-shift[there], kind="stable")],
        "lost": there[np.argsort(shift[there], kind="stable")],
    }
    lists["gained"], lists["lost"] = (lists[name][: int((sign * shift[there] > 0).sum())] for name, sign in GOES)
    tables = {
        name: [[listed[c], int(before[c]), int(after[c])] for c in chosen[:SHOWN].tolist()]
        for name, chosen in lists.items()
    }
    return {
        "met": len(there),
        "met_after": int((after > 0).sum()),
        "effective_concepts": round(even_number(before), 1),
        "effective_after": round(even_number(after), 1),
        LISTED: {"rows": [num_before, num_after], **tables},
    }


GOES = (("gained", 1), ("lost", -1))


def even_number(counts: np.ndarray) -> float:
    """Compute how many equal counts (of concepts, of clusters) would be spread as evenly: exp of the entropy."""
    shares = counts[counts > 0] / max(1, counts.sum())
    return float(np.exp(-(shares * np.log(shares)).sum())) if len(shares) else 0.0
