"""Answer held-out questions and compare the answers with the true ones.

Input: LLaVA records (JSON with an image folder, or shards); each answer turn is a true answer, asked for with all turns
before it. Output: one JSON line per question, and accuracies. Two rules: exact match after lower-casing and trimming;
and, for records with `task` "caption" and a `concept` word, the first word of the answer that is any record's concept
must be this record's (a caption may say more than its concept, but only the concept is judged).
In addition to accuracy come, unless switched off, the perplexity of the true answers, each token given those before it;
and, if asked for, the rank of a picture's own text among several (ranking.py).

    OUT.jsonl           the answers            OUT.manifest.json   the request and the result, written last

Answers of a killed process are kept, one line per batch, in `.OUT.jsonl.unfinished` (progress.py), and reused.

`pictures` in a line, digests of their bytes, shows which questions are about the same photograph: these are not
independent observations.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import logging
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines import memory
from train.config import Eval
from train.data.prompts import Rejected, Turn, parse
from train.data.sources import Source, decode_image, losses, open_source
from train.dist import Runtime
from train.errors import UsageError
from train.eval.generate import Speaker, load_speaker
from train.eval.progress import Kept, Pace, keeping
from train.eval.ranking import check_candidates, pairs_of, rank, summary
from train.folder import (
    FORMAT,
    digest_data,
    digest_weights,
    read_json,
    refuse_other,
    refuse_unexported,
    same_request,
    whole_file,
    write_json,
)

DEFAULTS = Eval()
log = logging.getLogger("train")


@dataclass(frozen=True)
class Question:
    """One answer turn to be produced."""

    key: str
    task: str
    concept: str
    turns: tuple[Turn, ...]
    images: tuple[Any, ...]  # locations
    truth: str
    pictures: tuple[str, ...] = ()  # digests of their bytes


def normalise(text: str) -> str:
    """Lower-case, trim, and drop a final full stop."""
    return text.strip().lower().removesuffix(".").strip()


def concept_of(answer: str, concepts: set[str]) -> str:
    """Return the first word of an answer that is one of the concepts, or an empty string."""
    return next((word for word in re.findall(r"\w+", answer.lower()) if word in concepts), "")


@memory.kept()
def evaluate(
    folder: Path,
    data: str,
    out: Path,
    *,
    images: str | None = None,
    options: Eval = DEFAULTS,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write one answer per line to `out`; return accuracies, overall and by task, and what was skipped.

    Existing answers for the same model, data and options are reused, also those of a killed process.
    Raises: UsageError if `out` holds other answers.
    """
    options = dataclasses.replace(options, max_new_tokens=options.max_new_tokens or 64)
    limit, max_new_tokens = options.limit, options.max_new_tokens
    source = open_source(data, images, digest=True)
    refuse_unexported(folder)
    request: dict[str, Any] = {"command": "eval", "weights": digest_weights(folder), "data": digest_data(data)}
    request |= {"images": source.images_digest, "max_new_tokens": max_new_tokens, "limit": limit}
    request["batch_size"] = options.batch_size  # in bf16 the other questions of a batch change the rounding
    request |= {"perplexity": "to the end token" if options.perplexity else False}
    request |= {"candidates": options.candidates, "ranked": "in groups, each"} if options.candidates else {}
    record = out.with_name(f"{out.stem}.manifest.json")
    if out.is_dir():
        raise UsageError(f"--out {out} is a folder; give a file for the answers, such as {out / 'answers.jsonl'}")
    if out.exists() and not overwrite and (found := _standing(out, record, request)) is not None:
        log.info("%s exists already; nothing to do (--overwrite answers again)", out)
        return {**found, "answers": str(out)}
    questions, skipped = collect(source, limit)
    left_out = losses(source, skipped)
    if not questions:
        told = f": {'; '.join(left_out)}" if left_out else ""
        raise UsageError(f"--data {data}: no question with an answer can be used{told}")
    if options.candidates:
        check_candidates(options.candidates, len({q.pictures[0] for q in questions if len(q.images) == 1}))
    runtime = Runtime.for_inference()  # under torchrun each rank answers its share of the batches
    out.parent.mkdir(parents=True, exist_ok=True)
    speak = functools.cache(lambda: load_speaker(folder, runtime.device))
    alone = runtime.rank == 0
    with keeping(out, request, overwrite=overwrite) if alone else contextlib.nullcontext(Kept()) as kept:
        rows = _answer_all(runtime, speak, source, questions, kept, options)
        result = {**summarise(rows), "skipped": len(skipped), "left_out": left_out}
        if not alone:
            return {**result, "answers": str(out)}
        if options.candidates:
            pairs = pairs_of(source, questions)
            ranks = rank(speak, [pair for _, pair in pairs], options.candidates, kept)
            for (place, _), found in zip(pairs, ranks, strict=True):
                rows[place] |= found
            result |= summary(ranks)
        record.unlink(missing_ok=True)
        with whole_file(out) as file:
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            file.writelines(line.encode("utf-8", "backslashreplace") for line in lines)
        write_json(record, {"format": FORMAT, "request": request, "result": result})
    return {**result, "answers": str(out)}


def _standing(out: Path, record: Path, request: dict[str, Any]) -> dict[str, Any] | None:
    """Return the recorded result if the answers are those of this request, or None if they may be replaced.

    Answers to fewer of the same questions may.  Raises: UsageError for any others.
    """
    if not record.is_file():
        raise UsageError(f"--out {out} exists and was not written by eval; give another, or type --overwrite")
    manifest = read_json(record)
    there = manifest.get("request", {})
    if same_request(there, request):
        return dict(manifest["result"])
    fewer = 0 < (there.get("limit") or 0) < (request["limit"] or math.inf)
    if not (fewer and same_request({**there, "limit": request["limit"]}, request)):
        refuse_other(there, request, out)
    return None


