"""Steps and computed columns that read embeddings, over directories: against slow references on the whole arrays."""

import json

import numpy as np
import pytest
from artefacts import members, write_embeddings, write_pool
from clouds import clustered, draw
from test_coverage import slow_coincide_weights, slow_neg_clip_loss, slow_typicality, unit
from test_select import QUIET, selected

from curate.emit.emit import EmitOptions, emit
from curate.engine import Job
from curate.errors import UsageError
from curate.select.select import SelectOptions, select
from curate.storage.tar import TarWriter


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    return clustered(tmp_path_factory.mktemp("pool"))


def kept(source, out, *steps, seed=0):
    manifest = select(source, str(out), SelectOptions(steps=steps, seed=seed), QUIET)
    return np.array(selected(out)["kept"]), manifest


def best(values, good, n):
    rows = np.flatnonzero(good)
    return set(rows[np.argsort(-values[rows], kind="stable")[:n]].tolist())


def mostly(found, expected):
    """Sets agree but for ties that rounding to 16 bits decides."""
    found = set(np.flatnonzero(found).tolist())
    assert len(found) == len(expected) and len(found & expected) >= 0.97 * len(expected)


def test_the_negative_clip_loss_ranks_like_its_formula(pool, tmp_path):
    rows = np.flatnonzero(pool.ok)
    values = np.full(len(pool.ok), np.nan)
    values[rows] = slow_neg_clip_loss(unit(pool.image[rows]), unit(pool.text[rows]), 0.01)
    found, manifest = kept(pool.path, tmp_path / "sel", "rank(neg_clip_loss, 0, 0.3)")
    mostly(found, best(values, pool.ok, round(0.3 * len(rows))))
    assert manifest["funnel"][0]["estimates"]["highest"] == pytest.approx(np.nanmax(values), abs=1e-4)
    apart, _ = kept(pool.path, tmp_path / "apart", "above(neg_clip_loss(batch_size=100, batches=3), -0.05)", seed=1)
    again, _ = kept(pool.path, tmp_path / "again", "above(neg_clip_loss(batch_size=100, batches=3), -0.05)", seed=1)
    assert (apart == again).all() and apart.any()


def test_norm_sim_ranks_by_nearness_to_a_target_set(pool, tmp_path):
    target = draw(tmp_path / "target", rows=50, seed=4, stems=2)
    cosines = pool.image @ target.image[target.ok].T
    step = f'rank(norm_sim("{target.path}"), 0, 0.2)'
    found, manifest = kept(pool.path, tmp_path / "sel", step)
    mostly(found, best(cosines.max(axis=1), pool.ok, round(0.2 * pool.ok.sum())))
    assert manifest["inputs"]["target-1"]["path"] == "../target"
    funnel = json.loads((tmp_path / "sel" / "funnel.json").read_text())
    assert sum(funnel["histograms"][f"norm_sim('{target.path}')"]["all"]) == pool.ok.sum()
    found, _ = kept(pool.path, tmp_path / "two", f'top(norm_sim("{target.path}", p="2"), 90)')
    mostly(found, best(np.linalg.norm(cosines, axis=1), pool.ok, 90))
    found, manifest = kept(pool.path, tmp_path / "cap", f"""cap(shard, 9, keep='max:norm_sim("{target.path}")')""")
    assert found.sum() == 27 and "target-1" in manifest["inputs"]


def test_typical_and_redundant_rows(pool, tmp_path):
    groups = np.where(pool.ok, pool.cluster, -1)
    image = unit(pool.image)
    found, _ = kept(pool.clu, tmp_path / "a", "top(typicality(neighbours=7), 100)")
    mostly(found, best(slow_typicality(image, groups, 7), pool.ok, 100))
    found, _ = kept(pool.path, tmp_path / "b", "bottom(redundancy, 30%)".replace("30%", '"30%"'))
    moved = unit(pool.image - pool.image[pool.ok].mean(axis=0))
    values = (moved @ moved[pool.ok].T).sum(axis=1)
    mostly(found, best(-values, pool.ok, round(0.3 * pool.ok.sum())))
    found, manifest = kept(pool.clu, tmp_path / "c", "typical(200)")
    counts, sizes = np.bincount(pool.cluster[found], minlength=8), np.bincount(pool.cluster[pool.ok])
    assert found.sum() == 200 and np.abs(counts - 200 * sizes / sizes.sum()).max() <= 1
    values = slow_typicality(image, groups, 5)
    mostly(found, set().union(*(best(values, groups == c, counts[c]) for c in range(8))))


