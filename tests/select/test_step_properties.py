"""What holds for steps whatever the rows: their order, a moved threshold, a second time, the budget, the blocks."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_coverage import unit
from test_near_pairs import forest_of

from curate.select import computed_columns
from curate.select.catalogue import parse
from curate.select.frame import Frame
from curate.select.steps import by_caption, coverage, pair_scores

N, K = 90, 4


def frame_of(seed, order=None, n=N):
    """Make a frame of n rows drawn by the seed, in the given order, with clusters, embeddings, captions and edges."""
    rng = np.random.default_rng(seed)
    cluster = rng.integers(0, K, n)
    image = unit(2 * rng.normal(size=(K, 5))[cluster] + rng.normal(size=(n, 5))).astype(np.float16)
    copy = rng.random(n) < 0.3
    image[copy] = image[rng.integers(0, n, n)][copy]
    text = unit(image.astype(np.float32) + 0.5 * rng.normal(size=(n, 5)))
    order = np.arange(n) if order is None else order
    captions = [" ".join(rng.choice(["red", "car", "old", "dog", "sea"], 2)) for _ in range(n)]
    columns = {"clip_score": rng.permutation(n) / n, "centroid_similarity": rng.permutation(n) / n, "cluster": cluster}
    columns = {name: values[order] for name, values in columns.items()}
    image, text, cluster = image[order], text[order], cluster[order]
    rows = np.argsort(cluster, kind="stable")
    bounds = np.searchsorted(cluster[rows], np.arange(K + 1)).tolist()
    a, b, similarity = forest_of(image[rows], 0.5, bounds)
    a, b = np.sort([rows[a], rows[b]], axis=0)
    told = np.array([captions[row] for row in order])
    target = unit(np.random.default_rng(seed + 1).normal(size=(6, 5))).astype(np.float16)
    return Frame(
        good=rng.random(n)[order] > 0.1,
        columns={name: lambda values=values: values for name, values in columns.items()},
        groups={
            "cluster": lambda: cluster, "caption": lambda: np.unique(told, return_inverse=True)[1],
            "uid": lambda: order, "row": lambda: order % 7,
        },
        edges=lambda: (a, b, similarity, np.full(len(a), 255, np.uint8)),
        floor=0.5,
        vectors=lambda rows: image[rows],
        text_vectors=lambda rows: text[rows],
        captions=lambda rows: told[rows].tolist(),
        centroids=lambda: unit(np.stack([image[cluster == c].sum(axis=0, dtype=np.float32) for c in range(K)])),
        compute=computed_columns.compute,
        foreign=lambda directory: iter([(target, np.arange(6) + 10_000)]),
    )  # fmt: skip


def run(frame, *texts):
    for step in parse(texts):
        step.check(frame)
        frame.alive &= step.run(frame).keep
    return frame.alive


DETERMINISTIC = [
    "rank(clip_score, 0.2, 0.7)",
    "top(clip_score, 20)",
    "bottom(centroid_similarity, 20)",
    "above(clip_score, 0.5)",
    "cap(cluster, 3, keep='max:clip_score')",
    "balance(row, 21, keep='min:clip_score')",
    "dedup(0.9, keep='max:clip_score')",
    "dedup(0.9, keep='middle')",
    "dedup(0.9, keep='near', rule='semdedup')",
    "dedup(0.9, keep='far', rule='greedy')",
    "typical(20)",
    "coincide(20)",
    "top(typicality, 20)",
    "bottom(redundancy, 20)",
    "bottom(redundancy(column=cluster), 20)",
    "top(neg_clip_loss, 20)",
    "top(norm_sim('x'), 20)",
    "exclude('x', 0.6)",
    "image_based('x')",
    "noun_phrases(min=3, cap=1000)",
    "placeholders(3, threshold=0.9)",
]
TIED = ("dedup(0.9, keep='middle')", "typical", "coincide", "top(typ", "top(norm", "bottom(red")  # copies tie


@pytest.mark.parametrize("text", DETERMINISTIC)
@settings(deadline=None, max_examples=6)
@given(seed=st.integers(0, 999))
def test_the_order_of_the_rows_does_not_matter(text, seed):
    order = np.random.default_rng(seed).permutation(N)
    plain, moved = run(frame_of(seed), text), run(frame_of(seed, order), text)
    if text.startswith(TIED):  # between equal rows the row number decides: compare what the rows are
        image = frame_of(seed).vectors(np.arange(N)).astype(np.float32).round(3)
        left, right = image[plain], image[order[moved]]
        left, right = left[np.lexsort(left.T)], right[np.lexsort(right.T)]
        assert len(left) == len(right) and (left != right).any(axis=1).sum() <= 0.15 * len(left) + 1
    else:
        assert (plain[order] == moved).all()


@pytest.mark.parametrize(
    "text, values",
    [
        ("above(clip_score, {})", [0.8, 0.5, 0.1]),
        ("at_most(clip_score, {})", [0.1, 0.5, 0.8]),
        ("rank(clip_score, 0, {})", [0.1, 0.4, 1.0]),
        ("rank(neg_clip_loss, 0, {})", [0.1, 0.4, 1.0]),
        ("top(clip_score, {})", [1, 9, 40]),
        ("sample({})", [1, 9, 40]),
        ("cap(cluster, {})", [1, 3, 9]),
        ("dedup({}, keep='near', rule='semdedup')", [0.6, 0.8, 0.95]),
        ("exclude('x', {})", [0.2, 0.5, 0.9]),
        ("placeholders({}, threshold=0.9)", [2, 4, 9]),
        ("noun_phrases(min=1, cap={})", [1, 3, 9]),
        ("metaclip(t={}, least=2)", [1, 5, 50]),
    ],
)
@settings(deadline=None, max_examples=5)
@given(seed=st.integers(0, 999))
def test_a_looser_threshold_keeps_what_the_tighter_kept(text, values, seed):
    kept = [run(frame_of(seed), text.format(value)) for value in values]
    for tight, loose in zip(kept, kept[1:], strict=False):
        assert (loose | ~tight).all()


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 999), st.sampled_from(["components", "semdedup"]))
def test_a_lower_threshold_of_dedup_keeps_no_more_rows(seed, rule):
    counts = [run(frame_of(seed), f"dedup({x}, keep='near', rule='{rule}')").sum() for x in (0.95, 0.9, 0.7)]
    assert counts == sorted(counts, reverse=True)  # greedy may keep more at a lower threshold


@pytest.mark.parametrize(
    "text",
    [text for text in DETERMINISTIC if not text.startswith(("rank", "noun"))]
    + ["sample(20)", "balance(cluster, 20)", "balance_tree(20, levels=2)", "cap(cluster, 3)"],
)
@settings(deadline=None, max_examples=4)
@given(seed=st.integers(0, 999))
def test_a_second_time_changes_nothing(text, seed):
    frame = frame_of(seed)
    once = run(frame, text).copy()
    assert (run(frame, text) == once).all()


BUDGETS = [
    "sample",
    "top(clip_score, ",
    "bottom(neg_clip_loss, ",
    "balance(cluster, ",
    "balance_tree",
    "typical",
    "coincide",
]


@pytest.mark.parametrize("name", BUDGETS)
@settings(deadline=None, max_examples=12)
@given(seed=st.integers(0, 999), n=st.integers(1, 120))
def test_budgets_are_met_exactly_and_the_reserve_goes_on(name, seed, n):
    frame = frame_of(seed)
    step = parse([f"{name}{n})" if "(" in name else f"{name}({n})"])[0]
    verdict, good = step.run(frame), int(frame.good.sum())
    assert (verdict.keep & ~frame.good).sum() == 0 and verdict.keep.sum() == min(n, good)
    if n > good:
        assert verdict.estimates["asked"] == n and verdict.estimates["available"] == good
    reserve = verdict.reserve.tolist()
    assert len(reserve) == len(set(reserve)) and not verdict.keep[reserve].any() and frame.good[reserve].all()
    if name[:6] in ("sample", "top(cl", "bottom") and n < good:
        more = parse([f"{name}{n + 1})" if "(" in name else f"{name}({n + 1})"])[0].run(frame_of(seed))
        assert more.keep[verdict.keep].all() and more.keep[reserve[0]]


def test_blocks_do_not_show(monkeypatch):
    texts = [
        "top(neg_clip_loss(batch_size=40, batches=2), 50)",
        "top(norm_sim('x'), 45)",
        "typical(30)",
        "coincide(20)",
    ]
    texts += ["noun_phrases(min=2, cap=4)", "metaclip(t=4, least=2)", "bottom(redundancy, 9)"]
    whole = [run(frame_of(3), text).tolist() for text in texts]
    monkeypatch.setattr(pair_scores, "BLOCK", 7)
    monkeypatch.setattr(pair_scores, "READ_ROWS", 5)
    monkeypatch.setattr(coverage, "READ_ROWS", 11)
    monkeypatch.setattr(coverage.redundancy, "__defaults__", (13,))
    monkeypatch.setattr(by_caption, "BLOCK", 17)
    assert [run(frame_of(3), text).tolist() for text in texts] == whole
