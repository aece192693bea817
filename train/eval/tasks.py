"""The benchmarks of LLaVA-1.5, Bunny and LLaVA-Gemma: where their files lie, what is asked, how it is judged.

All files are under one folder, as the papers' repositories lay them out (LLaVA's `playground/data/eval`, Bunny's
`eval`; both layouts are found). A task reads its question files into items, with the papers' prompts; a scorer in
`scoring` judges the texts; if only a server can, `submit` writes what it takes. In `eval.published` a task's name means
its first metric, and `task_metric` names any of them.
"""

from __future__ import annotations

import ast
import base64
import csv
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import takewhile
from pathlib import Path
from typing import Any

from train.errors import DataError, TrainError, UsageError, did_you_mean
from train.eval import scoring
from train.eval.layout import Layout, parse_json, read_mmbench
from train.eval.scoring import Item, Scorer
from train.eval.submissions import submit_mmbench, submit_mmmu, submit_mmvet, submit_vqav2

SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
Submit = Callable[["Layout", Sequence[Item], Sequence[str], Path], Path]


@dataclass(frozen=True)
class Task:
    """One benchmark. `score` is None where only a server can tell; `submit` writes what the server takes."""

    load: Callable[[Layout], list[Item]]
    score: Scorer | None = None
    metrics: tuple[str, ...] = ()
    submit: Submit | None = None
    max_new_tokens: int = 128  # as in both papers' loaders
    together: Callable[[Item], Any] | None = None  # key: equal for questions that count as one


def _question(prompt: str) -> str:
    return prompt.split("\n")[0].strip()


def _nothing(_: dict[str, Any]) -> None:
    return None


def _of_ten(answers: list[str]) -> list[str]:
    if not isinstance(answers, list) or [type(answer) for answer in answers] != [str] * 10:
        raise ValueError(f"{answers!r:.80} are not the answers of ten people")
    return answers


def load_pope(layout: Layout) -> list[Item]:
    """Read POPE; labels by image and question from coco/coco_pope_{category}.json."""
    labels = {}
    folder = layout.find("pope/coco")
    for category in ("adversarial", "popular", "random"):
        for row in layout.lines(str((folder / f"coco_pope_{category}.json").relative_to(layout.root))):
            labels[category, row["image"], row["text"]] = row["label"]
    questions = layout.lines("pope/llava_pope_test.jsonl", "pope/bunny_pope_test.jsonl")
    images = layout.root / "pope" / "val2014"
    return layout.ask(questions, images, lambda q: labels[q["category"], q["image"], _question(q["text"])])


def load_mme(layout: Layout) -> list[Item]:
    """Read MME; truths from the text file beside each image, or in questions_answers_YN."""
    path = layout.find("MME/llava_mme.jsonl", "mme/bunny_mme.jsonl", "mme/llava_mme.jsonl")
    place = f"{path.parent.name}/MME_Benchmark_release_version"
    folder = layout.find(f"{place}/MME_Benchmark", place)  # the later archive has one more folder level
    truths = {}
    for file in sorted(folder.rglob("*.txt")):
        for line in file.read_text(encoding="utf-8").split("\n"):
            question, tab, answer = line.strip().rpartition("\t")
            if tab:
                question = question.removesuffix("Please answer yes or no.").strip()
                truths[file.relative_to(folder).parts[0], file.stem, question] = answer

    def truth(line: dict[str, Any]) -> str:
        category, name = line["question_id"].split("/")[0], line["question_id"].split("/")[-1]
        question = line["text"].removesuffix(SHORT).strip().removesuffix("Please answer yes or no.").strip()
        return truths[category, name.split(".")[0], question]

    return layout.ask(layout.lines(str(path.relative_to(layout.root))), folder, truth)


def load_gqa(layout: Layout) -> list[Item]:
    """Read GQA testdev-balanced."""
    name = "testdev_balanced_questions.json"
    truths = layout.json(f"gqa/data/{name}", f"gqa/data/questions1.2/{name}", f"gqa/{name}")
    questions = layout.lines("gqa/llava_gqa_testdev_balanced.jsonl", "gqa/bunny_gqa_testdev_balanced.jsonl")
    images = layout.root / ("gqa/data/images" if (layout.root / "gqa/data/images").is_dir() else "gqa/images")
    return layout.ask(questions, images, lambda q: truths[str(q["question_id"])]["answer"])


