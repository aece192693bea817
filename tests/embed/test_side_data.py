import io
import json
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny_clip
from artefacts import members, picture, write_pool, write_selection
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_embed import make_tar
from test_layouts import QUIET, write_source

from curate.embed import reader
from curate.embed.embed import EmbedOptions, embed
from curate.embed.side_data import NUMBER, TEXT, Captions, Extras, column_name
from curate.emit.emit import EmitOptions, emit
from curate.engine import Job
from curate.errors import ContractError, UsageError
from curate.ingest.published import ImportOptions, import_layout
from curate.mix.mix import mix
from curate.storage import sidecar
from curate.storage.json_files import digest, save_json
from curate.storage.schema import STATUSES
from curate.storage.tar import TarWriter, read_index
from house import REAL_DATA, curate, manifest


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_clip.write(tmp_path_factory.mktemp("model") / "clip")


def write_silent_pool(folder, urls):
    """A download without captions: pictures, and JSON with their urls."""
    folder.mkdir()
    with open(folder / "00000.tar", "wb") as file, TarWriter(file) as tar:
        for row, url in enumerate(urls):
            tar.add(f"{row:05d}.jpg", picture(row))
            tar.add(f"{row:05d}.json", json.dumps({"url": url}).encode())
    return str(folder)


def test_captions_come_by_url_from_a_headerless_table_and_are_emitted(tmp_path, model):
    pool = write_silent_pool(tmp_path / "pool", [f"http://x/{row}" for row in range(5)])
    lines = ["a red thing\thttp://x/0", "first\thttp://x/2", "second\thttp://x/2", "\thttp://x/3", "no url"]
    (tmp_path / "cc.tsv").write_text("\n".join([*lines, "été\thttp://x/4"]), "utf-8")
    options = EmbedOptions(model, captions=str(tmp_path / "cc.tsv"))
    manifest = embed(pool, str(tmp_path / "emb"), options, QUIET)
    assert manifest["counts"] == {"ok": 3, "no_caption": 2} and manifest["inputs"]["captions"]["digest"]
    table = sidecar.table(str(tmp_path / "emb" / "00000.arrow"))
    assert table["caption"].to_pylist() == ["a red thing", None, "first", None, "été"]
    sel = write_selection(tmp_path / "sel", str(tmp_path / "emb"), lambda stem, row, key: True)
    manifest = emit(sel, str(tmp_path / "out"), EmitOptions(), QUIET)
    assert manifest["captions_added"] == 3
    held = dict(members(tmp_path / "out" / "000000.tar"))
    assert held["00004.txt"].decode() == "été" and held["00004.jpg"] == picture(4) and len(held) == 9


def test_a_caption_that_was_chosen_is_not_what_the_tars_keep_and_that_is_said(tmp_path, model, capsys):
    pool = tmp_path / "pool"
    pool.mkdir()
    with open(pool / "0.tar", "wb") as file, TarWriter(file) as tar:
        for row, said in enumerate(["as the web has it", "told anew 1", ""]):
            tar.add(f"{row}.jpg", picture(row))
            tar.add(f"{row}.txt", said.encode())
            tar.add(f"{row}.json", json.dumps({"recaption": f"told anew {row}"}).encode())
    embed(str(pool), str(tmp_path / "emb"), EmbedOptions(model, caption="recaption"), QUIET)
    sel = write_selection(tmp_path / "sel", str(tmp_path / "emb"), lambda stem, row, key: True)
    manifest = emit(sel, str(tmp_path / "out"), EmitOptions(), Job())
    assert (manifest["other_captions"], manifest["captions_added"]) == (1, 1)
    assert "emit: 1 samples keep a text other than their caption; --format llava writes" in capsys.readouterr().err
    assert dict(members(tmp_path / "out" / "000000.tar"))["0.txt"] == b"as the web has it"
    emit(sel, str(tmp_path / "llava"), EmitOptions(format="llava"), QUIET)
    records = json.loads((tmp_path / "llava" / "coreset.json").read_text())
    mix({"sources": {"s": {"path": sel}}, "shuffle": False}, str(tmp_path / "mix"), QUIET)
    drawn = [json.loads(data) for name, data in members(tmp_path / "mix" / "000000.tar") if name.endswith(".json")]
    for made in (records, drawn):
        assert [record["conversations"][1]["value"] for record in made] == [f"told anew {row}" for row in range(3)]


