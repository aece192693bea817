"""Balance over the concepts that pictures show, against slow references; vocabularies that are none."""

import numpy as np
import pytest
from clouds import unit
from hypothesis import given, settings
from hypothesis import strategies as st

from curate.ask import concept_names, matches, vocabularies
from curate.errors import UsageError
from curate.select import catalogue
from curate.select.frame import Frame
from curate.select.steps import by_concept

TEXTS = [f"thing {number}" for number in range(12)]


def world(seed, rows=240, dim=16, things=12):
    """Images that show one of a few things, by Zipf's law, and the texts of these; a tenth shows none."""
    rng = np.random.default_rng(seed)
    texts = unit(rng.normal(size=(things, dim))).astype(np.float32)
    thing = rng.choice(things, rows, p=(1 / np.arange(1, things + 1)) / (1 / np.arange(1, things + 1)).sum())
    image = unit(texts[thing] + rng.normal(size=(rows, dim)) * 0.6 / np.sqrt(dim))
    image[: rows // 10] = unit(-texts.mean(0) + rng.normal(size=(rows // 10, dim)) * 0.02)
    return image.astype(np.float16), texts, rng


def frame_of(seed, bad=0.05, **facts):
    """A frame over such a world."""
    image, texts, rng = world(seed)
    score = rng.normal(0.3, 0.05, len(image)).astype(np.float32)
    return Frame(
        good=rng.random(len(image)) >= bad,
        columns={"clip_score": lambda: score},
        groups={},
        vectors=lambda rows: image[rows],
        lines=lambda name: TEXTS,
        embed_texts=lambda asked, listed=False: texts[: len(asked)],
        **facts,
    )


def slow_match(image, texts, cut, per_image):
    """Sort all concepts of each image."""
    cosines = image.astype(np.float64) @ texts.astype(np.float64).T
    found = []
    for row in cosines:
        best = sorted(range(len(row)), key=lambda c: (-row[c], c))[:per_image]
        found.append(sorted(c for c in best if row[c] > cut))
    return found


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("panel", [1, 64, 1 << 20])
def test_an_image_has_the_nearest_concepts_above_the_cut(seed, panel, monkeypatch):
    image, texts, _ = world(seed)
    monkeypatch.setattr(matches, "PANEL", panel)
    monkeypatch.setattr(matches, "READ_ROWS", 50)
    rows = np.arange(0, len(image), 2)
    for per_image, cut in ((1, -1.0), (3, 0.2), (5, 0.5), (12, 0.0)):
        found = matches.match(image.__getitem__, rows, texts, cut, per_image)
        assert [[c for c in row if c >= 0] for row in found.tolist()] == slow_match(image[rows], texts, cut, per_image)
        assert (np.sort(np.where(found < 0, 99, found), axis=1) == np.where(found < 0, 99, found)).all()


def test_what_f32_cannot_tell_apart_is_told_in_f64():
    """Concepts that differ in their last bits, and a cut that lies on a cosine."""
    rng = np.random.default_rng(0)
    image = unit(rng.normal(size=(50, 8))).astype(np.float16)
    base = unit(rng.normal(size=(1, 8))).astype(np.float32)
    texts = np.concatenate([base + np.float32(3e-7) * rng.normal(size=(6, 8)).astype(np.float32), base, base])
    cut = float(image[7].astype(np.float64) @ texts[2].astype(np.float64))
    for per_image in (1, 2, 4):
        found = matches.match(image.__getitem__, np.arange(50), texts, cut, per_image)
        assert [[c for c in row if c >= 0] for row in found.tolist()] == slow_match(image, texts, cut, per_image)


def test_the_cut_is_above_what_shuffled_pairs_reach():
    image, texts, _ = world(1)
    cut = matches.read_cut(image.__getitem__, np.arange(len(image)), texts)
    cosines = image.astype(np.float32) @ texts.T
    nearest, shows = cosines.argmax(axis=1), np.arange(len(image)) >= len(image) // 10
    others = np.array([[c for c in range(12) if c != own] for own in nearest])
    assert np.mean(np.take_along_axis(cosines, others, axis=1) > cut) < 0.08
    assert np.mean(cosines.max(axis=1)[shows] > cut) > 0.95 and np.mean(cosines.max(axis=1)[~shows] > cut) < 0.1
    assert matches.read_cut(image.__getitem__, np.arange(1), texts) == -1  # nothing to shuffle
    assert matches.read_cut(image.__getitem__, np.arange(9), texts[:1]) == -1


def slow_choice(mentions, score, wanted, rare):
    """Rank the rows inside each concept, best first; a row counts by its least share of any concept's quota."""
    listed = {}
    for row, its in mentions.items():
        for concept in its:
            listed.setdefault(concept, []).append(row)
    share = dict.fromkeys(mentions, float("inf"))
    for rows in listed.values():
        for place, row in enumerate(sorted(rows, key=lambda row: (-score[row], row))):
            share[row] = min(share[row], (place + 1) / (min(rare, len(rows)) if rare else 1))
    return set(sorted(mentions, key=lambda row: (share[row], -score[row], row))[:wanted])


@given(st.integers(0, 40), st.integers(1, 260), st.integers(1, 6), st.sampled_from([0, 1, 3, 20, 1000]))
@settings(max_examples=40, deadline=None)
def test_the_rows_that_stay_are_those_of_the_least_shares(seed, wanted, per_image, rare):
    frame = frame_of(seed)
    frame.alive &= np.random.default_rng(seed).random(len(frame.good)) < 0.8
    [step] = catalogue.parse([f'concepts("list.txt", {wanted}, per_image={per_image}, t={rare})'])
    verdict = step.run(frame)
    rows = np.flatnonzero(frame.good)
    texts = frame.embed_texts(TEXTS)
    cut = matches.read_cut(frame.vectors, rows, texts)
    found = dict(zip(rows.tolist(), slow_match(frame.vectors(rows), texts, cut, per_image), strict=True))
    alive = {row: its for row, its in found.items() if frame.alive[row]}
    expected = slow_choice(alive, frame.column("clip_score"), wanted, rare)
    assert set(np.flatnonzero(verdict.keep).tolist()) == expected
    assert len(expected) == min(wanted, int(frame.alive.sum()))
    facts = verdict.estimates
    assert facts["unmatched_rows"] == sum(not its for its in alive.values())
    assert facts["unmatched_kept"] == sum(not alive[row] for row in expected)
    for concept, before, after in facts[by_concept.LISTED]["frequent"]:
        number = TEXTS.index(concept)
        assert before == sum(number in its for its in alive.values())
        assert after == sum(number in alive[row] for row in expected)
    assert not (set(verdict.reserve.tolist()) & expected)


@pytest.mark.parametrize("seed", range(3))
def test_a_smaller_budget_is_part_of_a_larger_one_and_is_spread_more_evenly_than_the_pool(seed):
    kept = {}
    for wanted in (20, 60, 120):
        [step] = catalogue.parse([f'concepts("list.txt", {wanted}, per_image=1)'])
        verdict = step.run(frame_of(seed))
        kept[wanted] = set(np.flatnonzero(verdict.keep).tolist())
        assert verdict.estimates["effective_after"] > verdict.estimates["effective_concepts"]
    assert kept[20] < kept[60] < kept[120]


def test_t_is_where_rare_concepts_have_their_share_of_the_mentions():
    counts = np.array([1, 1, 2, 4, 8, 84])
    for share, t in ((0.01, 1), (0.02, 1), (0.03, 2), (0.08, 4), (0.16, 8), (0.17, 84), (1.0, 84)):
        assert by_concept.tail_count(counts, share) == t
    assert by_concept.tail_count(np.zeros(3, np.int64), 0.5) == 1
    frame = frame_of(0)
    steps = catalogue.parse([f'concepts("list.txt", 50{rare})' for rare in (", tail=0.2", ", t=1", "")])
    by_tail, by_one, by_budget = (step.run(frame) for step in steps)
    assert by_tail.estimates["t"] > 1
    assert (by_one.keep == by_budget.keep).all()  # quotas of one row each fill concepts alike


def test_concepts_that_the_model_cannot_tell_apart_are_counted():
    vectors = np.array([[1, 0], [0, 1], [1, 0], [0.6, 0.8], [1, 0]], np.float16)
    assert by_concept.count_alike(vectors) == 3 and by_concept.count_alike(vectors[:2]) == 0


def test_a_list_is_read_as_people_write_it():
    lines = ["\ufeffdog", " Dog ", "", "\u200b", "wedding   dress", "caf\u0065\u0301", "café", "狗", "🐶", "a\tb"]
    concepts, told = vocabularies.clean(lines, "list.txt")
    assert concepts == ("dog", "wedding dress", "café", "狗", "🐶", "a b")
    assert told == {"empty_lines": 2, "repeated": 2}


@pytest.mark.parametrize(
    "lines, told",
    [
        ([], "names no concept"),
        (["", "  ", "\u3000"], "names no concept"),
        (["dog", "a\0b"], "line 2: it holds control characters"),
        (["dog", "x" * 201], "line 2: 201 characters"),
        ((f"thing {i}" for i in range(1_000_000)), "has more than 500,000 concepts, of 1,000,000 lines"),
    ],
)
def test_a_list_that_is_none_is_refused_in_words(lines, told):
    with pytest.raises(UsageError, match=told):
        vocabularies.clean(list(lines), "list.txt")


def test_the_captions_own_phrases_make_a_vocabulary():
    captions = ["a red dog on the beach", "the red dog", "red cat", "a dog 42"] * 5 + ["once only"]
    found = vocabularies.of_captions(captions)
    assert set(found) == {"dog", "red", "red dog", "beach", "red cat"}  # "cat" stands nowhere but in "red cat"
    assert found[:2] == ("dog", "red")
    with pytest.raises(UsageError, match="no phrase is in 5 captions"):
        vocabularies.read("pool", None, lambda: ["once only"])
    named = vocabularies.read("imagenet-1k", None, None)
    assert "tench" in named.concepts and 990 <= len(named.concepts) <= 1000 and "timm" in named.told["vocabulary"]


@pytest.mark.parametrize("step", ["per_image=0", "per_image=51", "t=5, tail=0.1", "tail=2"])
def test_arguments_that_cannot_be_are_refused(step):
    with pytest.raises(UsageError, match="expected"):
        catalogue.parse([f'concepts("list.txt", 5, {step})'])[0].run(frame_of(0))


def test_a_cluster_is_named_by_what_it_has_and_others_have_not():
    rng = np.random.default_rng(3)
    texts = unit(rng.normal(size=(30, 24))).astype(np.float32)
    everywhere = texts[29]  # near all clusters
    centroids = unit(texts[:8] + everywhere + 0.1 * rng.normal(size=(8, 24)) / np.sqrt(24)).astype(np.float32)
    concepts = [f"thing {number}" for number in range(30)]
    named = concept_names.names(centroids, [2, 5, 7], concepts, texts)
    slow = centroids.astype(np.float64) @ texts.T
    for cluster, name in named.items():
        scores = slow[cluster] - slow.mean(axis=0) / 2
        best = [c for c in np.argsort(-scores, kind="stable") if slow[cluster, c] > slow[:, c].mean()]
        assert name == ", ".join(concepts[c] for c in best[:3]) and f"thing {cluster}" in name
    within = concept_names.names(centroids, [2], ["old thing" if c == 2 else "thing" for c in range(30)], texts)
    assert within[2] == "old thing"  # "thing" stands within it
