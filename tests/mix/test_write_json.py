"""A mix as JSON, read again by each of our readers: no record is changed."""

import json

import pytest
from artefacts import picture
from hypothesis import given, settings
from hypothesis import strategies as st
from test_mix import QUIET, mixed, turns, write_text, write_vqa
from test_mix_rules import llava_records, parquet_of_pictures, several

from curate.mix.mix import mix
from train.data.sources import open_source


def images_of(path):
    """What the trainer sees of a file of records: fields and picture bytes."""
    source = open_source(str(path))
    found = [source.record(index) for index in range(len(source))]
    return [(record.fields, [source.image_bytes(each) for each in record.images]) for record in found]


@pytest.mark.parametrize("form", ["llava", "messages"])
def test_records_of_one_folder_come_back_as_they_were(tmp_path, form):
    path, images, made = write_vqa(tmp_path, 9)
    for n in range(3):
        (tmp_path / "images" / f"{n}.jpg").write_bytes(picture(n))
    made += [several("two", 2), several("apart", 1, 0, 2), {"id": "t", "conversations": turns("no", "image")}]
    made += [
        {"conversations": [{"from": "user", "value": "odd", "weight": 0}, {"from": "bard", "value": "one"}], "x": 1.5}
    ]
    (tmp_path / "vqa.json").write_text(json.dumps(made))
    table = {"format": form, "shuffle": False, "sources": {"a": {"path": path, "images": images}}}
    mix(table, str(tmp_path / "out"), QUIET)
    assert not (tmp_path / "out" / "images").exists(), "pictures stay where they are"
    shown = images_of(tmp_path / "vqa.json")
    assert images_of_copy(tmp_path / "out" / "mix.json", images) == shown
    back = {"shuffle": False, "sources": {"a": {"path": str(tmp_path / "out"), "images": images}}}
    mix(back, str(tmp_path / "back"), QUIET)
    records = [record for record, _ in mixed(tmp_path / "back")]
    assert [json.dumps(record) for record in records] == [json.dumps({**record, "source": "a"}) for record in made]


def images_of_copy(path, images):
    source = open_source(str(path), images)
    found = [source.record(index) for index in range(len(source))]
    return [(record.fields, [source.image_bytes(each) for each in record.images]) for record in found]


@settings(max_examples=20, deadline=None)
@given(st.lists(llava_records(), min_size=1, max_size=8))
def test_no_record_is_changed_by_way_of_messages(tmp_path_factory, made):
    folder = tmp_path_factory.mktemp("round")
    (folder / "images").mkdir()
    (folder / "images" / "a.jpg").write_bytes(picture(1))
    (folder / "x.json").write_text(json.dumps(made))
    source = {"path": str(folder / "x.json"), "images": str(folder / "images")}
    mix({"format": "messages", "shuffle": False, "sources": {"x": source}}, str(folder / "out"), QUIET)
    source["path"] = str(folder / "out")
    mix({"format": "llava", "shuffle": False, "sources": {"x": source}}, str(folder / "back"), QUIET)
    back = json.loads((folder / "back" / "mix.json").read_bytes())
    assert [json.dumps(record) for record in back] == [json.dumps(record) for record in made]


@pytest.mark.parametrize("form", ["llava", "messages"])
def test_pictures_that_lie_in_no_folder_are_copied(tmp_path, form):
    path, images, made = write_vqa(tmp_path, 4)
    mix({"sources": {"v": {"path": path, "images": images}}}, str(tmp_path / "tars"), QUIET)
    table = {"p": {"path": parquet_of_pictures(tmp_path, 3)}, "tars": {"path": str(tmp_path / "tars")}}
    table["text"] = {"path": write_text(tmp_path, 2)}
    mix({"format": form, "shuffle": False, "sources": table}, str(tmp_path / "out"), QUIET)
    found = images_of(tmp_path / "out" / "mix.json")
    assert [shown for _, shown in found[:3]] == [[picture(n)] for n in range(3)]
    assert found[0][0]["image"] == "p/000000000.jpg" and found[0][0]["id"] == 0
    before = {json.dumps(record["conversations"]): image for record, image in mixed(tmp_path / "tars")}
    assert {json.dumps(f["conversations"]): shown[0] for f, shown in found[3:7]} == before
    again = mix({"sources": {"all": {"path": str(tmp_path / "out")}}}, str(tmp_path / "again"), QUIET)
    assert again["counts"]["rows"] == 9 and not again["faults"], "the folder of copies is found"


def test_other_trainers_find_their_columns(tmp_path):
    """By their documented forms: text with marks for LLaMA-Factory and ms-swift, parts for TRL, one type a column."""
    import pyarrow as pa

    (tmp_path / "images").mkdir()
    for n in range(2):
        (tmp_path / "images" / f"{n}.jpg").write_bytes(picture(n))
    made = [several(1, 2), {"id": "t", "conversations": [{"from": "system", "value": "Be."}, *turns("Hi", "Yo")]}]
    made += [{"id": [2.5], "source": {"deep": 1}, "conversations": turns("Hi", "Yo")}]
    (tmp_path / "x.json").write_text(json.dumps(made))
    source = {"path": str(tmp_path / "x.json"), "images": str(tmp_path / "images")}
    mix({"format": "messages", "shuffle": False, "sources": {"x": source}}, str(tmp_path / "out"), QUIET)
    info = json.loads((tmp_path / "out" / "dataset_info.json").read_text())["mix"]
    rows = json.loads((tmp_path / "out" / info["file_name"]).read_bytes())
    assert pa.Table.from_pylist(rows).num_rows == 3, "one type a column, as datasets needs"
    tags, columns = info["tags"], info["columns"]
    for row in rows:
        said = [(turn[tags["role_tag"]], turn[tags["content_tag"]]) for turn in row[columns["messages"]]]
        said = said[1:] if said[0][0] == tags["system_tag"] else said
        assert [role for role, _ in said] == [tags["user_tag"], tags["assistant_tag"]]
        assert said[0][1].count("<image>") == len(row[columns["images"]])
        assert all((tmp_path / "images" / name).is_file() for name in row[columns["images"]])
    lines = [json.loads(line) for line in (tmp_path / "out" / "mix.trl.jsonl").read_bytes().splitlines()]
    assert pa.Table.from_pylist(lines).num_rows == 3
    assert lines[0] == {
        "messages": [
            {"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "q0"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "a0"}]},
        ],
        "images": ["0.jpg", "1.jpg"],
    }


def test_records_that_another_trainer_refuses_are_said(tmp_path):
    said = [["q", "a"], ["q", "look: <image>"], ["q", "a", "q"]]
    values = [{"id": f"r{n}", "conversations": turns(*each)} for n, each in enumerate(said)]
    (tmp_path / "a.json").write_text(json.dumps(values))
    table = {"format": "messages", "sources": {"a": {"path": str(tmp_path / "a.json")}}}
    made = mix(table, str(tmp_path / "mix"), QUIET)
    told = {kind.partition(":")[0]: fault for kind, fault in made["not_for_all"].items()}
    assert told == {
        "records with <image> in an answer": {"count": 1, "example": "r1"},
        "records whose turns do not alternate": {"count": 1, "example": "r2"},
    }
