"""Duplicate groups, placeholders and starved clusters on the page, held against the sidecars read row by row."""

import base64
import csv
import io
import re
from collections import defaultdict

import pytest
from artefacts import write_embeddings, write_pool
from hypothesis import given
from hypothesis import strategies as st

from curate.cluster.cluster import ClusterOptions, cluster
from curate.engine import Job
from curate.report import duplicates
from curate.report.report import ReportOptions, report
from curate.select.select import SelectOptions, select
from curate.storage import manifest

QUIET = Job(workers=1, quiet=True)
TOPICS = ("red car", "sandy beach", "grey cat")


def make(tmp_path, steps, caption=lambda row: f"a {TOPICS[row % 3]} {row % 5}", k=3):
    emb = write_embeddings(tmp_path / "emb", write_pool(tmp_path / "pool", ["a", "b", "c"], 50, caption=caption), dim=3)
    cluster(emb, str(tmp_path / "clu"), ClusterOptions(k=k), QUIET)
    select(str(tmp_path / "clu"), str(tmp_path / "sel"), SelectOptions(steps=steps), QUIET)
    report(str(tmp_path / "sel"), str(tmp_path / "r.html"), ReportOptions(), QUIET)
    return (tmp_path / "r.html").read_text("utf-8")


def tables(text):
    """The tables that the page lets a reader download, by file name."""
    links = re.findall(r'download="([^"]+)" href="data:text/csv;charset=utf-8;base64,([^"]+)"', text)
    return {name: list(csv.DictReader(io.StringIO(base64.b64decode(data).decode()))) for name, data in links}


def rows_of(selection):
    artefact = manifest.open_input(str(selection))
    rows = []
    for stem in artefact.stems:
        rows += [{**row, "stem": stem} for row in artefact.table(stem).to_pylist()]
    return rows


@pytest.mark.parametrize("most", [duplicates.LISTED, 5])
def test_every_group_is_listed_with_its_keys_the_largest_first(tmp_path, monkeypatch, most):
    monkeypatch.setattr(duplicates, "LISTED", most)
    text = make(tmp_path, ("dedup(0.97)", "sample(20)"))
    groups = defaultdict(list)
    for row in rows_of(tmp_path / "sel"):
        if row["component"] is not None:
            groups[row["component"]].append(row)
    groups = {head: rows for head, rows in groups.items() if len(rows) > 1}
    sizes = sorted(map(len, groups.values()), reverse=True)
    assert sizes[0] > 3 and f"{sum(sizes)} rows in {len(groups)} groups, the largest of {sizes[0]} rows" in text
    listed = tables(text)["duplicate-groups.csv"]
    found = defaultdict(list)
    for entry in listed:
        found[entry["group"]].append(entry)
    if most == 5:
        assert len(listed) <= max(5, sizes[0])
        return
    assert [len(entries) for entries in found.values()] == sizes
    expected = {frozenset((row["key"], row["stem"], str(row["kept"])) for row in rows) for rows in groups.values()}
    assert {frozenset((e["key"], e["shard"], e["kept"]) for e in entries) for entries in found.values()} == expected
    by_key = {row["key"]: row for rows in groups.values() for row in rows}
    assert all(entry["dropped_by"] == (by_key[entry["key"]]["dropped_by"] or "") for entry in listed)
    strips = re.findall(
        r'<ul class="cards strip".*?</ul>', text.split('id="duplicates"')[1].split("</section>")[0], re.S
    )
    assert len(strips) == min(len(groups), duplicates.GROUPS)
    assert [strip.count("<li>") for strip in strips] == [min(size, duplicates.MEMBERS) for size in sizes[: len(strips)]]


def test_a_downloaded_table_holds_no_formula():
    from curate.report.report import _csv

    rows = [
        ("key", "row", "caption"),
        ("-dQw4", -3, "-2+3+cmd|' /C calc'!A0"),
        ("=1+1", 2, "a = b, @home"),
        ("a", 0.5, "+1"),
    ]
    text = base64.b64decode(_csv(rows).partition("base64,")[2]).decode()
    assert list(csv.reader(io.StringIO(text))) == [
        ["key", "row", "caption"],
        ["-dQw4", "-3", "'-2+3+cmd|' /C calc'!A0"],
        ["'=1+1", "2", "a = b, @home"],
        ["a", "0.5", "'+1"],
    ]


def test_pictures_come_from_a_bounded_number_of_shards(tmp_path, monkeypatch):
    from curate.select import cluster_shares

    monkeypatch.setattr(cluster_shares, "MAX_STEMS", 1)
    monkeypatch.setattr(duplicates, "EXTRA_STEMS", 0)
    text = make(tmp_path, ("dedup(0.97)",))
    assert set(re.findall(r'title="row \d+ of (\w)"', text)) == {"a"}
    assert len({entry["shard"] for entry in tables(text)["duplicate-groups.csv"]}) == 3


def test_one_picture_under_captions_without_a_common_word_is_shown_as_a_placeholder(tmp_path):
    letters = "abcdefghijklmnop"
    text = make(tmp_path, ("dedup(0.97)",), caption=lambda row: f"{letters[row // 16]}{letters[row % 16]}x the z{row}")
    assert "captions that have nothing in common" in text
    section = text.split('id="placeholders"')[1].split("</section>")[0]
    assert section.count('class="cards strip"') > 1
    assert len({entry["caption"] for entry in tables(text)["duplicate-groups.csv"]}) > 20


def test_what_the_step_placeholders_dropped_is_shown_and_listed(tmp_path):
    text = make(tmp_path, ("placeholders(copies=3, captions=0.2, threshold=0.97)", "sample(20)"))
    gone = [row["key"] for row in rows_of(tmp_path / "sel") if (row["dropped_by"] or "").startswith("placeholders")]
    assert gone and sorted(entry["key"] for entry in tables(text)["placeholders.csv"]) == sorted(gone)


def test_starved_and_favoured_clusters_are_shown_with_their_keys(tmp_path):
    text = make(tmp_path, ("top(centroid_similarity, 30)",), k=9)
    shown = {int(c) for c in re.findall(r'id="(?:starved|favoured)-(\d+)"', text)}
    funnel = manifest.load_json(str(tmp_path / "sel" / "funnel.json"))["clusters"]
    assert shown == {entry["cluster"] for kind in ("starved", "favoured") for entry in funnel[kind]} and shown
    label = [
        (stem, row, c)
        for stem in "abc"
        for row, c in enumerate(manifest.open_input(str(tmp_path / "clu")).table(stem)["cluster"].to_pylist())
    ]
    listed = {(e["shard"], int(e["row"]), int(e["cluster"])) for e in tables(text)["clusters.csv"]}
    assert listed == {place for place in label if place[2] in shown}


@given(st.lists(st.sets(st.sampled_from("car road tree sea dog hat sun ice pan key".split()), min_size=1), max_size=8))
def test_captions_are_unlike_when_hardly_two_share_a_word(bags):
    captions = [" ".join(sorted(bag)) for bag in bags]
    pairs = [(a, b) for i, a in enumerate(bags) for b in bags[:i]]
    shares = [len(a & b) / len(a | b) for a, b in pairs]
    expected = len(bags) >= 3 and sum(shares) / len(shares) < duplicates.UNLIKE
    assert duplicates.unlike(captions) == expected
    assert not duplicates.unlike(["a the", "", "404", "t-shirt"])


def test_a_selection_without_near_duplicates_has_no_such_section(tmp_path):
    text = make(tmp_path, ("sample(9)",))
    assert 'id="duplicates"' not in text and "duplicate-groups.csv" not in text
