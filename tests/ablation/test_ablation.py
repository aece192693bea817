"""Ablations: arms are data, trials share what they can, resume, and are summed up by paired statistics."""

import json
import math
import re
import signal
import subprocess

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from curate.ablation import arms, run, statistics, trials
from curate.demo import oracle
from curate.errors import CurateError, UsageError
from curate.run import pipeline, stages
from curate.storage import manifest, sidecar
from house import ROOT, Command, curate, fingerprint, until

SMALL = """
base = "ablation_bar.toml"
[demo]
rows = 300
shards = 2
instruct = 12
tests = 1
caption_tests = 0
[select]
n = 40
[align]
steps = 3
batch_size = 8
[ablation]
seeds = [5, 6]
take = {pool = ["dirty"], recipe = ["random", "ours", "oracle"]}
bars = []
[ablation.axes.recipe.ours.select]
steps = ['rank(clip_score, 0, 0.5)', 'sample({n})']
[ablation.axes.recipe.oracle.select]
recipe = "oracle"
"""
NO_MODEL = "[ablation.axes.pool.dirty]\nalign = false\nexport = false\neval = false\n"


def plan_of(tmp_path, text, *settings, out="there"):
    path = tmp_path / "plan.toml"
    path.write_text(text)
    return pipeline.load(str(path), out, settings=settings)


# ---- statistics ----------------------------------------------------------------------------------------------------


def trials_of(**values):
    """values: arm -> {seed: value}."""
    return [
        {"arm": {"recipe": arm}, "seed": seed, "measures": {"m": value}}
        for arm, own in values.items()
        for seed, value in own.items()
    ]


numbers = st.lists(st.tuples(st.floats(-5, 5), st.floats(-5, 5)), min_size=2, max_size=12)


@given(numbers, st.floats(-1, 1))
def test_pairs_are_compared_as_by_a_paired_t_test(values, by):
    ours, theirs = (dict(enumerate(side)) for side in zip(*values, strict=True))
    found = statistics.paired(ours, theirs, by)
    differences = np.array([a - b for a, b in values])
    if np.ptp(differences) < 1e-6:
        return
    expected = stats.ttest_rel(*zip(*values, strict=True))
    assert found["n"] == len(values) and math.isclose(found["mean"], differences.mean(), abs_tol=1e-9)
    assert math.isclose(found["t"], expected.statistic, rel_tol=1e-6, abs_tol=1e-9)
    assert math.isclose(found["p"], expected.pvalue, rel_tol=1e-6, abs_tol=1e-9)
    assert np.allclose([found["low"], found["high"]], expected.confidence_interval(0.95), atol=1e-9)
    exceeds = stats.ttest_1samp(differences, by, alternative="greater").pvalue
    assert math.isclose(found["exceeds"], exceeds, rel_tol=1e-6, abs_tol=1e-9)


def test_only_seeds_that_both_arms_have_are_paired_and_little_is_said_of_one():
    trials = trials_of(random={1: 0.1, 2: 0.2, 3: 0.9}, ours={1: 0.3, 2: 0.6}, late={3: 1.0}, alike={1: 0.2, 2: 0.3})
    every = [{"recipe": name} for name in ("random", "ours", "late", "alike", "absent")]
    summary = {
        entry["arm"]["recipe"]: entry for entry in statistics.summarise(trials, every, "recipe", "random", ["m"])
    }
    assert set(summary) == {"random", "ours", "late", "alike"} and summary["random"]["difference"] is None
    assert summary["random"]["n"] == 3 and math.isclose(summary["random"]["mean"], 0.4)
    assert summary["ours"]["difference"]["n"] == 2 and math.isclose(summary["ours"]["difference"]["mean"], 0.3)
    late = summary["late"]["difference"]
    assert late["n"] == 1 and math.isclose(late["mean"], 0.1) and late["t"] is late["p"] is late["low"] is None
    alike = summary["alike"]["difference"]  # no spread: no t, and certainty
    assert alike["t"] is None and math.isclose(alike["low"], 0.1) and math.isclose(alike["high"], 0.1)


