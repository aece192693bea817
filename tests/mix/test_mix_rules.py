"""What a mix does with a source beyond reading it: replace, select, decontaminate, deduplicate; and its account."""

import gzip
import json
import os
import re
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from artefacts import picture, write_embeddings, write_pool, write_selection
from hypothesis import given, settings
from hypothesis import strategies as st
from test_mix import QUIET, members, mixed, turns, write_text, write_vqa

from curate.cluster.cluster import ClusterOptions, cluster
from curate.embed.embed import EmbedOptions, embed
from curate.emit.emit import emit
from curate.emit.options import EmitOptions
from curate.engine import Job
from curate.errors import ContractError, CurateError, UsageError
from curate.mix import account, reshape, sampling
from curate.mix.mix import mix
from curate.select.select import SelectOptions, select
from curate.storage.tar import TarWriter
from house import CLIP


def write(path, values):
    path.write_text(json.dumps(values))
    return str(path)


def test_one_source_takes_the_place_of_another(tmp_path):
    path, images, made = write_vqa(tmp_path, 8)
    table = {"sources": {"vqa": {"path": path, "images": images}, "old": {"path": "nowhere.json"}}}
    table["sources"]["new"] = {"path": write_text(tmp_path, 4), "replaces": "old"}
    manifest = mix(table, str(tmp_path / "mix"), QUIET)
    assert {name: entry["samples"] for name, entry in manifest["sources"].items()} == {"vqa": 8, "new": 4}
    table["sources"]["new"]["replaces"] = "odl"
    with pytest.raises(UsageError, match="did you mean 'old'"):
        mix(table, str(tmp_path / "other"), QUIET)


def test_texts_near_each_other_or_to_a_benchmark_go(tmp_path):
    long = " ".join(f"word{n}" for n in range(30))
    asked = " ".join(f"ask{n}" for n in range(15))
    made = [
        {"id": 0, "conversations": turns(long, "yes")},
        {"id": 1, "conversations": turns(long + " more", "yes")},
        {"id": 2, "conversations": turns(f"so {asked}", "leaked")},
        {"id": 3, "conversations": turns("alone", "in the world")},
        {"id": 4, "image": "a.jpg", "conversations": turns("what?", "a", image=True)},
        {"id": 5, "image": "b.jpg", "conversations": turns("what?", "a", image=True)},
        {"id": 6, "image": "a.jpg", "conversations": turns("What", "a", image=True)},
    ]
    for name in "ab":
        (tmp_path / f"{name}.jpg").write_bytes(picture(ord(name)))
    bench = tmp_path / "bench.jsonl"
    bench.write_text(
        json.dumps({"question_id": 1, "text": f"{asked}\nAnswer the question using a single word."}) + "\n"
    )
    source = {"path": write(tmp_path / "x.json", made), "images": str(tmp_path), "dedup_text": 0.8}
    source["exclude_text"] = [str(bench)]
    manifest = mix({"sources": {"x": source}}, str(tmp_path / "mix"), QUIET)
    assert sorted(record["id"] for record, _ in mixed(tmp_path / "mix")) == [0, 3, 4, 5]
    entry = manifest["sources"]["x"]
    assert entry["ruled_out"] == {"near-duplicate text": 2, "benchmark text": 1} and "faults" not in entry
    assert {"why": "benchmark text", "what": 2} in entry["listed"]
    mix({"strict": True, "sources": {"x": source}}, str(tmp_path / "strict"), QUIET)  # rules are no faults
    bench.write_text("index\tquestion\n0\tWhat?\n")  # a table of tabs, of which nothing is a record
    told = mix({"sources": {"x": source}}, str(tmp_path / "table"), QUIET)["sources"]["x"]["notes"]
    assert len(told) == 1 and "bench.jsonl: 2 of 2 lines are not JSON objects, no line holds a question" in told[0]
    bench.write_text("")
    again = mix({"sources": {"x": source}}, str(tmp_path / "mix"), QUIET)
    assert again["sources"]["x"]["ruled_out"] == {"near-duplicate text": 2}  # made anew in place
    with pytest.raises(UsageError, match="from 0.5 to 1"):
        mix({"sources": {"x": {**source, "dedup_text": 0.2}}}, str(tmp_path / "mix2"), QUIET)


def test_files_that_no_memory_holds_are_counted_and_the_others_mixed(tmp_path):
    """A sparse file takes no room on a disk, and a member of it says what it likes of its size."""
    huge, pool = tarfile.TarInfo("huge.json"), tmp_path / "pool"
    huge.size = 5 << 30
    pool.mkdir()
    with (pool / "0.tar").open("wb") as file, TarWriter(file) as tar:
        for key in ("a", "b"):
            tar.add(f"{key}.json", json.dumps({"id": key, "conversations": turns("what?", key)}).encode())
        place = tar.offset
    with (pool / "0.tar").open("r+b") as file:
        file.seek(place)
        file.write(huge.tobuf(tarfile.GNU_FORMAT))
        file.truncate(place + 512 + huge.size + 1024)
    (tmp_path / "big.jpg").write_bytes(b"\xff\xd8")
    os.truncate(tmp_path / "big.jpg", 5 << 30)
    one = [{"id": 0, "image": "big.jpg", "conversations": turns("what?", "a", image=True)}]
    table = {"a": {"path": str(pool)}, "b": {"path": write(tmp_path / "x.json", one), "images": str(tmp_path)}}
    sources = mix({"sources": table}, str(tmp_path / "mix"), QUIET)["sources"]
    assert len(mixed(tmp_path / "mix")) == 2
    assert sources["a"]["faults"] == {"over the limit of 268,435,456 bytes for a file": 1}
    assert sources["b"]["faults"] == {"image over the limit of 268,435,456 bytes": 1}


