import gzip
import json
import os
from pathlib import Path

import pytest
from artefacts import members, picture, tree, write_embeddings, write_pool, write_selection

from curate.emit.emit import EmitOptions, emit
from curate.engine import Job
from curate.errors import UsageError
from curate.storage import sidecar
from curate.storage import tar as tar_room
from curate.storage.manifest import Artefact, ContractError, load_json, open_input, save_json
from curate.storage.tar import TarWriter
from house import ROOT, Command, until

QUIET = Job(workers=1, quiet=True)
PAIRS = Path(__file__).parents[3] / "shared" / "data" / "pairs"


def chain(tmp_path, kept=lambda stem, row, key: row % 3 == 0 or "sample(9)", **pool):
    where = write_pool(tmp_path / "pool", ["00000", "00001", "00002"], 10, **pool)
    emb = write_embeddings(tmp_path / "emb", where)
    return write_selection(tmp_path / "sel", emb, kept)


def test_original_members_in_order_byte_for_byte(tmp_path):
    sel = chain(tmp_path)
    manifest = emit(sel, str(tmp_path / "out"), EmitOptions(shard_size=5), QUIET)
    expected = [
        pair
        for stem in ("00000", "00001", "00002")
        for at, pair in enumerate(members(tmp_path / "pool" / f"{stem}.tar"))
        if at // 3 % 3 == 0
    ]
    found = [members(tmp_path / "out" / f"{name}.tar") for name in ("000000", "000001", "000002")]
    assert [len(shard) for shard in found] == [15, 15, 6]
    assert sum(found, []) == expected
    assert manifest["counts"] == {"rows": 12, "written": 12}
    sidecar = open_input(str(tmp_path / "out")).table("000001")
    assert sidecar["key"].to_pylist() == [name[:-4] for name, _ in found[1][::3]]
    assert sidecar["source_stem"].to_pylist()[-1] == "00002"


def test_members_of_every_kind_are_emitted_byte_for_byte(tmp_path):
    where = write_pool(tmp_path / "pool", ["00000"], 1)
    kinds = ("pt", "pkl", "pth", "pyd", "pickle", "seg.npy", "mp3", "PT")
    held = [("k.jpg", picture(7)), ("k.txt", b"words"), *((f"k.{kind}", kind.encode()) for kind in kinds[:-1])]
    with open(tmp_path / "pool" / "00001.tar", "wb") as file, TarWriter(file) as tar:
        for name, data in held:
            tar.add(name, data)
    sel = write_selection(tmp_path / "sel", write_embeddings(tmp_path / "emb", where), lambda stem, row, key: True)
    emit(sel, str(tmp_path / "out"), EmitOptions(), QUIET)
    assert members(tmp_path / "out" / "000000.tar")[-len(held) :] == held


@pytest.mark.parametrize("kind", ["parquet", "clip-retrieval"])
def test_tables_tell_how_far_a_long_shard_is(tmp_path, monkeypatch, kind):
    told = []
    monkeypatch.setattr("curate.engine.advance", told.append)
    made = emit(chain(tmp_path), str(tmp_path / "out"), EmitOptions(format=kind), Job(workers=1, quiet=True))
    assert sum(told) == sum(shard["rows"] for shard in made["shards"].values()) > 0


def test_slices_end_where_each_has_a_shard_that_failed_for_good(tmp_path):
    sel = chain(tmp_path)
    emb = tmp_path / "emb"
    whole = {stem: (emb / f"{stem}.arrow").read_bytes() for stem in ("00000", "00001", "00002")}
    for stem in ("00000", "00001"):
        (emb / f"{stem}.arrow").write_bytes(b"torn")
    options = EmitOptions(format="parquet")
    first = emit(sel, str(tmp_path / "out"), options, Job(workers=1, quiet=True, part=(0, 2)))
    assert first["unfinished"] == ["00001"] and list(first["failed"]) == ["00000"]
    last = emit(sel, str(tmp_path / "out"), options, Job(workers=1, quiet=True, part=(1, 2)))
    assert list(last["failed"]) == ["00000", "00001"] and list(last["shards"]) == ["00002"]
    for stem, data in whole.items():
        (emb / f"{stem}.arrow").write_bytes(data)
    for rank in (0, 1):
        mended = emit(sel, str(tmp_path / "out"), options, Job(workers=1, quiet=True, part=(rank, 2)))
    assert "failed" not in mended and len(mended["shards"]) == 3
    assert not (tmp_path / "out" / ".failed").exists()


