"""Groups worked a part at a time: whole groups, each row once, and the same choice however they are cut."""

import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_steps import frame_of

from curate.select import catalogue
from curate.select.steps import contradicting_clusters, group_parts
from curate.select.steps.group_parts import GroupParts
from curate.select.steps.ranks import descending, highest, next_in_rank

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import select_memory  # noqa: E402


def cut_small(monkeypatch, rows):
    monkeypatch.setattr(group_parts, "PART_ROWS", rows)
    monkeypatch.setattr(group_parts, "BLOCK", 13)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 999), st.integers(0, 300), st.sampled_from([1, 4, 60, 10**15]), st.integers(1, 100))
def test_parts_have_each_row_once_and_whole_groups(seed, n, values, rows):
    rng = np.random.default_rng(seed)
    group, among = rng.integers(-values, values, n), rng.random(n) < 0.7
    with pytest.MonkeyPatch.context() as patch:
        cut_small(patch, rows)
        parts = GroupParts(group, among)
        found = list(parts)
        first = [parts.first_rows(place, 2).tolist() for place in range(len(parts.sizes))]
    names, place, sizes = np.unique(group[among], return_inverse=True, return_counts=True)
    assert (parts.names == names).all() and (parts.sizes == sizes).all() and parts.num_rows == among.sum()
    got = np.full(n, -1)
    for part in found:
        assert (np.diff(part.rows) > 0).all() and part.size == part.groups.stop - part.groups.start
        got[part.rows] = part.place + part.groups.start
    expected = np.full(n, -1)
    expected[among] = place
    assert (got == expected).all()
    assert sum(len(part.rows) for part in found) == among.sum()
    assert first == [np.flatnonzero(expected == place)[:2].tolist() for place in range(len(names))]
    score = rng.random(n).astype(np.float32)
    score[rng.random(n) < 0.1] = np.nan
    total = np.bincount(place, np.nan_to_num(score[among], nan=-1), minlength=len(names))
    assert (parts.sums(score) == total).all()


@pytest.mark.parametrize(
    "text",
    [
        'balance(cluster, "20%", keep="better:clip_score")',
        "balance(cluster, 131, keep='min:clip_score')",
        "balance(url, 300)",
        "cap(cluster, 7, keep='far')",
        "cap(url, 1)",
    ],
)
def test_the_cuts_do_not_show(monkeypatch, text):
    n, rng = 2_000, np.random.default_rng(5)
    columns = {"clip_score": rng.random(n).round(2), "centroid_similarity": rng.random(n)}
    columns["cluster"] = rng.integers(0, 40, n) ** 2 // 40
    url = rng.integers(0, 900, n) << 40

    def judge():
        frame = frame_of(n, **columns)
        frame.groups = {**frame.groups, "url": lambda: url}
        return catalogue.parse([text])[0].run(frame)

    whole = judge()
    cut_small(monkeypatch, 50)
    parted = judge()
    assert (whole.keep == parted.keep).all() and whole.estimates == parted.estimates
    assert whole.reserve.tolist() == parted.reserve.tolist()


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 999), st.integers(0, 80), st.integers(0, 90))
def test_the_highest_are_the_first_of_the_order(seed, n, count):
    rng = np.random.default_rng(seed)
    values, alive = rng.choice([np.nan, -np.inf, -1, 0, 0.5, np.inf], n), rng.random(n) < 0.8
    order = descending(values, alive)
    assert np.flatnonzero(highest(values, alive, count)).tolist() == sorted(order[:count].tolist())
    assert next_in_rank(values, alive, count).tolist() == order[:count].tolist()


@pytest.mark.parametrize("chain", ["balanced", "cap"])
def test_the_driver_holds_at_most_40_bytes_a_row(chain, monkeypatch):
    """What two sizes of the same pool differ in, so that blocks of a fixed size do not count."""
    monkeypatch.setattr(group_parts, "PART_ROWS", 500)
    monkeypatch.setattr(contradicting_clusters, "MAX_ROWS", 4_000)
    peaks = []
    for rows in (10_000, 25_000):
        frame, texts = select_memory.make_frame(rows), select_memory.CHAINS[chain]("30%")
        tracemalloc.start()
        peaks.append({name: peak for name, _, peak, _ in select_memory.run(frame, texts)})
        tracemalloc.stop()
    for name, peak in peaks[1].items():
        assert (peak - peaks[0][name]) / 15_000 <= 40, name
