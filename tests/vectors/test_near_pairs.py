"""The near-duplicate forest and what rests on it, against slow references written from the definitions."""

from contextlib import contextmanager

import numpy as np
import pytest
from clouds import unit
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from curate.embed.images import perceptual_hash
from curate.select.frame import no_hashes
from curate.select.steps import near_duplicates
from curate.select.steps.linked_pairs import cosine_rule
from curate.vectors import duplicate_forest, forest, near_pairs
from curate.vectors.duplicate_forest import near_duplicate_forest, row_hashes
from curate.vectors.exact import exact_products
from curate.vectors.products import PRODUCTS, is_right
from curate.vectors.screen import Screen


def cluster_rows(n, dim=16, seed=0, spread=0.5):
    rng = np.random.default_rng(seed)
    centers = rng.normal(size=(4, dim))
    return unit(centers[rng.integers(0, 4, n)] + spread * rng.normal(size=(n, dim))).astype(np.float16)


def slow_components(x, threshold):
    """Breadth-first search on the full cosine graph; a label is the smallest row of its component."""
    near = x.astype(np.float64) @ x.astype(np.float64).T > threshold
    labels = np.full(len(x), -1)
    for row in range(len(x)):
        queue = [row] if labels[row] < 0 else []
        while queue:
            one = queue.pop()
            if labels[one] < 0:
                labels[one] = row
                queue += np.flatnonzero(near[one] & (labels < 0)).tolist()
    return labels


def slow_forest(x, floor):
    """Kruskal's algorithm over all pairs."""
    cosines = slow_cosines(x)
    pairs = [(-cosines[i, j], i, j) for i in range(len(x)) for j in range(i + 1, len(x)) if cosines[i, j] > floor]
    label = list(range(len(x)))
    chosen = []
    for weight, i, j in sorted(pairs):
        if label[i] != label[j]:
            chosen.append((i, j, -weight))
            old, new = label[j], label[i]
            label = [new if each == old else each for each in label]
    return sorted(chosen)


@contextmanager
def medium(rows):
    """Let groups of more rows be compared tile by tile, which is done with large ones."""
    before, near_pairs.MEDIUM = near_pairs.MEDIUM, rows
    try:
        yield
    finally:
        near_pairs.MEDIUM = before


def forest_of(x, floor, bounds=None, **how):
    return near_duplicate_forest(x, np.arange(len(x)), [0, len(x)] if bounds is None else bounds, floor, **how)


MEDIUMS = st.sampled_from([near_pairs.SMALL, 20, near_pairs.MEDIUM])


def slow_cosines(x):
    """All cosines by their definition: exact sums of exact products, rounded once."""
    whole = [[int(value) for value in row] for row in (x.astype(np.float64) * 2.0**24).tolist()]
    return np.array([[np.float32(sum(map(int.__mul__, a, b)) / 2**48) for b in whole] for a in whole])


@settings(deadline=None, max_examples=20)
@given(st.integers(2, 60), st.integers(0, 50), st.sampled_from([0.3, 0.6, 0.9]), MEDIUMS)
def test_the_forest_is_kruskals(n, seed, floor, rows):
    x = cluster_rows(n, seed=seed)
    with medium(rows):
        a, b, similarity = forest_of(x, floor)
    expected = slow_forest(x, floor)
    assert list(zip(a.tolist(), b.tolist(), strict=True)) == [(i, j) for i, j, _ in expected]
    assert similarity.tolist() == [weight for _, _, weight in expected]


