"""Which rows stand for their group, and how pairs score: against slow references written from the papers' formulas."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curate.select.steps import coverage, pair_scores
from curate.vectors import on_device
from house import GPU


def unit(x):
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def cloud(seed, n=60, dim=6, groups=4):
    rng = np.random.default_rng(seed)
    centres = 1.5 * rng.normal(size=(groups, dim))
    group = rng.integers(-1, groups, n)
    return unit(centres[group] + rng.normal(size=(n, dim))), group


def rng():
    return np.random.default_rng(3)


def slow_typicality(x, group, neighbours):
    found = np.full(len(x), np.nan)
    for row in np.flatnonzero(group >= 0):
        distances = sorted(
            np.linalg.norm(x[row] - x[other]) for other in np.flatnonzero(group == group[row]) if other != row
        )
        found[row] = 1 / np.mean(distances[:neighbours]) if distances else 0
    return found


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10_000), st.integers(1, 9), st.integers(1, 80))
def test_typicality_is_one_over_the_mean_distance_to_the_nearest_in_the_group(seed, neighbours, n):
    x, group = cloud(seed, n)
    found = coverage.typicality(x.__getitem__, group, neighbours, rng())
    np.testing.assert_allclose(found, slow_typicality(x, group, neighbours), rtol=1e-3)


def test_equal_rows_are_as_typical_as_can_be():
    x = unit(np.ones((3, 4)))
    assert (coverage.typicality(x.__getitem__, np.zeros(3, int), 2, rng()) <= 1 / coverage.NEAREST).all()


def test_the_most_typical_of_each_group_are_chosen_in_proportion_or_evenly():
    x, group = cloud(1, 200)
    score = slow_typicality(x, group, 5)
    sizes = np.bincount(group[group >= 0])
    for even in (False, True):
        chosen = coverage.most_typical(x.__getitem__, group, 40, 5, rng(), even=even)
        counts = np.bincount(group[chosen.rows], minlength=4)
        assert len(chosen.rows) == 40 and np.abs(counts - (10 if even else 40 * sizes / sizes.sum())).max() <= 1
        for number, count in enumerate(counts):
            members = np.flatnonzero(group == number)
            best = members[np.argsort(-score[members])]
            assert set(best[:count]) == set(chosen.rows[group[chosen.rows] == number])
            assert next(row for row in chosen.reserve if group[row] == number) == best[count]


def slow_kernel(x, sigma):
    return np.exp(-np.square(x[:, None] - x[None]).sum(axis=2) / (2 * sigma**2))


def slow_mmd_choice(kernel, count):
    """Try every row, compute the squared MMD in full, take the smallest."""
    chosen = []
    for _ in range(count):
        best = None
        for row in range(len(kernel)):
            if row in chosen:
                continue
            trial = [*chosen, row]
            mmd = kernel.mean() + kernel[np.ix_(trial, trial)].mean() - 2 * kernel[:, trial].mean()
            if best is None or mmd < best[0] - 1e-12:
                best = (mmd, row)
        chosen.append(best[1])
    return chosen


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 10_000), st.integers(1, 14), st.sampled_from([0.3, 1.0]))
def test_herding_makes_the_squared_discrepancy_smallest_at_each_step(seed, count, sigma):
    x, _ = cloud(seed, 16)
    kernel = slow_kernel(x.astype(float), sigma)
    np.testing.assert_allclose(coverage.gaussian_kernel(x, sigma), kernel, atol=1e-5)
    assert coverage.herd(kernel, count).tolist() == slow_mmd_choice(kernel, count)


def slow_coincide_weights(x, group, temperature, sigma):
    names = np.unique(group[group >= 0])
    dense = np.array([slow_kernel(x[group == name].astype(float), sigma).mean() for name in names])
    centroids = unit(np.stack([x[group == name].mean(axis=0) for name in names]))
    transfer = []
    for i in range(len(names)):
        others = [float(centroids[i] @ centroids[j]) for j in range(len(names)) if centroids[i] @ centroids[j] <= 0.9]
        transfer.append(np.mean(others) if others else 0)
    weights = np.exp(np.array(transfer) / (temperature * dense))
    return dense, np.array(transfer), weights / weights.sum()


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 10_000), st.integers(2, 6))
def test_density_and_transferability_are_coincides(seed, groups):
    x, group = cloud(seed, 50, groups=groups)
    dense, transfer, _ = slow_coincide_weights(x, group, 0.1, 1.0)
    found, centroids = coverage.density(x.__getitem__, group, 1.0, rng())
    np.testing.assert_allclose(found, dense, rtol=1e-5)
    np.testing.assert_allclose(coverage.transferability(centroids), transfer, atol=1e-5)


def test_coincide_shares_by_its_formula_and_herds_inside():
    x, group = cloud(5, 300)
    n, temperature = 90, 0.5
    _, _, weights = slow_coincide_weights(x, group, temperature, 1.0)
    chosen = coverage.coincide(x.__getitem__, group, n, rng(), temperature=temperature)
    sizes = np.bincount(group[group >= 0])
    counts = np.bincount(group[chosen.rows], minlength=len(sizes))
    assert counts.sum() == n == len(set(chosen.rows.tolist()))
    free = counts < sizes
    rest = (n - sizes[~free].sum()) * weights[free] / weights[free].sum()
    assert np.abs(counts[free] - rest).max() <= 1
    for number, count in enumerate(counts):
        members = np.flatnonzero(group == number)
        order = members[slow_mmd_choice(slow_kernel(x[members].astype(float), 1.0), min(count + 1, len(members)))]
        assert chosen.rows[group[chosen.rows] == number].tolist() == order[:count].tolist()
        assert set(order[count:]) <= set(chosen.reserve.tolist())


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 10_000), st.integers(0, 120))
def test_every_budget_is_met_exactly(seed, n):
    x, group = cloud(seed, 150, groups=6)
    n = min(n, int((group >= 0).sum()))
    for chosen in (
        coverage.coincide(x.__getitem__, group, n, rng()),
        coverage.most_typical(x.__getitem__, group, n, 5, rng()),
    ):
        assert len(chosen.rows) == len(set(chosen.rows.tolist())) == n and (group[chosen.rows] >= 0).all()
        assert not set(chosen.rows.tolist()) & set(chosen.reserve.tolist())


def test_the_order_of_rows_does_not_matter():
    x, group = cloud(8, 120)
    shuffled = np.random.default_rng(0).permutation(len(x))
    for choose in (
        lambda x, group: coverage.coincide(x.__getitem__, group, 40, rng()).rows,
        lambda x, group: coverage.most_typical(x.__getitem__, group, 40, 5, rng()).rows,
    ):
        assert set(choose(x, group).tolist()) == set(shuffled[choose(x[shuffled], group[shuffled])].tolist())
    by_row = coverage.redundancy(x.__getitem__, group)
    np.testing.assert_allclose(
        coverage.redundancy(x[shuffled].__getitem__, group[shuffled]), by_row[shuffled], atol=1e-6
    )


def test_a_giant_group_is_worked_in_random_parts_of_equal_size(monkeypatch):
    x, group = cloud(2, 700, groups=2)
    monkeypatch.setattr(coverage, "PART", 100)
    rows, bounds = coverage.parts_of(group, rng())
    sizes = np.diff(bounds)
    assert sorted(rows) == np.flatnonzero(group >= 0).tolist() and sizes.max() <= 100 and np.ptp(sizes) <= 2
    assert all(len(np.unique(group[rows[a:b]])) == 1 for a, b in zip(bounds[:-1], bounds[1:], strict=True))
    monkeypatch.setattr(coverage, "READ_ROWS", 150)
    chosen = coverage.coincide(x.__getitem__, group, 99, rng())
    assert len(set(chosen.rows.tolist())) == 99
    score = coverage.typicality(x.__getitem__, group, 5, rng())
    assert np.corrcoef(score[group >= 0], slow_typicality(x, group, 5)[group >= 0])[0, 1] > 0.7


def slow_redundancy(x, group):
    found = np.full(len(x), np.nan)
    for name in np.unique(group[group >= 0]):
        rows = np.flatnonzero(group == name)
        u = x[rows].astype(float) - x[rows].astype(float).mean(axis=0)
        u /= np.maximum(np.linalg.norm(u, axis=1, keepdims=True), 1e-12)
        for i, row in enumerate(rows):
            found[row] = np.mean([u[i] @ u[j] for j in range(len(rows)) if j != i]) if len(rows) > 1 else 0
    return found


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10_000), st.integers(1, 60), st.integers(1, 70))
def test_redundancy_is_the_mean_centred_cosine_to_the_others(seed, n, block):
    x, group = cloud(seed, n)
    np.testing.assert_allclose(coverage.redundancy(x.__getitem__, group, block), slow_redundancy(x, group), atol=1e-5)


def slow_neg_clip_loss(image, text, t):
    s = image.astype(float) @ text.astype(float).T
    return [s[i, i] - t / 2 * (np.log(sum(np.exp(s[i] / t))) + np.log(sum(np.exp(s[:, i] / t)))) for i in range(len(s))]


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10_000), st.integers(1, 40), st.sampled_from([0.003, 0.01, 0.07, 1.0]), st.integers(1, 50))
def test_the_negative_clip_loss_of_one_batch(seed, n, temperature, block):
    image, text = (cloud(seed + i, n, dim=5)[0] for i in (0, 1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pair_scores, "BLOCK", block)
        found = pair_scores.neg_clip_loss(
            image.__getitem__, text.__getitem__, np.arange(n), rng(), temperature=temperature
        )
    np.testing.assert_allclose(found, slow_neg_clip_loss(image, text, temperature), atol=2e-5)


def test_the_negative_clip_loss_is_the_mean_over_random_batches():
    n, size = 90, 30
    image, text = (cloud(i, n, dim=5)[0] for i in (0, 1))
    rows = np.arange(0, n, 2)
    draw, expected = rng(), np.zeros(len(rows))
    for _ in range(4):
        for cut in np.array_split(draw.permutation(len(rows)), 2):
            expected[cut] += slow_neg_clip_loss(image[rows[cut]], text[rows[cut]], 0.05)
    found = pair_scores.neg_clip_loss(
        image.__getitem__, text.__getitem__, rows, rng(), temperature=0.05, batch_size=size, batches=4
    )
    np.testing.assert_allclose(found, expected / 4, atol=2e-5)


@pytest.mark.parametrize("on", ["cpu", pytest.param(GPU, marks=pytest.mark.gpu)])
def test_scores_of_pairs_are_computed_on_the_device(monkeypatch, on):
    monkeypatch.setattr(on_device, "device", lambda: on)
    image, text = (cloud(seed, 300, dim=16)[0].astype(np.float16) for seed in (0, 1))
    found = pair_scores.neg_clip_loss(image.__getitem__, text.__getitem__, np.arange(300), rng(), temperature=0.05)
    np.testing.assert_allclose(
        found, slow_neg_clip_loss(unit(image.astype(float)), unit(text.astype(float)), 0.05), atol=2e-5
    )
    nearest = pair_scores.norm_sim(image.__getitem__, np.arange(300), iter([text[:200], text[200:]]))
    np.testing.assert_allclose(nearest, (image.astype(float) @ text.astype(float).T).max(axis=1), atol=1e-6)


def test_a_caption_that_fits_everything_scores_below_its_cosine():
    image = unit(np.random.default_rng(0).normal(size=(50, 8)) + 2)
    text = image.copy()
    text[0] = unit(image.mean(axis=0, keepdims=True))[0]  # near every picture
    found = pair_scores.neg_clip_loss(image.__getitem__, text.__getitem__, np.arange(50), rng())
    assert found.argmin() == 0


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10_000), st.sampled_from([2, np.inf]), st.integers(1, 9))
def test_norm_sim_is_the_norm_of_the_cosines_to_the_targets(seed, p, blocks):
    x, target = cloud(seed, 40)[0], cloud(seed + 1, 17)[0]
    rows = np.arange(1, 40, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pair_scores, "TARGET_ROWS", 5)
        patch.setattr(pair_scores, "READ_ROWS", 7)
        found = pair_scores.norm_sim(x.__getitem__, rows, iter(np.array_split(target, blocks)), p)
    cosines = x[rows].astype(float) @ target.astype(float).T
    expected = cosines.max(axis=1) if p == np.inf else np.linalg.norm(cosines, axis=1)
    np.testing.assert_allclose(found, expected, atol=1e-5)
