"""Sidecars on a disk: small ones are read whole, others mapped, to the same end; and labels as codes."""

import numpy as np
import pyarrow as pa
import pytest

from curate.errors import ContractError
from curate.storage import sidecar


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
        with pytest.raises(ContractError, match=r"a\.arrow is no readable Arrow file"):
            sidecar.table(where)


def test_labels_are_read_as_places_in_any_list_of_names():
    names = ["ok", "a", "b"]
    coded = sidecar.label_codes(np.array([0, 1, -1, 2]), names)
    column = pa.chunked_array([coded, sidecar.labels(["b", "ok"], names), sidecar.labels([], names)])
    assert sidecar.codes(column, ["ok", "b"]).tolist() == [0, -1, -1, 1, 1, 0]
    assert sidecar.codes(column.slice(1, 2), ["a"]).tolist() == [0, -1]
    assert sidecar.codes(pa.chunked_array([], column.type), names).tolist() == []
