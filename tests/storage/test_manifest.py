import json

import numpy as np
import pyarrow as pa
import pytest

from curate.errors import ContractError, CurateError, RunError, UsageError
from curate.storage import paths, sidecar
from curate.storage.manifest import open_input, open_output, reconcile


def test_vectors_are_views_and_bad_rows_are_null_and_zero(tmp_path):
    x = np.random.default_rng(0).normal(size=(5, 8)).astype(np.float16)
    valid = np.array([True, False, True, True, False])
    batch = pa.record_batch([sidecar.vector_column(x, valid)], names=["image_embedding"])
    schema = batch.schema
    sidecar.write_table(str(tmp_path / "a.arrow"), schema, [batch.slice(0, 2), batch.slice(2)])
    found = [sidecar.vectors(each["image_embedding"]) for each in sidecar.batches(str(tmp_path / "a.arrow"))]
    assert [len(each) for each in found] == [2, 3]
    assert np.array_equal(np.concatenate(found), np.where(valid[:, None], x, 0))
    assert not found[0].flags.owndata
    assert sidecar.table(str(tmp_path / "a.arrow"))["image_embedding"].null_count == 2
    assert np.array_equal(sidecar.vectors(batch.slice(1, 3)["image_embedding"]), np.where(valid[:, None], x, 0)[1:4])


def test_a_table_that_fails_half_way_leaves_nothing(tmp_path):
    def broken():
        yield pa.record_batch([pa.array([1])], names=["n"])
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        sidecar.write_table(str(tmp_path / "a.arrow"), pa.schema([("n", pa.int64())]), broken())
    assert list(tmp_path.iterdir()) == []


def make(tmp_path, **changes):
    arguments = {"options": {"model": "a", "k": 3}, "inputs": {"pool": {"path": str(tmp_path / "pool"), "digest": "d"}}}
    return open_output(str(tmp_path / "out"), "embed", **(arguments | changes))


def test_a_directory_resumes_completes_and_is_recognised(tmp_path):
    output = make(tmp_path)
    assert not output.complete and output.missing(["a", "b"]) == ["a", "b"]
    (tmp_path / "out" / "a.arrow").write_bytes(b"")
    (tmp_path / "out" / "b.arrow.123.tmp").write_bytes(b"half")
    again = make(tmp_path)
    assert again.missing(["a", "b"]) == ["b"] and (tmp_path / "out" / "b.arrow.123.tmp").exists(), "another slice's"
    again.finish(shards={"a": {"rows": 1}}, counts={"ok": 1})
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.arrow", "manifest.json"]
    assert make(tmp_path).complete
    assert open_input(str(tmp_path / "out"), "embed").rows == {"a": 1}


def test_what_is_made_anew_stays_where_the_disk_is_full_and_goes_where_the_request_is_wrong(tmp_path):
    for error, stays in ((RunError("no space left"), True), (UsageError("wrong"), False)):
        output = make(tmp_path)
        output.basis = {"shards": {}}
        (tmp_path / "out" / "a.arrow").write_bytes(b"")
        with pytest.raises(type(error)), output.attempt():
            raise error
        assert (tmp_path / "out").exists() == stays


def test_a_directory_with_failed_shards_is_taken_up_again(tmp_path):
    make(tmp_path).finish(shards={}, failed={"a": "no tar"})
    assert not make(tmp_path).complete


@pytest.mark.parametrize(
    "changes, word",
    [
        ({"options": {"model": "b", "k": 3}}, 'model="a", now model="b"'),
        ({"options": {"model": "a"}}, "k=3, now k=null"),
    ],
)
def test_another_request_is_refused_by_name_unless_overwritten(tmp_path, changes, word):
    make(tmp_path).finish(shards={})
    with pytest.raises(ContractError, match="--overwrite") as refusal:
        make(tmp_path, **changes)
    assert word in str(refusal.value) and "\n" not in str(refusal.value)
    assert not make(tmp_path, **changes, overwrite=True).complete


