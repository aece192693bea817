import io
import json
import os
import tarfile
import time
import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny_clip
from artefacts import members, picture

from curate.embed.embed import EmbedOptions, embed
from curate.engine import Job
from curate.errors import ShardError, UsageError
from curate.ingest.beside import FOLDERS, Beside, File
from curate.ingest.pack import PackOptions, pack
from curate.storage import sidecar
from curate.storage.tar import TarWriter, is_safe, list_pool, read_index, suffix_of
from house import close_folders, curate, fingerprint, manifest

QUIET = Job(quiet=True, workers=1)
ENDED = ["success"] * 7 + ["failed_to_download", "failed_to_resize", "failed_to_download"]


def downloads(first=0):
    """The rows that img2dataset 1.47.0 writes of one shard, in its columns' order and types."""
    made = []
    for row, status in enumerate(ENDED, first):
        good = status == "success"
        why = None if good else "HTTP Error 404: File not found"
        size = {"width": 24, "height": 24, "original_width": 300 + row, "original_height": 400}
        told = {"caption": f"picture {row}", "url": f"http://x/{row}.jpg", "key": f"{row:06d}", "status": status}
        sizes = {name: value if good else None for name, value in size.items()}
        made.append({**told, "error_message": why, **sizes, "exif": "{}" if good else None, "sha256": f"{row:064x}"})
    return made


SCHEMA = pa.schema(
    [("caption", pa.string()), ("url", pa.string()), ("key", pa.string()), ("status", pa.string())]
    + [("error_message", pa.string()), ("width", pa.int32()), ("height", pa.int32())]
    + [("original_width", pa.int32()), ("original_height", pa.int32()), ("exif", pa.string()), ("sha256", pa.string())]
)


def write_files(folder, shards=2):
    """img2dataset 1.47.0, `--output_format files`: {shard}/{key}.jpg .txt .json, {shard}.parquet, a JSON of counts."""
    for number in range(shards):
        place = folder / f"{number:05d}"
        place.mkdir(parents=True)
        rows = downloads(10 * number)
        for row in rows:
            if row["status"] == "success":
                (place / f"{row['key']}.jpg").write_bytes(picture(int(row["key"])))
                (place / f"{row['key']}.txt").write_text(row["caption"])
                (place / f"{row['key']}.json").write_text(json.dumps(row, indent=4))
        pq.write_table(pa.Table.from_pylist(rows, SCHEMA), folder / f"{number:05d}.parquet")
        (folder / f"{number:05d}_stats.json").write_text('{"count": 10, "successes": 7}')
    return str(folder)


