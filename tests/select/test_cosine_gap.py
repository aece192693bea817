"""Copies told from look-alikes by their cosines alone: clouds of several kinds, with copies and without."""

import numpy as np
import pytest
from clouds import unit
from test_near_pairs import forest_of

from curate.cluster.cluster import ClusterOptions, cluster
from curate.engine import Job
from curate.ingest.published import ImportOptions, import_layout
from curate.select.select import SelectOptions, select
from curate.select.steps import auto_threshold
from curate.select.steps.cosine_gap import FARTHEST, _truncated_rate, find_gap
from curate.vectors.forest import components

ROWS, DIM = 1000, 128
QUIET = Job(workers=1, quiet=True)


def surface(rng):
    """A curved surface of 20 dimensions, with a common direction, as CLIP's vectors have."""
    bend, out = rng.normal(size=(20, 64)) / 20**0.5, rng.normal(size=(64, DIM)) / 8
    return np.tanh(1.2 * rng.normal(size=(ROWS, 20)) @ bend) @ out + 0.8 * rng.normal(size=DIM)


def topics(rng):
    """Topics of unlike size and width around a common direction."""
    weights = 1 / np.arange(1, 17)
    topic = rng.choice(16, ROWS, p=weights / weights.sum())
    width = rng.uniform(0.35, 0.8, 16)[topic, None]
    return (
        unit(rng.normal(size=(16, DIM)))[topic]
        + width * rng.normal(size=(ROWS, DIM)) / DIM**0.5
        + rng.normal(size=DIM) / 20
    )


def far_apart(rng):
    """Rows that have no neighbour above any floor."""
    return rng.normal(size=(ROWS, DIM))


CLOUDS = {cloud.__name__: cloud for cloud in (surface, topics, far_apart)}


def planted(cloud, seed, copies, cosine, spread=0.0):
    """Rows of a cloud and copies of some: f16 vectors, and the row that each is, or is a copy of."""
    rng = np.random.default_rng(seed)
    x = unit(CLOUDS[cloud](rng))
    source = rng.integers(0, ROWS, copies)
    cosines = np.clip(1 - (1 - cosine) * np.exp(spread * rng.normal(size=copies)), 0, 1)[:, None]
    aside = rng.normal(size=(copies, DIM))
    aside = unit(aside - (aside * x[source]).sum(axis=1, keepdims=True) * x[source])
    copied = cosines * x[source] + np.sqrt(1 - cosines**2) * aside
    return np.concatenate([x, copied]).astype(np.float16), np.append(np.arange(ROWS), source)


def judged(x, source, edges, threshold):
    """The share of the copies that are joined to what they are copies of, and of the rows that are joined to others."""
    a, b, similarity = edges
    label = components(a[similarity > threshold], b[similarity > threshold], len(x))
    found = label[ROWS:] == label[source[ROWS:]]
    groups = np.unique(np.stack([label, source]), axis=1)[0]
    return found.mean(), (np.unique(groups, return_counts=True)[1] - 1).sum() / ROWS


@pytest.mark.parametrize("cloud", CLOUDS)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "copies, cosine, spread",
    [(300, 0.985, 0.0), (300, 0.985, 0.4), (30, 0.985, 0.3), (100, 0.995, 0.7), (20, 0.9999, 0)],
)
def test_copies_are_found_and_hardly_a_row_is_taken_for_another(cloud, seed, copies, cosine, spread):
    x, source = planted(cloud, seed, copies, cosine, spread)
    edges = forest_of(x, 0.8)
    gap = find_gap(edges[2], len(x), 0.8)
    assert gap is not None and gap.look_alikes <= 0.1 * gap.pairs
    recall, wronged = judged(x, source, edges, gap.threshold)
    assert recall >= 0.95 and wronged <= 0.01


@pytest.mark.parametrize("cloud", CLOUDS)
@pytest.mark.parametrize("seed", range(5))
def test_where_there_are_no_copies_there_is_no_gap(cloud, seed):
    x, _ = planted(cloud, seed, 0, 0.9)
    assert find_gap(forest_of(x, 0.8)[2], ROWS, 0.8) is None


def test_look_alikes_that_grade_into_copies_show_no_gap():
    rng = np.random.default_rng(0)
    graded = 1 - 0.2 * np.exp(-rng.exponential(0.8, 4_000))  # thinning out evenly, to cosines of 1
    assert find_gap(graded.astype(np.float32), 5_000, 0.8) is None
    one_picture = 1 - 0.02 * rng.random(4_900) ** 3  # nearly all rows alike: the embedder sees one picture
    assert find_gap(one_picture.astype(np.float32), 5_000, 0.8) is None
    assert find_gap(np.empty(0, np.float32), 100, 0.8) is None
    assert find_gap(np.ones(9, np.float32), 100, 0.8) is None


@pytest.mark.parametrize("rate", [0.5, 3.0, 40.0])
def test_the_rate_is_that_of_a_truncated_exponential(rate):
    s = np.linspace(0, 0.7, 200_001)
    density = np.exp(-rate * s)
    assert _truncated_rate(float((s * density).sum() / density.sum()), 0.7) == pytest.approx(rate, rel=1e-3)
    assert _truncated_rate(0.36, 0.7) == 0


def test_published_embeddings_without_pixels_lose_their_copies(tmp_path):
    x, source = planted("surface", 7, 300, 0.985)
    products = x[:ROWS].astype(np.float32) @ x[:ROWS].astype(np.float32).T
    assert 0.85 < np.max(products - 2 * np.eye(ROWS)) < 0.95
    (tmp_path / "published").mkdir()
    order = np.random.default_rng(1).permutation(len(x))
    np.save(tmp_path / "published" / "0.npy", x[order].astype(np.float32))
    import_layout(str(tmp_path / "published"), str(tmp_path / "emb"), ImportOptions("npy"), QUIET)
    cluster(str(tmp_path / "emb"), str(tmp_path / "clu"), ClusterOptions(k=4), QUIET)
    manifest = select(str(tmp_path / "clu"), str(tmp_path / "sel"), SelectOptions(steps=('dedup("auto")',)), QUIET)
    facts = manifest["funnel"][0]["estimates"]
    assert 0.945 <= facts["threshold"] < 0.985 and facts["confidence"] > 0.9 and "a gap in the cosines" in facts["why"]
    assert 285 <= manifest["funnel"][0]["dropped"] <= 310


def test_a_few_known_pixels_do_not_speak_for_all():
    rng = np.random.default_rng(0)
    similarity = np.append(1 - 0.2 * np.exp(-rng.exponential(0.2, 2_000)), rng.uniform(0.984, 0.986, 300))
    bits = np.full(len(similarity), 255, np.uint8)
    bits[:20] = 30
    found = auto_threshold.find_threshold(similarity.astype(np.float32), bits, 0.8, 5_000)
    assert 0.945 <= found.threshold < 0.984 and found.rule.unknown == found.threshold and found.rule.bits == 16
    bits[:] = 30  # all known, and none agrees
    assert find_gap(similarity, 5_000, 0.8) and FARTHEST
    assert auto_threshold.find_threshold(similarity.astype(np.float32), bits, 0.8, 5_000).threshold == 0.999