@pytest.mark.parametrize("kind", ["webdataset", "llava", "keys", "datacomp", "parquet", "clip-retrieval"])
def test_any_worker_count_and_any_slices_leave_the_same_bytes(tmp_path, kind):
    sel, options = chain(tmp_path), EmitOptions(format=kind, shard_size=4)
    emit(sel, str(tmp_path / "one"), options, QUIET)
    emit(sel, str(tmp_path / "two"), options, Job(workers=2, quiet=True))
    for rank in (1, 0):
        emit(sel, str(tmp_path / "sliced"), options, Job(workers=1, quiet=True, part=(rank, 2)))
    assert tree(tmp_path / "one") == tree(tmp_path / "two") == tree(tmp_path / "sliced")
    assert "manifest.json" in tree(tmp_path / "one")


def test_a_finished_directory_is_left_alone_and_other_options_are_refused(tmp_path):
    sel = chain(tmp_path)
    first = emit(sel, str(tmp_path / "out"), EmitOptions(), QUIET)
    stamp = os.stat(tmp_path / "out" / "000000.tar").st_mtime_ns
    assert emit(sel, str(tmp_path / "out"), EmitOptions(), QUIET) == first
    assert os.stat(tmp_path / "out" / "000000.tar").st_mtime_ns == stamp
    with pytest.raises(ContractError, match="shard_size=10000, now shard_size=7"):
        emit(sel, str(tmp_path / "out"), EmitOptions(shard_size=7), QUIET)


@pytest.mark.parametrize("kind", ["webdataset", "llava"])
def test_killed_in_mid_emit_then_run_again(tmp_path, kind):
    sel = chain(tmp_path, kept=lambda stem, row, key: True)
    emit(sel, str(tmp_path / "whole"), EmitOptions(format=kind, shard_size=2), QUIET)
    out = tmp_path / "killed"
    code = (
        "import time, curate.emit.kept_samples as c\n"
        "fetch = c.Coreset.fetch\n"
        "def slow(*a):\n    for s in fetch(*a):\n        time.sleep(0.05)\n        yield s\n"
        "c.Coreset.fetch = slow\n"
        "from curate.emit.emit import *; from curate.engine import Job\n"
        f"emit({sel!r}, {str(out)!r}, EmitOptions(format={kind!r}, shard_size=2), Job(workers=1, quiet=True))"
    )
    (tmp_path / "slow.py").write_text(code)
    running = Command(tmp_path / "slow.py", cwd=ROOT)
    until(lambda: running.poll() is not None or list(out.glob("000002.*")))
    running.kill()
    assert not (out / "manifest.json").exists()
    before = {path: path.stat().st_mtime_ns for path in out.glob("00000[01].*")}
    emit(sel, str(out), EmitOptions(format=kind, shard_size=2), QUIET)
    assert tree(out) == tree(tmp_path / "whole")
    assert before == {path: path.stat().st_mtime_ns for path in before}


