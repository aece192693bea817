"""Clustering directories: the files, their agreement with the vectors, resuming, and refusals."""

import json
import multiprocessing
import os
import signal
import time

import numpy as np
import pyarrow as pa
import pytest
from clouds import draw, unit

from curate.cluster import edges as bucket_edges
from curate.cluster.cluster import ClusterOptions, cluster
from curate.cluster.scatter import Rows
from curate.engine import Job
from curate.errors import ContractError, ShardError, UsageError
from curate.storage import paths, sidecar
from curate.storage.manifest import open_output
from curate.storage.schema import embedding_schema
from curate.vectors import forest, near_pairs
from curate.vectors.duplicate_forest import near_duplicate_forest
from house import fingerprint, manifest

QUIET = Job(workers=1, quiet=True)


@pytest.fixture(scope="module")
def cloud(tmp_path_factory):
    return draw(tmp_path_factory.mktemp("cloud") / "emb")


def columns(directory, stems):
    tables = [sidecar.table(f"{directory}/{stem}.arrow") for stem in stems]
    whole = pa.concat_tables(tables)
    return whole["cluster"].to_numpy(), whole["centroid_similarity"].to_numpy(zero_copy_only=False)


STEMS = [f"{i:05d}" for i in range(3)]


def test_every_good_row_lies_at_its_nearest_centroid(cloud, tmp_path):
    manifest = cluster(cloud.path, str(tmp_path / "clu"), ClusterOptions(), QUIET)
    centroids = np.load(tmp_path / "clu" / "centroids.npy")
    found, similarity = columns(tmp_path / "clu", STEMS)
    products = cloud.image.astype(np.float64) @ centroids.T.astype(np.float64)
    assert manifest["options"]["k"] == len(centroids) == int(cloud.ok.sum()) // 100
    assert (found[~cloud.ok] == -1).all() and np.isnan(similarity[~cloud.ok]).all()
    assert np.allclose(similarity[cloud.ok], products.max(axis=1)[cloud.ok], atol=1e-6)
    assert np.allclose(products[np.arange(len(found)), found][cloud.ok], products.max(axis=1)[cloud.ok], atol=1e-6)
    assert manifest["counts"] == {"clustered": int(cloud.ok.sum()), "bad": int((~cloud.ok).sum())}
    assert manifest["fit"]["fitted_rows"] == manifest["options"]["sample"] == cloud.ok.sum()
    assert not (tmp_path / "clu" / ".buckets").exists()


def test_the_edges_are_each_clusters_forest(cloud, tmp_path, monkeypatch):
    monkeypatch.setattr("curate.cluster.edges.BUCKET_BYTES", 9_000)  # many buckets
    cluster(cloud.path, str(tmp_path / "clu"), ClusterOptions(k=5, floor=0.7), QUIET)
    found, _ = columns(tmp_path / "clu", STEMS)
    edges = sidecar.table(str(tmp_path / "clu" / "edges.arrow"))
    seen = 0
    for number in range(5):
        rows = np.flatnonzero(found == number)
        here = edges.filter(pa.compute.equal(edges["cluster"], number))
        a, b, similarity = near_duplicate_forest(cloud.image, rows, [0, len(rows)], 0.7)
        assert here["a"].to_pylist() == rows[a].tolist() and here["b"].to_pylist() == rows[b].tolist()
        assert here["similarity"].to_numpy().tobytes() == similarity.tobytes()
        bits = near_pairs.differing_bits(cloud.phash[rows[a]], cloud.phash[rows[b]])
        assert here["phash_bits"].to_pylist() == bits.tolist()
        seen += len(here)
    assert seen == len(edges)


