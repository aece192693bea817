"""Products on a device: equal to those of the processor, on the processor itself and, where there is one, on a GPU."""

import numpy as np
import pytest
from clouds import draw, unit
from hypothesis import given, settings
from hypothesis import strategies as st
from test_near_pairs import cluster_rows, slow_forest

from curate.cluster.cluster import ClusterOptions, cluster
from curate.engine import Job
from curate.storage import sidecar
from curate.vectors import kmeans, on_device
from curate.vectors.duplicate_forest import near_duplicate_forest
from curate.vectors.forest import Forest
from curate.vectors.near_pairs import near_pairs
from house import GPU

DEVICES = ["cpu", pytest.param(GPU, marks=pytest.mark.gpu)]


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("neighbours", [1, 2])
def test_the_nearest_centroids_are_those_of_the_processor(on, neighbours, monkeypatch):
    monkeypatch.setattr(on_device, "TILE_CENTROIDS", 7)
    monkeypatch.setattr(on_device, "BLOCK_ROWS", 50)
    x, centroids = cluster_rows(333, dim=24), unit(np.random.default_rng(1).normal(size=(23, 24)))
    numbers, cosine = kmeans.finder(centroids, neighbours, on)(x)
    expected, similarity = kmeans.finder(centroids, neighbours)(x)
    assert np.allclose(cosine, similarity, rtol=0, atol=4e-6) and cosine.dtype == np.float32
    assert numbers.dtype == np.int32 and numbers.shape == expected.shape
    assert (numbers != expected).mean() < 0.01


@pytest.mark.parametrize("on", DEVICES)
def test_equally_near_centroids_are_taken_by_number_and_no_rows_give_none(on):
    one = unit(np.ones((1, 8)))
    x = unit(np.random.default_rng(0).normal(size=(9, 8))).astype(np.float16)
    assert (kmeans.finder(np.repeat(one, 4, axis=0), 2, on)(x)[0] == [[0], [1]]).all()
    assert kmeans.finder(one, 1, on)(x[:0])[0].shape == (0,)


def compared(on, x, bounds, floor, members, across, forest=None, **how):
    arrays = [np.asarray(each) for each in (np.arange(len(x)), bounds, members)]
    found = on_device.near_pairs_on(on, x, *arrays[:2], floor, arrays[2], across=across, forest=forest, **how)
    return sorted((a, b, c) for edges in found for a, b, c in zip(*map(np.ndarray.tolist, edges), strict=True))


@pytest.mark.parametrize("on", DEVICES)
@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=12), st.integers(0, 9), st.booleans(), st.data())
def test_pairs_are_those_of_the_processor_whatever_the_tiles(on, sizes, seed, across, data):
    x = cluster_rows(sum(sizes), seed=seed, spread=data.draw(st.sampled_from([0.05, 0.5])))
    bounds = np.append(0, np.cumsum(sizes))
    members = [data.draw(st.integers(0, size)) for size in sizes]
    tile, panel = data.draw(st.sampled_from([(4, 8), (8, 24), (64, 512)]))
    expected = near_pairs(x, np.arange(len(x)), bounds, 0.6, members=np.array(members), across=across, product="f32")
    expected = sorted((a, b, c) for edges in expected for a, b, c in zip(*map(np.ndarray.tolist, edges), strict=True))
    assert compared(on, x, bounds, 0.6, members, across, tile=tile, panel=panel) == expected


@pytest.mark.parametrize("on", DEVICES)
@settings(deadline=None, max_examples=15)
@given(st.integers(2, 60), st.integers(0, 50), st.sampled_from([0.3, 0.6, 0.9]))
def test_a_forest_grown_on_a_device_is_kruskals(on, n, seed, floor):
    x = cluster_rows(n, seed=seed)
    grown = Forest(n, floor, merge_at=16)
    arrays = np.arange(n), np.array([0, n]), floor, np.array([n])
    for edges in on_device.near_pairs_on(on, x, *arrays, forest=grown, tile=8, panel=24):
        grown.add(*edges)
    assert list(zip(*map(np.ndarray.tolist, grown.edges()), strict=True)) == slow_forest(x, floor)


@pytest.mark.parametrize("on", DEVICES)
def test_the_forest_of_clusters_is_the_same_bytes_on_a_device(on, monkeypatch):
    x = cluster_rows(5000, dim=24, spread=0.3)
    x[100:140] = x[100]
    bounds, members = np.array([0, 3, 3, 60, 400, 3600, 5000]), np.array([3, 0, 50, 340, 3000, 1400])
    expected = near_duplicate_forest(x, np.arange(5000), bounds, 0.7, members=members, product="f32")
    monkeypatch.setattr(on_device, "device", lambda: on)
    found = near_duplicate_forest(x, np.arange(5000), bounds, 0.7, members=members, product="gpu")
    assert all(left.tobytes() == right.tobytes() for left, right in zip(found, expected, strict=True))