@settings(deadline=None, max_examples=20)
@given(st.integers(2, 80), st.integers(0, 50), st.floats(0.4, 0.99))
def test_any_threshold_above_the_floor_gives_the_true_components(n, seed, threshold):
    x = cluster_rows(n, seed=seed)
    a, b, similarity = forest_of(x, 0.4)
    above = similarity > threshold
    products = x.astype(np.float64) @ x.astype(np.float64).T
    if np.abs(products - threshold).min() > 1e-5:
        assert (forest.components(a[above], b[above], n) == slow_components(x, threshold)).all()


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("tile, merge_at", [(7, 1 << 20), (64, 50), (1000, 1), (33, 333)])
def test_tiles_merges_and_the_screen_change_no_byte(monkeypatch, tile, merge_at, product):
    monkeypatch.setattr(near_pairs, "PANEL", 70)
    monkeypatch.setattr(near_pairs, "MEDIUM", near_pairs.SMALL)
    monkeypatch.setattr(duplicate_forest, "LARGE", 100)
    x = np.concatenate([cluster_rows(150, seed=5, spread=0.15), cluster_rows(90, seed=6)])
    x[20:40] = x[3]  # equal rows tie
    whole = forest_of(x, 0.5, [0, 150, 240], product="f32")
    parts = forest_of(x, 0.5, [0, 150, 240], tile=tile, merge_at=merge_at, product=product)
    for left, right in zip(whole, parts, strict=True):
        assert left.tobytes() == right.tobytes()


@pytest.mark.parametrize("spread, ties", [(0.05, False), (0.2, True), (0.5, False)])
@pytest.mark.parametrize("tile", [16, 50, 400])
def test_dense_and_crowded_tiles_have_the_same_forest(monkeypatch, spread, ties, tile):
    x = cluster_rows(160, seed=8, spread=spread)
    if ties:
        x[30:90] = x[np.random.default_rng(0).integers(0, 30, 60)]
    plain = forest_of(x, 0.2, tile=1000)
    for dense, crowded, rows in ((0, 0, 4), (0, 1 << 40, 4), (2, 0, 4), (0, 0, 256), (0, 1 << 40, 256), (2, 0, 256)):
        monkeypatch.setattr(near_pairs, "MEDIUM", rows)
        monkeypatch.setattr(near_pairs, "DENSE", dense)
        monkeypatch.setattr(forest, "CROWDED", crowded)
        for left, right in zip(plain, forest_of(x, 0.2, tile=tile), strict=True):
            assert left.tobytes() == right.tobytes()