@pytest.mark.parametrize("blank", [" ", "\ufeff", "\u200b\n"])
def test_a_text_of_which_nothing_can_be_seen_gives_way_to_the_caption(tmp_path, model, blank):
    (tmp_path / "pool").mkdir()
    with open(tmp_path / "pool" / "0.tar", "wb") as file, TarWriter(file) as tar:
        tar.add("x.jpg", picture(0))
        tar.add("x.txt", blank.encode())
        tar.add("x.json", b'{"url": "http://x/0"}')
    (tmp_path / "cc.tsv").write_text("a red thing\thttp://x/0")
    embed(str(tmp_path / "pool"), str(tmp_path / "emb"), EmbedOptions(model, captions=str(tmp_path / "cc.tsv")), QUIET)
    sel = write_selection(tmp_path / "sel", str(tmp_path / "emb"), lambda stem, row, key: True)
    assert emit(sel, str(tmp_path / "out"), EmitOptions(), QUIET)["captions_added"] == 1
    assert dict(members(tmp_path / "out" / "000000.tar"))["x.txt"] == b"a red thing"


@pytest.mark.parametrize("caption", ["in the JSON", ["in a list", "twice"]])
def test_samples_that_say_something_themselves_are_emitted_as_they_are(tmp_path, model, caption):
    pool = write_pool(tmp_path / "pool", ["a"], 3)
    with open(tmp_path / "pool" / "b.tar", "wb") as file, TarWriter(file) as tar:
        tar.add("x.jpg", picture(9))
        tar.add("x.json", json.dumps({"caption": caption}).encode())
    embed(pool, str(tmp_path / "emb"), EmbedOptions(model), QUIET)
    sel = write_selection(tmp_path / "sel", str(tmp_path / "emb"), lambda stem, row, key: True)
    manifest = emit(sel, str(tmp_path / "out"), EmitOptions(), QUIET)
    assert "captions_added" not in manifest
    whole = members(tmp_path / "pool" / "a.tar") + members(tmp_path / "pool" / "b.tar")
    assert members(tmp_path / "out" / "000000.tar") == whole


@pytest.mark.parametrize("content", ["", "one column\n", "a\tb\nc\thttp://x\n"])
def test_a_table_without_urls_is_refused_before_any_model_is_loaded(tmp_path, content):
    pool = write_silent_pool(tmp_path / "pool", ["http://x/0"])
    (tmp_path / "cc.tsv").write_text(content)
    with pytest.raises(UsageError, match="caption TAB url"):
        embed(pool, str(tmp_path / "emb"), EmbedOptions("ViT-B-32", captions=str(tmp_path / "cc.tsv")), QUIET)


def test_a_table_with_a_mark_in_front_is_read_and_one_that_is_not_utf_8_says_so(tmp_path):
    (tmp_path / "cc.tsv").write_bytes(
        "\ufeffhttp://x/0\tcafé\n".encode() + "http://x/1\tcafé\nhttp://x/2\t \n".encode("latin-1")
    )
    captions = Captions(str(tmp_path / "cc.tsv"))
    found = [captions.get(f"http://x/{number}") for number in range(4)]
    assert [each.text for each in found] == ["café", None, None, None]
    assert [each.status for each in found[1:]] == ["bad_caption", "no_caption", "no_caption"]
    assert "not UTF-8" in found[1].reason and "empty" in found[2].reason


@pytest.mark.parametrize("head", ["caption\turl\n", "url\tcaption\n", "\ufeffid\tURL\tTEXT\r\n", "", "swapped"])
def test_a_table_may_have_the_header_that_img2dataset_asks_for(tmp_path, head):
    """Its guides to CC3M and CC12M put one there before the download."""
    columns = [name.lower() for name in head.strip("\ufeff\r\n").split("\t")]
    columns = {"": ["caption", "url"], "swapped": ["url", "caption"]}.get(head.strip(), columns)
    rows = [{"id": "7", "url": f"http://x/{n}", "caption": f'a "{n}', "text": f'a "{n}'} for n in range(3)]
    lines = ["\t".join(row[name] for name in columns) for row in rows]
    (tmp_path / "cc.tsv").write_text(("" if head == "swapped" else head) + "\n".join(lines), "utf-8")
    captions = Captions(str(tmp_path / "cc.tsv"))
    assert [captions.get(row["url"]).text for row in rows] == ['a "0', 'a "1', 'a "2']
    assert captions.get("http://x/3").text is None


@pytest.mark.realdata
def test_cc3m_as_it_is_published_finds_every_caption():
    location = REAL_DATA / "text" / "cc3m_validation.tsv"
    rows = [line.rstrip("\n").split("\t") for line in open(location, encoding="utf-8", newline="\n")]
    captions = Captions(str(location))
    first = {}
    for caption, url in rows:
        first.setdefault(url, caption.strip())
    assert len(rows) == 15_833 or len(rows) == 15_840
    assert {url: captions.get(url).text for url in first} == first
    assert captions.get("http://nowhere/none.jpg").text is None


