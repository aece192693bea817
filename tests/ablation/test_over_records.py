"""Intervals over the records that a difference was measured on, drawn by photographs."""

import math

import numpy as np
import pytest

from curate.ablation import over_records, statistics
from train.eval.evaluate import summarise
from train.eval.ranking import RANKS
from train.eval.ranking import summary as ranked


def rows_of(seed, photographs=12, questions=3):
    """Answers as `train eval` writes them: questions about photographs, ranks with the first of each, and text."""
    rng = np.random.default_rng(seed)
    rows = []
    for n in range(photographs * questions + 5):
        text = n >= photographs * questions
        row = {"key": f"k{n}", "task": "chat" if text else ("rooms", "")[n % 2], "right": bool(rng.random() < 0.4)}
        row |= {"truth_loss": round(float(rng.uniform(1, 30)), 5), "tokens": int(rng.integers(1, 9))}
        row |= {} if text else {"pictures": [f"p{n // questions}"]}
        if not text and n % questions == 0:
            row |= dict(zip(RANKS, rng.integers(1, 5, 3).tolist(), strict=True))
            row |= {"information": round(float(rng.normal()), 4)}
        rows.append(row)
    return rows


def test_the_parts_of_each_measure_add_up_to_what_eval_tells():
    rows = rows_of(0)
    told = {**summarise(rows), **ranked([row for row in rows if "rank" in row])}
    expected = {name: told[name] for name in told if name not in ("questions", "tasks", "ranked")}
    for task in ("rooms", "chat"):
        expected |= {f"{task}_{name}": told["tasks"][task][name] for name in ("accuracy", "perplexity")}
    found = over_records.values(rows)
    assert found.keys() == expected.keys()
    for name, units in found.items():
        above, below = (math.fsum(part[i] for part in units.values()) for i in (0, 1))
        mean = math.exp(above / below) if name.endswith("perplexity") else above / below
        assert mean == pytest.approx(expected[name], abs=1e-4)
    assert len(found["rooms_accuracy"]) == len(found["ranked_first"]) == 12  # photographs
    assert len(found["chat_accuracy"]) == 5 and len(found["accuracy"]) == 17


def slow_interval(ours, theirs, exponential):
    """The same draws, record by record."""
    units = sorted(next(iter(ours.values())))
    rng, differences = np.random.default_rng(over_records.SEED), []
    for _ in range(over_records.DRAWS):
        times = rng.multinomial(len(units), [1 / len(units)] * len(units))
        drawn = [unit for unit, count in zip(units, times, strict=True) for _ in range(count)]
        means = []
        for side in (ours, theirs):
            own = []
            for seed in sorted(set(ours) & set(theirs)):
                value = sum(side[seed][u][0] for u in drawn) / sum(side[seed][u][1] for u in drawn)
                own.append(math.exp(value) if exponential else value)
            means.append(sum(own) / len(own))
        differences.append(means[0] - means[1])
    return np.percentile(differences, [2.5, 97.5])


@pytest.mark.parametrize("measure", ["accuracy", "rooms_perplexity", "gain_mean_rank"])
def test_the_interval_is_that_of_a_bootstrap_by_loops(measure):
    ours, theirs = (
        {s: over_records.values(rows_of(10 * side + s))[measure] for s in range(side, side + 3)} for side in (1, 2)
    )
    exponential = measure.endswith("perplexity")
    found = over_records.interval(ours, theirs, exponential)
    np.testing.assert_allclose([found["low"], found["high"]], slow_interval(ours, theirs, exponential), rtol=1e-9)
    assert found["n"] == 12 + 5 * (measure == "accuracy")


def test_the_interval_covers_the_truth_where_questions_of_a_photograph_agree():
    """Twenty questions a photograph, all alike, are one observation: intervals of single questions would miss it."""
    rng, covered, alone = np.random.default_rng(3), 0, 0
    for _ in range(200):
        effect = rng.normal(0, 1, 30)
        sides = [{0: {f"p{i}": (20 * value, 20.0) for i, value in enumerate(own)}} for own in (effect, 0 * effect)]
        found = over_records.interval(*sides)
        covered += found["low"] <= 0 <= found["high"]
        alone += abs(effect.mean()) <= 1.96 * np.repeat(effect, 20).std(ddof=1) / math.sqrt(600)
    assert covered >= 178 and alone < 100  # 190 are meant; the percentiles of 30 are a little narrow


def test_arms_that_answered_other_records_get_no_interval():
    one = {0: {"a": (1.0, 1.0), "b": (0.0, 1.0)}}
    assert over_records.interval(one, {0: {"a": (1.0, 1.0), "c": (0.0, 1.0)}}) is None
    assert over_records.interval(one, {1: one[0]}) is None
    assert over_records.interval({0: {"a": (1.0, 1.0)}}, {0: {"a": (0.0, 1.0)}}) is None
    assert over_records.interval(one, one) == {"n": 2, "low": 0.0, "high": 0.0}


def test_a_summary_and_its_table_tell_both_intervals():
    arms = [{"lm": "small", "recipe": name} for name in ("random", "ours")]
    rows = {(arm["recipe"], seed): rows_of(seed + 7 * (arm["recipe"] == "ours")) for arm in arms for seed in (1, 2)}
    done = [
        {
            "arm": arm,
            "seed": seed,
            "measures": {"accuracy": summarise(rows[arm["recipe"], seed])["accuracy"], "kept": 3},
        }
        for arm in arms
        for seed in (1, 2)
    ]
    answers = {
        (tuple(t["arm"].values()), t["seed"]): over_records.values(rows[t["arm"]["recipe"], t["seed"]]) for t in done
    }
    entries = statistics.summarise(done, arms, "recipe", "random", ["accuracy", "kept"])
    over_records.add(entries, answers, "recipe")
    beside = {(entry["arm"]["recipe"], entry["measure"]): entry["difference"] for entry in entries}
    held = beside["ours", "accuracy"]["records"]
    assert held["n"] == 17 and held["low"] < beside["ours", "accuracy"]["mean"] < held["high"]
    assert beside["random", "accuracy"] is None and beside["ours", "kept"]["records"] is None
    result = {"name": "n", "compare": "recipe", "reference": "random", "bars": [], "summary": entries}
    lines = list(statistics.table(result, "accuracy", ["accuracy", "kept"]))
    assert "on other records" in lines[2] and f"[{held['low']:+.3f}, {held['high']:+.3f}]" in lines[4]