def write_webdataset(folder):
    """img2dataset 1.47.0, `--output_format webdataset`: the same members in a tar, in the order of their arrival."""
    folder.mkdir()
    with open(folder / "00000.tar", "wb") as file, TarWriter(file) as tar:
        for row in sorted(downloads(), key=lambda row: row["sha256"][-1] not in "02468"):
            if row["status"] == "success":
                tar.add(f"{row['key']}.jpg", picture(int(row["key"])))
                tar.add(f"{row['key']}.txt", row["caption"].encode())
                tar.add(f"{row['key']}.json", json.dumps(row, indent=4).encode())
    pq.write_table(pa.Table.from_pylist(downloads(), SCHEMA), folder / "00000.parquet")
    return str(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_clip.write(tmp_path_factory.mktemp("model") / "clip")


def test_img2datasets_files_become_tars_byte_for_byte(tmp_path):
    source = write_files(tmp_path / "download")
    manifest = pack(source, str(tmp_path / "pool"), PackOptions(), QUIET)
    assert manifest["counts"] == {"rows": 14} and list(manifest["shards"]) == ["00000", "00001"]
    for number in range(2):
        held = dict(members(tmp_path / "pool" / f"{number:05d}.tar"))
        on_disk = {path.name: path.read_bytes() for path in (tmp_path / "download" / f"{number:05d}").iterdir()}
        assert held == on_disk and list(held) == sorted(held)
        side = f"{number:05d}.parquet"
        assert (tmp_path / "pool" / side).read_bytes() == (tmp_path / "download" / side).read_bytes()


def test_any_folders_of_images_will_do_and_what_is_left_out_is_counted(tmp_path):
    for name in ("cats/a.png", "cats/a.txt", "cats/b.JPG", "cats/more/c.webp", "cats/notes.md", "read.txt"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(name.encode())
    (tmp_path / "in" / "loop").symlink_to(tmp_path / "in")
    manifest = pack(str(tmp_path / "in"), str(tmp_path / "pool"), PackOptions(shard_size=1), QUIET)
    assert manifest["shards"] == {
        "cats_00000": {"rows": 1}, "cats_00001": {"rows": 1}, "cats__more": {"rows": 1}
    }  # fmt: skip
    assert manifest["passed_over"] == {"md": 1}
    assert members(tmp_path / "pool" / "cats_00000.tar") == [("a.png", b"cats/a.png"), ("a.txt", b"cats/a.txt")]
    assert members(tmp_path / "pool" / "cats_00001.tar") == [("b.jpg", b"cats/b.JPG")]


def write_hugging_face(path, rows=6):
    """datasets 5.2.0, `Dataset.to_parquet` with an Image column: struct<bytes: binary, path: string>, text, label."""
    images = [{"bytes": picture(row, kind="PNG" if row % 2 else "JPEG"), "path": None} for row in range(rows - 1)]
    table = pa.table(
        {
            "image": pa.array([*images, None], pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
            "text": [f"words {row}" for row in range(rows)],
            "label": pa.array(range(rows), pa.int64()),
            "score": [float("nan"), *[0.5] * (rows - 1)],
        }
    )
    pq.write_table(table, path, row_group_size=2)


def test_hugging_faces_image_parquet_becomes_a_pool_that_embeds(tmp_path, model):
    (tmp_path / "in").mkdir()
    write_hugging_face(tmp_path / "in" / "train-00000-of-00001.parquet")
    manifest = pack(str(tmp_path / "in"), str(tmp_path / "pool"), PackOptions(), QUIET)
    [stem] = manifest["shards"]
    held = dict(members(tmp_path / "pool" / f"{stem}.tar"))
    assert held[f"{stem}_000000000.jpg"] == picture(0) and held[f"{stem}_000000001.png"] == picture(1, kind="PNG")
    assert json.loads(held[f"{stem}_000000000.json"]) == {"text": "words 0", "label": 0, "score": None}
    made = embed(str(tmp_path / "pool"), str(tmp_path / "emb"), EmbedOptions(model, columns=("label",)), QUIET)
    assert made["counts"] == {"ok": 5, "no_image": 1}
    table = sidecar.table(str(tmp_path / "emb" / f"{stem}.arrow"))
    assert table["caption"].to_pylist() == [f"words {row}" for row in range(6)]
    assert table["label"].to_pylist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]


def test_img2datasets_parquet_keeps_the_rows_that_failed(tmp_path, model):
    (tmp_path / "in").mkdir()
    rows = [row | {"jpg": picture(at) if row["status"] == "success" else None} for at, row in enumerate(downloads())]
    pq.write_table(
        pa.Table.from_pylist(rows, SCHEMA.append(pa.field("jpg", pa.binary()))), tmp_path / "in/00000.parquet"
    )
    pack(str(tmp_path / "in"), str(tmp_path / "pool"), PackOptions(), QUIET)
    embed(str(tmp_path / "pool"), str(tmp_path / "emb"), EmbedOptions(model, columns=("status",)), QUIET)
    table = sidecar.table(str(tmp_path / "emb" / "00000.arrow"))
    assert table["key"].to_pylist() == [row["key"] for row in rows]
    assert table["status"].to_pylist() == ["ok"] * 7 + ["no_image"] * 3
    assert table["source_status"].to_pylist() == ENDED


def test_large_parquet_files_are_cut_and_keys_stay_unique(tmp_path):
    rows = [{"id": name, "jpg": picture(at)} for at, name in enumerate(["a.b/c", "a.b/c", "../x", "", "e"])]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "all.parquet", row_group_size=2)
    pack(str(tmp_path / "all.parquet"), str(tmp_path / "pool"), PackOptions(shard_size=3), QUIET)
    keys = []
    for shard in list_pool(str(tmp_path / "pool")):
        with open(shard.location, "rb") as file:
            samples = read_index(file).samples
            keys += [sample.key for sample in samples]
            assert not any(sample.repeated for sample in samples)
    assert keys == ["a_b_c", "all_00000_000000001", "___x", "all_00001_000000003", "e"]


@pytest.mark.parametrize("cut_short", [False, True])
def test_rows_that_are_not_called_by_their_id_are_counted(tmp_path, capsys, cut_short):
    names = ["a", "b", "a", "", None, "x\ny", "t_00000_000000002", "b", "a.a", "a/a"]
    rows = [{"id": name, "jpg": picture(at)} for at, name in enumerate(names)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet", row_group_size=4)
    out = tmp_path / "pool"
    if cut_short:  # the first tar is there already
        pack(str(tmp_path / "t.parquet"), str(out), PackOptions(shard_size=7), Job(workers=1, quiet=True, part=(0, 2)))
    manifest = pack(str(tmp_path / "t.parquet"), str(out), PackOptions(shard_size=7), Job(workers=1))
    counted = {kind: fault["count"] for kind, fault in manifest["faults"].items()}
    assert counted == {
        "ids that an earlier row has, too: such rows are named by their number": 3,
        "ids that cannot name a file: such rows are named by their number": 1,
    }
    assert "3 × ids that an earlier row has" in capsys.readouterr().err
    for shard in list_pool(str(out)):
        with open(shard.location, "rb") as file:
            keys = [sample.key for sample in read_index(file).samples]
        assert len(keys) == len(set(keys)) == manifest["shards"][shard.stem]["rows"]


def test_rows_of_metadata_nested_too_deep_are_counted(tmp_path):
    (tmp_path / "in").mkdir()
    rows = []
    for name, depth in (("a", 3), ("b", 600), ("c", 900)):
        (tmp_path / "in" / f"{name}.jpg").write_bytes(b"x")
        rows.append(f'{{"file_name": "{name}.jpg", "text": "{name}", "x": {"[" * depth}{"]" * depth}}}')
    (tmp_path / "in" / "metadata.jsonl").write_text("\n".join(rows))
    manifest = pack(str(tmp_path / "in"), str(tmp_path / "pool"), PackOptions(), QUIET)
    [(kind, fault)] = manifest["faults"].items()
    assert "nested too deep" in kind and fault == {"count": 2, "example": "b"}
    held = dict(members(tmp_path / "pool" / "in.tar"))
    assert sorted(held) == ["a.jpg", "a.json", "a.txt", "b.jpg", "b.txt", "c.jpg", "c.txt"]


def test_folders_in_folders_without_end_and_names_with_control_characters(tmp_path):
    place = tmp_path / "in"
    place.mkdir()
    here = os.open(place, os.O_RDONLY)
    for _ in range(1_500):  # deeper than functions may call each other
        os.mkdir("d", dir_fd=here)
        below = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)
    for name in (b"a\nb.jpg", b"a\nb.txt", b"caf\xe9.jpg"):
        with open(os.fsencode(place) + b"/" + name, "wb") as file:
            file.write(b"x")
    manifest = pack(str(place), str(tmp_path / "pool"), PackOptions(), QUIET)
    [shard] = list_pool(str(tmp_path / "pool"))
    assert [name for name, _ in members(shard.location)] == ["a_b.jpg", "a_b.txt", "caf_.jpg"]
    [(kind, fault)] = manifest["faults"].items()
    assert "control characters" in kind and fault["count"] == 3
    for depth in range(1_500, 0, -1):  # pytest would call itself as often
        os.rmdir(place / ("d/" * depth))


def test_names_with_colons_and_backslashes_make_keys_that_are_usable(tmp_path):
    names = ("2024-01-01 10:11:10", "C:x", "\\x", "a\\b")
    (tmp_path / "in").mkdir()
    for name in names:
        (tmp_path / "in" / f"{name}.jpg").write_bytes(b"x")
    told = pack(str(tmp_path / "in"), str(tmp_path / "pool"), PackOptions(), QUIET)["faults"]
    [shard] = list_pool(str(tmp_path / "pool"))
    keys = [name.removesuffix(".jpg") for name, _ in members(shard.location)]
    assert sorted(keys) == sorted(("2024-01-01 10:11:10", "C_x", "_x", "a\\b")) and all(map(is_safe, keys))
    [(kind, fault)] = told.items()
    assert "out of their folder" in kind and fault["count"] == 2


def test_workers_interruptions_and_the_command_line_leave_the_same_bytes(tmp_path):
    source = write_files(tmp_path / "download", shards=3)
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
    pack(source, str(tmp_path / "a" / "pool"), PackOptions(), QUIET)
    pack(source, str(tmp_path / "b" / "pool"), PackOptions(), Job(quiet=True, workers=1, part=(0, 2)))
    curate("pack", source, tmp_path / "b" / "pool", "--workers", 2)
    assert fingerprint(tmp_path / "a" / "pool") == fingerprint(tmp_path / "b" / "pool")


@pytest.mark.parametrize(
    "options, words",
    [
        (PackOptions(layout="fils"), "did you mean 'files'"),
        (PackOptions(image="pic"), "unknown column"),
        (PackOptions(image="text"), "holds no image"),
        (PackOptions(layout="files"), "expected folders of images"),
        (PackOptions(shard_size=0), "at least 1"),
    ],
)
def test_wrong_requests_are_refused(tmp_path, options, words):
    (tmp_path / "in").mkdir()
    write_hugging_face(tmp_path / "in" / "x.parquet")
    with pytest.raises(UsageError) as refused:
        pack(str(tmp_path / "in"), str(tmp_path / "pool"), options, QUIET)
    assert words in str(refused.value)


def test_folders_of_one_name_are_refused_and_the_folder_itself_has_its_name(tmp_path, monkeypatch):
    for folder in ("in/a/b", "in/a__b"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "x.jpg").write_bytes(picture(0))
    with pytest.raises(UsageError, match="in/a/b and .*in/a__b would both become a__b.tar"):
        pack(str(tmp_path / "in"), str(tmp_path / "pool"), PackOptions(), QUIET)
    for name in ("y.1", "y_1"):
        write_hugging_face(tmp_path / "in" / f"{name}.parquet")
    with pytest.raises(UsageError, match="would both become y_1.tar"):
        pack(str(tmp_path / "in"), str(tmp_path / "pool"), PackOptions(layout="parquet"), QUIET)
    with pytest.raises(UsageError, match="is a file; expected a folder"):
        pack(__file__, str(tmp_path / "pool"), PackOptions(), QUIET)
    monkeypatch.chdir(tmp_path / "in" / "a__b")
    pack(".", str(tmp_path / "pool"), PackOptions(), QUIET)
    assert [path.name for path in (tmp_path / "pool").glob("*.tar")] == ["a__b.tar"]


def test_a_pool_is_no_source_and_paths_are_no_images(tmp_path):
    with pytest.raises(UsageError, match="a pool already"):
        pack(write_webdataset(tmp_path / "pool"), str(tmp_path / "again"), PackOptions(), QUIET)
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "00000.tar.gz").write_bytes(b"")
    with pytest.raises(UsageError, match="a pool already"):
        pack(str(tmp_path / "packed"), str(tmp_path / "again"), PackOptions(), QUIET)
    table = {"image": [{"bytes": None, "path": "/etc/passwd"}], "text": ["a"]}
    kinds = pa.schema([("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])), ("text", pa.string())])
    pq.write_table(pa.table(table, kinds), tmp_path / "paths.parquet")
    manifest = pack(str(tmp_path / "paths.parquet"), str(tmp_path / "out"), PackOptions(), QUIET)
    assert "no image bytes" in manifest["failed"]["paths"] and not list((tmp_path / "out").glob("*.tar"))
    pq.write_table(pa.table({"words": ["a"]}), tmp_path / "text.parquet")
    with pytest.raises(UsageError, match=r"no column of images: it has words \(string\)\.$"):
        pack(str(tmp_path / "text.parquet"), str(tmp_path / "out2"), PackOptions(), QUIET)


def test_downloads_are_accounted_for_and_their_columns_kept(tmp_path, model):
    pool = write_webdataset(tmp_path / "pool")
    wanted = ("original_width", "sha256")
    manifest = embed(pool, str(tmp_path / "emb"), EmbedOptions(model, columns=wanted), QUIET)
    assert manifest["downloads"] == {"failed_to_download": 2, "failed_to_resize": 1, "success": 7}
    assert manifest["options"]["columns"] == {"original_width": "number", "sha256": "text"}
    rows = sidecar.table(str(tmp_path / "emb" / "00000.arrow")).to_pylist()
    by_key = {row["key"]: row for row in downloads()}
    for row in rows:
        assert row["original_width"] == by_key[row["key"]]["original_width"]
        assert row["sha256"] == by_key[row["key"]]["sha256"] and row["width"] == 24
    with pytest.raises(UsageError, match="unknown field.*'sha265'.*did you mean 'sha256'"):
        embed(pool, str(tmp_path / "no"), EmbedOptions(model, columns=("sha265",)), QUIET)
    curate("select", tmp_path / "emb", tmp_path / "sel", "--step", "above(original_width, 302.5)")
    chosen = sidecar.table(str(tmp_path / "sel" / "00000.arrow")).to_pylist()
    assert sorted(row["key"] for row in chosen if row["kept"]) == ["000003", "000004", "000005", "000006"]


def test_a_side_table_stands_in_for_json_and_says_when_samples_are_missing(tmp_path, model):
    (tmp_path / "pool").mkdir()
    with open(tmp_path / "pool" / "00000.tar", "wb") as file, TarWriter(file) as tar:
        for row in downloads()[:6]:
            tar.add(f"{row['key']}.jpg", picture(int(row["key"])))
            tar.add(f"{row['key']}.txt", row["caption"].encode())
            tar.add(f"{row['key']}.json", json.dumps({"original_width": None if row["key"] > "000002" else 5}).encode())
    pq.write_table(pa.Table.from_pylist(downloads(), SCHEMA), tmp_path / "pool" / "00000.parquet")
    options = EmbedOptions(model, columns=("original_width",))
    manifest = embed(str(tmp_path / "pool"), str(tmp_path / "emb"), options, QUIET)
    assert "6 samples, but its side table says 7 downloads" in manifest["shards"]["00000"]["notes"]
    assert sidecar.table(str(tmp_path / "emb/00000.arrow"))["original_width"].to_pylist() == [5, 5, 5, 303, 304, 305]
    (tmp_path / "pool" / "00000.parquet").write_bytes(b"PAR1 no")
    manifest = embed(str(tmp_path / "pool"), str(tmp_path / "bad"), options, QUIET)
    assert "00000.parquet cannot be read" in manifest["failed"]["00000"]


def test_suffixes_follow_the_bytes():

    for kind, suffix in (
        ("JPEG", "jpg"),
        ("PNG", "png"),
        ("WEBP", "webp"),
        ("GIF", "gif"),
        ("BMP", "bmp"),
        ("TIFF", "tif"),
    ):
        assert suffix_of(picture(1, kind=kind)) == suffix
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(3))
    assert suffix_of(buffer.getvalue()) == "jpg"


@pytest.mark.parametrize("row_group", [3, 7, 1000])
def test_a_parquet_file_is_decoded_once_however_many_tars_it_makes(tmp_path, monkeypatch, row_group):
    rows = [{"key": f"{row:03d}", "image": picture(row), "text": f"words {row}"} for row in range(50)]
    (tmp_path / "in").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "in" / "a.parquet", row_group_size=row_group)
    decoded, keys = [], []
    batches = pq.ParquetFile.iter_batches

    def counted(self, *given, **named):
        for batch in batches(self, *given, **named):
            (decoded if named.get("columns") is None else keys).append(batch.num_rows)
            yield batch

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", counted)
    pack(str(tmp_path / "in"), str(tmp_path / "pool"), PackOptions(shard_size=4), QUIET)
    monkeypatch.undo()
    found = [pair for tar in sorted((tmp_path / "pool").glob("*.tar")) for pair in members(tar)]
    assert [data for name, data in found if name.endswith(".jpg")] == [row["image"] for row in rows]
    assert sum(decoded) == sum(keys) == 50
    from curate.ingest.parquet_rows import Part, Rows

    table, place = Rows(), str(tmp_path / "in" / "a.parquet")
    for start, count in ((8, 4), (0, 5), (44, 6), (45, 1), (3, 40)):
        part = Part(place, count, (), start, "image", "text")
        assert [row["key"] for row in table.read(part)] == [f"{row:03d}" for row in range(start, start + count)]


def test_dotted_names_and_spellings_of_a_suffix_are_samples_and_the_rest_is_said(tmp_path, capsys):
    names = ["Shot 10.11.10.png", "Shot 10.11.10.txt", "e.JPG", "e.jpg", "e.txt", "photo.0.final.avif"]
    left = ["photo_0_final.jpg", "notes.md", "._e.jpg", "README"]
    (tmp_path / "in").mkdir()
    for name in names + left:
        (tmp_path / "in" / name).write_bytes(name.encode())
    manifest = pack(str(tmp_path / "in"), str(tmp_path / "pool"), PackOptions(), Job(workers=1))
    [(stem, shard)] = manifest["shards"].items()
    held = dict(members(tmp_path / "pool" / f"{stem}.tar"))
    assert {name: data.decode() for name, data in held.items()} == {
        "Shot 10_11_10.png": "Shot 10.11.10.png",
        "Shot 10_11_10.txt": "Shot 10.11.10.txt",
        "e.jpg": "e.JPG",
        "e__2.jpg": "e.jpg",
        "e.txt": "e.txt",
        "photo_0_final.avif": "photo.0.final.avif",
        "photo_0_final__2.jpg": "photo_0_final.jpg",
    }
    assert shard["rows"] == 5 and manifest["passed_over"] == {"md": 1, "jpg": 1, "": 1}
    said = capsys.readouterr().err
    for words in ("names with dots", "would give the same key", "passed over: .md (e.g. notes.md)", "macOS"):
        assert words in said and any(words[:12] in kind for kind in (*manifest["faults"], said))
    keys = [sample.key for sample in read_index((tmp_path / "pool" / f"{stem}.tar").open("rb")).samples]
    assert len(keys) == len(set(keys)) == 5


def test_metadata_tables_and_folders_of_texts_are_captions(tmp_path):
    """As datasets' ImageFolder reads `metadata.jsonl` and `.csv`, and as detection sets keep texts beside images."""
    source = tmp_path / "in"
    for folder in ("train/a", "csv", "pairs/images", "pairs/captions", "pairs/labels", "notes"):
        (source / folder).mkdir(parents=True)
    for number, name in enumerate(("train/a/0.1.png", "train/a/1.png", "train/a/2.png", "train/a/3.png", "csv/x.png")):
        (source / name).write_bytes(picture(number))
    rows = [
        {"file_name": "a/0.1.png", "text": "zero", "score": 0.5},
        {"left_file_name": "./a/1.png", "right_file_name": "a/2.png", "caption": ["", "one and two"]},
        {"file_name": "a/gone.png", "text": "gone"},
        {"text": "nowhere"},
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows) + "not json\n"
    (source / "train" / "metadata.jsonl").write_text(text, encoding="utf-8-sig")
    (source / "csv" / "metadata.csv").write_text('file_name,text\nx.png,"a, b"\n', encoding="utf-8-sig")
    for key in "pq":
        (source / "pairs" / "images" / f"{key}.png").write_bytes(picture(9))
        (source / "pairs" / "captions" / f"{key}.txt").write_text(f"words of {key}")
    (source / "pairs" / "labels" / "p.txt").write_text("0 0.5 0.5 1 1")
    (source / "notes" / "readme.md").write_text("x")
    ended = curate("pack", source, tmp_path / "out")
    held = {stem: dict(members(tmp_path / "out" / f"{stem}.tar")) for stem in manifest(tmp_path / "out")["shards"]}
    assert list(held) == ["csv", "pairs__images", "train__a"]
    assert held["csv"]["x.txt"] == b"a, b" and json.loads(held["csv"]["x.json"]) == {"text": "a, b"}
    assert held["pairs__images"] == {
        **{f"{key}.png": picture(9) for key in "pq"},
        **{f"{key}.txt": f"words of {key}".encode() for key in "pq"},
    }
    assert list(held["train__a"]) == [
        "0_1.png",
        "0_1.txt",
        "0_1.json",
        "1.0.png",
        "1.1.png",
        "1.txt",
        "1.json",
        "3.png",
    ]
    assert held["train__a"]["1.txt"] == b"one and two" and held["train__a"]["1.1.png"] == picture(2)
    assert json.loads(held["train__a"]["0_1.json"]) == {"text": "zero", "score": 0.5}
    made = manifest(tmp_path / "out")
    assert made["counts"]["rows"] == 6 and all(kind in ended.stderr for kind in made["faults"])
    assert {kind: (fault["count"], fault["example"]) for kind, fault in made["faults"].items()} == {
        "rows of metadata.jsonl without a file_name": (1, "train/metadata.jsonl: row 3"),
        "lines of metadata that are not JSON": (1, "train/metadata.jsonl: record 4"),
        "pictures without a row in the metadata": (1, "train/a/3.png"),
        "rows of metadata whose picture is not there": (1, "train/a/gone.png"),
        "names with dots: written with _, since a key ends at its first dot": (1, "train/a/0.1.png"),
        "texts taken from a neighbouring folder: pairs/captions": (2, "pairs/captions/p.txt"),
        "files passed over: in a folder without pictures, .txt": (1, "pairs/labels/p.txt"),
        "files passed over: in a folder without pictures, .md": (1, "notes/readme.md"),
    }
    (source / "csv" / "metadata.csv").write_bytes(b"\xff\xfe\xfa")
    assert "cannot be read" in curate("pack", source, tmp_path / "bad", check=False).stderr


def structs(pictures):
    return [{"bytes": data, "path": None} for data in pictures]


def test_a_table_with_several_columns_of_bytes_is_read_by_the_one_of_pictures(tmp_path):
    pictures = [picture(row) for row in range(3)]
    (tmp_path / "in").mkdir()
    table = {"md5": [b"0" * 16] * 3, "picture": structs(pictures), "id": [b"a", b"b", b"c"], "text": [b"x", b"y", b"z"]}
    pq.write_table(pa.table(table), tmp_path / "in" / "0.parquet")
    curate("pack", tmp_path / "in", tmp_path / "pool")
    held = dict(members(tmp_path / "pool" / "0.tar"))
    assert [held[f"{key}.jpg"] if f"{key}.jpg" in held else held[f"{key}.png"] for key in "abc"] == pictures
    assert [held[f"{key}.txt"] for key in "abc"] == [b"x", b"y", b"z"]
    assert any("md5" in kind for kind in manifest(tmp_path / "pool")["faults"])
    pq.write_table(pa.table({"before": structs(pictures), "after": structs(pictures)}), tmp_path / "in" / "0.parquet")
    ended = curate("pack", tmp_path / "in", tmp_path / "two", check=False)
    assert ended.returncode == 2 and "before, after" in ended.stderr and "--image COLUMN" in ended.stderr
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "a.jpg").write_bytes(pictures[0])
    (tmp_path / "files" / "more").symlink_to(tmp_path / "in")
    ended = curate("pack", tmp_path / "files", tmp_path / "made")
    assert "links to folders, which are not followed (e.g. more)" in ended.stderr


