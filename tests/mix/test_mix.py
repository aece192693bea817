import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
from artefacts import members, picture, tree, write_embeddings, write_pool, write_selection
from hypothesis import given, settings
from hypothesis import strategies as st

from curate.emit.emit import EmitOptions, emit
from curate.engine import Job
from curate.errors import ContractError, UsageError
from curate.mix import reshape, sampling
from curate.mix.mix import mix
from curate.mix.sources import Faults
from curate.storage import records
from house import Command, curate, until
from pipelines.records import read
from pipelines.samples import caption_turns

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data"
realdata = pytest.mark.skipif(not DATA.is_dir(), reason="the real data is not at hand")
QUIET = Job(workers=1, quiet=True)


def turns(*texts, image=False):
    made = [{"from": ("human", "gpt")[place % 2], "value": text} for place, text in enumerate(texts)]
    if image:
        made[0]["value"] = "<image>\n" + made[0]["value"]
    return made


def write_vqa(folder, count, name="vqa"):
    """Write LLaVA JSON with its irregularities, and its images. Returns (path, images, records)."""
    (folder / "images" / "sub").mkdir(parents=True, exist_ok=True)
    made = []
    for number in range(count):
        image = f"sub/{number // 2}.jpg" if number % 3 else f"{number}.png"
        (folder / "images" / image).write_bytes(picture(number, kind="PNG" if image.endswith("png") else "JPEG"))
        record = {"id": number if number % 2 else f"{name}-{number}", "image": image}
        record["conversations"] = turns(f"what is {number}?  ", f"é {number}\n", image=True)
        if number % 4 == 0:
            record = {"model": "", **record, "markdown": {"b": [1, 2.5, None], "a": "\u2028"}}
        made.append(record)
    (folder / f"{name}.json").write_text(json.dumps(made, indent=number % 3), "utf-8")
    return str(folder / f"{name}.json"), str(folder / "images"), made


def write_text(folder, count, name="text"):
    made = [
        {"instruction": f"say {n}", "input": "" if n % 2 else "here", "output": f"{n} " * (n % 7 + 1)}
        for n in range(count)
    ]
    (folder / f"{name}.json").write_text(json.dumps(made))
    return str(folder / f"{name}.json")


def mixed(out):
    """Read a mix back: [(record, image bytes or None)]."""
    found = []
    for path in sorted(Path(out).glob("*.tar")):
        image = None
        for name, data in members(path):
            if name.endswith(".json"):
                found.append((json.loads(data), image))
                image = None
            else:
                image = data
    return found


def test_sources_come_together_whole(tmp_path):
    path, images, made = write_vqa(tmp_path, 13)
    sel = write_selection(
        tmp_path / "sel",
        write_embeddings(tmp_path / "emb", write_pool(tmp_path / "pool", ["00000"], 6)),
        lambda stem, row, key: row != 2 or "sample(9)",
    )
    emit(sel, str(tmp_path / "coreset"), EmitOptions(), QUIET)
    table = {
        "shard_size": 10,
        "sources": {
            "coreset": {"path": str(tmp_path / "coreset"), "prompt": "Say."},
            "vqa": {"path": path, "images": images},
            "text": {"path": write_text(tmp_path, 8)},
        },
    }
    manifest = mix(table, str(tmp_path / "mix"), QUIET)
    found = mixed(tmp_path / "mix")
    assert len(found) == manifest["counts"]["rows"] == 5 + 13 + 8
    assert {path.name for path in (tmp_path / "mix").iterdir()} == {
        "000000.tar", "000001.tar", "000002.tar", "manifest.json", "log.jsonl"
    }  # fmt: skip
    back = {}
    for record, image in found:
        back.setdefault(record.pop("source"), []).append((record, image))
    assert sorted(map(repr, (record for record, _ in back["vqa"]))) == sorted(map(repr, made))  # repr: key order too
    for record, image in back["vqa"]:
        assert image == (tmp_path / "images" / record["image"]).read_bytes()
    assert sorted(record["id"] for record, _ in back["coreset"]) == [f"{row:09d}" for row in (0, 1, 3, 4, 5)]
    record, image = back["coreset"][0]
    assert image == picture(int(record["id"]))
    assert record["conversations"] == caption_turns(f"a caption {int(record['id'])}", "Say.")
    assert all(image is None and "image" not in record for record, image in back["text"])
    assert manifest["text_share_samples"] == round(8 / 26, 6)
    assert manifest["sources"]["vqa"]["image_uses_max"] == 2
    direct = mix({"sources": {"coreset": {"path": sel}}}, str(tmp_path / "direct"), QUIET)
    assert direct["counts"]["rows"] == 5


