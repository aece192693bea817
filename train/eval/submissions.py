"""Files for benchmarks that only a server can score: EvalAI's lists, MM-Vet's object, MMBench's sheet."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from train.eval import scoring
from train.eval.layout import Layout, read_mmbench
from train.eval.scoring import Item
from train.eval.xlsx import write_xlsx


def submit_vqav2(layout: Layout, items: Sequence[Item], texts: Sequence[str], stem: Path) -> Path:
    """Write the list that EvalAI takes: an answer for each question of test2015, empty where it was not asked."""
    said = {item.id: scoring.vqa_normalise(text) for item, text in zip(items, texts, strict=True)}
    every = layout.lines("vqav2/llava_vqav2_mscoco_test2015.jsonl", "vqav2/bunny_vqav2_mscoco_test2015.jsonl")
    rows = [{"question_id": q["question_id"], "answer": said.get(q["question_id"], "")} for q in every]
    return _write(stem, rows)


def submit_mmvet(layout: Layout, items: Sequence[Item], texts: Sequence[str], stem: Path) -> Path:
    """Write the object that MM-Vet's evaluator takes."""
    return _write(stem, {f"v1_{item.id}": text for item, text in zip(items, texts, strict=True)})


def submit_mmmu(layout: Layout, items: Sequence[Item], texts: Sequence[str], stem: Path) -> Path:
    """Write the object that EvalAI takes: a letter, or an open answer, by question."""
    answers = scoring.mmmu_answers(items, texts)
    return _write(stem, {str(item.id): answer for item, answer in zip(items, answers, strict=True)})


def submit_mmbench(layout: Layout, items: Sequence[Item], texts: Sequence[str], stem: Path, *names: str) -> Path:
    """Write the Excel sheet that MMBench's server takes: the TSV without hint and image, and a prediction."""
    said = {str(item.id): text for item, text in zip(items, texts, strict=True)}
    dropped = ("hint", "category", "source", "image", "comment", "l2-category")
    table: list[list[str]] = []
    for row in read_mmbench(layout.find(*names)):
        columns = [name for name in row if name not in dropped]
        if not table:
            table.append([*columns[:6], "prediction", *columns[6:]])
        cells = [row[name] for name in columns]
        table.append([*cells[:6], said.get(row["index"], ""), *cells[6:]])
    return write_xlsx(stem.with_suffix(".xlsx"), table)


def _write(stem: Path, value: Any) -> Path:
    path = stem.with_suffix(".json")
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1), encoding="utf-8", errors="backslashreplace")
    return path