@pytest.mark.parametrize("kind", [pa.binary_view(), pa.large_binary(), pa.dictionary(pa.int32(), pa.binary())])
def test_bytes_of_every_type_of_arrow_are_pictures(tmp_path, kind):
    (tmp_path / "in").mkdir()
    pictures, texts = [picture(0), picture(1)], pa.array(["a", "b"], pa.string_view())
    image = (
        pa.array(pictures, pa.binary()).dictionary_encode()
        if pa.types.is_dictionary(kind)
        else pa.array(pictures, kind)
    )
    pq.write_table(pa.table({"image": image, "text": texts}), tmp_path / "in" / "0.parquet")
    curate("pack", tmp_path / "in", tmp_path / "pool")
    held = dict(members(tmp_path / "pool" / "0.tar"))
    assert all(each in held.values() for each in pictures) and held["0_000000001.txt"] == b"b"


def test_tables_in_folders_and_rows_of_several_pictures_become_a_pool(tmp_path, model):
    turns = [{"user": "What?", "assistant": "A blob."}]
    shown = [[picture(0)], [picture(1, kind="PNG"), picture(2)], []]
    rows = [{"images": [{"bytes": each, "path": None} for each in several], "texts": turns} for several in shown]
    for name in ("README.md", "ai2d/train-0.parquet", "data/vqa/train-0.parquet"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_text("words")
        if name.endswith(".parquet"):
            pq.write_table(pa.Table.from_pylist(rows), tmp_path / "in" / name)
    made = pack(f"{tmp_path}/in/", str(tmp_path / "pool"), PackOptions(), QUIET)
    assert made["shards"] == {"ai2d__train-0": {"rows": 3}, "data__vqa__train-0": {"rows": 3}}
    key = "data__vqa__train-0_00000000"
    held = dict(members(tmp_path / "pool" / "data__vqa__train-0.tar"))
    ends = ("0.jpg", "0.json", "1.0.png", "1.1.jpg", "1.json", "2.json")
    assert list(held) == [f"{key}{end}" for end in ends]
    assert [data for name, data in held.items() if not name.endswith("json")] == [each for row in shown for each in row]
    embed(str(tmp_path / "pool"), str(tmp_path / "emb"), EmbedOptions(model=model), QUIET)
    table = sidecar.table(str(tmp_path / "emb" / "ai2d__train-0.arrow"))
    assert table["status"].to_pylist() == ["ok", "ok", "no_image"] and table["caption"][0].as_py() == "What?\nA blob."


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"URL": ["http://x"], "TEXT": ["a"]}, "img2dataset --input_format parquet --url_col URL --url_list"),
        ({"image_url": ["http://x"], "caption": ["a"]}, "--url_col image_url"),  # PixMo
        ({"image": ["a.jpg"], "conversations": [[{"from": "human"}]]}, "curate mix"),
    ],
)
def test_a_table_without_pictures_is_refused_with_what_reads_it(tmp_path, table, words):
    pq.write_table(pa.table(table), tmp_path / "x.parquet")
    with pytest.raises(UsageError, match="no column of images") as refused:
        pack(str(tmp_path / "x.parquet"), str(tmp_path / "pool"), PackOptions(), QUIET)
    assert words in refused.value.hint


