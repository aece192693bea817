"""Rules that reshape instruction records, whole rounds at a time: merge, check, segment, cut to a length.

A round is a question with its answer; what comes before the first question (a system turn) belongs to the first round.
Records that no rule touches are returned as the same objects. Source: LLaVA-1.5 (arXiv:2310.03744, appendix A.2):
questions of one image merged into one conversation, long dialogues cut into segments, long texts truncated.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from itertools import accumulate
from typing import Any

from pipelines.record_forms import HUMAN, MODEL, Turns
from pipelines.records import IMAGE_MARK

Record = dict[str, Any]


def merge_by_image(records: Iterable[tuple[Record, Any]]) -> Iterator[tuple[Record, Any]]:
    """Join the records of one image into one conversation, at the place of the first, with its id and fields.

    records: (record, picture, or tuple of several); text-only ones (None) pass. Holds all records in memory.
    """
    groups: dict[Any, list[Record]] = {}
    for number, (record, picture) in enumerate(records):
        groups.setdefault((picture,) if picture is not None else number, []).append(record)
    for key, group in groups.items():
        picture = key[0] if isinstance(key, tuple) else None
        if len(group) == 1:
            yield group[0], picture
            continue
        turns: Turns = []
        for record in group:
            turns += record["conversations"] if not turns else [_without_mark(turn) for turn in record["conversations"]]
        yield {**group[0], "conversations": turns}, picture


def _without_mark(turn: Mapping[str, Any]) -> dict[str, Any]:
    shows = turn["from"] in HUMAN and IMAGE_MARK in turn["value"]  # in an answer the mark is text
    return {**turn, "value": turn["value"].replace(IMAGE_MARK, "").strip("\n")} if shows else dict(turn)


def invalid(record: Record, images: int) -> str:
    """Name what makes a conversation unfit to train on, or nothing: turns must alternate and be filled."""
    turns = record["conversations"]
    body = turns[1:] if turns[0]["from"] == "system" else turns
    if (
        not body
        or len(body) % 2
        or any(turn["from"] not in (HUMAN, MODEL)[place % 2] for place, turn in enumerate(body))
    ):
        return "turns do not alternate"
    if any(not turn["value"].replace(IMAGE_MARK, "").strip() for turn in body):
        return "an empty turn"
    marks = _marks(turns)
    if marks != images:
        return f"{marks} image marks for {int(images)} images"
    return ""


def rounds(turns: Sequence[dict[str, Any]]) -> list[Turns]:
    """Group turns into rounds: a new one begins with each question that follows an answer.

    An unanswered question at the end belongs to the round before: by itself it would be a record without an answer,
    which no reader accepts. For the same reason an answer without text ends no round.
    """
    found: list[Turns] = []
    answered = True
    for turn in turns:
        asks = turn["from"] not in MODEL
        if not found or (asks and answered):
            found.append([])
            answered = False
        found[-1].append(turn)
        answered = answered or (not asks and bool(turn["value"].strip()))
    if not answered and len(found) > 1:
        last = found.pop()
        found[-1] += last
    return found


def segment(record: Record, max_rounds: int) -> list[Record]:
    """Cut a record into records of at most `max_rounds` rounds."""
    all_rounds = rounds(record["conversations"])
    if len(all_rounds) <= max_rounds:
        return [record]
    parts = [all_rounds[start : start + max_rounds] for start in range(0, len(all_rounds), max_rounds)]
    return _as_records(record, parts, all_rounds)


def instruct_once(record: Record) -> tuple[Record, int]:
    """Keep the last line of a conversation's questions only in the first one, if all of them end in the same line.

    Such a line says how to answer ("Answer the question using a single word or phrase."). If a question consists of
    that line alone, the record stays as it is.  Returns the record, and how many questions lost the line.
    """
    turns = record["conversations"]
    asked = [place for place, turn in enumerate(turns) if turn["from"] in HUMAN]
    endings = {turns[place]["value"].rpartition("\n")[1:] for place in asked}
    line = "".join(next(iter(endings), ""))
    if len(asked) < 2 or len(endings) > 1 or not line.startswith("\n") or line.isspace() or IMAGE_MARK in line:
        return record, 0
    short = list(turns)
    for place in asked[1:]:
        short[place] = {**turns[place], "value": turns[place]["value"].removesuffix(line)}
    return {**record, "conversations": short}, len(asked) - 1


def fit(
    record: Record, max_tokens: int, overflow: str, count: Callable[[str], int], image_tokens: int = 0
) -> list[Record]:
    """Bring a record to at most `max_tokens`, in whole rounds, with the images that it shows.

    overflow: truncate keeps the leading rounds that fit; split makes further records of the rest; drop keeps nothing. A
    round that is too long by itself is left out. image_tokens: how many an image counts as; its mark counts as none.
    Returns the records, none if nothing fits.
    """
    all_rounds = rounds(record["conversations"])
    text = [sum(count(turn["value"].replace(IMAGE_MARK, "")) for turn in each) for each in all_rounds]
    texts, marks = ([0, *accumulate(each)] for each in (text, map(_marks, all_rounds)))

    @cache
    def lines(number: int, again: int) -> int:
        """Count the line ends that `_as_records` adds to a round's question with the marks it puts before it."""
        asked = (turn["value"].replace(IMAGE_MARK, "") for turn in all_rounds[number] if turn["from"] in HUMAN)
        return next((count("\n" * again + text) - count(text) for text in asked), 0) if again else 0

    def size(first: int, end: int) -> int:
        """Count the tokens of some rounds as one record, as `_as_records` would write it."""
        own = marks[end] - marks[first]
        again = marks[first] if isinstance(record.get("image"), list) else 0 if own else min(1, marks[-1])
        return texts[end] - texts[first] + image_tokens * (own + again) + lines(first, again)

    if size(0, len(all_rounds)) <= max_tokens:
        return [record]
    parts: list[list[Turns]] = []
    begun: int | None = None  # the round with which the last part begins, while rounds may be added to it
    for number, each in enumerate(all_rounds):
        fits = size(number, number + 1) <= max_tokens
        if not fits:
            begun = None  # what follows a gap begins a record of its own
        elif begun is not None and size(begun, number + 1) <= max_tokens:
            parts[-1].append(each)
        else:
            parts.append([each])
            begun = number
        if overflow == "truncate" and (not fits or len(parts) > 1):
            break
    if overflow == "drop":
        return []
    return _as_records(record, parts[:1] if overflow == "truncate" else parts, all_rounds)


