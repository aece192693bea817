# ruff: noqa: E501  (a form a line)
"""One reader of instruction records for `curate mix` and for `train`: what one takes, the other takes, and alike."""

import base64
import io
import json
import os
import random
import time
import tracemalloc

import pytest
from artefacts import picture

from curate.mix import sources
from curate.mix.pictures import read_picture
from curate.storage.records import read_records
from pipelines import record_files
from pipelines.records import read
from pipelines.samples import from_sample, ordered_pictures
from train.data.prompts import Rejected, parse
from train.data.sources import open_source
from train.errors import TrainError

ANSWER = {"role": "assistant", "content": "A blob."}
A, B = picture(1), picture(2)


def turns(question, answer="A blob.", asks="human", answers="gpt"):
    return [{"from": asks, "value": question}, {"from": answers, "value": answer}]


def messages(content):
    return [{"role": "user", "content": content}, ANSWER]


def part(**fields):
    return {"type": "image", **fields}


WORDS = {"type": "text", "text": "What?"}
DATA_URI = "data:image/jpeg;base64," + base64.b64encode(A).decode()
# name -> the record as written, the pictures that it shows, its question in LLaVA's form
FORMS = {
    "llava": ({"image": "a.jpg", "conversations": turns("<image>\nWhat?")}, [A], "<image>\nWhat?"),
    "list of one image": ({"image": ["a.jpg"], "conversations": turns("<image>What?")}, [A], "<image>What?"),
    "capital speakers": ({"image": "a.jpg", "conversations": turns("<image>?", asks="Human", answers="GPT")}, [A], "<image>?"),
    "USER": ({"conversations": turns("Hi", asks="USER", answers="ASSISTANT")}, [], "Hi"),
    "role and content in conversations": ({"conversations": messages("Hi")}, [], "Hi"),
    "LLaMA-Factory": ({"messages": messages("<image>What?"), "images": ["a.jpg"]}, [A], "<image>What?"),
    "conversations and images": ({"conversations": turns("<image>x"), "images": ["a.jpg"]}, [A], "<image>x"),
    "ms-swift": ({"query": "<image>What?", "response": "A blob.", "images": ["a.jpg"]}, [A], "<image>What?"),
    "TRL": ({"messages": messages([part(), WORDS]), "images": ["a.jpg"]}, [A], "<image>\nWhat?"),
    "TRL, prompt and completion": ({"prompt": messages("Hi")[:1], "completion": [ANSWER]}, [], "Hi"),
    "parts": ({"messages": messages([part(image="a.jpg"), WORDS])}, [A], "<image>\nWhat?"),
    "parts with a path": ({"messages": messages([part(path="a.jpg"), WORDS])}, [A], "<image>\nWhat?"),
    "OpenAI": (
        {"messages": messages([{"type": "image_url", "image_url": {"url": "a.jpg"}}, WORDS])}, [A], "<image>\nWhat?",
    ),
    "data URI": ({"messages": messages([{"type": "image_url", "image_url": {"url": DATA_URI}}, WORDS])}, [A], "<image>\nWhat?"),
    "named twice": ({"messages": messages([part(image="a.jpg"), WORDS]), "images": ["a.jpg"]}, [A], "<image>\nWhat?"),
    "Qwen": ({"conversations": turns("Picture 1: <img>a.jpg</img>\nWhat?", asks="user")}, [A], "Picture 1: <image>\nWhat?"),
    "numbered parts": ({"messages": messages([part(index=1), part(index=0)]), "images": ["a.jpg", "b.jpg"]}, [B, A], "<image>\n<image>"),
    "interleaved": (
        {"image": ["b.jpg", "a.jpg"], "conversations": turns("<image> or <image>?")}, [B, A], "<image> or <image>?",
    ),
    "texts": ({"images": ["a.jpg", "b.jpg"], "texts": [{"user": "W?", "assistant": "x"}]}, [A, B], "<image>\n<image>\nW?"),
    "alpaca with an image": (
        {"instruction": "<image>What", "input": "here?", "output": "A blob.", "images": ["a.jpg"]}, [A], "<image>What\nhere?",
    ),
    "absolute": ({"image": "HERE/a.jpg", "conversations": turns("<image>")}, [A], "<image>"),
    "file URL": ({"image": "file://HERE/a.jpg", "conversations": turns("<image>")}, [A], "<image>"),
    "as Windows writes it": ({"image": "sub\\b.jpg", "conversations": turns("<image>")}, [B], "<image>"),
    "a mark in an answer": ({"conversations": turns("Tag?", "<image>")}, [], "Tag?"),
}  # fmt: skip
FAULTS = {
    "mark alone": ({"conversations": turns("<image>What?")}, "image_mark_without_image"),
    "mark alone, messages": ({"messages": messages("<image>What?")}, "image_mark_without_image"),
    "placeholder alone": ({"messages": messages([part(), WORDS])}, "image_mark_without_image"),
    "image without mark": ({"image": "a.jpg", "conversations": turns("What?")}, "image_without_image_mark"),
    "images without mark": ({"messages": messages("What?"), "images": ["a.jpg"]}, "image_without_image_mark"),
    "two for one mark": ({"messages": messages("<image>"), "images": ["a.jpg", "b.jpg"]}, "image_without_image_mark"),
    "video": ({"messages": messages("<video>What?"), "videos": ["a.mp4"]}, "it_has_video_which_is_not_read"),
    "video part": ({"messages": messages([{"type": "video", "video": "a.mp4"}, WORDS])}, "it_has_video_which_is_not_read"),
    "sound": ({"messages": messages("x"), "audios": ["a.wav"]}, "it_has_sound_which_is_not_read"),
    "URL": ({"image": "https://example.org/a.jpg", "conversations": turns("<image>")}, "image_is_a_URL_download_it_first"),
    "outside": ({"image": "/etc/passwd", "conversations": turns("<image>")}, "image_outside_folder"),
    "outside, in images": ({"messages": messages("<image>"), "images": ["../x.jpg"]}, "image_outside_folder"),
    "outside, in Qwen's": ({"conversations": turns("<img>/etc/a.jpg</img>")}, "image_outside_folder"),
    "beside the folder": ({"image": "HERE2/a.jpg", "conversations": turns("<image>")}, "image_outside_folder"),
    "up and back": ({"image": "HERE/../x.jpg", "conversations": turns("<image>")}, "image_outside_folder"),
    "missing": ({"messages": messages("<image>"), "images": ["no.jpg"]}, "missing_image"),
    "unknown speaker": ({"conversations": turns("x", asks="tool")}, "bad_turn|tool_turn"),
    "nested for ever": ({"messages": messages("<image>"), "images": [json.loads('{"image":' * 400 + "1" + "}" * 400)]}, "image_is_not_a_name|nested"),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images" / "sub").mkdir(parents=True)
    for name, data in (("a.jpg", A), ("b.jpg", B), ("sub/b.jpg", B)):
        (tmp_path / "images" / name).write_bytes(data)
    return tmp_path


def here(folder, value):
    return json.loads(json.dumps(value).replace("HERE", str(folder / "images")))


def by_mix(folder, path):
    """Read with `curate mix`: [(conversations, picture bytes)], and its faults."""
    faults = sources.Faults()
    options = sources.SourceOptions(str(path), images=str(folder / "images"))
    found = list(sources.entries("s", options, faults, str(folder / "scratch")))
    return [(e.record["conversations"], [read_picture(p) for p in e.pictures]) for e in found], faults


def by_train(path):
    source = open_source(str(path))
    found, reasons = [], []
    for index in range(len(source)):
        try:
            record = source.record(index)
            parse(record.conversations, len(record.images))
        except Rejected as reason:
            reasons.append(str(reason))
        else:
            found.append((record.conversations, [source.image_bytes(each) for each in record.images]))
    return found, reasons


@pytest.mark.parametrize("name", FORMS)
def test_every_form_is_read_alike_by_both(folder, name):
    value, pictures, question = FORMS[name]
    (folder / "x.jsonl").write_text(json.dumps(here(folder, value)) + "\n")
    (mixed,), faults = by_mix(folder, folder / "x.jsonl")
    (trained,), _ = by_train(folder / "x.jsonl")
    assert mixed == trained and not faults.counts
    conversations, shown = mixed
    assert shown == pictures and conversations[0]["value"] == question
    assert [turn["from"] in ("gpt", "assistant") for turn in conversations] == [False, True]


@pytest.mark.parametrize("name", FAULTS)
def test_what_cannot_be_used_is_counted_by_both(folder, name):
    value, reason = FAULTS[name]
    (folder / "x.jsonl").write_text(json.dumps(here(folder, value)) + "\n")
    found, faults = by_mix(folder, folder / "x.jsonl")
    assert not found and sum(faults.counts.values()) == 1
    found, reasons = by_train(folder / "x.jsonl")
    assert not found and len(reasons) == 1
    assert any(reasons[0].startswith(each) for each in reason.split("|"))


def test_a_folder_that_says_all_lets_absolute_names_in(folder):
    (folder / "x.json").write_text(json.dumps([here(folder, FORMS["absolute"][0])] * 2))
    options = sources.SourceOptions(str(folder / "x.json"), images="/")
    assert len(list(sources.entries("s", options, sources.Faults(), str(folder / "scratch")))) == 2
    assert len(open_source(str(folder / "x.json"), "/").record(0).images) == 1


RECORDS = [{"id": f"r{n}", "é": "日\u2028🙂", "conversations": turns(f"q{n} é🙂", "a")} for n in range(4)]
TABLE = {"info": {"version": 1}, "categories": [{"id": 1}], "data": RECORDS}
FILES = {
    "list": json.dumps(RECORDS, indent=1, ensure_ascii=False),
    "lines": "\r\n".join(json.dumps(each, ensure_ascii=False) for each in RECORDS),
    "data": json.dumps(TABLE, ensure_ascii=False),
    "by id": json.dumps({each["id"]: {k: v for k, v in each.items() if k != "id"} for each in RECORDS}, indent=2),
    "one after the other": "\n".join(json.dumps(each, indent=1, ensure_ascii=False) for each in RECORDS),
}


@pytest.mark.parametrize("codec", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("name", FILES)
def test_every_file_gives_its_records(tmp_path, monkeypatch, name, codec):
    data = FILES[name].encode(codec)
    path = tmp_path / "x.json"
    path.write_bytes(data)
    for chunk in (2, 14, 1 << 22):
        items = list(record_files.read_items(io.BytesIO(data), "x.json", chunk))
        assert [item.value for item in items] == RECORDS and not any(item.fault for item in items)
        own = record_files.encoding_of(data[:64])[0]
        assert [record_files.parse(data[i.offset : i.offset + i.size], own) for i in items] == RECORDS
    source = open_source(str(path))
    assert [source.key(n) for n in range(4)] == ["r0", "r1", "r2", "r3"]
    assert [source.record(n).fields for n in range(4)] == RECORDS
    assert [value for value, _ in read_records(io.BytesIO(data), "x.json")] == RECORDS


@pytest.mark.parametrize("codec", ["utf-8", "utf-16-le"])
def test_lines_too_long_for_a_record_are_faults_and_the_others_are_read(tmp_path, monkeypatch, codec):
    monkeypatch.setattr(record_files, "MAX_LINE_BYTES", 1 << 12)
    monkeypatch.setattr(record_files, "CHUNK_BYTES", 1 << 10)
    lines = [json.dumps(each) for each in RECORDS]
    text = "\n".join([lines[0], json.dumps({"id": "x" * 9_000}), *lines[1:], "\0" * 20_000])
    data = text.encode(codec)
    tracemalloc.start()
    items = list(record_files.read_items(io.BytesIO(data), "x.jsonl"))
    assert [item.value for item in items if not item.fault] == RECORDS
    assert [item.fault for item in items if item.fault] == ["not JSON: a line of over 4,096 bytes"] * 2
    assert [item.offset for item in items[1:]] == [item.offset + item.size for item in items[:-1]]
    assert sum(item.size for item in items) == len(data)
    path = tmp_path / "huge.jsonl"
    with path.open("wb") as file:
        file.write((lines[0] + "\n").encode())
        file.truncate((1 << 28) + (1 << 20))  # takes no room on a disk
    monkeypatch.setattr(record_files, "MAX_LINE_BYTES", 8 << 20)
    monkeypatch.setattr(record_files, "CHUNK_BYTES", 1 << 20)
    if codec == "utf-8":
        tracemalloc.reset_peak()
        source = open_source(str(path))
        assert len(source) == 2 and source.record(0).fields == RECORDS[0]
        with pytest.raises(Rejected, match="too_large"):
            source.record(1)
        assert tracemalloc.get_traced_memory()[1] < 40 << 20
    tracemalloc.stop()


def test_lines_in_utf_16_are_read_in_linear_time():
    data = b"".join(f'{{"id": {n}, "conversations": []}}\n'.encode("utf-16-le") for n in range(60_000))
    began = time.process_time()
    assert sum(1 for _ in record_files._byte_lines(io.BytesIO(data), "utf-16-le", 0)) == 60_000
    assert time.process_time() - began < 2  # a copy of what is left for each line takes ten times as long


def test_what_follows_a_list_is_not_lost_unsaid(tmp_path):
    items = list(record_files.read_items(io.BytesIO(b'[{"id": 1}] [{"id": 2}]'), "x"))
    assert [item.fault for item in items] == ["", "not JSON: text after the end of the list"]


def test_a_sample_in_a_tar_needs_not_name_its_pictures():
    stored = {"id": 1, "conversations": turns("<image> or <image>?")}
    reading = from_sample(stored, None, ["k.0.jpg", "k.1.jpg"], "k", "Say.")
    assert reading.record == {**stored, "image": ["k.0.jpg", "k.1.jpg"]}
    assert from_sample(stored, None, ["k.jpg"], "k", "").fault == "an image mark without an image"
    assert from_sample({**stored, "image": ["a", "b"]}, None, ["k.jpg"], "k", "").fault == "missing image"
    assert (
        from_sample(None, b"\xef\xbb\xbf a blob\0\n", ["k.jpg"], "k", "").record["conversations"][1]["value"]
        == "a blob"
    )
    for nothing in (b"", b"\xef\xbb\xbf", "\u200b\u200d \0".encode()):
        assert from_sample(None, nothing, ["k.jpg"], "k", "").fault == "no conversation and no caption"


@pytest.mark.parametrize("asked, answer", [("instruction", "output"), ("query", "response"), ("prompt", "completion")])
def test_a_question_beside_its_answer_is_what_a_sample_without_a_caption_says(asked, answer):
    stored = {asked: "<image>\nWhat?", answer: "A cat."}
    record = from_sample(stored, None, ["k.jpg"], "k", "").record
    assert [turn["value"] for turn in record["conversations"]] == ["<image>\nWhat?", "A cat."]
    assert record["image"] == "k.jpg"
    assert from_sample(stored, b"a caption", ["k.jpg"], "k", "").record["conversations"][1]["value"] == "a caption"
    assert from_sample({asked: "a word"}, None, ["k.jpg"], "k", "").fault == "no conversation and no caption"


def test_numbered_parts_take_their_pictures_out_of_a_tar():
    parts = [{"type": "image", "index": 1}, {"type": "text", "text": "or"}, {"type": "image", "index": 0}]
    stored = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "this"}]}
    for named in ({}, {"images": ["x.jpg", "y.jpg"]}):
        reading = from_sample({**stored, **named}, None, ["k.0.jpg", "k.1.jpg"], "k", "Say.")
        assert reading.record["image"] == (["y.jpg", "x.jpg"] if named else ["k.1.jpg", "k.0.jpg"])
        assert reading.arrange("ab") == ("b", "a")
    plain = from_sample({"conversations": turns("<image> or <image>?")}, None, ["k.0.jpg", "k.1.jpg"], "k", "")
    assert plain.arrange("ab") == ("a", "b") and from_sample(None, b"x", ["k.jpg"], "k", "").arrange("a") == ("a",)