def test_a_selection_of_the_pictures_decides_over_their_records(tmp_path):
    """The pictures' pool was embedded and selected; the records lie in a JSON beside it."""
    pool = write_pool(tmp_path / "pool", ["00000"], 6)
    kept = write_selection(
        tmp_path / "sel", write_embeddings(tmp_path / "emb", pool), lambda stem, row, key: row % 2 == 0 or "sample(9)"
    )
    made = [
        {"id": n, "image": f"{n // 2:09d}.jpg", "conversations": turns(f"q{n}", "a", image=True)} for n in range(12)
    ]
    made.append({"id": "text", "conversations": turns("q", "a")})
    table = {"sources": {"x": {"path": write(tmp_path / "x.json", made), "images": pool, "selection": kept}}}
    manifest = mix(table, str(tmp_path / "mix"), QUIET)
    ids = {record["id"] for record, _ in mixed(tmp_path / "mix")}
    assert ids == {"text", *(n for n in range(12) if n // 2 % 2 == 0)}
    assert manifest["sources"]["x"]["ruled_out"] == {"picture not selected": 6}


def test_a_mix_is_a_pool_that_every_selector_works_on(tmp_path):
    path, images, made = write_vqa(tmp_path, 24)
    copies = [{**record, "id": f"again {record['id']}"} for record in made[:8]]
    table = {"sources": {"vqa": {"path": write(tmp_path / "x.json", made + copies), "images": images}}}
    table["sources"]["text"] = {"path": write_text(tmp_path, 5)}
    mix(table, str(tmp_path / "mix"), QUIET)
    embedded = embed(str(tmp_path / "mix"), str(tmp_path / "emb"), EmbedOptions(model=CLIP), QUIET)
    assert embedded["counts"]["ok"] == 32 and embedded["counts"]["no_image"] == 5
    cluster(str(tmp_path / "emb"), str(tmp_path / "clu"), ClusterOptions(k=2), QUIET)
    chosen = SelectOptions(steps=("dedup(0.999)", "balance(cluster, 12)"))
    select(str(tmp_path / "clu"), str(tmp_path / "sel"), chosen, QUIET)
    table = {"sources": {"vqa": {"path": str(tmp_path / "sel")}}}
    table["sources"]["text"] = {"path": str(tmp_path / "mix"), "only": "text"}
    again = mix(table, str(tmp_path / "again"), QUIET)
    assert again["sources"]["vqa"]["images"] == again["sources"]["vqa"]["samples"] == 12
    whole = {json.dumps(record) for record, _ in mixed(tmp_path / "mix")}
    assert {json.dumps(record) for record, _ in mixed(tmp_path / "again")} < whole, "records pass unchanged"


def test_a_changed_folder_of_images_is_taken_up(tmp_path, capfd):
    path, images, made = write_vqa(tmp_path, 6)
    table = {"sources": {"vqa": {"path": path, "images": images}}}
    first = mix(table, str(tmp_path / "mix"), QUIET)
    assert mix(table, str(tmp_path / "mix"), QUIET) == first
    (tmp_path / "images" / made[0]["image"]).write_bytes(changed := picture(99) + b"more")
    mix(table, str(tmp_path / "mix"), Job())
    told = f"mix: {images} has changed since: {tmp_path / 'mix'} is made anew in place\n"
    assert told in capfd.readouterr().err and changed in [image for _, image in mixed(tmp_path / "mix")]
    assert not list((tmp_path / "mix").glob(".next*"))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.01, 0.4), st.integers(300, 2_000))
def test_tokens_are_met_to_the_last_one(seed, share, total):
    """Lengths of 1 to 30 tokens: some record always fills the gap."""
    rng = np.random.default_rng(seed)
    parts = [
        sampling.Part(name, np.arange(300), rng.integers(1, 31, 300).astype(np.int32), np.full(300, text), None)
        for name, text in (("image", False), ("text", True))
    ]
    order = sampling.draw(parts, share, total, "tokens", 0, True)
    sizes = np.array([parts[s].tokens[r] for s, r in zip(order.source, order.rows, strict=True)])
    assert abs(sizes[order.source == 1].sum() - share * total) <= 0.5
    assert abs(sizes.sum() - total) <= 1
    assert len(set(zip(order.source.tolist(), order.rows.tolist(), strict=True))) == len(order.rows)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
TALK = st.lists(
    st.tuples(st.text(max_size=12), st.text(min_size=1, max_size=12).filter(str.strip)), min_size=1, max_size=3
)
STRAY = st.dictionaries(
    st.text(max_size=4).filter(lambda k: k not in ("conversations", "image", "id")), VALUES, max_size=3
)


