"""Vectors and numbers that nobody here made: imported columns in steps, tables out again, centroids from a file."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curate.cluster.cluster import ClusterOptions, cluster
from curate.emit.emit import EmitOptions, emit
from curate.engine import Job
from curate.errors import UsageError
from curate.ingest.options import ImportOptions
from curate.ingest.published import import_layout
from curate.select.catalogue import parse
from curate.select.select import SelectOptions, select
from curate.storage import sidecar

QUIET = Job(workers=1, quiet=True)


def imported(folder, name, rows, **table):
    (folder / f"{name}-source").mkdir()
    np.save(folder / f"{name}-source" / "00000.npy", np.random.default_rng(0).normal(size=(rows, 8)).astype(np.float32))
    if table:
        pq.write_table(pa.table(table), folder / f"{name}-source" / "00000.parquet")
    import_layout(str(folder / f"{name}-source"), str(folder / name), ImportOptions("npy", columns=tuple(table)), QUIET)
    return str(folder / name)


@pytest.mark.parametrize(
    "step, kept",
    [
        ("above(taken, 1700000001)", [0, 0, 1, 1]),
        ("at_least(taken, 1700000002)", [0, 0, 1, 1]),
        ("below(taken, 1700000002)", [1, 1, 0, 0]),
        ("top(taken, 1)", [0, 0, 0, 1]),
        ("at_most(tenth, 0.1)", [1, 0, 0, 0]),
    ],
)
def test_numbers_of_the_pool_are_compared_as_they_are_written(tmp_path, step, kept):
    emb = imported(tmp_path, "emb", 4, taken=[1700000000 + i for i in range(4)], tenth=[0.1, 0.2, 0.3, 1e40])
    select(emb, str(tmp_path / "sel"), SelectOptions(steps=(step,)), QUIET)
    assert sidecar.table(str(tmp_path / "sel" / "00000.arrow"))["kept"].to_pylist() == [bool(k) for k in kept]


def test_no_captions_vectors_are_invented(tmp_path):
    sel = str(tmp_path / "sel")
    select(imported(tmp_path, "emb", 9), sel, SelectOptions(steps=("sample(5)",)), QUIET)
    emit(sel, str(tmp_path / "out"), EmitOptions(format="clip-retrieval"), QUIET)
    assert not (tmp_path / "out" / "text_emb").exists()
    made = import_layout(str(tmp_path / "out"), str(tmp_path / "back"), ImportOptions("clip-retrieval"), QUIET)
    assert made["counts"] == {"ok": 5}
    with pytest.raises(UsageError, match="none of the 5 kept rows has a uid"):
        emit(sel, str(tmp_path / "subset"), EmitOptions(format="datacomp"), QUIET)


@pytest.mark.parametrize(
    "given",
    [
        np.zeros((0, 8), "f4"),
        np.zeros((3, 8), "f4"),
        np.full((3, 8), 1e300),
        np.full((3, 8), 1e30, "f4"),
        np.full((3, 8), np.nan),
    ],
)
def test_centroids_of_no_direction_are_refused(tmp_path, given):
    np.save(tmp_path / "given.npy", given)
    with pytest.raises(UsageError, match="given.npy (holds|has)"):
        cluster(
            imported(tmp_path, "emb", 9),
            str(tmp_path / "clu"),
            ClusterOptions(centroids=str(tmp_path / "given.npy")),
            QUIET,
        )
    assert not (tmp_path / "clu").exists()


def test_a_thousand_is_not_written_with_a_comma():
    for step in ("sample(1,000)", "sample(20,000)", "top(clip_score, 1,000)", "balance(1,000,000)"):
        with pytest.raises(UsageError, match="write 1_000 for a thousand"):
            parse([step])
    for step in ("rank(clip_score, 0, 0.000)", "sample(1_000)", 'metaclip(t=20000, entries="a,000,b")'):
        assert parse([step])


def test_numbers_without_sense_are_refused(tmp_path):
    emb = imported(tmp_path, "emb", 9)
    for step, word in [
        ("mismatch(0.3, factor=1e999)", "out of range"),
        (f"above(clip_score, {'9' * 400})", "out of range"),
        ("mismatch(0.3, factor=-1)", "expected 0 or more"),
        (f"exclude('{emb}', 95)", "a cosine below 1"),
    ]:
        with pytest.raises(UsageError, match=word):
            select(emb, str(tmp_path / "sel"), SelectOptions(steps=(step,)), QUIET)
    np.save(tmp_path / "given.npy", np.eye(3, 8, dtype=np.float32))
    with pytest.raises(UsageError, match="--k and --refit fit others"):
        cluster(emb, str(tmp_path / "clu"), ClusterOptions(k=3, centroids=str(tmp_path / "given.npy")), QUIET)


def test_of_a_picture_with_one_known_side_the_shorter_is_unknown(tmp_path):
    sizes = {"width": [1000, 1000, 300, None], "height": [800, None, None, 900]}
    emb = imported(tmp_path, "emb", 4, key=list("abcd"), **sizes)
    for step, kept in (("at_least(min_side, 100)", [1, 0, 0, 0]), ("at_most(aspect_ratio, 3)", [1, 0, 0, 0])):
        select(emb, str(tmp_path / "sel"), SelectOptions(steps=(step,)), Job(workers=1, quiet=True, overwrite=True))
        assert sidecar.table(str(tmp_path / "sel" / "00000.arrow"))["kept"].to_pylist() == [bool(k) for k in kept]