def sample_table(tmp_path):
    path, images, _ = write_vqa(tmp_path, 40)
    return {
        "shard_size": 7,
        "text_share": 0.25,
        "sources": {"vqa": {"path": path, "images": images}, "text": {"path": write_text(tmp_path, 30)}},
    }


def test_any_worker_count_and_slices_leave_the_same_bytes(tmp_path):
    table = sample_table(tmp_path)
    mix(table, str(tmp_path / "one"), QUIET)
    mix(table, str(tmp_path / "two"), Job(workers=2, quiet=True))
    for rank in (1, 0):
        mix(table, str(tmp_path / "sliced"), Job(workers=1, quiet=True, part=(rank, 2)))
    assert tree(tmp_path / "one") == tree(tmp_path / "two") == tree(tmp_path / "sliced")
    assert mix(table, str(tmp_path / "one"), QUIET)["counts"]["rows"] == 53
    with pytest.raises(ContractError, match="text_share=0.25, now text_share=0.1"):
        mix({**table, "text_share": 0.1}, str(tmp_path / "one"), QUIET)


def test_killed_in_mid_mix_then_run_again(tmp_path):
    table, out = sample_table(tmp_path), tmp_path / "killed"
    mix(table, str(tmp_path / "whole"), QUIET)
    code = (
        "import time, curate.mix.mix as m\n"
        "row = m._Rows.row\n"
        "m._Rows.row = lambda *a: (time.sleep(0.02), row(*a))[1]\n"
        f"from curate.engine import Job\nm.mix({table!r}, {str(out)!r}, Job(workers=1, quiet=True))"
    )
    (tmp_path / "slow.py").write_text(code)
    running = Command(tmp_path / "slow.py", cwd=ROOT)
    until(lambda: running.poll() is not None or list(out.glob("000002.tar*")))
    running.kill()
    assert not (out / "manifest.json").exists()
    stamp = os.stat(out / "000001.tar").st_mtime_ns
    mix(table, str(out), QUIET)
    assert tree(out) == tree(tmp_path / "whole")
    assert os.stat(out / "000001.tar").st_mtime_ns == stamp


def test_faults_are_counted_listed_and_refused_when_strict(tmp_path):
    path, images, made = write_vqa(tmp_path, 10)
    (tmp_path / "images" / made[0]["image"]).unlink()
    (tmp_path / "images" / made[3]["image"]).write_bytes(b"")
    made[5]["image"] = "../../etc/passwd.jpg"
    made += [
        "words",
        {"id": 1},
        {"id": 1, "conversations": []},
        {**made[1]},
        {"id": 3, "image": 7, "conversations": turns("a", "b", image=True)},
    ]
    made += [{"id": "x", "conversations": [{"from": "human", "value": None}]}]
    Path(path).write_text(json.dumps(made))
    table = {"sources": {"vqa": {"path": path, "images": images, "expect": 16}}}
    manifest = mix(table, str(tmp_path / "mix"), QUIET)
    entry = manifest["sources"]["vqa"]
    assert entry["read"] == 16 and entry["usable"] == 8
    assert entry["faults"] == {
        "missing image": 1,
        "empty image": 1,
        "unsafe or foreign image name": 1,
        "broken: not a JSON object": 1,
        "broken: neither conversations, messages, texts nor instruction and output": 1,
        "broken: no turns": 1,
        "broken: image is not a name": 1,
        "broken: a turn without from and value": 1,
    }
    assert {"why": "missing image", "what": made[0]["image"]} in entry["listed"]
    assert entry["duplicate_ids"] == 1 and entry["listed_ids"] == [1]
    with pytest.raises(ContractError, match="strict"):
        mix({**table, "strict": True}, str(tmp_path / "strict"), QUIET)
    table["sources"]["vqa"]["expect"] = 17
    with pytest.raises(ContractError, match="has 16 records, expected 17"):
        mix(table, str(tmp_path / "expect"), QUIET)


