"""Fitting and assigning against slow references."""

import sys

import numpy as np
import pytest
from clouds import unit
from hypothesis import given, settings
from hypothesis import strategies as st

from curate.vectors import exact, kmeans
from curate.vectors.products import is_right


def rows_of(n, dim, seed=0):
    return unit(np.random.default_rng(seed).normal(size=(n, dim))).astype(np.float32)


def slow_assign(x, centroids):
    products = x.astype(np.float64) @ centroids.astype(np.float64).T
    return np.array([int(np.flatnonzero(row == row.max())[0]) for row in products]), products.max(axis=1)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 70), st.integers(1, 9), st.integers(1, 40), st.integers(0, 99))
def test_every_row_gets_its_nearest_centroid(n, k, dim, seed):
    x, centroids = rows_of(n, dim, seed).astype(np.float16), rows_of(k, dim, seed + 100)
    cluster, similarity = kmeans.assign(x, centroids)
    best, cosine = slow_assign(x, centroids)
    assert cluster.dtype == np.int32 and similarity.dtype == np.float32
    assert np.allclose(similarity, cosine, atol=1e-6)
    tied = np.sort(x.astype(np.float64) @ centroids.T.astype(np.float64), axis=1)
    clear = np.ones(n, bool) if k == 1 else tied[:, -1] - tied[:, -2] > 1e-5
    assert (cluster == best)[clear].all()


def test_equal_centroids_tie_to_the_lowest_number():
    x, one = rows_of(50, 16), rows_of(1, 16, 1)
    assert (kmeans.assign(x, np.repeat(one, 4, axis=0))[0] == 0).all()


def test_the_block_size_changes_no_choice(monkeypatch):
    x, centroids = rows_of(500, 48).astype(np.float16), rows_of(20, 48, 1)
    whole = kmeans.assign(x, centroids)
    monkeypatch.setattr(kmeans, "BLOCK_ELEMENTS", 20 * 37)
    cluster, similarity = kmeans.assign(x, centroids)
    assert (cluster == whole[0]).all()
    assert np.allclose(similarity, whole[1], rtol=1e-5, atol=1e-6)  # libraries sum the last rows of a block otherwise


@pytest.mark.parametrize("tile", [1, 7, 20, 64])
def test_tiles_of_centroids_change_no_choice(monkeypatch, tile):
    x, centroids = rows_of(300, 48).astype(np.float16), rows_of(50, 48, 1)
    centroids[[9, 30, 31]] = centroids[2]
    monkeypatch.setattr(kmeans, "TILE_CENTROIDS", tile)
    products = x.astype(np.float64) @ centroids.T.astype(np.float64)
    order = np.argsort(-np.round(products, 5), axis=1, kind="stable")
    pair, similarity = kmeans.nearest_two(x, centroids)
    assert (kmeans.assign(x, centroids)[0] == pair[0]).all()
    like = np.arange(50)
    like[[9, 30, 31]] = 2  # a library may sum columns at a tile's edge otherwise: equal centroids then tie but nearly
    assert (like[pair] == like[order[:, :2].T]).mean() > 0.99 and (pair[0] != pair[1]).all()
    assert np.allclose(similarity, products.max(axis=1), rtol=1e-5)
    assert (like[pair[1][like[pair[0]] == 2]] == 2).all()


def test_assigning_follows_a_permutation_of_the_rows():
    x, centroids = rows_of(300, 32), rows_of(11, 32, 1)
    order = np.random.default_rng(0).permutation(300)
    assert (kmeans.assign(x[order], centroids)[0] == kmeans.assign(x, centroids)[0][order]).all()


@pytest.mark.parametrize("loaded", [False, True])
def test_widening_is_exact_for_every_finite_half(monkeypatch, loaded):
    import torch

    monkeypatch.setitem(sys.modules, "torch", torch)
    if not loaded:
        monkeypatch.delitem(sys.modules, "torch")
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    halves = halves[np.isfinite(halves)].reshape(-1, 1)
    expected = halves.astype(np.float32)
    assert exact.widen(halves).tobytes() == expected.tobytes()
    assert exact.widen(halves[::-1]).tobytes() == expected[::-1].tobytes()
    halves.flags.writeable = False
    into = np.empty(halves.shape, np.float32)
    assert exact.widen(halves, into) is into and into.tobytes() == expected.tobytes()


@pytest.mark.parametrize("backend", ["bytes", "bf16", "superkmeans", "kmeans"])
def test_a_fit_finds_planted_clusters_and_repeats_itself(backend):
    rng = np.random.default_rng(3)
    planted = rows_of(6, 32, 4)
    x = unit(planted[rng.integers(0, 6, 600)] + 0.02 * rng.normal(size=(600, 32))).astype(np.float32)
    fit = kmeans.fit(x, 40, 10, 7, backend=backend)
    assert fit.centroids.shape == (40, 32) and np.allclose(np.linalg.norm(fit.centroids, axis=1), 1, atol=1e-5)
    assert fit.mean_similarity > 0.99 and fit.empty == 0
    assert kmeans.fit(x, 40, 10, 7, backend=backend).centroids.tobytes() == fit.centroids.tobytes()