@st.composite
def llava_records(draw):
    """A record with the irregularities of the published sets: ids of any kind or none, stray fields anywhere."""
    conversation = []
    for asked, answered in draw(TALK):
        conversation += [{"from": "human", "value": asked}, {"from": "gpt", "value": answered}]
    pictured = draw(st.booleans())
    if pictured:
        conversation[0]["value"] = (
            draw(st.sampled_from(["<image>\n", "<image>", " see <image> "])) + conversation[0]["value"]
        )
    fields = {"conversations": conversation, **draw(STRAY)}
    if draw(st.booleans()):
        fields["id"] = draw(st.integers() | st.text(max_size=6) | st.none())
    if pictured:
        fields["image"] = draw(st.sampled_from(["a.jpg", ["a.jpg"]]))
    return {key: fields[key] for key in draw(st.permutations(sorted(fields)))}


@settings(max_examples=25, deadline=None)
@given(st.lists(llava_records(), min_size=1, max_size=12), st.booleans(), st.sampled_from([None, 2]))
def test_no_record_is_changed(tmp_path_factory, made, ascii_only, indent):
    folder = tmp_path_factory.mktemp("round")
    (folder / "a.jpg").write_bytes(picture(1))
    (folder / "x.json").write_text(json.dumps(made, ensure_ascii=ascii_only, indent=indent), "utf-8")
    source = {"path": str(folder / "x.json"), "images": str(folder)}
    for form in ("llava", "webdataset"):
        mix({"format": form, "shuffle": False, "sources": {"x": source}}, str(folder / form), QUIET)
    back = json.loads((folder / "llava" / "mix.json").read_bytes())
    assert [json.dumps(record) for record in back] == [json.dumps(record) for record in made]  # key order too
    tarred = [json.loads(data) for name, data in members(folder / "webdataset" / "000000.tar") if name.endswith("json")]
    for before, after in zip(made, tarred, strict=True):
        assert json.dumps(after) == json.dumps(before if "source" in before else {**before, "source": "x"})


def test_the_account_sets_before_beside_after(tmp_path):
    path, images, made = write_vqa(tmp_path, 12)
    (tmp_path / "images" / made[1]["image"]).unlink()  # records 1 and, sharing it, none other of an odd pair
    table = {
        "tokenizer": "estimate",
        "sources": {
            "vqa": {"path": path, "images": images, "count": 5, "repeat": 2},
            "text": {"path": write_text(tmp_path, 9)},
        },
    }
    manifest = mix(table, str(tmp_path / "mix"), QUIET)
    entry, missing = manifest["sources"]["vqa"], manifest["faults"]["missing image"]
    assert entry["read"] == 12 and entry["before"]["samples"] == entry["usable"] == 12 - missing
    assert (entry["samples"], entry["distinct"], entry["before"]["image_uses_max"]) == (10, 5, 2)
    assert sum(entry["image_uses"].values()) == entry["images"]
    assert set(entry["before"]["length_percentiles"]) == {"5", "50", "95", "100"}
    whole = manifest["before"]
    assert whole["samples"] == entry["usable"] + 9 and whole["text_only"] == 9
    assert manifest["counts"]["tokens"] == sum(each["tokens"] for each in manifest["sources"].values())
    assert manifest["text_share_tokens"] == pytest.approx(
        manifest["counts"]["text_only_tokens"] / manifest["counts"]["tokens"], abs=1e-6
    )


def test_parquet_of_texts_and_lists_of_pictures(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pair = [{"user": "what?", "assistant": "this"}, {"user": "and?", "assistant": "that"}]
    rows = [
        {"images": [{"bytes": picture(1), "path": None}], "texts": pair},
        {"images": [{"bytes": picture(n), "path": None} for n in (1, 2)], "texts": pair},
        {"images": [], "texts": pair},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    manifest = mix(
        {"shuffle": False, "sources": {"p": {"path": str(tmp_path / "x.parquet")}}}, str(tmp_path / "m"), QUIET
    )
    (first, image), (several, _), (second, none) = mixed(tmp_path / "m")
    assert image == picture(1) and none is None
    assert several["image"] == ["p-1_0.jpg", "p-1_1.jpg"]
    assert several["conversations"][0]["value"] == "<image>\n<image>\nwhat?"
    shown = [(name, data) for name, data in members(tmp_path / "m" / "000000.tar") if name.startswith("000000001.")]
    assert shown[:2] == [("000000001.0.jpg", picture(1)), ("000000001.1.jpg", picture(2))]
    assert first["conversations"] == turns("what?", "this", "and?", "that", image=True)
    assert second["conversations"] == turns("what?", "this", "and?", "that")
    assert "faults" not in manifest["sources"]["p"]
    parts = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "q"}]}]
    parts.append({"role": "assistant", "content": [{"type": "text", "text": "a"}]})
    (tmp_path / "a.jpg").write_bytes(picture(3))
    path = write(tmp_path / "parts.json", [{"image": "a.jpg", "messages": parts}])
    mix({"sources": {"p": {"path": path, "images": str(tmp_path)}}}, str(tmp_path / "parts"), QUIET)
    assert mixed(tmp_path / "parts")[0][0]["conversations"] == turns("q", "a", image=True)


def parquet_of_pictures(folder, number=6):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {"id": n, "image": {"bytes": picture(n), "path": None}, "conversations": turns(f"q{n}", "a", image=True)}
        for n in range(number)
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "x.parquet")
    return str(folder / "x.parquet")