def test_what_was_lost_is_said_at_the_end(tmp_path):
    path, images, made = write_vqa(tmp_path, 17)
    for record in made[4:]:
        record["image"] = f"gone/{record['image']}"
    made[16]["conversations"][0]["value"] = "no mark"
    Path(path).write_text(json.dumps(made))
    (tmp_path / "mix.toml").write_text(f'[mix.sources.vqa]\npath = "{path}"\nimages = "{images}"\n')
    ended = curate("mix", tmp_path / "mix.toml", tmp_path / "mix")
    assert "mix: 4 rows in 1 shard — 13 of 17 records lost" in ended.stdout
    assert f'vqa: 12 of 17 records lost: missing image (the first: "{made[4]["image"]}"); is `images`' in ended.stderr
    assert "vqa: 1 of 17 records lost: broken: an image without an image mark (the first: 16)" in ended.stderr
    again = curate("mix", tmp_path / "mix.toml", tmp_path / "mix")
    assert "13 of 17 records lost" in again.stdout
    Path(path).write_text(json.dumps(made[4:]))
    ended = curate("mix", tmp_path / "mix.toml", tmp_path / "none", check=False)
    assert ended.returncode == 2 and "Traceback" not in ended.stderr and not (tmp_path / "none").exists()
    assert "the mix is empty" in ended.stderr and "12 of 13 records lost: missing image (the first:" in ended.stderr
    table = {"total": 99, "sources": {"vqa": {"path": path, "images": images}, "t": {"path": write_text(tmp_path, 3)}}}
    with pytest.raises(UsageError, match="sources give 3.* 12 of 13 records lost: missing image"):
        mix(table, str(tmp_path / "short"), QUIET)


def test_a_picture_in_the_place_of_a_name_does_not_fill_the_manifest():
    faults = Faults()
    faults.note("unsafe or foreign image name", "/9j/" * 100_000)
    faults.note("unsafe or foreign image name", 7)
    assert faults.counts == {"unsafe or foreign image name": 2}
    assert [len(str(each["what"])) for each in faults.listed] == [200, 1]


