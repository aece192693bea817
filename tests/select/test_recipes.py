"""Whole recipes over a pool, row by row, against slow references written from what the papers and read-mes say."""

import numpy as np
import pytest
from clouds import clustered, draw
from test_near_pairs import slow_components
from test_select import QUIET, selected, slow_band
from test_vector_steps import best

from curate.select import recipes
from curate.select.catalogue import STEPS
from curate.select.computed_columns import COLUMNS
from curate.select.select import SelectOptions, select
from house import ROOT


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    return clustered(tmp_path_factory.mktemp("pool"))


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return draw(tmp_path_factory.mktemp("target") / "emb", rows=4, seed=9, stems=1, bad=0)


def kept(pool, out, recipe, n=""):
    select(pool.clu, str(out), SelectOptions(recipe=recipe, n=n), QUIET)
    return np.array(selected(out)["kept"])


def in_clusters(pool, judge):
    """Judge each cluster's good rows on their own: judge(rows, cosines) names those that stay."""
    keep = np.zeros(len(pool.ok), bool)
    for number in range(8):
        rows = np.flatnonzero(pool.ok & (pool.cluster == number))
        cosines = pool.image[rows].astype(np.float64) @ pool.image[rows].astype(np.float64).T
        keep[judge(rows, cosines)] = True
    return keep


def one_of_each(pool, threshold, order_of):
    """Keep of each connected component the member that order_of puts in the middle, or first (Dataset-Pruning)."""

    def judge(rows, cosines):
        labels = slow_components(pool.image[rows], threshold)
        groups = [rows[labels == label] for label in np.unique(labels)]
        return [order_of(members) for members in groups]

    return in_clusters(pool, judge)


def middle(values, members):
    return members[np.lexsort((members, values))[len(members) // 2]]


def nearest_first(pool, members):
    return middle(-pool.near[members].astype(np.float64), members)


def inner(pool, members):
    mean = pool.image[members].astype(np.float64).mean(axis=0)
    far = np.linalg.norm(pool.image[members] - mean, axis=1) if len(members) > 2 else np.zeros(len(members))
    return middle(far, members)


def farthest(pool, members):
    return members[np.lexsort((members, pool.near[members]))[0]]


def semdedup(pool, threshold):
    """Order a cluster from the least typical; drop a row if one before it is nearer than the threshold (SemDeDup)."""

    def judge(rows, cosines):
        order = np.lexsort((rows, pool.near[rows]))
        upper = np.triu(cosines[np.ix_(order, order)], 1)
        return rows[order[upper.max(axis=0) <= threshold]]

    return in_clusters(pool, judge)


@pytest.mark.parametrize(
    "recipe, keeper, bands",
    [
        ("bunny", nearest_first, [(0.4, 0.6), (0.15, 0.35)]),
        ("bunny-20-40", nearest_first, [(0.4, 0.6), (0.2, 0.4)]),
        ("bunny-far", farthest, [(0.4, 0.6), (0.15, 0.35)]),
        ("bunny-inner-middle", inner, [(0.4, 0.6), (0.15, 0.35)]),
    ],
)
def test_bunny_and_its_keepers(pool, tmp_path, recipe, keeper, bands):
    expected = one_of_each(pool, 0.86, lambda members: keeper(pool, members))
    for values, band in zip((pool.score, pool.near), bands, strict=True):
        expected = slow_band(values, expected, *band)
    assert (kept(pool, tmp_path / "sel", recipe) == expected).all() and expected.sum() > 10


@pytest.mark.parametrize(
    "recipe, band", [("semdedup", None), ("clip-15-55", (0.15, 0.55)), ("clip-30-50", (0.30, 0.50))]
)
def test_semdedup_and_the_bands_after_it(pool, tmp_path, recipe, band):
    expected = semdedup(pool, 0.945)
    assert 0 < expected.sum() < pool.ok.sum()
    if band:
        expected = slow_band(pool.score, expected, *band)
    assert (kept(pool, tmp_path / "sel", recipe) == expected).all()


def test_datacomps_filters(pool, target, tmp_path):
    top = np.isin(np.arange(len(pool.ok)), list(best(pool.score, pool.ok, round(0.3 * pool.ok.sum()))))
    assert (kept(pool, tmp_path / "clip", "datacomp-clip") == top).all()
    centroids = np.load(f"{pool.clu}/centroids.npy")
    near_target = {int((centroids @ image).argmax()) for image in target.image}
    by_image = pool.ok & np.isin(pool.cluster, list(near_target))
    assert (kept(pool, tmp_path / "image", f'datacomp-image("{target.path}")') == by_image).all()
    assert (kept(pool, tmp_path / "best", f'datacomp-best("{target.path}")') == (top & by_image)).all()
    assert 0 < (top & by_image).sum() < top.sum()


def test_datacomps_basic_filter_counts_its_ends_in():
    assert recipes.steps("datacomp-basic") == [
        "above(caption_words, 2)",
        "above(caption_chars, 5)",
        "at_least(min_side, 200)",
        "at_most(aspect_ratio, 3)",
    ]


def test_laions_rule_drops_what_is_below(pool, tmp_path):
    expected = pool.ok & (pool.score >= np.float32(0.28))
    assert (kept(pool, tmp_path / "sel", "laion") == expected).all() and expected.any()


@pytest.mark.parametrize(
    "recipe", ["bunny", "semdedup", "datacomp-clip", "laion", "random", "hierarchical", "coincide"]
)
def test_a_recipe_keeps_exactly_its_budget(pool, tmp_path, recipe):
    assert kept(pool, tmp_path / "sel", recipe, 9).sum() == 9
    assert kept(pool, tmp_path / "share", recipe, "1%").sum() == round(0.01 * pool.ok.sum())


def test_every_recipe_and_every_step_is_written_down():
    pages = [(ROOT / folder / "README.md").read_text() for folder in ("pipelines", "curate")]
    assert [name for name in recipes.RECIPES if f"`{name}" not in pages[0] and name != "random"] == []
    assert [name for name in (*STEPS, *COLUMNS) if f"`{name}`" not in pages[1]] == []


def test_prism_and_presel_keep_their_published_shares(pool, tmp_path):
    good = pool.ok.sum()
    for recipe, share in (("prism", 0.3), ("typical", 0.15), ("coincide", 0.2), ("neg-clip-loss", 0.3)):
        assert kept(pool, tmp_path / recipe, recipe).sum() == round(share * good)
