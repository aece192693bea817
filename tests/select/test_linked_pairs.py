"""The rule of a pair, by cosine and pixels, against its definition over all pairs."""

import numpy as np
import pyarrow as pa
import pytest
from clouds import draw
from hypothesis import given, settings
from hypothesis import strategies as st
from test_near_pairs import cluster_rows, forest_of, slow_cosines

from curate.cluster.cluster import ClusterOptions, cluster
from curate.engine import Job
from curate.select.frame import UNKNOWN_BITS
from curate.select.pool import Pool
from curate.select.select import SelectOptions, select
from curate.select.steps import linked_pairs, near_duplicates, same_picture
from curate.select.steps.linked_pairs import PairRule, cosine_rule, linked_forest
from curate.storage import sidecar
from curate.storage.manifest import open_input
from curate.vectors import near_pairs
from curate.vectors.exact import exact_products
from curate.vectors.forest import components

QUIET = Job(workers=1, quiet=True)

RULES = [
    PairRule(0.8, 0.95, 16, 0.95),
    PairRule(0.85, np.inf, 16, 0.97),
    PairRule(0.9, np.inf, 8, 0.9),
    PairRule(0.7, 0.9, 8, 0.75),
    cosine_rule(0.85),
]
PIXELS = st.sampled_from(["all", "some", "none"])


def pool(n, seed, pixels):
    """Rows in one cluster with hashes that agree for pairs of any cosine; some hashes are unknown."""
    rng = np.random.default_rng(seed)
    x = cluster_rows(n, seed=seed, spread=0.35)
    kinds = rng.integers(0, 1 << 63, 4, dtype=np.uint64)[rng.integers(0, 4, n)]
    flipped = np.bitwise_or.reduce(np.uint64(1) << rng.integers(0, 64, (n, 5), dtype=np.uint64), axis=1)
    known = {"all": np.ones(n, bool), "some": rng.random(n) < 0.7, "none": np.zeros(n, bool)}[pixels]
    values = np.where(known, kinds ^ flipped, np.uint64(0))
    a, b, similarity = forest_of(x, 0.5)
    hashes = lambda rows: (values[rows], known[rows])  # noqa: E731
    return x, (a, b, similarity, linked_pairs.differing((values, known), a, b)), hashes


def copy_test(n, seed):
    """Finer hashes of three kinds, some unknown, and captions of which some say the same. Returns the test of copies
    and the matrix of its verdicts, pair by pair."""
    rng = np.random.default_rng([seed, 1])
    kinds = rng.integers(0, 256, (3, 72), np.uint8)
    values, known = kinds[rng.integers(0, 3, n)], rng.random(n) < 0.8
    texts = [" ".join(np.array(["a", "red", "cat", "on", "mats"])[rng.random(5) < 0.6]) for _ in range(n)]
    test = same_picture.CopyTest(lambda rows: (values[rows], known[rows]), lambda rows: [texts[row] for row in rows])
    passed = np.zeros((n, n), bool)
    for i in range(n):
        for j in range(n):
            both = set(texts[i].split()) | set(texts[j].split())
            alike = not both or len(set(texts[i].split()) & set(texts[j].split())) > len(both) / 2
            bits = same_picture.detail_bits(values[i : i + 1], values[j : j + 1])[0]
            passed[i, j] = alike or not known[i] or not known[j] or bits <= same_picture.MOST_BITS
    return test, passed


def slow_links(x, hashes, rule, passed=True):
    """The rule as it is written, pair by pair. Returns the matrix of links and that of cosines."""
    values, known = hashes(np.arange(len(x)))
    cosines, n = slow_cosines(x), len(x)
    linked = np.zeros((n, n), bool)
    for i in range(n):
        for j in range(n):
            bits = near_pairs.differing_bits(values[i : i + 1], values[j : j + 1])[0]
            both = known[i] and known[j]
            linked[i, j] = i != j and (
                (both and bits <= rule.bits and cosines[i, j] > rule.threshold)
                or cosines[i, j] > rule.anyhow
                or (not both and cosines[i, j] > rule.unknown)
            )
    return linked & passed, cosines


def slow_labels(linked, alive):
    """Label the components of the linked pairs among the rows alive by their smallest row; -1 where not alive."""
    labels = np.full(len(alive), -1)
    for row in np.flatnonzero(alive):
        queue = [row] if labels[row] < 0 else []
        while queue:
            one = queue.pop()
            if labels[one] < 0:
                labels[one] = row
                queue += np.flatnonzero(linked[one] & alive & (labels < 0)).tolist()
    return labels


