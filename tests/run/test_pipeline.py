"""Pipelines: what is checked before anything runs, what is told beforehand, and that a second run does nothing."""

import json
import re
import shlex
import shutil
import tomllib

import pytest
from artefacts import write_embeddings, write_pool

from curate import options
from curate.ablation import arms
from curate.errors import UsageError
from curate.mix.mix import read_table
from curate.run import dry_run, pipeline, stages
from house import CLIP, ROOT, curate, fingerprint

TABLES = f"""
[pool]
path = "POOL"
[embed]
model = "{CLIP}"
[cluster]
k = 12
[select]
recipe = "balanced"
n = 100
compare = ["random"]
[emit]
shard_size = 40
"""


@pytest.fixture(scope="module")
def plan(tmp_path_factory, demo):
    path = tmp_path_factory.mktemp("plan") / "mine.toml"
    path.write_text(TABLES.replace("POOL", str(demo / "pool")))
    return path


def test_the_dry_run_tells_and_does_nothing(plan, tmp_path):
    told = curate("run", plan, "--out", tmp_path / "out", "--dry-run").stdout
    assert "curate embed" in told and "599 rows" in told and "calibrated: fit" in told
    assert not (tmp_path / "out").exists()


def test_recipes_stand_beside_steps_of_ones_own(plan, tmp_path):
    path, out = tmp_path / "own.toml", tmp_path / "out"
    path.write_text(plan.read_text().replace('recipe = "balanced"', 'steps = ["dedup(0.9)", "sample(90)"]'))
    told = curate("run", path, "--out", out, "--dry-run").stdout
    line = next(line for line in told.splitlines() if "curate select" in line)
    assert "'--step=dedup(0.9)' '--step=sample(90)'" in line and "--n" not in line
    curate("run", path, "--out", out, "--only", "coreset")
    steps = {place.parent.name: json.loads(place.read_text())["steps"] for place in out.glob("*/funnel.json")}
    assert [step["text"] for step in steps["selection"]] == ["dedup(0.9)", "sample(90)"]
    assert [step["text"] for step in steps["selection-random"]] == ["sample(100)"]


def test_a_second_run_does_nothing_and_another_recipe_only_what_it_must(plan, tmp_path):
    out = tmp_path / "out"
    first = curate("run", plan, "--out", out)
    assert "balance(cluster, 100, keep=" in first.stdout and (out / "selection-random" / "funnel.json").exists()
    before = fingerprint(out)
    assert curate("run", plan, "--out", out).stderr == "" and fingerprint(out) == before
    refused = curate("run", plan, "--out", out, "--recipe", "laion", check=False)
    assert refused.returncode == 2 and "--overwrite" in refused.stderr
    curate("run", plan, "--out", out, "--set", "select.n=50", "--overwrite")
    after = fingerprint(out)
    assert {name for name in before if before[name] != after.get(name)} >= {"out/selection/funnel.json"}
    assert all(after[name] == before[name] for name in before if name.startswith(("out/embeddings", "out/clusters")))


def test_settings_and_tables_are_checked_before_anything_runs(plan, tmp_path):
    for setting, word in [
        ("embed.modle=x", "did you mean 'model'"),
        ("cluster.k=many", "cluster.k='many' is not a whole number"),
        ("sellect.n=3", "did you mean 'select'"),
        ("data.evil=x", "did you mean 'eval'"),
        ("select=3", "select is 3, not a table"),
        ("embed=[{model='x'}]", "not a table"),
        ("select.n=0", "expected a number of rows"),
        ("select.recipe=bunni", "did you mean 'bunny'"),
        ("select.compare=bunny", "is not a list"),
        ("select.compare=['bunni']", "did you mean 'bunny'"),
        ("emit.also=['key']", "did you mean 'keys'"),
        ("import.layout=npy", "[import] needs source"),
        ("emit.also=[1]", "is not a list of strings"),
        ("select.compare=[1]", "is not a list of strings"),
        ("data.align=5", "data.align=5 is not a string"),
    ]:
        with pytest.raises(UsageError, match=re.escape(word)):
            pipeline.load(str(plan), None, settings=[setting])
    steps = tmp_path / "steps.toml"
    steps.write_text(TABLES.replace('recipe = "balanced"\nn = 100', "steps = ['rnak(clip_score, 0, 1)']"))
    with pytest.raises(UsageError, match="did you mean 'rank'"):
        pipeline.load(str(steps), None)


def test_the_mix_and_the_trainers_tables_are_checked_too():
    for setting, word in [("mix.shufle=true", "did you mean 'shuffle'"), ("mix.sources.text.cap=-1", "negative")]:
        with pytest.raises(UsageError, match=word):
            pipeline.load("demo", None, settings=[setting])
    plan = pipeline.load("demo", None, settings=["align.lrr=1"])
    pipeline.check_trainer(plan, "coreset")  # none of its stages, so none of its business
    with pytest.raises(UsageError, match="did you mean 'lr'"):
        pipeline.check_trainer(plan)