@pytest.mark.parametrize(
    "kind, left", [("parquet", "table/00001.parquet"), ("clip-retrieval", "img_emb/img_emb_1.npy")]
)
def test_what_a_killed_run_left_half_written_in_a_folder_goes(tmp_path, kind, left):
    sel, left = chain(tmp_path), tmp_path / "out" / f"{left}.99.tmp"
    emit(sel, str(tmp_path / "whole"), EmitOptions(format=kind), QUIET)
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half a file")
    plan = {key: load_json(str(tmp_path / "whole" / "manifest.json"))[key] for key in ("command", "options", "inputs")}
    save_json(str(tmp_path / "out" / ".plan.json"), plan)
    emit(sel, str(tmp_path / "out"), EmitOptions(format=kind), QUIET)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_what_the_pool_lost_is_counted_listed_and_never_replaced_silently(tmp_path):
    sel = chain(tmp_path, kept=lambda stem, row, key: True)
    changed = members(tmp_path / "pool" / "00000.tar")
    changed[0] = (changed[0][0], picture(999))
    del changed[3:6]
    with open(tmp_path / "pool" / "00000.tar", "wb") as file, TarWriter(file) as tar:
        for name, data in changed:
            tar.add(name, data)
    (tmp_path / "pool" / "00001.tar").unlink()
    (tmp_path / "pool" / "00002.tar").write_bytes(b"nothing of the kind" * 100)
    manifest = emit(sel, str(tmp_path / "out"), EmitOptions(), QUIET)
    assert manifest["counts"] == {
        "rows": 30, "written": 8, "changed": 1, "gone": 1, "shard_missing": 10, "shard_unreadable": 10,
    }  # fmt: skip
    assert manifest["gone"][:2] == [
        {"stem": "00000", "row": 0, "key": "000000000", "why": "changed"},
        {"stem": "00000", "row": 1, "key": "000000001", "why": "gone"},
    ]
    assert members(tmp_path / "out" / "000000.tar") == changed[3:]


@pytest.mark.parametrize("kind", ["webdataset", "llava"])
def test_what_is_gone_is_replaced_by_the_next_in_rank(tmp_path, kind):
    emb = write_embeddings(tmp_path / "emb", write_pool(tmp_path / "pool", ["00000", "00001"], 10))
    funnel = {"steps": [], "reserve": [["00001", 9], ["00000", 7], ["00000", 3], ["00001", 1]]}
    kept = lambda stem, row, key: row in (0, 2, 4) or "sample(9)"  # noqa: E731
    sel = write_selection(tmp_path / "sel", emb, kept, funnel=funnel)
    entries = members(tmp_path / "pool" / "00000.tar")
    with open(tmp_path / "pool" / "00000.tar", "wb") as file, TarWriter(file) as tar:
        for name, data in entries:
            if int(name[:9]) not in (0, 2, 7):
                tar.add(name, data)
    for out in ("once", "twice"):
        manifest = emit(sel, str(tmp_path / out), EmitOptions(format=kind, shard_size=4), Job(workers=2, quiet=True))
    assert manifest["counts"] == {"rows": 6, "written": 6, "gone": 2, "replaced": 2}
    assert [entry["key"] for entry in manifest["gone"]] == ["000000000", "000000002"]
    names = open_input(str(tmp_path / "once")).table("000002")["key"].to_pylist()
    assert names == ["000000019", "000000003"]
    assert tree(tmp_path / "once") == tree(tmp_path / "twice")


def test_colliding_keys_are_made_unique_and_said_so(tmp_path):
    pool = write_pool(tmp_path / "pool", ["a"], 3)
    write_pool(tmp_path / "pool", ["b.2"], 3)
    sel = write_selection(tmp_path / "sel", write_embeddings(tmp_path / "emb", pool), lambda stem, row, key: True)
    manifest = emit(sel, str(tmp_path / "out"), EmitOptions(), QUIET)
    names = [name for name, _ in members(tmp_path / "out" / "000000.tar")]
    assert len(set(names)) == 18
    assert names[9:12] == [f"b_2__000000000.{suffix}" for suffix in ("jpg", "txt", "json")]
    assert manifest["renamed"]["b_2__000000000"] == "b.2 row 0"
    assert manifest["counts"]["renamed"] == 3
    emit(sel, str(tmp_path / "llava"), EmitOptions(format="llava"), QUIET)
    assert len(list((tmp_path / "llava" / "images").rglob("*.jpg"))) == 6


