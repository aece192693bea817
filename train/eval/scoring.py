"""How each benchmark turns answers into a score: pure functions of items and texts, in the same order.

A scorer takes the items of a task and a text for each, and returns its metrics, the main one first, in percent (MME: in
points), and the same by category if the benchmark has categories. The rules are those of the scripts behind the
published numbers, quirks included: LLaVA's `llava/eval` and `scripts/convert_*`, Bunny's `eval/*`, the VQA evaluation's
answer processor (in mmf's form), MMMU's parser. If a rule is ours because theirs asks a judge, the function says so.
"""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

LETTERS = "ABCDEFGHIJ"
PERCEPTION = "existence count position color posters celebrity scene landmark artwork OCR".split()
COGNITION = "commonsense_reasoning numerical_calculation text_translation code_reasoning".split()


@dataclass(frozen=True)
class Item:
    """One question of a task."""

    id: int | str
    prompt: str
    image: Any = None  # a path, bytes, or (parquet file, row); None: no image
    truth: Any = None  # a string; for VQA ten strings; for open MMMU questions one or several
    category: str = ""
    choices: tuple[str, ...] = ()
    of: int = 0  # number of the benchmark's questions in this one's group, itself included; 0: those given


@dataclass(frozen=True)
class Scores:
    """Metrics by name, the main one first, and the main one by category; without those that have nothing to score.

    Questions that count as one (pairs, images, rotations) count only if all of the group are there: `--limit`, a
    partial file and unreadable pictures leave incomplete groups.
    """

    metrics: dict[str, float]
    categories: dict[str, float] = field(default_factory=dict)


Scorer = Callable[[Sequence[Item], Sequence[str]], Scores]


def _percent(right: Iterable[float]) -> float:
    values = list(right)
    return 100 * sum(values) / len(values) if values else 0.0


def _by_category(items: Sequence[Item], right: Sequence[float]) -> dict[str, float]:
    groups: dict[str, list[float]] = defaultdict(list)
    for item, value in zip(items, right, strict=True):
        groups[item.category].append(value)
    return {name: _percent(values) for name, values in groups.items()}


def _whole(items: Sequence[Item], key: Callable[[Item], Any]) -> list[list[int]]:
    """Return the indices of each complete group of questions that count as one, in the order of their first."""
    groups: dict[Any, list[int]] = defaultdict(list)
    for place, item in enumerate(items):
        groups[key(item)].append(place)
    return [places for places in groups.values() if len(places) >= items[places[0]].of]


def says_yes(text: str) -> bool:
    """Read an answer to POPE: no if one of No, no, not is a word of the first sentence, otherwise yes."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return not {"No", "no", "not"} & set(words)


def pope(items: Sequence[Item], texts: Sequence[str]) -> Scores:
    """Mean over the categories of the F1 of "yes", and of the accuracy.  Truths: yes, no."""
    pairs: dict[str, list[tuple[bool, bool]]] = defaultdict(list)
    for item, text in zip(items, texts, strict=True):
        pairs[item.category].append((says_yes(text), item.truth != "no"))
    f1, accuracy = {}, {}
    for category, answers in pairs.items():
        hits = sum(said and true for said, true in answers)
        wrong = sum(said != true for said, true in answers)
        f1[category] = 100 * 2 * hits / (2 * hits + wrong) if hits else 0.0
        accuracy[category] = 100 - 100 * wrong / len(answers)
    yes = _percent(said for answers in pairs.values() for said, _ in answers)
    metrics = {"f1": sum(f1.values()) / len(f1), "accuracy": sum(accuracy.values()) / len(accuracy), "yes_ratio": yes}
    detail = {f"f1_{name}": value for name, value in f1.items()}
    return Scores(metrics, {**detail, **{f"accuracy_{name}": value for name, value in accuracy.items()}})


def read_yes_no(text: str) -> str:
    """Read an answer to MME: yes or no where it begins with one (within four characters), else other."""
    head = text.lower()[:4]
    return "yes" if "yes" in head else "no" if "no" in head else "other"


def mme_image(item: Item) -> Any:
    """Return the key that MME's questions about one image share."""
    return item.category, item.id


def mme(items: Sequence[Item], texts: Sequence[str]) -> Scores:
    """Points of perception (of 2,000) and cognition (of 800): per category, accuracy by question plus by image.

    An image, identified by the items' id, is right if all its questions (two) are.
    """
    right = [read_yes_no(text) == str(item.truth).lower() for item, text in zip(items, texts, strict=True)]
    images: dict[str, list[list[bool]]] = defaultdict(list)
    for places in _whole(items, mme_image):
        images[items[places[0]].category].append([right[place] for place in places])
    points = {name: _percent(sum(each, [])) + _percent(map(all, each)) for name, each in images.items()}
    halves = {"perception": PERCEPTION, "cognition": COGNITION}
    asked = {half: [points[name] for name in names if name in points] for half, names in halves.items()}
    return Scores({half: sum(values) for half, values in asked.items() if values}, points)


