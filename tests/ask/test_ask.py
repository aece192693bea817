"""Search, prompts, heads and probes, by the command line on the demo and against brute force on drawn vectors."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import safetensors.torch
import torch
from artefacts import write_embeddings, write_pool, write_selection
from safetensors.numpy import save_file

from curate.ask import find, heads, probe, prompts, reading, stored
from curate.emit.kept_samples import open_coreset
from curate.errors import UsageError
from curate.select import recipes
from curate.select.pool import Pool
from curate.storage import manifest, sidecar
from curate.vectors.exact import widen
from house import CLIP, curate


@pytest.fixture(scope="module")
def home(demo, tmp_path_factory):
    """The demo's 600 rows, embedded, clustered and selected from."""
    home = tmp_path_factory.mktemp("ask")
    curate("embed", demo / "pool", home / "emb", "--model", CLIP)
    curate("cluster", home / "emb", home / "clu", "--k", 12)
    curate("select", home / "clu", home / "sel", "--step", "top(clip_score, 60)")
    return home


def vectors_of(directory):
    """All image vectors f32 and their keys, null rows left out, in row order."""
    parts, keys, texts = [], [], []
    for stem in manifest.open_input(str(directory)).stems:
        for batch in sidecar.batches(f"{directory}/{stem}.arrow"):
            good = np.asarray(batch.column("image_embedding").is_valid())
            parts.append(widen(sidecar.vectors(batch.column("image_embedding")))[good])
            keys += [key for key, ok in zip(batch.column("key").to_pylist(), good, strict=True) if ok]
            texts += [text for text, ok in zip(batch.column("caption").to_pylist(), good, strict=True) if ok]
    return np.concatenate(parts), keys, texts


def test_find_is_brute_force(home, tmp_path):
    x_nd, keys, captions = vectors_of(home / "emb")
    embedded = manifest.open_input(str(home / "emb"))
    texts, away = ["a large huz", "nothing but words"], ["words on a plain background"]
    words = [*texts, "--not", away[0], "--n", 7, "--out", tmp_path / "page.html", "--json"]
    told = json.loads(curate("find", home / "sel", *words).stdout)
    queries, against = prompts.embed_texts(embedded, texts), prompts.embed_texts(embedded, away)
    for text, query in zip(texts, queries, strict=True):
        scores = x_nd.astype(np.float64) @ query - x_nd.astype(np.float64) @ against[0]
        best = np.lexsort((np.arange(len(scores)), -scores))[:7]
        rows = [row for row in told if row["for"] == text]
        assert [row["key"] for row in rows] == [keys[i] for i in best]
        assert [row["score"] for row in rows] == pytest.approx(scores[best], rel=1e-6)
        assert [row["caption"] for row in rows] == [captions[i] for i in best]
        assert all(row["kept"] == (row["dropped_by"] is None) and "cluster" in row for row in rows)
    page = (tmp_path / "page.html").read_text()
    assert f"less the highest to: {away[0]}" in page and 'class="card out"' in page
    assert page.count('class="mark"') == 14 and page.count("data:image/jpeg") == 14


def test_a_picture_is_nearest_to_itself(home, demo, tmp_path):
    from curate.storage import tar

    shard = tar.list_pool(str(demo / "pool"))[0]
    with open(shard.location, "rb") as file:
        sample = tar.read_index(file).samples[5]
        (tmp_path / "like.jpg").write_bytes(tar.read_member(file, sample.image))
    told = curate("find", home / "emb", "--image", tmp_path / "like.jpg", "--n", 1).stdout.splitlines()
    assert told[0] == str(tmp_path / "like.jpg") and sample.key in told[1] and told[1].split()[0] > "0.99"