def test_what_a_directory_rests_on_is_never_deleted_for_it(tmp_path):
    pool = {"path": str(tmp_path / "demo" / "pool"), "digest": "d"}
    open_output(str(tmp_path / "demo"), "demo", {}, {}).finish(shards={})
    (tmp_path / "demo" / "pool").mkdir()
    emb = str(tmp_path / "emb")
    open_output(emb, "embed", {}, {"pool": pool}).finish(shards={})
    open_output(str(tmp_path / "clu"), "cluster", {}, {"embeddings": open_input(emb)}).finish(shards={})
    clusters = {"clusters": open_input(str(tmp_path / "clu"))}
    for place in ("clu", "emb", "demo", "emb/../emb"):
        with pytest.raises(ContractError, match="would be deleted, but .* is needed"):
            open_output(str(tmp_path / place), "select", {}, clusters, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clu", "demo", "emb"]
    with pytest.raises(ContractError, match="would be deleted"):
        open_output(str(tmp_path / "demo"), "embed", {}, {"pool": pool}, overwrite=True)
    open_output(str(tmp_path / "emb2"), "embed", {}, {"pool": pool}).finish(shards={})
    assert not open_output(str(tmp_path / "emb2"), "select", {}, clusters, overwrite=True).complete


@pytest.mark.parametrize("content", ['{"name": "a web app"}', "[1, 2]", '{"command": "eval"}'])
def test_a_manifest_of_another_kind_makes_a_directory_no_ours(tmp_path, content):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "manifest.json").write_text(content)
    with pytest.raises(ContractError, match="not made by curate"):
        make(tmp_path, overwrite=True)
    assert (tmp_path / "out" / "manifest.json").read_text() == content


def test_a_negative_seed_is_refused_before_anything_is_drawn(tmp_path):
    with pytest.raises(UsageError, match="seed=-1 is negative"):
        make(tmp_path, options={"seed": -1})
    assert not (tmp_path / "out").exists()


def test_a_foreign_directory_is_never_deleted(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    with pytest.raises(ContractError, match="not made by curate"):
        make(tmp_path, overwrite=True)
    assert (tmp_path / "out" / "thesis.txt").read_text() == "years of work"


def test_a_changed_input_is_noticed_down_the_line(tmp_path):
    first = make(tmp_path)
    first.finish(shards={"a": {"rows": 1}})
    emb = open_input(str(tmp_path / "out"))
    second = open_output(str(tmp_path / "clu"), "cluster", {}, {"embeddings": emb})
    second.finish(shards={})
    assert open_input(str(tmp_path / "clu")).source("embed").directory == str(tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest | {"counts": {"ok": 2}}))
    with pytest.raises(ContractError, match="another state"):
        open_input(str(tmp_path / "clu")).source("embed")


def test_inputs_of_the_wrong_kind_are_refused_in_words(tmp_path):
    with pytest.raises(UsageError, match="does not exist; expected a directory made by `curate embed`"):
        open_input(str(tmp_path / "nothing"), "embed")
    make(tmp_path)
    with pytest.raises(ContractError, match="unfinished"):
        open_input(str(tmp_path / "out"))
    make(tmp_path).finish(shards={})
    with pytest.raises(UsageError, match="was made by `curate embed`"):
        open_input(str(tmp_path / "out"), "select")


def test_rows_that_vanish_are_an_error():
    reconcile("a", 3, {"ok": 2, "decode_error": 1})
    with pytest.raises(CurateError, match="3 rows in, but 2 ok = 2 accounted for"):
        reconcile("a", 3, {"ok": 2})


@pytest.mark.parametrize(
    "pattern, names",
    [
        ("p/{00000..00002}.tar", ["p/00000.tar", "p/00001.tar", "p/00002.tar"]),
        ("p/{9..11}", ["p/9", "p/10", "p/11"]),
        ("{a,b}/{0..1}", ["a/0", "a/1", "b/0", "b/1"]),
        ("plain", ["plain"]),
    ],
)
def test_braces_expand_as_in_a_shell(pattern, names):
    assert paths.braces(pattern) == names


@pytest.mark.parametrize("pattern", ["{a,b}" * 64, "{0..9999}/{0..9999}.tar", "{0..99999999}"])
def test_patterns_of_too_many_names_are_refused_at_once(pattern):
    with pytest.raises(UsageError, match=r"names more than 10,000,000 files"):
        paths.braces(pattern)


def test_locations_on_a_remote_filesystem():
    with paths.atomic_write("memory://bucket/dir/a.txt") as file:
        file.write(b"hello")
    assert paths.exists("memory://bucket/dir/a.txt") and paths.listdir("memory://bucket/dir") == ["a.txt"]
    assert paths.read_text("memory://bucket/dir/a.txt") == "hello"
    assert paths.expand("memory://bucket/dir", ".txt") == ["memory://bucket/dir/a.txt"]
    paths.remove("memory://bucket/dir")
    assert not paths.exists("memory://bucket/dir/a.txt")
