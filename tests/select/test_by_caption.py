"""Balancing what captions name: phrases by LLaVA's rule, entries by MetaCLIP's, against slow references."""

import json
import random
import sys

import numpy as np
import pytest
from clouds import clustered
from hypothesis import given, settings
from hypothesis import strategies as st
from test_vector_steps import kept

from curate.errors import UsageError
from curate.select import catalogue
from curate.select.steps import by_caption, phrases
from curate.words import words


def test_a_phrase_is_a_noun_chunk_less_its_determiners():
    extract, name = phrases.extractor("spacy:en_core_web_sm")
    captions = ["The RED ball and a   dog", "it", ""]
    assert list(extract(captions)) == [["red ball", "dog"], [], []]
    assert name == "spacy 3.8, en_stand_in 1.0"


def test_extractors_that_are_not_there_are_refused_never_replaced(monkeypatch):
    for name in ("nltk", "simple", "spacy:"):
        with pytest.raises(UsageError, match="expected a spaCy pipeline") as refused:
            phrases.extractor(name)
        assert refused.value.hint == "extractor='spacy:en_core_web_sm'"
    with pytest.raises(UsageError, match="no pipeline 'de_core' here") as refused:
        phrases.extractor("spacy:de_core")
    assert refused.value.hint == "python -m spacy download de_core"
    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(UsageError, match="needs spaCy, which is not installed") as refused:
        catalogue.parse(["noun_phrases()"])[0].run(None)
    assert "data-curate[text]" in refused.value.hint and "download en_core_web_sm" in refused.value.hint


def slow_llava(rows, names, least, cap, choose):
    """Walk the names from the rarest, as the paper says, adding to the pool of candidates."""
    captions = {}
    for row, name in zip(rows, names, strict=True):
        captions.setdefault(name, []).append(row)
    pool = set()
    for name in sorted(captions, key=lambda name: len(captions[name])):
        if len(captions[name]) < least:
            continue
        pool |= set(captions[name] if len(captions[name]) <= cap else choose(captions[name], cap))
    return pool


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(1, 9))
def test_the_phrase_rule_is_llavas(seed, least, cap):
    rng = np.random.default_rng(seed)
    pairs = np.unique(np.stack([rng.integers(0, 60, 150), rng.zipf(1.6, 150) % 30]), axis=1)
    rows, names = pairs[0], pairs[1].astype(np.uint64)
    kept, facts = by_caption.balance_phrases(rows, names, least, cap, rng)
    most = slow_llava(rows, names, least, cap, lambda captions, cap: captions)
    none = slow_llava(rows, names, least, cap, lambda captions, cap: [])
    assert none <= set(kept.tolist()) <= most and facts["phrases"] == len(set(names.tolist()))
    whole, _ = by_caption.balance_phrases(rows, names, least, 1000, rng)
    assert set(whole.tolist()) == slow_llava(rows, names, least, 1000, None)
    sizes = {name: int((names == name).sum()) for name in names}
    for name, size in sizes.items():
        assert len(set(rows[names == name]) & set(kept.tolist())) >= (min(size, cap) if size >= least else 0)


def test_a_common_phrase_keeps_a_random_choice_of_its_own():
    rows, names = np.arange(1000), np.zeros(1000, np.uint64)
    drawn = [by_caption.balance_phrases(rows, names, 3, 100, np.random.default_rng(seed))[0] for seed in range(50)]
    assert {len(kept) for kept in drawn} == {100}
    assert np.abs(np.bincount(np.concatenate(drawn), minlength=1000) / 50 - 0.1).mean() < 0.05


WORDS = ["red", "car", "a", "ball", "dog", "new", "york"]
TEXTS = st.lists(st.lists(st.sampled_from([*WORDS, "New", ",", "york's"]), max_size=9).map(" ".join), max_size=12)


def slow_matches(text, entries):
    spaced = f" {' '.join(words(text))} "
    return [place for place, entry in enumerate(entries) if f" {entry} " in spaced]