@pytest.mark.parametrize("seed", range(4))
def test_ties_go_by_row_order_in_any_blocks(seed, tmp_path, monkeypatch):
    """Most rows stand many times over, so that the n-th best is one of many equals."""
    emb = write_embeddings(tmp_path / "emb", write_pool(tmp_path / "pool", ["a", "b"], 40), seed=seed)
    rng = np.random.default_rng(seed)
    for stem in ("a", "b"):
        table = sidecar.table(f"{emb}/{stem}.arrow")
        x_nd = sidecar.vectors(table.to_batches()[0].column("image_embedding"))
        copies = x_nd[rng.integers(0, 3, len(x_nd))]
        place = table.schema.get_field_index("image_embedding")
        table = table.set_column(place, table.field(place), sidecar.vector_column(copies, np.ones(len(copies), bool)))
        batch = table.combine_chunks().to_batches()[0]
        sidecar.write_table(f"{emb}/{stem}.arrow", table.schema, [batch], {"rows": 40})
    embedded = manifest.open_input(emb)
    query = rng.normal(size=(1, 8)).astype(np.float32)
    query /= np.linalg.norm(query)
    x_nd = vectors_of(emb)[0].astype(np.float64)
    scores = (x_nd @ query[0]).tolist()
    expected = sorted(range(80), key=lambda i: (-scores[i], i))[:25]
    for block in (7, 64):
        monkeypatch.setattr(reading, "BLOCK", block)
        found = find.nearest(embedded, query, np.empty((0, 8), np.float32), 25)[0]
        assert [(stem, row) for _, stem, row in found] == [("ab"[i // 40], i % 40) for i in expected]


def test_what_was_found_is_looked_up_in_time_that_grows_with_it():
    compared = []

    class Stem(str):
        __hash__ = str.__hash__

        def __eq__(self, other):
            compared.append(other)
            return str.__eq__(self, other)

    class Emb:
        def source(self, *_commands):
            raise LookupError

        def table(self, stem, names):
            return pa.table({name: [f"{stem} {name}"] * 3 for name in names})

    found = [(0.5, Stem(f"{number:05d}"), row) for number in range(400) for row in (2, 0)]
    hits = find.describe(Emb(), Emb(), found)
    assert [(hit.score, hit.stem, hit.row) for hit in hits] == found
    assert all(hit.facts["key"] == f"{hit.stem} key" for hit in hits) and len(compared) < 20 * len(found)


def test_prompts_in_steps_are_stored_once(home, tmp_path):
    step = 'above(prompt("words on a plain background", "a large huz", "a photo"), 0.4)'
    curate("select", home / "clu", tmp_path / "one", "--step", step)
    folder = home / "emb.columns"
    [column] = folder.glob("*.npy")
    x_nd = np.load(column)
    embedded = manifest.open_input(str(home / "emb"))
    vectors, keys, _ = vectors_of(home / "emb")
    cosines = vectors.astype(np.float64) @ prompts.embed_texts(
        embedded, ["words on a plain background", "a large huz", "a photo"]
    ).T.astype(np.float64)
    shares = np.exp(100 * cosines)
    np.testing.assert_allclose(x_nd[~np.isnan(x_nd)], shares[:, 0] / shares.sum(1), rtol=2e-3, atol=1e-6)
    np.save(column, np.where(np.isnan(x_nd), x_nd, 1))  # what is stored is what the next selection reads
    curate("select", home / "clu", tmp_path / "two", "--step", step)
    assert manifest.open_input(str(tmp_path / "two")).manifest["counts"]["kept"] == len(keys)
    column.unlink()
    (folder / f"{column.stem}.json").unlink()
    plain = curate("select", home / "clu", tmp_path / "three", "--step", 'above(prompt("a large huz"), 0.2)')
    assert "kept" in plain.stdout


def test_a_head_from_marked_keys_sorts_pictures(home, demo, tmp_path):
    truth = pa.ipc.open_file(str(demo / "truth.arrow")).read_all().to_pylist()
    label = {row["key"]: row["background"].split()[0] for row in truth}  # plain, striped, …
    kinds = sorted(set(label.values()))[:2]
    marked = [key for key in vectors_of(home / "emb")[1] if label.get(key) in kinds]
    assert len(marked) > 60
    lines = [f"{key}\t{label[key]}\n" for key in marked[::2]]
    (tmp_path / "marked.tsv").write_text("".join([*lines, f"gone\t{kinds[0]}\n"]))
    words = ["probe", home / "clu", tmp_path / "marked.tsv", tmp_path / "head.safetensors"]
    told = json.loads(curate(*words, "--n", 3, "--seed", 1, "--json").stdout)
    assert told["accuracy"] > told["commonest"] + 0.1 and told["unknown_keys"] == 1
    assert len(told["next"]) == 3 and not {row["key"] for row in told["next"]} & set(marked[::2])
    step = f'above(head("{words[3]}", "{kinds[1]}"), 0.5)'
    curate("select", home / "emb", tmp_path / "sel", "--step", step)
    kept = {}
    for path in (tmp_path / "sel").glob("*.arrow"):
        rows = sidecar.table(str(path))
        kept |= dict(zip(rows["key"].to_pylist(), rows["kept"].to_pylist(), strict=True))
    right = [kept[key] == (label[key] == kinds[1]) for key in marked[1::2]]
    assert np.mean(right) > told["commonest"]
    assert "label next" in curate(*words).stdout


def mlp(rng, widths):
    """LAION's layout: layers.0, layers.2, … of a torch Sequential whose dropouts have numbers too."""
    tensors = {}
    for number, (fan_in, fan_out) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
        tensors[f"layers.{2 * number}.weight"] = rng.normal(size=(fan_out, fan_in)).astype(np.float32)
        tensors[f"layers.{2 * number}.bias"] = rng.normal(size=fan_out).astype(np.float32)
    return tensors


def test_heads_in_the_layouts_people_have(tmp_path):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(5, 6)).astype(np.float32)
    tensors = mlp(rng, [6, 5, 4, 4, 4, 4, 3, 1])  # more than ten numbers: layers.10 comes after layers.8
    save_file(tensors, tmp_path / "mlp.safetensors")
    expected = x
    for number in range(7):
        expected = expected @ tensors[f"layers.{2 * number}.weight"].T + tensors[f"layers.{2 * number}.bias"]
    found = heads.read_head(str(tmp_path / "mlp.safetensors"), 6).apply(x)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    halves = {name: torch.from_numpy(value).bfloat16() for name, value in tensors.items()}
    safetensors.torch.save_file(halves, tmp_path / "halves.safetensors")
    found = heads.read_head(str(tmp_path / "halves.safetensors"), 6).apply(x)
    np.testing.assert_allclose(found, expected, rtol=0.1, atol=0.1 * np.abs(expected).max())
    save_file({k: v for k, v in mlp(rng, [6, 2]).items()}, tmp_path / "two.safetensors", {"output": "softmax"})
    np.testing.assert_allclose(heads.read_head(str(tmp_path / "two.safetensors"), 6).apply(x).sum(1), 1, rtol=1e-5)
    told = {"activation": "relu", "output": "sigmoid"}
    save_file(tensors | {"mean": np.ones(6, np.float32)}, tmp_path / "relu.safetensors", told)
    expected = x - 1
    for number in range(7):
        expected = expected @ tensors[f"layers.{2 * number}.weight"].T + tensors[f"layers.{2 * number}.bias"]
        expected = np.maximum(expected, 0) if number < 6 else 1 / (1 + np.exp(-expected))
    found = heads.read_head(str(tmp_path / "relu.safetensors"), 6).apply(x)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_what_is_no_head_is_refused_in_words(tmp_path):
    rng = np.random.default_rng(0)
    save_file(mlp(rng, [6, 1]), tmp_path / "six.safetensors")
    save_file({"weight": np.zeros((2, 2, 2), np.float32)}, tmp_path / "cube.safetensors")
    save_file(mlp(rng, [6, 1]), tmp_path / "odd.safetensors", {"activation": "swish"})
    save_file({"weight": np.zeros((0, 8), np.float32)}, tmp_path / "none.safetensors")
    save_file({"weight": np.full((1, 8), np.nan, np.float32)}, tmp_path / "nan.safetensors")
    two = {"weight": np.zeros((2, 8), np.float32)}
    for name, classes in (("words", "a, b"), ("number", "3"), ("few", '["a"]'), ("deep", "[" * 100_000)):
        save_file(two, tmp_path / f"{name}.safetensors", {"classes": classes})
    (tmp_path / "torn.safetensors").write_bytes(b"\xff" * 40)
    (tmp_path / "pickle.pth").write_bytes(b"\x80\x02")
    cases = {
        "six.safetensors": "expected a first matrix of 8 columns",
        "cube.safetensors": "expected a matrix",
        "odd.safetensors": "swish",
        "torn.safetensors": "not a readable safetensors",
        "pickle.pth": "convert it",
        "missing.safetensors": "does not exist",
        "none.safetensors": "an empty matrix",
        "nan.safetensors": "NaN",
        **dict.fromkeys(
            [f"{name}.safetensors" for name in ("words", "number", "few", "deep")], "a JSON list of 2 names"
        ),
    }
    for name, words in cases.items():
        with pytest.raises(UsageError, match=words):
            heads.read_head(str(tmp_path / name), 6 if name.startswith("odd") else 8)


def test_questions_that_cannot_be_asked(home, tmp_path):
    (tmp_path / "twice.tsv").write_text("a\tx\na\ty\n")
    (tmp_path / "few.tsv").write_text("a\tx\nb\ty\n")
    for words, told in (
        (["find", home / "emb"], "nothing is asked for"),
        (["find", home / "emb", " "], "a prompt is empty"),
        (["find", home / "emb", "a huz and " * 99], "is longer than the"),
        (["find", home / "emb", "a huz", "--n", 0], "expected 1 to"),
        (["find", home / "emb", "--image", home / "none.jpg"], "does not exist"),
        (["find", home / "emb", "x", "--model", "ViT-B-32", "--pretrained", "none"], "--model NAME"),
        (["find", home / "none", "x"], "does not exist"),
        (["probe", home / "emb", home / "none.tsv", tmp_path / "h.safetensors"], "cannot be read"),
        (["probe", home / "emb", home / "none.tsv", tmp_path / "h.pth"], "does not end in .safetensors"),
        (["select", home / "emb", tmp_path / "s", "--step", "above(prompt(3), 1)"], "expected a word in quotes"),
        (["select", home / "emb", tmp_path / "s", "--step", 'above(prompt("a", 3), 1)'], "expected texts in quotes"),
        (["select", home / "emb", tmp_path / "s", "--step", 'above(language("xx"), 0.5)'], "language"),
        (["probe", home / "emb", tmp_path / "twice.tsv", tmp_path / "h.safetensors"], "is marked 'y' and 'x'"),
        (["probe", home / "emb", tmp_path / "few.tsv", tmp_path / "h.safetensors"], "expected two labels"),
    ):
        ended = curate(*words, check=False)
        assert ended.returncode == 2 and told in ended.stderr and ended.stderr.count("\n") == 1, ended.stderr


def test_embeddings_that_are_gone_are_told_in_a_line(tmp_path):
    (tmp_path / "marked.tsv").write_text("000000000\ta\n")
    write_embeddings(tmp_path / "emb", write_pool(tmp_path / "pool", ["a"], 12))
    sel = write_selection(tmp_path / "sel", str(tmp_path / "emb"), lambda stem, row, key: True)
    (tmp_path / "emb").rename(tmp_path / "moved")
    asked = [
        lambda: find.find(sel, ["a cat"], [], [], 3),
        lambda: probe.probe(sel, str(tmp_path / "marked.tsv"), str(tmp_path / "head.safetensors")),
        lambda: open_coreset(sel, str(tmp_path / "pool")),
        lambda: Pool(manifest.open_input(sel)),
    ]
    for ask in asked:
        with pytest.raises(UsageError, match="sel was made from are not where its manifest says"):
            ask()


def test_a_text_of_which_the_model_reads_nothing_has_no_answer(home):
    """What the demo's tokenizer does not know would be answered as an empty text is; of a long list a part may be."""
    embedded = manifest.open_input(str(home / "emb"))
    for text, told in (
        ("\u200b\ufeff", "is empty"),
        ("\0", "is empty"),
        ("a huz\udcff", "not UTF-8"),
        ("寺 🐶", "knows no word"),
    ):
        with pytest.raises(UsageError, match=told):
            prompts.embed_texts(embedded, ["a large huz", text])
    assert len(prompts.embed_texts(embedded, ["a large huz", "寺 🐶"], listed=True)) == 2
    with pytest.raises(UsageError, match="knows no word"):
        prompts.embed_texts(embedded, ["寺", "🐶"], listed=True)


def test_marks_that_are_none(home, tmp_path):
    (tmp_path / "empty.tsv").write_text("\ufeff\n\n")
    (tmp_path / "bom.tsv").write_text("\ufeffa\tx\n")
    assert probe.read_labels(str(tmp_path / "bom.tsv")) == {"a": "x"}
    (tmp_path / "odd.tsv").write_bytes("a\u2028b\tx\r\nc\x85\x0cd\ty\n".encode())
    assert probe.read_labels(str(tmp_path / "odd.tsv")) == {"a\u2028b": "x", "c\x85\x0cd": "y"}
    for given, told in (({}, "marks no key"), ({"seed": -1}, "a seed from 0"), ({"n": -1}, "0 or more rows")):
        with pytest.raises(UsageError, match=told):
            probe.probe(str(home / "emb"), str(tmp_path / "empty.tsv"), str(tmp_path / "h.safetensors"), **given)


def test_the_model_of_imported_vectors_is_named(home, tmp_path):
    """The same vectors without their model: asked with it named, they answer as the embeddings that know it."""
    x_nd, keys, captions = vectors_of(home / "emb")
    (tmp_path / "source").mkdir()
    np.save(tmp_path / "source" / "part.npy", x_nd.astype(np.float16))
    pa.parquet.write_table(pa.table({"key": keys, "caption": captions}), tmp_path / "source" / "part.parquet")
    curate("import", tmp_path / "source", tmp_path / "emb", "--layout", "npy")
    told = json.loads(curate("find", tmp_path / "emb", "a large huz", "--n", 5, "--json", "--model", CLIP).stdout)
    known = json.loads(curate("find", home / "emb", "a large huz", "--n", 5, "--json").stdout)
    assert [row["key"] for row in told] == [row["key"] for row in known]
    words = ["--step", 'top(prompt("a large huz"), 5)', "--json"]
    refused = curate("select", tmp_path / "emb", tmp_path / "none", *words, check=False)
    assert refused.returncode == 2 and "--model NAME --pretrained TAG" in refused.stderr
    folder, weights = CLIP.removeprefix("local-dir:"), next(Path(CLIP.removeprefix("local-dir:")).glob("*.safetensors"))
    made = curate("select", tmp_path / "emb", tmp_path / "sel", *words, "--model", folder, "--pretrained", weights)
    kept = sidecar.table(str(tmp_path / "sel" / "part.arrow"))
    assert sorted(kept.filter(kept["kept"])["key"].to_pylist()) == sorted(row["key"] for row in known)
    assert json.loads(made.stdout)["options"]["text_weights"]
    [about] = (tmp_path / "emb.columns").glob("*.json")  # a column of this model's, never another's
    assert json.loads(about.read_text())["text_weights"] == json.loads(made.stdout)["options"]["text_weights"]


def test_imported_vectors_know_no_model(tmp_path):
    emb = write_embeddings(tmp_path / "emb", write_pool(tmp_path / "pool", ["a"], 4))
    found = manifest.open_input(emb)
    del found.manifest["options"]["model"]
    with pytest.raises(UsageError, match="does not say which model"):
        prompts.embed_texts(found, ["x"])


def test_a_folder_that_cannot_be_written_costs_no_column(tmp_path, caplog):
    emb = manifest.open_input(write_embeddings(tmp_path / "emb", write_pool(tmp_path / "pool", ["a"], 4)))
    (tmp_path / "emb.columns").write_text("a file is in the way")
    values = stored.stored_array(emb, {"x": 1}, lambda: np.arange(4, dtype=np.float32))
    assert values.tolist() == [0, 1, 2, 3] and "cannot be written" in caplog.text


def test_the_language_of_a_caption(tmp_path):
    pytest.importorskip("lingua", reason="lingua is not installed")
    texts = ["ein Hund läuft über die Wiese", "a dog runs over the meadow", "", "un chien court dans le pré"]
    emb = write_embeddings(
        tmp_path / "emb", write_pool(tmp_path / "pool", ["a"], 4, caption=lambda row: texts[row] or "7")
    )
    curate("select", emb, tmp_path / "sel", "--step", 'at_least(language("en"), 1)')
    assert sidecar.table(str(tmp_path / "sel" / "a.arrow"))["kept"].to_pylist() == [False, True, False, False]


def test_concepts_are_worked_out_once_counted_and_name_clusters(home, tmp_path):
    """On the demo, by the command line: counts before and after in the funnel, in what show prints and on the page."""
    (tmp_path / "list.txt").write_text("huz\nvog\nHUZ\n\nmoz\n")
    before = set((home / "emb.columns").glob("*")) if (home / "emb.columns").exists() else set()
    step = f'concepts("{tmp_path / "list.txt"}", 10%)'
    curate("select", home / "clu", tmp_path / "one", "--step", step)
    made = set((home / "emb.columns").glob("*")) - before
    assert len(made) == 4  # the list's vectors, and who shows what, each with what it is
    times = {path: path.stat().st_mtime_ns for path in made}
    curate("select", home / "clu", tmp_path / "two", "--step", "sample(500)", "--step", step)
    assert times == {path: path.stat().st_mtime_ns for path in set((home / "emb.columns").glob("*")) - before}
    first = manifest.load_json(str(tmp_path / "one" / "manifest.json"))
    told = first["funnel"][0]["estimates"]
    assert (told["concepts"], told["repeated"], told["empty_lines"]) == (3, 1, 1) and "file-1" in first["inputs"]
    shown = curate("show", tmp_path / "one").stdout
    assert "huz" in shown and "concepts, before and after" in shown
    curate("report", tmp_path / "one", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert 'id="shown"' in page and "Of 3 concepts (list.txt)" in page
    assert "Named by the concepts that lie nearer to them" in page
    by_recipe = curate("select", home / "clu", tmp_path / "r", "--recipe", "concepts", "--json").stdout
    last = json.loads(by_recipe)["funnel"][-1]
    assert last["text"] == recipes.steps("concepts")[-1]
    assert last["estimates"]["vocabulary"] == "phrases of the pool's captions"
    missing = curate("select", home / "clu", tmp_path / "x", "--step", 'concepts("none.txt", 5)', check=False)
    assert missing.returncode == 2 and "none.txt, which a step reads, does not exist" in missing.stderr


def test_five_marks_a_label_suffice(home, tmp_path):
    x_nd, keys, _ = vectors_of(home / "emb")
    order = np.argsort(x_nd[:, 0])
    few = [f"{keys[i]}\tlow\n" for i in order[:5]] + [f"{keys[i]}\thigh\n" for i in order[-5:]]
    (tmp_path / "marks.tsv").write_text("".join(few))
    told = probe.probe(str(home / "emb"), str(tmp_path / "marks.tsv"), str(tmp_path / "h.safetensors"), 3)
    assert told["labelled"] == {"high": 5, "low": 5} and len(told["next"]) == 3


def test_without_clusters_no_row_to_label_next_is_passed_over(tmp_path):
    """Of many shards each has its least sure row; none of them stands in another's way."""
    (tmp_path / "npy").mkdir()
    x_nd = np.random.default_rng(0).normal(size=(5, 900, 4)).astype(np.float16)
    for number, part in enumerate(x_nd):
        np.save(tmp_path / "npy" / f"{number}.npy", part)
    curate("import", tmp_path / "npy", tmp_path / "emb", "--layout", "npy")
    x_nd, names, _ = vectors_of(tmp_path / "emb")
    order = np.argsort(x_nd[:, 0])
    marks = {names[i]: "low" for i in order[:5]} | {names[i]: "high" for i in order[-5:]}
    (tmp_path / "marks.tsv").write_text("".join(f"{key}\t{label}\n" for key, label in marks.items()))
    told = probe.probe(str(tmp_path / "emb"), str(tmp_path / "marks.tsv"), str(tmp_path / "h.safetensors"), 8)
    shares = np.sort(heads.read_head(str(tmp_path / "h.safetensors"), 4).apply(x_nd), axis=1)
    least = np.argsort(shares[:, -1] - shares[:, -2], kind="stable")
    assert [each["key"] for each in told["next"]] == [names[i] for i in least if names[i] not in marks][:8]