def test_a_bar_asks_for_a_difference_beyond_chance():
    trials = trials_of(
        random={1: 0.1, 2: 0.2, 3: 0.3}, ours={1: 0.31, 2: 0.40, 3: 0.52}, vague={1: 0.9, 2: 0.0, 3: 0.4}
    )
    bar = {"claim": "c", "where": {}, "better": "ours", "than": "random", "measure": "m", "by": 0.0, "alpha": 0.05}
    judged = statistics.judge(
        trials, [bar, {**bar, "by": 0.2}, {**bar, "better": "vague"}, {**bar, "measure": "absent"}], "recipe"
    )
    assert [bar["met"] for bar in judged] == [True, False, False, False]
    assert judged[0]["n"] == 3 and judged[0]["p"] < 0.01 and judged[3]["n"] == 0 and judged[3]["p"] is None


def test_the_table_has_one_block_for_each_combination_of_the_other_axes():
    arms_ = [{"recipe": recipe, "budget": budget} for recipe in ("random", "ours") for budget in ("1%", "2%")]
    trials = [
        {"arm": arm, "seed": seed, "measures": {"m": seed + number, "kept": 90}}
        for number, arm in enumerate(arms_)
        for seed in (1, 2)
    ]
    result = {"name": "n", "compare": "recipe", "reference": "random", "bars": []}
    result["summary"] = statistics.summarise(trials, arms_, "recipe", "random", ["m", "kept"])
    lines = [line.split() for line in statistics.table(result, "m", ["m", "kept"])]
    assert [line[0] for line in lines if line] == ["budget", "recipe", "random", "ours"] * 2
    assert [line[-1] for line in lines if line][1:4] == ["kept", "90", "90"]


def test_answers_are_scored_as_means_over_concepts():
    rng = np.random.default_rng(0)
    from curate.demo.words import NAMES
    from curate.demo.world import concept_weights

    rows = [
        {"task": task, "concept": name, "right": bool(rng.random() < 0.4)}
        for task in ("caption", "what", "size")
        for name in NAMES
        for _ in range(rng.integers(1, 4))
    ]
    found = oracle.score_concepts([*rows, {"task": "text", "right": True}])
    by = {}
    for row in rows:
        by.setdefault((row["task"], row["concept"]), []).append(row["right"])
    mean = {key: sum(hits) / len(hits) for key, hits in by.items()}
    slow = {task: sum(mean[task, name] for name in NAMES) / 60 for task in ("caption", "what", "size")}
    heavy = {
        task: sum(w * mean[task, name] for w, name in zip(concept_weights(), NAMES, strict=True))
        for task in ("caption", "what", "size")
    }
    assert math.isclose(found["caption"], slow["caption"]) and math.isclose(found["caption_weighted"], heavy["caption"])
    assert math.isclose(found["answer"], (slow["what"] + slow["size"]) / 2)
    assert math.isclose(found["answer_weighted"], (heavy["what"] + heavy["size"]) / 2)


# ---- arms as data --------------------------------------------------------------------------------------------------


def test_arms_share_what_they_can_and_seeds_go_where_draws_are_made(tmp_path):
    text = SMALL + "[ablation.axes.model.small]\n[ablation.axes.model.fast.align]\nlr = 2e-2\n"
    found = arms.parse(plan_of(tmp_path, text))
    assert len(found.arms) == 6 and len(found.trials) == 12
    assert len({trial.keys["pools"] for trial in found.trials}) == 2  # a pool a seed
    assert (
        len({trial.keys["coresets"] for trial in found.trials}) == 12 and len({t.plan.out for t in found.trials}) == 12
    )
    first, fast = found.trials[0], found.trials[1]
    assert (first.arm, first.seed) == ({"pool": "dirty", "recipe": "random", "model": "small"}, 5)
    tables = first.plan.tables
    assert [tables[name]["seed"] for name in ("demo", "select", "model", "align")] == [5, 5, 5, 5]
    assert "seed" not in tables["cluster"] and "compare" not in tables["select"]
    assert "align.lr=0.02" in fast.plan.settings and "align.seed=5" in first.plan.settings
    assert tables["data"]["eval"] == f"{first.plan.place('demo')}/test/test.json"
    ours = next(trial for trial in found.trials if trial.arm["recipe"] == "ours")
    assert ours.plan.tables["select"]["steps"] == ["rank(clip_score, 0, 0.5)", "sample(40)"]
    assert not {"recipe", "n"} & set(ours.plan.tables["select"])