def test_a_selection_decides_over_pictures_inside_parquet(tmp_path):
    pool = write_pool(tmp_path / "pool", ["00000"], 6)
    kept = write_selection(
        tmp_path / "sel", write_embeddings(tmp_path / "emb", pool), lambda stem, row, key: row % 2 == 0 or "sample(9)"
    )
    source = {"path": parquet_of_pictures(tmp_path), "selection": kept, "dedup_text": 1.0, "merge": True}
    manifest = mix({"sources": {"x": source}}, str(tmp_path / "mix"), QUIET)
    assert {record["id"]: image for record, image in mixed(tmp_path / "mix")} == {n: picture(n) for n in (0, 2, 4)}
    assert manifest["sources"]["x"]["ruled_out"] == {"picture not selected": 3}


def test_a_mix_is_written_to_a_url(tmp_path):
    import fsspec

    path, images, _ = write_vqa(tmp_path, 9)
    table = {"shard_size": 5, "sources": {"p": {"path": parquet_of_pictures(tmp_path)}}}
    table["sources"]["vqa"] = {"path": path, "images": images}
    for form, name in (("webdataset", "tars"), ("llava", "json")):
        if form == "llava":
            del table["sources"]["p"]  # its pictures lie in no folder
        mix({**table, "format": form}, f"memory://{tmp_path.name}/{name}", QUIET)
        mix({**table, "format": form}, str(tmp_path / name), QUIET)
        remote = fsspec.filesystem("memory")
        found = {each.rpartition("/")[2]: remote.cat_file(each) for each in remote.find(f"/{tmp_path.name}/{name}")}
        local = {each.name: each.read_bytes() for each in (tmp_path / name).iterdir() if each.is_file()}
        for every in (found, local):
            every.pop("log.jsonl", None)
            assert every.pop("manifest.json")  # it says where the inputs lie, as seen from there
        assert found == local, "the same bytes, and nothing temporary left"


def several(number, *marks):
    """A record whose rounds show so many pictures each."""
    rounds = [("<image>" * shown + f"q{place}", f"a{place}") for place, shown in enumerate(marks)]
    said = turns(*(text for each in rounds for text in each))
    return {"id": number, "image": [f"{n}.jpg" for n in range(sum(marks))], "conversations": said}


def test_several_pictures_keep_order_and_place_through_mix_rules_and_emit(tmp_path):
    for n in range(4):
        (tmp_path / f"{n}.jpg").write_bytes(picture(n))
    made = [several("a", 1, 2, 0), several("b", 0, 2), several("c", 4)]
    source = {"path": write(tmp_path / "x.json", made), "images": str(tmp_path)}
    mix({"shuffle": False, "sources": {"x": source}}, str(tmp_path / "mix"), QUIET)
    names = [name for name, _ in members(tmp_path / "mix" / "000000.tar")]
    assert names[:4] == ["000000000.0.jpg", "000000000.1.jpg", "000000000.2.jpg", "000000000.json"]
    again = {"shuffle": False, "sources": {"x": {"path": str(tmp_path / "mix")}}}
    mix(again, str(tmp_path / "again"), QUIET)
    assert members(tmp_path / "again" / "000000.tar") == members(tmp_path / "mix" / "000000.tar"), "in and out again"

    source |= {"max_rounds": 1, "max_images": 3}
    manifest = mix({"shuffle": False, "sources": {"x": source}}, str(tmp_path / "cut"), QUIET)
    assert manifest["sources"]["x"]["ruled_out"] == {"over max_images": 1}
    found, shown = [], []
    for name, data in members(tmp_path / "cut" / "000000.tar"):
        if name.endswith(".json"):
            record = json.loads(data)
            found.append((record["id"], record.get("image"), record["conversations"][0]["value"], shown))
            shown = []
        else:
            shown.append(data)
    images = [picture(n) for n in range(4)]
    assert found == [
        ("a", "0.jpg", "<image>q0", images[:1]),
        ("a_1", ["0.jpg", "1.jpg", "2.jpg"], "<image>\n<image><image>q1", images[:3]),
        ("a_2", ["0.jpg", "1.jpg", "2.jpg"], "<image>\n<image>\n<image>\nq2", images[:3]),
        ("b", None, "q0", []),
        ("b_1", ["0.jpg", "1.jpg"], "<image><image>q1", images[:2]),
    ]

    (tmp_path / "pool").mkdir()
    with open(tmp_path / "pool" / "0.tar", "wb") as file, TarWriter(file) as tar:
        for name, data in members(tmp_path / "mix" / "000000.tar"):
            tar.add(
                name.replace("0.jpg", "img0.jpg") if name.endswith(".0.jpg") else name, data
            )  # some as Energon does
            if name.endswith(".json"):
                tar.add(name.replace(".json", ".txt"), b"told to be embedded")
    embedding = write_embeddings(tmp_path / "emb", str(tmp_path / "pool"))
    below = write_selection(tmp_path / "sel", embedding, lambda stem, row, key: True)
    emit(below, str(tmp_path / "tars"), EmitOptions(), QUIET)
    assert members(tmp_path / "tars" / "000000.tar") == members(tmp_path / "pool" / "0.tar")
    emit(below, str(tmp_path / "llava"), EmitOptions(format="llava"), QUIET)
    written = json.loads((tmp_path / "llava" / "coreset.json").read_bytes())
    for before, after in zip(made, written, strict=True):
        assert after["conversations"] == before["conversations"]
        shown = [(tmp_path / "llava" / "images" / name).read_bytes() for name in after["image"]]
        assert shown == images[: len(before["image"])]


