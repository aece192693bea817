"""Whole selections over directories: the funnel against a slow reference, what each row keeps, and refusals."""

import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from clouds import clustered, draw
from test_near_pairs import slow_components

from curate.cluster.cluster import ClusterOptions, cluster
from curate.emit.emit import EmitOptions, emit
from curate.engine import Job
from curate.errors import ContractError, UsageError
from curate.ingest.published import ImportOptions, import_layout
from curate.select import recipes
from curate.select.pool import Pool
from curate.select.select import SelectOptions, select
from curate.storage import sidecar
from curate.storage.manifest import open_input, open_output
from house import fingerprint

QUIET = Job(workers=1, quiet=True)
STEMS = [f"{i:05d}" for i in range(3)]


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    return clustered(tmp_path_factory.mktemp("pool"))


def selected(directory):
    table = pa.concat_tables([sidecar.table(str(directory / f"{stem}.arrow")) for stem in STEMS])
    return {name: table[name].to_pylist() for name in table.column_names}


def slow_band(values, alive, lo, hi):
    rows = sorted((row for row in range(len(values)) if alive[row]), key=lambda row: (-values[row], row))
    keep = np.zeros(len(values), bool)
    keep[rows[round(lo * len(rows)) : round(hi * len(rows))]] = True
    return keep