def test_a_table_may_be_taken_away_and_the_coreset_is_still_shared(tmp_path):
    text = (
        SMALL.replace("[align]", '[mix.sources.x]\npath = "x.json"\n[finetune]\n[align]') + "[ablation.axes.tune.yes]\n"
    )
    text += "[ablation.axes.tune.no]\nfinetune = false\nmix = false\n"
    found = arms.parse(plan_of(tmp_path, text))
    with_it, without = found.trials[0], found.trials[1]
    assert with_it.stages("models") == ["mix", "finetune", "export", "eval"]
    assert without.stages("models") == ["export", "eval"] and with_it.keys["coresets"] == without.keys["coresets"]


@pytest.mark.parametrize(
    "more, word",
    [
        ("[ablation.axes.x.y.slect]\nn = 1\n", "slect"),
        ("[ablation.axes.x.y.select]\nm = 1\n", "key of .select. 'm'"),
        ('[ablation.axes.x."top 5"]\n[ablation.axes.x.top-5]\n', r"'.* top 5' and '.* top-5' would both lie in"),
        ("[ablation.axes.x]\ny = 1\n", r"write \[ablation.axes.x.NAME"),
        ('[[ablation.bars]]\nclaim = "c"\nbetter = "best"\nthan = "random"\nwhere = {pool = "dirty"}\n', "'best'"),
    ],
)
def test_a_wrong_table_is_refused_before_anything_runs(tmp_path, more, word):
    text = SMALL.replace("bars = []\n", "") if "bars" in more else SMALL
    with pytest.raises(UsageError, match=word) as caught:
        arms.parse(plan_of(tmp_path, text + more))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "setting, word",
    [
        ("ablation.reference=best", "'best'"),
        ("ablation.compare=recipes", "did you mean 'recipe'"),
        ("ablation.seeds=[1, 1]", "each once"),
        ('ablation.take={pool = ["dirt"]}', "did you mean 'dirty'"),
        ("ablation.seed=1", "did you mean 'seeds'"),
        ("ablation.keep=model", "did you mean 'models'"),
    ],
)
def test_a_wrong_setting_is_refused(tmp_path, setting, word):
    with pytest.raises(UsageError, match=word):
        arms.parse(plan_of(tmp_path, SMALL, setting))


@pytest.mark.parametrize("path", sorted((ROOT / "pipelines").glob("ablation_*.toml")), ids=lambda path: path.stem)
def test_the_shipped_ablations_are_whole(path):
    plan = pipeline.load(str(path), "there")
    found = arms.parse(plan)
    assert len(found.trials) == len(found.arms) * len(found.options.seeds)


def test_the_ablations_of_the_page_can_be_planned(tmp_path):
    page = (ROOT / "pipelines" / "README.md").read_text()
    shown = [block for block in re.findall(r"^```toml\n(.*?)^```", page, flags=re.S | re.M) if "[ablation" in block]
    planned = [arms.parse(plan_of(tmp_path, block)) for block in shown]
    assert [len(found.trials) for found in planned] == [6, 4]
    assert all("finetune" in trial.plan.tables for trial in planned[1].trials)


# ---- runs ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chosen(tmp_path_factory):
    """The selections alone, undisturbed, by one worker."""
    home = tmp_path_factory.mktemp("chosen")
    (home / "plan.toml").write_text(SMALL + NO_MODEL)
    curate("run", home / "plan.toml", "--out", home / "out", "--workers", 1)
    return home


def results(out):
    return {name: (out / name).read_bytes() for name in (run.RESULT, run.LINES, "manifest.json")}


def test_selections_are_compared_without_a_model(chosen):
    found = json.loads((chosen / "out" / run.RESULT).read_text())
    assert "<h2" in (chosen / "out" / "report.html").read_text()
    assert len(found["trials"]) == 6 and not found["failed"] and found["axes"]["recipe"] == ["random", "ours", "oracle"]
    assert set(found["measures"]) == {"right_share", "concepts", "kept"}
    mean = {entry["arm"]["recipe"]: entry["mean"] for entry in found["summary"] if entry["measure"] == "right_share"}
    assert mean["random"] < mean["ours"] < mean["oracle"] == 1


