import html
import io
import json
import re
import shutil
import tomllib
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from artefacts import members, picture, write_clusters, write_embeddings, write_pool, write_selection
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from curate import naming
from curate.cluster.cluster import ClusterOptions, cluster
from curate.embed import images
from curate.embed.embed import EmbedOptions, embed
from curate.emit.emit import EmitOptions, emit
from curate.engine import Job
from curate.errors import UsageError
from curate.mix.mix import mix
from curate.report import charts, cluster_map, concepts, gallery, provenance, show, threshold_sliders
from curate.report.report import ReportOptions, discover, report
from curate.select.select import SelectOptions, select
from curate.storage import manifest, paths
from curate.storage.tar import TarWriter
from house import CLIP, ROOT, curate, fingerprint, parse

QUIET = Job(workers=1, quiet=True)
PAIRS = Path(__file__).parents[3] / "shared" / "data" / "pairs"
EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\u2028'\"&"


class Page(HTMLParser):
    """Collect what a browser would make of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.words, self.scripts = [], [], []
        self.inside = ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.inside = tag

    def handle_data(self, data):
        (self.scripts if self.inside == "script" else self.words).append(data)

    def handle_endtag(self, tag):
        self.inside = ""

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def make(
    tmp_path, *, caption=lambda row: f"a caption {row}", keep=lambda stem, row, key: row % 2 == 0 or "dedup(0.86)"
):
    pool = write_pool(tmp_path / "pool", ["00000", "00001"], 12, caption=caption)
    clu = write_clusters(tmp_path / "clusters", write_embeddings(tmp_path / "embeddings", pool))
    twins = {"000000001": ("000000000", 0.97), "000000015": ("000000000", 0.91), "000000003": ("gone", 0.9)}
    half = {"before": 24, "kept": 12, "dropped": 12}
    funnel = {
        "rows": 24, "kept": 12, "dropped": 12, "bad": 0, "statuses": {},
        "steps": [{"text": "dedup(0.86)", **half, "estimates": {"threshold": 0.86, "why": EVIL}}],
        "curves": {"dedup": {"threshold": [0.8, 0.9, 0.99], "kept": [5, 14, 24], "rows": 24}},
        "histograms": {"clip_score": {"edges": [0, 0.5, 1.0], "all": [20, 4], "kept": [8, 4]}},
    }  # fmt: skip
    sel = write_selection(tmp_path / "selection", clu, keep, funnel=funnel, twins=twins)
    emit(sel, str(tmp_path / "coreset"), EmitOptions(), QUIET)
    return tmp_path


def page(directory, out, **options):
    facts = report(str(directory), str(out), ReportOptions(**options), QUIET)
    text = Path(out).read_text("utf-8")
    assert facts["counts"]["bytes"] == len(text.encode()) < 20 << 20
    return text, Page(text)


def test_hostile_text_stays_text(tmp_path):
    folder = make(tmp_path, caption=lambda row: f"{row} {EVIL}")
    tar = folder / "pool" / "00000.tar"
    entries = members(tar)
    with open(tar, "wb") as file, TarWriter(file) as writer:
        for name, data in entries:
            writer.add(name.replace("000000004", 'k"><img src=x onerror=alert(3)>'), data)
    shutil.rmtree(folder / "embeddings"), shutil.rmtree(folder / "clusters"), shutil.rmtree(folder / "selection")
    shutil.rmtree(folder / "coreset")
    clu = write_clusters(folder / "clusters", write_embeddings(folder / "embeddings", str(folder / "pool")))
    step = f"dedup(0.86) {EVIL}"
    funnel = {
        "rows": 24,
        "kept": 12,
        "bad": 0,
        "steps": [{"text": step, "before": 24, "kept": 12, "dropped": 12, "estimates": {"why": EVIL}}],
    }
    funnel["curves"] = {"dedup": {"threshold": [0.9, 0.99], "kept": [5, 24], "rows": 24, "note": EVIL}}
    places = {"rows": 24, "names": [EVIL, "0.2"], "values": [0.1, 0.2], "kept": [20, 12], "low": 0, "high": None}
    funnel["cuts"] = [{"step": 0, "column": EVIL, "kind": "above", **places}]
    funnel["histograms"] = {EVIL: {"edges": [0, 0.5, 1.0], "all": [20, 4], "kept": [8, 4]}}
    write_selection(
        folder / "selection", clu, lambda stem, row, key: row % 2 == 0 or step, funnel=funnel, steps=(step,)
    )
    text, found = page(folder, tmp_path / "r.html", title=EVIL)
    assert len(found.all("script")) == 2 and len(re.findall("<script", text)) == 2
    assert not any(name.startswith("on") for _, attributes in found.tags for name in attributes)
    assert all(attributes["src"].startswith("data:image/jpeg;base64,") for attributes in found.all("img"))
    assert not any(tag == "img" and "x" == attributes.get("src") for tag, attributes in found.tags)
    assert all(attributes["href"].startswith(("#", "data:text/csv;")) for attributes in found.all("a"))
    assert not found.all("link") and not found.all("iframe")
    words = "".join(found.words)
    assert "alert(1)" in words and 'k"><img src=x onerror=alert(3)>' in words
    json.loads(found.scripts[0])
    policy = next(a["content"] for a in found.all("meta") if "content" in a and "default-src" in a["content"])
    assert "default-src 'none'" in policy and "script-src 'sha256-" in policy


def test_the_page_tells_the_funnel_and_shows_twins_side_by_side(tmp_path):
    text, found = page(make(tmp_path), tmp_path / "report.html")
    words = " ".join("".join(found.words).split())
    for said in ("24", "−12 (50.0 %)", "dedup(0.86)", "linked at 0.9700", "curate emit selection coreset"):
        assert said in words, said
    assert len(found.all("img")) >= 24 and len([a for a in found.all("li") if a.get("class") == "pair"]) == 2
    assert {a["href"][1:] for a in found.all("a") if "download" not in a} <= {a.get("id") for _, a in found.tags}
    again, _ = page(tmp_path, tmp_path / "report.html")
    assert again == text


@pytest.mark.parametrize(
    "name, expected",
    [("selection", "funnel"), ("coreset", "funnel"), ("clusters", "clusters"), ("embeddings", "scores")],
)
def test_any_directory_has_its_page(tmp_path, name, expected):
    text, found = page(make(tmp_path) / name, tmp_path / "r.html")
    assert {expected, "kept", "provenance"} <= {a.get("id") for a in found.all("section")}
    selected = expected == "funnel"
    assert ('class="tag">kept' in text) == ('id="cuts-data"' in text) == selected
    assert ("What is in it" in text) == (not selected)


def test_a_mix_and_a_training_run_are_shown(tmp_path):
    make(tmp_path)
    mix({"sources": {"coreset": {"path": str(tmp_path / "coreset")}}}, str(tmp_path / "mix"), QUIET)
    (tmp_path / "align").mkdir()
    rows = [{"step": step, "loss": 3 / step} for step in range(1, 1000)]
    (tmp_path / "align" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"torn": ')
    _, found = page(tmp_path, tmp_path / "r.html")
    assert {"mix", "training"} <= {a.get("id") for a in found.all("section")}
    _, found = page(tmp_path / "mix", tmp_path / "m.html")
    assert "100.0 %" in " ".join("".join(found.words).split())
    with pytest.raises(UsageError, match="nothing that curate made"):
        report(str(tmp_path / "pool"), str(tmp_path / "x.html"), ReportOptions(), QUIET)


def test_the_commands_on_the_page_are_commands(tmp_path):
    home = tmp_path / "out"
    emb = write_embeddings(home / "embeddings", write_pool(home / "pool", ["a"], 40))
    cluster(emb, str(home / "clusters"), ClusterOptions(k=2), QUIET)
    curate("select", home / "clusters", home / "selection", "--step", "sample(30)")
    emit(str(home / "selection"), str(home / "coreset"), EmitOptions(), QUIET)
    turns = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because."}]
    (home / "text.json").write_text(json.dumps([{"id": str(i), "conversations": turns} for i in range(9)]))
    table = {"text_share": 0.5, "total": 20, "sources": {"a": {"path": str(home / "coreset"), "cap": 30}}}
    table["sources"]["b"] = {"path": str(home / "text.json"), "repeat": 2}
    mix(table, str(home / "mix"), QUIET)
    text, found = page(home, home / "r.html")
    lines = [html.unescape(line) for line in re.findall(r"<pre>((?:curate|python) .*?)</pre>", text, flags=re.S)]
    assert [parse(line)[0] for line in lines] == ["embed", "cluster", "select", "emit", "mix"]
    log = home / "selection" / "log.jsonl"
    assert "Ü" not in text and log.write_text(log.read_text().replace("sample(30)", "sample(30)\\udcc3\\udc9c"))
    assert "sample(30)Ü" in page(home, home / "r2.html")[0]  # as LC_ALL=C without UTF-8 has an umlaut in what is typed
    typed = [html.unescape(line) for line in re.findall(r'<pre class="typed">(.*?)</pre>', text, flags=re.S)]
    assert typed == [f"curate select {home}/clusters {home}/selection --step 'sample(30)'"]
    [toml] = [html.unescape(t) for t in re.findall(r"TABLE.toml</summary><pre>(.*?)</pre>", text, flags=re.S)]
    read = tomllib.loads(toml)["mix"]
    assert read["sources"]["a"] == {"path": "coreset", "cap": 30} and read["sources"]["b"]["repeat"] == 2
    (home / "table.toml").write_text(toml)
    curate("mix", "table.toml", "again", cwd=home)
    assert fingerprint(home / "again") == {k.replace("mix/", "again/"): v for k, v in fingerprint(home / "mix").items()}


def test_a_training_run_is_told_with_its_configuration(tmp_path):
    import dataclasses

    from train import config

    given = config.load(None, ["model.tower=local-dir:models/tower", "model.lm=hub/lm", "finetune.lr=3e-5"])
    model = dataclasses.asdict(given.model) | {"tower": "local-dir:../../models/tower"}
    request = {"command": "finetune", "inputs": {"data": "../mix", "align": "../align"}}
    request |= {"model": model, "stage": dataclasses.asdict(given.finetune)}
    (tmp_path / "out" / "tuned").mkdir(parents=True)
    (tmp_path / "out" / "tuned" / "metrics.jsonl").write_text('{"step": 1, "loss": 2}\n{"step": 2, "loss": 1}\n')
    (tmp_path / "out" / "tuned" / "manifest.json").write_text(json.dumps({"request": request, "result": {}}))
    text, _ = page(tmp_path / "out", tmp_path / "r.html")
    [line] = [html.unescape(line) for line in re.findall(r"<pre>(python .*?)</pre>", text)]
    verb, asked = parse(line)
    assert verb == "finetune" and str(asked["align"]) == "out/align" and asked["config"] == "tuned.toml"
    [toml] = [html.unescape(t) for t in re.findall(r"tuned.toml</summary><pre>(.*?)</pre>", text, flags=re.S)]
    (tmp_path / "tuned.toml").write_text(toml)
    assert config.load(str(tmp_path / "tuned.toml")) == given


def test_a_local_model_is_named_by_its_place_as_seen_from_the_page(tmp_path, monkeypatch):
    pool = write_pool(tmp_path / "pool", ["a"], 12)
    made = embed(pool, str(tmp_path / "embeddings"), EmbedOptions(CLIP), QUIET)
    text, _ = page(tmp_path, tmp_path / "r.html")
    verb, asked = parse(html.unescape(re.search(r"<pre>(curate embed .*?)</pre>", text)[1]))
    assert verb == "embed" and asked["model"].startswith("local-dir:..")
    monkeypatch.chdir(tmp_path)
    options = EmbedOptions(*(asked[name] for name in ("model", "pretrained", "precision", "batch_size")))
    assert embed(asked["pool"], asked["out"], options, QUIET) == made  # it is the same request: nothing to do


def test_a_demos_recipes_are_judged_by_its_truth(tmp_path):
    clu = write_clusters(tmp_path / "clu", write_embeddings(tmp_path / "emb", write_pool(tmp_path / "pool", ["a"], 20)))
    facts = {"steps": ("sample(4)",), "funnel": {"rows": 20, "kept": 4, "steps": []}}
    for name in ("selection", "selection-random"):
        write_selection(tmp_path / name, clu, lambda stem, row, key: row % 5 == 0 or "sample(4)", **facts)
    copies, concepts = {"extra_planted": 11, "extra_kept": 2}, {"before": 7, "after": 3}
    judged = {"right_share": 0.5, "concepts": concepts, "duplicates": copies}
    (tmp_path / "judgement.json").write_text(json.dumps({"steps": judged}))
    _, found = page(tmp_path, tmp_path / "r.html")
    words = " ".join("".join(found.words).split())
    assert "7 concepts, 11 extra copies" in words and "selection450.0 %32sample(4)" in words


@given(rows=st.integers(1, 10**9), data=st.data())
def test_a_share_is_written_shortly_and_means_the_same_number_of_rows(rows, data):
    share = data.draw(st.integers(0, rows)) / rows
    short = threshold_sliders._share(repr(share), rows)
    assert round(float(short) * rows) == round(share * rows) and len(short) <= len(repr(round(share, 10))) + 2


def test_without_its_pool_the_page_says_so(tmp_path):
    make(tmp_path)
    (tmp_path / "pool").rename(tmp_path / "elsewhere")
    _, found = page(tmp_path / "selection", tmp_path / "r.html")
    assert not found.all("img") and "no pictures" in "".join(found.words)


def example_of_the_readme():
    text = (ROOT / "curate" / "README.md").read_text().split("### ablations")[1]
    return json.loads(re.search(r"```json\n(.*?)```", text, flags=re.S)[1])


def test_an_ablation_has_its_tables_intervals_and_claims(tmp_path):
    found = example_of_the_readme()
    found["about"] = found["summary"][0]["arm"]["pool"] = found["failed"][0]["error"] = EVIL
    found["bars"].append({**found["bars"][0], "claim": EVIL, "met": False, "t": None, "p": None, "sd": None})
    found["summary"].append({"arm": {"pool": "dirty", "recipe": "random"}, "measure": "caption", "n": 1, "mean": 0.21})
    (tmp_path / "ablation.json").write_text(json.dumps(found))
    text, page_ = page(tmp_path, tmp_path / "r.html")
    words = " ".join("".join(page_.words).split())
    for said in ("on dirty pools balanced beats random", "▲ +14.0", "+5.0 to +23.0", "alert(1)"):
        assert said in words, said
    assert len(re.findall("<script", text)) == 1 and 'class="interval better"' in text and "At a glance" not in words
    found["measures"]["kept"] = {"about": "rows", "better": "", "unit": "count"}
    found["summary"].append({"arm": {"pool": "dirty", "recipe": "random"}, "measure": "kept", "n": 1, "mean": 270})
    (tmp_path / "ablation.json").write_text(json.dumps(found))
    options = {"axes": {"recipe": {"balanced": {"select": {"steps": ["top(3)", "sample(2)"], "n": 30}}, EVIL: {}}}}
    (tmp_path / "manifest.json").write_text(json.dumps({"command": "ablation", "options": options}))
    text, page_ = page(tmp_path, tmp_path / "r.html")
    words = " ".join("".join(page_.words).split())
    assert "recipebalancedselect.steps=top(3) → sample(2)select.n=30" in words and len(re.findall("<script", text)) == 1
    assert "At a glance" in words and "pool dirtycaption, %kept random 21.0 270" in words and "▲ 35.0–" in words


def test_a_sweep_of_budgets_is_drawn_over_its_scale(tmp_path):
    found = example_of_the_readme()
    found["axes"], found["mixtures"] = {"n": ["1%", "10%", "50%"], "recipe": ["random", "balanced"]}, []
    found["summary"] = [
        {"arm": {"n": n, "recipe": recipe}, "measure": "caption", "n": 2, "mean": 0.1 * place, "sd": 0.01}
        for place, n in enumerate(found["axes"]["n"], 1)
        for recipe in found["axes"]["recipe"]
    ]
    (tmp_path / "ablation.json").write_text(json.dumps(found))
    text, found_page = page(tmp_path, tmp_path / "r.html")
    assert text.count('<polyline class="line c') == 2 and "caption, in percent, by n" in "".join(found_page.words)
    assert all(f'class="tick">{n}</text>' in text for n in ("1%", "10%", "50%")) and 'class="num">30</text>' in text


def test_phrases_are_counted_as_a_slow_count_does():
    rng = np.random.default_rng(0)
    words = ["red", "blue", "cat", "dog", "the", "of"]
    captions = [(" ".join(rng.choice(words, 5)), bool(rng.random() < 0.3)) for _ in range(400)]
    found = concepts.compare(captions)
    assert found["captions"] == 400 and found["kept"] == sum(kept for _, kept in captions)
    for shares in (*found["frequent"], *found["gained"], *found["lost"]):
        holds = [f" {shares.phrase} " in f" {caption} " for caption, _ in captions]
        assert shares.pool == sum(holds)
        assert shares.kept == sum(h and kept for h, (_, kept) in zip(holds, captions, strict=True))
        assert not set(shares.phrase.split()) & {"the", "of"}
    assert {"red", "blue", "cat", "dog"} <= {shares.phrase for shares in found["frequent"]}
    assert all(shares.kept_share > shares.pool_share for shares in found["gained"])
    assert concepts.compare([("a cat", False)]) is None
    many = [(f"w{chr(97 + i % 26)}{chr(97 + i // 26)} cat", i % 2 == 0) for i in range(600)]
    assert concepts.compare(many)["frequent"][0].phrase == "cat"


def test_rare_phrases_are_forgotten_before_they_fill_the_memory(monkeypatch):
    monkeypatch.setattr(naming, "MAX_PHRASES", 100)
    letters = "abcdefghij"
    captions = [(f"cat x{a}{b}{c}", True) for a in letters for b in letters for c in letters]
    [first, *rest] = concepts.compare(captions)["frequent"]
    assert (first.phrase, first.pool, rest) == ("cat", 1000, [])
    early = [("dog", True), *captions[:200], *[("dog", True)] * 9]  # the first is forgotten, in both counts
    assert [(s.pool, s.kept) for s in concepts.compare(early)["frequent"] if s.phrase == "dog"] == [(9, 9)]


def test_the_map_shows_the_plane_of_greatest_variance():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(50, 6)) * [1, 9, 0.1, 4, 0.1, 0.1]
    weights = np.ones(50)
    where = cluster_map.project(x, weights)
    centred = x - x.mean(0)
    left, singular, _ = np.linalg.svd(centred, full_matrices=False)
    np.testing.assert_allclose(np.abs(where), np.abs(left * singular)[:, :2], rtol=1e-6, atol=1e-9)
    assert cluster_map.project(np.ones((4, 1)), np.ones(4)).shape == (4, 2)
    assert cluster_map.even_number(np.array([5, 5, 0])) == pytest.approx(2)


def test_very_many_clusters_are_drawn_in_a_bounded_map(tmp_path, monkeypatch):
    monkeypatch.setattr(cluster_map, "MAX_SPOTS", 4)
    emb = write_embeddings(tmp_path / "emb", write_pool(tmp_path / "pool", ["a", "b"], 60), dim=3)
    cluster(emb, str(tmp_path / "clu"), ClusterOptions(k=12), QUIET)
    select(str(tmp_path / "clu"), str(tmp_path / "sel"), SelectOptions(steps=("sample(30)",)), QUIET)
    made = cluster_map.section(*(manifest.open_input(str(tmp_path / name)) for name in ("clu", "sel")))
    assert made["map"].count("<circle") == made["drawn"] == 4
    _, found = page(tmp_path / "sel", tmp_path / "r.html")
    assert "4 of 12 clusters are drawn" in " ".join("".join(found.words).split())
    monkeypatch.setattr(cluster_map, "MAX_ROWS", 60)
    made = cluster_map.section(*(manifest.open_input(str(tmp_path / name)) for name in ("clu", "sel")))
    assert made["counted"] == (1, 2)


def test_a_page_stays_small_however_large_its_pictures(tmp_path, monkeypatch):
    monkeypatch.setattr(gallery, "MAX_BYTES", 5000)
    text, found = page(make(tmp_path), tmp_path / "r.html")
    assert 0 < sum(len(a["src"]) for a in found.all("img")) < 5000 + 2 * 20_000


def test_thumbnails_are_small_and_bombs_are_refused():
    assert len(gallery.thumbnail(picture(1, side=400))) < 20_000
    for mode in ("P", "LA", "CMYK", "1", "I;16"):
        buffer = io.BytesIO()
        Image.new(mode, (30, 20)).save(buffer, "TIFF")
        assert gallery.thumbnail(buffer.getvalue()).startswith("data:image/jpeg")
    bomb = io.BytesIO()
    Image.new("1", (20_000, 3_000)).save(bomb, "PNG")
    for bad in (bomb.getvalue(), b"", b"GIF89a", picture(1)[:100]):
        with pytest.raises(images.BadImage):
            gallery.thumbnail(bad)


def test_charts_hold_up_on_the_edges():
    for counts in ([0, 0], [1, 0], [0, 10**12]):
        for window in (charts.Window(None, None, "<b>"), charts.Window(9, -9, "c", "<d>")):
            drawn = charts.histogram([0.5, 0.5, 0.5], counts, counts, "<x>", window)
            assert "nan" not in drawn and not any(f"<{letter}>" in drawn for letter in "xbd")
    line = charts.Line("<l>", [1], [1], "kept")
    for log in (False, True):
        drawn = charts.curves([line], "<c>", log_x=log, log_y=log, window=charts.Window(7, None, "<b>"))
        assert "nan" not in drawn and "<l>" not in drawn and "<c>" not in drawn
    for low, high in ((30, 330), (7, 7), (1, 5e6), (0.01, 0.5)):
        ticks = charts.Axis(low, high, 0, 1, log=True).ticks(5)
        assert len(ticks) <= 5 and all(low - 1e-9 <= tick <= high + 1e-9 for tick in ticks) and (ticks or low == high)
    for low, high in ((0, 1), (-3, 2e9), (0.9997, 1), (5, 5)):
        ticks = charts.Axis(low, high, 0, 1).ticks(5)
        assert 1 <= len(ticks) <= 6 and all(low - 1e-9 <= tick <= high + 1e-9 for tick in ticks)


@pytest.mark.realdata
@pytest.mark.skipif(not PAIRS.is_dir(), reason="the real pairs are not at hand")
def test_real_pairs_make_a_page_with_their_pictures(tmp_path):
    emb = write_embeddings(tmp_path / "emb", str(PAIRS / "0000[01].tar"))
    cluster(emb, str(tmp_path / "clu"), ClusterOptions(k=8), QUIET)
    select(
        str(tmp_path / "clu"),
        str(tmp_path / "sel"),
        SelectOptions(steps=("dedup(0.9)", "rank(clip_score, 0.2, 0.6)", "sample(100)")),
        QUIET,
    )
    _, found = page(tmp_path / "sel", tmp_path / "r.html")
    assert len(found.all("img")) > 100 and np.isfinite(len(found.words))


@pytest.mark.parametrize(
    "step", ["dedup(0.95)", 'dedup("auto")', 'dedup(0.9, keep="near")', 'dedup(0.9, rule="greedy")']
)
@pytest.mark.parametrize("first", [True, False])
def test_dedups_threshold_is_told_as_select_would_come_to_it(tmp_path, step, first):
    emb = write_embeddings(tmp_path / "emb", write_pool(tmp_path / "pool", ["a"], 120), dim=3)
    cluster(emb, str(tmp_path / "clu"), ClusterOptions(k=2), QUIET)
    steps = (step, "sample(9)") if first else ("sample(100)", step)
    select(str(tmp_path / "clu"), str(tmp_path / "sel"), SelectOptions(steps=steps), QUIET)
    funnel = manifest.load_json(str(tmp_path / "sel" / "funnel.json"))
    control = next(figure["control"] for figure in threshold_sliders.figures(funnel))
    again = [
        *control["before"],
        control["head"] + control["names"][control["high"]] + control["tail"],
        *control["after"],
    ]
    select(str(tmp_path / "clu"), str(tmp_path / "again"), SelectOptions(steps=tuple(again)), QUIET)
    found = manifest.load_json(str(tmp_path / "again" / "funnel.json"))
    assert found["steps"][0]["kept"] == control["stay"]
    [its] = [s for s in funnel["steps"] if s["text"] == step]
    assert bool(control["note"]) == (control["step"] is not None and its["kept"] != control["stay"])


@pytest.mark.parametrize("name", ["pool", "embeddings", "selection"])
def test_what_is_looked_at_does_not_grow_with_the_number_of_shards(tmp_path, monkeypatch, name):
    asked = []
    exists = paths.exists
    monkeypatch.setattr(paths, "exists", lambda place: asked.append(place) or exists(place))
    counts = []
    for number in (3, 30):
        home = tmp_path / str(number)
        pool = write_pool(home / "pool", [f"{shard:03d}" for shard in range(number)], 2)
        emb = write_embeddings(home / "embeddings", pool)
        write_selection(home / "selection", write_clusters(home / "clusters", emb), lambda stem, row, key: True)
        asked.clear()
        discover(str(home))
        list(show.show(str(home)))
        list(show.show(str(home / name)))
        counts.append(len(asked))
    assert counts[0] == counts[1]
    artefact = manifest.open_input(str(home / "selection"))
    assert artefact.rows is artefact.rows and artefact.stems is artefact.stems  # asked for once per shard


def test_what_a_step_reads_is_named_as_seen_from_the_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_embeddings(tmp_path / "emb", write_pool(tmp_path / "pool", ["a"], 9))
    write_embeddings(tmp_path / "asked" / "b", write_pool(tmp_path / "pool_b", ["b"], 3))
    select("emb", "sel", SelectOptions(steps=("exclude('asked/b', 0.999)", "sample(3)")), QUIET)
    made = manifest.open_input("sel")
    assert made.manifest["options"]["steps"][0] == "exclude('asked/b', 0.999)"  # the request is what was typed
    command = provenance.provenance(made, "pages/p.html")["command"]
    assert """'--step=exclude("../asked/b", 0.999)' '--step=sample(3)'""" in command
