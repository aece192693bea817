"""Reading samples, good and bad, from shards and from JSON."""

import contextlib
import gzip
import io
import json
import os
import pickle
import resource
import tarfile

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from toys import add, picture, word_tokenizer, write_json, write_mixed

from train.data.encoder import Encoder
from train.data.measuring import measure
from train.data.prompts import Rejected, get_template
from train.data.reading import Files
from train.data.sources import check_bad, decode_image, encode, losses, open_source
from train.errors import DataError, UsageError


@pytest.fixture(scope="module")
def encoder():
    return Encoder(word_tokenizer(), get_template("qa"), "<image>", 4)


def shard(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for member, data in members:
            add(tar, member, data)
    return path


def test_emitted_shards_become_captions(world, encoder):
    source = open_source(str(world / "captions"))
    record, encoded = encode(source, encoder, 0, 64)
    assert len(source) == 48 and record.key == "000000" and source.name(0) == "000000.tar/000000"
    assert encoder.tokenizer.decode(encoded.ids[4:]) == "caption : a big red square <eos>"
    assert decode_image(source.image_bytes(record.images[0])).size == (32, 32)


def test_shards_and_json_read_the_same(tmp_path, encoder):
    tars, file = (
        open_source(str(write_mixed(tmp_path / "tar", 10))),
        open_source(str(write_json(tmp_path / "json", 10))),
    )
    for i in range(10):
        (a, ours), (b, theirs) = encode(tars, encoder, i, 64), encode(file, encoder, i, 64)
        assert (ours.ids == theirs.ids).all() and a.conversations == b.conversations
        pixels = [[s.image_bytes(location) for location in r.images] for s, r in ((tars, a), (file, b))]
        assert pixels[0] == pixels[1]
    lines = tmp_path / "json" / "data.jsonl"
    records = json.loads((tmp_path / "json" / "data.json").read_text())
    lines.write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in records) + "\n\n")
    assert len(open_source(str(lines))) == 10
    spread = tmp_path / "json" / "spread.json"
    spread.write_text(
        "\ufeff [ " + " , \n".join(json.dumps({**r, "é": "日本"}, ensure_ascii=False) for r in records) + "]"
    )
    assert open_source(str(spread)).record(7).key == records[7]["id"]
    windows = tmp_path / "json" / "windows.json"
    windows.write_bytes(json.dumps(records, indent=1).replace("\n", "\r\n").encode())
    assert [open_source(str(windows)).key(i) for i in range(10)] == [record["id"] for record in records]


def test_a_shard_has_the_rows_that_curate_sees(tmp_path):
    """A repeated member begins another sample, and the first image of any format is the sample's."""
    red, gif = picture("red", True, 0), io.BytesIO()
    Image.open(io.BytesIO(red)).save(gif, "GIF")
    members = [("a.png", red), ("a.jpg", b"x"), ("b.gif", gif.getvalue()), ("a.txt", b"red")]
    members += [("b.txt", b"blue"), ("a.txt", b"green"), ("a.png", gif.getvalue())]
    source = open_source(str(shard(tmp_path / "0.tar", members)))
    records = [source.record(i) for i in range(len(source))]
    assert [(r.key, r.conversations[1]["value"]) for r in records] == [("a", "red"), ("b", "blue"), ("a", "green")]
    for record in records:
        assert decode_image(source.image_bytes(record.images[0])).size == (32, 32)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b'{"image": "' + b"x" * 300 + b'.jpg", "conversations": []}', "missing_image"),
        (b'{"image": "a\\u0000b.jpg", "conversations": []}', "missing_image"),
        (b'{"conversations": [{"from": "human", "value": "half \\ud800"}]}', "bad_utf8"),
        (b"[" * 100_000, "bad_json"),
        (b'{"id": ' + b"9" * 5_000 + b"}", "bad_json"),
    ],
    ids=["long name", "null in a name", "half a character", "deep", "long number"],
)
def test_hostile_records_are_reasons(tmp_path, encoder, text, reason):
    (tmp_path / "data.jsonl").write_bytes(text + b"\n")
    source = open_source(str(tmp_path / "data.jsonl"), digest=True)
    assert measure(source, encoder, 64).reasons == {0: reason}


