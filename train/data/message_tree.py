"""Several questions about one picture, each learnt as if it were asked alone: a message tree.

Data of visual questions has many a picture, and the published mixes join them to one conversation, so that the picture
is read once. But then each question is learnt behind the answers to those before it, which tell much of what the
picture shows, and a benchmark asks one at a time. A tree has both: what all questions begin with, the picture among it,
is the trunk, and each question with its answer a branch. A position sees the trunk and its own branch alone:

    ids          trunk       branch 1          branch 2
    positions    0 ... t-1   t, t+1, ...       t, t+1, ...

so that losses and gradients are those of the questions as samples of their own, at the tokens of one conversation.
(attention.py shows each branch what it may see.) Conversations that go on from what was said before must stay whole.

Source: Molmo (arXiv 2409.17146) trains the annotations of a picture that way; Molmo2 names it so.
"""

from __future__ import annotations

import os.path
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from train.config import Trees
from train.data.encoder import IGNORED, Encoded, Encoder
from train.data.prompts import Rejected, Turn

WORDS = 5  # of a short answer, at most: a word, a phrase, a name, a box; not the sentence that a dialogue goes on from


def questions(turns: Sequence[Turn], kind: Trees) -> list[list[Turn]]:
    """Return the conversation of each question alone, the pictures first; none where they must stay together.

    They must where there is one question, where not all pictures are shown with the first, or in the midst of its text,
    where an answer is missing, and, of kind "short", where one has more than `WORDS` words.
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
    """Encode a conversation as a tree, cut at `max_length` tokens; None where it is none."""
    conversations = questions(turns, encoder.trees)
    if not conversations:
        return None
    try:
        alone = [encoder.encode(conversation, max_length) for conversation in conversations]
    except Rejected:  # a question that is longer than max_length by itself
        return None
    trunk = len(os.path.commonprefix([one.ids.tolist() for one in alone]))
    # What predicts a branch's first label must lie in the branch: the trunk has one successor in a row.
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
    """Return what attention costs: the squared length, and of a tree the squared trunk and what each branch adds."""
    if not tree:
        return length**2
    trunk, *branches = tree
    return trunk**2 + sum((trunk + branch) ** 2 - trunk**2 for branch in branches)
