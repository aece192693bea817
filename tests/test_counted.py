"""What each verb reads of a pool on a URL, counted."""

import json
from functools import partial

import counted
import numpy as np
import pytest
from artefacts import tree, write_embeddings, write_selection

from curate.cluster.cluster import ClusterOptions, cluster
from curate.emit.emit import EmitOptions, emit
from curate.engine import Job
from curate.report.options import ReportOptions
from curate.report.report import report
from curate.report.show import show
from curate.report.show_sample import show_key
from curate.select.select import SelectOptions, select
from curate.storage import sidecar
from curate.storage.remote_arrow import VECTOR_WASTE
from curate.storage.tar import TarWriter

QUIET = Job(workers=1, quiet=True)
STEMS, ROWS, DIM = ("00000", "00001", "00002"), 800, 32
READ = ("key", "phash", "status", "clip_score", "caption")  # by the default steps of `road`


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A pool of made-up bytes on disk and on the URL, with its embeddings and clusters there."""
    here, url = tmp_path_factory.mktemp("pool"), f"counted://{tmp_path_factory.getbasetemp().name}"
    rng = np.random.default_rng(0)
    for stem in STEMS:
        with open(here / f"{stem}.tar", "wb") as file, TarWriter(file) as tar:
            for row in range(ROWS):
                key = f"{stem}{row:05d}"
                tar.add(f"{key}.jpg", rng.bytes(int(rng.integers(6000, 12000))))
                tar.add(f"{key}.txt", f"a caption of the row {row}, which says nothing more".encode())
                tar.add(f"{key}.json", json.dumps({"key": key}).encode())
    counted.upload(f"{here}/", f"{url}/pool/")
    write_embeddings(f"{url}/emb", f"{url}/pool", DIM)
    counted.reset()
    cluster(f"{url}/emb", f"{url}/clu", ClusterOptions(k=8, floor=0.5), QUIET)
    return here, url, dict(counted.Counted.read)


def column_bytes(directory, names):
    """Add up what columns take in the sidecars of a directory."""
    return sum(sidecar.table(f"{directory}/{stem}.arrow", [name]).nbytes for stem in STEMS for name in names)


def test_cluster_reads_each_embedding_at_most_three_times(home):
    _, url, read = home
    vectors = column_bytes(f"{url}/emb", ["image_embedding", "text_embedding"])
    around = column_bytes(f"{url}/emb", ["status", "phash", "status", "status"])
    spent = sum(size for path, size in read.items() if "/emb/" in path)
    scattered = sum(size for path, size in read.items() if "/.buckets/part-" in path)
    assert spent <= 2 * vectors + 1.2 * around
    # In all: images for the fit and the sample, to assign, and as they were scattered.
    assert spent + scattered <= 3 * vectors


def test_select_reads_the_columns_that_it_needs_once(home):
    _, url, _ = home
    steps = ('dedup("auto")', "rank(clip_score, 0.05, 0.95)", "balance(cluster, 300)")
    needed = column_bytes(f"{url}/emb", READ) + column_bytes(f"{url}/clu", ["cluster", "centroid_similarity"])
    needed += counted.size_of(url, "edges.arrow")
    counted.reset()
    select(f"{url}/clu", f"{url}/sel", SelectOptions(steps=steps), QUIET)
    assert needed / 2 < counted.bytes_of(".arrow") <= 1.2 * needed


def test_select_reads_of_embeddings_the_rows_that_it_needs(home):
    _, url, _ = home
    rows, others = 300 * DIM * 2, column_bytes(f"{url}/emb", ["key", "status", "clip_score"])
    counted.reset()
    select(f"{url}/emb", f"{url}/few", SelectOptions(steps=("sample(300)", "at_most(redundancy, 0.9)")), QUIET)
    passes = 3 * (1 + VECTOR_WASTE)
    assert counted.bytes_of("/emb/", ".arrow") <= 1.2 * (others + passes * rows)


def test_show_reads_no_column_that_it_does_not_show(home):
    _, url, _ = home
    emb, clu = f"{url}/emb", f"{url}/clu"
    counted.reset()
    assert list(show(clu)) and counted.bytes_of(".arrow") == 0
    searched = column_bytes(emb, ["key"])
    told = [name for name in sidecar.schema(f"{emb}/00001.arrow").names if not name.endswith("_embedding")]
    row = sidecar.table(f"{emb}/00001.arrow", told).nbytes + sidecar.table(f"{clu}/00001.arrow").nbytes
    counted.reset()
    lines = list(show_key(clu, "0000100007"))
    assert any("row 7 of 00001" in line for line in lines)
    assert counted.bytes_of(".arrow") <= 1.2 * (searched + row)


def test_a_report_reads_of_the_pool_the_samples_that_it_shows(home, tmp_path):
    _, url, _ = home
    select(f"{url}/clu", f"{url}/shown", SelectOptions(steps=("sample(900)",)), QUIET)
    counted.reset()
    report(f"{url}/shown", str(tmp_path / "page.html"), ReportOptions(), QUIET)
    assert 0 < counted.bytes_of("/pool/") < counted.size_of(url, "/pool/") / 4


@pytest.mark.parametrize("share", [10, 3, 1])
def test_emit_reads_what_it_keeps(home, tmp_path, share):
    here, url, _ = home
    keep = np.random.default_rng(share).random((len(STEMS), ROWS)) < 1 / share
    kept = partial(lambda keep, stem, row, key: bool(keep[STEMS.index(stem), row]) or "sample(9)", keep)
    sel = write_selection(f"{url}/sel{share}", f"{url}/emb", kept)
    counted.reset()
    emit(sel, f"{url}/out{share}", EmitOptions(shard_size=500), QUIET)
    written = counted.size_of(url, f"/out{share}/", ".tar")
    pool, beside = counted.bytes_of("/pool/"), counted.bytes_of(".arrow")
    assert written / 2 < pool <= (1.04 if share > 2 else 1.02) * written
    assert pool + beside <= 1.1 * written
    # The very bytes that a look through the tars on disk leaves.
    emb = write_embeddings(tmp_path / "emb", str(here))
    for stem in STEMS:
        where = f"{emb}/{stem}.arrow"
        table = sidecar.table(where).drop_columns(["members"]).combine_chunks()
        sidecar.write_table(where, table.schema, table.to_batches(), sidecar.facts(where))
    write_selection(tmp_path / "sel", emb, kept)
    emit(str(tmp_path / "sel"), str(tmp_path / "out"), EmitOptions(shard_size=500), QUIET)
    local = {name: data for name, data in tree(tmp_path / "out").items() if not name.endswith(".json")}
    store, folder = counted.Counted.store, f"{url}/out{share}/"
    there = {path.removeprefix(folder): store[path].getvalue() for path in store if path.startswith(folder)}
    assert {name: data for name, data in there.items() if not name.endswith(".json")} == local