def test_columns_of_a_source_are_kept_alone_and_joined(tmp_path):
    told = {"similarity": [0.1, 0.2, None, 0.4, 0.5], "NSFW": ["UNLIKELY", None, "UNSURE", "", "NSFW"]}
    write_source(tmp_path / "source", "clip-retrieval", [5], **told)
    options = ImportOptions("clip-retrieval", columns=("similarity", "NSFW", "caption"))
    manifest = import_layout(str(tmp_path / "source"), str(tmp_path / "emb"), options, QUIET)
    assert manifest["options"]["columns"] == {"similarity": "number", "NSFW": "text", "caption": "text"}
    table = sidecar.table(str(tmp_path / "emb" / "0000.arrow"))
    assert table["similarity"].to_pylist() == told["similarity"]
    assert table["NSFW"].to_pylist() == ["UNLIKELY", None, "UNSURE", None, "NSFW"]
    assert table[column_name("caption")].to_pylist() == table["caption"].to_pylist()
    pool = write_silent_pool(tmp_path / "pool", ["http://x/4", "http://x/99", "http://x/1"])
    options = ImportOptions("clip-retrieval", pool=pool, join="url", columns=("similarity", "NSFW"))
    import_layout(str(tmp_path / "source"), str(tmp_path / "joined"), options, QUIET)
    table = sidecar.table(str(tmp_path / "joined" / "00000.arrow"))
    assert table["similarity"].to_pylist() == [0.5, None, 0.2] and table["NSFW"].to_pylist() == ["NSFW", None, None]
    with pytest.raises(UsageError, match="unknown column of .*'similarty'.*did you mean 'similarity'"):
        options = ImportOptions("clip-retrieval", columns=("similarty",))
        import_layout(str(tmp_path / "source"), str(tmp_path / "no"), options, QUIET)


def test_datacomps_uids_travel_from_the_pool_to_its_subset(tmp_path, model):
    """DataComp's downloads have `uid` in their JSON, 32 hexadecimal digits; its resharder reads (u8, u8), sorted."""
    uids = [f"{row * 0x1234567890ABCDEF1234567890ABCDEF % (1 << 128):032x}" for row in (7, 3, 5, 1)]
    (tmp_path / "pool").mkdir()
    with open(tmp_path / "pool" / "00000000.tar", "wb") as file, TarWriter(file) as tar:
        for row, uid in enumerate(uids):
            tar.add(f"{row:05d}.jpg", picture(row))
            tar.add(f"{row:05d}.txt", b"words")
            tar.add(f"{row:05d}.json", json.dumps({"uid": uid}).encode())
    embed(str(tmp_path / "pool"), str(tmp_path / "emb"), EmbedOptions(model), QUIET)
    sel = write_selection(tmp_path / "sel", str(tmp_path / "emb"), lambda stem, row, key: row != 2 or "sample(9)")
    emit(sel, str(tmp_path / "out"), EmitOptions(format="datacomp"), QUIET)
    subset = np.load(tmp_path / "out" / "subset.npy")
    expected = sorted((int(uid[:16], 16), int(uid[16:], 16)) for row, uid in enumerate(uids) if row != 2)
    assert subset.dtype == np.dtype("u8,u8") and subset.tolist() == expected
    curate("select", tmp_path / "emb", tmp_path / "back", "--step", f"subset('{tmp_path / 'out' / 'subset.npy'}')")
    chosen = sidecar.table(str(tmp_path / "back" / "00000000.arrow"))["kept"].to_pylist()
    assert chosen == [True, True, False, True]
    np.save(tmp_path / "numbers.npy", np.arange(3))
    ended = curate(
        "select", tmp_path / "emb", tmp_path / "no", "--step", f"subset('{tmp_path}/numbers.npy')", check=False
    )
    assert ended.returncode == 2 and "u8,u8" in ended.stderr


def test_laions_tables_lie_in_a_folder_of_their_own_name(tmp_path):
    write_source(tmp_path / "source", "clip-retrieval", [3])
    (tmp_path / "source" / "metadata").rename(tmp_path / "source" / "laion2B-en-metadata")
    import_layout(str(tmp_path / "source"), str(tmp_path / "emb"), ImportOptions("clip-retrieval"), QUIET)
    assert sidecar.table(str(tmp_path / "emb" / "0000.arrow"))["url"].to_pylist()[2] == "http://x/2"


