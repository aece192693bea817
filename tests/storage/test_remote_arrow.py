import counted
import numpy as np
import pyarrow as pa
import pytest

from curate.errors import ContractError
from curate.storage import paths, sidecar
from curate.storage.schema import CLUSTER_SCHEMA, EDGE_SCHEMA, LABEL, MEMBERS, SELECTION_SCHEMA, embedding_schema

ODD = pa.schema(
    [
        ("nothing", pa.null()),
        ("flag", pa.bool_()),
        ("label", LABEL),
        ("places", MEMBERS),
        ("large", pa.large_string()),
        ("lists", pa.list_(pa.list_(pa.int32()))),
        ("binary", pa.binary()),
        ("vector", pa.list_(pa.float16(), 4)),
        ("time", pa.timestamp("us")),
        ("last", pa.int8()),
    ]
)


def some(kind, rows, rng):
    """Draw a column of a kind: values, with nulls among them."""

    def value(kind):
        if pa.types.is_null(kind) or rng.random() < 0.2:
            return None
        if pa.types.is_dictionary(kind):
            return ["jpg", "txt", "ok"][rng.integers(3)]
        if pa.types.is_struct(kind):
            return {field.name: value(field.type) for field in kind}
        if pa.types.is_fixed_size_list(kind):
            return rng.normal(size=kind.list_size).astype(np.float16)
        if pa.types.is_list(kind):
            return [value(kind.value_type) for _ in range(rng.integers(4))]
        if pa.types.is_fixed_size_binary(kind):
            return rng.bytes(kind.byte_width)
        if pa.types.is_string(kind) or pa.types.is_large_string(kind):
            return "ü" * int(rng.integers(9))
        if pa.types.is_binary(kind):
            return rng.bytes(rng.integers(9))
        if pa.types.is_boolean(kind):
            return bool(rng.integers(2))
        return float(rng.normal()) if pa.types.is_floating(kind) else int(rng.integers(100))

    return pa.array([value(kind) for _ in range(rows)], kind)


def write(where, schema, rows, facts=None):
    rng = np.random.default_rng(7)
    batches = [pa.record_batch([some(kind, n, rng) for kind in schema.types], schema=schema) for n in rows]
    sidecar.write_table(where, schema, batches, facts)


@pytest.mark.parametrize("rows", [[0], [], [5], [300, 0, 7]])
@pytest.mark.parametrize("schema", [ODD, embedding_schema(6), CLUSTER_SCHEMA, EDGE_SCHEMA, SELECTION_SCHEMA])
def test_columns_of_a_remote_sidecar_are_those_of_a_local_one(tmp_path, schema, rows):
    # Dictionaries differ between batches only in tests: a file has one.
    rows = rows[:1] if any(pa.types.is_dictionary(kind) or kind == MEMBERS for kind in schema.types) else rows
    here, there = str(tmp_path / "a.arrow"), f"counted://{tmp_path.name}/a.arrow"
    for place in (here, there):
        write(place, schema, rows, {"rows": sum(rows), "words": "x" * 9000})
    assert sidecar.schema(there).equals(sidecar.schema(here), check_metadata=True)
    assert sidecar.facts(there) == sidecar.facts(here)
    assert sidecar.num_rows(there) == sum(rows)
    assert sidecar.table(there).equals(sidecar.table(here))
    for name in schema.names:
        assert sidecar.table(there, [name]).equals(sidecar.table(here, [name]))
    chosen = schema.names[::-2]
    assert sidecar.table(there, chosen).equals(sidecar.table(here, chosen))
    assert [each.num_rows for each in sidecar.batches(there, chosen)] == rows
    for index in range(len(rows)):
        pair = [sidecar.batch(place, index, chosen, schema.names) for place in (here, there)]
        assert pair[0].equals(pair[1])


def test_little_more_than_what_is_asked_for_is_read(tmp_path):
    where, rows, dim = f"counted://{tmp_path.name}/a.arrow", 3000, 64
    vectors = np.random.default_rng(0).normal(size=(rows, dim)).astype(np.float16)
    columns = {
        "key": pa.array([f"{row:09d}" for row in range(rows)]),
        "vector": sidecar.vector_column(vectors, np.arange(rows) % 5 > 0),
        "score": pa.array(np.arange(rows, dtype=np.float32)),
    }
    table = pa.table(columns)
    sidecar.write_table(where, table.schema, table.to_batches(max_chunksize=1000))

    def read(work):
        counted.reset()
        found = work()
        return found, counted.bytes_of(tmp_path.name)

    facts, spent = read(lambda: sidecar.facts(where))
    assert facts == {} and spent <= 4096
    score, spent = read(lambda: sidecar.table(where, ["score"]))
    assert score["score"].to_pylist() == list(range(rows)) and spent <= 1.2 * 4 * rows + 3000
    chosen = np.array([2999, 7, 8, 1500, 7])
    found, spent = read(lambda: sidecar.take_vectors(where, "vector", chosen))
    expected = vectors[chosen] * (chosen % 5 > 0)[:, None]
    assert (found == expected).all() and spent <= 1.2 * len(chosen) * 2 * dim + 5000
    found, spent = read(lambda: sidecar.take_vectors(where, "vector", np.arange(rows)))
    assert (found == vectors * (np.arange(rows) % 5 > 0)[:, None]).all() and spent <= 1.05 * rows * 2 * dim
    assert sidecar.take_vectors(where, "vector", np.empty(0, np.int64)).shape == (0, dim)


@pytest.mark.parametrize("data", [b"", b"words", b"ARROW1\0\0" * 2, b"x" * 6000, b"x" * 90 + b"\xff\xff\xff\x7fARROW1"])
def test_what_is_no_sidecar_is_said_in_one_line(tmp_path, data):
    where = f"counted://{tmp_path.name}/bad.arrow"
    with pytest.raises(ContractError, match="does not exist"):
        sidecar.facts(where)
    with paths.atomic_write(where) as file:
        file.write(data)
    for work in (sidecar.facts, sidecar.table, sidecar.num_rows):
        with pytest.raises(ContractError, match="not a readable Arrow file"):
            work(where)
