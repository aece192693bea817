"""Published embeddings as people have them: odd ids, missing parts, empty ones; taken, counted or refused by name."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from artefacts import picture
from hypothesis import given, settings
from hypothesis import strategies as st
from test_embed import make_tar
from test_layouts import DIM, QUIET, table_of, unit, vectors

from curate.errors import UsageError
from curate.ingest import join, layouts
from curate.ingest.options import ImportOptions
from curate.ingest.published import import_layout
from curate.storage.tar import TarWriter
from house import curate, manifest


def write_nemo(folder, columns, name="part0"):
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), folder / f"{name}.parquet")


def lists(rows, seed=0):
    return vectors(rows, seed).astype(np.float32).tolist()


def do_import(folder, out, layout="nemo", **options):
    return import_layout(str(folder), str(out), ImportOptions(layout, **options), QUIET)


@pytest.mark.parametrize(
    "ids, keys",
    [
        (pa.array([0, 12, 2**62], pa.int64()), ["0", "12", str(2**62)]),
        (pa.array([0.0, 7.0, 12.0]), ["0", "7", "12"]),
        (pa.array([b"a", b"b", "ä".encode()]), ["a", "b", "ä"]),
        (pa.array([b"\xff\x00", b"\xfe\x01", b"\xfd\x02"]), ["ff00", "fe01", "fd02"]),
        (pa.array(["x", "y", "z"]).dictionary_encode(), ["x", "y", "z"]),
    ],
)
def test_ids_of_every_kind_become_the_keys(tmp_path, ids, keys):
    write_nemo(tmp_path / "in", {"image_id": ids, "embedding": lists(3)})
    made = do_import(tmp_path / "in", tmp_path / "emb")
    assert [row["key"] for row in table_of(tmp_path / "emb")] == keys and "faults" not in made


def test_rows_without_a_key_are_counted_and_their_keys_say_so(tmp_path):
    write_nemo(tmp_path / "in", {"id": pa.array([5, None, 6]), "embedding": lists(3)})
    ended = curate("import", tmp_path / "in", tmp_path / "emb", "--layout", "nemo")
    assert [row["key"] for row in table_of(tmp_path / "emb")] == ["5", "part0_000000001", "6"]
    [(kind, fault)] = manifest(tmp_path / "emb")["faults"].items()
    assert "without a usable key" in kind and fault["count"] == 1 and kind in ended.stderr


def test_numbers_are_emitted_as_the_source_has_them(tmp_path):
    write_nemo(tmp_path / "in", {"image_id": pa.array([7, 1007, 90]), "embedding": lists(3)})
    curate("import", tmp_path / "in", tmp_path / "emb", "--layout", "nemo")
    curate("select", tmp_path / "emb", tmp_path / "sel", "--step", "sample(3)")
    curate("emit", tmp_path / "sel", tmp_path / "keys", "--format", "keys")
    assert (tmp_path / "keys" / "part0.txt").read_text().split() == ["7", "1007", "90"]
    assert np.load(tmp_path / "keys" / "part0.npy").tolist() == [7, 1007, 90]


def test_captions_as_bytes_and_lists_are_read_and_others_counted(tmp_path):
    (tmp_path / "in").mkdir()
    captions = pa.array([["first", "second"], [], ["\ufeff third"]])
    for name, column in (("a", captions), ("b", pa.array([b"one", b"\xff\xfe", None])), ("c", pa.array([1, 2, None]))):
        np.save(tmp_path / "in" / f"{name}.npy", vectors(3))
        pq.write_table(pa.table({"key": ["x", "y", "z"], "caption": column}), tmp_path / "in" / f"{name}.parquet")
    made = do_import(tmp_path / "in", tmp_path / "emb", "npy")
    read = [row["caption"] for row in table_of(tmp_path / "emb")]
    assert read[:2] == ["first", None] and read[2].strip("\ufeff ") == "third"
    assert read[3:] == ["one", None, None, None, None, None]
    assert [(fault["count"], "caption" in kind) for kind, fault in made["faults"].items()] == [(3, True)]


def test_empty_and_half_null_parts_are_rows_or_none(tmp_path):
    write_nemo(tmp_path / "in", {"image_id": list("abc"), "embedding": lists(3)}, "full")
    empty = pa.table({"image_id": pa.array([], pa.string()), "embedding": pa.array([], pa.list_(pa.float32()))})
    pq.write_table(empty, tmp_path / "in" / "empty.parquet")
    write_nemo(tmp_path / "in", {"image_id": list("defgh"), "embedding": [*lists(1), None, None, None, []]}, "half")
    write_nemo(tmp_path / "in", {"image_id": ["i"], "embedding": pa.array([None], pa.list_(pa.float32()))}, "none")
    made = do_import(tmp_path / "in", tmp_path / "emb")
    rows = {stem: shard["rows"] for stem, shard in made["shards"].items()}
    assert rows == {"empty": 0, "full": 3, "half": 5, "none": 1}
    assert made["counts"] == {"ok": 4, "bad_embedding": 5} and "failed" not in made


def test_the_column_of_vectors_may_be_called_embeddings_and_is_asked_for_in_our_words(tmp_path):
    write_nemo(tmp_path / "plural", {"id": ["a"], "embeddings": lists(1)})
    assert do_import(tmp_path / "plural", tmp_path / "emb")["counts"] == {"ok": 1}
    write_nemo(tmp_path / "none", {"id": ["a"], "vector": lists(1)})
    ended = curate("import", tmp_path / "none", tmp_path / "out", "--layout", "nemo", check=False)
    assert ended.returncode == 1 and "no column embedding or embeddings; it has id, vector" in ended.stderr
    assert "FieldRef" not in ended.stderr


def write_retrieval(folder, parts, *, tables=None, texts=None, pad=""):
    for name in ("img_emb", "text_emb", "metadata"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for number in range(parts):
        np.save(folder / "img_emb" / f"img_emb_{number}.npy", vectors(2, number))
        if texts is None or number in texts:
            np.save(folder / "text_emb" / f"text_emb_{pad}{number}.npy", vectors(2, number + 9))
        if tables is None or number in tables:
            told = {"image_path": [f"{number}-0", f"{number}-1"], "caption": ["red", "blue"]}
            pq.write_table(pa.table(told), folder / "metadata" / f"metadata_{pad}{number}.parquet")


def test_a_part_without_its_table_is_refused_by_name_and_one_without_text_counted(tmp_path):
    write_retrieval(tmp_path / "in", 3, tables=[0, 2], texts=[0, 1])
    ended = curate("import", tmp_path / "in", tmp_path / "emb", "--layout", "clip-retrieval", check=False)
    made = manifest(tmp_path / "emb")
    assert ended.returncode == 1 and list(made["failed"]) == ["1"] and "no table beside it" in made["failed"]["1"]
    [(kind, fault)] = made["faults"].items()
    assert "without text vectors" in kind and fault == {"count": 2, "example": "2"}
    assert [row["clip_score"] is None for row in table_of(tmp_path / "emb")] == [False, False, True, True]


def test_other_padding_belongs_together(tmp_path):
    write_retrieval(tmp_path / "in", 2, pad="000")
    assert do_import(tmp_path / "in", tmp_path / "emb", "clip-retrieval")["counts"] == {"ok": 4}
    rows = table_of(tmp_path / "emb")
    assert [row["key"] for row in rows] == ["0-0", "0-1", "1-0", "1-1"] and all(row["clip_score"] for row in rows)


def write_keys(folder, keys, *, prefix=""):
    folder.mkdir()
    with open(folder / "00000.tar", "wb") as file, TarWriter(file) as tar:
        for number, key in enumerate(keys):
            tar.add(f"{prefix}{key}.jpg", picture(number))
            tar.add(f"{prefix}{key}.txt", b"words")
    return str(folder)


PLAIN = [f"{row:09d}" for row in range(5)]
KEY_FORMS = {
    "as they are": (PLAIN, ""),
    "paths": ([f"/data/images/{key}.jpg" for key in PLAIN], ""),
    "relative paths": ([f"images/{key}.JPEG" for key in PLAIN], ""),
    "file names": ([f"{key}.png" for key in PLAIN], ""),
    "numbers": (list(range(5)), ""),
    "dotted pool": (PLAIN, "./"),
    "folder in the pool": (PLAIN, "train/"),
    "windows": ([f"C:\\images\\{key}.jpg" for key in PLAIN], ""),
}


@pytest.mark.parametrize("form", KEY_FORMS)
def test_keys_join_in_the_forms_that_people_have(tmp_path, form):
    keys, prefix = KEY_FORMS[form]
    pool = write_keys(tmp_path / "pool", PLAIN[::-1], prefix=prefix)
    write_nemo(tmp_path / "in", {"image_id": keys, "embedding": lists(5)})
    made = do_import(tmp_path / "in", tmp_path / "emb", pool=pool, join="key")
    assert made["joined"]["matched"] == 5
    found = np.array([row["image_embedding"] for row in table_of(tmp_path / "emb")], np.float32)
    np.testing.assert_allclose(found, unit(vectors(5))[::-1], atol=2e-3)


def test_a_name_that_several_rows_share_matches_none_of_them(tmp_path):
    pool = write_keys(tmp_path / "pool", ["a", "b"])
    write_nemo(tmp_path / "in", {"image_id": ["x/a.jpg", "y/a.jpg", "x/b.jpg"], "embedding": lists(3)})
    made = do_import(tmp_path / "in", tmp_path / "emb", pool=pool, join="key")
    assert made["counts"] == {"ok": 1, "unmatched": 1}


def test_a_failed_join_shows_a_value_of_each_side(tmp_path):
    pool = write_keys(tmp_path / "pool", ["left"])
    write_nemo(tmp_path / "in", {"image_id": ["right"], "embedding": lists(1)})
    with pytest.raises(UsageError, match="the pool has 'left', the source 'right'"):
        do_import(tmp_path / "in", tmp_path / "emb", pool=pool, join="key")


@settings(max_examples=200, deadline=None)
@given(st.one_of(st.none(), st.text(), st.binary(), st.integers(), st.floats(), st.booleans(), st.lists(st.text())))
def test_any_value_names_a_row_as_text_or_not_at_all(value):
    name = layouts.name_of(value)
    assert name is None or (name and name.encode() and name == name.strip())
    for form in join.FORMS:
        number = join.join_hash(value, "key", form)
        assert number is None or 0 < number < 2**64
    assert DIM


def write_part(folder, number, keys):
    for name in ("img_emb", "text_emb", "metadata"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    np.save(folder / "img_emb" / f"img_emb_{number}.npy", np.eye(4, dtype=np.float32)[: len(keys)])
    pq.write_table(pa.table({"image_path": keys}), folder / "metadata" / f"metadata_{number}.parquet")


def test_keys_that_several_rows_share_say_nothing_and_files_without_vectors_are_told(tmp_path):
    for shard in "01":
        make_tar(
            tmp_path / f"{shard}.tar",
            [(f"{key}.{end}", data) for key in "ab" for end, data in (("jpg", picture(int(shard))), ("txt", b"w"))],
        )
    words = ("--layout", "clip-retrieval", "--pool", tmp_path, "--join", "key")
    write_part(tmp_path / "in", 0, ["a", "b"])
    ended = curate("import", tmp_path / "in", tmp_path / "half", *words)
    assert "2 × rows of the pool that share their key" in ended.stderr
    write_part(tmp_path / "in", 1, ["a", "b"])
    ended = curate("import", tmp_path / "in", tmp_path / "emb", *words, check=False)
    assert ended.returncode == 2 and "belongs to several rows (e.g. 'a')" in ended.stderr
    write_part(tmp_path / "in", 1, ["b", "c"])
    ended = curate("import", tmp_path / "in", tmp_path / "emb", *words)
    assert [row["status"] for row in table_of(tmp_path / "emb")][:2] == ["ok", "unmatched"]
    assert "2 × rows of the source that share their key" in ended.stderr
    (tmp_path / "in" / "img_emb" / "img_emb_1.npy").unlink()
    ended = curate("import", tmp_path / "in", tmp_path / "part", "--layout", "clip-retrieval")
    assert "1 × files left out" in ended.stderr and "metadata_1.parquet" in ended.stderr
