"""Every option of every verb as it is typed, over a world of a few dozen pictures: it is taken, and it has its effect.

tests/test_every_option.py says which are typed nowhere. Verbs run in this process, through the program's own parser.
"""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny_clip
from artefacts import picture, write_pool

from curate.cli import app
from house import manifest


@pytest.fixture
def call(capsys):
    def run(*words):
        code = app([str(word) for word in words], standalone_mode=False)
        return code or 0, capsys.readouterr().out

    return run


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A pool of 30 rows, a tiny CLIP, embeddings, clusters and a selection."""
    home = tmp_path_factory.mktemp("typed")
    write_pool(home / "pool", ["a", "b"], 15, extra={"score": 3})
    model = tiny_clip.write(home / "model")
    for words in (
        ["embed", home / "pool", home / "emb", "--model", model],
        ["cluster", home / "emb", home / "clu", "--k", 3],
        ["select", home / "clu", home / "sel", "--step", "sample(12)"],
    ):
        app([str(word) for word in words], standalone_mode=False)
    return home


def test_embed(home, call, tmp_path):
    (tmp_path / "captions.tsv").write_text("a caption\thttp://x/0\n")
    words = ["embed", home / "pool", tmp_path / "emb", "--model", f"local-dir:{home / 'model'}", "--pretrained", ""]
    words = [*words, "--precision", "fp32", "--batch-size", 4, "--decoders", 1, "--columns", "score"]
    words = [*words, "--decode", "fast"]
    words = [*words, "--captions", tmp_path / "captions.tsv", "--seed", 1, "--workers", 1, "--engine", "local"]
    code, out = call(*words, "--dry-run")
    assert code == 0 and "would write" in out and not (tmp_path / "emb").exists()
    assert call(*words, "--slice", "0/2", "--json")[0] == 0 and not (tmp_path / "emb" / "manifest.json").exists()
    code, out = call(*words, "--slice", "1/2", "--json", "--verbose")
    options = json.loads(out)["options"]
    assert code == 0 and (options["precision"], options["batch_size"]) == ("fp32", 4)
    assert list(options["columns"]) == ["score"]
    words[words.index("--decoders") + 1] = 0
    words[words.index("--batch-size") + 1] = 8
    assert call(*words, "--overwrite")[0] == 0 and manifest(tmp_path / "emb")["options"]["batch_size"] == 8


def test_cluster(home, call, tmp_path):
    words = ["cluster", home / "emb", tmp_path / "clu", "--k", 4, "--iters", 3, "--sample", 20, "--neighbours", 2]
    words = [*words, "--floor", 0.5, "--seed", 7, "--workers", 1, "--engine", "local", "--json", "--verbose"]
    assert call(*words, "--dry-run")[0] == 0 and not (tmp_path / "clu").exists()
    code, out = call(*words, "--slice", "0/1")
    made = json.loads(out)["options"]
    assert code == 0 and made | {"k": 4, "iters": 3, "sample": 20, "neighbours": 2, "floor": 0.5, "seed": 7} == made
    words[words.index("--iters") + 1] = 2
    assert call(*words, "--overwrite")[0] == 0
    given = ["cluster", home / "emb", tmp_path / "given", "--centroids", tmp_path / "clu" / "centroids.npy"]
    assert call(*given)[0] == 0 and manifest(tmp_path / "given")["options"]["k"] == 4
    assert call(*given)[0] == 0, "finished is finished"


def test_select(home, call, tmp_path):
    words = ["select", home / "clu", tmp_path / "sel", "--recipe", "random", "--n", "40%", "--seed", 3, "--json"]
    words = [*words, "--workers", 1, "--engine", "local", "--verbose"]
    assert call(*words, "--dry-run")[0] == 0 and not (tmp_path / "sel").exists()
    code, out = call(*words)
    assert code == 0 and json.loads(out)["counts"]["kept"] == 12
    words[words.index("--n") + 1] = "50%"
    assert call(*words, "--overwrite")[0] == 0 and manifest(tmp_path / "sel")["counts"]["kept"] == 15


def test_emit(home, call, tmp_path):
    words = ["emit", home / "sel", tmp_path / "out", "--format", "llava", "--prompt", "What is it?", "--shard-size", 5]
    words = [*words, "--pool", home / "pool", "--workers", 1, "--engine", "local", "--seed", 2, "--json", "--verbose"]
    assert call(*words, "--dry-run")[0] == 0 and not (tmp_path / "out").exists()
    assert call(*words, "--slice", "0/1")[0] == 0
    records = json.loads((tmp_path / "out" / "coreset.json").read_text())
    assert len(records) == 12 and "What is it?" in records[0]["conversations"][0]["value"]
    words[words.index("--format") + 1] = "keys"
    assert call(*words, "--overwrite")[0] == 0 and manifest(tmp_path / "out")["options"] == {"format": "keys"}


def test_pack(call, tmp_path):
    images = [{"bytes": picture(number), "path": None} for number in range(6)]
    table = pa.table({"photo": images, "said": [f"words {number}" for number in range(6)]})
    (tmp_path / "source").mkdir()
    pq.write_table(table, tmp_path / "source" / "part.parquet")
    words = ["pack", tmp_path / "source", tmp_path / "pool", "--layout", "parquet", "--image", "photo"]
    words = [*words, "--caption", "said", "--shard-size", 4, "--workers", 1, "--engine", "local", "--json", "--verbose"]
    assert call(*words, "--dry-run")[0] == 0 and not (tmp_path / "pool").exists()
    code, out = call(*words, "--slice", "0/1")
    assert code == 0 and [each["rows"] for each in json.loads(out)["shards"].values()] == [4, 2]
    words[words.index("--shard-size") + 1] = 6
    assert call(*words, "--overwrite")[0] == 0 and len(list((tmp_path / "pool").glob("*.tar"))) == 1


def test_import(home, call, tmp_path):
    emb = pa.concat_tables(pa.ipc.open_file(home / "emb" / f"{stem}.arrow").read_all() for stem in ("a", "b"))
    for folder in ("img_emb", "metadata"):
        (tmp_path / "source" / folder).mkdir(parents=True)
    vectors = np.stack(emb["image_embedding"].to_pylist()).astype(np.float16)
    np.save(tmp_path / "source" / "img_emb" / "img_emb_0.npy", vectors)
    rows = [f"http://x/{number}" for number in range(30)]
    beside = pa.table({"url": rows, "caption": ["words"] * 30, "score": [1.5] * 30})
    pq.write_table(beside, tmp_path / "source" / "metadata" / "metadata_0.parquet")
    words = ["import", tmp_path / "source", tmp_path / "emb", "--layout", "clip-retrieval", "--columns", "score"]
    words = [*words, "--pool", home / "pool", "--join", "url", "--arch", "b32", "--seed", 1]
    words = [*words, "--workers", 1, "--engine", "local", "--json", "--verbose"]
    assert call(*words, "--dry-run")[0] == 0 and not (tmp_path / "emb").exists()
    code, out = call(*words, "--slice", "0/1")
    assert code == 0 and json.loads(out)["joined"]["matched"] == 30
    words[words.index("--arch") + 1] = "l14"
    assert call(*words, "--overwrite")[0] == 0 and manifest(tmp_path / "emb")["options"]["arch"] == "l14"


def test_mix(call, tmp_path):
    records = [{"id": str(number), "instruction": f"say {number}", "output": "yes"} for number in range(9)]
    (tmp_path / "text.json").write_text(json.dumps(records))
    (tmp_path / "mix.toml").write_text(f'[mix]\n[mix.sources.text]\npath = "{tmp_path / "text.json"}"\n')
    words = ["mix", tmp_path / "mix.toml", tmp_path / "mix", "--set", "mix.shard_size=5", "--seed", 4, "--strict"]
    words = [*words, "--workers", 1, "--engine", "local", "--json", "--verbose"]
    assert call(*words, "--dry-run")[0] == 0 and not (tmp_path / "mix").exists()
    code, out = call(*words)
    options = json.loads(out)["options"]
    assert code == 0 and (options["seed"], options["strict"], options["shard_size"]) == (4, True, 5)
    words[words.index("--seed") + 1] = 5
    assert call(*words, "--overwrite")[0] == 0 and manifest(tmp_path / "mix")["options"]["seed"] == 5


def test_demo(call, tmp_path):
    words = ["demo", tmp_path / "demo", "--rows", 40, "--shards", 2, "--dirt", "clean", "--seed", 3, "--workers", 1]
    words = [*words, "--instruct", 3, "--tests", 1, "--caption-tests", 1, "--json", "--verbose", "--overwrite"]
    assert call(*words, "--dry-run")[0] == 0 and not (tmp_path / "demo").exists()
    code, out = call(*words)
    options = json.loads(out)["options"]
    assert code == 0 and options | {"rows": 40, "shards": 2, "dirt": "clean", "seed": 3} == options


def test_report(home, call, tmp_path):
    words = ["report", home / "sel", tmp_path / "page.html", "--title", "A page of ours", "--seed", 5, "--json"]
    assert call(*words, "--dry-run")[0] == 0 and not (tmp_path / "page.html").exists()
    assert call(*words, "--verbose")[0] == 0 and "A page of ours" in (tmp_path / "page.html").read_text()
    assert call(*words, "--overwrite")[0] == 0


def test_run(home, call, tmp_path):
    code, out = call("run", "--list", "--engine", "local")
    assert code == 0 and "demo" in out
    tables = f'[pool]\npath = "{home / "pool"}"\n[embed]\nmodel = "local-dir:{home / "model"}"\n'
    (tmp_path / "p.toml").write_text(tables + '[select]\nsteps = ["sample(5)"]\n')
    words = ["run", tmp_path / "p.toml", "--out", tmp_path / "out", "--only", "coreset", "--verbose", "--json"]
    code, out = call(*words)
    assert code == 0 and json.loads(out.splitlines()[-1])["selection"]["kept"] == 5