def test_folders_of_texts_are_found_as_by_comparing_all_with_all_in_time_that_grows_as_they_do():
    def slow(tree, folder):
        parts, found = folder.split("/"), []
        for other in [each for each, names in tree.items() if each and names == ["1.txt"]]:
            unlike = [b for a, b in zip(parts, other.split("/"), strict=False) if a != b]
            if len(other.split("/")) == len(parts) and len(unlike) == 1:
                found.append((FOLDERS.index(unlike[0]) if unlike[0] in FOLDERS else len(FOLDERS), other))
        return [other for _, other in sorted(found)]

    shown = ["", "a", "images", "images/0", "images/1", "x/images/0", "x/0/captions"]
    told = ["captions", "texts/1", "captions/1", "captions/0", "a/0", "x/captions/0", "x/0/text", "x/images/1"]
    tree = {**dict.fromkeys(shown, ["1.jpg"]), **dict.fromkeys(told, ["1.txt"])}
    beside = Beside("", tree, "", {})
    assert {each: beside._text_folders(each) for each in shown} == {each: slow(tree, each) for each in shown}
    tree = {f"{kind}/{number}": [name] for number in range(4000) for kind, name in (("i", "1.jpg"), ("t", "1.txt"))}
    began, beside = time.process_time(), Beside("", tree, "", {}, covered=set(tree))
    samples = {folder: {"1": [File("1", "jpg", "1.jpg")]} for folder in tree if folder.startswith("i")}
    for folder, held in samples.items():
        beside.add_to(folder, held)
    assert samples["i/7"]["1"][1].name == "t/7/1.txt" and time.process_time() - began < 3


