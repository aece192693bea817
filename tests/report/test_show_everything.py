"""`curate show` and `curate report` end in words on whatever a verb or the trainer leaves, with any options."""

import html
import json
import random
import re
import shlex

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from artefacts import write_embeddings, write_pool
from test_layouts import write_source
from test_pack import write_files

from curate.cluster.cluster import ClusterOptions, cluster
from curate.demo.render import DemoOptions, render_demo
from curate.embed.embed import EmbedOptions, embed
from curate.emit.emit import EmitOptions, emit
from curate.emit.options import FORMATS
from curate.engine import Job
from curate.errors import CurateError
from curate.ingest.pack import PackOptions, pack
from curate.ingest.published import ImportOptions, import_layout
from curate.mix.mix import mix
from curate.report import sections, threshold_sliders
from curate.report.report import ReportOptions, report
from curate.report.show import funnel_lines, show
from curate.report.show_sample import facts_of, show_key
from curate.select import thresholds
from curate.select.recipes import RECIPES
from curate.select.select import SelectOptions, select
from house import CLIP, curate, fingerprint

QUIET = Job(workers=1, quiet=True)
STEPS = {
    "nothing": (),
    "sample": ("sample(5)",),
    "more than there are": ("sample(5_000)",),
    "dedup": ("dedup(0.9)", 'dedup("auto")', 'dedup(0.95, rule="greedy", keep="far")', "sample(9)"),
    "placeholders": ("placeholders(copies=2, captions=0.1, threshold=0.9)",),
    "bands": ("rank(clip_score, 0.2, 0.8)", "above(centroid_similarity, -1)", "top(caption_words, 50%)"),
    "groups": ("cap(host, 20)", 'balance(cluster, 20, keep="near", contradicting_last=True)', "balance(url, 10)"),
    "tree": ("balance_tree(12)",),
    "twice": ("sample(30)", "sample(30)"),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Every verb, with its variants, one directory each."""
    home = tmp_path_factory.mktemp("everything")

    def place(*names):
        return str(home.joinpath(*names))

    pool = write_pool(home / "pool", ["a", "b"], 30, caption=lambda row: f"a {('cat', 'car')[row % 2]} \x1b[1m{row}")
    (home / "one").mkdir()
    (home / "torn pool").mkdir()
    (home / "torn pool" / "a.tar").write_bytes((home / "pool" / "a.tar").read_bytes())
    (home / "torn pool" / "b.tar").write_bytes((home / "pool" / "b.tar").read_bytes()[:2000])
    embed(pool, place("embed"), EmbedOptions(CLIP, columns=("key",)), QUIET)
    embed(place("torn pool"), place("embed torn"), EmbedOptions(CLIP), QUIET)
    for layout in ("clip-retrieval", "datacomp", "nemo", "npy"):
        write_source(home / f"published {layout}", layout, [12, 20])
        import_layout(place(f"published {layout}"), place(f"import {layout}"), ImportOptions(layout), QUIET)
    pack(write_files(home / "files"), place("pack"), PackOptions(), QUIET)
    emb = write_embeddings(home / "embeddings", pool, dim=4)
    np.save(place("centroids.npy"), np.eye(4, dtype=np.float32)[:3])
    for name, options in {
        "cluster": ClusterOptions(k=3),
        "cluster one": ClusterOptions(k=1),
        "cluster given": ClusterOptions(centroids=place("centroids.npy")),
        "cluster two": ClusterOptions(k=4, neighbours=2, floor=0.5, sample=20, iters=1),
    }.items():
        cluster(emb, place(name), options, QUIET)
    for name, steps in STEPS.items():
        select(
            place("cluster"), place(f"select {name}"), SelectOptions(steps=steps or ("above(clip_score, -2)",)), QUIET
        )
    for name in RECIPES:
        try:
            select(place("cluster given"), place(f"recipe {name}"), SelectOptions(recipe=name, n=10), QUIET)
        except CurateError:  # it needs more rows, a target, or a library that is not here
            continue
    select(emb, place("select embeddings"), SelectOptions(steps=("sample(9)",)), QUIET)
    for kind in FORMATS:
        emit(place("select sample"), place(f"emit {kind}"), EmitOptions(format=kind, shard_size=2), QUIET)
    sources = {"a": {"path": place("emit webdataset")}, "b": {"path": place("emit llava")}}
    for name, table in {"mix": {"sources": sources}, "mix one": {"total": 3, "sources": {"a": sources["a"]}}}.items():
        mix(table, place(name), QUIET)
    write_what_is_asked_with_more_inputs(home, pool)
    render_demo(place("demo"), DemoOptions(rows=40, shards=2, instruct=10), QUIET)
    write_what_the_trainer_leaves(home)
    return home


def write_what_is_asked_with_more_inputs(home, pool):
    """Requests of which an option names a file, a model or fields, or is a flag."""
    from test_select import Trained

    from train.run.losses import SampleLosses

    (home / "published beside").mkdir()
    vectors = np.random.default_rng(0).normal(size=(32, 64)).astype(np.float16)
    keys = [f"{row:09d}" for row in range(32)]
    for name in ("x.npy", "x.text.npy"):
        np.save(home / "published beside" / name, vectors)
    pq.write_table(pa.table({"key": keys, "kind": ["photo"] * 32}), home / "published beside" / "x.parquet")
    joined = ImportOptions("npy", pool=pool, join="key", columns=("kind",))
    import_layout(str(home / "published beside"), str(home / "import joined"), joined, QUIET)
    (home / "captions.tsv").write_text("a caption\thttp://x/1\n")
    more = EmbedOptions(CLIP, faithful=True, captions=str(home / "captions.tsv"), caption="txt,url")
    embed(pool, str(home / "embed more"), more, QUIET)
    losses = SampleLosses(60)
    losses.loss[:] = np.arange(60) / 10
    losses.write(home / "losses", Trained([f"{row:09d}" for row in range(60)], [0, 30, 60], ("a", "b")))
    by_loss = SelectOptions(steps=("below(loss, 2)", "sample(4)"), seed=3, losses=str(home / "losses"))
    select(str(home / "cluster"), str(home / "select losses"), by_loss, QUIET)
    by_words = SelectOptions(steps=('above(prompt("a cat"), -1)',), model=CLIP)
    select(str(home / "import joined"), str(home / "select words"), by_words, QUIET)


def write_what_the_trainer_leaves(home):
    for name, lines in {
        "run": [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}],
        "run begun": [],
        "run without losses": [{"step": 1}],
        "run of nan": [{"step": 1, "loss": float("nan")}, {"step": 2, "loss": float("nan")}],
        "run of words": [{"step": "x", "loss": "y"}, [], 3],
    }.items():
        (home / name).mkdir()
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (home / name / "metrics.jsonl").write_text(text + '{"torn": ')
    (home / "run" / "manifest.json").write_text('{"request": {"command": "align"}, "result": {"skipped": {"x": 1}}}')
    for name, text in {"answers": '{"right": true}\n', "no answers": "", "odd answers": '{"right": 3}\n[]\n'}.items():
        (home / name).mkdir()
        (home / name / "answers.jsonl").write_text(text)
    for name, config in {"model": {"text_config": {"model_type": "phi"}}, "bare model": {}}.items():
        (home / name).mkdir()
        (home / name / "train_manifest.json").write_text("{}")
        (home / name / "config.json").write_text(json.dumps(config))
    (home / "half a model").mkdir()
    (home / "half a model" / "train_manifest.json").write_text("{}")
    (home / "begun").mkdir()
    (home / "begun" / ".plan.json").write_text('{"command": "embed"}')
    (home / "not ours").mkdir()
    (home / "not ours" / "manifest.json").write_text('["a list"]')
    (home / "another format").mkdir()
    (home / "another format" / "manifest.json").write_text('{"command": "embed", "format": 99}')
    (home / "empty").mkdir()


def refused(work):
    """Say in which words, if any, the work was refused: a user's mistake is answered by a CurateError alone."""
    try:
        work()
    except CurateError as error:
        return str(error)
    return ""


REFUSED = {
    "not ours",
    "another format",
    "empty",
    "half a model",
    "one",
    "centroids.npy",
    "captions.tsv",
    "import joined.columns",
}


def test_every_directory_is_shown_in_words(home):
    told = {}
    for path in sorted(home.iterdir()):
        lines = []
        words = refused(lambda path=path, lines=lines: lines.extend(show(str(path))))
        assert all("\n" not in line for line in lines)
        told[path.name] = words or "\n".join(lines)
        may_be_refused = path.name in REFUSED or path.name.startswith(("published", "files"))
        assert bool(lines) or may_be_refused, f"{path.name}: {words}"
    assert "given" in told["cluster given"] or "k = 3" in told["cluster given"] or "3" in told["cluster given"]
    assert sum(name.startswith("recipe") for name in told) >= 3 and len(told) > 40


def test_every_directory_tells_a_samples_story_or_says_why_not(home):
    for path in sorted(home.iterdir()):
        for key in ("000000003", "00003", "", "none such", "\x1b[31m"):
            words = refused(lambda path=path, key=key: list(show_key(str(path), key)))
            also = refused(lambda path=path, key=key: list(facts_of(str(path), key)))
            assert bool(words) == bool(also), (path.name, key, words, also)


def test_every_directory_has_its_page_or_says_why_not(home, tmp_path):
    for path in sorted(home.iterdir()):
        refused(lambda path=path: report(str(path), str(tmp_path / "page.html"), ReportOptions(), QUIET))
    words = refused(lambda: report(str(home), str(tmp_path / "page.html"), ReportOptions(), QUIET))
    assert "has format 99" in words  # of one of its directories


@pytest.mark.parametrize("seed", range(3))
def test_a_directory_with_a_part_missing_is_shown_or_refused_in_words(home, tmp_path, seed):
    """Files that a user, or a full disk, took away: one at random of a copy."""
    import shutil

    rng = random.Random(seed)
    names = [path.name for path in sorted(home.iterdir()) if path.is_dir() and path.name not in REFUSED]
    for name in rng.sample(names, 12):
        shutil.copytree(home / name, tmp_path / name, dirs_exist_ok=True)
        files = [path for path in sorted((tmp_path / name).rglob("*")) if path.is_file()]
        if files:
            rng.choice(files).unlink()
        refused(lambda name=name: list(show(str(tmp_path / name))))


ASKED = {
    "embed": ("embed", "--columns=key"),
    "embed more": ("embed", "--faithful", "--caption=txt,url", "--captions=captions.tsv"),
    "import joined": ("import", "--pool=pool", "--columns=kind"),
    "cluster given": ("cluster", "--centroids=centroids.npy"),
    "select losses": ("select", "--losses=losses"),
    "select words": ("select", "--model=local-dir:"),
    "emit llava": ("emit", "--format=llava"),
}


@pytest.mark.parametrize("name", ASKED)
def test_the_command_on_a_page_is_the_very_request(home, name):
    verb, *options = ASKED[name]
    page = home / "page.html"
    report(str(home / name), str(page), ReportOptions(), QUIET)
    text = page.read_text()
    page.unlink()
    lines = [html.unescape(line) for line in re.findall(r"<pre>(curate .*?)</pre>", text, flags=re.S)]
    [words] = [shlex.split(line) for line in lines if line.startswith(f"curate {verb} ")]
    assert all(any(word.startswith(option) for word in words) for option in options), words
    before = fingerprint(home / name)
    assert curate(*words[1:], cwd=home).returncode == 0
    assert fingerprint(home / name) == before
    if verb == "select":  # so does the command that a slider begins with
        cuts = json.loads(re.search(r'id="cuts-data">(.*?)</script>', text, flags=re.S)[1])
        assert all(any(word.startswith(option) for word in cuts["select"]) for option in options)


def test_a_page_about_the_folder_one_stands_in_has_its_name(home, tmp_path, monkeypatch):
    monkeypatch.chdir(home / "select sample")
    for typed in (".", "../select sample/", "./"):
        report(typed, str(tmp_path / "page.html"), ReportOptions(), QUIET)
        assert "<h1>select sample</h1>" in (tmp_path / "page.html").read_text()


def test_what_a_step_could_not_estimate_is_a_dash():
    funnel = {"rows": 3, "kept": 2, "steps": [{"text": "x", "before": 3, "kept": 2, "dropped": 1}]}
    funnel["steps"][0]["estimates"] = {"mean_link": None}
    assert any("mean link –" in line for line in funnel_lines(funnel))
    assert sections.funnel(funnel)["bars"][-1]["facts"] == [("mean link", "–")]


def test_the_pace_of_select_counts_the_rows_it_looked_at(home, tmp_path):
    told = curate("select", home / "cluster", tmp_path / "sel", "--step", "sample(5)").stderr
    assert re.search(r"1/1 steps  60 rows  [\d,]+ rows/s", told), told


def test_every_place_of_a_slider_can_be_typed(home, tmp_path):
    """A band that ends at the top alone would keep no row at its last place, which `rank` refuses."""
    table = thresholds.cut("top", {}, np.linspace(0, 1, 60, dtype=np.float32), 12)
    funnel = {"steps": [{"text": "top(clip_score, 12)"}], "cuts": [table | {"step": 0, "column": "clip_score"}]}
    funnel["histograms"] = {"clip_score": {"edges": [0.0, 1.0], "all": [60], "kept": [12]}}
    [cut] = [figure["control"] for figure in threshold_sliders.figures(funnel)]
    assert len(cut["names"]) == len(cut["values"]) == len(cut["kept"]) == thresholds.PLACES
    assert (cut["names"][cut["low"]], cut["kept"][cut["low"]]) == ("0.2", 12)
    steps = (cut["head"] + cut["names"][-1] + cut["tail"],)
    assert "selection is empty" in refused(
        lambda: select(str(home / "cluster"), str(tmp_path / "x"), SelectOptions(steps), QUIET)
    )


@pytest.mark.parametrize("before, why", [(20, "similar pixels"), (15, "the steps before it left")])
def test_why_dedup_kept_another_number_than_its_threshold(before, why):
    steps = [{"text": "sample(15)", "kept": before}, {"text": 'dedup("auto")', "before": before, "kept": 9}]
    curve = {"threshold": [0.8, 0.9], "kept": [5, 8], "rows": 20}
    [figure] = threshold_sliders.figures({"steps": steps, "curves": {"dedup": curve}})
    assert why in figure["control"]["note"]
