"""Vocabularies: lists of concepts, and their vectors in the space of a directory's embeddings.

    "pool"           the commonest words and pairs of adjacent words in the pool's captions (naming.py)
    "imagenet-22k"   the names of ImageNet's 21,841 classes, nouns of WordNet, from timm, which open_clip needs anyway;
                     "imagenet-12k" and "imagenet-1k" are parts of them
    FILE             one concept a line, or a JSON list of them

A concept is embedded once, as written, by the text tower of the model that made the embeddings: the vectors are
stored beside the embeddings (stored.py), where later selections and the report's names of clusters find them.
"""

import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from curate import naming
from curate.errors import UsageError
from curate.words import is_blank

POOL, IMAGENET = "pool", ("imagenet-1k", "imagenet-12k", "imagenet-22k")
BUILT_IN = (POOL, *IMAGENET)
MAX_CONCEPTS, MAX_CHARACTERS = 500_000, 200
POOL_CAPTIONS, POOL_CONCEPTS, POOL_LEAST = 300_000, 20_000, 5
MOSTLY = 0.8  # a word found within one pair this often is dropped for the pair
LIKE = "expected one concept per line, as in a wordlist"


@dataclass(frozen=True)
class Vocabulary:
    """Concepts as written, each once. told: counts of the list's lines, for the funnel."""

    concepts: tuple[str, ...]
    told: dict[str, Any]


def read(name: str, lines: Callable[[str], list[str]], captions: Callable[[], Iterable[str]]) -> Vocabulary:
    """Read a vocabulary. lines: reads a text file. captions: reads up to POOL_CAPTIONS captions of the pool.

    Raises: UsageError for a list that is empty, too long, or has lines that are not words.
    """
    if name == POOL:
        found = of_captions(captions())
        if not found:
            raise UsageError(
                f"no phrase is in {POOL_LEAST} captions of this pool, so they give no vocabulary.",
                f'name one: "{IMAGENET[-1]}", or a file with one concept a line',
            )
        return Vocabulary(found, {"vocabulary": "phrases of the pool's captions", "concepts": len(found)})
    if name in IMAGENET:
        concepts, _ = clean(_imagenet(name), name)
        return Vocabulary(concepts, {"vocabulary": f"{name}, timm {version('timm')}", "concepts": len(concepts)})
    concepts, told = clean(lines(name), name)
    return Vocabulary(concepts, {"vocabulary": name.rsplit("/", 1)[-1], "concepts": len(concepts)} | told)


def clean(lines: Sequence[str], name: str) -> tuple[tuple[str, ...], dict[str, int]]:
    """Make concepts of a list's lines: spaces trimmed, composed (NFC), each once whatever its case.

    Returns them in the list's order, and how many lines were empty or repeated an earlier one. name: of the
    list, for messages. Raises: UsageError.
    """
    concepts: dict[str, str] = {}
    told = {"empty_lines": 0, "repeated": 0}
    for number, line in enumerate(lines, 1):
        concept = " ".join(unicodedata.normalize("NFC", line.removeprefix("\ufeff")).split())
        if is_blank(concept):
            told["empty_lines"] += 1
            continue
        if any(unicodedata.category(letter) == "Cc" for letter in concept):
            raise UsageError(f"{name}, line {number}: it holds control characters; {LIKE}.")
        if len(concept) > MAX_CHARACTERS:
            raise UsageError(
                f"{name}, line {number}: {len(concept):,} characters; a concept has at most {MAX_CHARACTERS}; {LIKE}."
            )
        if concepts.setdefault(concept.casefold(), concept) is not concept:
            told["repeated"] += 1
        if len(concepts) > MAX_CONCEPTS:
            raise UsageError(
                f"{name} has more than {MAX_CONCEPTS:,} concepts, of {len(lines):,} lines.",
                f"head -n {MAX_CONCEPTS} {name} > SHORTER, with the commonest first",
            )
    if not concepts:
        raise UsageError(f"{name} names no concept; {LIKE}.")
    return tuple(concepts.values()), {key: count for key, count in told.items() if count}


def of_captions(captions: Iterable[str]) -> tuple[str, ...]:
    """List the phrases of captions, the commonest first: at most POOL_CONCEPTS, each in POOL_LEAST captions or more.

    A word that nearly always occurs within the same pair of words is left out. Ties go by the alphabet.
    """
    counts: Counter[str] = Counter()
    for caption in captions:
        counts.update(naming.phrases(caption))
        naming.forget_rare(counts)
    most: dict[str, int] = {}
    for phrase, count in counts.items():
        for word in phrase.split() if " " in phrase else ():
            most[word] = max(count, most.get(word, 0))
    kept = ((p, c) for p, c in counts.items() if c >= POOL_LEAST and most.get(p, 0) < MOSTLY * c)
    return tuple(phrase for phrase, _ in sorted(kept, key=lambda each: (-each[1], each[0]))[:POOL_CONCEPTS])


def _imagenet(name: str) -> list[str]:
    """Read the first name of each class."""
    from timm.data import ImageNetInfo

    known = ImageNetInfo(name)
    return [known.index_to_description(number).split(",")[0] for number in range(known.num_classes())]