@settings(deadline=None, max_examples=40)
@given(
    st.integers(2, 40),
    st.integers(0, 99),
    st.sampled_from([-0.5, 0.06, 0.3, 0.8, 0.95]),
    st.sampled_from(PRODUCTS),
    MEDIUMS,
    st.booleans(),
)
def test_pairs_are_decided_by_the_exact_cosine_and_none_is_missed(n, seed, floor, product, medium_rows, across):
    x = cluster_rows(n, dim=8, seed=seed, spread=0.4)
    expected = slow_cosines(x)
    members = np.array([n // 3, np.random.default_rng(seed).integers(0, n - n // 3, endpoint=True)])
    how = {"members": members, "tile": 9, "product": product, "across": across}
    with medium(medium_rows):
        found = list(near_pairs.near_pairs(x, np.arange(n), [0, n // 3, n], floor, **how))
    a, b, cosine = (np.concatenate(parts) for parts in zip(*found, strict=True)) if found else np.zeros((3, 0))
    near = np.triu(expected > np.float32(floor), 1)
    near[: n // 3, n // 3 :] = False
    near[n // 3 + members[1] :] = False
    if across:
        near[: n // 3, : n // 3] = near[:, n // 3 : n // 3 + members[1]] = False
    assert sorted(zip(a, b, cosine, strict=True)) == [(i, j, expected[i, j]) for i, j in np.argwhere(near)]


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 600), st.integers(0, 99), st.sampled_from([-0.2, 0.06, 0.5, 0.9]))
def test_the_fast_product_errs_by_less_than_its_slack(dim, seed, floor):
    rng = np.random.default_rng(seed)
    x = unit(rng.normal(size=(30, dim)) * 10.0 ** rng.integers(-3, 3, dim)).astype(np.float16)
    near = set(np.flatnonzero(exact_products(x, x).ravel() > floor).tolist())
    for product in (each for each in PRODUCTS if is_right(each, dim)):
        for centre in (np.zeros(dim), x[0], x.astype(np.float32).mean(axis=0), rng.normal(size=dim)):
            screen, groups = Screen(floor, product), np.zeros(30, np.int64)
            centres = np.asarray(centre, np.float32)[None]
            left = screen.prepare(x, np.arange(30), centres, groups)
            right = screen.prepare(x, np.arange(30)[::-1], centres, groups)
            found = screen.candidates(left, right)
            levels = np.maximum(floor, rng.uniform(-1, 1, (2, 30)))
            asked = (exact_products(x, x[::-1]) > np.minimum.outer(*levels)).ravel()
            assert (
                set(np.flatnonzero(asked))
                <= set(screen.candidates(left, right, tuple(levels)).tolist())
                <= set(found.tolist())
            )
            assert near <= {flat - flat % 30 + 29 - flat % 30 for flat in found.tolist()}


@pytest.mark.skipif(not is_right("int8", 512), reason="this processor's int8 saturates")
def test_screening_with_bytes_finds_few_pairs_beyond_those_that_are_near():
    rng = np.random.default_rng(0)
    x = unit(rng.normal(size=512) + 0.5 * rng.normal(size=(500, 512))).astype(np.float16)
    screen, groups = Screen(0.85, "int8"), np.zeros(500, np.int64)
    prepared = screen.prepare(x, np.arange(500), x.astype(np.float32).mean(axis=0)[None], groups)
    exact = exact_products(x, x)
    assert len(screen.candidates(prepared, prepared)) <= (exact > 0.84).sum()


def test_rows_of_different_clusters_are_never_joined():
    x = np.repeat(cluster_rows(1), 10, axis=0)
    a, b, _ = forest_of(x, 0.5, [0, 4, 10])
    assert len(a) == 3 + 5 and ((a < 4) == (b < 4)).all()


def test_a_giant_cluster_of_one_picture_is_a_star():
    x = np.repeat(cluster_rows(2, seed=1), [1100, 1], axis=0)
    a, b, _ = forest_of(x, 0.99, tile=100, merge_at=500)
    assert (a == 0).all() and (b == np.arange(1, 1100)).all()


def test_permuting_the_rows_permutes_the_components():
    x = cluster_rows(120, seed=9)
    order = np.random.default_rng(0).permutation(120)

    def groups(x):
        a, b, _ = forest_of(x, 0.8)
        return forest.components(a, b, len(x))

    plain, moved = groups(x), groups(x[order])
    together = plain[order][:, None] == plain[order][None, :]
    assert (together == (moved[:, None] == moved[None, :])).all()


def test_differing_bits_are_those_of_the_images_or_of_one_and_the_others_mirror_image():
    rng = np.random.default_rng(0)
    left, right = rng.integers(0, 1 << 63, (2, 100), dtype=np.uint64)
    mirror = sum(1 << bit for bit in range(64) if bit % 2)  # the first bit of a hash is its highest: frequency 1, odd
    assert near_pairs.differing_bits(left, right).tolist() == [
        min(bin(int(a) ^ int(b)).count("1"), bin(int(a) ^ int(b) ^ mirror).count("1"))
        for a, b in zip(left, right, strict=True)
    ]


def test_a_mirrored_picture_differs_in_few_bits():
    for seed in range(5):
        rng = np.random.default_rng(seed)
        small = rng.integers(0, 255, (6, 7, 3), dtype=np.uint8)
        image = Image.fromarray(small).resize((90, 70), Image.Resampling.BICUBIC)
        hashes = [np.array([perceptual_hash(each)], np.uint64) for each in (image, ImageOps.mirror(image))]
        assert near_pairs.differing_bits(*hashes)[0] <= 8 < 20 < np.bitwise_count(hashes[0] ^ hashes[1])[0]


def slow_resolve(x, alive, preference, rule, keep, threshold):
    """Say which rows stay, by the definitions of the rules, in float64 over all pairs."""
    products = x.astype(np.float64) @ x.astype(np.float64).T
    rows = np.flatnonzero(alive)
    label = np.full(len(x), -1)
    label[rows] = rows[slow_components(x[rows], threshold)]
    stay = alive.copy()
    for name in np.unique(label[rows]):
        members = [row for row in rows if label[row] == name]
        order = sorted(members, key=lambda row: (preference[row], row))
        if keep == "inner-middle":
            mean = x[members].astype(np.float64).mean(axis=0)
            far = {row: np.linalg.norm(x[row].astype(np.float64) - mean) if len(members) > 2 else 0 for row in members}
            order = sorted(members, key=lambda row: (far[row], row))
        middle = len(order) // 2
        if rule == "components":
            chosen = order[middle] if "middle" in keep else order[0]
            stay[[row for row in members if row != chosen]] = False
            continue
        if "middle" in keep:
            order = [order[i] for i in sorted(range(len(order)), key=lambda i: (abs(i - middle), i))]
        for position, row in enumerate(order):
            before = [r for r in order[:position] if rule == "semdedup" or stay[r]]
            stay[row] = not any(products[row, other] > threshold for other in before)
    return stay


@settings(deadline=None, max_examples=40)
@given(
    st.integers(2, 60),
    st.integers(0, 30),
    st.sampled_from(near_duplicates.RULES),
    st.sampled_from(["middle", "inner-middle", "far"]),
    st.sampled_from([0.0, 0.3]),
)
def test_every_rule_and_keeper_is_the_definition(n, seed, rule, keep, gone):
    x = cluster_rows(n, seed=seed, spread=0.35)
    rng = np.random.default_rng(seed)
    alive, preference = rng.random(n) >= gone, rng.random(n)
    a, b, similarity = forest_of(x, 0.5)
    edges = a, b, similarity, np.full(len(a), 255, np.uint8)
    found = near_duplicates.resolve(edges, alive, preference, rule, keep, cosine_rule(0.8), x.__getitem__, no_hashes)
    assert (found.keep == slow_resolve(x, alive, preference, rule, keep, 0.8)).all()
    dropped = alive & ~found.keep
    assert (
        found.keep[found.duplicate_of[dropped]].all()
        and (found.component[found.duplicate_of[dropped]] == found.component[dropped]).all()
    )
    assert (found.component >= 0).tolist() == alive.tolist()


def survivors(x, order, rule, threshold, alive=None, keep="near"):
    """Deduplicate as `dedup` does: the forest above a low floor, then the rule at the threshold."""
    a, b, similarity = forest_of(x, 0.5)
    alive = np.ones(len(x), bool) if alive is None else alive
    edges = a, b, similarity, np.full(len(a), 255, np.uint8)
    return near_duplicates.resolve(
        edges, alive, order, rule, keep, cosine_rule(threshold), x.__getitem__, no_hashes
    ).keep


SMALL_POOLS = st.tuples(st.integers(2, 70), st.integers(0, 99), st.floats(0.55, 0.97))


@settings(deadline=None, max_examples=25)
@given(SMALL_POOLS)
def test_survivors_grow_from_components_to_semdedup_to_greedy(pool):
    n, seed, threshold = pool
    x, order = cluster_rows(n, seed=seed, spread=0.35), np.random.default_rng(seed).random(n)
    components, semdedup, greedy = (survivors(x, order, rule, threshold) for rule in near_duplicates.RULES)
    assert components.sum() <= semdedup.sum() <= greedy.sum()
    assert (greedy | ~semdedup).all()


@settings(deadline=None, max_examples=25)
@given(SMALL_POOLS, st.sampled_from(near_duplicates.RULES), st.sampled_from(["near", "middle"]))
def test_a_second_pass_drops_nothing(pool, rule, keep):
    n, seed, threshold = pool
    x, order = cluster_rows(n, seed=seed, spread=0.35), np.random.default_rng(seed).random(n)
    kept = survivors(x, order, rule, threshold, keep=keep)
    assert (survivors(x, order, rule, threshold, kept, keep) == kept).all()


@settings(deadline=None, max_examples=25)
@given(SMALL_POOLS, st.sampled_from(near_duplicates.RULES), st.sampled_from(["near", "middle"]))
def test_survivors_do_not_depend_on_the_order_of_the_rows(pool, rule, keep):
    n, seed, threshold = pool
    rng = np.random.default_rng(seed)
    x, order, moved = cluster_rows(n, seed=seed, spread=0.35), rng.random(n), rng.permutation(n)
    there = survivors(x[moved], order[moved], rule, threshold, keep=keep)
    assert (there == survivors(x, order, rule, threshold, keep=keep)[moved]).all()


@settings(deadline=None, max_examples=25)
@given(SMALL_POOLS, st.floats(0.0, 0.02))
def test_a_higher_threshold_keeps_no_fewer_rows(pool, more):
    n, seed, threshold = pool
    x, order = cluster_rows(n, seed=seed, spread=0.35), np.random.default_rng(seed).random(n)
    lower, higher = (
        {rule: survivors(x, order, rule, t) for rule in near_duplicates.RULES} for t in (threshold, threshold + more)
    )
    assert lower["components"].sum() <= higher["components"].sum()
    assert (higher["semdedup"] | ~lower["semdedup"]).all()


def test_rows_fall_into_fewer_components_as_the_threshold_falls():
    x = cluster_rows(300, seed=4)
    a, b, similarity = forest_of(x, 0.3)
    counts = [
        len(np.unique(forest.components(a[similarity > t], b[similarity > t], 300))) for t in np.linspace(0.3, 1, 30)
    ]
    assert counts == sorted(counts)


def test_the_weakest_link_is_the_threshold_at_which_two_rows_part():
    x = cluster_rows(80, seed=3)
    edges = forest_of(x, 0.3)
    label = forest.components(edges[0], edges[1], 80)
    starts = np.unique(label)
    weakest = near_duplicates.weakest_links(edges, starts, 80)
    for row in range(80):
        if row != label[row]:
            for threshold, joined in ((weakest[row] - 1e-6, True), (weakest[row], False)):
                above = edges[2] > threshold
                parts = forest.components(edges[0][above], edges[1][above], 80)
                assert (parts[row] == parts[label[row]]) == joined


def test_the_nearest_target_is_found_in_any_block():
    x, targets = cluster_rows(50, seed=1), cluster_rows(70, seed=2)
    expected = (x.astype(np.float64) @ targets.astype(np.float64).T).max(axis=1)
    for block in (1, 9, 4096):
        assert np.allclose(near_pairs.nearest_similarity(x, targets, block), expected, atol=1e-6)
    assert (near_pairs.nearest_similarity(x, targets[:0]) == -1).all()


@pytest.mark.parametrize("across", [False, True])
def test_a_large_group_tells_how_far_it_is(monkeypatch, across):
    """Of a block of a giant cluster, which takes minutes."""
    monkeypatch.setattr(near_pairs, "PANEL", 128)
    x, heard = cluster_rows(700), []
    members = np.array([400 if across else 700])
    how = {"members": members, "across": across, "tile": 64, "note": heard.append}
    for _ in near_pairs.near_pairs(x, np.arange(700), [0, 700], 0.99, **how):
        pass
    assert len(heard) > 10 and 0.9 * members[0] < sum(heard) <= 700


def test_rows_of_signs_have_hashes_of_their_own():
    """Two turned signs, top bits of two words, would cancel in a sum of products by odd numbers."""
    rng = np.random.default_rng(0)
    base = np.where(rng.random((300, 64)) < 0.5, -0.125, 0.125).astype(np.float16)
    other = base.copy()
    for row in other:
        row[rng.choice(np.arange(3, 64, 4), 2, replace=False)] *= -1
    rows = np.concatenate([base, other, np.eye(64, dtype=np.float16)])
    assert len(np.unique(row_hashes(rows))) == len(np.unique(rows, axis=0))