def test_a_hostile_member_is_never_written_outside(tmp_path):
    pool = write_pool(tmp_path / "pool", ["00000"], 2)
    with open(tmp_path / "pool" / "00000.tar", "wb") as file, TarWriter(file) as tar:
        for key in ("../../evil", "fine"):
            tar.add(f"{key}.jpg", picture(1 if key == "fine" else 2))
            tar.add(f"{key}.txt", b"words")
            tar.add(f"{key}.pyd", b"cos\nsystem\n")
    sel = write_selection(tmp_path / "sel", write_embeddings(tmp_path / "emb", pool), lambda stem, row, key: True)
    for kind in ("webdataset", "llava"):
        manifest = emit(sel, str(tmp_path / kind), EmitOptions(format=kind), QUIET)
        assert manifest["counts"] == {"rows": 2, "written": 1, "unsafe_key": 1}
    assert [name for name, _ in members(tmp_path / "webdataset" / "000000.tar")] == ["fine.jpg", "fine.txt", "fine.pyd"]
    assert not list(tmp_path.rglob("evil*"))


def test_a_sample_of_which_no_file_can_be_named_is_counted_and_the_others_are_written(tmp_path):
    pool = write_pool(tmp_path / "pool", ["00000"], 1)
    with open(tmp_path / "pool" / "00000.tar", "wb") as file, TarWriter(file) as tar:
        for number, key in enumerate(("a", "long" * 100, "a.jpg/b", "c")):
            tar.add(f"{key}.jpg", picture(number))
            tar.add(f"{key}.txt", b"words")
    sel = write_selection(tmp_path / "sel", write_embeddings(tmp_path / "emb", pool), lambda stem, row, key: True)
    manifest = emit(sel, str(tmp_path / "llava"), EmitOptions(format="llava"), QUIET)
    assert manifest["counts"] == {"rows": 4, "written": 2, "no_file_name": 2}
    assert [each["id"] for each in load_json(str(tmp_path / "llava" / "coreset.json"))] == ["a", "c"]
    assert emit(sel, str(tmp_path / "tars"), EmitOptions(), QUIET)["counts"] == {"rows": 4, "written": 4}


def test_llava_json_with_images(tmp_path):
    turns = [{"from": "human", "value": "What?\n<image>"}, {"from": "gpt", "value": "that"}]
    write_pool(tmp_path / "pool", ["x"], 2, extra={"conversations": turns}, first=100)
    sel = chain(tmp_path, kept=lambda stem, row, key: row == 1 or "sample(9)", caption=lambda row: f"<b>{row}</b> é\n")
    emit(sel, str(tmp_path / "out"), EmitOptions(format="llava", shard_size=3, prompt="Say."), QUIET)
    records = json.loads((tmp_path / "out" / "coreset.json").read_text())
    assert records[0] == {"id": "000000101", "image": records[0]["image"], "conversations": turns} or len(records) == 4
    by_id = {record["id"]: record for record in records}
    assert by_id["000000101"]["conversations"] == turns
    assert by_id["000000001"]["conversations"] == [
        {"from": "human", "value": "<image>\nSay."}, {"from": "gpt", "value": "<b>1</b> é\n"}
    ]  # fmt: skip
    for number, record in zip([1, 11, 21, 101], sorted(records, key=lambda record: record["id"]), strict=True):
        assert (tmp_path / "out" / "images" / record["image"]).read_bytes() == picture(number)


