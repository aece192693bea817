"""Answer held-out questions and set the answers beside the truth.

Input: LLaVA records (JSON with an image folder, or shards); each answer turn is a truth, asked with all turns before
it. Output: one JSON line a question, and accuracies. Two rules: exact match after lower-casing and trimming; and for
records with `task` "caption" and a `concept` word, that the first word of the answer which is any record's concept is
this record's (source of the rule: a caption may say more than its concept, and only the concept is judged).
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.data import Source, decode_image, open_source
from train.errors import UsageError
from train.generate import Speaker, load_speaker
from train.prompts import Rejected, Turn, parse


@dataclass(frozen=True)
class Question:
    """One answer turn to be produced."""

    key: str
    task: str
    concept: str
    turns: tuple[Turn, ...]
    images: tuple[Any, ...]  # locations
    truth: str


def normalise(text: str) -> str:
    """Lower-case, trim, and drop a final full stop."""
    return text.strip().lower().removesuffix(".").strip()


def concept_of(answer: str, concepts: set[str]) -> str:
    """Return the first word of an answer that is one of the concepts, or an empty string."""
    return next((word for word in re.findall(r"\w+", answer.lower()) if word in concepts), "")


def evaluate(
    folder: Path,
    data: str,
    out: Path,
    *,
    images: str | None = None,
    batch_size: int = 16,
    max_new_tokens: int = 64,
    limit: int = 0,
) -> dict[str, Any]:
    """Write an answer a line to `out`; return accuracies, overall and by task, and what was skipped."""
    source = open_source(data, images)
    questions, skipped = collect(source, limit)
    if not questions:
        raise UsageError(f"--data {data}: no question with an answer in it")
    speaker = load_speaker(folder)
    concepts = {q.concept for q in questions if q.concept}
    rows: list[dict[str, Any]] = []
    for start in range(0, len(questions), batch_size):
        rows += _answer(speaker, source, questions[start : start + batch_size], concepts, max_new_tokens)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return {**summarise(rows), "skipped": skipped, "answers": str(out)}


def collect(source: Source, limit: int = 0) -> tuple[list[Question], int]:
    """Gather the questions of a source in order, and count the samples that cannot be used."""
    questions: list[Question] = []
    skipped = 0
    for index in range(len(source)):
        if limit and len(questions) >= limit:
            break
        try:
            record = source.record(index)
            turns = parse(record.conversations, len(record.images))
            for location in record.images:
                decode_image(source.image_bytes(location))
        except Rejected:
            skipped += 1
            continue
        task, concept = str(record.fields.get("task") or ""), str(record.fields.get("concept") or "").lower()
        for i, turn in enumerate(turns):
            if turn.role == "assistant":
                before = tuple(turns[:i])
                questions.append(Question(record.key, task, concept, before, record.images, turn.text))
    return questions[:limit] if limit else questions, skipped


def _answer(
    speaker: Speaker, source: Source, questions: Sequence[Question], concepts: set[str], max_new_tokens: int
) -> list[dict[str, Any]]:
    images = []
    for question in questions:
        shown = sum(turn.num_images for turn in question.turns)
        images.append([decode_image(source.image_bytes(location)) for location in question.images[:shown]])
    answers = speaker.answers([q.turns for q in questions], images, max_new_tokens)
    rows = []
    for question, answer in zip(questions, answers, strict=True):
        if question.task == "caption" and question.concept:
            right = concept_of(answer, concepts) == question.concept
        else:
            right = normalise(answer) == normalise(question.truth)
        asked = question.turns[-1].text
        row = {"key": question.key, "task": question.task, "question": asked, "answer": answer}
        rows.append({**row, "truth": question.truth, "right": right})
    return rows


def summarise(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return counts and accuracies, overall and by task."""
    tasks: dict[str, list[bool]] = defaultdict(list)
    for row in rows:
        tasks[row["task"]].append(row["right"])
    by_task = {
        task or "(none)": {"questions": len(right), "accuracy": round(sum(right) / len(right), 4)}
        for task, right in sorted(tasks.items())
    }
    right = [row["right"] for row in rows]
    return {"questions": len(rows), "accuracy": round(sum(right) / len(rows), 4), "tasks": by_task}