def gqa(items: Sequence[Item], texts: Sequence[str]) -> Scores:
    """Exact match after lower-casing and dropping final full stops."""
    right = [text.rstrip(".").lower() == item.truth for item, text in zip(items, texts, strict=True)]
    return Scores({"accuracy": _percent(right)})


# Contractions whose apostrophe the VQA evaluation restores; a word is corrected if it lacks exactly one.
_CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()
_MENDED = {w[:i] + w[i + 1 :]: w for w in _CONTRACTIONS for i, character in enumerate(w) if character == "'"}
_MENDED["somebody'd"] = "somebodyd"  # sic
_DIGITS = {word: str(n) for n, word in enumerate("zero one two three four five six seven eight nine ten".split())}
_DIGITS["none"] = "0"
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'


def vqa_normalise(text: str) -> str:
    """Normalise an answer as the VQA evaluation does: punctuation, number words, articles, contractions."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    out = text = text.replace("\n", " ").replace("\t", " ").strip()
    for mark in _PUNCTUATION:
        out = out.replace(mark, "" if mark + " " in text or " " + mark in text else " ")
    # The original passes a flag in place of the count: re.UNICODE is 32, so later full stops stay.
    out = re.sub(r"\.(?!\d)", "", out, count=32)
    words = [_DIGITS.get(word, word) for word in out.lower().split()]
    return " ".join(_MENDED.get(word, word) for word in words if word not in ("a", "an", "the"))


def vqa_accuracy(text: str, truths: Sequence[str]) -> float:
    """Agreement with ten people, in [0, 1]: averaged over each nine of them, where three agreeing give full marks."""
    said = vqa_normalise(text)
    same = [vqa_normalise(truth) == said for truth in truths]
    total = sum(same)
    return sum(min(1.0, (total - own) / 3) for own in same) / len(same) if total else 0.0


def vqa(items: Sequence[Item], texts: Sequence[str]) -> Scores:
    """Mean agreement with ten people: VQAv2 and TextVQA."""
    right = [vqa_accuracy(text, item.truth) for item, text in zip(items, texts, strict=True)]
    return Scores({"accuracy": _percent(right)})


FAILED = "FAILED"


def science_letter(text: str) -> str:
    """Read an answer to ScienceQA: "B", "B. words", or one "The answer is B" and any character; else FAILED."""
    if text in tuple("ABCDE"):
        return text
    if text[:1] in tuple("ABCDE") and text[1:3] == ". ":
        return text[0]
    found = re.findall(r"The answer is ([A-Z]).", text)
    return found[0] if len(found) == 1 else FAILED


def sqa(items: Sequence[Item], texts: Sequence[str]) -> Scores:
    """Accuracy on the questions with an image."""
    return Scores({"accuracy": _percent(science_letter(t) == i.truth for i, t in zip(items, texts, strict=True))})


def option_letter(text: str) -> str:
    """Return the option letter that an answer starts with ("b", "(b) …", "B. …", "B: …") as a capital; else ""."""
    found = re.match(r"\s*(?:\(([A-Ja-j])\)|([A-Ja-j])(?=[.):,]|\s*$))", text)
    return (found[1] or found[2]).upper() if found else ""


def mmvp_pair(item: Item) -> Any:
    """Return the key that the two questions of a pair of MMVP share: items 1 and 2, 3 and 4, …"""
    return (int(item.id) - 1) // 2


def mmvp(items: Sequence[Item], texts: Sequence[str]) -> Scores:
    """Share of the pairs with both right; `single` counts questions.

    Differs from MMVP, which asks GPT-4 whether an answer is right: the prompt asks for the letter, and it is read.
    """
    right = [option_letter(text) == item.truth for item, text in zip(items, texts, strict=True)]
    pairs = [all(right[place] for place in places) for places in _whole(items, mmvp_pair)]
    return Scores({**({"pairs": _percent(pairs)} if pairs else {}), "single": _percent(right)})


def seed(items: Sequence[Item], texts: Sequence[str]) -> Scores:
    """Share of answers that are exactly the right letter, over all and by type of question."""
    right = [text == item.truth for item, text in zip(items, texts, strict=True)]
    return Scores({"accuracy": _percent(right)}, _by_category(items, right))


def plain_option(text: str, choices: Sequence[str]) -> str:
    """Read an answer to MMBench as LLaVA's eval_mmbench.py does, but return "" where that asks ChatGPT.

    It is the letter, "The answer is B.", or words of exactly one option.
    """
    letters = LETTERS[: len(choices)]
    bare = text.strip(".").strip().upper()
    if bare and bare in tuple(letters):
        return bare
    said = [letter for letter in letters if f"the answer is {letter}.".lower() in text.lower()]
    if said:
        return said[0]
    alike = [letter for letter, words in zip(letters, choices, strict=True) if text.lower() in words.lower()]
    return alike[0] if len(alike) == 1 else ""


def mmbench_question(item: Item) -> Any:
    """Return the key that rotations of a question of MMBench share: their ids differ by a multiple of a million."""
    return int(item.id) % 1_000_000


def mmbench(items: Sequence[Item], texts: Sequence[str]) -> Scores:
    """Share of the questions right in every rotation of their options; `vanilla` counts rows.

    Differs from the server, which asks ChatGPT for the option if an answer is not plain: here such an answer is wrong.
    """
    rows = [plain_option(text, item.choices) == item.truth for item, text in zip(items, texts, strict=True)]
    whole = _whole(items, mmbench_question)
    right = [all(rows[place] for place in places) for places in whole]
    metrics = {**({"circular": _percent(right)} if whole else {}), "vanilla": _percent(rows)}
    return Scores(metrics, _by_category([items[places[0]] for places in whole], right))


def mmmu_choice(text: str, choices: Sequence[str], rng: random.Random) -> str:
    """Read an answer to a multiple-choice question of MMMU.

    It is "(B)", else a free-standing "B", else, in more than five words, an option's own words; of several matches the
    last; without any, a random option.
    """
    letters = LETTERS[: len(choices)]
    for mark in ",.!?;:'":
        text = text.strip(mark)
    text = f" {text} "
    lower = text.lower()
    places = {letter: text.rfind(f"({letter})") for letter in letters}
    if max(places.values()) < 0:
        places = {letter: text.rfind(f" {letter} ") for letter in letters}
    if max(places.values()) < 0 and len(text.split()) > 5:
        places = {letter: lower.rfind(words.lower()) for letter, words in zip(letters, choices, strict=True)}
    if max(places.values()) < 0:
        return rng.choice(letters)
    return max(letters, key=lambda letter: places[letter])


_INDICATORS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_NUMBERS = (
    r"-?\b\d{1,3}(?:,\d{3})+\b",  # with commas
    r"-?\d+(?:\.\d+)?[eE][+-]?\d+",
    r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])",
)


def _plain(text: str) -> list[str | float]:
    """Return a number to two places, else lower case; a single character gets a space, so that it matches as a word."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def _conclusion(line: str, indicators: Sequence[str]) -> str:
    """Return the shortest tail of a line that follows one of the indicators."""
    shortest = ""
    for indicator in indicators:
        if indicator in line:
            tail = line.split(indicator)[-1].strip()
            shortest = tail if not shortest or len(tail) < len(shortest) else shortest
    return "" if shortest in tuple(":,.!?;'") else shortest