@settings(deadline=None, max_examples=120)
@given(
    st.integers(2, 40),
    st.integers(0, 10_000),
    st.sampled_from(RULES),
    PIXELS,
    st.sampled_from([0.0, 0.3]),
    st.booleans(),
)
def test_the_components_are_those_of_the_rule_over_all_pairs(n, seed, rule, pixels, gone, told):
    x, edges, hashes = pool(n, seed, pixels)
    alive = np.random.default_rng(seed).random(n) >= gone
    test, passed = copy_test(n, seed) if told else (None, True)
    linked, cosines = slow_links(x, hashes, rule, passed)
    a, b, similarity = linked_forest(edges, rule, alive, x.__getitem__, hashes, test)
    labels = slow_labels(linked, alive)
    assert (np.where(alive, components(a, b, n), -1) == labels).all()
    assert len(a) == alive.sum() - len(np.unique(labels[alive])) and (similarity == cosines[a, b]).all()
    assert linked[a, b].all() and alive[a].all() and alive[b].all()
    if alive.all():  # then it is the maximum spanning forest: no link that is left out is heavier
        for threshold in np.unique(similarity):
            kept = similarity > threshold
            assert (components(a[kept], b[kept], n) == slow_labels(linked & (cosines > threshold), alive)).all()


@settings(deadline=None, max_examples=60)
@given(
    st.integers(2, 30),
    st.integers(0, 10_000),
    st.sampled_from(RULES),
    PIXELS,
    st.sampled_from(["semdedup", "greedy"]),
    st.sampled_from([0.0, 0.3]),
    st.booleans(),
)
def test_semdedup_and_greedy_drop_by_the_rule_of_the_pair_too(n, seed, rule, pixels, name, gone, told):
    x, edges, hashes = pool(n, seed, pixels)
    rng = np.random.default_rng(seed)
    alive, preference = rng.random(n) >= gone, rng.random(n)
    test, passed = copy_test(n, seed) if told else (None, True)
    linked, _ = slow_links(x, hashes, rule, passed)
    stay = alive.copy()
    order = [row for row in np.argsort(preference) if alive[row]]
    for place, row in enumerate(order):
        before = [other for other in order[:place] if name == "semdedup" or stay[other]]
        stay[row] = not linked[row, before].any()
    found = near_duplicates.resolve(edges, alive, preference, name, "near", rule, x.__getitem__, hashes, test)
    assert (found.keep == stay).all()


@pytest.mark.parametrize("name", near_duplicates.RULES)
def test_distinct_pictures_that_the_embedder_takes_for_alike_stay_whatever_was_dropped_before(name):
    # a - b and b - c look alike (cosine .97), a and c are one picture (.95); b goes first: the audit's case
    x = np.zeros((3, 4), np.float16)
    x[:, 0], x[0, 1], x[2, 1], x[1, 2] = 0.975, 0.16, -0.16, 0.22
    x /= np.linalg.norm(x.astype(np.float32), axis=1)[:, None]
    values = np.array([0x0F0F, 0xFFFF_0000_FFFF_0000, 0x0F0E], np.uint64)
    hashes = lambda rows: (values[rows], np.ones(len(rows), bool))  # noqa: E731
    a, b, similarity = forest_of(x, 0.5)
    edges = a, b, similarity, linked_pairs.differing(hashes(np.arange(3)), a, b)
    rule = PairRule(0.9, 0.999, 16, 0.999)
    for alive in (np.array([1, 1, 1], bool), np.array([1, 0, 1], bool)):
        found = near_duplicates.resolve(edges, alive, np.arange(3.0), name, "near", rule, x.__getitem__, hashes)
        assert found.keep.tolist() == [True, bool(alive[1]), False] and found.duplicate_of[2] == 0


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(2, 40), min_size=1, max_size=12), st.integers(0, 100), st.integers(20, 400))
def test_agreeing_hashes_are_found_whatever_the_blocks(sizes, seed, block):
    rng = np.random.default_rng(seed)
    bounds = np.append(0, np.cumsum(sizes))
    hashes = rng.integers(0, 1 << 63, 5, dtype=np.uint64)[rng.integers(0, 5, bounds[-1])]
    labels = rng.integers(0, 3, bounds[-1])
    expected = {
        (i, j)
        for first, last in zip(bounds[:-1], bounds[1:], strict=True)
        for i in range(first, last)
        for j in range(i + 1, last)
        if labels[i] != labels[j] and near_pairs.differing_bits(hashes[i : i + 1], hashes[j : j + 1])[0] <= 8
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linked_pairs, "BLOCK_PAIRS", block)
        pairs = np.concatenate([np.empty((2, 0), np.int64), *linked_pairs._agreeing(hashes, labels, bounds, 8)], axis=1)
    assert sorted(map(tuple, pairs.T.tolist())) == sorted(expected)


