"""Ask a model the questions of benchmarks, keep the answers, score them, and compare the scores with published ones.

    OUT/TASK/answers.jsonl      one line per answer, in LLaVA's form (question_id, prompt, text, answer_id, model_id)
    OUT/TASK/submission.json    or .xlsx: what the task's server takes, if it has one
    OUT/TASK/manifest.json      the request and the scores, written last

Answers are appended batch by batch, each batch one synced write of whole lines; a partial last line left by a kill is
cut off when the file is opened again, and answered questions are not asked again. Decoding is greedy.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines import memory
from train.config import Eval
from train.data.prompts import Rejected, Turn
from train.data.sources import decode_image
from train.dist import Runtime
from train.errors import DataError, UsageError
from train.eval.layout import Layout
from train.eval.progress import Pace, append_lines, read_lines
from train.eval.scoring import Item
from train.eval.tasks import TASKS, get_task, image_bytes, load
from train.folder import digest_weights, finish, held, open_run, refuse_unexported, relative

if TYPE_CHECKING:
    from train.eval.generate import Speaker

log = logging.getLogger("train")
ANSWERS, SUBMISSION = "answers.jsonl", "submission"


@memory.kept()
def run_tasks(
    folder: Path, names: Sequence[str], root: Path, out: Path, options: Eval, *, overwrite: bool = False
) -> dict[str, Any]:
    """Answer and score tasks by name, each in its folder under `out`; return the result of `score_texts` by task.

    All questions and images are looked up before the model is loaded.  Raises: UsageError, DataError.
    """
    from train.eval.generate import load_speaker

    refuse_unexported(folder)
    loaded = {name: load(name, root)[: options.limit or None] for name in names}
    for name, items in loaded.items():
        _check_images(name, items)
    runtime = Runtime.for_inference()
    speak = functools.cache(lambda: load_speaker(folder, runtime.device))
    weights = digest_weights(folder)
    results = {}
    for name, items in loaded.items():
        place = out / name
        tokens = options.max_new_tokens or get_task(name).max_new_tokens
        model = relative(str(folder), place)
        request = {"command": "eval", "task": name, "model": model, "weights": weights, "max_new_tokens": tokens}
        request["batch_size"] = options.batch_size  # in bf16 the other questions of a batch change the rounding
        with held(place) if runtime.rank == 0 else contextlib.nullcontext():
            rows = []
            if runtime.rank == 0:
                open_run(place, request, overwrite=overwrite)
                rows = read_answers(place / ANSWERS, mend=True)
            missing = [text is None for text in match(items, runtime.broadcast(rows))]
            bad: dict[int, str] = {}
            for batch, unusable in _ask(runtime, speak, items, missing, options.batch_size, tokens, name):
                bad |= unusable
                if runtime.rank == 0:
                    append_lines(place / ANSWERS, [{**row, "model_id": folder.resolve().name} for row in batch])
                    rows += batch
            left_out = _told(name, items, bad)
            if runtime.rank > 0:
                continue
            results[name] = score_texts(name, items, match(items, rows), root, place / SUBMISSION)
            results[name]["left_out"] += left_out
            finish(place, request, {k: v for k, v in results[name].items() if k != "submission"})
        results[name]["answers"] = str(place / ANSWERS)
    return results


def score_file(name: str, answers: Path, root: Path, out: Path | None, partial: bool = False) -> dict[str, Any]:
    """Score an answers file, ours or LLaVA's, without a model; `out` is the path of a submission, without its suffix.

    Raises: UsageError if questions have no answer and `partial` is not given.
    """
    if not answers.is_file():
        raise UsageError(f"--answers {answers}: no such file")
    if get_task(name).score is None and out is None:
        raise UsageError(f"{name} is scored by its server; name a file for the submission, for example --out {name}")
    items = load(name, root)
    found = match(items, read_answers(answers), by_id=True)
    pairs = [(item, text) for item, text in zip(items, found, strict=True) if text is not None]
    if not pairs or (len(pairs) < len(items) and not partial):
        hint = "type --partial to score those it has" if pairs else f"is it an answers file of {name}?"
        raise UsageError(f"{answers} answers {len(pairs):,} of the {len(items):,} questions of {name}; {hint}")
    return score_texts(name, [item for item, _ in pairs], [text for _, text in pairs], root, out)


def score_texts(
    name: str, items: Sequence[Item], texts: Sequence[str | None], root: Path, stem: Path | None
) -> dict[str, Any]:
    """Score texts by a task's rule and write what its server takes; return questions, scores, categories, `left_out`.

    A question without a text (None) is not scored; its server gets an empty one.
    """
    task = get_task(name)
    asked = [item for item, text in zip(items, texts, strict=True) if text is not None]
    result: dict[str, Any] = {"questions": len(asked), "scores": {}, "categories": {}, "left_out": []}
    if task.score:
        scores = task.score(asked, [text for text in texts if text is not None])
        assert set(scores.metrics) <= set(task.metrics)
        result["scores"] = {metric: round(value, 4) for metric, value in scores.metrics.items()}
        result["categories"] = {category: round(value, 4) for category, value in scores.categories.items()}
    if task.together is not None and (parted := _parted(task.together, asked)):
        result["left_out"].append(f"{parted:,} × in a group that counts as one, with a question unanswered")
    if task.submit and stem is not None:
        stem.parent.mkdir(parents=True, exist_ok=True)
        result["submission"] = str(task.submit(Layout(root, name), items, [text or "" for text in texts], stem))
    return result


def _parted(together: Callable[[Item], Any], items: Sequence[Item]) -> int:
    """Count the questions whose group (a pair, an image's questions, rotations) is not complete."""
    there = Counter(map(together, items))
    return sum(there[together(item)] < item.of for item in items)


def match(items: Sequence[Item], rows: Sequence[dict[str, Any]], *, by_id: bool = False) -> list[str | None]:
    """Find the answer to each item, the last of several; None if there is none.

    Ids are not unique (MME, TextVQA), so id and prompt must agree; with `by_id` a unique id is enough, for files whose
    prompts are worded differently.
    """
    exact = {(str(row["question_id"]), _bare(row["prompt"])): row["text"] for row in rows}
    single = {}
    if by_id:
        asked, given = Counter(str(item.id) for item in items), Counter(str(row["question_id"]) for row in rows)
        single = {id_: row["text"] for row in rows if given[id_ := str(row["question_id"])] == asked[id_] == 1}
    return [exact.get((str(item.id), _bare(item.prompt)), single.get(str(item.id))) for item in items]


def _bare(prompt: str) -> str:
    return prompt.replace("<image>", "").strip()


def read_answers(path: Path, *, mend: bool = False) -> list[dict[str, Any]]:
    """Read an answers file; `mend` cuts it off at the first incomplete line.  Raises: DataError."""
    expected = "a JSON object with question_id, prompt and text"
    return read_lines(path, _is_answer, expected, mend=mend)


def _is_answer(row: dict[str, Any]) -> bool:
    return "question_id" in row and isinstance(row.get("text"), str) and isinstance(row.get("prompt"), str)


def _ask(
    runtime: Runtime,
    speak: Callable[[], Speaker],
    items: Sequence[Item],
    missing: Sequence[bool],
    size: int,
    tokens: int,
    name: str,
) -> Iterator[tuple[list[dict[str, Any]], dict[int, str]]]:
    """Yield the missing answers, and by item number why others cannot be asked.

    Batches are formed as if no answer existed, so that resuming changes none. Each rank answers one batch at a time,
    and all ranks get all the answers.
    """

    def answer(start: int) -> tuple[list[dict[str, Any]], dict[int, str]]:
        shown: dict[int, list[Any]] = {}
        bad: dict[int, str] = {}
        for number in range(start, min(start + size, len(items))):
            try:
                shown[number] = [] if items[number].image is None else [decode_image(image_bytes(items[number].image))]
            except (OSError, Rejected) as reason:
                if missing[number]:
                    bad[number] = reason.strerror or "unreadable" if isinstance(reason, OSError) else str(reason)
        if not any(missing[number] for number in shown):
            return [], bad
        asked = [items[number] for number in shown]
        turns = [[Turn("user", (*((None,) if item.image is not None else ()), item.prompt))] for item in asked]
        texts = zip(shown, asked, speak().answers(turns, list(shown.values()), tokens), strict=True)
        return [_row(item, text) for number, item, text in texts if missing[number]], bad

    starts = [start for start in range(0, len(items), size) if any(missing[start : start + size])]
    pace = Pace(name, sum(missing))
    for at in range(0, len(starts), runtime.world):
        own = starts[at : at + runtime.world][runtime.rank : runtime.rank + 1]
        for rows, bad in (each for part in runtime.gather([answer(start) for start in own]) for each in part):
            yield rows, bad
            pace.add(len(rows) + len(bad))


def _told(name: str, items: Sequence[Item], bad: Mapping[int, str]) -> list[str]:
    """Say why items were not asked, by reason with an example.  Raises: DataError if none can be."""
    first = {reason: items[number].id for number, reason in sorted(bad.items(), reverse=True)}
    told = [f"{count:,} × {reason} (e.g. question {first[reason]})" for reason, count in Counter(bad.values()).items()]
    if len(bad) == len(items):
        raise DataError(f"{name}: none of the images of its {len(items):,} questions can be used: {'; '.join(told)}")
    return told


def _row(item: Item, text: str) -> dict[str, Any]:
    answer_id = hashlib.blake2b(f"{item.id}\n{item.prompt}".encode(), digest_size=11).hexdigest()
    row = {"question_id": item.id, "prompt": item.prompt, "text": text, "answer_id": answer_id}
    return {**row, "model_id": "", "metadata": {}}


def _check_images(name: str, items: Sequence[Item]) -> None:
    missing = [item.image for item in items if isinstance(item.image, str) and not Path(item.image).is_file()]
    if missing:
        raise UsageError(f"{name}: {len(missing):,} of {len(items):,} images are missing, the first is {missing[0]}")


@dataclasses.dataclass(frozen=True)
class Line:
    """One score and the published one."""

    task: str
    metric: str
    questions: int
    score: float | None  # None: only the task's server can score it, or no group was complete
    published: float | None = None
    within: bool | None = None


def compare(results: dict[str, dict[str, Any]], published: dict[str, float], tolerance: float) -> list[Line]:
    """Compare each score with the published one; within: differs by no more than this share of it."""
    lines = []
    for task, result in results.items():
        for n, metric in enumerate(TASKS[task].metrics or ("",)):
            score = result["scores"].get(metric)
            known = published.get(f"{task}_{metric}", published.get(task) if n == 0 else None)
            within = None if score is None or known is None else abs(score - known) <= tolerance * abs(known)
            lines.append(Line(task, metric, result["questions"], score, known, within))
    return lines


def table(lines: Sequence[Line], tolerance: float) -> str:
    """Format the lines as text; columns on published scores only if there are any."""
    shown = any(line.published is not None for line in lines)
    head = f"{'task':<13} {'metric':<11} {'questions':>9} {'score':>10}"
    out = [head + (f" {'published':>9} {'difference':>10}" if shown else "")]
    for line in lines:
        nothing = "none whole" if TASKS[line.task].score else "by server"
        score = nothing if line.score is None else f"{line.score:.2f}"
        text = f"{line.task:<13} {line.metric:<11} {line.questions:>9,} {score:>10}"
        if line.published is not None:
            text += f" {line.published:>9.2f}"
            if line.score is not None:
                verdict = "within" if line.within else "outside"
                text += f" {line.score - line.published:>+10.2f}  {verdict} {tolerance:.0%}"
        out.append(text)
    return "\n".join(out)
