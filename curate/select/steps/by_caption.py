"""Steps that balance the concepts that captions name: noun phrases, and entries of a list.

Captions are read in blocks. A phrase is known by a 64-bit hash, an entry by its number; memory is a few dozen bytes for
each mention.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from curate.errors import UsageError
from curate.select.frame import POOL, Count, File, Frame, Verdict
from curate.select.steps import phrases
from curate.select.steps.quotas import position_in_group
from curate.words import words

BLOCK = 1 << 16


def noun_phrases(frame: Frame, number: int, min: int = 3, cap: int = 100, extractor: str = phrases.DEFAULT) -> Verdict:
    """Keep all captions of each noun phrase that has `min` or more, but at most `cap` at random (LLaVA's CC3M-595K).

    extractor: a spaCy pipeline, "spacy:en_core_web_sm" as LLaVA used; see phrases. A caption stays if any phrase keeps
    it. Source: LLaVA (arXiv:2304.08485), appendix: rarest phrase first, which does not change the union.
    """
    if min < 1 or cap < 1:
        raise UsageError(f"noun_phrases: min={min}, cap={cap}; expected both at least 1.")
    extract, name = phrases.extractor(extractor)
    rows, names = [np.empty(0, np.int64)], [np.empty(0, np.uint64)]
    for some, captions in _captions(frame):
        hashes = [sorted({_hash(phrase) for phrase in each}) for each in extract(captions)]
        rows.append(np.repeat(some, [len(each) for each in hashes]))
        names.append(np.array([each for part in hashes for each in part], np.uint64))
    rng = np.random.default_rng([frame.seed, number])
    kept, facts = balance_phrases(np.concatenate(rows), np.concatenate(names), min, cap, rng)
    return Verdict(frame.mask(kept), {"extractor": name, **facts})


def balance_phrases(
    rows: np.ndarray, names: np.ndarray, least: int, cap: int, rng: np.random.Generator
) -> tuple[np.ndarray, dict[str, Any]]:
    """Choose rows by LLaVA's rule: all rows of a name with `least` to `cap` rows, `cap` random ones of a commoner name.

    rows, names: [m], which row mentions which name, each pair once. Returns the rows, ascending, and the account.
    """
    _, place, counts = np.unique(names, return_inverse=True, return_counts=True)
    position = position_in_group(place, rng.random(len(place)))
    chosen = (counts[place] >= least) & (position < cap)
    facts = {"phrases": len(counts), "too_rare": int((counts < least).sum()), "capped": int((counts > cap).sum())}
    return np.unique(rows[chosen]), facts


def metaclip(frame: Frame, number: int, t: Count = 20_000, entries: File = POOL, least: int = 100) -> Verdict:
    """Keep a caption with the chance that any entry it contains draws it: t / max(count, t) each (MetaCLIP).

    entries: a file, one entry a line or a JSON list; or "pool": the words and pairs of words that at least `least`
    captions contain. t: captions, or a share of the pool. A text contains an entry if it has its words in a row.
    Source: MetaCLIP (arXiv:2309.16671), t = 20,000 for a list of 500,000 entries and 400 million pairs kept.
    # Differs from its release: case is folded, and punctuation ends a word; one draw a row by the joint chance
    # 1 - prod(1 - p) stands for one draw an entry, which is the same in distribution.
    """
    if entries == POOL:
        listed = common_grams(lambda: (captions for _, captions in _captions(frame)), least)
    else:
        listed = [" ".join(words(line)) for line in frame.lines(entries)]
    trie = Trie(dict.fromkeys(entry for entry in listed if entry))
    rows, mentions = [], []
    for some, captions in _captions(frame):
        place, entry = trie.find(captions)
        rows.append(some[place])
        mentions.append(entry.astype(np.int32))
    at, mentioned = np.concatenate([np.empty(0, np.int64), *rows]), np.concatenate([np.empty(0, np.int32), *mentions])
    counts = np.bincount(mentioned, minlength=len(trie))
    chance = draw_chances(at, mentioned, counts, frame.count(t), len(frame.good))
    keep = frame.alive & (frame.random(number) < chance)
    facts = {"entries": len(trie), "matched": int((counts > 0).sum()), "t": frame.count(t)}
    return Verdict(keep, facts | {"unmatched_rows": int(frame.alive.sum()) - len(np.unique(at))})


def draw_chances(rows: np.ndarray, entries: np.ndarray, counts: np.ndarray, t: int, num_rows: int) -> np.ndarray:
    """Compute each row's chance to be drawn by any entry that it mentions, f64 [num_rows]; 0 if it mentions none."""
    with np.errstate(divide="ignore"):
        missed = np.log1p(-np.minimum(1, t / np.maximum(counts, 1)))
    return np.asarray(1 - np.exp(np.bincount(rows, missed[entries], minlength=num_rows)))


class Trie:
    """Entries as paths of words, searched in all places of many texts at once."""

    def __init__(self, entries: Sequence[str] | dict[str, None]) -> None:
        self.word: dict[str, int] = {}
        children: dict[tuple[int, int], int] = {}
        ends: dict[int, int] = {}
        for entry_number, entry in enumerate(entries):
            state = 0
            for word in entry.split(" "):
                step = (state, self.word.setdefault(word, len(self.word)))
                state = children.setdefault(step, len(children) + 1)
            ends.setdefault(state, entry_number)
        self.size = len(entries)
        steps = np.array(sorted(children.items()), dtype=object).tolist()
        self.keys = np.array([state * len(self.word) + word for (state, word), _ in steps], np.int64)
        self.target = np.array([target for _, target in steps], np.int64)
        self.end = np.full(len(children) + 1, -1, np.int64)
        self.end[list(ends)] = list(ends.values())

    def __len__(self) -> int:
        return self.size

    def find(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Find which entries each text contains. Returns (text, entry) pairs, each once, sorted: two i64 arrays."""
        cut = [words(text) for text in texts]
        text_of = np.repeat(np.arange(len(cut)), [len(each) + 1 for each in cut])
        known = self.word.get
        # All texts one after the other as word numbers, -1 where a word is in no entry, and at the end of each text.
        numbers = np.array([number for each in cut for number in (*(known(word, -1) for word in each), -1)], np.int64)
        place, state = np.arange(len(numbers)), np.zeros(len(numbers), np.int64)
        pairs_by_depth = [np.empty(0, np.int64)]
        depth = 0
        while len(place) and len(self.keys):
            word = numbers[place + depth]
            key = state * len(self.word) + word
            at = np.minimum(np.searchsorted(self.keys, key), len(self.keys) - 1)
            on = (word >= 0) & (self.keys[at] == key)
            place, state, depth = place[on], self.target[at[on]], depth + 1
            entry = self.end[state]
            pairs_by_depth.append((text_of[place] * self.size + entry)[entry >= 0])
        pairs = np.unique(np.concatenate(pairs_by_depth))
        return pairs // max(1, self.size), pairs % max(1, self.size)


def common_grams(blocks: Callable[[], Iterator[list[str]]], least: int) -> list[str]:
    """List the words and pairs of adjacent words that at least `least` texts contain, in a fixed order.

    blocks: yields the texts anew at each call. Reads them twice, since a pair is common only if both its words are.
    """
    counts: dict[str, int] = {}
    for texts in blocks():
        for text in texts:
            for word in set(words(text)):
                counts[word] = counts.get(word, 0) + 1
    common = sorted(word for word, count in counts.items() if count >= least)
    number = {word: place for place, word in enumerate(common)}
    width = len(common) + 1
    pairs, totals = np.empty(0, np.int64), np.empty(0, np.int64)
    for texts in blocks():
        mentioned: list[int] = []
        for text in texts:
            known = [number.get(word, -1) for word in words(text)]
            mentioned += {a * width + b for a, b in zip(known, known[1:], strict=False) if a >= 0 and b >= 0}
        names, times = np.unique(np.array(mentioned, np.int64), return_counts=True)
        names, place = np.unique(np.concatenate([pairs, names]), return_inverse=True)
        pairs, totals = names, np.bincount(place, np.concatenate([totals, times])).astype(np.int64)
    return common + [f"{common[pair // width]} {common[pair % width]}" for pair in pairs[totals >= least].tolist()]


def _captions(frame: Frame) -> Iterator[tuple[np.ndarray, list[str]]]:
    """Yield the rows alive with their captions, block by block."""
    rows = np.flatnonzero(frame.alive)
    for first in range(0, len(rows), BLOCK):
        some = rows[first : first + BLOCK]
        yield some, frame.captions(some)


def _hash(phrase: str) -> int:
    return int.from_bytes(hashlib.blake2b(phrase.encode(), digest_size=8).digest(), "little")
