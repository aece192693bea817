"""Message trees: each question of a picture as if it were a sample of its own, at the tokens of one."""

import numpy as np
import pytest
from test_own_template import FAMILIES
from test_own_template import tokenizer as own_tokenizer
from test_prompts import TOKENIZERS, talk

from train.data.encoder import IGNORED, Encoder
from train.data.message_tree import encode_tree, positions, questions, squares
from train.data.own_template import read_own_template
from train.data.prompts import get_template, parse

THREE = talk(
    ("human", "<image>\nwhat is this?"),
    ("gpt", "a cat"),
    ("human", "what is it?"),
    ("gpt", "a cat"),
    ("human", "why?"),
    ("gpt", "it is."),
)
ENCODERS = {
    **{f"{t} {name}": (TOKENIZERS[t], get_template(name)) for t in ("bytes", "legacy") for name in ("vicuna", "gemma")},
    "words qa": (TOKENIZERS["words"], get_template("qa")),
    **{name: (own := own_tokenizer(source), read_own_template(own)) for name, source in FAMILIES.items()},
}


def encoder(kind, trees="all"):
    tokenizer, template = ENCODERS[kind]
    return Encoder(tokenizer, template, "<image>", 3, trees)


@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize("system", [(), (("system", "be short"),)])
def test_trunk_and_branch_are_the_question_alone(kind, system):
    enc = encoder(kind)
    turns = parse(talk(*system) + THREE, 1)
    tree = encode_tree(enc, turns, 4096)
    trunk, *branches = tree.tree
    assert len(branches) == 3 and sum(tree.tree) == len(tree.ids) and tree.num_images == 1
    assert (tree.ids[:trunk] == enc.image_id).sum() == 3 == (tree.ids == enc.image_id).sum()
    start = trunk
    for branch, conversation in zip(branches, questions(turns, "all"), strict=True):
        alone = enc.encode(conversation, 4096)
        own = slice(start, start + branch)
        assert [*tree.ids[:trunk], *tree.ids[own]] == alone.ids.tolist()
        assert [*tree.labels[:trunk], *tree.labels[own]] == alone.labels.tolist()
        assert tree.labels[start] == IGNORED, "what predicts a branch's first label lies in the branch"
        assert positions(len(tree.ids), tree.tree)[own].tolist() == list(range(trunk, trunk + branch))
        start += branch
    assert (tree.labels[:trunk] == IGNORED).all() and not tree.truncated


def test_a_question_asked_twice_keeps_what_predicts_its_answers():
    enc = encoder("words qa")
    twice = parse(talk(("human", "<image>\nwhy?"), ("gpt", "it is."), ("human", "why?"), ("gpt", "a cat")), 1)
    tree = encode_tree(enc, twice, 64)
    begins = np.cumsum(tree.tree)[:-1]
    assert all(tree.labels[b] == IGNORED and tree.labels[b + 1] != IGNORED for b in begins)
    assert tree.ids[begins[0]] == tree.ids[begins[1]]


@pytest.mark.parametrize(
    "turns, pictures",
    [
        (THREE[:2], 1),  # one question
        (THREE[2:], 0),  # no picture
        (talk(("human", "is <image> this?"), ("gpt", "a"), ("human", "b?"), ("gpt", "b")), 1),  # in mid-text
        (talk(("human", "<image>\na?"), ("gpt", "a"), ("human", "<image>\nb?"), ("gpt", "b")), 2),  # a second one later
        (talk(("human", "<image>\na?"), ("gpt", ""), ("human", "b?"), ("gpt", "b")), 1),  # an answer lacks
    ],
)
def test_other_conversations_stay_whole(turns, pictures):
    assert questions(parse(turns, pictures), "all") == []
    assert encode_tree(encoder("words qa"), parse(turns, pictures), 64) is None


def test_an_answer_that_is_only_given_is_no_branch():
    given = [THREE[0], {**THREE[1], "loss": False}, *THREE[2:]]
    assert questions(parse(given, 1), "all") == questions(parse(THREE, 1), "all")[1:]


def test_only_short_answers_part_a_conversation_where_it_says_so():
    long = [*THREE[:-1], {"from": "gpt", "value": "it is one since it says so itself"}]
    assert len(questions(parse(THREE, 1), "short")) == len(questions(parse(long, 1), "all")) == 3
    assert questions(parse(long, 1), "short") == questions(parse(THREE, 1), "") == []


def test_a_picture_behind_its_question_comes_first_and_several_stay_in_order():
    behind = parse([{"from": "human", "value": "what is this?\n<image>\n<image>"}, *THREE[1:]], 2)
    assert [turn.parts[:2] for turn, _ in questions(behind, "all")] == [(None, None)] * 3


@pytest.mark.parametrize("length", range(8, 60))
def test_a_tree_is_cut_where_a_conversation_would_be(length):
    """Nothing beyond max_length, no branch without an answer, and what was cut is told."""
    enc = encoder("words qa")
    turns = parse(THREE, 1)
    whole, cut = encode_tree(enc, turns, 4096), encode_tree(enc, turns, length)
    if cut is None:  # no room for the longest question alone: the conversation is cut
        assert length < max(len(enc.encode(one, 4096).ids) for one in questions(turns, "all"))
        return
    assert len(cut.ids) <= length and cut.truncated == (len(whole.ids) > length)
    assert cut.ids.tolist() == whole.ids[: len(cut.ids)].tolist()
    start = cut.tree[0]
    for branch in cut.tree[1:]:
        assert (cut.labels[start : start + branch] != IGNORED).any()
        start += branch


def test_squares_count_what_positions_see():
    for tree in ((4, 3, 2), (1, 5), (6, 1, 1, 1)):
        trunk, *branches = tree
        seen = sum(range(1, trunk + 1)) + sum(trunk + i for branch in branches for i in range(1, branch + 1))
        assert squares(sum(tree), tree) == 2 * seen - sum(tree)
    assert squares(7, ()) == 49