@pytest.mark.parametrize("text", [None, b"", b"\xef\xbb\xbf \n"])
@pytest.mark.parametrize("caption", ["a blob", ["", "a blob", "another"], [None, "a blob"]])
def test_a_caption_in_the_json_stands_behind_an_empty_text_as_it_does_for_embed(text, caption):
    record = from_sample({"caption": caption}, text, ["k.jpg"], "k", "").record
    assert record["conversations"][1]["value"] == "a blob"


def test_pictures_of_a_sample_go_by_their_numbers():
    assert ordered_pictures(["json", "10.jpg", "2.png", "0.jpg"]) == ["0.jpg", "2.png", "10.jpg"]
    assert ordered_pictures(["img1.jpg", "img0.jpg", "txt"]) == ["img0.jpg", "img1.jpg"]
    assert ordered_pictures(["png", "jpg", "json"]) == ["png"], "two formats of one picture"
    assert ordered_pictures(["1).jpg", "thumb.jpg", "0.txt"]) == []


def mangled(rng, value, depth=0):
    """Change a record at random: drop, double, retype, rename, or move parts of it."""
    if rng.random() < 0.06:
        return rng.choice(
            [None, "", 0, [], {}, "<image>", "<img>a.jpg</img>", "a.jpg", ["a.jpg"], -1.5, "\ud800", True]
        )
    if isinstance(value, dict):
        pairs = [(k, mangled(rng, v, depth + 1)) for k, v in value.items() if rng.random() > 0.04]
        if rng.random() < 0.05:
            pairs.append(
                (
                    rng.choice(["image", "images", "video", "messages", "texts", "from", "role", "", "id"]),
                    mangled(rng, value),
                )
            )
        return dict(pairs)
    if isinstance(value, list):
        return [mangled(rng, each, depth + 1) for each in value for _ in range(rng.choice([1, 1, 1, 1, 1, 1, 1, 0, 2]))]
    return value