@settings(deadline=None, max_examples=80)
@given(TEXTS, st.lists(st.lists(st.sampled_from(WORDS), min_size=1, max_size=3).map(" ".join), max_size=9, unique=True))
def test_all_entries_are_found_in_one_pass(texts, entries):
    rows, found = by_caption.Trie(entries).find(texts)
    expected = [(row, entry) for row, text in enumerate(texts) for entry in slow_matches(text, entries)]
    assert sorted(zip(rows.tolist(), found.tolist(), strict=True)) == expected


@settings(deadline=None, max_examples=40)
@given(TEXTS, st.integers(1, 3))
def test_common_words_and_pairs_of_the_pool(texts, least):
    counts = {}
    for text in texts:
        found = words(text)
        for gram in {*found, *(" ".join(pair) for pair in zip(found, found[1:], strict=False))}:
            counts[gram] = counts.get(gram, 0) + 1
    found = by_caption.common_grams(lambda: iter([texts[:5], texts[5:]]), least)
    assert sorted(found) == sorted(gram for gram, count in counts.items() if count >= least)


def test_chances_are_those_of_one_draw_an_entry():
    counts = np.array([5, 20, 100])
    rows, entries = np.array([0, 1, 2, 2, 3, 3]), np.array([0, 1, 1, 2, 0, 2])
    chances = by_caption.draw_chances(rows, entries, counts, 10, 5)
    assert chances == pytest.approx([1, 0.5, 1 - 0.5 * 0.9, 1, 0])
    draw, kept = random.Random(0), np.zeros(5)
    for _ in range(4000):
        for row in range(5):  # the release's loop
            kept[row] += any(draw.random() < 10 / max(counts[e], 10) for e in entries[rows == row])
    assert np.abs(kept / 4000 - chances).max() < 0.03


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    return clustered(tmp_path_factory.mktemp("pool"))


def test_phrases_of_a_pool(pool, tmp_path):
    # captions are "caption number 0" … "caption number 96": one phrase each, of nine or ten rows
    found, manifest = kept(pool.path, tmp_path / "sel", "noun_phrases(min=3, cap=4)")
    numbers = np.arange(len(pool.ok)) % 97
    assert np.bincount(numbers[found], minlength=97).tolist() == [4] * 97
    assert manifest["funnel"][0]["estimates"] == {
        "extractor": "spacy 3.8, en_stand_in 1.0",
        "phrases": 97,
        "too_rare": 0,
        "capped": 97,
    }


def test_entries_of_a_file_and_of_the_pool(pool, tmp_path):
    (tmp_path / "entries.json").write_text(json.dumps(["Number 3", "caption number 5", "nowhere"]))
    step = f"metaclip(t=1_000, entries='{tmp_path / 'entries.json'}')"
    found, manifest = kept(pool.path, tmp_path / "sel", step)
    assert (found == pool.ok & np.isin(np.arange(len(pool.ok)) % 97, [3, 5])).all()
    assert manifest["inputs"]["file-1"]["path"] == "../entries.json"
    assert manifest["funnel"][0]["estimates"]["entries"] == 3 and manifest["funnel"][0]["estimates"]["matched"] == 2
    found, manifest = kept(pool.path, tmp_path / "pool", "metaclip(t=2, least=5)")
    n = int(pool.ok.sum())
    chance = 1 - (1 - 2 / n) ** 3 * (1 - 2 / 9) ** 2  # caption, number, both; "7", "number 7"
    assert abs(found.sum() - chance * n) < 5 * np.sqrt(chance * n)
    again, _ = kept(pool.path, tmp_path / "again", "metaclip(t=2, least=5)")
    other, _ = kept(pool.path, tmp_path / "other", "metaclip(t=2, least=5)", seed=1)
    assert (again == found).all() and (other != found).any()
    with pytest.raises(UsageError, match="nowhere.txt, which a step reads, does not exist"):
        kept(pool.path, tmp_path / "none", "metaclip(entries='nowhere.txt')")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(UsageError, match="not a JSON list of texts"):
        kept(pool.path, tmp_path / "bad", f"metaclip(entries='{tmp_path / 'bad.json'}')")