def test_an_unknown_hash_counts_as_unknown_bits():
    hashes = np.array([1, 1, 0], np.uint64), np.array([True, True, False])
    assert linked_pairs.differing(hashes, np.array([0, 0]), np.array([1, 2])).tolist() == [0, UNKNOWN_BITS]


@pytest.fixture(scope="module")
def flat(tmp_path_factory):
    """A clustered pool of copies, in which every third picture is without structure: its hash is 0, or next to it."""
    folder = tmp_path_factory.mktemp("flat")
    cloud = draw(folder / "emb")
    cloud.phash[::3] = np.arange(len(cloud.phash[::3])) % 3
    for number, rows in enumerate(np.array_split(np.arange(len(cloud.phash)), 3)):
        location = str(folder / "emb" / f"{number:05d}.arrow")
        table, facts = sidecar.table(location), sidecar.facts(location)
        hashes = pa.array(cloud.phash[rows], mask=table["phash"].is_null().to_numpy())
        table = table.set_column(2, table.schema.field("phash"), hashes).combine_chunks()
        sidecar.write_table(location, table.schema.remove_metadata(), table.to_batches(), facts)
    cluster(cloud.path, str(folder / "clu"), ClusterOptions(k=8, floor=0.6), QUIET)
    return cloud, folder


def test_pictures_without_structure_confirm_no_duplicate(flat):
    cloud, folder = flat
    pool = Pool(open_input(str(folder / "clu")))
    a, b, _, bits = pool.edges()
    plain = cloud.ok & (np.bitwise_count(cloud.phash) > 8)
    assert 0 < (~plain[a] | ~plain[b]).mean() < 1
    assert (bits == np.where(plain[a] & plain[b], near_pairs.differing_bits(cloud.phash[a], cloud.phash[b]), 255)).all()
    rows = np.random.default_rng(0).permutation(len(plain))[:200]
    values, known = pool.hashes(rows)
    assert (known == plain[rows]).all() and (values[known] == cloud.phash[rows][known]).all()


@pytest.mark.parametrize("before", [(), ("rank(clip_score, 0, 0.7)",)])
@pytest.mark.parametrize("rule", near_duplicates.RULES)
def test_dedup_of_a_pool_is_the_rule_over_all_pairs_of_each_cluster(flat, tmp_path, before, rule):
    cloud, folder = flat
    dedup = f'dedup("auto", keep="far", rule="{rule}")'
    manifest = select(str(folder / "clu"), str(tmp_path / "sel"), SelectOptions(steps=(*before, dedup)), QUIET)
    facts = manifest["funnel"][-1]["estimates"]
    assert facts["most_bits"] == 16
    tables = {
        name: pa.concat_tables([sidecar.table(str(place / f"{number:05d}.arrow")) for number in range(3)])
        for name, place in (("clu", folder / "clu"), ("sel", tmp_path / "sel"))
    }
    clusters = tables["clu"]["cluster"].to_numpy()
    near = tables["clu"]["centroid_similarity"].to_numpy(zero_copy_only=False)
    reason = np.array(tables["sel"]["dropped_by"].cast(pa.string()).to_pylist(), object)
    alive = cloud.ok & np.isin(reason, [None, dedup])
    known = cloud.ok & (np.bitwise_count(cloud.phash) > 8)
    anyhow = facts.get("anyhow_above", np.inf)
    pair_rule = PairRule(facts["threshold"], anyhow, 16, max(facts["threshold"], min(anyhow, 0.999)))
    cosines = exact_products(cloud.image, cloud.image)
    bits = near_pairs.differing_bits(cloud.phash[:, None], cloud.phash[None])
    bits = np.where(known[:, None] & known[None], bits, 255)
    linked = pair_rule.links(cosines, bits) & (clusters[:, None] == clusters[None]) & ~np.eye(len(alive), dtype=bool)
    labels = slow_labels(linked, alive)
    component = tables["sel"]["component"].fill_null(-1).to_numpy()
    assert (component[alive] == labels[alive]).all() and np.bincount(labels[alive]).max() > 2
    stay = alive.copy()
    order = np.array([row for row in np.lexsort((np.arange(len(near)), near)) if alive[row]])
    for place, row in enumerate(order):
        earlier = order[:place]
        if rule == "components":
            stay[row] = not (labels[earlier] == labels[row]).any()
        else:
            stay[row] = not linked[row, earlier if rule == "semdedup" else earlier[stay[earlier]]].any()
    assert (tables["sel"]["kept"].to_numpy() == stay).all()