def test_shards_and_image_tars_packed_by_gzip_are_read_and_other_archives_said(tmp_path):
    write_pool(tmp_path / "pool", ["0", "1"], 3)
    plain = mix({"sources": {"a": {"path": str(tmp_path / "pool")}}}, str(tmp_path / "plain"), QUIET)
    (tmp_path / "pool" / "1.tar.gz").write_bytes(gzip.compress((tmp_path / "pool" / "1.tar").read_bytes()))
    (tmp_path / "pool" / "1.tar").unlink()
    (tmp_path / "pool" / "2.tar.zst").write_bytes(b"x")
    packed = mix({"sources": {"a": {"path": str(tmp_path / "pool")}}}, str(tmp_path / "packed"), QUIET)
    assert packed["counts"] == plain["counts"] and "2.tar.zst" in packed["sources"]["a"]["notes"][0]
    assert mixed(tmp_path / "plain") == mixed(tmp_path / "packed")
    named = [name for name, _ in members(tmp_path / "plain" / "000000.tar") if name.endswith("jpg")]
    (tmp_path / "tars").mkdir()
    data = (tmp_path / "plain" / "000000.tar").read_bytes()
    (tmp_path / "tars" / "0.tar").write_bytes(gzip.compress(data))
    asked = [{"id": n, "image": name, "conversations": turns("q", "a", image=True)} for n, name in enumerate(named)]
    source = {"path": write(tmp_path / "a.json", asked), "images": str(tmp_path / "tars")}
    mix({"sources": {"a": source}}, str(tmp_path / "named"), QUIET)
    assert {image for _, image in mixed(tmp_path / "named")} == {image for _, image in mixed(tmp_path / "plain")}


def test_what_max_tokens_and_count_leave_out_is_said(tmp_path):
    asked = [{"id": n, "conversations": turns(*["five words of a question", "and an answer"] * 5)} for n in range(10)]
    source = {"path": write(tmp_path / "a.json", asked), "max_tokens": 12, "count": 12}
    made = mix({"sources": {"s": source}}, str(tmp_path / "out"), QUIET)
    assert made["sources"]["s"]["cut"] == {"records": 10, "rounds": 40} and made["counts"]["rows"] == 10
    told = " ".join(account.losses(made["sources"]))
    assert "max_tokens cut 40 rounds from 10 records that stay" in told and "count asks for 2 more records" in told
    rules = {"max_rounds": 1, "max_tokens": 2, "drop_invalid": True}
    asked += [{"id": "short", "conversations": turns("q", "a")}]
    source = {"path": write(tmp_path / "b.json", asked), **rules}
    made = mix({"sources": {"s": source}}, str(tmp_path / "out-2"), QUIET)
    assert "50 of 51 records taken out by a rule: over max_tokens" in " ".join(account.losses(made["sources"]))


def test_a_mark_in_an_answer_is_text(tmp_path):
    asked = [{"id": n, "image": "x.jpg", "conversations": turns("q", "an <image> tag", image=True)} for n in range(2)]
    (tmp_path / "x.jpg").write_bytes(picture(1))
    assert reshape.invalid(asked[0], 1) == ""
    source = {"path": write(tmp_path / "a.json", asked), "images": str(tmp_path), "merge": True, "drop_invalid": True}
    mix({"sources": {"s": source}}, str(tmp_path / "out"), QUIET)
    [(record, _)] = mixed(tmp_path / "out")
    assert [turn["value"] for turn in record["conversations"][1::2]] == ["an <image> tag"] * 2


def test_folders_of_each_kind_are_known_and_files_of_another_are_told(tmp_path):
    asked = [{"id": n, "conversations": turns("q", f"answer {n}")} for n in range(3)]
    (tmp_path / "tables").mkdir()
    pq.write_table(pa.Table.from_pylist(asked), tmp_path / "tables" / "a.parquet")
    made = mix({"sources": {"s": {"path": str(tmp_path / "tables")}}}, str(tmp_path / "one"), QUIET)
    assert made["counts"]["rows"] == 3
    write(tmp_path / "tables" / "dataset_infos.json", {})  # as Hugging Face has it
    assert (
        mix({"sources": {"s": {"path": str(tmp_path / "tables")}}}, str(tmp_path / "hub"), QUIET)["counts"]["rows"] == 3
    )
    write(tmp_path / "tables" / "more.json", asked)
    made = mix({"sources": {"s": {"path": str(tmp_path / "tables"), "only": "text"}}}, str(tmp_path / "two"), QUIET)
    assert "1 parquet files beside the json ones are not read (e.g. a.parquet)" in " ".join(
        account.losses(made["sources"])
    )
    (tmp_path / "zipped").mkdir()
    (tmp_path / "zipped" / "a.tar.gz").write_bytes(gzip.compress((tmp_path / "one" / "000000.tar").read_bytes()))
    for path in (tmp_path / "zipped", tmp_path / "zipped" / "a.tar.gz"):
        made = mix({"sources": {"s": {"path": str(path)}}}, str(tmp_path / f"from-{path.name}"), QUIET)
        assert made["counts"]["rows"] == 3
    (tmp_path / "a.json").write_bytes(gzip.compress(b"[]"))
    with pytest.raises(CurateError, match="packed by gzip"):
        mix({"sources": {"s": {"path": str(tmp_path / "a.json")}}}, str(tmp_path / "no"), QUIET)


