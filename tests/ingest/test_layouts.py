import hashlib
import json
import os
import tempfile
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from artefacts import picture
from hypothesis import given, settings
from hypothesis import strategies as st

from curate.engine import Job
from curate.errors import ShardError, UsageError
from curate.ingest import layouts
from curate.ingest.import_tasks import unit_rows
from curate.ingest.published import ImportOptions, import_layout
from curate.storage import sidecar
from curate.storage.tar import TarWriter
from house import REAL_DATA, fingerprint
from pipelines import gzipped

QUIET = Job(quiet=True, workers=1)
DIM = 6


def vectors(rows, seed=0):
    return np.random.default_rng(seed).normal(size=(rows, DIM)).astype(np.float16)


def records(rows, first=0):
    """What a source says of its rows."""
    return {
        "key": [f"{row:05d}" for row in range(first, first + rows)],
        "url": [f"http://x/{row}" for row in range(first, first + rows)],
        "caption": [f"source caption {row}" for row in range(first, first + rows)],
        "sha256": [hashlib.sha256(picture(row)).hexdigest() for row in range(first, first + rows)],
        "uid": [f"{row:032x}" for row in range(first, first + rows)],
        "original_width": [float(10 + row) for row in range(first, first + rows)],
        "original_height": [20 + row for row in range(first, first + rows)],
    }


def write_source(folder, layout, sizes, **changes):
    """Write a source of several parts in a layout; returns all image and text vectors.

    changes: other columns, each a list or a function of the part's rows.
    """
    image, text = vectors(sum(sizes), 1), vectors(sum(sizes), 2)
    first = 0
    for number, size in enumerate(sizes):
        part, told = slice(first, first + size), records(size, first) | changes
        told = {name: each(range(first, first + size)) if callable(each) else each for name, each in told.items()}
        if layout == "clip-retrieval":
            for name in ("img_emb", "text_emb", "metadata"):
                (folder / name).mkdir(parents=True, exist_ok=True)
            np.save(folder / "img_emb" / f"img_emb_{number:04d}.npy", image[part])
            np.save(folder / "text_emb" / f"text_emb_{number:04d}.npy", text[part])
            told["image_path"] = told.pop("key")
            pq.write_table(pa.table(told), folder / "metadata" / f"metadata_{number:04d}.parquet")
        elif layout == "datacomp":
            folder.mkdir(exist_ok=True)
            arrays = {"l14_img": image[part], "l14_txt": text[part], "b32_img": text[part], "b32_txt": image[part]}
            np.savez(folder / f"{number:032x}.npz", **arrays)
            told.pop("key")
            pq.write_table(pa.table(told | {"text": told.pop("caption")}), folder / f"{number:032x}.parquet")
        elif layout == "nemo":
            folder.mkdir(exist_ok=True)
            rows = image[part].astype(np.float32).tolist()
            pq.write_table(pa.table({"image_id": told["key"], "embedding": rows}), folder / f"part{number}.parquet")
        else:
            folder.mkdir(exist_ok=True)
            np.save(folder / f"part{number}.npy", image[part].astype(np.float32))
            np.save(folder / f"part{number}.text.npy", text[part].astype(np.float32))
            pq.write_table(pa.table(told), folder / f"part{number}.parquet")
        first += size
    return image, text


def table_of(directory):
    found = sorted(directory.glob("*.arrow"))
    return [row for path in found for row in sidecar.table(str(path)).to_pylist()]


def unit(x):
    return x.astype(np.float32) / np.linalg.norm(x.astype(np.float32), axis=-1, keepdims=True)


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
def test_every_layout_becomes_sidecars_with_its_rows(tmp_path, layout):
    image, text = write_source(tmp_path / "source", layout, [5, 3])
    manifest = import_layout(str(tmp_path / "source"), str(tmp_path / "emb"), ImportOptions(layout), QUIET)
    assert manifest["counts"] == {"ok": 8}
    assert [shard["rows"] for shard in manifest["shards"].values()] == [5, 3]
    rows, told = table_of(tmp_path / "emb"), records(8)
    keys = told["uid"] if layout == "datacomp" else told["key"]
    assert [row["key"] for row in rows] == keys
    np.testing.assert_allclose([row["image_embedding"] for row in rows], unit(image), atol=1e-3)
    if layout == "nemo":
        assert all(row["text_embedding"] is None and row["clip_score"] is None for row in rows)
        return
    np.testing.assert_allclose([row["text_embedding"] for row in rows], unit(text), atol=1e-3)
    np.testing.assert_allclose([row["clip_score"] for row in rows], (unit(image) * unit(text)).sum(1), atol=2e-3)
    assert [row["caption"] for row in rows] == told["caption"] and [row["url"] for row in rows] == told["url"]
    assert [row["uid"] for row in rows] == [bytes.fromhex(uid) for uid in told["uid"]]
    assert rows[2]["width"] == 12 and rows[2]["height"] == 22