def test_the_oracle_takes_one_right_pair_of_each_source(chosen):
    found = arms.parse(pipeline.load(str(chosen / "plan.toml"), str(chosen / "out")))
    trial = next(trial for trial in found.trials if trial.arm["recipe"] == "oracle")
    selection = manifest.open_input(trial.plan.place("select"), "select")
    rows = [row for stem in selection.stems for row in selection.table(stem).to_pylist()]
    kept = {row["key"] for row in rows if row["kept"]}
    truth = sidecar.table(f"{trial.plan.place('demo')}/truth.arrow").to_pylist()
    chosen_rows = [row for row in truth if row["key"] in kept]
    assert len(kept) == 40 and all(row["fault"] in ("clean", "duplicate") for row in chosen_rows)
    assert len({row["source"] for row in chosen_rows}) == 40
    assert {row["dropped_by"] for row in rows if not row["kept"]} == {"oracle"}


def test_a_killed_run_goes_on_to_the_same_results_on_two_workers(chosen, tmp_path):
    (tmp_path / "plan.toml").write_text(SMALL + NO_MODEL)
    words = ["run", str(tmp_path / "plan.toml"), "--out", str(tmp_path / "out"), "--workers", "2"]
    running = Command("curate", *words, cwd=ROOT)
    until(lambda: list((tmp_path / "out").glob("pools/*/embeddings/*.arrow")) or running.poll() is not None)
    running.kill()
    assert not (tmp_path / "out" / run.RESULT).exists()
    curate(*words)
    assert results(tmp_path / "out") == results(chosen / "out")
    before = fingerprint(tmp_path / "out")
    again = curate(*words)
    assert "6 are done" in again.stdout and again.stderr == "" and fingerprint(tmp_path / "out") == before


def test_a_trial_that_fails_leaves_the_others_their_way(chosen, tmp_path):
    (tmp_path / "plan.toml").write_text(
        SMALL.replace('"oracle"]', '"oracle", "wrong"]')
        + NO_MODEL
        + "[ablation.axes.recipe.wrong.select]\nsteps = ['above(clip_score, 3)']\n"
    )
    subprocess.run(["cp", "-r", chosen / "out", tmp_path / "out"], check=True)
    ended = curate("run", tmp_path / "plan.toml", "--out", tmp_path / "out", "--workers", 1, check=False)
    assert ended.returncode == 1 and "the selection is empty" in ended.stderr and "Traceback" not in ended.stderr
    found = json.loads((tmp_path / "out" / run.RESULT).read_text())
    assert len(found["trials"]) == 6 and [entry["arm"]["recipe"] for entry in found["failed"]] == ["wrong", "wrong"]


def test_a_model_is_trained_and_asked_by_the_trainer_itself(tmp_path):
    """One trial through the trainer that a worker keeps; the numbers are those of the trainer's own files."""
    text = SMALL.replace('["random", "ours", "oracle"]', '["random"]')
    (tmp_path / "plan.toml").write_text(text.replace("[5, 6]", "[5]"))
    told = curate(
        "run", tmp_path / "plan.toml", "--out", tmp_path / "out", "--workers", 1, "--set", "eval.perplexity=true"
    )
    assert "caption" in told.stdout
    found = json.loads((tmp_path / "out" / run.RESULT).read_text())
    measures = found["trials"][0]["measures"]
    assert list(found["measures"]) == [
        *("caption", "caption_weighted", "answer", "answer_weighted", "text_accuracy", "text_perplexity"),
        *("right_share", "concepts", "kept"),
    ]
    [answers] = (tmp_path / "out" / "models").glob("*/eval/answers.jsonl")
    rows = [json.loads(line) for line in answers.read_text().splitlines()]
    assert measures["caption"] == oracle.score_concepts(rows)["caption"] and len(rows) == 60 * 6
    text_rows = [row for row in rows if row["task"] == "text"]
    loss = sum(row["truth_loss"] for row in text_rows) / sum(row["tokens"] for row in text_rows)
    assert math.isclose(measures["text_perplexity"], math.exp(loss), abs_tol=1e-4) and measures["kept"] == 40