def test_fewer_distinct_rows_than_clusters_leave_empty_ones_and_say_so():
    x = np.repeat(rows_of(3, 40), 30, axis=0)
    fit = kmeans.fit(x, 8, 5, 0, backend="superkmeans")
    assert fit.empty == 5 and fit.mean_similarity > 1 - 1e-5


@pytest.mark.parametrize(
    "dim, k, fastest, backend",
    [
        *((2, 5_000, "f32", "kmeans"), (31, 1_000, "f32", "kmeans"), (512, 999, "f32", "kmeans")),
        *((32, 1_000, "f32", "superkmeans"), (32, 256, "int8", "bytes"), (32, 255, "int8", "kmeans")),
        (32, 256, "bf16", "bf16"),
    ],
)
def test_each_backend_is_used_where_it_pays(monkeypatch, dim, k, fastest, backend):
    monkeypatch.setattr(kmeans, "fastest_product", lambda *given, **options: fastest)
    assert kmeans.choose_backend(dim, k, gpu=False) == backend


def mixture(n=6_000, dim=48, clouds=80):
    rng = np.random.default_rng(8)
    spectrum = np.arange(1, dim + 1) ** -0.5
    centers = rng.normal(size=(clouds, dim)) * spectrum
    return unit(centers[rng.integers(0, clouds, n)] + 0.5 * rng.normal(size=(n, dim)) * spectrum).astype(np.float32)


@pytest.mark.parametrize("product", ["bf16", "int8"])
def test_torchs_fit_is_as_good_as_faiss(product):
    if not is_right(product, 48):
        pytest.skip(f"this processor computes no right {product}")
    x = mixture()
    found = [kmeans._lloyd(x, 60, 12, seed, product=product) for seed in (0, 1, 2)]
    again = kmeans._lloyd(x, 60, 12, 0, product=product)
    assert found[0].tobytes() == again.tobytes() and np.allclose(np.linalg.norm(found[0], axis=1), 1, atol=1e-5)
    mine = [kmeans.assign(x, centroids)[1].mean() for centroids in found]
    faiss = [kmeans.fit(x, 60, 12, seed, backend="kmeans").mean_similarity for seed in (0, 1, 2)]
    assert np.mean(mine) > np.mean(faiss) - 0.003


def test_one_cluster_is_the_mean_direction():
    x = rows_of(100, 33)
    assert np.allclose(kmeans.fit(x, 1, 3, 0, backend="superkmeans").centroids, unit(x.mean(0)[None]), atol=1e-3)


def test_the_defaults_grow_with_the_rows():
    assert [kmeans.default_k(n) for n in (1, 99, 20_000, 10**6, 10**7)] == [1, 1, 200, 10_000, 10_000]
    assert kmeans.default_k(2_053_332_591) == 90_627
    assert kmeans.default_sample(5_000, 50, 512) == 5_000
    assert kmeans.default_sample(10**7, 1_000, 512) == 256_000
    assert kmeans.default_sample(10**7, 10_000, 512) == 524_288
    assert kmeans.default_sample(10**9, 100_000, 768) == 3_900_000


def test_shuffled_pairs_never_meet_their_own_caption():
    x = np.eye(20, dtype=np.float16)
    assert kmeans.shuffled_scores(x, x, seed=1).max() == 0
    assert len(kmeans.shuffled_scores(x, x, seed=1)) == 8 * 20
    assert len(kmeans.shuffled_scores(x[:3], x[:3], seed=1)) == 2 * 3


def test_stored_centroids_are_taken_as_they_are_and_others_scaled():
    rows = kmeans.unit_rows(np.random.default_rng(0).normal(size=(2000, 48)))
    assert (
        kmeans.as_centroids(rows).tobytes()
        == rows.tobytes()
        == kmeans.as_centroids(kmeans.as_centroids(rows)).tobytes()
    )
    assert np.array_equal(kmeans.as_centroids(3 * rows), kmeans.unit_rows(3 * rows))


def test_clusters_that_rows_begin_anew_have_centroids_of_unit_length():
    """Rows are stored as f16, whose lengths are off by up to a thousandth: such a centroid would lie too near."""
    apart = unit(np.array([[1, 0.3], [-1, 0.2], [0.1, -1]])).astype(np.float16)
    x = np.concatenate([np.repeat(apart[:1], 40, axis=0), apart[1:]])
    fits = [kmeans.fit(x, 3, 1, seed, backend="kmeans") for seed in range(20)]
    for centroids in (each.centroids for each in fits):
        assert np.abs(np.linalg.norm(centroids.astype(np.float64), axis=1) - 1).max() < 1e-6
        assert np.array_equal(kmeans.as_centroids(centroids), centroids)  # given back to --centroids they are the same
