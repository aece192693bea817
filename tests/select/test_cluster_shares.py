"""Clusters that a selection starved or favoured, held against the rule written out."""

import json

import numpy as np
import pyarrow as pa
from artefacts import write_embeddings, write_pool
from hypothesis import given
from hypothesis import strategies as st

from curate.cluster.cluster import ClusterOptions, cluster
from curate.engine import Job
from curate.report import show
from curate.select import cluster_shares
from curate.select.select import SelectOptions, select
from curate.storage import manifest
from house import curate

QUIET = Job(workers=1, quiet=True)


@given(st.lists(st.tuples(st.integers(0, 200), st.floats(0, 1)), min_size=1, max_size=20))
def test_the_extremes_are_those_of_the_rule(drawn):
    before = np.array([rows for rows, _ in drawn])
    after = np.array([int(rows * share) for rows, share in drawn])
    starved, favoured = cluster_shares.extremes(before, after, 99)
    share = after.sum() / max(1, before.sum())
    for c, (rows, kept) in enumerate(zip(before.tolist(), after.tolist(), strict=True)):
        expected = rows * share
        assert (c in starved) == (expected >= 3 and kept / expected < 0.5)
        assert (c in favoured) == (kept >= 3 and kept / expected > 2)
    assert [after[c] / before[c] for c in starved] == sorted(after[c] / before[c] for c in starved)


def test_a_selection_names_the_clusters_that_it_starves(tmp_path):
    topics = ("red car", "sandy beach", "grey cat", "old church")
    pool = write_pool(tmp_path / "pool", ["a", "b"], 60, caption=lambda row: f"a {topics[row % 4]} {row}")
    emb = write_embeddings(tmp_path / "emb", pool, dim=4)
    cluster(emb, str(tmp_path / "clu"), ClusterOptions(k=3), QUIET)
    select(str(tmp_path / "clu"), str(tmp_path / "sel"), SelectOptions(steps=("top(centroid_similarity, 30)",)), QUIET)
    funnel = json.loads((tmp_path / "sel" / "funnel.json").read_text())
    account = funnel["clusters"]
    assert account["share"] == 0.25
    assert all(entry["rows"] > 0 and isinstance(entry["words"], str) for entry in account["starved"])
    # Every row of one topic dropped: its cluster is called by that topic's words.
    labels = np.arange(120) % 4
    embedded = manifest.open_input(emb)
    labelled = _Labelled({"a": labels[:60], "b": labels[60:]})
    found = cluster_shares.account(embedded, labelled, labels, labels != 1)
    [starved] = found["starved"]
    assert (starved["cluster"], starved["rows"], starved["kept"]) == (1, 30, 0)
    assert starved["words"].split(", ")[0] == "sandy beach"


class _Labelled:
    """Clusters with given labels."""

    def __init__(self, labels):
        self.labels = labels

    def table(self, stem, columns):
        return pa.table({"cluster": pa.array(self.labels[stem], pa.int32())})


def test_select_prints_the_funnel_and_the_clusters_by_name(tmp_path):
    topics = ("red car", "sandy beach")
    pool = write_pool(tmp_path / "pool", ["a"], 80, caption=lambda row: f"\x1b[31m{topics[row % 2]} {row}")
    cluster(write_embeddings(tmp_path / "emb", pool, dim=3), str(tmp_path / "clu"), ClusterOptions(k=2), QUIET)
    printed = curate("select", tmp_path / "clu", tmp_path / "sel", "--step", "bottom(centroid_similarity, 20)").stdout
    assert "20  −60 by bottom(centroid_similarity, 20)" in printed and "\x1b" not in printed
    lines = list(
        show.cluster_lines(
            {"clusters": {"share": 0.1, "starved": [{"cluster": 7, "rows": 90, "kept": 0, "words": "car"}]}}
        )
    )
    assert lines == [
        "  clusters that kept least of their rows (all: 10.0%)",
        f"  {'0 of 90':>24}      (0.0%)  cluster 7: car",
    ]