def test_a_trial_leaves_what_keep_says_and_is_judged_again_from_it(tmp_path):
    text = SMALL.replace('["random", "ours", "oracle"]', '["random"]').replace("[5, 6]", "[5]")
    mix = '[mix.sources.x]\npath = "{out}/demo/instruct/instruct.json"\nimages = "{out}/demo/instruct/images"\n'
    (tmp_path / "plan.toml").write_text(text.replace("[align]", f"{mix}[finetune]\nsteps = 2\nbatch_size = 4\n[align]"))
    out = tmp_path / "out"

    def ran(*settings):
        words = [word for setting in settings for word in ("--set", setting)]
        return curate("run", tmp_path / "plan.toml", "--out", out, "--workers", 1, *words).stdout

    def there(pattern):
        return {path.name: path.stat().st_mtime_ns for path in out.glob(pattern)}

    def asked():
        return len(next(out.glob("models/*/eval/answers.jsonl")).read_text().splitlines())

    assert "its models, not the checkpoints" in ran("eval.limit=4")
    trained = there("models/*/finetune/*")
    assert "adapter" in trained and there("models/*/model/model.safetensors") and not there("*/*/*/checkpoints")
    ran("eval.limit=8")  # of the model that stands
    assert there("models/*/finetune/*") == trained and asked() == 8
    ran("eval.limit=8", "ablation.keep=answers")  # takes away what is no longer wanted
    assert not {"mix", "finetune", "model"} & set(there("models/*/*")) and asked() == 8
    ran("eval.limit=9", "ablation.keep=all")  # trained anew, since the model is gone
    assert there("models/*/finetune/checkpoints/*") and asked() == 9


def test_a_trainer_that_is_killed_is_said_to_be():
    made = trials.Trainer()
    made.process.kill()
    made.process.wait()
    with pytest.raises(CurateError, match=r"^the trainer was killed \(SIGKILL; out of memory\?\) at eval model$"):
        made.ask(["eval", "model", "--json"])
    made = trials.Trainer()
    made.stderr.write(b"terminate called: no card\n")
    made.process.send_signal(signal.SIGABRT)
    made.process.wait()
    with pytest.raises(CurateError, match="was ended by SIGABRT at eval model: .*no card"):
        made.ask(["eval", "model", "--json"])
    assert stages.how_it_ended(3) == "ended with exit code 3" and stages.how_it_ended(-15) == "was ended by SIGTERM"


def test_records_that_name_their_task_are_measured_task_by_task():
    told = {"accuracy": 0.5, "tasks": {"(none)": {"accuracy": 1.0}, "rooms": {"accuracy": 0.25, "perplexity": 3.0}}}
    found = trials._of_records(told)
    assert found == {"accuracy": 0.5, "rooms_accuracy": 0.25, "rooms_perplexity": 3.0}
    assert [run._meaning(name)[1] for name in found] == ["higher", "higher", "lower"]
    told = [run._meaning(name, found) for name in ("rooms_accuracy", "rooms_perplexity", "pope_accuracy")]
    assert [unit for *_, unit in told] == ["share", "number", "number"], "0 to 1 here, 0 to 100 there"
    assert "task rooms" in told[0][0] and "of 100" in told[2][0] and "benchmark" not in told[0][0]


def test_a_benchmark_of_the_base_can_be_taken_away():
    words = ["run", "ablation_real_stages", "--pool", "nowhere", "--dry-run"]
    assert "--set data.eval=FILE.json" in curate(*words, check=False).stderr
    told = curate(*words, "--set", "data.eval=held.json", check=False).stdout
    assert "--data held.json --out" in told and "daquar " not in told and "10 arms (2 lm × 5 recipe) × 3 seeds" in told


def test_the_dry_run_tells_the_arms_and_the_cost():
    ended = curate("run", "ablation_bunny", "--pool", "nowhere", "--dry-run", check=False)
    told = ended.stdout
    assert ended.returncode == 2 and ended.stderr.strip() == "error: nowhere does not exist"
    assert "6 arms (3 recipe × 2 text) × 2 seeds = 12 trials" in told and "they share 1 pool and 6 coresets" in told
    assert 'balanced · no text: mix.text_share=0.0 select.recipe="balanced"' in told
    align = 4 * 2.78e9 * 2e6 * 754 / 445e12 / 3600
    assert f"6 × align {align:,.1f} h" in told
