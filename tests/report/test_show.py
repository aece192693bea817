"""What `curate show` tells: one screen for every kind of directory, and the story of one sample."""

import gzip
import json
import os
import re
import shutil

import numpy as np
import pytest
from artefacts import write_clusters, write_embeddings, write_pool, write_selection

from curate.ask import stored
from curate.cluster.cluster import ClusterOptions, cluster
from curate.emit.emit import EmitOptions, emit
from curate.engine import Job
from curate.errors import ContractError, UsageError
from curate.mix.mix import mix
from curate.report import ablation_tables, show
from curate.report.show_sample import show_key
from curate.select.select import SelectOptions, select
from curate.storage.manifest import open_input
from house import ROOT, curate

QUIET = Job(workers=1, quiet=True)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("show")
    pool = write_pool(home / "pool", ["a", "b"], 30, caption=lambda row: f"row \x1b[31m{row}")
    cluster(write_embeddings(home / "embeddings", pool, dim=4), str(home / "clusters"), ClusterOptions(k=3), QUIET)
    steps = ("dedup(0.9)", "rank(clip_score, 0, 0.9)", "sample(12)")
    select(str(home / "clusters"), str(home / "selection"), SelectOptions(steps=steps), QUIET)
    emit(str(home / "selection"), str(home / "coreset"), EmitOptions(), QUIET)
    mix({"sources": {"coreset": {"path": str(home / "coreset")}}}, str(home / "mix"), QUIET)
    run = home / "align"
    run.mkdir()
    rows = [{"step": step, "loss": 3 / step, "tokens_per_s": 100.0} for step in range(1, 200)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    request = {"command": "align", "inputs": {"data": "../coreset"}, "model": {"tower": "clip", "lm": "phi"}}
    (run / "manifest.json").write_text(json.dumps({"request": request, "result": {"steps": 199}, "versions": {}}))
    (home / "eval").mkdir()
    answers = [{"task": "where", "right": i % 4 == 0} for i in range(40)]
    (home / "eval" / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
    (home / "ablation").mkdir()
    text = (ROOT / "curate" / "README.md").read_text().split("### ablations")[1]
    (home / "ablation" / ablation_tables.FILE).write_text(re.search(r"```json\n(.*?)```", text, flags=re.S)[1])
    return home


TOLD = {
    "embeddings": ["60 rows in 2 shards", "pool"],
    "clusters": ["k 3", "near-duplicate edges", "near pairs that were compared"],
    "selection": ["dedup(0.9)", "12", "clip_score", "▁", "made with", "from"],
    "coreset": ["12 written", "sample(12)"],
    "mix": ["coreset: 100.0% of samples, 100.0% of tokens", "text-only: 0.00%"],
    "align": ["finished", "tower clip", "loss 0.0151 at step 199", "--data ", "/coreset"],
    "eval": ["40 held-out questions, 25.0% of them right", "25.0%  where (40)"],
    "ablation": ["held      on dirty pools balanced beats random", "+14.00 %", "balanced       ▲ 35.0"],
    "pool": ["a pool of 2 tars", "a has 30 samples: 30 .jpg", "curate embed "],
    "": ["selection", "12 kept", "a training run, finished · loss 0.0151", "sample(12)"],
}


@pytest.mark.parametrize("name", TOLD)
def test_every_kind_of_directory_has_its_story_in_one_screen(home, name):
    lines = list(show.show(str(home / name).rstrip("/")))
    told = "\n".join(lines)
    assert all(part in told for part in TOLD[name]), told
    bare = [line.replace(str(home), "home").replace(os.path.relpath(home), "home") for line in lines]
    assert 2 <= len(lines) <= 40 and all(len(line) < 130 for line in bare)


def test_what_nobody_made_is_refused(home, tmp_path):
    with pytest.raises(UsageError, match="nothing that curate or train made, and no tars"):
        list(show.show(str(tmp_path)))
    with pytest.raises(UsageError, match="is not a directory"):
        list(show.show(str(tmp_path / "typo")))
    assert "a pool of 2 tars" in next(show.show(str(home / "pool" / "{a,b}.tar")))


@pytest.mark.parametrize("suffix", [".tar.gz", ".tgz", ".TAR"])
def test_a_pool_is_shown_whatever_its_tars_end_in(home, tmp_path, suffix):
    packed = (home / "pool" / "a.tar").read_bytes()
    (tmp_path / f"a{suffix}").write_bytes(packed if suffix == ".TAR" else gzip.compress(packed))
    for place in (tmp_path, tmp_path / f"a{suffix}"):
        assert "a has 30 samples: 30 .jpg" in " ".join(show.show(str(place)))


def test_no_life_is_told_where_rows_have_other_places_than_what_was_made_of_them(tmp_path):
    """A shard that begins three samples later by now: cluster and verdict would be those of other samples."""
    pool = write_pool(tmp_path / "pool", ["a"], 12)
    emb = write_embeddings(tmp_path / "embeddings", pool)
    clusters = write_clusters(tmp_path / "clusters", emb)
    write_selection(tmp_path / "sel", clusters, lambda stem, row, key: row > 5 or "sample(9)")
    assert list(show_key(str(tmp_path / "sel"), "000000003"))
    write_pool(tmp_path / "pool", ["a"], 12, first=3, extra={"more": "x" * 999})
    shutil.rmtree(emb)
    write_embeddings(tmp_path / "embeddings", pool)
    for made in ("sel", "clusters"):
        with pytest.raises(ContractError, match="clusters was made from another state of .*embeddings"):
            list(show_key(str(tmp_path / made), "000000003"))
    assert "row 0 of a" in next(show_key(emb, "000000003"))


def test_a_directory_of_which_a_part_is_done_says_so_and_why_shards_failed(home, tmp_path):
    out = str(tmp_path / "parts")
    told = curate("emit", home / "selection", out, "--shard-size", 4, "--slice", "0/2").stdout
    assert "this part is done, others are not (1 shard left: restart a part that died" in told
    told = list(show.show(out))
    assert "UNFINISHED, by `curate emit`" in told[0] and "2 shards" in told[1]
    source = tmp_path / "npy"
    source.mkdir()
    for stem in "abc":
        (source / f"{stem}.npy").write_bytes(b"no array")
    ended = curate("import", source, tmp_path / "torn", "--layout", "npy", "--slice", "0/2", check=False)
    assert ended.returncode == 1 and f"`curate show {tmp_path / 'torn'}` says why" in ended.stderr
    told = list(show.show(str(tmp_path / "torn")))
    assert [line.split(":")[0] for line in told[2:]] == ["  FAILED a", "  FAILED c"] and "0 shards" in told[1]
    curate("import", source, tmp_path / "torn", "--layout", "npy", check=False)
    assert [line.split(":")[0] for line in show.show(str(tmp_path)) if "FAILED" in line] == [
        f"  FAILED torn/{stem}" for stem in "abc"
    ]


def test_an_input_that_changed_is_warned_of(home, tmp_path):
    emb = write_embeddings(tmp_path / "emb", str(home / "pool"), dim=4)
    select(emb, str(tmp_path / "sel"), SelectOptions(steps=("sample(3)",)), QUIET)
    manifest = json.loads((tmp_path / "emb" / "manifest.json").read_text())
    (tmp_path / "emb" / "manifest.json").write_text(json.dumps({**manifest, "device": "another"}))
    assert any("WARNING" in line and "has changed since" in line for line in show.show(str(tmp_path / "sel")))


def test_the_story_of_a_sample_is_told_with_its_twin(home):
    import pyarrow as pa

    rows = pa.ipc.open_file(pa.memory_map(str(home / "selection" / "a.arrow"))).read_all().to_pylist()
    dropped = next(row for row in rows if row["dropped_by"] == "dedup(0.9)")
    told = "\n".join(show_key(str(home / "coreset"), dropped["key"]))
    parts = ["of a", "24 × 24 px", "above about", "in cluster", "dropped by dedup(0.9), step 1 of 3", "emitted    no"]
    assert all(part in told for part in [*parts, f"twin       {dropped['twin']}", "cosine 0."]), told
    kept = next(row for row in rows if row["kept"])
    told = "\n".join(show_key(str(home / "coreset"), kept["key"]))
    assert "kept by all 3 steps" in told and f"emitted    as {kept['key']}, in shard 000000" in told
    with pytest.raises(UsageError, match="no sample has the key"):
        list(show_key(str(home / "coreset"), "none such"))


def test_a_pipelines_directory_knows_its_samples_and_tells_them_as_data(home):
    [line] = curate("show", home, "--key", "000000003", "--json").stdout.splitlines()
    facts = json.loads(line)
    assert (facts["key"], facts["stem"], facts["row"]) == ("000000003", "a", 3) and "image_embedding" not in facts
    assert facts["kept"] == (facts["dropped_by"] is None) and list(show_key(str(home), "000000003"))


def test_a_caption_cannot_command_the_terminal(home):
    told = curate("show", home / "selection", "--key", "000000003").stdout
    assert "row �[31m3" in told and "\x1b" not in told


def test_blocks_keep_the_proportions():
    assert show.sparkline([0, 1, 8, 4]) == " ▁█▄" and show.sparkline([]) == "" and show.sparkline([0, 0]) == "  "
    assert len(show.sparkline(range(1000))) <= 30


def test_columns_stored_beside_embeddings_are_described(tmp_path):
    write_embeddings(tmp_path / "emb", write_pool(tmp_path / "pool", ["a"], 6))
    stored.stored_array(open_input(str(tmp_path / "emb")), {"prompt": ["a ü"]}, lambda: np.zeros(6, np.float32))
    first, line = show.show(str(tmp_path / "emb.columns") + "/")
    assert "1 stored array " in first and line == '  6 rows · prompt ["a ü"]'
    (tmp_path / "no.columns").mkdir()
    with pytest.raises(UsageError, match="holds nothing"):
        list(show.show(str(tmp_path / "no.columns")))