def test_an_id_of_half_a_character_is_written_all_the_same(tmp_path):
    (tmp_path / "data.jsonl").write_text('{"id": "\\ud800", "conversations": []}\n')
    assert open_source(str(tmp_path / "data.jsonl")).name(0) == "data.jsonl/?"


def test_bad_samples_are_reasons(tmp_path, encoder):
    jpg = picture("red", True, 0)
    good = json.dumps(
        {"conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "red"}]}
    ).encode()
    path = shard(
        tmp_path / "s" / "0.tar",
        [
            ("good.jpg", jpg), ("good.json", good),
            ("nothing.jpg", jpg),
            ("json.jpg", jpg), ("json.json", b"{"),
            ("utf.jpg", jpg), ("utf.txt", b"\xff\xfe"),
            ("gone.json", json.dumps({"image": "x.jpg", "conversations": json.loads(good)["conversations"]}).encode()),
            ("lonely.txt", b"a red square"),
            ("empty.jpg", jpg), ("empty.txt", b"  "),
            ("pickle.jpg", jpg), ("pickle.pkl", b"cos\nsystem\n"), ("pickle.txt", b"red"),
        ],
    )  # fmt: skip
    source = open_source(str(path))
    measured = measure(source, encoder, 64)
    found = {source.keys[i]: reason for i, reason in measured.reasons.items()}
    assert found == {
        "nothing": "no_caption",
        "json": "bad_json",
        "utf": "bad_utf8",
        "gone": "missing_image",
        "lonely": "no_image",
        "empty": "no_caption",
    }
    assert measured.usable.tolist() == [0, 7] and source.name(2) == "0.tar/json"
    with pytest.raises(DataError, match=r"6 of 8 samples .* 2 no_caption.*Examples: 0.tar/nothing") as error:
        check_bad(source, measured.reasons, 0.001)
    assert "\n" not in str(error.value)
    check_bad(source, dict.fromkeys(range(3), "few"), 0.001)


def test_a_torn_shard_gives_what_it_has(tmp_path, world, caplog):
    whole = (world / "captions" / "000000.tar").read_bytes()
    torn = tmp_path / "000000.tar"
    torn.write_bytes(whole[: len(whole) // 2 + 700])
    assert 0 < len(open_source(str(torn))) < 24


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_images_of_every_bad_kind():
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"  # would be run by a helper
    for data in (b"", b"not an image", picture("red", True, 0)[:300], script):
        with pytest.raises(Rejected, match="bad_image"):
            decode_image(data)
    broken = io.BytesIO()
    Image.new("RGB", (40, 50)).save(broken, "AVIF")
    data = bytearray(broken.getvalue())
    for at in range(100, 180):  # of its boxes; the decoder answers with exceptions of many kinds
        for value in (0, 255):
            spoilt = bytes(data[:at]) + bytes([value]) + bytes(data[at + 1 :])
            with contextlib.suppress(Rejected):
                decode_image(spoilt)
    out = io.BytesIO()
    Image.new("1", (20_000, 5_100)).save(out, "PNG")
    with pytest.raises(Rejected, match="huge_image|bad_image"):
        decode_image(out.getvalue())
    out = io.BytesIO()
    Image.fromarray(np.zeros((4, 4, 4), np.uint8), "RGBA").save(out, "PNG")
    assert decode_image(out.getvalue()).mode == "RGB"
    notes, long = PngInfo(), io.BytesIO()  # as long as curate reads them
    notes.add_itxt("note", "x" * (2 << 20), zip=True)
    Image.new("RGB", (8, 8), "red").save(long, "PNG", pnginfo=notes)
    assert decode_image(long.getvalue()).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("image", ["../secret.jpg", "/etc/passwd", "a/../../secret.jpg", 3])
def test_no_image_outside_the_folder_is_read(tmp_path, image):
    (tmp_path / "in").mkdir()
    (tmp_path / "secret.jpg").write_bytes(picture("red", True, 0))
    (tmp_path / "in" / "data.json").write_text(json.dumps([{"image": [image], "conversations": []}]))
    with pytest.raises(Rejected, match="image_outside_folder"):
        open_source(str(tmp_path / "in" / "data.json")).record(0)


def test_half_of_the_images_missing_stops_with_examples(tmp_path, encoder):
    path = write_json(tmp_path, 20)
    for file in sorted((tmp_path / "images").iterdir())[::2]:
        file.unlink()
    source = open_source(str(path))
    with pytest.raises(DataError, match=r"8 of 20 samples cannot be used: 8 missing_image. Examples: data.json/v0"):
        check_bad(source, measure(source, encoder, 64).reasons, 0.001)


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda p: p / "none", "no such file"),
        (lambda p: p, "no \\*.tar in that folder; it holds a.txt"),
        (lambda p: p / "e.json", "no samples"),
        (lambda p: p / "d.json", "expected a JSON list"),
        (lambda p: p / "b.json", "not valid JSON"),
        (lambda p: p / "c.json", "ends within the list"),
        (lambda p: p / "l.json", "is not UTF-8"),
        (lambda p: p / "n.json", "not valid JSON: maximum recursion"),
    ],
)
def test_nothing_to_read_is_said(tmp_path, make, word):
    for file, text in {
        "a.txt": "x",
        "e.json": "[]",
        "d.json": "{}",
        "b.json": "[{]",
        "c.json": "[{},",
        "n.json": "[" * 100_000,
    }.items():
        (tmp_path / file).write_text(text)
    (tmp_path / "l.json").write_bytes(b'[{"id": "\xe9"}]')
    with pytest.raises(UsageError, match=word):
        open_source(str(make(tmp_path)))
    with pytest.raises(UsageError, match="is for JSON or parquet only"):
        open_source(str(tmp_path), str(tmp_path))