def load_vqav2(layout: Layout) -> list[Item]:
    """Read VQAv2 val, whose answers are public: a stand-in for the papers' test-dev."""
    asked = layout.json("vqav2/v2_OpenEnded_mscoco_val2014_questions.json")["questions"]
    notes = layout.json("vqav2/v2_mscoco_val2014_annotations.json")["annotations"]
    truths = {note["question_id"]: _of_ten([answer["answer"] for answer in note["answers"]]) for note in notes}
    lines = [
        {
            "question_id": q["question_id"],
            "text": f"{q['question']}\n{SHORT}",
            "image": f"COCO_val2014_{q['image_id']:012d}.jpg",
        }
        for q in asked
    ]
    return layout.ask(lines, layout.root / "vqav2" / "val2014", lambda q: truths[q["question_id"]])


def load_vqav2_test(layout: Layout) -> list[Item]:
    """Read VQAv2 test-dev; only the server can score it."""
    name = "vqav2_mscoco_test-dev2015.jsonl"
    return layout.ask(
        layout.lines(f"vqav2/llava_{name}", f"vqav2/bunny_{name}"), layout.root / "vqav2" / "test2015", _nothing
    )


def load_textvqa(layout: Layout) -> list[Item]:
    """Read TextVQA val with OCR tokens in the prompt, as LLaVA asks it; truths by image and question."""
    data = layout.json("textvqa/TextVQA_0.5.1_val.json")["data"]
    truths = {(row["image_id"], row["question"].lower().strip()): _of_ten(row["answers"]) for row in data}
    name = "textvqa_val_v051_ocr.jsonl"
    questions = layout.lines(f"textvqa/llava_{name}", f"textvqa/bunny_{name}")

    def truth(line: dict[str, Any]) -> Any:
        rest = [part for part in line["text"].split("\n") if not part.startswith("Reference OCR token:")]
        return truths[line["question_id"], rest[0].lower().strip()]

    return layout.ask(questions, layout.root / "textvqa" / "train_images", truth)


def load_sqa(layout: Layout) -> list[Item]:
    """Read the questions of ScienceQA test that have an image; the truth is the answer turn."""
    rows = layout.json("scienceqa/llava_test_CQM-A.json", "scienceqa/bunny_test_CQM-A.json")
    images = layout.root / (
        "scienceqa/images/test" if (layout.root / "scienceqa/images/test").is_dir() else "scienceqa/test"
    )
    out = []
    for row in rows:
        if row.get("image"):
            asked, answer = (turn["value"] for turn in row["conversations"][:2])
            prompt = f"{asked.replace('<image>', '').strip()}\n{LETTER}"
            truth = scoring.science_letter(answer).replace(scoring.FAILED, "")
            out.append(Item(row["id"], prompt, str(images / row["image"]), truth))
    return out


def load_mmvp(layout: Layout) -> list[Item]:
    """Read MMVP; its options "(a) … (b) …" are asked in the papers' form for choices."""
    out = []
    folder = layout.root / "MMVP" / "MMVP Images"
    with layout.find("MMVP/Questions.csv").open(encoding="utf-8-sig", newline="") as file:
        for n, row in enumerate(csv.DictReader(file), 1):
            options = re.split(r"\s*\(([ab])\)\s*", row["Options"])[1:]
            listed = [f"{letter.upper()}. {words}" for letter, words in zip(options[::2], options[1::2], strict=True)]
            prompt = "\n".join([row["Question"].strip(), *listed, LETTER])
            out.append(Item(n, prompt, str(folder / f"{n}.jpg"), scoring.option_letter(row["Correct Answer"])))
    return out


def load_seed(layout: Layout, image_only: bool = False) -> list[Item]:
    """Read SEED-Bench-1, with the middle frame of videos, or only its questions on images (SEED-IMG)."""
    path = layout.find("seed_bench/llava-seed-bench.jsonl", "seed-bench/bunny-seed-bench.jsonl")
    data = layout.json(f"{path.parent.name}/SEED-Bench.json")
    names = {number: name for name, number in data["question_type"].items()}
    notes = {str(row["question_id"]): row for row in data["questions"]}
    kept = [
        {**line, "category": names[notes[str(line["question_id"])]["question_type_id"]]}
        for line in layout.lines(f"{path.parent.name}/{path.name}")
        if not image_only or notes[str(line["question_id"])]["data_type"] == "image"
    ]
    return layout.ask(kept, path.parent, lambda q: notes[str(q["question_id"])]["answer"])