def slow_middle(pool, threshold):
    """Keep, of each component inside a cluster, the member of median Euclidean distance to the centroid."""
    centroids = np.load(f"{pool.clu}/centroids.npy").astype(np.float64)
    keep = np.zeros(len(pool.ok), bool)
    for number in range(len(centroids)):
        rows = np.flatnonzero(pool.cluster == number)
        labels = slow_components(pool.image[rows], threshold)
        for label in np.unique(labels):
            members = rows[labels == label]
            # the unit rows' rounding to 16 bits must not decide: compare what was stored of the cosine
            distance = np.sqrt(np.maximum(0, 2 - 2 * pool.near[members].astype(np.float64)))
            keep[members[np.argsort(distance, kind="stable")[len(members) // 2]]] = True
    return keep


def test_the_paper_chain_is_the_slow_reference_row_by_row(pool, tmp_path):
    manifest = select(pool.clu, str(tmp_path / "sel"), SelectOptions(recipe="bunny", n=9), QUIET)
    found = selected(tmp_path / "sel")
    stages = [pool.ok.copy(), slow_middle(pool, 0.86)]
    stages.append(slow_band(pool.score, stages[-1], 0.40, 0.60))
    stages.append(slow_band(pool.near, stages[-1], 0.15, 0.35))
    texts = recipes.steps("bunny", 9)
    for row in range(len(pool.ok)):
        gone = next((i for i, stage in enumerate(stages) if not stage[row]), None)
        if gone is not None:
            assert found["dropped_by"][row] == ("decode_error" if gone == 0 else texts[gone - 1])
        else:
            assert found["kept"][row] or found["dropped_by"][row] == "sample(9)"
    assert sum(found["kept"]) == manifest["counts"]["kept"] == 9
    counts = [step["kept"] for step in manifest["funnel"]]
    assert counts == [int(stage.sum()) for stage in stages[1:]] + [9]
    n = int(stages[1].sum())
    assert counts[1] == round(0.6 * n) - round(0.4 * n)


def test_every_row_is_accounted_for_once(pool, tmp_path):
    select(pool.clu, str(tmp_path / "sel"), SelectOptions(recipe="balanced", n="10%"), QUIET)
    found = selected(tmp_path / "sel")
    funnel = json.loads((tmp_path / "sel" / "funnel.json").read_text())
    reasons = {name: found["dropped_by"].count(name) for name in set(found["dropped_by"])}
    assert found["key"] == pool.keys
    assert [reason is None for reason in found["dropped_by"]] == found["kept"]
    assert reasons.pop(None) == funnel["kept"] == round(0.1 * pool.ok.sum())
    assert reasons.pop("decode_error") == funnel["bad"] == int((~pool.ok).sum())
    assert reasons == {step["text"]: step["dropped"] for step in funnel["steps"] if step["dropped"]}
    assert funnel["rows"] == funnel["kept"] + funnel["bad"] + sum(step["dropped"] for step in funnel["steps"])


def test_balanced_finds_the_planted_copies_and_mismatches(pool, tmp_path):
    manifest = select(pool.clu, str(tmp_path / "sel"), SelectOptions(n="10%"), QUIET)
    placeholders, dedup, mismatch, _ = manifest["funnel"]
    assert placeholders["dropped"] == 0
    good = np.flatnonzero(pool.ok)
    inside = sum(len(np.unique(pool.source[good[pool.cluster[good] == c]])) for c in range(8))
    assert dedup["kept"] == inside and 0.95 < dedup["estimates"]["threshold"] < 0.9995
    assert abs(mismatch["estimates"]["share"] - 0.2) < 0.06
    found = selected(tmp_path / "sel")
    assert np.mean(pool.mismatched[found["kept"]]) < 0.03
    assert manifest["options"]["recipe"] == "balanced"


def test_rows_that_an_earlier_dedup_dropped_keep_their_component(pool, tmp_path):
    select(pool.clu, str(tmp_path / "once"), SelectOptions(steps=("dedup(0.99)",)), QUIET)
    select(pool.clu, str(tmp_path / "twice"), SelectOptions(steps=("dedup(0.99)", "dedup(0.95)")), QUIET)
    once, twice = selected(tmp_path / "once"), selected(tmp_path / "twice")
    gone = [row for row, reason in enumerate(once["dropped_by"]) if reason == "dedup(0.99)"]
    assert gone and all(twice["component"][row] == once["component"][row] for row in gone)
    assert all(component is not None for component, ok in zip(twice["component"], pool.ok, strict=True) if ok)


def test_twins_are_kept_rows_of_the_same_component(pool, tmp_path):
    select(pool.clu, str(tmp_path / "sel"), SelectOptions(steps=("dedup(0.95)",)), QUIET)
    found = selected(tmp_path / "sel")
    row_of = {key: row for row, key in enumerate(found["key"])}
    for row, twin in enumerate(found["twin"]):
        assert (twin is not None) == (found["dropped_by"][row] == "dedup(0.95)")
        if twin is not None:
            other = row_of[twin]
            assert found["kept"][other] and found["component"][other] == found["component"][row]
            weakest_link = found["twin_similarity"][row]
            assert 0.95 < weakest_link <= 1.01 and weakest_link > pool.image[row] @ pool.image[other] - 1e-6
    assert all((component is None) == (not ok) for component, ok in zip(found["component"], pool.ok, strict=True))


def test_dedup_after_a_band_sees_the_graph_of_what_is_left(pool, tmp_path):
    select(pool.clu, str(tmp_path / "sel"), SelectOptions(steps=("rank(clip_score, 0, 0.6)", "dedup(0.9)")), QUIET)
    found = selected(tmp_path / "sel")
    alive = slow_band(pool.score, pool.ok, 0, 0.6)
    expected = np.zeros(len(alive), bool)
    for number in range(8):
        rows = np.flatnonzero((pool.cluster == number) & alive)
        labels = slow_components(pool.image[rows], 0.9)
        for label in np.unique(labels):
            members = rows[labels == label]
            expected[members[np.argsort(-pool.near[members], kind="stable")[len(members) // 2]]] = True
    assert found["kept"] == expected.tolist()


def test_a_second_selection_reads_no_embeddings(pool, tmp_path, monkeypatch):
    monkeypatch.setattr(sidecar, "vectors", lambda column: pytest.fail("embeddings were read"))
    for threshold in (0.82, 0.9, 0.97):
        select(
            pool.clu, str(tmp_path / str(threshold)), SelectOptions(steps=(f"dedup({threshold})", "sample(5)")), QUIET
        )
    select(pool.clu, str(tmp_path / "balanced"), SelectOptions(), QUIET)
    curve = json.loads((tmp_path / "balanced" / "funnel.json").read_text())["curves"]["dedup"]
    for threshold in (0.82, 0.9, 0.97):
        kept = open_input(str(tmp_path / str(threshold))).manifest["funnel"][0]["kept"]
        assert kept == pytest.approx(np.interp(threshold, curve["threshold"], curve["kept"]), abs=1)


def test_embeddings_alone_serve_steps_that_need_no_clusters(pool, tmp_path):
    steps = ("above(width, 65)", "cap(url, 1)", "cap(uid, 1)", "rank(clip_score, 0, 0.3)", "sample(20)")
    manifest = select(pool.path, str(tmp_path / "sel"), SelectOptions(steps=steps), QUIET)
    found = selected(tmp_path / "sel")
    assert manifest["counts"]["kept"] == 20 and set(found["component"]) == {None}
    rows = np.flatnonzero(found["kept"])
    assert len(np.unique(pool.source[rows])) == 20 and (rows % 7 > 1).all()
    with pytest.raises(UsageError, match="needs clusters"):
        select(pool.path, str(tmp_path / "no"), SelectOptions(), QUIET)


def test_derived_columns_are_what_they_say(pool, tmp_path):
    steps = ("above(caption_words, 2)", "below(caption_chars, 17)", "above(min_side, 47)", "below(aspect_ratio, 1.40)")
    select(pool.path, str(tmp_path / "sel"), SelectOptions(steps=steps), QUIET)
    expected = [
        bool(ok) and len(f"caption number {row % 97}") < 17 and (64 + row % 7) / 48 < 1.4
        for row, ok in enumerate(pool.ok)
    ]
    assert selected(tmp_path / "sel")["kept"] == expected


def test_a_host_gives_no_more_than_its_cap(pool, tmp_path):
    select(pool.path, str(tmp_path / "sel"), SelectOptions(steps=("cap(host, 20)",)), QUIET)
    kept = np.flatnonzero(selected(tmp_path / "sel")["kept"])
    # every third row has a url, all of them http://x/…; the others are each a group of their own
    assert (kept % 3 == 0).sum() == 20 and (kept % 3 > 0).sum() == (pool.ok & (np.arange(len(pool.ok)) % 3 > 0)).sum()


def test_rows_near_an_evaluation_set_are_excluded(pool, tmp_path):
    other = draw(tmp_path / "eval", rows=40, seed=0, stems=1, bad=0)  # other pixels
    copy = draw(tmp_path / "same", mismatched=0.2)
    step = f'exclude("{copy.path}", 0.95)'
    with pytest.raises(UsageError, match="selection is empty"):
        select(pool.path, str(tmp_path / "none"), SelectOptions(steps=(step,)), QUIET)
    assert not (tmp_path / "none").exists()
    manifest = select(pool.path, str(tmp_path / "sel"), SelectOptions(steps=(f'exclude("{other.path}", 0.5)',)), QUIET)
    near = (pool.image @ other.image.T).max(axis=1) > 0.5
    same = np.isin(pool.source, other.source)
    assert selected(tmp_path / "sel")["kept"] == (pool.ok & ~near & ~same).tolist()
    assert "target-1" in manifest["inputs"]


def imported(folder, name, *sizes, seed=0, **table):
    """Import vectors in parts of so many rows; table: what the first part's table says of its rows."""
    (folder / f"{name}-source").mkdir()
    for number, size in enumerate(sizes):
        vectors = np.random.default_rng([seed, number]).normal(size=(size, 8)).astype(np.float32)
        np.save(folder / f"{name}-source" / f"{number:05d}.npy", vectors)
    if table:
        pq.write_table(pa.table(table), folder / f"{name}-source" / "00000.parquet")
    own = [column for column in table if column not in ("width", "height")]
    options = ImportOptions("npy", columns=tuple(own))
    import_layout(str(folder / f"{name}-source"), str(folder / name), options, QUIET)
    return str(folder / name)


def test_rows_without_a_uid_are_not_the_same_bytes_as_others_without(tmp_path):
    ours, theirs = imported(tmp_path, "ours", 30), imported(tmp_path, "theirs", 12, seed=1)
    manifest = select(ours, str(tmp_path / "sel"), SelectOptions(steps=(f'exclude("{theirs}", 0.999)',)), QUIET)
    assert manifest["counts"]["kept"] == 30 and manifest["funnel"][0]["estimates"]["same_bytes"] == 0


def test_numbers_group_by_their_value(tmp_path):
    score = [0.1, 0.9, 0.1, None, 0.9, None, float("nan"), float("inf"), -0.5, 0.5]
    emb = imported(tmp_path, "emb", 10, score=score)
    select(emb, str(tmp_path / "sel"), SelectOptions(steps=("cap(score, 1, keep='min:score')",)), QUIET)
    kept = sidecar.table(str(tmp_path / "sel" / "00000.arrow"))["kept"].to_pylist()
    assert kept == [True, True, False, True, False, True, True, True, True, True]
    json.loads((tmp_path / "sel" / "funnel.json").read_text(), parse_constant=pytest.fail)


def test_columns_that_are_called_like_ours_keep_their_own_values(tmp_path):
    told = {
        "loss": [1.0, 2.0, 3.0, 4.0],
        "host": ["a", "b", "a", "b"],
        "cluster": [7, 7, 8, 8],
        "min_side": [4, 3, 2, 1],
    }
    emb = imported(tmp_path, "emb", 4, **told)
    for number, (step, kept) in enumerate(
        {
            "below(source_loss, 3)": [True, True, False, False],
            "top(source_min_side, 1)": [True, False, False, False],
            "cap(source_host, 1, keep='max:source_loss')": [False, False, True, True],
            "cap(source_cluster, 1, keep='max:source_loss')": [False, True, False, True],
        }.items()
    ):
        select(emb, str(tmp_path / f"sel{number}"), SelectOptions(steps=(step,)), QUIET)
        assert sidecar.table(str(tmp_path / f"sel{number}" / "00000.arrow"))["kept"].to_pylist() == kept


def test_a_side_of_any_length_is_a_number(tmp_path):
    emb = imported(tmp_path, "emb", 3, width=[(1 << 24) + 1, 5, 10], height=[1, 5, 10])
    select(emb, str(tmp_path / "sel"), SelectOptions(steps=("at_most(aspect_ratio, 3)", "above(width, 5)")), QUIET)
    assert sidecar.table(str(tmp_path / "sel" / "00000.arrow"))["kept"].to_pylist() == [False, False, True]


def test_one_row_is_selected_and_pools_without_captions_are_told_what_to_do(tmp_path):
    one = draw(tmp_path / "one", rows=1, stems=1, bad=0, copies=0)
    cluster(one.path, str(tmp_path / "clu"), ClusterOptions(k=1), QUIET)
    manifest = select(str(tmp_path / "clu"), str(tmp_path / "sel"), SelectOptions(n=1), QUIET)
    assert manifest["counts"]["kept"] == 1
    silent = imported(tmp_path, "silent", 9)
    cluster(silent, str(tmp_path / "clu2"), ClusterOptions(k=2), QUIET)
    with pytest.raises(UsageError, match=r"clip_score has no value.*balance\(cluster, 30%\)"):
        select(str(tmp_path / "clu2"), str(tmp_path / "no"), SelectOptions(), QUIET)
    last = SelectOptions(steps=("balance(cluster, 4, contradicting_last=True)",))
    manifest = select(str(tmp_path / "clu2"), str(tmp_path / "last"), last, QUIET)
    assert "no caption embeddings" in manifest["funnel"][0]["estimates"]["why"]


def test_a_shard_without_rows_goes_through_every_stage(tmp_path):
    emb, clu, sel = imported(tmp_path, "emb", 9, 0, 1), str(tmp_path / "clu"), str(tmp_path / "sel")
    assert cluster(emb, clu, ClusterOptions(k=2), QUIET)["counts"] == {"clustered": 10, "bad": 0}
    steps = ("dedup(0.99)", "cap(uid, 1)", "balance(cluster, 6)", "top(redundancy, 5)")
    assert select(clu, sel, SelectOptions(steps=steps), QUIET)["counts"]["kept"] == 5
    for kind in ("keys", "parquet", "clip-retrieval"):
        emit(sel, str(tmp_path / kind), EmitOptions(format=kind), QUIET)
    assert np.load(tmp_path / "clip-retrieval" / "img_emb" / "img_emb_1.npy").shape == (0, 8)


def test_the_same_request_is_recognised_another_refused_and_bytes_repeat(pool, tmp_path):
    options = SelectOptions(steps=("dedup(0.9)", "sample(7)"), seed=3)
    first = select(pool.clu, str(tmp_path / "a"), options, QUIET)
    assert select(pool.clu, str(tmp_path / "a"), options, QUIET) == first
    with pytest.raises(ContractError, match="was made with steps"):
        select(pool.clu, str(tmp_path / "a"), SelectOptions(steps=("dedup(0.9)",), seed=3), QUIET)
    select(pool.clu, str(tmp_path / "x" / "a"), options, QUIET)
    left, right = fingerprint(tmp_path / "a"), fingerprint(tmp_path / "x" / "a")
    left.pop("a/manifest.json"), right.pop("a/manifest.json")  # the path to the input differs
    assert left == right


@pytest.mark.parametrize(
    "options, words",
    [
        (SelectOptions(steps=("above(clip_score, 5)", "sample(3)")), r"no row is left for the step sample\(3\)"),
        (SelectOptions(steps=("above(clip_score, 5)",)), "selection is empty"),
        (SelectOptions(steps=("dedup(0.5)",)), "below the floor"),
        (SelectOptions(steps=("sample(3)",), recipe="bunny"), "both given"),
        (SelectOptions(steps=("sample(3)",), n=5), "both given"),
        (SelectOptions(recipe="bunnyy"), "did you mean 'bunny"),
        (SelectOptions(steps=("cap(source, 3)",)), "unknown column 'source'"),
    ],
)
def test_what_cannot_be_selected_is_refused_and_leaves_nothing(pool, tmp_path, options, words):
    with pytest.raises(UsageError, match=words):
        select(pool.clu, str(tmp_path / "sel"), options, QUIET)
    assert not (tmp_path / "sel").exists()


def test_a_step_given_twice_is_told_apart(pool, tmp_path):
    select(pool.path, str(tmp_path / "sel"), SelectOptions(steps=("sample(0.5)", "sample(0.1)", "sample(0.1)")), QUIET)
    assert "sample(0.1) #2" in set(selected(tmp_path / "sel")["dropped_by"])


def test_a_picture_under_many_captions_is_dropped_whole(tmp_path):
    cloud = draw(tmp_path / "emb", rows=600, copies=0.5, bad=0, groups=4, captions=600)
    cluster(cloud.path, str(tmp_path / "clu"), ClusterOptions(k=2), QUIET)
    manifest = select(str(tmp_path / "clu"), str(tmp_path / "sel"),
                      SelectOptions(steps=("placeholders(8)", "dedup(0.99)")), QUIET)  # fmt: skip
    sizes = np.bincount(cloud.source, minlength=600)[cloud.source]
    found = selected(tmp_path / "sel")
    dropped = np.array([reason == "placeholders(8)" for reason in found["dropped_by"]])
    assert dropped.any() and (dropped == (sizes >= 8)).all()
    assert manifest["funnel"][0]["estimates"]["pictures"] == len(np.unique(cloud.source[dropped]))


class Trained:
    """The shards of a pool, as the trainer names them."""

    def __init__(self, keys, edges, stems=STEMS):
        self.keys, self.edges, self.stems = keys, edges, stems

    def key(self, row):
        return self.keys[row]

    def extents(self):
        yield from zip(self.stems, self.edges[:-1], self.edges[1:], strict=True)


def test_the_trainers_losses_are_a_column(pool, tmp_path):
    from train.run.losses import SampleLosses

    keys, loss = pool.keys, np.random.default_rng(0).random(len(pool.keys)).astype(np.float32)
    edges = [0, 300, 600, 900]
    losses = SampleLosses(len(keys))
    losses.loss[:], losses.loss[5] = loss, np.nan
    losses.write(tmp_path / "losses", Trained(keys, edges))
    options = SelectOptions(steps=("below(loss, 0.5)",), losses=str(tmp_path / "losses"))
    manifest = select(pool.path, str(tmp_path / "sel"), options, QUIET)
    kept = (loss < 0.5) & pool.ok & (np.arange(len(keys)) != 5)
    assert selected(tmp_path / "sel")["kept"] == kept.tolist() and "losses" in manifest["inputs"]
    losses.write(tmp_path / "others", Trained(keys[::-1], edges))
    options = SelectOptions(steps=("below(loss, 0.5)",), losses=str(tmp_path / "others"))
    with pytest.raises(ContractError, match="the rows of 00000 .* are not those in .*embed the same shards"):
        select(pool.path, str(tmp_path / "no"), options, QUIET)
    with pytest.raises(UsageError, match="unknown column 'loss'"):
        select(pool.path, str(tmp_path / "no"), SelectOptions(steps=("below(loss, 0.5)",)), QUIET)


def test_embeddings_without_a_shard_are_refused(tmp_path):
    open_output(str(tmp_path / "emb"), "embed", {}, {}).finish(shards={}, counts={})
    with pytest.raises(UsageError, match="no shard to select from"):
        select(str(tmp_path / "emb"), str(tmp_path / "sel"), SelectOptions(steps=("sample(1)",)), QUIET)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="open memory maps are counted in /proc")
def test_no_shard_stays_mapped_when_its_columns_were_read(pool):
    frame = Pool(open_input(pool.clu)).frame(0)
    held = [*(frame.columns[name]() for name in frame.columns), *(frame.groups[name]() for name in frame.groups)]
    held += [frame.good, frame.hashes(np.arange(9)), frame.edges()]
    mapped = set(re.findall(r"/\S*/\d{5}\.arrow", Path("/proc/self/maps").read_text()))
    own = {path for path in mapped if path.startswith(str(Path(pool.clu).parent))}
    assert held and own <= {str(Path(pool.path) / "00000.arrow")}  # the first shard's, for its schema