@pytest.mark.parametrize("on", [["cpu"], ["cpu"] * 3, pytest.param([GPU], marks=pytest.mark.gpu)])
def test_a_fit_on_devices_repeats_itself_and_is_as_good_as_another(on, monkeypatch):
    monkeypatch.setattr(on_device, "device", lambda: on[0])
    monkeypatch.setattr(on_device, "devices", lambda: on)
    monkeypatch.setattr(on_device, "BLOCK_ROWS", 300)
    x = cluster_rows(2000, dim=16)
    found, again = (kmeans.fit(x, 60, 12, 0, backend="torch-gpu") for _ in range(2))
    assert found.centroids.tobytes() == again.centroids.tobytes() and found.empty == 0
    assert found.mean_similarity > kmeans.fit(x, 60, 12, 0, backend="kmeans").mean_similarity - 0.005
    monkeypatch.setattr(on_device, "_fits", lambda *_: False)  # rows that are streamed anew each time
    assert kmeans.fit(x, 60, 12, 0, backend="torch-gpu").centroids.tobytes() == found.centroids.tobytes()


@pytest.mark.parametrize("on", DEVICES)
@given(st.lists(st.integers(0, 9), max_size=40))
def test_rows_are_summed_by_segment_without_the_call_that_torch_does_not_document(on, sizes):
    import torch

    of = torch.tensor(np.repeat(np.arange(len(sizes)), sizes), dtype=torch.int64, device=on)
    rows = torch.randn(len(of), 3, generator=torch.Generator().manual_seed(0)).to(on)
    sums = on_device._sums_of_segments(rows, of, len(sizes))
    expected = [rows[of == segment].double().sum(0) for segment in range(len(sizes))]
    assert sums.shape == (len(sizes), 3)
    assert all(torch.allclose(a.double(), b, atol=1e-5) for a, b in zip(sums, expected, strict=True))


def test_a_fit_leaves_no_memory_of_the_gpu_with_its_process(monkeypatch):
    import torch

    monkeypatch.setattr(on_device, "device", lambda: "cpu")
    monkeypatch.setattr(on_device, "devices", lambda: ["cpu"])
    given_back = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: given_back.append(True))
    kmeans.fit(cluster_rows(60, dim=8), 5, 2, 0, backend="torch-gpu")
    kmeans.fit(cluster_rows(60, dim=8), 5, 2, 0, backend="kmeans")
    assert given_back == [True]


def test_without_torchs_private_calls_fits_and_products_go_on(monkeypatch):
    import torch

    from curate.vectors import products

    monkeypatch.setattr(on_device, "device", lambda: "cpu")
    monkeypatch.setattr(on_device, "devices", lambda: ["cpu"])
    found, x = [], cluster_rows(600, dim=16)
    for lacking in (("_int_mm", "segment_reduce"), ()):
        for answer in (products.is_right, products.fastest_product, on_device._sums_segments):
            answer.cache_clear()
        with monkeypatch.context() as patch:
            for name in lacking:
                patch.delattr(torch, name)
            assert on_device._sums_segments("cpu") != bool(lacking)
            assert not lacking or (products.fastest_product(16) != "int8" and not products.is_right("int8", 16))
            fits = [kmeans.fit(x, 20, 8, 0, backend="torch-gpu") for _ in range(2)]
        assert fits[0].centroids.tobytes() == fits[1].centroids.tobytes()
        found.append(fits[0].mean_similarity)
    assert found[0] == pytest.approx(found[1], abs=0.01)


@pytest.mark.parametrize("on", DEVICES)
def test_a_pool_clustered_on_a_device_has_the_same_edges_and_says_where(on, tmp_path, monkeypatch):
    cloud = draw(tmp_path / "emb")
    np.save(tmp_path / "centroids.npy", unit(np.random.default_rng(0).normal(size=(5, cloud.image.shape[1]))))
    options = ClusterOptions(centroids=str(tmp_path / "centroids.npy"), floor=0.7)
    plain = cluster(cloud.path, str(tmp_path / "plain"), options, Job(workers=1, quiet=True))
    monkeypatch.setattr(on_device, "device", lambda: on)
    monkeypatch.setattr("curate.cluster.cluster.is_worth_rounding", lambda *_: True)
    monkeypatch.setattr("curate.cluster.edges.is_worth_rounding", lambda *_: True)
    made = cluster(cloud.path, str(tmp_path / "gpu"), options, Job(workers=1, gpus=1, quiet=True))
    assert made["fit"]["screen"] == "gpu" and plain["assigned_on"] == {"cpu": 3}
    assert made["assigned_on"] == {on_device.describe(on): 3}
    tables = [sidecar.table(str(tmp_path / name / "edges.arrow")) for name in ("plain", "gpu")]
    assert tables[0].num_rows and tables[0].equals(tables[1])
