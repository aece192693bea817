"""Scores against the papers' own rules: real answers with known scores, and small cases worked by hand."""

import json
import random
import shutil
from pathlib import Path

import pytest

from train.eval import answers, scoring, tasks
from train.eval.scoring import Item
from train.eval.tasks import SHORT

REAL = Path(__file__).parents[4] / "shared" / "data"


def real(name):
    folder = REAL / name
    if not folder.exists():
        pytest.skip(f"no real data at {folder}")
    return folder


def items(*truths, category="", choices=()):
    return [Item(n, f"q{n}", None, truth, category, choices) for n, truth in enumerate(truths, 1)]


def lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


# --- the real answers of LLaVA-1.5-13B -------------------------------------------------------------------------------


@pytest.mark.realdata
def test_pope_of_llava_13b(tmp_path):
    folder = real("scores/pope")
    (tmp_path / "pope" / "coco").mkdir(parents=True)
    shutil.copy(folder / "questions.jsonl", tmp_path / "pope" / "llava_pope_test.jsonl")
    for file in folder.glob("coco_pope_*.json"):
        shutil.copy(file, tmp_path / "pope" / "coco")
    result = answers.score_file("pope", folder / "answers.jsonl", tmp_path, None)
    got = {name: round(value / 100, 4) for name, value in result["categories"].items()}
    assert got["f1_random"] == 0.8714 and got["f1_popular"] == 0.8625 and got["f1_adversarial"] == 0.8446
    assert got["accuracy_random"] == 0.8801 and got["accuracy_popular"] == 0.8743
    assert got["accuracy_adversarial"] == 0.8550
    assert result["scores"]["f1"] == pytest.approx(85.95, abs=0.005) and result["questions"] == 8910


@pytest.mark.realdata
def test_gqa_of_llava_13b(tmp_path):
    folder = real("scores/gqa")
    truths = json.loads((folder / "questions.json").read_text())
    rows = [
        {"question_id": i, "image": f"{q['imageId']}.jpg", "text": f"{q['question']}\n{SHORT}"}
        for i, q in truths.items()
    ]
    lines(tmp_path / "gqa" / "bunny_gqa_testdev_balanced.jsonl", rows)
    shutil.copy(folder / "questions.json", tmp_path / "gqa" / "testdev_balanced_questions.json")
    result = answers.score_file("gqa", folder / "answers.jsonl", tmp_path, None)
    assert round(result["scores"]["accuracy"], 2) == 63.31 and result["questions"] == 12578


@pytest.mark.realdata
def test_daquar_as_a_task():
    asked = tasks.load("daquar", real("vqa"))
    assert len(asked) == 5673 and asked[0].prompt.endswith(f"blue armchair ?\n{SHORT}")
    assert all("<image>" not in item.prompt and Path(item.image).is_file() for item in asked)
    constant = scoring.daquar(asked, ["2"] * len(asked)).metrics
    assert constant["accuracy"] == constant["majority"] == pytest.approx(100 * 282 / 5673)
    assert (
        scoring.daquar(asked, [f" {item.truth.replace('_', ' ').upper()}." for item in asked]).metrics["accuracy"]
        == 100
    )


# --- rules, by hand --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "yes"),
    [
        ("Yes", True),
        ("No", False),
        ("no, there is", False),
        ("There is not one", False),
        ("NO", True),  # only No, no and not are words of denial
        ("None", True),
        ("Yes. No", True),  # the first sentence
        ("No.", False),
        ("\nNo", True),  # words are split at spaces alone
        ("", True),
    ],
)
def test_pope_words(text, yes):
    assert scoring.says_yes(text) is yes


def test_pope_is_a_mean_of_categories():
    asked = items("yes", "yes", "no", "no", category="random") + items("yes", "no", category="popular")
    scores = scoring.pope(asked, ["Yes", "No", "Yes", "No", "No", "No"])
    assert scores.categories == {"f1_random": 50, "f1_popular": 0, "accuracy_random": 50, "accuracy_popular": 50}
    assert scores.metrics == {"f1": 25, "accuracy": 50, "yes_ratio": pytest.approx(100 / 3)}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Yes", "yes"),
        ("YES.", "yes"),
        ("No, it", "no"),
        (" no", "no"),
        ("  yes", "other"),
        ("Not", "no"),
        ("I know", "other"),
    ],
)
def test_mme_first_four_characters(text, said):
    assert scoring.read_yes_no(text) == said


def test_mme_adds_accuracy_by_question_and_by_image():
    def of(name, category, *truths):
        return [Item(f"{category}/{name}", f"{n}", None, truth, category) for n, truth in enumerate(truths)]

    asked = of("1", "OCR", "Yes", "No") + of("2", "OCR", "Yes", "No") + of("1", "code_reasoning", "No", "Yes")
    scores = scoring.mme(asked, ["yes", "no", "yes", "yes", "maybe", "yes"])
    assert scores.categories == {"OCR": 75 + 50, "code_reasoning": 50 + 0}
    assert scores.metrics == {"perception": 125, "cognition": 50}
    everything = [item for c in (*scoring.PERCEPTION, *scoring.COGNITION) for item in of("1", c, "Yes", "No")]
    assert scoring.mme(everything, ["Yes", "No"] * 14).metrics == {"perception": 2000, "cognition": 800}