@pytest.mark.parametrize("inside", ["", "coreset.json"])
def test_data_that_curate_was_cut_short_at_is_refused(tmp_path, inside):
    """Half of a coreset, or old shards among new ones, must not be learnt from unsaid."""
    (tmp_path / "0.tar").write_bytes(bytes(1024))
    (tmp_path / "coreset.json").write_text('[{"id": "1", "conversations": []}]')
    (tmp_path / ".plan.json").write_text('{"command": "emit"}')
    with pytest.raises(UsageError, match=r"is unfinished; re-run the `curate emit …`"):
        open_source(str(tmp_path / inside))
    (tmp_path / "manifest.json").write_text('{"command": "mix"}')
    (tmp_path / ".swap.json").write_text("{}")
    with pytest.raises(UsageError, match=r"is between two states; re-run the `curate mix …`"):
        open_source(str(tmp_path / inside))
    (tmp_path / ".swap.json").unlink()
    if inside:
        assert len(open_source(str(tmp_path / inside))) == 1


def test_measuring_in_workers_is_measuring(world, encoder, monkeypatch, tmp_path):
    import torch

    from train.data import measuring
    from train.dist import Runtime

    monkeypatch.setattr(measuring, "SPAN", 7)
    source = open_source(str(world / "mixed"))
    one = measure(source, encoder, 64)
    assert one.lengths.all() and len(one.lengths) == 40
    one.reasons[3] = "bad_json"
    runtime = Runtime(torch.device("cpu"), torch.float32, 0, 1, "")
    path = tmp_path / f"{measuring._digest(encoder, 64, 'data')}.npz"
    measuring._write(one, path)
    again = measuring.measure_once(source, encoder, 64, tmp_path, runtime, "data")
    for other in (measure(source, encoder, 64, workers=2), again):
        for name in ("lengths", "supervised", "images", "num_truncated"):
            assert np.array_equal(getattr(one, name), getattr(other, name))
    assert other.reasons == {3: "bad_json"}, "what another run measured is read"
    for max_length, digest in ((64, "other data"), (63, "data")):
        assert not measuring.measure_once(source, encoder, max_length, tmp_path, runtime, digest).reasons
    path.write_bytes(b"PK torn")
    again = measuring.measure_once(source, encoder, 64, tmp_path, runtime, "data")
    assert not again.reasons and np.array_equal(again.lengths, one.lengths)
    monkeypatch.setattr(measuring, "KEPT", 2)
    measuring.measure_once(source, encoder, 62, tmp_path, runtime, "data")
    assert len(list(tmp_path.glob("*.npz"))) == 2
    (tmp_path / "file").touch()
    assert len(measuring.measure_once(source, encoder, 61, tmp_path / "file" / "x", runtime, "data").lengths) == 40