def mmmu_open(text: str, truth: str | Sequence[str]) -> bool:
    """Judge an answer to an open question of MMMU: one of its conclusions, or of their numbers, must be a true answer.

    A word is right if a conclusion contains it, a number if the two are equal to two places.
    """
    response = text.strip().strip(".").lower()
    lines = response.split("\n")
    tails = [_conclusion(line, _INDICATORS) for line in lines[:-1]] + [_conclusion(lines[-1], (*_INDICATORS, "="))]
    found = [tail for tail in tails if tail] or [response]
    found += [number for tail in list(found) for pattern in _NUMBERS for number in re.findall(pattern, tail)]
    truths = [plain for one in ([truth] if isinstance(truth, str) else truth) for plain in _plain(one)]
    for said in (plain for one in found for plain in _plain(one)):
        if isinstance(said, str) and any(isinstance(true, str) and true in said for true in truths):
            return True
        if isinstance(said, float) and said in truths:
            return True
    return False


def mmmu_answers(items: Sequence[Item], texts: Sequence[str]) -> list[str]:
    """Return letters for multiple-choice questions and texts for open ones: what MMMU's server takes.

    Answers without a letter get a random one, drawn in the order of the questions.
    """
    rng = random.Random(42)
    pairs = zip(items, texts, strict=True)
    return [mmmu_choice(text, item.choices, rng) if item.choices else text for item, text in pairs]


def mmmu(items: Sequence[Item], texts: Sequence[str]) -> Scores:
    """Accuracy over all questions, and by subject."""
    right = [
        answer == item.truth if item.choices else mmmu_open(answer, item.truth)
        for item, answer in zip(items, mmmu_answers(items, texts), strict=True)
    ]
    return Scores({"accuracy": _percent(right)}, _by_category(items, right))


def plain_words(text: str) -> str:
    """Lower-case, with spaces for underscores, single spaces, and no final full stop."""
    return " ".join(text.lower().replace("_", " ").split()).removesuffix(".").rstrip()


def daquar(items: Sequence[Item], texts: Sequence[str]) -> Scores:
    """Exact match of normalised answers, and the best that one constant answer could do on the same questions."""
    truths = [plain_words(item.truth) for item in items]
    right = [plain_words(text) == truth for text, truth in zip(texts, truths, strict=True)]
    majority = Counter(truths).most_common(1)[0][1] if truths else 0
    return Scores({"accuracy": _percent(right), "majority": 100 * majority / max(1, len(truths))})
