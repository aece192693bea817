"""Captions wherever people keep them, and what is no caption though it has bytes."""

import json
import time

import pytest
import tiny_clip
from artefacts import members, picture
from test_embed import QUIET, make_tar, table_of

from curate.embed.captions import clean
from curate.embed.embed import EmbedOptions, embed
from curate.errors import UsageError
from curate.ingest.pack import PackOptions, pack
from house import curate, manifest
from pipelines.samples import SPACES, from_sample, visible


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_clip.write(tmp_path_factory.mktemp("model") / "clip")


@pytest.mark.parametrize(
    "given, taken",
    [
        ("\ufeffa dog\r\n", "a dog"),
        ("a\0 dog", "a dog"),
        ("\u200b\u200ba dog \u200d", "a dog"),
        ("family \U0001f468\u200d\U0001f469", "family \U0001f468\u200d\U0001f469"),
        ("می\u200cخواهم", "می\u200cخواهم"),
        *((nothing, None) for nothing in ("", " ", "\ufeff", "\0\0", "\u200b", "\u200b \u2060\u200e", "\ufeff\r\n")),
        ("\u00ad", None),
        ("\u00ada dog", "a dog"),
        (None, None),
        (7, None),
        ("\ud800", None),
    ],
)
def test_invisible_characters_are_no_caption_and_no_part_of_one(given, taken):
    assert clean(given) == taken
    if isinstance(given, str) and given != "\ud800":  # what is embedded is what is trained on
        record = from_sample(None, given.encode(), ["jpg"], "key", "").record
        assert (record["conversations"][1]["value"] if record else None) == taken


def test_spaces_at_the_ends_and_within_cost_no_more_than_they_are_long():
    """A search for what ends a text tries every space within it; stripping by turns copies the text at each turn."""
    assert set(SPACES) == {chr(code) for code in range(0x110000) if chr(code).isspace()}
    turns = "\u200b " * 200_000
    began = time.process_time()
    assert clean(f"{turns}a dog{turns[::-1]}") == "a dog"
    assert visible(f"{turns}a{turns}dog{turns}") == f"a{turns}dog"
    assert time.process_time() - began < 2


POOL = {
    "a": {"txt": b"\xef\xbb\xbffrom txt\r\n", "json": {"text": "from text", "captions": ["one", "two", "three"]}},
    "b": {"json": {"text": "\u200b", "TEXT": "from TEXT", "captions": ["", "four"]}},
    "c": {"cap": b"from cap", "json": {"captions": "alone"}},
    "d": {"txt": b"", "json": {"caption": "from json"}},
    "e": {"txt": "\u200b".encode()},
    "f": {"json": {"caption": ["first of a list", "second"]}},
}


def write(folder, samples):
    parts = []
    for number, (key, held) in enumerate(samples.items()):
        parts.append((f"{key}.jpg", picture(number)))
        for suffix, value in held.items():
            parts.append((f"{key}.{suffix}", json.dumps(value).encode() if isinstance(value, dict) else value))
    return make_tar(folder / "00000.tar", parts)


def captions(directory):
    return {row["key"]: row["caption"] for row in table_of(directory)}


WAYS = {
    "": ["from txt", None, None, "from json", None, "first of a list"],
    "text,TEXT,cap": ["from text", "from TEXT", "from cap", None, None, None],
    "captions": ["one", "four", "alone", None, None, None],
    ".cap,txt": ["from txt", None, "from cap", None, None, None],
}


@pytest.mark.parametrize("fields", WAYS)
def test_captions_come_from_where_they_are_and_from_where_they_are_asked_for(tmp_path, model, fields):
    pool = write(tmp_path / "pool", POOL)
    made = embed(pool, str(tmp_path / "emb"), EmbedOptions(model, caption=fields), QUIET)
    assert list(captions(tmp_path / "emb").values()) == WAYS[fields]
    statuses = ["ok" if caption else "no_caption" for caption in WAYS[fields]]
    assert [row["status"] for row in table_of(tmp_path / "emb")] == statuses
    assert made["options"].get("caption", "") == fields