def test_gqa_drops_full_stops_alone():
    assert scoring.gqa(items("no", "no", "no", "no"), ["No..", "NO", " no", "no "]).metrics["accuracy"] == 50


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The  Dog.", "dog"),
        ("Two", "2"),
        ("none", "0"),
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("p.m.", "pm"),
        ("dont", "don't"),
        ("hes", "he's"),
        ("couldntve couldnt've", "couldntve couldn't've"),
        ("x-ray", "x ray"),
        ("x- ray", "x ray"),
        ("dog's", "dog 's"),
        ("Yes!\n", "yes"),
        ("blue/green", "blue green"),
        ("." * 40, "." * 8),  # the original removes 32
    ],
)
def test_vqa_normalises_as_evalai(text, normal):
    assert scoring.vqa_normalise(text) == normal


@pytest.mark.parametrize(("agree", "score"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_vqa_leaves_each_person_out(agree, score):
    truths = ["a dog"] * agree + [f"cat{n}" for n in range(10 - agree)]
    assert scoring.vqa_accuracy("Dog.", truths) == pytest.approx(score)


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("B. tall", "B"),
        ("B.tall", "FAILED"),
        ("b", "FAILED"),
        ("F", "FAILED"),
        ("So. The answer is C.", "C"),
        ("The answer is C. The answer is D.", "FAILED"),
        ("The answer is C", "FAILED"),  # the rule wants one more character
        ("", "FAILED"),
    ],
)
def test_science_letters(text, letter):
    assert scoring.science_letter(text) == letter


def test_mmvp_counts_pairs():
    scores = scoring.mmvp(items("A", "B", "A", "B"), ["(a) Open", "B.", "A", "A dog"])
    assert scores.metrics == {"pairs": 50, "single": 75}
    assert scoring.option_letter("b") == "B" and scoring.option_letter("Because") == "" == scoring.option_letter("")


def test_seed_and_mmbench_want_the_letter_alone():
    assert scoring.seed(items("A", "A", "A"), ["A", "A.", " A"]).metrics["accuracy"] == pytest.approx(100 / 3)
    pairs = ((1, "A"), (1000001, "B"), (2, "C"), (1000002, "D"))
    rows = [Item(n, "", None, t, "logic", ("big", "a cat", "red", "bigger")) for n, t in pairs]
    scores = scoring.mmbench(rows, ["A", "B", "C", "A"])
    assert scores.metrics == {"circular": 50, "vanilla": 75} and scores.categories == {"logic": 50}


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        (" b. ", ""),  # stripped of full stops first, which a space hides
        ("b.", "B"),
        ("I say: the answer is C.", "C"),
        ("The answer is C", ""),
        ("a cat", "B"),
        ("big", ""),  # words of two options
        ("bigger", "D"),
        ("E", ""),
        ("", ""),
    ],
)
def test_mmbench_without_its_judge(text, letter):
    assert scoring.plain_option(text, ("big", "A cat", "red", "bigger")) == letter


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("(B)", "B"),
        ("(A) is wrong, (C) is right", "C"),  # of several the last
        ("(B) not C", "B"),  # brackets go first
        ("A or B", "B"),
        ("B.", "B"),
        ("the one in the middle is a Red Dog", "A"),  # words of an option, in more than five words
        ("A cat", "A"),
    ],
)
def test_mmmu_choices(text, letter):
    assert scoring.mmmu_choice(text, ["red dog", "blue", "green"], random.Random(0)) == letter


def test_mmmu_draws_by_lot_with_a_seed():
    asked = [Item(name, "q", None, "A", "Art", ("x", "y")) for name in "abc"] + [Item("d", "q", None, "z")]
    rng = random.Random(42)
    expected = [rng.choice("AB"), "B", rng.choice("AB"), "open"]
    assert scoring.mmmu_answers(asked, ["red dog", "(B)", "", "open"]) == expected, "an answer read takes no lot"


@pytest.mark.parametrize(
    ("text", "truth", "right"),
    [
        ("1.06", "1.06", True),
        ("The result is 1.061", "1.06", True),  # two places
        ("x = 1,234", "1234", True),
        ("1,234 = x", "1234", False),  # an equals sign leads to the conclusion
        ("it is in Tampa, so Florida", ["Tampa", "Florida"], True),
        ("C", "C", True),
        ("abc", "C", False),  # a single character must stand as a word
        ("answer c maybe", "C", True),
        ("24/7", ["24/7", "3.429"], True),
        ("", "x1", False),
    ],
)
def test_mmmu_open_answers(text, truth, right):
    assert scoring.mmmu_open(text, truth) is right