def test_llava_json_in_and_out_changes_nothing(tmp_path):
    path, images, made = write_vqa(tmp_path, 25)
    made += [
        {"id": 7.5, "conversations": turns("\ud83d odd", "ok \t ")},
        {"conversations": turns("no id", "yes"), "x": 10**30},
    ]
    Path(path).write_text(json.dumps(made))
    table = {"format": "llava", "shuffle": False, "sources": {"a": {"path": path, "images": images}}}
    mix(table, str(tmp_path / "mix"), QUIET)
    back = json.loads((tmp_path / "mix" / "mix.json").read_bytes())
    assert [json.dumps(record) for record in back] == [json.dumps(record) for record in made]
    table["sources"]["b"] = {"path": write_text(tmp_path, 3), "images": str(tmp_path)}
    with pytest.raises(UsageError, match="several image folders"):
        mix(table, str(tmp_path / "two"), QUIET)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.dictionaries(
            st.text(max_size=3),
            st.recursive(st.none() | st.text() | st.integers() | st.booleans(), st.lists, max_leaves=4),
        ),
        max_size=20,
    ),
    st.integers(1, 40),
    st.sampled_from([None, 1, 4]),
)
def test_lists_are_read_as_json_reads_them_at_any_chunk_size(values, chunk, indent):
    text = json.dumps(values, indent=indent, ensure_ascii=len(values) % 2 == 0).encode("utf-8", "surrogatepass")
    try:
        text.decode()
    except UnicodeDecodeError:
        return
    whole, records.CHUNK_BYTES = records.CHUNK_BYTES, chunk
    try:
        assert [value for value, _ in records.read_records(io.BytesIO(text), "x")] == values
        lines = b"".join(json.dumps(value).encode() + b"\n" for value in values if isinstance(value, dict))
        assert [value for value, _ in records.read_records(io.BytesIO(lines), "x")] == values
        for cut in (len(text) - 1, len(text) // 2):
            with pytest.raises(ContractError) if cut else pytest.raises(StopIteration):
                found = list(records.read_records(io.BytesIO(text[:cut]), "x"))
                assert not found
                next(iter(found))
    finally:
        records.CHUNK_BYTES = whole


def test_broken_lines_are_passed_and_broken_lists_refused():
    lines = b'\xef\xbb\xbf{"a": 1}\n{"a": \n\n{"b": 2}\n' + b'{"deep": ' + b"[" * 100_000 + b"\n"
    found = list(records.read_records(io.BytesIO(lines), "x"))
    assert [value for value, _ in found] == [{"a": 1}, None, {"b": 2}, None]
    for bad in (b"[1, 2", b"[1 2]", b'["\xff"]', b"[" * 100_000, b'[{"a": 1}, {"a" 1}]'):
        with pytest.raises(ContractError):
            list(records.read_records(io.BytesIO(bad), "x"))


def test_text_in_its_common_forms():
    alpaca = {"instruction": "add", "input": "1+1", "output": "2", "history": [["hi", "yo"]], "lang": "en"}
    record = read(alpaca, "t-0").record
    assert record == {"id": "t-0", "lang": "en", "conversations": turns("hi", "yo", "add\n1+1", "2")}
    messages = [{"role": "system", "content": "be"}, {"role": "user", "content": [{"type": "text", "text": "q"}]}]
    messages += [{"role": "assistant", "content": "a"}]
    record = read({"messages": messages, "id": 3}, "t-0").record
    assert record["id"] == 3
    assert [turn["from"] for turn in record["conversations"]] == ["system", "human", "gpt"]
    for bad in (
        {"messages": [{"role": "user"}]},
        {"messages": 3},
        {"instruction": 1, "output": "x"},
        {"instruction": "", "output": ""},
    ):
        assert read(bad, "t-0").record is None


def part(name, count, text, weight=None, seed=0):
    rng = np.random.default_rng([seed, len(name)])
    tokens = rng.integers(1, 50, count).astype(np.int32)
    return sampling.Part(name, np.arange(count), tokens, np.full(count, text), weight)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 200),
    st.integers(60, 300),
    st.integers(60, 300),
    st.floats(0, 0.3),
    st.sampled_from(["samples", "tokens"]),
)
def test_a_text_share_is_met_exactly(images, first, second, share, by):
    parts = [part("i", images, False), part("ta", first, True), part("tbb", second, True)]
    try:
        order = sampling.draw(parts, share, None, by, 0, True)
    except UsageError:
        most = sum(p.tokens.sum() if by == "tokens" else len(p.rows) for p in parts[1:])
        rest = parts[0].tokens.sum() if by == "tokens" else images
        assert share / (1 - share) * rest > most - 1
        return
    sizes = [parts[s].tokens[r] if by == "tokens" else 1 for s, r in zip(order.source, order.rows, strict=True)]
    text = sum(size for size, source in zip(sizes, order.source, strict=True) if source)
    image = sum(sizes) - text
    assert (order.source == 0).sum() == images
    wanted = share / (1 - share) * image
    assert abs(text - wanted) <= (0.5 if by == "samples" else 25)
    if by == "samples":
        taken = [(order.source == number).sum() for number in (1, 2)]
        assert abs(taken[0] - sum(taken) * first / (first + second)) <= 1


def test_weights_share_a_total_exactly():
    parts = [part("a", 900, False, 3.0), part("bb", 900, False, 1.0), part("ccc", 500, True, 1.0)]
    order = sampling.draw(parts, None, 1000, "samples", 0, True)
    assert [int((order.source == number).sum()) for number in range(3)] == [600, 200, 200]
    order = sampling.draw(parts, 0.1, 777, "samples", 0, True)
    assert len(order.rows) == 777 and (order.source == 2).sum() == 78
    order = sampling.draw(parts, None, 9_000, "tokens", 0, True)
    tokens = [parts[n].tokens[order.rows[order.source == n]].sum() for n in range(3)]
    assert abs(sum(tokens) - 9_000) <= 25 and abs(tokens[0] - 5_400) <= 100
    with pytest.raises(UsageError, match="source a gives 900, its weight asks for 990"):
        sampling.draw(parts, None, 1_650, "samples", 0, True)
    with pytest.raises(UsageError, match="asks for 9,999"):
        sampling.draw(parts, None, 9_999, "samples", 0, True)