def test_llava_json_has_a_mark_for_each_image_whatever_the_form_of_the_record(tmp_path):
    texts = [{"user": "What?", "assistant": "that"}, {"user": "And?", "assistant": "this"}]
    parts = [{"type": "image"}, {"type": "text", "text": "What?"}]
    said = [{"role": "user", "content": parts}, {"role": "assistant", "content": "that"}]
    for stem, form in (("texts", {"texts": texts}), ("parts", {"messages": said})):
        sel = chain(tmp_path / stem, kept=lambda stem, row, key: row == 0 or "sample(9)", extra=form)
        emit(sel, str(tmp_path / stem / "out"), EmitOptions(format="llava"), QUIET)
        for record in json.loads((tmp_path / stem / "out" / "coreset.json").read_text()):
            assert record["conversations"][0]["value"] == "<image>\nWhat?"
            rest = [turn["value"] for turn in record["conversations"][1:]]
            assert rest == (["that", "And?", "this"] if stem == "texts" else ["that"])


def test_a_pool_that_moved(tmp_path):
    sel = chain(tmp_path)
    (tmp_path / "pool").rename(tmp_path / "moved")
    with pytest.raises(UsageError, match="--pool"):
        emit(sel, str(tmp_path / "out"), EmitOptions(), QUIET)
    manifest = emit(sel, str(tmp_path / "out"), EmitOptions(), QUIET, pool=str(tmp_path / "moved"))
    assert manifest["counts"]["written"] == 12
    assert str(tmp_path) not in json.dumps(manifest)


def test_a_shard_that_comes_back_is_looked_for_again(tmp_path):
    sel = chain(tmp_path, kept=lambda stem, row, key: True)
    (tmp_path / "pool" / "00001.tar").rename(tmp_path / "away.tar")
    assert emit(sel, str(tmp_path / "out"), EmitOptions(), QUIET)["counts"]["shard_missing"] == 10
    (tmp_path / "away.tar").rename(tmp_path / "pool" / "00001.tar")
    assert emit(sel, str(tmp_path / "out"), EmitOptions(), QUIET)["counts"] == {"rows": 30, "written": 30}
    emit(sel, str(tmp_path / "whole"), EmitOptions(), QUIET)
    assert members(tmp_path / "out" / "000000.tar") == members(tmp_path / "whole" / "000000.tar")


def test_keys_of_renamed_rows_are_read_once_a_shard(tmp_path, monkeypatch):
    for stem in ("00000", "00001"):
        write_pool(tmp_path / "pool", [stem], 40)  # the same keys
    emb = write_embeddings(tmp_path / "emb", str(tmp_path / "pool"))
    sel = write_selection(tmp_path / "sel", emb, lambda *_: True)
    reads, table = [], Artefact.table
    monkeypatch.setattr(Artefact, "table", lambda self, *words: reads.append(words) or table(self, *words))
    assert emit(sel, str(tmp_path / "out"), EmitOptions(), QUIET)["counts"]["written"] == 80
    assert len(reads) < 20


def test_a_pool_that_has_none_of_the_samples_is_refused(tmp_path):
    sel, other = chain(tmp_path), write_pool(tmp_path / "other", ["00001"], 10, first=500)
    with pytest.raises(UsageError, match="none of the 12 kept samples could be read.* shard_missing.*--pool"):
        emit(sel, str(tmp_path / "out"), EmitOptions(), QUIET, pool=other)
    assert not (tmp_path / "out").exists()


def test_nothing_kept_and_unknown_formats_are_refused(tmp_path):
    sel = chain(tmp_path, kept=lambda *_: "sample(9)")
    with pytest.raises(UsageError, match="keeps no sample"):
        emit(sel, str(tmp_path / "out"), EmitOptions(), QUIET)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match="did you mean 'llava'"):
        emit(sel, str(tmp_path / "out"), EmitOptions(format="lava"), QUIET)


def without_members(emb):
    """Make embeddings what format 1 has: the same without `members`."""
    embedded = open_input(emb)
    for stem in embedded.stems:
        where = embedded.path(f"{stem}.arrow")
        table, facts = sidecar.table(where).drop_columns(["members"]).combine_chunks(), sidecar.facts(where)
        sidecar.write_table(where, table.schema, table.to_batches(), facts)
    save_json(embedded.path("manifest.json"), {**embedded.manifest, "format": 1})