@pytest.mark.parametrize("seed", [0, 1])
def test_two_neighbours_compare_the_rows_of_both_nearest_clusters(tmp_path, monkeypatch, seed):
    monkeypatch.setattr("curate.cluster.edges.BUCKET_BYTES", 9_000)
    drawn = draw(tmp_path / "emb", rows=400, seed=seed, spread=0.9)
    out = {}
    for neighbours in (1, 2):
        out[neighbours] = tmp_path / f"clu{neighbours}"
        cluster(drawn.path, str(out[neighbours]), ClusterOptions(k=9, floor=0.6, neighbours=neighbours), QUIET)
    one, two = (columns(out[n], STEMS)[0] for n in (1, 2))
    assert (one == two).all()
    centroids = np.load(out[2] / "centroids.npy").astype(np.float64)
    home, other = np.argsort(-(drawn.image @ centroids.T), axis=1, kind="stable")[:, :2].T
    cosine = drawn.image.astype(np.float64) @ drawn.image.astype(np.float64).T
    met = (home[:, None] == home) | (home[:, None] == other) | (other[:, None] == home)
    good = np.outer(drawn.ok, drawn.ok) & np.triu(np.ones((400, 400), bool), 1)
    true = good & (cosine > 0.6)
    edges = sidecar.table(str(out[2] / "edges.arrow"))
    a, b, similarity = (edges[name].to_numpy() for name in ("a", "b", "similarity"))
    assert (np.diff(a) >= 0).all() and (a < b).all() and met[a, b].all() and true[a, b].all()
    assert np.abs(cosine[a, b] - similarity).max() < 1e-6
    for threshold in (0.6, 0.75, 0.9):  # the components are those of the whole graph of compared pairs
        i, j = np.nonzero(true & met & (cosine > threshold))
        above = similarity > threshold
        expected, found = forest.components(i, j, 400), forest.components(a[above], b[above], 400)
        assert (expected == found).all()
    recalls = {n: {level["above"]: level for level in manifest(out[n])["recall"]["levels"]} for n in (1, 2)}
    for level in (0.6, 0.85, 0.95):
        wanted = true & (cosine > level)
        assert recalls[1][level]["pairs"] == recalls[2][level]["pairs"] == wanted.sum()
        assert recalls[1][level]["found"] == round((wanted & (home[:, None] == home)).sum() / wanted.sum(), 4)
        assert recalls[2][level]["found"] == round((wanted & met).sum() / wanted.sum(), 4)
    assert recalls[2][0.6]["found"] > recalls[1][0.6]["found"]


@pytest.mark.parametrize("neighbours", [1, 2])
def test_workers_change_no_byte(cloud, tmp_path, neighbours):
    prints = []
    for workers in (1, 2):
        out = tmp_path / str(workers) / "clu"
        cluster(cloud.path, str(out), ClusterOptions(k=6, neighbours=neighbours), Job(workers=workers, quiet=True))
        prints.append(fingerprint(out))
    assert prints[0] == prints[1] and len(prints[0]) == 7


def _cluster(emb, out):
    cluster(emb, out, ClusterOptions(k=9), Job(workers=1, quiet=True))


def test_killed_at_any_moment_a_rerun_ends_with_the_same_bytes(cloud, tmp_path):
    _cluster(cloud.path, str(tmp_path / "whole"))
    expected = {name.split("/", 1)[1]: value for name, value in fingerprint(tmp_path / "whole").items()}
    marks = ["centroids.npy", "00001.arrow", ".buckets/edges-0.arrow"]
    for mark in marks:
        out = tmp_path / "cut"
        child = multiprocessing.get_context("spawn").Process(target=_cluster, args=(cloud.path, str(out)))
        child.start()
        while child.is_alive() and not (out / mark).exists():
            time.sleep(0.001)
        if child.is_alive():
            os.kill(child.pid, signal.SIGKILL)
        child.join()
        _cluster(cloud.path, str(out))
        assert {name.split("/", 1)[1]: value for name, value in fingerprint(out).items()} == expected, mark
        paths.remove(str(out))


def test_slices_share_the_work_and_the_last_one_finishes(cloud, tmp_path):
    out = str(tmp_path / "clu")
    for turn in range(2):
        for rank in range(2):
            made = cluster(cloud.path, out, ClusterOptions(k=4), Job(workers=1, quiet=True, part=(rank, 2)))
        assert ("fit" in made) or turn == 0
    cluster(cloud.path, str(tmp_path / "whole"), ClusterOptions(k=4), QUIET)
    parts, whole = (
        {name.split("/", 1)[1]: value for name, value in fingerprint(place).items()}
        for place in (tmp_path / "clu", tmp_path / "whole")
    )
    assert parts == whole


def test_given_centroids_are_assigned_to_and_known_by_their_content(cloud, tmp_path):
    given = 3 * unit(np.random.default_rng(0).normal(size=(7, 32)))
    np.save(tmp_path / "given.npy", given)
    options = ClusterOptions(centroids=str(tmp_path / "given.npy"))
    manifest = cluster(cloud.path, str(tmp_path / "clu"), options, QUIET)
    found, _ = columns(tmp_path / "clu", STEMS)
    assert (found[cloud.ok] == (cloud.image @ unit(given).T).argmax(axis=1)[cloud.ok]).mean() > 0.999
    assert manifest["options"]["k"] == 7 and "fitted_rows" not in manifest["fit"]
    np.save(tmp_path / "given.npy", given[::-1])
    with pytest.raises(ContractError, match="another state"):
        cluster(cloud.path, str(tmp_path / "clu"), options, QUIET)