@pytest.mark.realdata
def test_a_genuine_clip_retrieval_output_is_imported(tmp_path):
    source = REAL_DATA / "layouts" / "clip_retrieval"
    manifest = import_layout(str(source), str(tmp_path / "emb"), ImportOptions("clip-retrieval"), QUIET)
    rows = table_of(tmp_path / "emb")
    assert manifest["counts"] == {"ok": 9} and rows[0]["key"] == "/content/catalog/img1.png"
    assert rows[1]["caption"] == "a black crop top with a round neckline"
    image, text = (np.load(source / f"{kind}_emb" / f"{kind}_emb_0.npy") for kind in ("img", "text"))
    np.testing.assert_allclose([row["clip_score"] for row in rows], (unit(image) * unit(text)).sum(1), atol=1e-3)


def test_datacomp_gives_the_model_that_is_asked_for(tmp_path):
    _, text = write_source(tmp_path / "source", "datacomp", [4])
    options = ImportOptions("datacomp", arch="b32")
    import_layout(str(tmp_path / "source"), str(tmp_path / "emb"), options, QUIET)
    rows = table_of(tmp_path / "emb")
    np.testing.assert_allclose([row["image_embedding"] for row in rows], unit(text), atol=1e-3)
    options = ImportOptions("datacomp", arch="h99")
    manifest = import_layout(str(tmp_path / "source"), str(tmp_path / "none"), options, QUIET)
    assert "no array h99_img" in next(iter(manifest["failed"].values()))


def write_pool(folder, order, *, shard=4):
    """Write a pool whose samples are the source's rows in another order; rows over 100 are in no source."""
    folder.mkdir(parents=True, exist_ok=True)
    told = records(200)
    for number in range(0, len(order), shard):
        with open(folder / f"{number:05d}.tar", "wb") as file, TarWriter(file) as tar:
            for row in order[number : number + shard]:
                tar.add(f"{told['key'][row]}.jpg", picture(row))
                if row % 5:
                    tar.add(f"{told['key'][row]}.txt", f"pool caption {row}".encode())
                described = {"url": told["url"][row], "uid": told["uid"][row].upper()}
                tar.add(f"{told['key'][row]}.json", json.dumps(described).encode())
    return str(folder)


@pytest.mark.parametrize("join", ["key", "url", "sha256", "uid"])
def test_a_pool_keeps_its_rows_and_finds_its_vectors(tmp_path, join):
    image, text = write_source(tmp_path / "source", "clip-retrieval", [7, 6])
    order = [12, 3, 150, 0, 7, 6, 5, 151, 1, 11]
    pool = write_pool(tmp_path / "pool", order)
    options = ImportOptions("clip-retrieval", pool=pool, join=join)
    manifest = import_layout(str(tmp_path / "source"), str(tmp_path / "emb"), options, QUIET)
    assert manifest["joined"] == {"source_rows": 13, "repeated": 0, "matched": 8}
    # a caption that the pool lacks comes from the source; 150 has a partner in neither
    expected = {150: "no_caption", 151: "unmatched"}
    rows = table_of(tmp_path / "emb")
    assert [row["status"] for row in rows] == [expected.get(row, "ok") for row in order]
    assert manifest["counts"] == {"ok": 8, "no_caption": 1, "unmatched": 1}
    for row, found in zip(order, rows, strict=True):
        assert found["key"] == f"{row:05d}" and found["uid"] == hashlib.blake2b(picture(row), digest_size=16).digest()
        assert found["phash"] is not None and found["width"] == 24 and found["url"] == f"http://x/{row}"
        if row < 100:
            np.testing.assert_allclose(found["image_embedding"], unit(image[row]), atol=1e-3)
            np.testing.assert_allclose(found["text_embedding"], unit(text[row]), atol=1e-3)
            assert found["caption"] == (f"pool caption {row}" if row % 5 else f"source caption {row}")
        else:
            assert found["image_embedding"] is None and found["clip_score"] is None


