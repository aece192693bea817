"""Steps: how they are written and refused, and that each counts exactly as its definition says."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curate.errors import UsageError
from curate.select import catalogue, computed_columns, recipes
from curate.select.catalogue import STEPS
from curate.select.frame import Frame
from curate.select.steps import auto_threshold, by_score, ranks
from curate.select.steps.quotas import water_fill, water_fill_tree, weighted_fill


def frame_of(n=100, seed=0, good=None, **columns):
    rng = np.random.default_rng(seed)
    columns = {"clip_score": rng.random(n).astype(np.float32), "cluster": rng.integers(0, 7, n)} | columns
    return Frame(
        good=np.ones(n, bool) if good is None else good,
        columns={name: (lambda values=values: values) for name, values in columns.items()},
        groups={"cluster": lambda: columns["cluster"]},
        seed=seed,
        compute=computed_columns.compute,
    )


def run(frame, *texts):
    for step in catalogue.parse(texts):
        step.check(frame)
        frame.alive &= step.run(frame).keep
    return frame.alive


def slow_rank(values, alive, lo, hi):
    rows = [row for row in range(len(values)) if alive[row]]
    rows.sort(key=lambda row: (np.isnan(values[row]), -values[row], row))
    return set(rows[round(lo * len(rows)) : round(hi * len(rows))])


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 200), st.integers(0, 9), st.tuples(st.floats(0, 1), st.floats(0, 1)), st.booleans())
def test_bands_are_global_ranks_from_the_top_with_exact_counts(n, seed, band, ties):
    lo, hi = sorted(band)
    values = (
        np.random.default_rng(seed).integers(0, 5, n).astype(float) if ties else np.random.default_rng(seed).random(n)
    )
    frame = frame_of(n, seed, good=np.random.default_rng(seed + 1).random(n) > 0.2, clip_score=values)
    if lo < hi and frame.alive.any():
        expected = slow_rank(values, frame.alive, lo, hi)
        assert set(np.flatnonzero(run(frame, f"rank(clip_score, {lo}, {hi})")).tolist()) == expected


def test_two_bands_compose_and_three_thirds_share_the_rows():
    frame = frame_of(1000, other=np.random.default_rng(5).random(1000))
    first = slow_rank(frame.column("clip_score"), frame.alive, 0.4, 0.6)
    second = slow_rank(frame.column("other"), np.isin(np.arange(1000), list(first)), 0.15, 0.35)
    run(frame, "rank(clip_score, 0.40, 0.60)", "rank(other, 0.15, 0.35)")
    assert set(np.flatnonzero(frame.alive).tolist()) == second and len(second) == 40
    parts = [run(frame_of(1000), f"rank(clip_score, {i / 3}, {(i + 1) / 3})") for i in range(3)]
    assert np.sum(parts, axis=0).tolist() == [1] * 1000


def test_rows_without_a_value_rank_last_and_pass_no_threshold():
    values = np.array([0.1, np.nan, 0.3, 0.2])
    assert run(frame_of(4, clip_score=values), "rank(clip_score, 0, 0.75)").tolist() == [True, False, True, True]
    assert run(frame_of(4, clip_score=values), "above(clip_score, 0.1)").tolist() == [False, False, True, True]
    assert run(frame_of(4, clip_score=values), "below(clip_score, 0.3)").tolist() == [True, False, False, True]
    assert run(frame_of(4, clip_score=values), "top(clip_score, 2)").tolist() == [False, False, True, True]


@pytest.mark.parametrize(
    "text, count",
    [("sample(30)", 30), ("sample(0.3)", 27), ('sample("30%")', 27), ("sample(n=30%)", 27), ("sample(1_000)", 90)],
)
def test_samples_are_exact_and_shares_count_the_good_rows(text, count):
    frame = frame_of(100, good=np.arange(100) >= 10)
    assert run(frame, text).sum() == count and not frame.alive[:10].any()


def test_a_sample_depends_on_the_seed_and_the_place_in_the_funnel_alone():
    draws = [run(frame_of(seed=seed), "above(clip_score, -1)", "sample(50)").tolist() for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
    assert run(frame_of(seed=1), "sample(50)").tolist() != draws[0]
    assert run(frame_of(seed=1), "sample(50, 7)").tolist() == run(frame_of(seed=2), "sample(50, seed=7)").tolist()


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=30), st.data())
def test_water_filling_is_exact_and_level(sizes, data):
    sizes = np.array(sizes)
    total = data.draw(st.integers(0, int(sizes.sum())))
    quotas, level = water_fill(sizes, total, np.random.default_rng(0))
    assert quotas.sum() == total and (quotas <= sizes).all() and (quotas >= 0).all()
    assert quotas.max() - quotas[quotas < sizes].min(initial=quotas.max()) <= 1  # who is not exhausted is at the level
    assert ((quotas == level) | (quotas == level + 1) | (quotas == sizes)).all()


def test_balance_gives_exactly_n_and_spares_small_groups():
    groups = np.repeat([0, 1, 2, 3], [50, 3, 20, 27])
    frame = frame_of(100, cluster=groups)
    run(frame, "balance(cluster, 33)")
    assert np.bincount(groups[frame.alive], minlength=4).tolist() == [10, 3, 10, 10]
    frame = frame_of(100, cluster=groups)
    verdict = catalogue.parse(["balance(cluster, 500)"])[0].run(frame)
    assert verdict.keep.all() and verdict.estimates["asked"] == 500 and verdict.estimates["available"] == 100


def test_balance_among_the_best_shares_the_budget_out_over_these_alone():
    frame = frame_of(100)
    values, groups = frame.column("clip_score"), frame.group("cluster")
    for keep, order in (("max", np.argsort(-values)), ("min", np.argsort(values)), ("better", np.argsort(-values))):
        best = order[:40]
        kept = run(frame_of(100), f'balance(cluster, 25, keep="{keep}:clip_score", among=40%)')
        counts, sizes = (np.bincount(groups[rows], minlength=7) for rows in (kept, best))
        assert kept.sum() == kept[best].sum() == 25
        assert all(count == size or count >= counts.max() - 1 for count, size in zip(counts, sizes, strict=True))
    kept = run(frame_of(100), 'balance(cluster, 60, keep="better:clip_score", among=40%)')
    assert (kept == run(frame_of(100), "top(clip_score, 60)")).all()
    assert run(frame_of(100), 'balance(cluster, 200, keep="max:clip_score", among=3)').all()
    with pytest.raises(UsageError, match="needs keep to name a column"):
        run(frame_of(100), 'balance(cluster, 20, keep="near", among=30)')


def test_dedup_with_a_budget_spares_the_best_copies_where_fewer_rows_match():
    """1,200 pictures, the last third under captions as good as shuffled, and 800 copies of the first."""
    row = np.arange(2000)
    source = np.where(row < 1200, row, row - 1200)
    scores = np.where(source < 800, 0.8 - row / 20_000, 0.1 + 0.0005 * (source - 800)).astype(np.float32)
    pairs = row[1200:] - 1200, row[1200:], np.full(800, 0.99, np.float32), np.full(800, 255, np.uint8)

    def kept(shuffled, budget=1000, text_vectors=lambda rows: rows):
        frame = frame_of(2000, clip_score=scores, centroid_similarity=-row / 2000)
        frame.edges, frame.floor = (lambda: pairs), 0.8
        frame.shuffled, frame.text_vectors = shuffled, text_vectors
        verdict = catalogue.parse([f'dedup(0.9, keep="near", budget={budget})'])[0].run(frame)
        assert verdict.keep[:1200].all()
        spared = np.flatnonzero(verdict.keep[1200:])
        assert len(spared) == verdict.estimates.get("copies_spared", 0)
        return spared.tolist()

    weak, strong = np.linspace(0.1, 0.3, 101), np.linspace(-0.3, -0.1, 101)
    spared = kept(weak)  # between 600 of the 1,200, half as many again as mismatch, and twice the least that do
    assert 200 < len(spared) <= 400 and spared == list(range(len(spared)))
    assert kept(strong) == [] and kept(weak, budget=500) == [] and kept(weak, text_vectors=None) == []


def test_few_scores_spare_no_copies():
    """60 pictures, 20 under captions as good as shuffled, say too little of how many match."""
    row = np.arange(100)
    source = np.where(row < 60, row, row - 60)
    scores = np.where(source < 40, 0.8 - row / 1000, 0.1 + 0.01 * (source - 40)).astype(np.float32)
    frame = frame_of(100, clip_score=scores, centroid_similarity=-row / 100)
    pairs = row[60:] - 60, row[60:], np.full(40, 0.99, np.float32), np.full(40, 255, np.uint8)
    frame.edges, frame.floor = (lambda: pairs), 0.8
    frame.shuffled, frame.text_vectors = np.linspace(0.1, 0.3, 101), lambda rows: rows
    assert catalogue.parse(['dedup(0.9, keep="near", budget=50)'])[0].run(frame).keep.sum() == 60


def test_cap_keeps_at_most_n_of_a_group_by_chance_or_by_value():
    frame = frame_of(100)
    groups, values = frame.group("cluster"), frame.column("clip_score")
    run(frame, 'cap(cluster, 3, keep="max:clip_score")')
    for group in range(7):
        members = np.flatnonzero(groups == group)
        assert set(members[np.argsort(-values[members])[:3]]) == set(members[frame.alive[members]])
    frame = frame_of(100)
    assert np.bincount(groups[run(frame, "cap(cluster, 5)")]).tolist() == [min(5, n) for n in np.bincount(groups)]


@pytest.mark.parametrize(
    "text, words",
    [
        ("rnak(clip_score, 0, 1)", "unknown step 'rnak'.*did you mean 'rank'"),
        ("rank(clip_scor, 0, 1)", "unknown column 'clip_scor'.*did you mean 'clip_score'"),
        ("rank(clip_score, low=0, hi=1)", "unknown argument of rank 'low'.*lo"),
        ("rank(clip_score, 0.5)", r"lacks hi; write rank\(column, lo, hi\)"),
        ("rank(clip_score, 0, 1, 2)", "has 4 arguments"),
        ("rank(clip_score, 0, lo=1)", "gives lo twice"),
        ("rank(clip_score, 0.6, 0.4)", "lo < hi"),
        ("rank(clip_score, '0', 1)", "expected a number"),
        ("rank(0.1, 0, 1)", "name of a column"),
        ("rank", "not a call"),
        ("rank(clip_score, 0, 1); sample(3)", "not a call"),
        ("__import__('os').system('true')", "not a call"),
        ("sample(__import__('os'))", "not a literal"),
        ("sample(0)", "number of rows"),
        ("sample(-5)", "number of rows"),
        ("sample(2.5)", "number of rows"),
        ("sample('many')", "number of rows"),
        ("sample(200%)", "number of rows"),
        ("sample('300%')", "number of rows"),
        ("dedup(0.86)", "needs clusters"),
        ("dedup(1.5)", "cosine below 1"),
        ("dedup(0.86, keep=middle)", "middle is not a literal.*put it in quotes"),
        ("dedup(0.86, rule='cc')", "unknown rule.*components, greedy, semdedup"),
        ("rank(centroid_similarity, 0, 1)", "needs clusters"),
        ("cap(cluster, 2, keep='best')", "unknown policy"),
        ("mismatch(share=2)", "share between 0 and 1"),
        ("(" * 500, "not a call"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(text, words):
    with pytest.raises(UsageError, match=words) as caught:
        run(frame_of(), text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("planted", [0, 0.05, 0.25])
@pytest.mark.parametrize("gap", [1.5, 4])
def test_the_interval_of_the_mismatch_share_holds_what_was_planted(planted, gap):
    held = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        scores = np.where(rng.random(2_000) < planted, rng.normal(size=2_000), gap + rng.normal(size=2_000))
        shuffled = np.quantile(rng.normal(size=20_000), np.linspace(0, 1, 101))
        share, facts = auto_threshold.mismatch_share(scores.astype(np.float32), shuffled)
        assert facts["share_from"] <= share <= facts["share_to"] <= share + 0.15
        held.append(facts["share_from"] <= planted <= facts["share_to"])
    assert np.mean(held) >= 0.9


def test_a_mismatch_share_is_read_off_shuffled_pairs():
    rng = np.random.default_rng(0)
    shuffled = np.quantile(rng.normal(0, 1, 50_000), np.linspace(0, 1, 101))
    for share in (0.0, 0.1, 0.3):
        wrong = rng.random(20_000) < share
        scores = np.where(wrong, rng.normal(0, 1, 20_000), rng.normal(5, 1, 20_000))
        found, _ = auto_threshold.mismatch_share(scores, shuffled)
        assert abs(found - share) < 0.02


def test_mismatch_drops_the_lowest_scores_but_never_eats_the_budget():
    n = 1000
    scores = np.arange(n, dtype=float)
    assert np.flatnonzero(run(frame_of(n, clip_score=scores), "mismatch(0.1, factor=1.5)")).min() == 150
    assert run(frame_of(n, clip_score=scores), "mismatch(0.1, factor=1.5, budget=990)").sum() == 990
    assert run(frame_of(n, clip_score=scores), 'mismatch(0.1, budget="2%")').sum() == 700
    assert run(frame_of(n, clip_score=scores), "mismatch(0.1, budget=500)").sum() == 750  # room to choose from
    assert run(frame_of(n, clip_score=scores), "mismatch(0.1, budget=700)").sum() == 800  # twice the share goes surely
    assert run(frame_of(n, clip_score=scores), "mismatch(0.1, budget=900)").sum() == 900
    [step] = catalogue.parse(["mismatch(0.1, budget=950)"])
    assert step.run(frame_of(n, clip_score=scores)).estimates["why"] == (
        "100 look mismatched, but the budget leaves only 50 to drop"
    )
    assert run(frame_of(n, clip_score=scores), "mismatch(0.1)").sum() == 700


def test_better_rows_come_first_by_tenths_of_their_group_at_random_inside_each():
    """Of 40 and of 20 rows 6 each: the 4 of the first tenth and 2 of the next, and the 2, 2 and 2 of three tenths."""
    n, group = 60, np.repeat([0, 1], [40, 20])
    step = 'balance(cluster, 12, keep="better:clip_score")'
    scores = np.random.default_rng(3).permutation(n).astype(float)
    scores[7] = np.nan
    drawn = set()
    for seed in range(20):
        kept = run(frame_of(n, seed=seed, clip_score=scores, cluster=group), step)
        for which, size, expected in ((0, 40, (4, 2, 0)), (1, 20, (2, 2, 2))):
            ranks = np.argsort(np.argsort(-np.nan_to_num(scores[group == which], nan=-1)))
            tenths = ranks[kept[group == which]] // (size // 10)
            assert tuple(np.bincount(tenths, minlength=3)) == expected
        drawn.add(tuple(np.flatnonzero(kept)))
    assert len(drawn) > 1


def linked(rng, n, copies, split=0.95):
    """Edges: look-alikes, and above `split` near-copies, a third of which are no pixel twins."""
    similarity = np.concatenate([rng.uniform(split, 1, copies), 1 - 0.2 * rng.random(n - copies) ** 0.3])
    bits = np.where(rng.random(copies) < 2 / 3, rng.integers(0, 9, copies), rng.integers(9, 17, copies))
    bits = np.concatenate([bits, np.clip(rng.normal(28, 5, n - copies), 0, 64)])
    return similarity.astype(np.float32), bits.astype(np.uint8)


def test_the_threshold_lies_where_most_pairs_are_duplicates_by_their_pixels():
    similarity, bits = linked(np.random.default_rng(0), 5_000, 600)
    found = auto_threshold.find_threshold(similarity, bits, 0.8)
    taken = found.rule.links(similarity, bits)
    assert 0.93 < found.threshold < 0.97 and taken[:600].mean() > 0.9 and taken[600:].sum() < 5


@pytest.mark.parametrize("copies", [30, 100, 1_000, 3_000])
@pytest.mark.parametrize("n", [4_000, 20_000])
def test_few_or_many_duplicates_are_found_and_few_look_alikes_with_them(copies, n):
    similarity, bits = linked(np.random.default_rng(copies), n, copies, 0.99)
    taken = auto_threshold.find_threshold(similarity, bits, 0.8).rule.links(similarity, bits)
    assert taken[copies:].sum() < 0.002 * n and (taken[:copies].mean() > 0.9 or copies == 30)


def test_without_evidence_the_threshold_is_timid():
    rng = np.random.default_rng(1)
    similarity, bits = linked(rng, 5_000, 3)
    found = auto_threshold.find_threshold(similarity, bits, 0.8)
    assert found.threshold == auto_threshold.TIMID and found.rule.links(similarity, bits).sum() <= 3
    unknown = np.full(5_000, 255, np.uint8)
    assert "no perceptual" in auto_threshold.find_threshold(similarity, unknown, 0.8).reason
    assert (
        auto_threshold.find_threshold(similarity, unknown, 0.8).rule.links(similarity, unknown) == (similarity > 0.999)
    ).all()
    few = np.where(rng.random(5_000) < 0.1, 3, 30).astype(np.uint8)  # twins anywhere, nowhere the majority
    assert auto_threshold.find_threshold(similarity, few, 0.8).threshold == auto_threshold.TIMID
    assert auto_threshold.find_threshold(similarity[:0], bits[:0], 0.8).threshold == auto_threshold.TIMID


@pytest.mark.parametrize("name", recipes.RECIPES)
@pytest.mark.parametrize("n", ["", 2_000, 0.02, "2%"])
def test_every_recipe_is_made_of_steps_that_parse(name, n):
    needs_target = name in ("datacomp-image", "datacomp-best", "neg-clip-loss-norm-sim")
    parsed = catalogue.parse(recipes.steps(f'{name}("emb/target")' if needs_target else name, n))
    assert parsed and all(step.name in STEPS for step in parsed)


def test_the_paper_chain_is_written_as_published():
    assert recipes.steps("bunny", 2_000_000) == [
        'dedup(0.86, keep="middle", rule="components")',
        "rank(clip_score, 0.40, 0.60)",
        "rank(centroid_similarity, 0.15, 0.35)",
        "sample(2000000)",
    ]


def test_unknown_recipes_and_budgets_are_refused():
    with pytest.raises(UsageError, match="did you mean 'bunny'"):
        recipes.steps("buny")
    with pytest.raises(UsageError, match="--n 20000"):
        recipes.steps("bunny", "lots")
    with pytest.raises(UsageError, match=r"datacomp-image\(\)' lacks target; write datacomp-image\(target\)"):
        recipes.steps("datacomp-image")
    with pytest.raises(UsageError, match="unknown argument of llava-cc3m 'extract'"):
        recipes.steps("llava-cc3m(extract='simple')")
    with pytest.raises(UsageError, match="has 1 arguments"):
        recipes.steps("bunny(0.9)")


def test_recipes_take_arguments():
    assert recipes.steps('datacomp-best("emb/imagenet")', "2%") == [
        "rank(clip_score, 0, 0.30)",
        "above(caption_words, 1)",
        "above(caption_chars, 5)",
        "image_based('emb/imagenet')",
        'sample("2%")',
    ]
    assert recipes.steps("llava-cc3m(extractor='spacy:x')")[0].endswith("extractor='spacy:x')")
    assert recipes.RECIPES["metaclip"].signature("metaclip") == "metaclip(entries='pool', t=20000)"
    assert recipes.RECIPES["bunny"].signature("bunny") == "bunny"


def test_without_evidence_of_a_kind_only_pixel_twins_are_merged():
    similarity = np.array([0.9995, 0.9996, 0.9997, 0.95], np.float32)
    found = auto_threshold.find_threshold(similarity, np.array([3, 30, 255, 2], np.uint8), 0.8)
    assert found.threshold == auto_threshold.TIMID and "only 2 pixel twins" in found.reason
    assert found.rule.links(similarity, np.array([3, 30, 255, 2], np.uint8)).tolist() == [True, False, True, False]


def test_an_embedder_that_cannot_tell_pairs_drops_none():
    rng = np.random.default_rng(0)
    shuffled = np.quantile(rng.normal(size=10_000), np.linspace(0, 1, 101))
    share, facts = auto_threshold.mismatch_share(rng.normal(size=5_000).astype(np.float32), shuffled)
    assert share == 0 and "cannot tell" in facts["why"]
    scores = np.concatenate([rng.normal(size=1_000), rng.normal(6, 1, size=4_000)]).astype(np.float32)
    assert abs(auto_threshold.mismatch_share(scores, shuffled)[0] - 0.2) < 0.02


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 30), st.floats(0.01, 5)), min_size=1, max_size=20), st.data())
def test_a_weighted_budget_is_exact_and_proportional_until_a_group_is_full(groups, data):
    sizes, weights = (np.array(column) for column in zip(*groups, strict=True))
    total = data.draw(st.integers(0, int(sizes.sum())))
    quotas = weighted_fill(sizes, weights, total)
    assert quotas.sum() == total and (quotas <= sizes).all() and (quotas >= 0).all()
    low, high = 0.0, 1e5
    for _ in range(100):  # the level at which min(size, level * weight) sums to the total
        middle = (low + high) / 2
        low, high = (middle, high) if np.minimum(sizes, middle * weights).sum() <= total else (low, middle)
    assert np.abs(quotas - np.minimum(sizes, low * weights)).max() < 1 + 1e-6


def test_groups_of_no_weight_take_what_nobody_else_can():
    assert weighted_fill(np.array([4, 4, 4]), np.array([0.0, 1.0, 0.0]), 8).tolist() == [2, 4, 2]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(-324, 0)), min_size=1, max_size=20), st.data())
def test_weights_of_any_size_meet_the_budget(groups, data):
    sizes, powers = (np.array(column) for column in zip(*groups, strict=True))
    total = data.draw(st.integers(0, int(sizes.sum())))
    quotas = weighted_fill(sizes, 10.0**powers, total)
    assert quotas.sum() == total and (quotas <= sizes).all() and (quotas >= 0).all()


def slow_tree(sizes, parents, total, rng):
    """Follow one row at a time: each goes down the tree to the least filled branch that has room."""
    quotas = np.zeros(len(sizes), int)
    path = [[leaf] for leaf in range(len(sizes))]
    for leaf in path:
        for above in parents:
            leaf.append(int(above[leaf[-1]]))
    for _ in range(total):
        open_leaves = [leaf for leaf in range(len(sizes)) if quotas[leaf] < sizes[leaf]]
        for level in range(len(parents), -1, -1):
            filled = {}
            for leaf in range(len(sizes)):
                filled[path[leaf][level]] = filled.get(path[leaf][level], 0) + quotas[leaf]
            least = min(filled[path[leaf][level]] for leaf in open_leaves)
            node = min(path[leaf][level] for leaf in open_leaves if filled[path[leaf][level]] == least)
            open_leaves = [leaf for leaf in open_leaves if path[leaf][level] == node]
        quotas[open_leaves[0]] += 1
    return quotas


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10_000), st.integers(1, 12), st.integers(1, 4), st.integers(1, 2))
def test_a_budget_down_a_tree_is_exact_and_even_at_every_node(seed, leaves, nodes, tops):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(0, 12, leaves)
    parents = [rng.integers(0, nodes, leaves), rng.integers(0, tops, nodes)]
    parents[0][: min(nodes, leaves)] = np.arange(min(nodes, leaves))
    nodes = int(parents[0].max()) + 1
    parents[1] = np.unique(parents[1][:nodes], return_inverse=True)[1]
    total = int(rng.integers(0, sizes.sum() + 1))
    quotas = water_fill_tree(sizes, parents, total, rng)
    assert quotas.sum() == total and (quotas <= sizes).all()
    slow = slow_tree(sizes, parents, total, rng)
    for above in (None, *parents):  # who gets the last row of a node is drawn; all else is the one-by-one rule
        if above is not None:
            quotas, slow = np.bincount(above, quotas), np.bincount(above, slow)
        assert abs(quotas - slow).max(initial=0) <= len(parents)
    assert sorted(quotas) == sorted(slow)


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.tuples(st.sampled_from([0.5, -0.0, 0.0, 1.0, -2.0, np.nan, np.inf]), st.booleans()), max_size=30),
    st.data(),
)
def test_the_highest_are_the_first_of_the_descending_order(rows, data):
    values = np.array([value for value, _ in rows], np.float32)
    alive = np.array([flag for _, flag in rows], bool)
    count = data.draw(st.integers(0, int(alive.sum())))
    first = ranks.descending(values, alive)[:count]
    assert np.flatnonzero(by_score.highest(values, alive, count)).tolist() == sorted(first.tolist())