def test_coincide_takes_more_of_sparse_clusters_near_others(pool, tmp_path):
    found, manifest = kept(pool.clu, tmp_path / "sel", "coincide(150, temperature=0.5)")
    weights = slow_coincide_weights(unit(pool.image), np.where(pool.ok, pool.cluster, -1), 0.5, 1.0)[2]
    counts, sizes = np.bincount(pool.cluster[found], minlength=8), np.bincount(pool.cluster[pool.ok])
    free = counts < sizes
    rest = (150 - sizes[~free].sum()) * weights[free] / weights[free].sum()
    assert found.sum() == 150 and np.abs(counts[free] - rest).max() <= 1
    funnel = json.loads((tmp_path / "sel" / "funnel.json").read_text())
    assert funnel["reserve"] and len(funnel["steps"][0]["estimates"]["density"]) == 3


def test_the_clusters_of_a_target_set_are_kept(pool, tmp_path):
    target = draw(tmp_path / "target", rows=6, seed=9, stems=1, bad=0)
    centroids = np.load(f"{pool.clu}/centroids.npy")
    wanted = np.unique((target.image @ centroids.T).argmax(axis=1))
    found, manifest = kept(pool.clu, tmp_path / "sel", f'image_based("{target.path}")')
    assert (found == pool.ok & np.isin(pool.cluster, wanted)).all()
    assert manifest["funnel"][0]["estimates"]["clusters_kept"] == len(wanted) < 8
    both, _ = kept(pool.clu, tmp_path / "both", "rank(clip_score, 0, 0.3)", f'image_based("{target.path}")')
    top = best(pool.score, pool.ok, round(0.3 * pool.ok.sum()))
    assert set(np.flatnonzero(both)) == top & set(np.flatnonzero(found))  # an intersection, in this order


def test_a_budget_goes_down_a_tree_of_clusters(pool, tmp_path):
    found, manifest = kept(pool.clu, tmp_path / "sel", 'balance_tree(160, levels=[4, 2], keep="near")')
    counts, sizes = np.bincount(pool.cluster[found], minlength=8), np.bincount(pool.cluster[pool.ok])
    assert found.sum() == 160 and (counts <= sizes).all()
    for number in range(8):
        assert set(np.flatnonzero(found & (pool.cluster == number))) == best(
            pool.near, pool.ok & (pool.cluster == number), counts[number]
        )
    flat, _ = kept(pool.clu, tmp_path / "flat", "balance_tree(160, levels=1)")
    level = np.sort(np.bincount(pool.cluster[flat], minlength=8))
    balanced, _ = kept(pool.clu, tmp_path / "balanced", "balance(cluster, 160)")
    assert level.tolist() == np.sort(np.bincount(pool.cluster[balanced], minlength=8)).tolist()


@pytest.mark.parametrize(
    "step, words",
    [
        ("rank(negcliploss, 0, 1)", "did you mean 'neg_clip_loss'"),
        ("rank(neg_clip_loss(batch=3), 0, 1)", "unknown argument of neg_clip_loss 'batch'"),
        ("rank(norm_sim, 0, 1)", r"lacks directory; write norm_sim\(directory, p='inf'\)"),
        ("rank(norm_simm('x'), 0, 1)", "unknown column 'norm_simm'"),
        ("rank(norm_sim('nowhere'), 0, 1)", "nowhere does not exist"),
        ("rank(neg_clip_loss(temperature=0), 0, 1)", "temperature of 0.003 or more"),
        ("rank(typicality, 0, 1)", "column cluster needs clusters"),
        ("typical(10)", "needs clusters"),
        ("coincide(10, temperature=0)", "expected both above 0"),
        ("balance_tree(10)", "needs clusters"),
        ("image_based('nowhere')", "nowhere does not exist"),
        ("rank(norm_sim(norm_sim('x')), 0, 1)", "not a literal"),
    ],
)
def test_what_cannot_be_computed_is_refused_in_one_line(pool, tmp_path, step, words):
    with pytest.raises(UsageError, match=words) as caught:
        kept(pool.path, tmp_path / "sel", step)
    assert "\n" not in str(caught.value) and not (tmp_path / "sel").exists()