def test_links_that_lead_nowhere_and_folders_that_may_not_be_read_are_passed_over_and_said(tmp_path, monkeypatch):
    for name in ("a/1.jpg", "lost+found/2.jpg", "b/lost+found/3.jpg"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(picture(1))
    (tmp_path / "in" / "a" / "2.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (tmp_path / "in" / "a" / "4.jpg").symlink_to(tmp_path / "in" / "a" / "4.jpg")  # to itself
    (tmp_path / "in" / "a" / "2.txt").write_text("a text whose picture is gone")
    close_folders(monkeypatch, "lost+found")
    made = pack(str(tmp_path / "in"), str(tmp_path / "out"), PackOptions(), QUIET)
    assert dict(members(tmp_path / "out" / "a.tar")) == {"1.jpg": picture(1), "2.txt": b"a text whose picture is gone"}
    assert made["counts"]["rows"] == 2
    assert made["faults"] == {
        "folders passed over: no permission to read them": {"count": 2, "example": "b/lost+found"},
        "links to files that do not exist": {"count": 2, "example": "a/2.jpg"},
    }
    table = pa.table({"image": [picture(1)], "text": ["one"]})
    pq.write_table(table, tmp_path / "in" / "a" / "1.parquet")
    tables = pack(str(tmp_path / "in"), str(tmp_path / "tables"), PackOptions(layout="parquet"), QUIET)
    assert tables["faults"]["folders passed over: no permission to read them"]["count"] == 2
    close_folders(monkeypatch, "in")
    with pytest.raises(PermissionError):
        pack(str(tmp_path / "in"), str(tmp_path / "none"), PackOptions(), QUIET)


def test_names_in_metadata_are_found_as_windows_writes_them(tmp_path):
    for number, name in enumerate(("a/1.jpg", "a/2.jpg", "a/b/3.jpg", "a/x\\4.jpg")):
        (tmp_path / "in" / "t" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / "t" / name).write_bytes(picture(number))
    names = ("a\\1.jpg", ".\\a\\2.jpg", "a\\b\\3.jpg", "a/x\\4.jpg", "a\\gone.jpg")
    rows = [{"file_name": name, "text": f"text {number}"} for number, name in enumerate(names)]
    (tmp_path / "in" / "t" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    made = pack(str(tmp_path / "in"), str(tmp_path / "out"), PackOptions(), QUIET)
    held = {stem: dict(members(tmp_path / "out" / f"{stem}.tar")) for stem in made["shards"]}
    assert {name: held["t__a"][f"{name}.txt"] for name in ("1", "2", "x\\4")} == {
        "1": b"text 0", "2": b"text 1", "x\\4": b"text 3"
    }  # fmt: skip
    assert held["t__a__b"]["3.txt"] == b"text 2" and held["t__a__b"]["3.jpg"] == picture(2)
    assert made["faults"] == {"rows of metadata whose picture is not there": {"count": 1, "example": "t/a/gone.jpg"}}


def test_texts_that_end_in_caption_are_captions_where_no_other_text_is(tmp_path):
    for name, data in (
        ("1_cat/a.png", picture(1)),
        ("1_cat/a.caption", b"words of a"),
        ("1_cat/b.0.png", picture(2)),
        ("1_cat/b.0.caption", b"words of b"),
        ("1_cat/c.png", picture(3)),
        ("1_cat/c.txt", b"tags of c"),
        ("1_cat/c.caption", b"words of c"),
    ):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(data)
    made = pack(str(tmp_path / "in"), str(tmp_path / "out"), PackOptions(), QUIET)
    held = dict(members(tmp_path / "out" / "1_cat.tar"))
    texts = {"a.txt": b"words of a", "b_0.txt": b"words of b", "c.txt": b"tags of c"}
    assert held == {"a.png": picture(1), "b_0.png": picture(2), "c.png": picture(3), **texts}
    told = {kind: (fault["count"], fault["example"]) for kind, fault in made["faults"].items()}
    assert told["texts that end in .caption: written as .txt"] == (2, "1_cat/a.caption")
    assert told["files passed over: .caption"] == (1, "1_cat/c.caption")


def test_of_several_parquet_files_a_torn_one_fails_alone_and_is_packed_once_it_is_whole(tmp_path):
    (tmp_path / "in").mkdir()
    for name in "abc":
        write_hugging_face(tmp_path / "in" / f"{name}.parquet")
    whole = (tmp_path / "in" / "b.parquet").read_bytes()
    (tmp_path / "in" / "b.parquet").write_bytes(whole[: len(whole) // 2])
    ended = curate("pack", tmp_path / "in", tmp_path / "out", check=False)
    made = manifest(tmp_path / "out")
    assert ended.returncode == 1 and "b.parquet cannot be read" in ended.stderr
    assert list(made["shards"]) == ["a", "c"] and "b.parquet cannot be read" in made["failed"]["b"]
    (tmp_path / "in" / "b.parquet").write_bytes(whole)
    curate("pack", tmp_path / "in", tmp_path / "out")
    curate("pack", tmp_path / "in", tmp_path / "new")
    new = {name.replace("new/", "out/"): digest for name, digest in fingerprint(tmp_path / "new").items()}
    assert fingerprint(tmp_path / "out") == new
    for name in "abc":
        (tmp_path / "in" / f"{name}.parquet").write_bytes(whole[:40])
    ended = curate("pack", tmp_path / "in", tmp_path / "none", check=False)
    assert ended.returncode == 2 and "a.parquet cannot be read" in ended.stderr and not (tmp_path / "none").exists()


def test_long_files_are_copied_in_bounded_memory(tmp_path):
    (tmp_path / "in" / "a").mkdir(parents=True)
    with open(tmp_path / "in" / "a" / "1.tif", "wb") as file:
        file.write(picture(1))
        file.truncate((100 << 20) + 7)
    (tmp_path / "in" / "a" / "1.txt").write_text("long")
    (tmp_path / "in" / "a" / "2.jpg").write_bytes(picture(2))
    tracemalloc.start()
    pack(str(tmp_path / "in"), str(tmp_path / "out"), PackOptions(), QUIET)
    assert tracemalloc.get_traced_memory()[1] < 40 << 20
    tracemalloc.stop()
    with open(tmp_path / "out" / "a.tar", "rb") as file:
        first, second = read_index(file).samples
        assert [member.size for member in first.members] == [(100 << 20) + 7, 4]
        file.seek(first.members[0].offset)
        assert file.read(len(picture(1)) + 9) == picture(1) + bytes(9)
        file.seek(second.members[0].offset)
        assert file.read(second.members[0].size) == picture(2)
    with tarfile.open(tmp_path / "out" / "a.tar") as tar:
        assert tar.getnames() == ["1.tif", "1.txt", "2.jpg"]


def test_a_file_that_grows_while_it_is_copied_is_told(tmp_path):
    class Growing(io.BytesIO):
        def seek(self, at, whence=0):
            return super().seek(at, whence) - (whence == os.SEEK_END)

    with pytest.raises(ShardError, match="changed while it was read"), TarWriter(io.BytesIO()) as tar:
        tar.copy("a.jpg", Growing(b"abc"))