def test_nemo_curators_own_output_is_imported(tmp_path):
    """NeMo Curator 1.4.0, ConvertImageBatchToDocumentBatchStage(["image_id", "embedding"]) and ParquetWriter."""
    (tmp_path / "nemo").mkdir()
    kinds = pa.schema([("image_id", pa.large_string()), ("embedding", pa.list_(pa.float32()))])
    rows = {"image_id": ["00000_000000", "00000_000001"], "embedding": [[3.0, 4.0], [0.0, 2.0]]}
    pq.write_table(pa.table(rows, kinds), tmp_path / "nemo" / "65e82c05c89f41e2ae7034cef5c92999.parquet")
    manifest = import_layout(str(tmp_path / "nemo"), str(tmp_path / "emb"), ImportOptions("nemo"), QUIET)
    [stem] = manifest["shards"]
    found = sidecar.table(str(tmp_path / "emb" / f"{stem}.arrow")).to_pylist()
    assert [row["key"] for row in found] == rows["image_id"]
    np.testing.assert_allclose([row["image_embedding"] for row in found], [[0.6, 0.8], [0, 1]], atol=1e-3)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
FIELDS = ("caption", "url", "score", "license")


@settings(max_examples=150, deadline=None)
@given(
    st.binary(max_size=200)
    | st.dictionaries(st.sampled_from(FIELDS), JSON_VALUES).map(lambda value: json.dumps(value).encode())
)
@example(b'{"score": 1%s}' % (b"0" * 400))
@example(b'{"score": 1e999, "caption": NaN}')
@example(b'{"license": %s1%s}' % (b"[" * 900, b"]" * 900))
@example(b'{"caption": "\\ud800", "url": "\\ud800"}')
@example(b"[" * 100_000)
def test_no_json_of_a_sample_ever_crashes_or_loses_its_row(blob):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, data in (("a.jpg", picture(0)), ("a.json", blob)):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    [sample] = read_index(file).samples
    row, image = reader.read_row(file, sample, 10_000, Extras({"score": NUMBER, "license": TEXT}))
    assert row["key"] == "a" and row["status"] in STATUSES
    assert (row["status"] == "ok") == (row["caption"] is not None) and image is not None
    kinds = {"caption": pa.string(), "url": pa.string(), "score": pa.float64(), "license": pa.string()}
    for field, kind in kinds.items():
        pa.array([row[field]], kind)


def test_a_picture_behind_a_second_dot_is_pointed_at():
    names = ("IMG 1 (final v1.1).jpg", "IMG 1 (final v1.txt", "plain.txt")
    buffer = io.BytesIO()
    with TarWriter(buffer) as tar:
        for name in names:
            tar.add(name, b"words")
    dotted, plain = (reader.read_row(buffer, sample, 100)[0] for sample in read_index(buffer).samples)
    assert dotted["status"] == plain["status"] == "no_image" and not plain["reason"]
    assert "first dot" in dotted["reason"] and list(reader.row_faults("00000", [dotted, plain])) == [
        f"no_image: {reader.DOTTED}",
        "no_image: no image member",
    ]


def test_a_samples_json_that_is_not_read_is_told_with_the_reason(tmp_path, model):
    (tmp_path / "pool").mkdir()
    broken = {
        "torn": b'{"url": "http://x/1',
        "list": b"[1]",
        "large": b'{"caption": "a", "exif": "' + b"x" * 2**20 + b'"}',
    }
    held = [
        (f"{key}.{end}", data) for key, data in broken.items() for end, data in (("jpg", picture(1)), ("json", data))
    ]
    make_tar(tmp_path / "pool" / "0.tar", [*held, ("torn.txt", b"words")])
    ended = curate("embed", tmp_path / "pool", tmp_path / "emb", "--model", model)
    told = {kind: fault["count"] for kind, fault in manifest(tmp_path / "emb")["faults"].items() if "JSON that" in kind}
    assert sorted(told.values()) == [1, 2] and all(kind in ended.stderr for kind in told)
    assert "no_caption: and its JSON is not read" in ended.stderr


def test_a_table_of_captions_that_is_mended_is_seen_at_an_equal_size_too(tmp_path, model):
    pool = write_silent_pool(tmp_path / "pool", ["http://x/0"])
    out, words = str(tmp_path / "emb"), EmbedOptions(model, captions=str(tmp_path / "cc.tsv"))
    (tmp_path / "cc.tsv").write_text("a cat\thttp://x/0\n")
    embed(pool, out, words, QUIET)
    (tmp_path / "cc.tsv").write_text("a dog\thttp://x/0\n")
    with pytest.raises(ContractError, match="another state of .*cc.tsv"):
        embed(pool, out, words, QUIET)
    embed(pool, out, words, Job(workers=1, quiet=True, overwrite=True))
    assert sidecar.table(f"{out}/00000.arrow")["caption"].to_pylist() == ["a dog"]
    older = manifest(out)
    older["inputs"]["captions"]["digest"] = digest((tmp_path / "cc.tsv").stat().st_size)
    save_json(f"{out}/manifest.json", older)
    assert embed(pool, out, words, QUIET)["inputs"] == older["inputs"], "an older version knew the size alone"
