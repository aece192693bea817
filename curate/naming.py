"""Names for groups of captions: phrases that a group's captions share and those of other groups lack.

A phrase is one word, or two adjacent ones, without the small words below. A share p of the group's captions and a share
q of all captions contain it; the phrases with the highest p · log(p / q) name the group: common inside, rare outside.
(That is the phrase's part of the divergence between the two: how much it tells about which group a caption is from.)
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from curate.words import words

MAX_WORDS, MAX_LETTERS, MAX_CHARACTERS = 40, 60, 2000  # words of a caption, letters of a word, characters of a caption
MAX_PHRASES = 400_000  # counted at a time: beyond it the rarest are forgotten
LEAST_SHARE, LEAST_CAPTIONS, NAMES = 0.1, 2, 3  # least share and number of captions with a name; names
SMALL = frozenset(
    "a an the of in on at to and or with for from by is are was were be been being this that these those it its as "
    "into onto over under up down out off near next there here has have had do does did not no so we i you he she they "
    "them his her their our your my me us who which what where when how very some any all one two s t http https www "
    "com jpg".split()
)


def phrases(caption: str) -> set[str]:
    """List a caption's phrases: words without digits that are not small words, and pairs of adjacent ones."""
    cut = (word[:MAX_LETTERS] for word in words(caption[:MAX_CHARACTERS]) if not any(map(str.isdigit, word)))
    read = list(cut)[:MAX_WORDS]
    single = {word for word in read if word not in SMALL}
    return single | {f"{a} {b}" for a, b in zip(read, read[1:], strict=False) if a not in SMALL and b not in SMALL}


def forget_rare(counts: Counter[str]) -> bool:
    """Forget the rarest phrases if there are more than MAX_PHRASES; returns whether there were."""
    least = 1
    while len(counts) > MAX_PHRASES:
        least += 1
        for phrase in [phrase for phrase, count in counts.items() if count < least]:
            del counts[phrase]
    return least > 1


def names(groups: Mapping[int, Sequence[str]], others: Iterable[str] = ()) -> dict[int, str]:
    """Name each group by up to three phrases, or "" if its captions share none.

    groups: captions by group. others: captions of further rows, to tell what is common everywhere. A phrase that
    contains one already taken, or is contained in it, is passed over. Ties are broken alphabetically.
    """
    inside = {group: Counter(phrase for text in texts for phrase in phrases(text)) for group, texts in groups.items()}
    outside: Counter[str] = Counter()
    for counts in inside.values():
        outside.update(counts)
    total = sum(map(len, groups.values()))
    for text in others:
        outside.update(phrases(text))
        total += 1
    return {group: _name(counts, len(groups[group]), outside, total) for group, counts in inside.items()}


def _name(counts: Counter[str], captions: int, outside: Counter[str], total: int) -> str:
    least = max(LEAST_CAPTIONS, LEAST_SHARE * captions)
    weights = {
        phrase: count / captions * math.log(count / captions / (outside[phrase] / total))
        for phrase, count in counts.items()
        if count >= least
    }
    return joined(sorted(weights, key=lambda phrase: (-weights[phrase], -len(phrase), phrase)))


def joined(ordered: Iterable[str]) -> str:
    """Join up to three phrases to a name, without those that contain one already taken or are contained in it."""
    taken: dict[str, set[str]] = {}
    for phrase in ordered:
        own = set(phrase.casefold().split())
        if len(taken) < NAMES and not any(own <= other or own >= other for other in taken.values()):
            taken[phrase] = own
    return ", ".join(taken)
