"""Sidecars on a disk: small ones are read whole, others mapped, to the same end; and labels as codes."""

import numpy as np
import pyarrow as pa
import pytest

from curate.errors import ContractError
from curate.storage import sidecar
from curate.storage.sidecars import Sidecars


@pytest.mark.parametrize("small_bytes", [0, 1 << 20])
def test_a_sidecar_reads_alike_whether_it_is_small_or_not(tmp_path, monkeypatch, small_bytes):
    monkeypatch.setattr(sidecar, "SMALL_BYTES", small_bytes)
    where, x = str(tmp_path / "a.arrow"), np.arange(24, dtype=np.float16).reshape(6, 4)
    schema = pa.schema([("key", pa.string()), ("vector", pa.list_(pa.float16(), 4))])
    parts = [
        pa.record_batch([pa.array(list(keys)), sidecar.vector_column(x[at], np.ones(3, bool))], schema=schema)
        for keys, at in (("abc", slice(0, 3)), ("def", slice(3, 6)))
    ]
    sidecar.write_table(where, schema, parts, {"size": 7})
    assert sidecar.table(where, ["key"])["key"].to_pylist() == list("abcdef")
    assert sidecar.batch(where, 1, ["key"], schema.names)["key"].to_pylist() == list("def")
    opened = sidecar.opened(where)
    assert sidecar.facts(opened) == {"size": 7} and sidecar.num_rows(opened) == 6
    np.testing.assert_array_equal(sidecar.take_vectors(opened, "vector", np.array([5, 0, 3])), x[[5, 0, 3]])
    for content in (b"", b"ARROW1 and no more"):
        (tmp_path / "a.arrow").write_bytes(content)
        with pytest.raises(ContractError, match=r"a\.arrow is not a readable Arrow file"):
            sidecar.table(where)


@pytest.mark.parametrize("small_bytes", [0, 1 << 20])
def test_a_sidecar_that_is_damaged_within_or_lacks_a_column_is_said_in_a_line(tmp_path, monkeypatch, small_bytes):
    monkeypatch.setattr(sidecar, "SMALL_BYTES", small_bytes)
    where, schema = str(tmp_path / "a.arrow"), pa.schema([("key", pa.string()), ("score", pa.float32())])
    batch = pa.record_batch([pa.array(list("abc")), pa.array([1, 2, 3], pa.float32())], schema=schema)
    sidecar.write_table(where, schema, [batch])
    reads = {
        "table": lambda: sidecar.table(where),
        "batches": lambda: list(sidecar.batches(where)),
        "rows": lambda: sidecar.num_rows(where),
        "vectors": lambda: sidecar.take_vectors(where, "score", np.array([0])),
    }
    for columns in (["nothing"], ["score", "nothing"]):
        for read in (sidecar.table, lambda *of: list(sidecar.batches(*of))):
            with pytest.raises(ContractError, match=r"a\.arrow is not a readable Arrow file.*nothing"):
                read(where, columns)
    data = bytearray((tmp_path / "a.arrow").read_bytes())
    place = data.index(b"\xff\xff\xff\xff", data.index(b"\xff\xff\xff\xff") + 4)  # the message of the batch
    data[place : place + 64] = b"\x13" * 64
    (tmp_path / "a.arrow").write_bytes(data)
    for read in reads.values():
        with pytest.raises(ContractError, match=r"a\.arrow is not a readable Arrow file"):
            read()


def npy_header(text):
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x93NUMPY",
        b"PK\x03\x04",
        b"\x80\x04N.",
        npy_header(b"(" * 5_000 + b"\n"),
        npy_header(b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000, 512)}\n"),
        npy_header(b"{'descr': '|O', 'fortran_order': False, 'shape': (1,)}\n"),
        npy_header(b"{'descr': '<f4', 'fortran_order': False, 'shape': (-1,)}\n"),
        npy_header(b"{\n"),
    ],
)
def test_what_is_no_npy_is_one_kind_of_error_and_never_unpickled(tmp_path, data):
    (tmp_path / "a.npy").write_bytes(data)
    with pytest.raises(ValueError, match="."):
        sidecar.load_npy(str(tmp_path / "a.npy"))


def test_an_error_that_says_nothing_is_told_by_its_kind(tmp_path, monkeypatch):
    def fail(_location):
        raise OSError

    monkeypatch.setattr(sidecar, "_read_small", fail)
    with pytest.raises(ContractError, match=r"a\.arrow is not a readable Arrow file: OSError$"):
        sidecar.opened(str(tmp_path / "a.arrow"))


def test_labels_are_read_as_places_in_any_list_of_names():
    names = ["ok", "a", "b"]
    coded = sidecar.label_codes(np.array([0, 1, -1, 2]), names)
    column = pa.chunked_array([coded, sidecar.labels(["b", "ok"], names), sidecar.labels([], names)])
    assert sidecar.codes(column, ["ok", "b"]).tolist() == [0, -1, -1, 1, 1, 0]
    assert sidecar.codes(column.slice(1, 2), ["a"]).tolist() == [0, -1]
    assert sidecar.codes(pa.chunked_array([], column.type), names).tolist() == []


def test_columns_of_tiny_sidecars_that_are_read_at_once_are_those_read_one_by_one(tmp_path, monkeypatch):
    monkeypatch.setattr("curate.storage.sidecars.BLOCK", 2)
    names, rows = ("ok", "no_image", "bad"), {"a": 2, "b": 0, "c": 3, "d": 1, "e": 1}
    for number, (stem, count) in enumerate(rows.items()):
        status = sidecar.labels([names[(number + row) % 3] for row in range(count)], names[number % 3 :] + names)
        score = pa.array([None if row else number + 0.5 for row in range(count)], pa.float32())
        batch = pa.record_batch({"status": status, "score": score, "other": pa.array(range(count), pa.int64())})
        sidecar.write_table(str(tmp_path / f"{stem}.arrow"), batch.schema, [batch], {"stem": stem})
    once, each = (Sidecars(str(tmp_path), rows, "make it anew") for _ in range(2))
    once.keep(["status", "score"])
    for columns in (["status"], ["score"], ["score", "status"], ["score", "other"]):
        found, expected = ({stem: table.to_pylist() for stem, table in of.tables(columns)} for of in (once, each))
        assert found == expected and list(found) == list(rows)
    monkeypatch.setattr(once, "rows", {**rows, "e": 2})
    once.keep(["other"])
    with pytest.raises(ContractError, match=r"e.arrow has 1 rows but the manifest says 2"):
        list(once.tables(["other"]))