def _as_records(record: Record, parts: Sequence[Sequence[Turns]], all_rounds: Sequence[Turns]) -> list[Record]:
    """Make records of parts; those after the first get an id of their own.

    A part without marks of its own shows the image if the record has one. If there are several (`image` is a list),
    each part shows those of its own marks, preceded by those of all earlier rounds, even of rounds that are left out.
    """
    seen = _marks(record["conversations"]) > 0  # in an answer the mark is text
    several: list[Any] | None = record["image"] if isinstance(record.get("image"), list) else None
    made, before, shown = [], {}, 0
    for each in all_rounds:
        before[id(each)] = shown
        shown += _marks(each)
    for number, part in enumerate(parts):
        turns = [turn for each in part for turn in each]
        marks, shown = _marks(turns), before[id(part[0])]
        lead = shown if several is not None else int(seen and not marks)
        first = next((place for place, turn in enumerate(turns) if turn["from"] in HUMAN), None)
        if lead and first is not None:
            turns[first] = {**turns[first], "value": f"{IMAGE_MARK}\n" * lead + turns[first]["value"]}
        names = {"id": f"{record['id']}_{number}"} if number and "id" in record else {}
        images = {} if several is None else {"image": several[: shown + marks if first is not None else 0]}
        made.append({**record, **names, **images, "conversations": turns})
    return made


def _marks(turns: Turns) -> int:
    return sum(turn["value"].count(IMAGE_MARK) for turn in turns if turn["from"] in HUMAN)