@pytest.mark.parametrize(
    "options, words",
    [
        (ClusterOptions(k=10_000), "k=10,000 clusters"),
        (ClusterOptions(k=-1), "clusters were asked for"),
        (ClusterOptions(k=50, sample=20), "sample of 20 rows cannot fit k=50"),
        (ClusterOptions(floor=1.0), "not a cosine"),
        (ClusterOptions(iters=0), "iters=0"),
        (ClusterOptions(centroids="nowhere.npy"), "nowhere.npy"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(cloud, tmp_path, options, words):
    with pytest.raises(UsageError, match=words):
        cluster(cloud.path, str(tmp_path / "clu"), options, QUIET)
    assert not (tmp_path / "clu").exists()


def test_centroids_that_are_pickled_or_of_another_shape_are_refused(cloud, tmp_path):
    np.save(tmp_path / "wide.npy", np.ones((3, 5), np.float32))
    np.save(tmp_path / "object.npy", np.array([{}, []], object), allow_pickle=True)
    for name in ("wide.npy", "object.npy"):
        with pytest.raises(UsageError, match=name):
            cluster(cloud.path, str(tmp_path / "clu"), ClusterOptions(centroids=str(tmp_path / name)), QUIET)


def test_a_shard_called_like_the_edges_is_refused(tmp_path):
    schema = embedding_schema(4)
    output = open_output(str(tmp_path / "emb"), "embed", {}, {})
    sidecar.write_table(output.path("edges.arrow"), schema, [])
    output.finish(shards={"edges": {"rows": 0}}, counts={})
    with pytest.raises(UsageError, match="a shard called edges.arrow"):
        cluster(output.directory, str(tmp_path / "clu"), ClusterOptions(), QUIET)


def test_a_broken_sidecar_is_named_and_a_rerun_resumes(tmp_path):
    small = draw(tmp_path / "emb", rows=300, dim=16)
    path = tmp_path / "emb" / "00002.arrow"
    whole = path.read_bytes()
    out = str(tmp_path / "clu")
    cut = sidecar.table(str(path)).slice(0, 10)
    sidecar.write_table(str(path), cut.schema, cut.to_batches())
    with pytest.raises((ContractError, ShardError), match="00002"):
        cluster(small.path, out, ClusterOptions(), QUIET)
    path.write_bytes(whole)
    assert cluster(small.path, out, ClusterOptions(), QUIET)["counts"]["clustered"] == small.ok.sum()


def test_images_without_captions_vectors_cluster_all_the_same(tmp_path):
    small = draw(tmp_path / "emb", rows=200, dim=16, stems=1)
    path = str(tmp_path / "emb" / "00000.arrow")
    table = sidecar.table(path)
    none = sidecar.vector_column(np.zeros((200, 16), np.float16), np.zeros(200, bool))
    table = table.set_column(table.schema.get_field_index("text_embedding"), table.schema.field("text_embedding"), none)
    sidecar.write_table(path, table.schema, table.combine_chunks().to_batches())
    manifest = cluster(small.path, str(tmp_path / "clu"), ClusterOptions(), QUIET)
    assert manifest["fit"]["shuffled_clip_score"] is None
    assert json.loads((tmp_path / "clu" / "fit.json").read_text()) == manifest["fit"]


def test_how_far_a_bucket_is_shows_and_changes_no_edge(monkeypatch):
    rng = np.random.default_rng(0)
    cluster = np.sort(rng.integers(0, 12, 300)).astype(np.int32)
    vectors = unit(rng.normal(size=(12, 8))[cluster] + 0.3 * rng.normal(size=(300, 8))).astype(np.float16)
    nothing = np.zeros(300, np.uint64)
    rows = Rows(np.arange(300), cluster, np.zeros(300, bool), nothing, nothing > 0, nothing)
    whole = bucket_edges.FindEdges("", "", 0.8)._compare(rows, vectors, np.arange(300))
    told = []
    monkeypatch.setattr(bucket_edges, "RUN_ROWS", 60)
    monkeypatch.setattr(bucket_edges, "advance", told.append)
    assert bucket_edges.FindEdges("", "", 0.8)._compare(rows, vectors, np.arange(300)).equals(whole)
    assert whole.num_rows and sum(told) == 300 and len(told) > 4
