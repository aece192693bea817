"""Several questions about one picture, each learnt as if it were asked alone: a message tree.

Sets of visual questions have many questions per picture, and the published mixes join them into one conversation, so
that the picture is read once. But then each question is learnt after the answers to those before it, which reveal much
of what the picture shows, while a benchmark asks one question at a time. A tree gives both: what all questions begin
with, including the picture, is the trunk, and each question with its answer is a branch. A position sees only the trunk
and its own branch:

    ids          trunk       branch 1          branch 2
    positions    0 ... t-1   t, t+1, ...       t, t+1, ...

so that losses and gradients equal those of the questions as separate samples, for the number of tokens of one
conversation. (attention.py restricts what each branch sees.) Dialogues that build on earlier answers must stay whole.

Source: Molmo (arXiv 2409.17146) trains the annotations of a picture this way; the name is from Molmo2.
"""

from __future__ import annotations

import os.path
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from train.config import Trees
from train.data.encoder import IGNORED, Encoded, Encoder
from train.data.prompts import Rejected, Turn

WORDS = 5  # of a short answer, at most: a word, a phrase, a name, a box; not a sentence that a dialogue builds on


def questions(turns: Sequence[Turn], kind: Trees) -> list[list[Turn]]:
    """Return one conversation per question, the pictures first; none if the questions must stay together.

    They must if there is only one, if not all pictures come with the first, or some stand in the middle of its text, if
    an answer is missing and, for kind "short", if an answer has more than `WORDS` words.
    """
    system = [turn for turn in turns if turn.role == "system"]
    asked, answered = turns[len(system) :: 2], turns[len(system) + 1 :: 2]
    if not kind or len(answered) < 2 or not all(turn.text for turn in answered):
        return []
    pictures, texts = asked[0].num_images, sum(part is not None for part in asked[0].parts)
    if not pictures or texts > 1 or any(turn.num_images for turn in asked[1:]):
        return []
    if kind == "short" and any(len(turn.text.split()) > WORDS for turn in answered):
        return []
    alone = (Turn("user", (None,) * pictures + ((turn.text,) if turn.text else ())) for turn in asked)
    return [[*system, question, answer] for question, answer in zip(alone, answered, strict=True) if answer.learnt]


def encode_tree(encoder: Encoder, turns: Sequence[Turn], max_length: int) -> Encoded | None:
    """Encode a conversation as a tree, cut at `max_length` tokens; None if it cannot be one."""
    conversations = questions(turns, encoder.trees)
    if not conversations:
        return None
    try:
        alone = [encoder.encode(conversation, max_length) for conversation in conversations]
    except Rejected:  # a question that is longer than max_length by itself
        return None
    trunk = len(os.path.commonprefix([one.ids.tolist() for one in alone]))
    # The position that predicts a branch's first label must lie in the branch: in the row, the trunk has one successor.
    trunk = min(trunk, *(int(np.argmax(one.labels != IGNORED)) - 1 for one in alone))
    if any(encoder.image_id in one.ids[trunk:] for one in alone):
        return None
    ids, labels, room = [alone[0].ids[:trunk]], [alone[0].labels[:trunk]], max_length - trunk
    for one in alone:
        branch = one.labels[trunk:][:room]
        if (branch != IGNORED).any():
            ids.append(one.ids[trunk:][:room])
            labels.append(branch)
            room -= len(branch)
        else:
            room = 0
    whole = trunk + sum(len(one.ids) - trunk for one in alone)
    return Encoded(
        np.concatenate(ids),
        np.concatenate(labels),
        alone[0].num_images,
        truncated=any(one.truncated for one in alone) or sum(map(len, ids)) < whole,
        thinks=any(one.thinks for one in alone),
        shortened=any(one.shortened for one in alone),
        tree=tuple(map(len, ids)),
    )


def positions(length: int, tree: Sequence[int]) -> NDArray[np.int64]:
    """Return the positions i64 [length] of a document; tree: the lengths of its trunk and branches, () without any."""
    if not tree:
        return np.arange(length)
    trunk, *branches = tree
    return np.concatenate([np.arange(trunk), *(trunk + np.arange(branch) for branch in branches)])


def squares(length: int, tree: Sequence[int]) -> int:
    """Return the cost of attention: the squared length or, for a tree, the squared trunk and what each branch adds."""
    if not tree:
        return length**2
    trunk, *branches = tree
    return trunk**2 + sum((trunk + branch) ** 2 - trunk**2 for branch in branches)