@pytest.mark.parametrize("kind", ["webdataset", "llava"])
@pytest.mark.parametrize("share", [3, 2, 1])
def test_places_of_members_and_a_look_through_the_tar_leave_the_same_bytes(tmp_path, monkeypatch, kind, share):
    where = write_pool(tmp_path / "pool", ["00000", "00001"], 10)
    for stem in ("packed", "odd"):
        write_pool(tmp_path / stem, [stem], 10, first=100 if stem == "odd" else 200)
    packed = gzip.compress((tmp_path / "packed" / "packed.tar").read_bytes())
    (tmp_path / "pool" / "packed.tar").write_bytes(packed)
    odd = members(tmp_path / "odd" / "odd.tar")
    with open(tmp_path / "pool" / "odd.tar", "wb") as file, TarWriter(file) as tar:
        for name, data in [*odd[::3], *odd[1::3], *odd[2::3], ("folder/" * 20 + "long.jpg", picture(5))]:
            tar.add(name, data)
    emb = write_embeddings(tmp_path / "emb", where)
    options = EmitOptions(format=kind, shard_size=7)
    looked = []
    monkeypatch.setattr(
        tar_room, "read_index", lambda file, real=tar_room.read_index: looked.append(file) or real(file)
    )
    for name in ("placed", "looked"):
        if name == "looked":
            without_members(emb)
        sel = write_selection(tmp_path / f"sel-{name}", emb, lambda stem, row, key: row % share == 0 or "sample(9)")
        looked.clear()
        emit(sel, str(tmp_path / name), options, QUIET)
        files = {os.path.basename(getattr(file, "name", "")) for file in looked}
        assert ("00000.tar" in files) == (name == "looked") and looked
    assert tree(tmp_path / "placed", but=("log.jsonl", "manifest.json")) == tree(
        tmp_path / "looked", but=("log.jsonl", "manifest.json")
    )


def test_a_tar_of_the_same_size_with_other_samples_is_looked_through(tmp_path):
    sel = chain(tmp_path, kept=lambda stem, row, key: True)
    place = tmp_path / "pool" / "00001.tar"
    held, size = members(place), place.stat().st_size
    with open(place, "wb") as file, TarWriter(file) as tar:
        for name, data in held[:12] + held[15:] + [(name.replace("0000", "9999"), data) for name, data in held[12:15]]:
            tar.add(name, data)
    assert place.stat().st_size == size
    manifest = emit(sel, str(tmp_path / "out"), EmitOptions(), QUIET)
    assert manifest["counts"] == {"rows": 30, "written": 29, "gone": 1}
    assert [entry["row"] for entry in manifest["gone"]] == [4]


@pytest.mark.realdata
@pytest.mark.skipif(not PAIRS.is_dir(), reason="real pairs are not at hand")
def test_real_pairs_come_through_untouched(tmp_path):
    emb = write_embeddings(tmp_path / "emb", str(PAIRS / "0000[01].tar"))
    sel = write_selection(tmp_path / "sel", emb, lambda stem, row, key: row % 7 == 0 or "sample(9)")
    manifest = emit(sel, str(tmp_path / "out"), EmitOptions(shard_size=50), QUIET)
    assert "gone" not in manifest
    kept = [
        pair
        for stem in ("00000", "00001")
        for at, pair in enumerate(members(PAIRS / f"{stem}.tar"))
        if at // 3 % 7 == 0
    ]
    assert sum((members(path) for path in sorted((tmp_path / "out").glob("*.tar"))), []) == kept
    emit(sel, str(tmp_path / "llava"), EmitOptions(format="llava"), QUIET)
    record = json.loads((tmp_path / "llava" / "coreset.json").read_text())[0]
    assert record["conversations"] == json.loads(kept[2][1])["conversations"]