def captioned(folder, name, keys):
    members = [
        (f"{key}.{end}", data) for key in keys for end, data in (("jpg", picture("red", True, 0)), ("txt", b"w"))
    ]
    return shard(folder / name, members)


def test_shards_joined_packed_and_in_capitals_are_read_and_others_named(tmp_path, caplog):
    folder = tmp_path / "data"
    joined = captioned(folder, "0.tar", "ab").read_bytes() + captioned(folder, "0.tar", ["c" * 120, "d"]).read_bytes()
    (folder / "0.tar").write_bytes(joined + captioned(folder, "1.tar", "ef").read_bytes())
    (folder / "1.tar.gz").write_bytes(gzip.compress((folder / "1.tar").read_bytes()))
    (folder / "2.tgz").write_bytes((folder / "1.tar.gz").read_bytes())
    (folder / "1.tgz").write_bytes((folder / "1.tar.gz").read_bytes())
    captioned(folder, "3.TAR", "g")
    (folder / "4.tar").write_bytes(captioned(folder, "4.tar", "hij").read_bytes()[:2600])
    (folder / "5.tar.zst").write_bytes(b"x")
    (folder / "._0.tar").write_bytes(b"x")
    source = open_source(str(folder))
    keys = ["a", "b", "c" * 120, "d", "e", "f", "e", "f", "e", "f", "g"]
    assert [source.key(i) for i in range(len(source))][: len(keys)] == keys
    assert [stem for stem, _, _ in source.extents()] == ["0", "1", "2", "3", "4"]
    assert all(decode_image(source.image_bytes(source.record(i).images[0])) for i in range(len(keys)))
    told = "\n".join(source.notes)
    for words in (
        "1.tar.gz is passed over: packed by gzip beside the same tar unpacked",
        "1.tgz is passed over: packed by gzip",
        "5.tar.zst is passed over",
        "._0.tar",
        "4.tar: truncated",
        "0.tar: several archives",
    ):
        assert words in told and words in caplog.text, words


def test_a_torn_gzip_tar_gives_what_stands_before_the_damage_and_is_told(tmp_path, caplog):
    folder = tmp_path / "data"
    packed = gzip.compress(captioned(folder, "0.tar", "ab").read_bytes(), 0)  # stored: cut where the tar is cut
    captioned(folder, "0.tar", "c")
    (folder / "1.tar.gz").write_bytes(packed[: len(packed) * 2 // 5])
    (folder / "2.tgz").write_bytes(packed[:-9])
    (folder / "3.tar.gz").write_bytes(packed[:12])
    source = open_source(str(folder))
    assert [source.name(i) for i in range(len(source))] == ["0.tar/c", "1.tar.gz/a", "2.tgz/a", "2.tgz/b"]
    assert all(decode_image(source.image_bytes(source.record(i).images[0])) for i in range(len(source)))
    for name, count in (("1.tar.gz", 1), ("2.tgz", 2), ("3.tar.gz", 0)):
        [note] = [note for note in source.notes if note.startswith(f"{name}: torn")]
        assert f"{count} samples of it are read" in note and note in caplog.text


def test_a_table_is_read_as_the_json_of_its_records(tmp_path, encoder):
    import pyarrow as pa
    import pyarrow.parquet as pq

    write_json(tmp_path / "json", 10)
    records = json.loads((tmp_path / "json" / "data.json").read_text())
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "json" / "data.parquet", row_group_size=3)
    a, b = (open_source(str(tmp_path / "json" / f"data.{end}"), digest=True) for end in ("json", "parquet"))
    b = pickle.loads(pickle.dumps(b))  # as a worker is given it
    assert len(a) == len(b) == 10 and a.images_digest == b.images_digest
    for i in (9, 0, 4, *range(10)):
        (one, ours), (other, theirs) = encode(a, encoder, i, 64), encode(b, encoder, i, 64)
        assert (ours.ids == theirs.ids).all() and one.key == other.key
        assert [a.image_bytes(each) for each in one.images] == [b.image_bytes(each) for each in other.images]
    rows = [
        {
            "images": [{"bytes": picture("red", True, 0), "path": None}],
            "texts": [{"user": "What?", "assistant": "Red."}],
        }
    ]
    rows.append({"images": [], "texts": [{"user": "<image>", "assistant": "Red."}]})
    for n in range(2):
        (tmp_path / "tables").mkdir(exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "tables" / f"{n}.parquet")
    source = open_source(str(tmp_path / "tables"))
    assert decode_image(source.image_bytes(source.record(2).images[0])).size == (32, 32) and len(source) == 4
    with pytest.raises(Rejected):
        source.record(3)
    pq.write_table(pa.table({"image": [{"bytes": picture("red", True, 0)}]}), tmp_path / "pictures.parquet")
    with pytest.raises(Rejected, match="no_conversation"):  # it lies in the record, not outside a folder
        open_source(str(tmp_path / "pictures.parquet")).record(0)
    assert losses(source, {1: "x", 3: "x"}) == ["2 × x (e.g. tables/#1)"]
    (tmp_path / "tables" / "2.parquet").write_bytes(b"PAR1")
    with pytest.raises(UsageError, match="2.parquet cannot be read"):
        open_source(str(tmp_path / "tables"))


def test_avif_decodes_and_is_an_image_of_a_shard(tmp_path):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), "red").save(buffer, "AVIF")
    source = open_source(str(shard(tmp_path / "0.tar", [("a.avif", buffer.getvalue()), ("a.txt", b"red")])))
    assert decode_image(source.image_bytes(source.record(0).images[0])).size == (8, 6)


