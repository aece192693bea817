"""Contradicting clusters: against a slow reading of their sentence, and what balance does with them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_coverage import unit
from test_steps import frame_of

from curate.errors import UsageError
from curate.select import catalogue, recipes
from curate.select.steps import contradicting_clusters
from curate.select.steps.group_parts import GroupParts


def likeness(image, text, plain):
    own = np.where(plain, np.cumsum(plain) - 1, -1)
    return contradicting_clusters.likeness(image, text, (image[plain], text[plain]), own)


def few_of_each(groups, chosen):
    parts = GroupParts(groups, np.ones(len(groups), bool))
    return contradicting_clusters.few_of_each(parts, chosen, np.random.default_rng(0))


def slow_likeness(image, text, plain):
    found = []
    for group in range(len(text)):
        others = sorted((-float(text[group] @ text[other]), other) for other in np.flatnonzero(plain) if other != group)
        near = [other for _, other in others[: contradicting_clusters.NEIGHBOURS]]
        found.append(np.mean([image[group] @ image[other] for other in near]) if near else 0)
    return np.array(found)


def directions(seed, groups):
    rng = np.random.default_rng(seed)
    return unit(rng.normal(size=(groups, 5))), unit(rng.normal(size=(groups, 5))), rng.random(groups)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 1000), st.integers(1, 40), st.floats(0, 1))
def test_likeness_is_the_mean_cosine_to_the_pictures_of_the_nearest_captions(seed, groups, share):
    image, text, lots = directions(seed, groups)
    plain = lots < share
    np.testing.assert_allclose(likeness(image, text, plain), slow_likeness(image, text, plain), atol=1e-5)


def test_likeness_does_not_depend_on_the_block(monkeypatch):
    image, text, lots = directions(0, 50)
    whole = likeness(image, text, lots < 0.5)
    monkeypatch.setattr(contradicting_clusters, "BLOCK", 7)
    np.testing.assert_allclose(likeness(image, text, lots < 0.5), whole, atol=1e-6)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 999), st.integers(1, 300), st.integers(1, 30), st.booleans())
def test_the_highest_of_rows_are_those_of_a_sort(seed, columns, count, crowded):
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 2 if crowded else 50, (9, columns)).astype(np.float32)
    count = min(count, columns)
    places, values = contradicting_clusters._highest_of_rows(x, count)
    assert all(len(set(row)) == count for row in places.tolist()) and (np.take_along_axis(x, places, 1) == values).all()
    assert (np.sort(values)[:, ::-1] == np.sort(x)[:, ::-1][:, :count]).all()


def test_few_rows_of_each_group_stand_for_it():
    groups = np.repeat([0, 1, 2], [500, 3, 40])
    few, own = few_of_each(groups, np.arange(3))
    assert (own == groups[few]).all() and np.bincount(own).tolist() == [32, 3, 32] and (np.diff(few) > 0).all()
    x = np.random.default_rng(1).normal(size=(543, 4)).astype(np.float16)
    means = contradicting_clusters.group_means(x[few], own, 3)
    for group in range(3):
        mean = x[few[own == group]].astype(np.float64).mean(axis=0)
        np.testing.assert_allclose(means[group], mean / np.linalg.norm(mean), atol=1e-3)


def test_only_chosen_groups_are_read():
    few, own = few_of_each(np.repeat([5, 6, 9], 20), np.array([0, 2]))
    assert few.tolist() == [*range(20), *range(40, 60)] and own.tolist() == [0] * 20 + [1] * 20


def test_what_is_read_does_not_grow_with_the_groups(monkeypatch):
    monkeypatch.setattr(contradicting_clusters, "MAX_ROWS", 45)
    few, _ = few_of_each(np.repeat(np.arange(3), 100), np.arange(3))
    assert np.bincount(few // 100).tolist() == [15, 15, 15]


def test_few_rows_are_read_in_few_stretches():
    rng = np.random.default_rng(0)
    parts = GroupParts(rng.integers(0, 20, 100_000), rng.random(100_000) < 0.5)
    rows, _ = contradicting_clusters.few_of_each(parts, np.arange(20), rng)
    assert len(rows) == 640 and len(np.unique(rows // contradicting_clusters.STRETCH)) <= 4


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 1000), st.integers(22, 60))
def test_trust_falls_with_spreads_below_the_plainer_half_and_is_full_there(seed, groups):
    image, text, score = directions(seed, groups)
    plain = score <= np.median(score)
    found = slow_likeness(image, text, plain)
    lower, middle = np.quantile(found[plain], [0.16, 0.5])
    spreads = (middle - found) / (middle - lower)
    expected = np.where(plain | (spreads <= 2), 1, np.where(spreads >= 4, 0, (4 - spreads) / 2))
    np.testing.assert_allclose(contradicting_clusters.trust(likeness(image, text, plain), plain), expected, atol=1e-3)


def world(groups=40, each=30, contradicting=4, dim=16, seed=0, captions=True):
    """Groups whose captions follow their pictures, and contradicting ones with pictures of their own.

    Contradicting rows have the highest clip_score.
    """
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(2, dim))  # of kinds of things
    kind = np.arange(groups) % 2
    image = centres[kind] + 0.3 * rng.normal(size=(groups, dim))
    image[:contradicting] = 2 * rng.normal(size=dim) + 0.3 * rng.normal(size=(contradicting, dim))
    text = centres[kind] + 0.3 * rng.normal(size=(groups, dim))
    cluster = np.repeat(np.arange(groups), each)
    score = rng.random(len(cluster)).astype(np.float32) + (cluster < contradicting)
    frame = frame_of(len(cluster), cluster=cluster, clip_score=score)
    images, texts = (unit(x[cluster] + 0.3 * rng.normal(size=(len(cluster), dim))) for x in (image, text))
    frame.vectors = images.astype(np.float16).__getitem__
    frame.text_vectors = texts.astype(np.float16).__getitem__ if captions else None
    frame.writing = lambda rows: cluster[rows] < contradicting
    return frame


def balanced(frame, last):
    text = f'balance(cluster, 200, keep="better:clip_score", contradicting_last={last})'
    verdict = catalogue.parse([text])[0].run(frame)
    assert verdict.keep.sum() == 200
    return np.bincount(frame.group("cluster")[verdict.keep], minlength=40), verdict.estimates


def test_balance_takes_fewer_rows_of_contradicting_groups():
    plain, _ = balanced(world(), False)
    assert (plain == 5).all()
    counts, told = balanced(world(), True)
    assert counts[:4].sum() == 0 and counts[4:].min() >= 5
    assert told["contradicting_groups"] == 4 and told["contradicting_kept"] == 0 and told["contradicting_rows"] == 120
    again, _ = balanced(world(), True)
    assert (again == counts).all()


@pytest.mark.parametrize("share, doubted", [(0.4, 0), (0.6, 4)])
def test_only_groups_that_are_mostly_writing_are_doubted(share, doubted):
    frame = world()
    frame.writing = lambda rows: rows % 10 < 10 * share
    counts, told = balanced(frame, True)
    assert told["contradicting_groups"] == doubted and (counts[:4].sum() == 0) == (doubted == 4)
    assert told["unlike_but_kept_groups"] == 4 - doubted and ("unlike_but_kept" in told) == (doubted == 0)


def test_where_nobody_looked_for_writing_no_group_is_doubted_but_by_name():
    frame = world()
    frame.writing = None
    counts, told = balanced(frame, True)
    assert (counts == 5).all() and told["unlike_but_kept_rows"] == 120 and "which pictures are writing" in told["why"]
    verdict = catalogue.parse(["balance(cluster, 200, contradicting_last=True, written=False)"])[0].run(frame)
    assert verdict.estimates["contradicting_rows"] == 120


@pytest.mark.parametrize("turn", [100, 190])
def test_more_groups_than_are_looked_at_in_one_turn_are_doubted_all_the_same(monkeypatch, turn):
    monkeypatch.setattr(contradicting_clusters, "MAX_ROWS", turn * contradicting_clusters.LEAST_EACH)
    for seed in range(3):
        frame = world(groups=200, each=12, seed=seed)
        verdict = catalogue.parse(["balance(cluster, 400, contradicting_last=True)"])[0].run(frame)
        counts = np.bincount(frame.group("cluster")[verdict.keep], minlength=200)
        facts = verdict.estimates
        assert counts[:4].sum() == 0 and 4 <= facts["contradicting_groups"] <= 8 and "why" not in facts
        assert counts.sum() == 400 and counts[4:].max() <= 3


def test_many_groups_are_weighed_by_a_sample_of_the_plain_ones(monkeypatch):
    """Each group is one row of its own direction; the yardstick is half a turn of them. Against the slow reading."""
    monkeypatch.setattr(contradicting_clusters, "MAX_ROWS", 200 * contradicting_clusters.LEAST_EACH)
    image, text, score = directions(3, 450)
    fetched = []

    def fetch(rows):
        fetched.append(len(rows))
        return image[rows].astype(np.float32)

    parts = GroupParts(np.arange(450), np.ones(450, bool))
    fetches = fetch, lambda rows: text[rows]
    found = contradicting_clusters.weigh(parts, score, fetches, np.random.default_rng(0))
    plain = score <= np.median(score)
    sample = np.zeros(450, bool)
    sample[np.sort(np.random.default_rng(0).choice(np.flatnonzero(plain), 100, replace=False))] = True
    assert max(fetched) <= 200 and (found[plain] == 1).all()
    np.testing.assert_allclose(
        found, contradicting_clusters.trust(slow_likeness(image, text, sample), plain), atol=1e-3
    )


def test_unlike_pictures_that_score_low_keep_their_share():
    frame = world()
    score = frame.column("clip_score")
    score[frame.group("cluster") < 4] -= 1.5
    score[frame.group("cluster") >= 4] = 0.5
    counts, told = balanced(frame, True)
    assert (counts == 5).all() and told["contradicting_groups"] == 0


@pytest.mark.parametrize(
    "frame, why", [(world(captions=False), "no caption embeddings"), (world(groups=12), "too few")]
)
def test_where_no_contradiction_can_be_seen_the_funnel_says_why(frame, why):
    counts, told = balanced(frame, True)
    assert why in told["why"] and told["contradicting_groups"] == 0 and np.ptp(counts[counts > 0]) <= 1


def test_contradicting_groups_fill_up_last():
    frame = world()
    verdict = catalogue.parse(["balance(cluster, 1_100, contradicting_last=True)"])[0].run(frame)
    assert verdict.keep.sum() == 1_100 and verdict.estimates["contradicting_kept"] == 20  # 1,080 rows are of the others


def test_the_default_puts_contradicting_groups_last():
    assert "contradicting_last=True" in recipes.steps("balanced", "2%")[-1]


def test_the_former_name_of_the_option_works_and_says_the_new_one(caplog):
    step = catalogue.parse(["balance(cluster, 200, wary=True)"])[0]
    assert step.arguments["contradicting_last"] is True and step.text.endswith("wary=True)")
    assert "balance: wary= is called contradicting_last= now" in caplog.text
    with pytest.raises(UsageError, match="contradicting_last twice"):
        catalogue.parse(["balance(cluster, 200, wary=True, contradicting_last=True)"])
    with pytest.raises(UsageError, match="unknown argument of cap 'wary'"):
        catalogue.parse(["cap(cluster, 2, wary=True)"])