def test_no_mangled_record_crashes_or_gets_lost(folder):
    """Seeded; FUZZ_RECORDS=10000 for the long run."""
    number, rng = int(os.environ.get("FUZZ_RECORDS", "300")), random.Random(0)
    forms = [here(folder, value) for value, *_ in (*FORMS.values(), *FAULTS.values())]
    made = [mangled(rng, rng.choice(forms)) for _ in range(number)]
    (folder / "x.jsonl").write_text("".join(json.dumps(each) + "\n" for each in made))
    found, faults = by_mix(folder, folder / "x.jsonl")
    assert len(found) + sum(faults.counts.values()) == number
    assert len(faults.counts) < 60, "kinds, not messages"
    trained, reasons = by_train(folder / "x.jsonl")
    assert len(trained) + len(reasons) == number
    for value in made:  # as parquet has it: bytes where JSON has names
        given = (
            {**value, "images": [A, None, {"bytes": B, "path": "x"}][: rng.randrange(4)]}
            if isinstance(value, dict)
            else value
        )
        reading = read(given, "d", given=["a.jpg"] * rng.randrange(3))
        assert (reading.record is None) == bool(reading.fault)


def test_no_mangled_file_crashes_or_hangs(tmp_path):
    number, rng = int(os.environ.get("FUZZ_RECORDS", "300")), random.Random(1)
    whole = [text.encode(codec) for text in FILES.values() for codec in ("utf-8", "utf-16")]
    for _ in range(number):
        data = bytearray(rng.choice(whole))
        for _ in range(rng.randrange(4)):
            at = rng.randrange(len(data))
            data[at : at + rng.randrange(3)] = bytes(rng.choice(b'[]{}",:\n\0\xff ') for _ in range(rng.randrange(3)))
        data = bytes(data[: rng.randrange(len(data) + 1)] if rng.random() < 0.3 else data)
        try:
            items = list(record_files.read_items(io.BytesIO(data), "x.json", rng.choice([3, 50, 1 << 20])))
        except record_files.Broken:
            items = []
        assert all(bool(item.fault) <= (item.value is None) for item in items)
        path = tmp_path / "x.jsonl"
        path.write_bytes(data)
        try:
            source = open_source(str(path))
        except TrainError:
            continue
        for index in range(len(source)):
            source.key(index)