def test_a_source_is_drawn_the_same_whatever_stands_beside_it(tmp_path):
    path, images, _ = write_vqa(tmp_path, 30)
    vqa = {"path": path, "images": images, "count": 11, "repeat": 2}
    text = {"path": write_text(tmp_path, 9), "fraction": 0.5}
    alone = mix({"sources": {"vqa": vqa}}, str(tmp_path / "a"), QUIET)
    both = mix({"sources": {"text": text, "vqa": vqa}}, str(tmp_path / "b"), QUIET)
    ids = [sorted(repr(r["id"]) for r, _ in mixed(tmp_path / name) if r["source"] == "vqa") for name in "ab"]
    assert ids[0] == ids[1] and len(ids[0]) == 22 and len(set(ids[0])) == 11
    assert alone["sources"]["vqa"]["distinct"] == 11
    assert both["sources"]["text"]["samples"] == 4


@pytest.mark.parametrize(
    "change, words",
    [
        ({"text_share": 0.9}, "repeat = "),
        ({"text_share": 1.5}, "not a share"),
        ({"totl": 3}, "did you mean 'total'"),
        ({"sources": {}}, "no source"),
        ({"sources": {"vqa": {"path": "nowhere.json"}}}, "does not exist"),
        ({"sources": {"vqa": {"path": "x.json", "weight": 1.0}}}, "total"),
        ({"sources": {"vqa": {"path": "x.json", "cuont": 1}}}, "did you mean 'count'"),
        ({"sources": {"vqa": 3}}, "{'vqa': 3} is not a table"),
        ({"sources": {"../vqa": {"path": "x.json"}}}, "cannot be part of a file name"),
        ({"sources": {"vqa": {"path": "x.json", "max_rounds": 0}}}, "at least 1"),
        ({"sources": {"vqa": {"path": "x.json", "max_tokens": -1}}}, "at least 1"),
        ({"shard_size": 0}, "at least 1"),
        ({"seed": -1}, "seed=-1 is negative"),
        ({"tokenizer": __file__}, "is not a readable tokenizer.json"),
        ({"text_share": None, "total": 10**9}, "lower total"),
    ],
)
def test_what_cannot_be_had_is_refused_in_a_line(tmp_path, change, words):
    with pytest.raises(UsageError) as caught:
        mix({**sample_table(tmp_path), **change}, str(tmp_path / "mix"), QUIET)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "mix").exists(), "the next try finds nothing in its way"


def test_rules_merge_segment_and_cut():
    one, two = ({"id": n, "image": "a.jpg", "conversations": turns(f"q{n}", f"a{n}", image=True)} for n in (1, 2))
    text = {"id": 3, "conversations": turns("q", "a")}
    merged = list(reshape.merge_by_image([(one, "A"), (text, None), (two, "A")]))
    assert merged[0][0]["conversations"] == turns("q1", "a1", "q2", "a2", image=True)
    assert merged[1][0] is text
    long = {"id": 4, "image": "a", "conversations": turns(*(f"t{n}" for n in range(10)), image=True)}
    parts = reshape.segment(long, 2)
    assert [len(part["conversations"]) for part in parts] == [4, 4, 2]
    assert [part["id"] for part in parts] == [4, "4_1", "4_2"]
    assert all(not reshape.invalid(part, True) for part in parts)
    assert reshape.segment(long, 5) == [long]
    count = lambda text: 10  # noqa: E731
    assert reshape.fit(long, 100, "split", count) == [long]
    assert [len(part["conversations"]) for part in reshape.fit(long, 45, "split", count)] == [4, 4, 2]
    assert [len(part["conversations"]) for part in reshape.fit(long, 45, "truncate", count)] == [4]
    assert reshape.fit(long, 45, "drop", count) == [] == reshape.fit(long, 5, "split", count)
    assert reshape.invalid({"conversations": turns("a", "b", "c")}, False) == "turns do not alternate"
    assert reshape.invalid({"conversations": turns("a", " ")}, False) == "an empty turn"
    assert reshape.invalid({"conversations": turns("a", "b")}, True) == "0 image marks for 1 images"