def test_the_first_of_repeated_values_counts_and_is_reported(tmp_path):
    image, _ = write_source(tmp_path / "source", "npy", [3, 3], url=["http://x/1", "http://x/2", "http://x/1"])
    pool = write_pool(tmp_path / "pool", [1, 2])
    manifest = import_layout(
        str(tmp_path / "source"), str(tmp_path / "emb"), ImportOptions("npy", pool=pool, join="url"), QUIET
    )
    assert manifest["joined"] == {"source_rows": 6, "repeated": 4, "matched": 2}
    np.testing.assert_allclose(
        [row["image_embedding"] for row in table_of(tmp_path / "emb")], unit(image[:2]), atol=1e-3
    )


def test_bytes_do_not_depend_on_workers_or_slices(tmp_path):
    write_source(tmp_path / "source", "clip-retrieval", [7, 6])
    pool = write_pool(tmp_path / "pool", [1, 2, 3, 4, 5, 6, 7, 8])
    options = ImportOptions("clip-retrieval", pool=pool, join="key")
    made = []
    jobs = [Job(workers=workers, quiet=True) for workers in (1, 2)]
    for name, parts in (
        ("one", jobs[:1]),
        ("two", jobs[1:]),
        ("sliced", [replace(jobs[0], part=(r, 2)) for r in (1, 0)]),
    ):
        out = tmp_path / name / "emb"
        for job in parts:
            import_layout(str(tmp_path / "source"), str(out), options, job)
        made.append(fingerprint(out))
    assert made[0] == made[1] == made[2] and len(made[0]) == 3