def _answer_all(
    runtime: Runtime,
    speak: Callable[[], Speaker],
    source: Source,
    questions: Sequence[Question],
    kept: Kept,
    options: Eval,
) -> list[dict[str, Any]]:
    """Answer all questions, batch by batch; kept answers are not asked for again.  Returns one row each, in every rank.

    Each rank answers one batch at a time, and all ranks get all the answers.
    """
    concepts = {q.concept for q in questions if q.concept}
    parts = {f"answers {n}": batch for n, batch in enumerate(batches(questions, options.batch_size))}
    kept.parts |= runtime.broadcast(kept.parts)
    missing = [name for name in parts if name not in kept.parts]
    pace = Pace("answers", sum(len(parts[name]) for name in missing))
    if known := len(questions) - pace.total:
        log.info("resuming after %s of %s answers", f"{known:,}", f"{len(questions):,}")

    def answer(name: str) -> tuple[str, list[dict[str, Any]]]:
        asked = [questions[place] for place in parts[name]]
        return name, _answer(speak(), source, asked, concepts, options.max_new_tokens, options.perplexity)

    for at in range(0, len(missing), runtime.world):
        own = missing[at : at + runtime.world][runtime.rank : runtime.rank + 1]
        for name, found in (each for part in runtime.gather([answer(name) for name in own]) for each in part):
            kept.add(name, found)
            pace.add(len(found))
    rows = {place: row for name, batch in parts.items() for place, row in zip(batch, kept.parts[name], strict=True)}
    return [rows[place] for place in range(len(questions))]


def collect(source: Source, limit: int = 0) -> tuple[list[Question], dict[int, str]]:
    """Gather the questions of a source in order, and the reason for each sample that cannot be used."""
    questions: list[Question] = []
    skipped: dict[int, str] = {}
    pace = Pace("reading the samples", len(source), at_end=False)
    for index in range(len(source)):
        pace.add(1)
        if limit and len(questions) >= limit:
            break
        try:
            record = source.record(index)
            turns = parse(record.conversations, len(record.images))
            contents = [source.image_bytes(location) for location in record.images]
            for content in contents:
                decode_image(content)
        except Rejected as reason:
            skipped[index] = str(reason)
            continue
        pictures = tuple(hashlib.blake2b(content, digest_size=8).hexdigest() for content in contents)
        task, concept = str(record.fields.get("task") or ""), str(record.fields.get("concept") or "").lower()
        for i, turn in enumerate(turns):
            if turn.role == "assistant":
                before = tuple(turns[:i])
                questions.append(Question(record.key, task, concept, before, record.images, turn.text, pictures))
    return questions[:limit] if limit else questions, skipped


def batches(questions: Sequence[Question], size: int) -> Iterator[Sequence[int]]:
    """Split questions into batches of indices; those with pictures and those without do not share one.

    Questions with pictures stay in order, since repeated pictures in a batch are encoded once. Text questions go by
    length, the longest first, and none shares a batch with one more than twice as long, as padding is computed, too.
    """
    pictures = [place for place, question in enumerate(questions) if question.images]
    yield from (pictures[start : start + size] for start in range(0, len(pictures), size))
    lengths = {place: _length(question) for place, question in enumerate(questions) if not question.images}
    batch: list[int] = []
    for place in sorted(lengths, key=lambda place: -lengths[place]):
        if batch and (len(batch) == size or 2 * lengths[place] < lengths[batch[0]]):
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch


def _length(question: Question) -> int:
    return len(question.truth) + sum(len(part or "") for turn in question.turns for part in turn.parts)


def _answer(
    speaker: Speaker,
    source: Source,
    questions: Sequence[Question],
    concepts: set[str],
    max_new_tokens: int,
    perplexity: bool,
) -> list[dict[str, Any]]:
    images = []
    for question in questions:
        shown = sum(turn.num_images for turn in question.turns)
        images.append([decode_image(source.image_bytes(location)) for location in question.images[:shown]])
    turns = [q.turns for q in questions]
    answers = speaker.answers(turns, images, max_new_tokens)
    losses = speaker.truth_losses(turns, images, [q.truth for q in questions]) if perplexity else []
    rows = []
    for question, answer, told in itertools.zip_longest(questions, answers, losses):
        if question.task == "caption" and question.concept:
            right = concept_of(answer, concepts) == question.concept
        else:
            right = normalise(answer) == normalise(question.truth)
        asked = question.turns[-1].text
        row = {"key": question.key, "task": question.task, "question": asked, "answer": answer}
        row |= {"concept": question.concept} if question.concept else {}
        row |= {"pictures": question.pictures} if question.pictures else {}
        rows.append({**row, "truth": question.truth, "right": right})
        if told is not None:
            rows[-1] |= {"truth_loss": round(told[0], 5), "tokens": told[1]}
    return rows


def summarise(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return counts, accuracies and perplexities (if there are any), overall and by task."""
    tasks: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        tasks[row["task"]].append(row)
    by_task = {task or "(none)": _score(own) for task, own in sorted(tasks.items())}
    return {**_score(rows), "tasks": by_task}


def _score(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    found = {"questions": len(rows), "accuracy": round(sum(row["right"] for row in rows) / len(rows), 4)}
    if "truth_loss" in rows[0]:
        mean_loss = sum(row["truth_loss"] for row in rows) / max(1, sum(row["tokens"] for row in rows))
        found["perplexity"] = round(math.exp(min(mean_loss, 100.0)), 4)
    return found