def test_more_images_than_a_record_may_have_are_counted(folder):
    for number, fault in ((64, ""), (65, "more than 64 images")):
        value = {"image": ["a.jpg"] * number, "conversations": turns("<image>" * number)}
        assert read(value, "d").fault == fault
        assert from_sample(None, b"a blob", ["a.jpg"] * number, "k", "").fault == fault
    several = from_sample(None, b"blobs", ["a.jpg", "b.jpg"], "k", "Say.").record
    assert several["image"] == ["a.jpg", "b.jpg"] and several["conversations"][0]["value"] == "<image>\n<image>\nSay."


@pytest.mark.parametrize("key", ["conversations", "messages"])
def test_a_system_text_beside_the_turns_is_said_first_once(folder, key):
    """As LLaMA-Factory and ms-swift read it."""
    said = turns("<image>What?") if key == "conversations" else messages("<image>What?")
    own = [{"from": "system", "value": "Be kind."}, *turns("Hi")]
    made = [
        {"id": 1, key: said, "image": "a.jpg", "system": "Be brief.", "lang": "en"},
        {"id": 2, key: said, "image": "a.jpg", "system": ""},
        {"id": 3, key: own, "system": "Be brief."},
    ]
    (folder / "x.jsonl").write_text("".join(json.dumps(record) + "\n" for record in made))
    mixed, faults = by_mix(folder, folder / "x.jsonl")
    trained, _ = by_train(folder / "x.jsonl")
    plain = turns("<image>What?")
    assert mixed == trained and not faults.counts
    assert [talk for talk, _ in mixed] == [[{"from": "system", "value": "Be brief."}, *plain], plain, own]
    assert {k: v for k, v in read(made[0], "x").record.items() if k != "conversations"} == {
        "id": 1, "image": "a.jpg", "lang": "en"
    }  # fmt: skip
