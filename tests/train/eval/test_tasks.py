"""Benchmarks as they lie on disk: prompts and truths, submissions, and answers that survive a kill."""

import base64
import csv
import json
import re
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from test_cli import call
from toys import picture

from train.config import Eval, load
from train.errors import DataError, UsageError
from train.eval import answers, progress, scoring, tasks
from train.eval.evaluate import evaluate
from train.eval.generate import Speaker
from train.eval.layout import Layout
from train.eval.scoring import Item
from train.eval.tasks import LETTER, SHORT
from train.folder import held, open_run


def lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


# --- layouts ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def root(tmp_path):
    """The evaluation layout with two or three questions a benchmark, and real pictures for two of them."""
    root = tmp_path / "eval"
    ask = {"category": "random", "image": "1.jpg"}
    lines(
        root / "pope/llava_pope_test.jsonl",
        [{**ask, "question_id": n, "text": f"what {n} ?\n{SHORT}"} for n in range(5)],
    )
    for category in ("random", "popular", "adversarial"):
        rows = [{"image": "1.jpg", "text": f"what {n} ?", "label": ("yes", "no")[n % 2]} for n in range(5)]
        lines(root / "pope/coco" / f"coco_pope_{category}.json", rows)
    (root / "pope/val2014").mkdir()
    (root / "pope/val2014/1.jpg").write_bytes(picture("red", True, 0))
    texts = [f"Is it {word}?\n{SHORT}" for word in ("code", "art")]
    rows = [
        {"question_id": "OCR/images/0.1.png", "image": "OCR/images/0.1.png", "text": t, "category": "OCR"}
        for t in texts
    ]
    lines(root / "mme/bunny_mme.jsonl", rows)
    folder = root / "mme/MME_Benchmark_release_version/OCR/questions_answers_YN"
    folder.mkdir(parents=True)
    (folder / "0.txt").write_text(
        "Is it code? Please answer yes or no.\tYes\nIs it art?  Please answer yes or no.\tNo\n"
    )
    lines(root / "textvqa/llava_textvqa_val_v051_ocr.jsonl", [
        {"question_id": "ab", "image": "ab.jpg", "text": f"What Brand?\nReference OCR token: X, Y\n{SHORT}"},
        {"question_id": "ab", "image": "ab.jpg", "text": f"Which year?\n{SHORT}"},
    ])  # fmt: skip
    rows = [{"image_id": "ab", "question": q, "answers": [q] * 10} for q in ("what brand?", "which year?")]
    (root / "textvqa/TextVQA_0.5.1_val.json").write_text(json.dumps({"data": rows}))
    turns = [{"from": "human", "value": "<image>\nWhich?\nA. x\nB. y"}, {"from": "gpt", "value": "B"}]
    rows = [{"id": "5", "image": "5/image.png", "conversations": turns}, {"id": "4", "conversations": turns}]
    (root / "scienceqa").mkdir()
    (root / "scienceqa/llava_test_CQM-A.json").write_text(json.dumps(rows))
    (root / "MMVP").mkdir()
    with (root / "MMVP/Questions.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["Index", "Question", "Options", "Correct Answer"])
        writer.writerows([[1, "Open or shut?", "(a) Open, wide (b) Shut", "(a)"], [2, "Which?", "(a) x (b) y", "(b)"]])
    kinds = {"question_type": {"Scene": 1, "Action": 9}}
    notes = [("1", 1, "image", "A"), ("v2", 9, "video", "B")]
    names = ("question_id", "question_type_id", "data_type", "answer")
    lines(
        root / "seed_bench/llava-seed-bench.jsonl", [{"question_id": i, "image": "x", "text": "q"} for i in (1, "v2")]
    )
    notes = [dict(zip(names, note, strict=True)) for note in notes]
    (root / "seed_bench/SEED-Bench.json").write_text(json.dumps({**kinds, "questions": notes}))
    return root


def test_prompts_and_truths_of_each_layout(root):
    assert [i.truth for i in tasks.load("pope", root)] == ["yes", "no"] * 2 + ["yes"]
    assert [(i.truth, i.category) for i in tasks.load("mme", root)] == [("Yes", "OCR"), ("No", "OCR")]
    assert [i.truth[0] for i in tasks.load("textvqa", root)] == ["what brand?", "which year?"]
    (science,) = tasks.load("sqa", root)
    assert science.prompt == f"Which?\nA. x\nB. y\n{LETTER}" and science.truth == "B"
    first, second = tasks.load("mmvp", root)
    assert first.prompt == f"Open or shut?\nA. Open, wide\nB. Shut\n{LETTER}" and (first.truth, second.truth) == (
        "A",
        "B",
    )
    assert [(i.truth, i.category) for i in tasks.load("seed", root)] == [("A", "Scene"), ("B", "Action")]
    assert len(tasks.load("seed_image", root)) == 1


def test_vqav2_val_and_test(root, tmp_path):
    folder = root / "vqav2"
    folder.mkdir()
    asked = [{"question_id": 7, "image_id": 42, "question": "What is it?"}]
    (folder / "v2_OpenEnded_mscoco_val2014_questions.json").write_text(json.dumps({"questions": asked}))
    notes = [{"question_id": 7, "answers": [{"answer": "dog"}] * 10}]
    (folder / "v2_mscoco_val2014_annotations.json").write_text(json.dumps({"annotations": notes}))
    (item,) = tasks.load("vqav2", root)
    assert item.image.endswith("val2014/COCO_val2014_000000000042.jpg") and scoring.vqa([item], ["a Dog"]).metrics == {
        "accuracy": 100
    }
    rows = [{"question_id": n, "image": "x.jpg", "text": "q"} for n in (1, 2)]
    lines(folder / "llava_vqav2_mscoco_test-dev2015.jsonl", rows[:1])
    lines(folder / "llava_vqav2_mscoco_test2015.jsonl", rows)
    written = tasks.submit_vqav2(
        Layout(root, "vqav2_test"), tasks.load("vqav2_test", root), ["The Dog."], tmp_path / "s"
    )
    assert json.loads(written.read_text()) == [{"question_id": 1, "answer": "dog"}, {"question_id": 2, "answer": ""}]


def test_mmbench_reads_and_submits(root, tmp_path):
    (root / "mmbench").mkdir()
    head = "index question hint A B C D answer category image source l2-category comment split".split()
    image = base64.b64encode(picture("red", True, 0)).decode()
    rows = [
        [f"{n}", 'Is "it"\n<red> & big?', "nan", "yes", "no", "", "", "B", "c", image, "s", "logic", "", "dev"]
        for n in (3, 1000003)
    ]
    with (root / "mmbench/mmbench_dev_20230712.tsv").open("w", newline="") as file:
        csv.writer(file, delimiter="\t").writerows([head, *rows])
    asked = tasks.load("mmbench", root)
    assert asked[0].prompt == f'Is "it"\n<red> & big?\nA. yes\nB. no\n{LETTER}'
    assert tasks.image_bytes(asked[0].image) == picture("red", True, 0)
    result = answers.score_texts("mmbench", asked, ["B", "A"], root, tmp_path / "submission")
    assert result["scores"] == {"circular": 0, "vanilla": 50}
    with zipfile.ZipFile(result["submission"]) as archive:
        sheet = ElementTree.fromstring(archive.read("xl/worksheets/sheet1.xml"))
    table = [["".join(cell.itertext()) for cell in row] for row in sheet[0]]
    assert table[0] == "index question A B C D prediction answer split".split()
    assert table[1] == ["3", 'Is "it"\n<red> & big?', "yes", "no", "", "", "B", "B", "dev"]


def test_mmmu_reads_parquet(root, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as parquet

    image = {"bytes": picture("blue", True, 0), "path": "x.png"}
    common = {"question": "<image 1> Which?", "image_1": image, "answer": "B"}
    several = {
        "id": "validation_Art_2",
        "options": "[\"<img='a'>\", \"<img='b'>\"]",
        "question_type": "multiple-choice",
    }
    rows = [
        {**common, "id": "validation_Art_1", "options": "['x', \"y's\"]", "question_type": "multiple-choice"},
        {**common, **several},
        {**common, "id": "validation_Art_3", "options": "[]", "question_type": "open", "answer": "['7', 'seven']"},
    ]
    (root / "mmmu/MMMU/Art").mkdir(parents=True)
    for split in ("validation", "test"):
        parquet.write_table(pa.Table.from_pylist(rows), root / f"mmmu/MMMU/Art/{split}-00000-of-00001.parquet")
    one, two, three = tasks.load("mmmu", root)
    assert (
        one.prompt == f"<image 1> Which?\n(A) x\n(B) y's\n\n{LETTER}"
        and two.prompt.startswith("<image 1> Which?\n(A) <img='a'>")
        and three.truth == ["7", "seven"]
    )
    assert tasks.image_bytes(one.image) == image["bytes"]
    assert scoring.mmmu([one, three], ["B", "It is seven"]).metrics == {"accuracy": 100}
    result = answers.score_texts("mmmu_test", tasks.load("mmmu_test", root), ["(B)", "", "7"], root, tmp_path / "s")
    assert json.loads(Path(result["submission"]).read_text())["validation_Art_1"] == "B"


def test_a_file_that_is_not_there_or_not_as_published(root, monkeypatch):
    with pytest.raises(UsageError, match="gqa needs gqa/data/testdev_balanced_questions.json or"):
        tasks.load("gqa", root)
    with pytest.raises(UsageError, match="did you mean 'pope'"):
        tasks.load("pop", root)
    lines(root / "pope/llava_pope_test.jsonl", [{"question_id": 1}])
    with pytest.raises(DataError, match="not as published"):
        tasks.load("pope", root)
    (root / "pope/llava_pope_test.jsonl").write_text("[" * 100_000)
    with pytest.raises(DataError, match="pope_test.jsonl is not valid JSON"):
        tasks.load("pope", root)
    (root / "mmbench").mkdir(exist_ok=True)
    (root / "mmbench/mmbench_dev_20230712.tsv").write_text("index\tquestion\timage\n1\tq\t" + "x" * 2_000)
    limit = csv.field_size_limit
    before = limit()
    monkeypatch.setattr(csv, "field_size_limit", lambda _: limit(1_000))
    with pytest.raises(DataError, match="not as published .*field larger"):
        tasks.load("mmbench", root)
    limit(before)


@pytest.mark.parametrize("options", ["[", "(" * 300, "['a'", "3", ""])
def test_options_of_mmmu_that_are_no_list_are_said(root, options):
    import pyarrow as pa
    import pyarrow.parquet as parquet

    (root / "mmmu/MMMU/Art").mkdir(parents=True, exist_ok=True)
    row = {"id": "a", "question": "q", "options": options, "answer": "A", "question_type": "multiple-choice"}
    parquet.write_table(pa.Table.from_pylist([row]), root / "mmmu/MMMU/Art/validation-00000.parquet")
    with pytest.raises(DataError, match="not as published"):
        tasks.load("mmmu", root)


def _break_sqa(root):
    turns = [{"from": "human", "value": "<image>\nWhich?\nA. x\nB. y"}, {"from": "gpt", "value": "y"}]
    rows = [{"id": "5", "image": "5/image.png", "conversations": turns}]
    (root / "scienceqa/llava_test_CQM-A.json").write_text(json.dumps(rows))


def _break_mmbench(root):
    (root / "mmbench").mkdir()
    (root / "mmbench/mmbench_dev_20230712.tsv").write_text("index\tquestion\tA\tB\tanswer\timage\n3\tIs it?\tx\ty\n")


def _break_mmvp(root):
    (root / "MMVP/Questions.csv").write_text("Index,Question,Options,Correct Answer\n1,Which?,(a) x (b) y,Open\n")


def _break_mmvp_quotes(root):
    (root / "MMVP/Questions.csv").write_text('Index,Question,Options,Correct Answer\n1,"Which?' + "x" * 200_000)


def _break_mmmu(root):
    import pyarrow as pa
    import pyarrow.parquet as parquet

    row = {"id": "a", "question": "q", "options": "['x", "answer": "B", "question_type": "multiple-choice"}
    (root / "mmmu/MMMU/Art").mkdir(parents=True)
    parquet.write_table(pa.Table.from_pylist([row]), root / "mmmu/MMMU/Art/validation-00000-of-00001.parquet")


def _break_textvqa(root):
    data = [{"image_id": "ab", "question": q, "answers": "Nikon D300"} for q in ("what brand?", "which year?")]
    (root / "textvqa/TextVQA_0.5.1_val.json").write_text(json.dumps({"data": data}))


def _break_daquar(root):
    turns = [{"from": "human", "value": "<image>\nHow many?"}, {"from": "gpt", "value": 3}]
    (root / "daquar_test.json").write_text(json.dumps([{"id": "1", "image": "1.jpg", "conversations": turns}]))


@pytest.mark.parametrize(
    ("task", "spoil", "told"),
    [
        ("sqa", _break_sqa, "question 5 has no answer to be judged by"),
        ("mmbench", _break_mmbench, "question 3 has no answer to be judged by"),
        ("mmvp", _break_mmvp, "question 1 has no answer to be judged by"),
        ("mmvp", _break_mmvp_quotes, "not as published"),
        ("mmmu", _break_mmmu, "SyntaxError"),
        ("textvqa", _break_textvqa, "'Nikon D300' are not the answers of ten people"),
        ("daquar", _break_daquar, "question 1/0 has no answer to be judged by: 3"),
    ],
)
def test_what_no_scorer_could_judge_is_refused_before_it_is_asked(root, task, spoil, told):
    spoil(root)
    with pytest.raises(DataError, match=told):
        tasks.load(task, root)


# --- answers ---------------------------------------------------------------------------------------------------------


def test_a_torn_tail_is_cut_off_and_asked_again(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [{"question_id": n, "prompt": "é", "text": str(n)} for n in range(3)]
    progress.append_lines(path, rows)
    whole = path.read_bytes()
    last = whole[: whole.index(b"\n", whole.index(b"\n") + 1) + 1]
    for cut in range(len(last), len(whole)):
        path.write_bytes(whole[:cut])
        assert answers.read_answers(path, mend=True) == rows[:2] and path.read_bytes() == last
    progress.append_lines(path, rows[2:])
    assert path.read_bytes() == whole
    path.write_bytes(whole[:-5])
    with pytest.raises(DataError, match="line 3"):
        answers.read_answers(path)


def test_answers_hold_any_text_that_json_may_have(tmp_path):
    row = {"question_id": "\ud800", "prompt": "half a letter \udfff", "text": "\u2028 ok"}
    progress.append_lines(tmp_path / "a.jsonl", [row, row])
    assert answers.read_answers(tmp_path / "a.jsonl") == [row, row]


def test_answers_of_a_killed_evaluation_give_way_to_no_other_request(tmp_path):
    out, row = tmp_path / "pope", {"question_id": 1, "prompt": "q", "text": "a"}
    with held(out):
        assert open_run(out, {"max_new_tokens": 128}) == "new"
        assert open_run(out, {"max_new_tokens": 16}) == "new"  # nothing was answered
        progress.append_lines(out / answers.ANSWERS, [row])
        with pytest.raises(UsageError, match="was made with max_new_tokens = 16, not 128.* type --overwrite"):
            open_run(out, {"max_new_tokens": 128})
        assert open_run(out, {"max_new_tokens": 16}) == "unfinished"
    assert answers.read_answers(out / answers.ANSWERS) == [row]


def test_answers_are_found_by_id_and_prompt():
    asked = [Item("x", "one"), Item("x", "two"), Item(3, "three")]
    rows = [
        {"question_id": "x", "prompt": "two", "text": "2"},
        {"question_id": "3", "prompt": "<image>\nother", "text": "3"},
    ]
    rows.append({"question_id": "x", "prompt": "two ", "text": "2b"})
    assert answers.match(asked, rows) == [None, "2b", None]
    assert answers.match(asked, rows, by_id=True) == [None, "2b", "3"]


def test_score_and_table_beside_the_published_row(root, tmp_path, capfd):
    rows = [{"question_id": n, "prompt": f"what {n} ?\n{SHORT}", "text": "No" if n % 2 else "Yes"} for n in range(5)]
    lines(tmp_path / "a.jsonl", rows)
    words = ("score", "pope", "--answers", tmp_path / "a.jsonl", "--eval-root", root)
    code, out, _ = call(capfd, *words, "--set", "eval.published={pope=99, pope_accuracy=86}")
    assert code == 0 and "+1.00  within 2%" in out and "+14.00  outside 2%" in out
    held = json.loads(call(capfd, *words, "--set", "eval.published={pope=99}", "--json")[1])["published"]
    assert held == [{"task": "pope", "metric": "f1", "questions": 5, "score": 100.0, "published": 99.0, "within": True}]
    assert "known: " in call(capfd, *words, "--set", "eval.published={pop=1}")[2]
    lines(tmp_path / "a.jsonl", rows[:4])
    code, _, err = call(capfd, *words)
    assert code == 2 and "answers 4 of the 5 questions of pope; type --partial" in err
    (tmp_path / "c.toml").write_text("[eval]\nlimit = 3\n")
    more = ("--config", tmp_path / "c.toml", "--out", tmp_path / "sent")
    assert call(capfd, *words, "--partial", *more)[0] == 0
    with pytest.raises(UsageError, match="is not a table of numbers"):
        load(None, ["eval.published=3"])
    with pytest.raises(UsageError, match="eval.batch_size = 0 must be greater than 0"):
        load(None, ["eval.batch_size=0"])


@pytest.fixture(scope="module")
def model(world, tmp_path_factory):
    from train.publish.export import export
    from train.run.stage import run_stage

    out = tmp_path_factory.mktemp("eval")
    options = load(str(world / "config.toml"), ["align.steps=1"])
    run_stage("align", options, str(world / "captions"), out / "run")
    export(out / "run", out / "model", dtype="fp32")
    return out / "model"


def test_eval_resumes_to_the_same_answers(root, model, tmp_path, capfd):
    lines(
        root / "mm-vet/llava-mm-vet.jsonl",
        [{"question_id": 0, "image": "v.jpg", "text": "what is it ?", "category": "conv"}],
    )
    (root / "mm-vet/images").mkdir()
    (root / "mm-vet/images/v.jpg").write_bytes(picture("blue", True, 0))
    words = ("eval", model, "--tasks", "pope,mmvet", "--eval-root", root, "--set", "eval.max_new_tokens=3")
    words = (*words, "--set", "eval.batch_size=2", "--out")
    code, out, _ = call(capfd, *words, tmp_path / "whole")
    assert (
        code == 0
        and "by server" in out
        and list(json.loads((tmp_path / "whole/mmvet/submission.json").read_text())) == ["v1_0"]
    )
    whole = (tmp_path / "whole/pope/answers.jsonl").read_bytes()
    assert set(json.loads(whole.splitlines()[0])) == {
        "question_id",
        "prompt",
        "text",
        "answer_id",
        "model_id",
        "metadata",
    }
    result = json.loads((tmp_path / "whole/pope/manifest.json").read_text())["result"]
    assert call(capfd, *words, tmp_path / "part", "--limit", 2)[0] == 0
    torn = tmp_path / "part/pope/answers.jsonl"
    torn.write_bytes(torn.read_bytes()[:-7])
    assert call(capfd, *words, tmp_path / "part")[0] == 0
    assert torn.read_bytes() == whole
    assert json.loads((tmp_path / "part/pope/manifest.json").read_text())["result"] == result
    before = torn.stat().st_mtime_ns
    assert call(capfd, *words, tmp_path / "part", "--json")[0] == 0 and torn.stat().st_mtime_ns == before
    code, _, err = call(capfd, *words, tmp_path / "part", "--set", "eval.max_new_tokens=4")
    assert code == 2 and "max_new_tokens = 3, not 4" in err and "--overwrite" in err


def test_eval_refuses_before_the_model_is_loaded(root, model, tmp_path, capfd):
    (root / "pope/val2014/1.jpg").unlink()
    with pytest.raises(UsageError, match="pope: 5 of 5 images are missing, the first is"):
        answers.run_tasks(model, ["pope"], root, tmp_path / "out", Eval())
    assert not (tmp_path / "out").exists()
    assert (
        "not an exported model"
        in call(capfd, "eval", tmp_path, "--tasks", "pope", "--eval-root", root, "--out", "x")[2]
    )
    for wrong in ((), ("--tasks", "pope", "--data", "x.json")):
        assert "either --data" in call(capfd, "eval", model, "--out", "x", *wrong)[2]
    assert "--eval-root" in call(capfd, "eval", model, "--out", "x", "--tasks", "pope")[2]
    code, _, err = call(capfd, "eval", model, "--out", "x", "--tasks", " ,", "--eval-root", root)
    assert code == 2 and "--tasks ' ,' names no benchmark; known: pope, mme" in err


def test_unreadable_pictures_are_counted_and_the_score_is_over_the_others(root, model, tmp_path, capfd):
    folder = root / "pope/val2014"
    good = (folder / "1.jpg").read_bytes()
    rows = [
        {"question_id": n, "image": f"{n}.jpg", "category": "random", "text": f"what {n} ?\n{SHORT}"} for n in range(5)
    ]
    lines(root / "pope/llava_pope_test.jsonl", rows)
    for category in ("random", "popular", "adversarial"):
        labels = [{"image": f"{n}.jpg", "text": f"what {n} ?", "label": "yes"} for n in range(5)]
        lines(root / "pope/coco" / f"coco_pope_{category}.json", labels)
    for n in range(5):
        (folder / f"{n}.jpg").write_bytes(good[:200] if n in (1, 3) else b"" if n == 4 else good)
    words = ("eval", model, "--tasks", "pope", "--eval-root", root, "--set", "eval.max_new_tokens=1")
    words = (*words, "--set", "eval.batch_size=2", "--out", tmp_path / "out")
    code, out, _ = call(capfd, *words)
    assert code == 0 and "pope: left out: 3 × bad_image (e.g. question 1)" in out
    assert [line.split()[2] for line in out.splitlines() if line.startswith("pope  ")] == ["2"] * 3
    record = json.loads((tmp_path / "out/pope/manifest.json").read_text())["result"]
    assert record["questions"] == 2 and record["left_out"] == ["3 × bad_image (e.g. question 1)"]
    (folder / "3.jpg").write_bytes(good)
    assert json.loads(call(capfd, *words, "--json")[1])["tasks"]["pope"]["questions"] == 3, "mended ones are asked"
    for n in range(5):
        (folder / f"{n}.jpg").write_bytes(b"no picture")
    code, _, err = call(capfd, *words[:-1], tmp_path / "none")
    assert (
        code == 1 and "pope: none of the images of its 5 questions can be used: 5 × bad_image (e.g. question 0)" in err
    )


def test_a_server_gets_an_empty_answer_where_there_is_no_picture(root, tmp_path):
    rows = [{"question_id": n, "image": "v.jpg", "text": f"q{n}"} for n in range(2)]
    lines(root / "mm-vet/llava-mm-vet.jsonl", rows)
    result = answers.score_texts("mmvet", tasks.load("mmvet", root), ["a", None], root, tmp_path / "s")
    assert result["questions"] == 1 and json.loads((tmp_path / "s.json").read_text()) == {"v1_0": "a", "v1_1": ""}


@pytest.mark.parametrize(("kept", "scores"), [(3, {"pairs": 100, "single": 100 * 2 / 3}), (1, {"single": 100})])
def test_half_a_pair_of_mmvp_is_no_pair(root, tmp_path, kept, scores):
    with (root / "MMVP/Questions.csv").open("w", newline="") as file:
        rows = [[n, f"Which {n}?", "(a) x (b) y", "(a)"] for n in range(1, 5)]
        csv.writer(file).writerows([["Index", "Question", "Options", "Correct Answer"], *rows])
    asked = tasks.load("mmvp", root)
    found = answers.score_texts("mmvp", asked[:kept], ["A", "A", "B"][:kept], root, None)
    assert found["scores"] == pytest.approx(scores, abs=1e-4)
    assert found["left_out"] == ["1 × in a group that counts as one, with a question unanswered"]
    told = answers.table(answers.compare({"mmvp": found}, {}, 0.02), 0.02)
    assert ("none whole" in told) == ("pairs" not in scores)
    path = tmp_path / "a.jsonl"
    lines(path, [{"question_id": item.id, "prompt": item.prompt, "text": "A"} for item in asked[:kept]])
    assert answers.score_file("mmvp", path, root, None, partial=True)["scores"].keys() == scores.keys()


def test_some_rotations_of_a_question_are_not_the_question(root):
    (root / "mmbench").mkdir()
    head = "index question A B answer image l2-category".split()
    image = base64.b64encode(picture("red", True, 0)).decode()
    rows = [[n, "Which?", "x", "y", "A", image, "logic"] for n in (3, 4, 1000003, 1000004)]
    with (root / "mmbench/mmbench_dev_20230712.tsv").open("w", newline="") as file:
        csv.writer(file, delimiter="\t").writerows([head, *rows])
    asked = tasks.load("mmbench", root)
    for kept, circular in ((2, {}), (3, {"circular": 100}), (4, {"circular": 50})):
        found = answers.score_texts("mmbench", asked[:kept], ["A", "A", "A", "B"][:kept], root, None)
        assert {**found["scores"], "vanilla": 0} == {**circular, "vanilla": 0}
        assert bool(found["left_out"]) == (kept < 4) and bool(found["categories"]) == bool(circular)


def test_a_line_of_mme_ends_at_its_end(root):
    path = root / "mme/MME_Benchmark_release_version/OCR/questions_answers_YN/0.txt"
    path.write_bytes(
        "Is it\u2028code? Please answer yes or no.\tYes\r\nIs it\x85art? Please answer yes or no.\tNo".encode()
    )
    rows = [{"question_id": "OCR/images/0.1.png", "image": "x", "category": "OCR"}]
    texts = [f"Is it\u2028code?\n{SHORT}", f"Is it\x85art?\n{SHORT}"]
    lines(root / "mme/bunny_mme.jsonl", [{**row, "text": text} for row in rows for text in texts])
    assert [item.truth for item in tasks.load("mme", root)] == ["Yes", "No"]


def test_marks_before_a_file_and_a_picture_that_another_row_has(root):
    (root / "mmbench").mkdir()
    image = base64.b64encode(picture("red", True, 0)).decode()
    rows = [[3, "Which?", "x", "y", "A", image, "l"], [1000003, "Which?", "y", "x", "B", "3", "l"]]
    with (root / "mmbench/mmbench_dev_20230712.tsv").open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file, delimiter="\t").writerows(["index question A B answer image l2-category".split(), *rows])
    assert [item.image for item in tasks.load("mmbench", root)] == [picture("red", True, 0)] * 2
    for name in ("seed_bench/SEED-Bench.json", "seed_bench/llava-seed-bench.jsonl"):
        (root / name).write_bytes(b"\xef\xbb\xbf" + (root / name).read_bytes())
    assert len(tasks.load("seed", root)) == 2


def test_an_image_of_mme_needs_all_its_questions(root):
    asked = tasks.load("mme", root)
    assert answers.score_texts("mme", asked, ["Yes", "No"], root, None)["scores"] == {"perception": 200}
    half = answers.score_texts("mme", asked[:1], ["Yes"], root, None)
    assert half["scores"] == {} == half["categories"] and half["left_out"]


# --- held-out records ------------------------------------------------------------------------------------------------


def _mute_after(monkeypatch, batches):
    """Let the model answer as many batches and then die as a process does; returns the sizes of those it was asked."""
    asked, real = [], Speaker.answers

    def answer(self, turns, images, max_new_tokens):
        if len(asked) == batches:
            raise MemoryError("killed")
        asked.append(len(turns))
        return real(self, turns, images, max_new_tokens)

    monkeypatch.setattr(Speaker, "answers", answer)
    return asked


def test_a_killed_evaluation_of_records_goes_on_where_it_was(world, model, tmp_path, monkeypatch, caplog):
    data = str(world / "llava" / "data.json")
    options = Eval(batch_size=3, max_new_tokens=2, candidates=4)
    told = evaluate(model, data, tmp_path / "whole.jsonl", options=options)
    out = tmp_path / "a.jsonl"
    with monkeypatch.context() as patch:
        asked = _mute_after(patch, 4)
        with pytest.raises(MemoryError):
            evaluate(model, data, out, options=options)
        assert not out.exists() and sum(asked) < told["questions"]
    kept = tmp_path / ".a.jsonl.unfinished"
    kept.write_bytes(kept.read_bytes()[:-5])  # the fourth batch
    with pytest.raises(UsageError, match=r"a.jsonl was made with max_new_tokens = 2, not 3; .* --overwrite"):
        evaluate(model, data, out, options=replace(options, max_new_tokens=3))
    with monkeypatch.context() as patch, caplog.at_level("INFO", "train"):
        asked = _mute_after(patch, -1)
        assert evaluate(model, data, out, options=options) == {**told, "answers": str(out)}
        assert sum(asked) == told["questions"] - 9
    assert f"resuming after 9 of {told['questions']} answers" in caplog.text
    assert re.search(rf"answers: {told['questions'] - 9} of {told['questions'] - 9}, .*/s", caplog.text)
    assert re.search(r"ranks: (\d+) of \1, .*/s", caplog.text)
    names = ("a.jsonl", "a.manifest.json", "whole.jsonl", "whole.manifest.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    for ours, whole in zip(names[:2], names[2:], strict=True):
        assert (tmp_path / ours).read_bytes() == (tmp_path / whole).read_bytes()


def test_answers_to_records_give_way_to_no_other_request(world, model, tmp_path):
    data, out = str(world / "llava" / "data.json"), tmp_path / "a.jsonl"
    options = Eval(batch_size=4, max_new_tokens=1, perplexity=False, limit=3)
    assert evaluate(model, data, out, options=options)["questions"] == 3
    assert evaluate(model, data, out, options=replace(options, limit=5))["questions"] == 5, "three of the same gave way"
    before = out.read_bytes()
    other = tmp_path / "other"
    shutil.copytree(model, other)
    generation = json.loads((other / "generation_config.json").read_text())
    (other / "generation_config.json").write_text(json.dumps({**generation, "repetition_penalty": 1.5}))
    wrong = [
        (other, data, replace(options, limit=5), "holds answers of another model; .* --overwrite"),
        (model, str(world / "captions"), replace(options, limit=5), "holds answers to other data"),
        (model, data, replace(options, limit=2), "was made with limit = 5, not 2"),
        (model, data, replace(options, limit=5, batch_size=3), "was made with batch_size = 4, not 3"),
    ]
    for folder, asked, changed, told in wrong:
        with pytest.raises(UsageError, match=told):
            evaluate(folder, asked, out, options=changed)
    assert out.read_bytes() == before
    record = json.loads((tmp_path / "a.manifest.json").read_text())
    del record["request"]["batch_size"]  # as before it was recorded
    (tmp_path / "a.manifest.json").write_text(json.dumps(record))
    assert evaluate(model, data, out, options=replace(options, limit=5))["questions"] == 5
    assert evaluate(other, data, out, options=options, overwrite=True)["questions"] == 3


def test_numbers_of_mmbench_that_pandas_wrote_are_whole_numbers(root, tmp_path):
    (root / "mmbench").mkdir()
    image = base64.b64encode(picture("red", True, 0)).decode()
    rows = [["3.0", "Which?", "x", "1.0", "A", image, "l"], ["1000003.0", "Which?", "1.0", "x", "B", "3.0", "l"]]
    with (root / "mmbench/mmbench_dev_20230712.tsv").open("w", newline="") as file:
        csv.writer(file, delimiter="\t").writerows(["index question A B answer image l2-category".split(), *rows])
    asked = tasks.load("mmbench", root)
    assert [(item.id, item.choices) for item in asked] == [(3, ("x", "1.0")), (1_000_003, ("1.0", "x"))]
    assert [item.image for item in asked] == [picture("red", True, 0)] * 2
    result = answers.score_texts("mmbench", asked, ["A", "B"], root, tmp_path / "submission")
    assert result["scores"] == {"circular": 100, "vanilla": 100}
    with zipfile.ZipFile(result["submission"]) as archive:
        sheet = ElementTree.fromstring(archive.read("xl/worksheets/sheet1.xml"))
    table = [["".join(cell.itertext()) for cell in row] for row in sheet[0]]
    assert [(row[0], row[table[0].index("prediction")]) for row in table[1:]] == [("3", "A"), ("1000003", "B")]


def test_mme_is_found_in_the_folder_of_the_later_archive(root):
    folder = root / "mme/MME_Benchmark_release_version"
    asked = tasks.load("mme", root)
    shutil.move(folder, root / "MME_Benchmark")
    folder.mkdir()
    shutil.move(root / "MME_Benchmark", folder / "MME_Benchmark")
    found = tasks.load("mme", root)
    assert [item.truth for item in found] == [item.truth for item in asked]
    assert {item.image for item in found} == {str(folder / "MME_Benchmark/OCR/images/0.1.png")}