def load_mmmu(layout: Layout, split: str) -> list[Item]:
    """Read MMMU's parquet files, subject by subject; if a question has several images, the first is shown, as in Bunny.

    # Bunny's script means to skip questions with several images among their options, but never finds one: it looks
    # for them in the characters of a text.
    """
    import pyarrow.parquet as parquet

    folder = layout.find("mmmu/MMMU")
    better = layout.root / "mmmu" / "answer_dict_val.json"
    truths = parse_json(better, better.read_text(encoding="utf-8")) if better.is_file() else {}
    files = sorted(folder.glob(f"*/{split}-*.parquet"), key=lambda path: (path.parent.name, path.name))
    if not files:
        raise UsageError(f"--eval-root {layout.root}: {layout.task} needs mmmu/MMMU/SUBJECT/{split}-*.parquet")
    out = []
    for path in files:
        columns = ["id", "question", "options", "answer", "question_type"]
        for row, record in enumerate(parquet.read_table(path, columns=columns).to_pylist()):
            out.append(_mmmu_item(record, (str(path), row), path.parent.name, truths))
    return out


def _mmmu_item(record: dict[str, Any], image: tuple[str, int], subject: str, truths: dict[str, Any]) -> Item:
    options = [str(option) for option in ast.literal_eval(record["options"])]
    truth = truths.get(record["id"], {}).get("ground_truth", record["answer"])
    if record["question_type"] == "multiple-choice":
        listed = "".join(f"({letter}) {option}\n" for letter, option in zip(scoring.LETTERS, options, strict=False))
        prompt, choices = f"{record['question']}\n{listed}\n{LETTER}", tuple(options)
    else:
        prompt, choices = f"{record['question']}\n{SHORT}", ()
        if isinstance(truth, str) and truth.startswith("["):
            truth = [str(one) for one in ast.literal_eval(truth)]
    return Item(record["id"], prompt, image, truth, subject, choices)


def load_mmbench(layout: Layout, *names: str) -> list[Item]:
    """Read a legacy TSV of MMBench: hint, question and options, and the image in base64, or the index of its row."""
    out = []
    rows = list(read_mmbench(layout.find(*names)))
    pictures = {row["index"]: row["image"] for row in rows}
    for row in rows:
        there = takewhile(lambda letter: row.get(letter, "").lower() not in ("", "nan", "none"), "ABCD")  # noqa: B023
        options = [(letter, row[letter]) for letter in there]
        hint = "" if row.get("hint", "").lower() in ("", "nan", "none") else f"{row['hint']}\n"
        listed = "".join(f"\n{letter}. {option}" for letter, option in options)
        prompt = f"{hint}{row['question']}{listed}\n{LETTER}"
        category = row.get("l2-category") or row.get("category", "")
        shown = pictures.get(row["image"], row["image"])  # VLMEvalKit's files save space in this way
        image, choices = base64.b64decode(shown), tuple(words for _, words in options)
        out.append(Item(int(row["index"]), prompt, image, row.get("answer"), category, choices))
    return out


def load_mmvet(layout: Layout) -> list[Item]:
    """Read MM-Vet; GPT-4 judges it."""
    questions = layout.lines("mm-vet/llava-mm-vet.jsonl", "mm-vet/bunny-mm-vet.jsonl")
    return layout.ask(questions, layout.root / "mm-vet" / "images", _nothing)


def load_daquar(layout: Layout) -> list[Item]:
    """Read DAQUAR in LLaVA's form; each turn is asked on its own."""
    path = layout.find("daquar/daquar_test.json", "daquar_test.json")
    out = []
    for row in layout.json(str(path.relative_to(layout.root))):
        turns = [turn["value"] for turn in row["conversations"]]
        for n, (asked, answer) in enumerate(zip(turns[::2], turns[1::2], strict=True)):
            prompt = asked.replace("<image>", "").strip().removesuffix(SHORT).strip()
            image = str(path.parent / "images" / row["image"])
            out.append(Item(f"{row['id']}/{n}", f"{prompt}\n{SHORT}", image, answer))
    return out


@lru_cache(maxsize=1)
def _parquet_images(path: str) -> list[Any]:
    import pyarrow.parquet as parquet

    rows: list[Any] = parquet.read_table(path, columns=["image_1"]).column(0).to_pylist()
    return rows


