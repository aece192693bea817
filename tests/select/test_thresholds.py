"""The counts behind the report's movable cuts are those that select comes to."""

import numpy as np
import pytest
from artefacts import write_embeddings, write_pool

from curate.cluster.cluster import ClusterOptions, cluster
from curate.engine import Job
from curate.select import thresholds
from curate.select.select import NUM_BINS, SelectOptions, _bin_edges, select
from curate.storage import manifest

QUIET = Job(workers=1, quiet=True)


@pytest.fixture(scope="module")
def clustered(tmp_path_factory):
    home = tmp_path_factory.mktemp("cuts")
    emb = write_embeddings(home / "emb", write_pool(home / "pool", ["a", "b"], 90), dim=3)
    cluster(emb, str(home / "clu"), ClusterOptions(k=2), QUIET)
    return str(home / "clu")


def moved(table, low, high):
    """Write the step at other places, as the page does."""
    names = table["names"]
    if table["kind"] != "band":
        return f"{table['kind']}({table['column']}, {names[low if high is None else high]})"
    upper = "0" if high is None else names[high]
    return f"rank({table['column']}, {upper}, {names[low]})"


@pytest.mark.parametrize(
    "step",
    [
        "rank(clip_score, 0.4, 0.6)",
        "rank(centroid_similarity, 0.123456789, 0.7)",
        "mismatch(share=0.1, factor=1.0)",
        "top(clip_score, 20)",
        "above(clip_score, 0.1)",
        "below(centroid_similarity, 0.9731)",
        "at_least(clip_score, 0.1)",
        "at_most(centroid_similarity, 0.98)",
        "above(width, 12.5)",
    ],
)
def test_a_moved_cut_keeps_what_select_keeps(clustered, tmp_path, step):
    steps = ["dedup(0.95)", step, "sample(5)"]
    select(clustered, str(tmp_path / "sel"), SelectOptions(steps=tuple(steps)), QUIET)
    funnel = manifest.load_json(str(tmp_path / "sel" / "funnel.json"))
    [table] = [table for table in funnel["cuts"] if table["step"] == 1]
    assert table["rows"] == funnel["steps"][1]["before"] and sorted(table["values"]) == table["values"]
    low, high = table["low"], table["high"]

    def count(low, high):
        if table["kind"] in ("below", "at_most"):
            return table["kept"][high]
        return table["kept"][low] - (table["kept"][high] if high is not None else 0)

    assert count(low, high) == funnel["steps"][1]["kept"]
    last = len(table["names"]) - 1
    places = [(low, high), (last // 3, None if high is None else 2 * last // 3), (0, high)]
    if table["kind"] in ("below", "at_most"):
        places = [(None, high), (None, last // 2), (None, last)]
    for number, (i, j) in enumerate(places):
        if count(i, j) < 5:
            continue
        text = moved(table, i, j)
        out = str(tmp_path / f"at{number}")
        select(clustered, out, SelectOptions(steps=("dedup(0.95)", text, "sample(5)")), QUIET)
        assert manifest.load_json(f"{out}/funnel.json")["steps"][1]["kept"] == count(i, j), text


def test_scores_that_no_step_cuts_can_be_tried_alone(clustered, tmp_path):
    select(clustered, str(tmp_path / "sel"), SelectOptions(steps=("sample(9)",)), QUIET)
    tables = manifest.load_json(str(tmp_path / "sel" / "funnel.json"))["cuts"]
    assert [(t["column"], t["step"]) for t in tables] == [("clip_score", None), ("centroid_similarity", None)]
    for table in tables:
        assert table["kept"][table["low"]] == table["rows"] == 180
        for place in (40, 120):
            out = str(tmp_path / f"{table['column']}{place}")
            made = select(clustered, out, SelectOptions(steps=(moved(table, place, None),)), QUIET)
            assert made["counts"]["kept"] == table["kept"][place]


def test_cuts_hold_up_on_ties_and_missing_values():
    values = np.array([0.5, 0.5, 0.5, np.nan, 0.25], np.float32)
    band = thresholds.cut("rank", {"column": "c", "lo": 0.2, "hi": 0.6}, values, 2)
    assert band["kept"][band["low"]] - band["kept"][band["high"]] == 2
    above = thresholds.cut("above", {"column": "c", "x": 0.25}, values, 3)
    assert above["kept"][above["low"]] == 3
    third = np.float32(1 / 3)
    tie = thresholds.cut("above", {"column": "c", "x": 1 / 3}, np.array([third, 1], np.float32), 1)
    assert tie["kept"][tie["low"]] == int((np.array([third, 1], np.float32) > 1 / 3).sum())
    empty = thresholds.cut("below", {"column": "c", "x": 1.0}, np.full(3, np.nan, np.float32), 0)
    assert empty["kept"] == [0] and empty["high"] == 0 and empty["low"] is None


def test_the_dedup_curve_counts_ties_as_dedup_does():
    similarity = np.array([0.86, 0.9], np.float32)
    curve = thresholds.dedup_curve(similarity, 0.8, 10)
    at = curve["threshold"].index(0.86)
    assert curve["kept"][at] == 10 - int((similarity > 0.86).sum()) == 9
    also = thresholds.dedup_curve(similarity, 0.8, 10, [0.87654321, 0.86])
    assert len(also["threshold"]) == 101 and also["kept"][also["threshold"].index(0.87654321)] == 9


def test_a_range_too_narrow_for_f32_has_its_bins():
    values = np.array([0.999, 0.9990001, 0.9990002], np.float32)
    for some in (values, values[:1], np.linspace(0, 1, 500, dtype=np.float32)):
        edges = _bin_edges(some)
        assert len(edges) == NUM_BINS + 1 and np.histogram(some, edges)[0].sum() == len(some)