def test_a_pipeline_without_the_stages_asked_for_says_which_it_has():
    with pytest.raises(UsageError, match="mix_665k.toml has no stage to run for coreset; it has mix"):
        pipeline.load("mix_665k", None).stages("coreset")


def test_the_dry_run_goes_on_where_a_model_is_not_there_yet(demo, tmp_path):
    words = [
        "--pool",
        demo / "pool",
        "--set",
        f"embed.model=local-dir:{tmp_path}/clip",
        "--only",
        "coreset",
        "--dry-run",
    ]
    told = curate("run", "demo", "--out", tmp_path / "out", *words).stdout
    assert "time not known (the stage would fail: " in told and "no open_clip_config.json" in told
    assert "curate emit " in told and "in all, without what is not known" in told


def test_the_time_in_all_says_that_training_is_not_in_it(tmp_path, monkeypatch):
    monkeypatch.setattr(dry_run, "check_trainer", lambda *_: None)
    plan = pipeline.load("demo", str(tmp_path))
    assert " and training (" in list(dry_run.lines(plan, None))[-1]
    assert "training" not in list(dry_run.lines(plan, "coreset"))[-1]


def test_the_dry_run_of_a_mix_says_what_it_expects_and_what_is_missing():
    told = list(dry_run.lines(pipeline.load("mix_665k", "o", settings=["mix.seed=3"]), None))
    assert told[0].startswith("▸ curate mix ") and told[0].endswith("mix_665k.toml o/mix --set=mix.seed=3")
    assert "665,298 records expected; not there yet: data/llava_v1_5_mix665k.json, data/images" in told[1]


def test_a_pool_takes_the_place_of_the_demos():
    plan = pipeline.load("demo", None, pool="shards/")
    assert plan.pool == "shards/" and "demo" not in plan.tables and plan.stages("coreset")[0] == "embed"


def test_trainer_commands_carry_the_file_the_places_and_the_settings():
    plan = pipeline.load("demo", "there", settings=["align.lr=1e-3", "select.n=5"])
    words = pipeline.trainer_command(plan, "align")
    assert words[3:8] == ["align", "--data", "there/coreset", "--out", "there/align"]
    assert "--set=align.lr=1e-3" in words and not any("select.n" in word for word in words)
    assert ["--align", "there/align"] == pipeline.trainer_command(plan, "finetune")[8:10]


def test_benchmarks_are_asked_where_they_are_named():
    plan = pipeline.load("bunny", "o", settings=["data.eval_tasks=pope,gqa", "data.eval_root=e"])
    assert "eval" in plan.stages("train")
    assert pipeline.trainer_command(plan, "eval")[4:11] == [
        "o/model",
        "--tasks",
        "pope,gqa",
        "--eval-root",
        "e",
        "--out",
        "o/eval",
    ]
    assert "eval" not in pipeline.load("bunny", "o").stages("train")


def test_shown_commands_are_typed_as_they_are(plan):
    made = pipeline.load(
        str(plan), None, settings=["embed.faithful=true", "embed.verify=false", "embed.columns=['a', 'b']"]
    )
    shown = pipeline.shown_command(made, "embed")
    assert shown.endswith(" --faithful --columns=a,b")
    assert "compare" not in pipeline.shown_command(made, "select")


def test_a_pool_that_moved_is_emitted_from_where_it_is(tmp_path):
    write_pool(tmp_path / "pool", ["0"], 12)
    words = ["run", tmp_path / "mine.toml", "--out", tmp_path / "out", "--workers", 1]
    (tmp_path / "mine.toml").write_text(
        TABLES.replace("POOL", str(tmp_path / "pool")).replace("n = 100", "n = 3").replace("k = 12", "k = 1")
    )
    curate(*words)
    tars = {path.name: path.read_bytes() for path in (tmp_path / "out" / "coreset").glob("*.tar")}
    (tmp_path / "pool").rename(tmp_path / "moved")
    curate(*words, "--pool", tmp_path / "moved")
    shutil.rmtree(tmp_path / "out" / "coreset")
    curate(*words, "--pool", tmp_path / "moved")
    assert tars and {path.name: path.read_bytes() for path in (tmp_path / "out" / "coreset").glob("*.tar")} == tars


def test_what_a_verb_advises_is_written_as_a_setting():
    def refused(message, hint):
        raise UsageError(message, hint)
        yield

    for hint, told in (("--k 9", "--set cluster.k=9"), ("--caption-pick first", "--set cluster.caption_pick=first")):
        with pytest.raises(UsageError, match=f"^few rows.  hint: {told}$"):
            list(stages._hinting("cluster", refused("few rows.", hint)))
    with pytest.raises(UsageError, match="hint: --k 9 or so$"):
        list(stages._hinting("cluster", refused("few rows.", "--k 9 or so")))


def test_the_listing_names_every_shipped_pipeline():
    listed = dict(pipeline.listing())
    for path in (ROOT / "pipelines").glob("*.toml"):
        assert listed[path.stem] == tomllib.loads(path.read_text()).get("about", "")