def test_deep_and_transparent_pictures_are_not_black_or_white_all_over():
    ramp = np.linspace(300, 60_000, 64).reshape(8, 8)
    drawn = np.zeros((8, 8, 4), np.uint8)
    drawn[..., 3] = np.eye(8) * 255  # black strokes that lie in the alpha channel alone
    for shown in (Image.fromarray(ramp.astype(np.uint16)), Image.fromarray(drawn)):
        out = io.BytesIO()
        shown.save(out, "PNG")
        seen = np.asarray(decode_image(out.getvalue()))
        assert (seen.min(), seen.max()) == (0, 255)


def test_turns_that_are_dropped_are_counted(tmp_path, encoder):
    odd = [("gpt", "hello"), ("human", "how big is it ?"), ("gpt", "big"), ("system", "be rude"), ("human", "and ?")]
    even = [("system", "be kind"), ("human", "how big"), ("human", "is it ?"), ("gpt", "big")]
    for name, lines, unread in (
        ("odd", odd, 3),
        ("even", even, 0),
        ("late", odd[1:4], 3),
        ("asked", odd[1:3] + odd[4:], 3),
    ):
        record = {"conversations": [{"from": who, "value": text} for who, text in lines]}
        (tmp_path / name).write_text(json.dumps([{**record, "id": n} for n in range(3)]))
        source = open_source(str(tmp_path / name))  # JSON, whatever it is called
        found = measure(source, encoder, 64)
        assert len(found.usable) == 3 and found.num_unread == unread, name
        assert bool(found.lost_turns) == bool(unread)


def test_a_process_that_may_open_few_files_reads_all_samples(tmp_path):
    """Or says that it may not: no sample is taken for unreadable."""
    for number in range(40):
        (tmp_path / f"{number}").write_bytes(b"x" * number)
    files = Files()
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = os.open(tmp_path / "0", os.O_RDONLY)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 4, before[1]))
        assert [files.read(str(tmp_path / f"{n}"), 0, n) for n in range(40)] == [b"x" * n for n in range(40)]
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, before[1]))
        with pytest.raises(OSError, match="Too many open files"):
            Files().read(str(tmp_path / "1"), 0, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        os.close(highest)


def test_of_a_folder_without_shards_what_may_be_meant_is_said(tmp_path):
    for name in ("a/vqa/train-0.parquet", "b/00000/1.jpg", "b/small.json", "b/chat.json", "c/x.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("[]" * len(name) if "chat" in name else "[]")
    for folder, meant in (("a", "; give --data {}/a/vqa"), ("b", "; give --data {}/b/chat.json"), ("c", "")):
        with pytest.raises(UsageError) as refused:
            open_source(str(tmp_path / folder))
        assert str(refused.value).partition("it holds ")[2].partition(";")[2] == meant.format(tmp_path)[1:]