def test_of_a_join_that_is_killed_nothing_stays_where_nobody_clears_it_away(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    write_source(tmp_path / "source", "clip-retrieval", [7, 6])
    pool, out = write_pool(tmp_path / "pool", [1, 2, 3, 4]), tmp_path / "emb"
    options = ImportOptions("clip-retrieval", pool=pool, join="key")
    if not (child := os.fork()):
        with monkeypatch.context() as killed:
            killed.setattr("curate.engine.run_stage", lambda *given, **named: os._exit(9))
            import_layout(str(tmp_path / "source"), str(out), options, QUIET)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert {path.name for path in tmp_path.iterdir()} == {"source", "pool", "emb"}
    assert import_layout(str(tmp_path / "source"), str(out), options, QUIET)["counts"] == {"ok": 4}
    assert not list(out.glob(".join-*"))


def test_a_join_that_matches_nothing_is_refused_with_an_example_and_leaves_nothing(tmp_path):
    write_source(tmp_path / "source", "clip-retrieval", [3])
    pool = write_pool(tmp_path / "pool", [150, 151])
    with pytest.raises(UsageError, match="'00150'.*--join url"):
        options = ImportOptions("clip-retrieval", pool=pool, join="key")
        import_layout(str(tmp_path / "source"), str(tmp_path / "emb"), options, QUIET)
    assert not (tmp_path / "emb").exists()


@pytest.mark.parametrize(
    "options, words",
    [
        (ImportOptions("clip-retreival"), "did you mean 'clip-retrieval'"),
        (ImportOptions("datacomp"), "expected {uid}.parquet beside {uid}.npz; it holds img_emb"),
        (ImportOptions("clip-retrieval", join="key"), "go together"),
        (ImportOptions("clip-retrieval", pool="POOL", join="name"), "unknown join"),
        (ImportOptions("clip-retrieval", pool="no/such/pool", join="key"), "does not exist"),
    ],
)
def test_a_wrong_request_is_refused(tmp_path, options, words):
    write_source(tmp_path / "source", "clip-retrieval", [3])
    with pytest.raises(UsageError) as refused:
        import_layout(str(tmp_path / "source"), str(tmp_path / "emb"), options, QUIET)
    assert words in str(refused.value)


def test_a_source_without_the_column_to_join_by_is_refused(tmp_path):
    write_source(tmp_path / "source", "nemo", [3])
    pool = write_pool(tmp_path / "pool", [1])
    with pytest.raises(UsageError, match="no column to join by url"):
        import_layout(
            str(tmp_path / "source"), str(tmp_path / "emb"), ImportOptions("nemo", pool=pool, join="url"), QUIET
        )


def test_parts_that_cannot_be_read_fail_by_name_and_the_others_go_on(tmp_path):
    write_source(tmp_path / "source", "clip-retrieval", [3, 4, 5, 6, 2])
    image = tmp_path / "source" / "img_emb"
    np.save(image / "img_emb_0001.npy", vectors(9))
    np.save(image / "img_emb_0002.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    (image / "img_emb_0003.npy").write_bytes((image / "img_emb_0003.npy").read_bytes()[:-5])
    (tmp_path / "source" / "metadata" / "metadata_0004.parquet").write_bytes(b"PAR1 not really PAR1")
    manifest = import_layout(str(tmp_path / "source"), str(tmp_path / "emb"), ImportOptions("clip-retrieval"), QUIET)
    assert list(manifest["shards"]) == ["0000"] and list(manifest["failed"]) == ["0001", "0002", "0003", "0004"]
    assert "line up" in manifest["failed"]["0001"] and "cannot be read" in manifest["failed"]["0002"]
    np.save(image / "img_emb_0001.npy", vectors(4))  # mended, and taken up
    manifest = import_layout(str(tmp_path / "source"), str(tmp_path / "emb"), ImportOptions("clip-retrieval"), QUIET)
    assert list(manifest["shards"]) == ["0000", "0001"] and list(manifest["failed"]) == ["0002", "0003", "0004"]


def test_an_npz_that_unpacks_to_far_more_than_its_size_is_refused_unread(tmp_path, monkeypatch):
    monkeypatch.setattr(gzipped, "LEAST_BYTES", 1 << 20)
    np.savez_compressed(tmp_path / "a.npz", l14_img=np.zeros((2_000, 512), np.float16))
    with pytest.raises(ShardError, match="a.npz unpacks to 2,048,.* times its size"):
        layouts._vectors(str(tmp_path / "a.npz"), "l14_img")
    np.savez_compressed(tmp_path / "b.npz", l14_img=np.random.default_rng(0).normal(size=(2_000, 512)))
    assert layouts._vectors(str(tmp_path / "b.npz"), "l14_img").shape == (2_000, 512)


def test_rows_that_are_no_numbers_or_missing_are_recorded(tmp_path):
    image, _ = write_source(tmp_path / "source", "npy", [4])
    image = image.astype(np.float32)
    image[1], image[2, 3] = 0, np.nan
    np.save(tmp_path / "source" / "part0.npy", image)
    assert import_layout(str(tmp_path / "source"), str(tmp_path / "a"), ImportOptions("npy"), QUIET)["counts"] == {
        "ok": 2,
        "bad_embedding": 2,
    }
    (tmp_path / "nemo").mkdir()
    lists = [[1.0, 2.0], None, [1.0], [3.0, 4.0]]
    pq.write_table(pa.table({"image_id": list("abcd"), "embedding": lists}), tmp_path / "nemo" / "x.parquet")
    manifest = import_layout(str(tmp_path / "nemo"), str(tmp_path / "b"), ImportOptions("nemo"), QUIET)
    assert manifest["counts"] == {"ok": 2, "bad_embedding": 2}
    assert [row["status"] for row in table_of(tmp_path / "b")] == ["ok", "bad_embedding", "bad_embedding", "ok"]


def test_parts_of_two_models_are_refused(tmp_path):
    write_source(tmp_path / "source", "npy", [2])
    np.save(tmp_path / "source" / "other.npy", np.ones((2, 9), np.float32))
    pq.write_table(pa.table(records(2)), tmp_path / "source" / "other.parquet")
    with pytest.raises(UsageError, match="from different models"):
        import_layout(str(tmp_path / "source"), str(tmp_path / "emb"), ImportOptions("npy"), QUIET)


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_damaged_headers_never_crash(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("damaged")
    layout = data.draw(st.sampled_from(["npy", "datacomp", "nemo"]))
    write_source(folder / "s", layout, [3])
    [part] = layouts.list_parts(str(folder / "s"), layout, "l14")
    blob = bytearray(open(part.image, "rb").read())
    for _ in range(data.draw(st.integers(1, 4))):
        blob[data.draw(st.integers(0, min(len(blob) - 1, 400)))] = data.draw(st.integers(0, 255))
    open(part.image, "wb").write(blob[: data.draw(st.integers(0, len(blob)))])
    try:
        table = layouts.open_part(part)
        assert unit_rows(table.image)[0].shape == table.image.shape
    except ShardError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("scale", [1e20, 1e-25, 1e-37])
def test_vectors_of_any_length_have_a_direction(tmp_path, scale):
    """Their squares may be no numbers of f32, but they are neither infinite nor zero."""
    plain = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    found, sound = unit_rows(plain * np.float32(scale))
    assert sound.all() and np.abs(found.astype(np.float64) - unit_rows(plain)[0]).max() < 1e-3
    mixed = np.array([[np.inf, 1, 0, 0], [np.nan, 0, 0, 0], [0, 0, 0, 0], [scale, 0, 0, 0]], np.float32)
    assert unit_rows(mixed)[1].tolist() == [False, False, False, True]