def test_the_dry_run_reads_sizes_off_finished_embeddings_and_calibrates_what_follows(tmp_path):
    write_embeddings(tmp_path / "embeddings", write_pool(tmp_path / "pool", ["a", "b"], 30))
    (tmp_path / "p.toml").write_text(
        "[embed]\nmodel = 'x'\n[cluster]\nk = 4\n[select]\nsteps = ['sample(9)']\n[emit]\n"
    )
    plan = pipeline.load(str(tmp_path / "p.toml"), str(tmp_path), pool=str(tmp_path / "pool"))
    told = list(dry_run.lines(plan, "coreset"))
    assert told[1].strip().startswith("already finished")
    assert "60 rows · " in told[3] and "k = 4 by kmeans, calibrated: fit " in told[3]
    assert "60 rows · " in told[5] and "9 rows · " in told[7] and "core-hours" in told[-1]


@pytest.mark.parametrize("name", ["demo", "real", "bunny_695k", "ablation_mix", "ablation_stages"])
def test_the_mix_that_is_printed_is_the_one_that_is_made(tmp_path, name):
    settings = ["mix.text_share=0.25", "mix.sources.text.path=its own/2026"] if name == "real" else ["mix.seed=3"]
    plan = pipeline.load(name, str(tmp_path / "an out"), pool="p" if name == "real" else None, settings=settings)
    plans = [trial.plan for trial in arms.parse(plan).trials] if "ablation" in plan.tables else [plan]
    for plan in plans:
        curate_, verb, file, out, *flags = shlex.split(pipeline.shown_command(plan, "mix"))
        typed = {"mix": read_table(file)}
        for flag in flags:
            options.assign(typed, flag.removeprefix("--set="))
        assert (curate_, verb, out) == ("curate", "mix", plan.place("mix")) and typed["mix"] == plan.tables["mix"]


def test_the_dry_run_of_a_pool_that_is_not_there_ends_as_the_run_does(tmp_path):
    (tmp_path / "p.toml").write_text("[embed]\nmodel = 'x'\n[cluster]\n[select]\nsteps = ['sample(9)']\n[emit]\n")
    words = ["run", tmp_path / "p.toml", "--pool", tmp_path / "typo", "--out", tmp_path / "out"]
    told, ended = curate(*words, "--dry-run", check=False), curate(*words, check=False)
    assert "▸ curate emit" in told.stdout and told.returncode == ended.returncode == 2
    assert told.stderr == ended.stderr == f"error: {tmp_path}/typo does not exist\n"
    made = ["run", "demo", "--out", tmp_path / "demo", "--only"]
    assert curate(*made, "coreset", "--dry-run").stderr == ""  # its first stage makes the pool
    assert "demo/pool does not exist" in curate(*made, "embed", "--dry-run", check=False).stderr


@pytest.mark.parametrize("stages", ["[cluster]", "[select]\nrecipe = 'random'\n[emit]", "[emit]"])
def test_the_dry_run_of_an_import_does_not_need_every_stage(tmp_path, stages):
    (tmp_path / "p.toml").write_text(f"[import]\nsource = '{tmp_path}/npy'\nlayout = 'npy'\n{stages}\n")
    plan = pipeline.load(str(tmp_path / "p.toml"), str(tmp_path / "out"))
    with pytest.raises(UsageError, match="npy does not exist"):
        list(dry_run.lines(plan, None))
    (tmp_path / "npy").mkdir()
    told = list(dry_run.lines(plan, None))
    assert told[1::2] == ["    unknown until what it imports is there"] * (len(told) // 2)


@pytest.mark.parametrize(
    "select, rows, share",
    [
        ("n = 45", 45, "75 %"),
        ("n = '5%'", 3, "5 %"),
        ("n = 256_000", 60, "100 %"),
        ("steps = ['sample(9)']", 9, "15 %"),
        ("steps = ['dedup(0.9)', 'rank(clip_score, 0.25, 0.75)', 'cap(cluster, 9)']", 30, "50 %"),
        ("recipe = 'balanced'", 18, "30 %"),
        ("recipe = 'typical'", 9, "15 %"),
        ("recipe = 'bunny'", 2, "3.33 %"),
    ],
)
def test_the_dry_run_emits_as_many_rows_as_are_asked_for(tmp_path, select, rows, share):
    write_embeddings(tmp_path / "embeddings", write_pool(tmp_path / "pool", ["a", "b"], 30))
    (tmp_path / "p.toml").write_text(f"[embed]\nmodel = 'x'\n[cluster]\nk = 4\n[select]\n{select}\n[emit]\n")
    plan = pipeline.load(str(tmp_path / "p.toml"), str(tmp_path), pool=str(tmp_path / "pool"))
    told = list(dry_run.lines(plan, "coreset"))
    assert told[7].strip().startswith(f"{rows} rows · ") and told[7].endswith(f"(at {share} kept)")