def test_no_part_of_a_record_is_without_an_answer(tmp_path):
    said = [("q1", "a1", "q2"), ("q1", "", "q2", "a2", "q3", " "), ("q1", "a1", "q2", "", "q3", "a3"), ("q1", "a1")]
    asked = [{"id": f"r{n}", "conversations": turns(*each)} for n, each in enumerate(said)]
    (tmp_path / "a.json").write_text(json.dumps(asked))
    for rule in ({"max_rounds": 1}, {"max_tokens": 2, "overflow": "split"}, {"max_tokens": 2}):
        source = {"path": str(tmp_path / "a.json"), **rule}
        out = tmp_path / "-".join(map(str, rule.values()))
        made = mix({"shuffle": False, "sources": {"s": source}}, str(out), QUIET)
        again = mix({"sources": {"s": {"path": str(out)}}}, str(out) + "-again", QUIET)
        assert again["counts"]["rows"] == made["counts"]["rows"] and not again["faults"]
    parts = [part for record in asked for part in reshape.segment(record, 1)]
    assert [turn for part in parts for turn in part["conversations"]] == [t for r in asked for t in r["conversations"]]
    assert len(parts) == 5


def test_rules_in_a_mix_and_one_source_in_the_place_of_another(tmp_path):
    path, images, made = write_vqa(tmp_path, 12)
    table = {
        "sources": {"vqa": {"path": path, "images": images, "merge": True}, "old": {"path": write_text(tmp_path, 6)}}
    }
    first = mix(table, str(tmp_path / "mix"), QUIET)
    entry = first["sources"]["vqa"]
    assert entry["usable"] == 12 + entry["reshaped"]["merge"] == entry["images"] == entry["samples"]
    new = write_text(tmp_path, 4, "new")
    swap = {
        "sources": {
            "base": {"path": str(tmp_path / "mix"), "without": {"source": ["old"]}},
            "new": {"path": new, "max_tokens": 7},
        }
    }
    second = mix(swap, str(tmp_path / "swapped"), QUIET)
    names = [record["source"] for record, _ in mixed(tmp_path / "swapped")]
    assert sorted(set(names)) == ["new", "vqa"] and names.count("vqa") == entry["samples"]
    assert second["sources"]["base"]["ruled_out"] == {"left out": 6}


def test_parquet_with_pictures_inside(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {
            "id": n,
            "image": {"bytes": picture(n), "path": None if n % 2 else f"{n}.jpg"} if n < 4 else None,
            "conversations": turns("q", "a", image=n < 4),
        }
        for n in range(6)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    manifest = mix({"sources": {"p": {"path": str(tmp_path / "x.parquet")}}}, str(tmp_path / "mix"), QUIET)
    assert manifest["counts"]["text_only"] == 2
    for record, image in mixed(tmp_path / "mix"):
        assert image == (picture(record["id"]) if record["id"] < 4 else None)


@pytest.mark.realdata
@realdata
def test_real_records_come_back_unchanged(tmp_path):
    for name in ("vqa/daquar_train.json", "vqa/daquar_test.json", "text/sharegpt_500.json"):
        table = {
            "format": "llava",
            "shuffle": False,
            "sources": {"x": {"path": str(DATA / name), "images": str(DATA / "vqa" / "images")}},
        }
        mix(table, str(tmp_path / name.replace("/", "_")), QUIET)
        before = json.loads((DATA / name).read_bytes())
        after = json.loads((tmp_path / name.replace("/", "_") / "mix.json").read_bytes())
        assert [json.dumps(record) for record in before] == [json.dumps(record) for record in after]


@pytest.mark.realdata
@realdata
def test_real_sources_with_a_text_share_by_tokens(tmp_path):
    table = {
        "by": "tokens",
        "text_share": 0.2,
        "tokenizer": str(DATA / "tokenizers" / "phi-2" / "tokenizer.json"),
        "sources": {
            "pairs": {"path": str(DATA / "pairs" / "00000.tar")},
            "daquar": {"path": str(DATA / "vqa" / "daquar_train.json"), "images": str(DATA / "vqa" / "images")},
            "lima": {"path": str(DATA / "text" / "lima.json"), "max_tokens": 2048},
            "alpaca": {"path": str(DATA / "text" / "alpaca_5000.json")},
        },
    }
    manifest = mix(table, str(tmp_path / "mix"), Job(workers=2, quiet=True))
    assert manifest["text_share_tokens"] == pytest.approx(0.2, abs=0.002)
    assert manifest["sources"]["pairs"]["images"] == manifest["sources"]["pairs"]["read"]
    assert len(mixed(tmp_path / "mix")) == manifest["counts"]["rows"]