def test_one_of_several_captions_is_picked_by_the_seed_alone(tmp_path, model):
    listed = {"captions": [f"caption {each}" for each in range(4)]}
    pool = write(tmp_path / "pool", {f"{number:03d}": {"json": listed} for number in range(24)})
    pick = ("--caption", "captions", "--caption-pick", "random", "--seed", 1)
    curate("embed", pool, tmp_path / "one", "--model", model, *pick)
    for name, seed in (("again", 1), ("two", 2)):
        options = EmbedOptions(model, caption="captions", caption_pick="random", seed=seed)
        embed(pool, str(tmp_path / name), options, QUIET)
    one, again, two = (captions(tmp_path / name) for name in ("one", "again", "two"))
    assert one == again != two and set(one.values()) == set(listed["captions"])
    with pytest.raises(UsageError, match="--caption FIELD"):
        embed(pool, str(tmp_path / "x"), EmbedOptions(model, caption_pick="random"), QUIET)


def test_a_pool_without_captions_is_refused_with_the_fields_that_it_has(tmp_path, model):
    pool = write(tmp_path / "pool", {"a": {"json": {"re_caption": "a dog", "score": 3, "tags": ["x"]}}})
    with pytest.raises(UsageError, match="re_caption, tags.*--caption FIELD"):
        embed(pool, str(tmp_path / "emb"), EmbedOptions(model), QUIET)
    with pytest.raises(UsageError, match="one of text.*re_caption"):
        embed(pool, str(tmp_path / "emb"), EmbedOptions(model, caption="text"), QUIET)


def test_pack_takes_the_column_that_is_named_and_the_first_of_a_list(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "in").mkdir()
    rows = {"key": ["a", "b"], "image": [picture(1), picture(2)], "caption": [["", "one"], []]}
    pq.write_table(pa.table(rows | {"re_caption": ["better", "\ufeff"]}), tmp_path / "in" / "x.parquet")
    pack(str(tmp_path / "in"), str(tmp_path / "lists"), PackOptions(), QUIET)
    pack(str(tmp_path / "in"), str(tmp_path / "named"), PackOptions(caption="llava_caption,re_caption"), QUIET)
    texts = [
        {name: data for name, data in members(tmp_path / made / "x.tar") if name.endswith(".txt")}
        for made in ("lists", "named")
    ]
    assert texts == [{"a.txt": b"one"}, {"a.txt": b"better"}]


TALK = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
TALK += [{"role": "assistant", "content": "A dog."}]


def test_only_members_with_text_are_offered_as_captions(tmp_path, model):
    held = {"a": {"npy": b"\x93NUMPY\xff"}, "b": {"txt.gz": b"\x1f\x8b\x08\xff"}, "c": {"en.txt": b"words"}}
    curate("embed", write(tmp_path / "pool", held | {"d": {"txt": b"words"}}), tmp_path / "emb", "--model", model)
    told = {kind: fault["example"] for kind, fault in manifest(tmp_path / "emb")["faults"].items()}
    assert told == {
        "no_caption: no caption member, or an empty one": "00000: a",
        "no_caption: but it has en.txt, which --caption FIELD would take": "00000: c",
    }


def test_rows_without_caption_and_pictures_beside_the_first_are_said_with_an_example(tmp_path, model):
    held = {
        "a": {"json": {"caption": "", "url": "http://a", "TEXT": "words"}, "cap": b"words"},
        "b": {"txt": "w\u00f6rter".encode("latin-1")},
        "c": {"json": {"messages": TALK, "images": ["elsewhere.jpg"]}},
        "d": {"json": {"query": "<image>Who?", "response": "A cat."}, "1.png": picture(9)},
    }
    pool = write(tmp_path / "pool", held | {"e": {"json": {}}})
    ended = curate("embed", pool, tmp_path / "emb", "--model", model)
    assert captions(tmp_path / "emb") == {"a": None, "b": None, "c": "What?\nA dog.", "d": "Who?\nA cat.", "e": None}
    told = {
        "no_caption: but it has TEXT, cap, which --caption FIELD would take (e.g. 00000: a)",
        "no_caption: no caption member, or an empty one (e.g. 00000: e)",
        "bad_caption: not UTF-8: convert the file, e.g. with iconv (e.g. 00000: b)",
        "ok: samples of several pictures, of which only the first is embedded (e.g. 00000: d)",
    }
    assert {line.partition(" × ")[2] for line in ended.stderr.splitlines() if " × " in line} == told
    assert sum(fault["count"] for fault in manifest(tmp_path / "emb")["faults"].values()) == 4
    assert "not UTF-8" in curate("show", tmp_path / "emb", "--key", "b").stdout