def test_of_a_folder_that_holds_several_the_kind_that_is_named_is_read(tmp_path):
    asked, folder = [{"id": n, "conversations": turns("q", f"answer {n}")} for n in range(3)], tmp_path / "both"
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist(asked), folder / "a.parquet")
    write(folder / "a.json", asked[:1])
    for kind, rows in (("json", 1), ("parquet", 3)):
        made = mix({"sources": {"s": {"path": str(folder), "kind": kind}}}, str(tmp_path / kind), QUIET)
        assert made["counts"]["rows"] == rows
    with pytest.raises(UsageError, match="expected a directory made by `curate select`"):
        mix({"sources": {"s": {"path": str(folder), "kind": "selection"}}}, str(tmp_path / "no"), QUIET)


def test_files_beside_a_tar_of_pictures_are_found_too(tmp_path):
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / "images" / name).write_bytes(picture(ord(name[0])))
    with open(tmp_path / "images" / "x.tar", "wb") as file, TarWriter(file) as tar:
        tar.add("b.jpg", picture(7))
    asked = [{"id": n, "image": n, "conversations": turns("q", "a", image=True)} for n in ("a.jpg", "b.jpg")]
    source = {"path": write(tmp_path / "a.json", asked), "images": str(tmp_path / "images")}
    made = mix({"sources": {"s": source}, "shuffle": False}, str(tmp_path / "out"), QUIET)
    assert made["counts"]["rows"] == 2 and mixed(tmp_path / "out")[1][1] == picture(7)


def test_a_weighted_source_without_a_record_is_no_share_for_the_others(tmp_path):
    asked = [{"id": n, "conversations": turns("q", "a")} for n in range(6)]
    sources = {"a": {"path": write(tmp_path / "a.json", asked), "weight": 1}}
    sources["b"] = {"path": write(tmp_path / "b.json", [{"id": 0, "conversations": []}]), "weight": 1}
    with pytest.raises(UsageError, match="source b has a weight and no usable record. b: 1 of 1 records lost"):
        mix({"sources": sources, "total": 6}, str(tmp_path / "out"), QUIET)