def image_bytes(image: Any) -> bytes:
    """Read the image of an item.  Raises: OSError."""
    if isinstance(image, bytes):
        return image
    if isinstance(image, tuple):
        return bytes((_parquet_images(image[0])[image[1]] or {}).get("bytes") or b"")
    return Path(image).read_bytes()


_DEV = ("mmbench/mmbench_dev_20230712.tsv", "mmbench/MMBench_DEV_EN_legacy.tsv")
_TEST = ("mmbench/MMBench_TEST_EN_legacy.tsv", "mmbench/mmbench_test_20230712.tsv")


def _bench(names: tuple[str, ...], score: Scorer | None, *metrics: str) -> Task:
    def submit(layout: Layout, items: Sequence[Item], texts: Sequence[str], stem: Path) -> Path:
        return submit_mmbench(layout, items, texts, stem, *names)

    together = scoring.mmbench_question if score else None
    return Task(lambda layout: load_mmbench(layout, *names), score, metrics, submit, together=together)


_ACCURACY = ("accuracy",)
TASKS = {
    "pope": Task(load_pope, scoring.pope, ("f1", "accuracy", "yes_ratio")),
    "mme": Task(load_mme, scoring.mme, ("perception", "cognition"), together=scoring.mme_image),
    "gqa": Task(load_gqa, scoring.gqa, _ACCURACY),
    "vqav2": Task(load_vqav2, scoring.vqa, _ACCURACY),
    "vqav2_test": Task(load_vqav2_test, submit=submit_vqav2),
    "textvqa": Task(load_textvqa, scoring.vqa, _ACCURACY),
    "sqa": Task(load_sqa, scoring.sqa, _ACCURACY, max_new_tokens=1024),
    "mmvp": Task(load_mmvp, scoring.mmvp, ("pairs", "single"), together=scoring.mmvp_pair),
    "seed": Task(load_seed, scoring.seed, _ACCURACY),
    "seed_image": Task(partial(load_seed, image_only=True), scoring.seed, _ACCURACY),
    "mmmu": Task(partial(load_mmmu, split="validation"), scoring.mmmu, _ACCURACY),
    "mmmu_test": Task(partial(load_mmmu, split="test"), submit=submit_mmmu),
    "mmbench": _bench(_DEV, scoring.mmbench, "circular", "vanilla"),
    "mmbench_test": _bench(_TEST, None),
    "mmvet": Task(load_mmvet, submit=submit_mmvet, max_new_tokens=1024),
    "daquar": Task(load_daquar, scoring.daquar, ("accuracy", "majority")),
}


def get_task(name: str) -> Task:
    """Return a task by name.  Raises: UsageError."""
    if name not in TASKS:
        raise UsageError(f"unknown task {name!r}{did_you_mean(name, TASKS)}")
    return TASKS[name]


def load(name: str, root: Path) -> list[Item]:
    """Read the items of a task from the folder of all tasks.

    Raises: UsageError naming a missing file; DataError if one does not have its published form.
    """
    task = get_task(name)
    try:
        items = task.load(Layout(root, name))
        for item in items:
            _check(item, scored=task.score is not None)
    except TrainError:
        raise
    except Exception as error:  # whatever csv, ast, base64 or parquet raise for files of another form
        raise DataError(f"{name}: the files under {root} are not as published ({error!r:.300})") from None
    if not items:
        raise DataError(f"{name}: no question in the files under {root}")
    if task.together is None:
        return items
    sizes = Counter(map(task.together, items))
    return [replace(item, of=sizes[task.together(item)]) for item in items]


def _check(item: Item, *, scored: bool) -> None:
    """Refuse an item that would stop the scorer after all answers, or that would count an empty answer as right."""
    truths = item.truth if isinstance(item.truth, list) else [item.truth or None]
    if not (isinstance(item.id, int | str) and isinstance(item.prompt, str)):
        raise ValueError(f"{item.id!r:.80} asks {item.prompt!r:.80}: expected a name or number, and a text")
    if scored and not (truths and all(isinstance(truth, str) for truth in truths)):
        raise ValueError(f"question {item.id} has no answer to be judged by: {item.truth!r:.80}")


def check_published(published: dict[str, float]) -> None:
    """Refuse published scores with a name that no task has.  Raises: UsageError."""
    known = {name for task in TASKS for name in (task, *(f"{task}_{metric}" for metric in TASKS[task].metrics))}
    for name in published:
        if name not in known:
            raise UsageError(f"eval.published has an unknown score {name!r}{did_you_mean(name, known)}")