def test_a_target_of_another_model_is_refused(pool, tmp_path):
    other = draw(tmp_path / "other", rows=20, dim=16, stems=1)
    for step in ("exclude('{}')", "image_based('{}')", "top(norm_sim('{}'), 9)"):
        with pytest.raises(UsageError, match="has 16 dimensions of an unnamed model, this pool has 32 .*one model"):
            kept(pool.clu, tmp_path / "sel", step.format(other.path))


@pytest.mark.parametrize("levels, words", [("[2, 4]", "falling numbers of clusters"), ("[9]", "expected fewer")])
def test_levels_of_a_tree_fall(pool, tmp_path, levels, words):
    with pytest.raises(UsageError, match=words):
        kept(pool.clu, tmp_path / "sel", f"balance_tree(10, levels={levels})")


@pytest.mark.parametrize(
    "step", ["sample(12)", "top(clip_score, 12)", "rank(clip_score, 0, 0.4)", "balance(shard, 12)", "bottom(width, 12)"]
)
def test_what_the_pool_lost_is_replaced_by_the_next_in_rank(tmp_path, capsys, step):
    source = write_pool(tmp_path / "pool", ["00000", "00001", "00002"], 10)
    emb = write_embeddings(tmp_path / "emb", source)
    ask = lambda n: step.replace("12", str(n)).replace("0.4", str(n / 30))  # noqa: E731
    sel, more = tmp_path / "sel", tmp_path / "more"
    first, _ = kept(emb, sel, step)
    larger, _ = kept(emb, more, ask(15))
    assert first.sum() == 12 and larger.sum() == 15
    reserve = [(stem, row) for stem, row in json.loads((sel / "funnel.json").read_text())["reserve"]]
    assert len(reserve) == 18
    numbers = [int(stem) * 10 + row for stem, row in reserve]
    assert sorted(numbers[:3]) == np.flatnonzero(larger & ~first).tolist() or step.startswith("balance")
    lost = [f"{row:09d}" for row in np.flatnonzero(first)[:2]] + [f"{numbers[1]:09d}"]
    for stem in ("00000", "00001", "00002"):
        entries = members(tmp_path / "pool" / f"{stem}.tar")
        with open(tmp_path / "pool" / f"{stem}.tar", "wb") as file, TarWriter(file) as tar:
            for name, data in entries:
                if name[:9] not in lost:
                    tar.add(name, data)
    manifest = emit(str(sel), str(tmp_path / "out"), EmitOptions(shard_size=5), Job(workers=1))
    assert manifest["counts"] == {"rows": 12, "written": 12, "gone": 2, "replaced": 2}
    assert (
        "2 of 12 samples could not be read from the pool; 2 replaced by the next in rank, 12 written"
        in capsys.readouterr().err
    )
    written = {name[:9] for shard in (tmp_path / "out").glob("*.tar") for name, _ in members(shard)}
    expected = {f"{row:09d}" for row in np.flatnonzero(first)} - set(lost) | {f"{numbers[i]:09d}" for i in (0, 2)}
    assert written == expected


def test_a_budget_larger_than_the_pool_says_how_many_there_were(pool, tmp_path, capsys):
    for step in (
        "sample(5_000)",
        "balance(cluster, 5_000)",
        "balance_tree(5_000)",
        "typical(5_000)",
        "coincide(5_000)",
    ):
        out = tmp_path / step.partition("(")[0]
        manifest = select(pool.clu, str(out), SelectOptions(steps=(step,)), Job(workers=1))
        n = int(pool.ok.sum())
        assert manifest["counts"]["kept"] == n
        assert f"{step} asked for 5,000 rows, only {n} were there: all are kept" in capsys.readouterr().err
        assert (
            manifest["funnel"][0]["estimates"] | {"asked": 5000, "available": n} == manifest["funnel"][0]["estimates"]
        )