def test_the_archive_that_pictures_came_in_is_left_alone(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").write_bytes(picture(1))
    (tmp_path / "images" / "all.tar.gz").write_bytes(b"torn")
    asked = [{"id": 0, "image": "a.jpg", "conversations": turns("q", "a", image=True)}]
    source = {"path": write(tmp_path / "a.json", asked), "images": str(tmp_path / "images")}
    mix({"sources": {"s": source}}, str(tmp_path / "out"), QUIET)
    assert [data for _, data in mixed(tmp_path / "out")] == [picture(1)]


def test_a_round_that_is_left_out_takes_its_own_picture_along(tmp_path):
    """What follows it still asks about its own pictures, not about those that the lost round showed."""
    pictures = {f"{name}.jpg": picture(number) for number, name in enumerate("ABC")}
    for name, data in pictures.items():
        (tmp_path / name).write_bytes(data)
    long = "long " * 200
    first = turns("<image>\nabout A", long, "<image>\nabout B", "it is B")
    middle = turns("<image>\nabout A", "it is A", "<image>\nabout B", long, "<image>\nabout C", "it is C")
    asked = [
        {"id": "first", "image": ["A.jpg", "B.jpg"], "conversations": first},
        {"id": "middle", "image": ["A.jpg", "B.jpg", "C.jpg"], "conversations": middle},
    ]
    source = {
        "path": write(tmp_path / "r.json", asked),
        "images": str(tmp_path),
        "max_tokens": 100,
        "overflow": "split",
    }
    mix({"sources": {"s": source}, "shuffle": False}, str(tmp_path / "out"), QUIET)
    seen = [record for record, _ in mixed(tmp_path / "out")]
    last = [record["image"] if isinstance(record["image"], str) else record["image"][-1] for record in seen]
    assert last == ["B.jpg", "A.jpg", "C.jpg"]
    for name, record in zip(last, seen, strict=True):
        assert record["conversations"][-2]["value"].endswith(f"about {name[0]}")


def test_strict_refuses_shards_that_lost_records(tmp_path):
    write_pool(tmp_path / "pool", ["0", "1", "2"], 6)
    whole = (tmp_path / "pool" / "1.tar").read_bytes()
    (tmp_path / "pool" / "1.tar").write_bytes(whole[: len(whole) // 4])
    (tmp_path / "pool" / "2.tar").write_bytes(b"<html>not found</html>" * 99)
    table = {"sources": {"s": {"path": str(tmp_path / "pool")}}}
    made = mix(table, str(tmp_path / "lax"), QUIET)
    assert sum(made["sources"]["s"]["faults"].values()) >= 2
    with pytest.raises(CurateError, match="which strict refuses"):
        mix({**table, "strict": True}, str(tmp_path / "strict"), QUIET)


def test_pictures_of_several_coresets_stay_apart(tmp_path):
    for name, first in (("a", 0), ("b", 100)):  # the same keys, other pictures: as two downloads have
        (tmp_path / name).mkdir()
        with open(tmp_path / name / "00000.tar", "wb") as file, TarWriter(file) as tar:
            for row in range(3):
                tar.add(f"{row:09d}.jpg", picture(first + row))
                tar.add(f"{row:09d}.txt", f"caption of {name} {row}".encode())
        emb = write_embeddings(tmp_path / f"emb_{name}", str(tmp_path / name))
        chosen = write_selection(tmp_path / f"sel_{name}", emb, lambda *_: True)
        emit(chosen, str(tmp_path / f"core_{name}"), EmitOptions(format="llava"), QUIET)
    table = {"shuffle": False, "sources": {name: {"path": str(tmp_path / f"core_{name}")} for name in "ab"}}
    mix({**table, "format": "messages"}, str(tmp_path / "out"), QUIET)
    told = json.loads((tmp_path / "out" / "mix.json").read_text())
    shown = [(tmp_path / "out" / "images" / record["images"][0]).read_bytes() for record in told]
    assert shown == [picture(first + row) for first in (0, 100) for row in range(3)]
    with pytest.raises(CurateError):
        mix({**table, "format": "llava"}, str(tmp_path / "llava"), QUIET)


@pytest.mark.parametrize("overflow", ["truncate", "split"])
@pytest.mark.parametrize("several", [False, True])
def test_no_record_is_longer_than_max_tokens_by_the_count_of_the_account(tmp_path, overflow, several):
    names = ["x.jpg", "y.jpg", "z.jpg"] if several else ["x.jpg"]
    for number, name in enumerate(names):
        (tmp_path / name).write_bytes(picture(number))
    asked = [{"id": n, "image": names if several else names[0], "conversations": turns(*["q" * 3 * n, "a"] * 6)}
             for n in range(1, 8)]  # fmt: skip
    for record in asked:
        for number in range(len(names)):
            record["conversations"][4 * number]["value"] += "\n<image>"
    source = {"path": write(tmp_path / "a.json", asked), "images": str(tmp_path), "max_tokens": 80 if several else 45}
    chosen = {"sources": {"s": {**source, "overflow": overflow}}, "image_tokens": 25, "shard_size": 1}
    made = mix(chosen, str(tmp_path / "out"), QUIET)
    found = [record for record, _ in mixed(tmp_path / "out")]
    sizes = []
    for record in found:
        said = [turn["value"] for turn in record["conversations"]]
        shown = sum(value.count("<image>") for value in said)
        assert shown == (len(record["image"]) if isinstance(record["image"], list) else 1)
        sizes.append(25 * shown + sum(-(-len(value.replace("<image>", "")) // 4) for value in said))
    assert max(sizes) <= source["max_tokens"] and sum(sizes) == made["sources"]["s"]["tokens"]


def test_a_mark_in_an_answer_gives_parts_of_a_text_no_picture():
    record = {"id": "r", "conversations": turns("How is it written?", "As <image>.", "Thanks", "Welcome")}
    parts = [*reshape.segment(record, 1), *reshape.fit(record, 6, "split", lambda text: len(text) // 4)]
    assert len(parts) == 4 and not any("<image>" in part["conversations"][0]["value"] for part in parts)


def test_a_selection_of_a_packed_pool_without_captions_is_a_source_with_those_it_was_embedded_by(tmp_path):
    for name in ("gzip", "plain"):
        pool = Path(write_pool(tmp_path / name / "pool", ["a", "b"], 3))
        emb = write_embeddings(tmp_path / name / "emb", str(pool))
        for path in pool.glob("*.tar"):
            with tarfile.open(path) as held:
                found = [(each.name, held.extractfile(each).read()) for each in held if not each.name.endswith(".txt")]
            path.unlink()
            with gzip.open(f"{path}.gz", "wb") if name == "gzip" else open(path, "wb") as file, TarWriter(file) as tar:
                for member, data in found:
                    tar.add(member, data)
        sel = write_selection(tmp_path / name / "sel", emb, lambda stem, row, key: row != 1 or "sample(9)")
        table = {"sources": {"s": {"path": sel, "prompt": "Say."}}, "shuffle": False}
        assert mix(table, str(tmp_path / name / "mix"), QUIET)["counts"]["images"] == 4
        found = list(zip(*[iter(members(tmp_path / name / "mix" / "000000.tar"))] * 2, strict=True))
        for number, (shown, record) in zip((0, 2, 3, 5), found, strict=True):
            assert shown[1] == picture(number)
            assert json.loads(record[1])["conversations"][1]["value"] == f"a caption {number}"


def test_numbered_parts_of_a_record_in_a_tar_get_the_pictures_of_their_numbers_in_mixes_and_emitted_records(tmp_path):
    parts = [{"type": "image", "index": 1}, {"type": "text", "text": "or"}, {"type": "image", "index": 0}]
    said = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "this"}]}
    (tmp_path / "pool").mkdir()
    with open(tmp_path / "pool" / "0.tar", "wb") as file, TarWriter(file) as tar:
        for name, data in (("k.0.jpg", picture(0)), ("k.1.jpg", picture(1)), ("k.txt", b"this")):
            tar.add(name, data)
        tar.add("k.json", json.dumps(said).encode())
    mix({"sources": {"s": {"path": str(tmp_path / "pool")}}}, str(tmp_path / "mix"), QUIET)
    held = dict(members(tmp_path / "mix" / "000000.tar"))
    assert [held[f"000000000.{number}.jpg"] for number in (0, 1)] == [picture(1), picture(0)]
    emb = write_embeddings(tmp_path / "emb", str(tmp_path / "pool"))
    sel = write_selection(tmp_path / "sel", emb, lambda stem, row, key: True)
    emit(sel, str(tmp_path / "out"), EmitOptions(format="llava"), QUIET)
    [record] = json.loads((tmp_path / "out" / "coreset.json").read_text())
    shown = [(tmp_path / "out" / "images" / name).read_bytes() for name in record["image"]]
    assert shown == [picture(1), picture(0)] and record["conversations"][0]["value"] == "<image>\nor\n<image>"


@pytest.mark.parametrize(
    ("head", "word"), [(b"\x28\xb5\x2f\xfd\x24", "unzstd"), (b"BZh9", "bunzip2"), (b"\xfd7zXZ\0", "unxz")]
)
def test_packed_records_are_refused_with_what_unpacks_them(tmp_path, head, word):
    (tmp_path / "x.jsonl").write_bytes(head + b"\xff" * 40)
    with pytest.raises(CurateError, match=rf"unpack it first \({word}\)"):
        mix({"sources": {"x": {"path": str(tmp_path / "x.jsonl")}}}, str(tmp_path / "mix"), QUIET)


def test_pictures_in_an_archive_and_records_in_deeper_folders_are_refused_with_what_to_type(tmp_path):
    path, _, _ = write_vqa(tmp_path, 3)
    (tmp_path / "images.zip").write_bytes(b"PK\3\4")
    with pytest.raises(UsageError, match="images.zip") as refused:
        source = {"path": path, "images": str(tmp_path / "images.zip")}
        mix({"sources": {"x": source}}, str(tmp_path / "mix"), QUIET)
    assert "unpack the archives first" in str(refused.value)
    (tmp_path / "sets" / "a").mkdir(parents=True)
    pq.write_table(pa.table({"instruction": ["say"], "output": ["so"]}), tmp_path / "sets" / "a" / "0.parquet")
    with pytest.raises(UsageError, match="no .json or .jsonl file") as refused:
        mix({"sources": {"x": {"path": str(tmp_path / "sets")}}}, str(tmp_path / "mix"), QUIET)
    given = re.search("path = '(.*)'", refused.value.hint)[1]
    assert mix({"sources": {"x": {"path": given}}}, str(tmp_path / "mix"), QUIET)["counts"]["rows"] == 1


HOW = "\nAnswer in one word."


@pytest.mark.parametrize(
    ("questions", "kept"),
    [
        (["<image>\nWhat?" + HOW, "Where?" + HOW, "Who?" + HOW], ["<image>\nWhat?" + HOW, "Where?", "Who?"]),
        (["What?" + HOW, "Where?"], None),  # the second asks for more
        (["What?" + HOW, "Where?\nAnswer with a letter."], None),
        (["What?" + HOW], None),
        (["What?", "What?"], None),
        (["What?" + HOW, HOW.strip()], None),  # nothing would be left
        (["What?\n<image>", "Where?\n<image>"], None),  # that line shows something
        (["What?\n", "Where?\n"], None),
    ],
)
def test_how_to_answer_is_said_once_where_all_questions_say_the_same(questions, kept):
    record = {"id": "r", "conversations": turns(*(text for asked in questions for text in (asked, "it" + HOW)))}
    said, count = reshape.instruct_once(record)
    assert [turn["value"] for turn in said["conversations"][::2]] == (kept or questions)
    assert {turn["value"] for turn in said["conversations"][1::2]} == {"it" + HOW}
    assert count == (len(questions) - 1 if kept else 0) and (kept or said is record)


def test_a_mix_says_how_many_questions_no_longer_say_how_to_answer(tmp_path, capsys):
    held = [{"id": n, "conversations": turns("What?" + HOW, "it", "Where?" + HOW, "there")} for n in range(4)]
    source = {"path": write(tmp_path / "s.json", held), "instructions": "once", "max_rounds": 2}
    manifest = mix({"sources": {"s": source}, "shuffle": False}, str(tmp_path / "mix"), Job())
    assert manifest["sources"]["s"]["said_once"] == 4
    assert (
        "s: 4 questions no longer repeat the closing line of their record's first question" in capsys.readouterr().err
    )
    asked = [json.loads(data)["conversations"] for _, data in members(tmp_path / "mix" / "000000.tar")]
    assert all([turn["value"] for turn in each] == ["What?" + HOW, "it", "Where?", "there"] for each in asked)
    source["max_rounds"] = 1  # each record has a first question
    manifest = mix({"sources": {"s": source}, "shuffle": False}, str(tmp_path / "single"), QUIET)
    assert manifest["counts"]["rows"] == 8 and "said_once" not in manifest["sources"]["s"]


@pytest.mark.parametrize("torn", ["footer", "page"])
def test_of_several_parquet_files_the_torn_one_is_named(tmp_path, torn):
    rows = [{"id": f"r{n}", "conversations": turns("q" * 900, "a")} for n in range(40)]
    (tmp_path / "in").mkdir()
    for name in "abc":
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "in" / f"{name}.parquet", compression="none")
    data = bytearray((tmp_path / "in" / "b.parquet").read_bytes())
    data[4:60] = b"\xff" * 56  # the head of the first page
    (tmp_path / "in" / "b.parquet").write_bytes(data if torn == "page" else data[:400])
    with pytest.raises(ContractError, match=r"mix source p cannot be read: .*in/b\.parquet: "):
        mix({"sources": {"p": {"path": str(tmp_path / "in")}}}, str(tmp_path / "mix"), QUIET)
