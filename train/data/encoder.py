"""Pieces to token ids and labels, with the tokenizer that is exported.

Pieces (prompts.py) are tokenised one by one, so that a label never depends on counting tokens or on finding separators
in the text. The result equals the ids of the rendered chat template (chat.py); tests compare the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from train.config import Trees
from train.data.own_template import OwnTemplate
from train.data.prompts import Piece, Rejected, Template, Turn, pieces
from train.errors import UsageError

IGNORED = -100  # the label of a position without a target
SHORT, MOST_KNOWN = 200, 20_000  # most characters of a text whose ids are cached, and most texts cached


@dataclass(frozen=True)
class Encoded:
    """ids, labels: i32 [n]; an image is a run of the image token; labels are IGNORED at unsupervised positions.

    thinks: the last answer begins with thinking. shortened: the template leaves out a text, such as earlier thinking.
    tree: the lengths of a trunk and of its branches (message_tree.py); () for an ordinary conversation.
    """

    ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    num_images: int
    truncated: bool = False
    thinks: bool = False
    shortened: bool = False
    tree: tuple[int, ...] = ()


class Encoder:
    """Tokenise pieces as the exported processor tokenises the rendered chat template."""

    def __init__(
        self,
        tokenizer: Any,
        template: Template | OwnTemplate,
        image_token: str,
        tokens_per_image: int,
        trees: Trees = "",
    ) -> None:
        self.tokenizer, self.trees = tokenizer, trees
        self.template = template
        self.image_id = int(tokenizer.convert_tokens_to_ids(image_token))
        self.image_token = image_token
        self.tokens_per_image = tokens_per_image
        self._known: dict[str, list[int]] = {}
        needed = template.special_tokens if isinstance(template, Template) else [template.end]
        missing = [t for t in needed if not is_token(tokenizer, t)]
        if missing:
            raise UsageError(f"template {template.name!r} needs {', '.join(missing)}, which the tokenizer lacks")
        if not template.end and tokenizer.eos_token is None:
            raise UsageError(f"template {template.name!r} ends answers with the eos token and the tokenizer has none")
        self.end_token: str = template.end or tokenizer.eos_token
        self.end_id = int(tokenizer.convert_tokens_to_ids(self.end_token))
        bare, full = self._ids("a"), list(tokenizer("a")["input_ids"])
        if full[len(full) - len(bare) :] != bare:
            raise UsageError("the tokenizer appends tokens to every text (an eos post-processor); remove that first")
        self.bos_ids = full[: len(full) - len(bare)]
        if self.bos_ids and not isinstance(template, Template) and self._begins_with_bos(template):
            self.bos_ids = []
        # SentencePiece-like tokenizers put a space before the first word of a text: text that continues other text is
        # therefore tokenised after a newline, which is then cut off.
        newline, inner = self._ids("\n"), self._ids("\na")
        self._anchor = newline if inner[: len(newline)] == newline and inner[len(newline) :] != bare else []
        after = list(tokenizer(self.end_token + "a", add_special_tokens=False)["input_ids"])[1:]
        self._space_after_special = after == bare

    def _begins_with_bos(self, template: OwnTemplate) -> bool:
        first = template.pieces([Turn("user", ("a",))])[0]
        return first.special and self.tokenizer.convert_tokens_to_ids(first.text) == self.bos_ids[0]

    def pieces(self, turns: Sequence[Turn]) -> list[Piece]:
        """Write turns as pieces; if they end with a question, up to where the answer begins."""
        if isinstance(self.template, Template):
            return pieces(turns, self.template, self.end_token)
        return self.template.pieces(turns)

    def _ids(self, text: str) -> list[int]:
        """Tokenise a text by itself; short ones, which templates and benchmarks mostly repeat, are cached."""
        ids = self._known.get(text)
        if ids is None:
            ids = list(self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])
            if len(text) <= SHORT and len(self._known) < MOST_KNOWN:
                self._known[text] = ids
        return ids

    def text_ids(self, text: str, *, after_special: bool) -> list[int]:
        """Tokenise text that follows other text, or a special token (as at the start of a sequence)."""
        if not self._anchor or (after_special and self._space_after_special):
            return self._ids(text)
        return self._ids("\n" + text)[len(self._anchor) :]

    def piece_ids(self, parts: Sequence[Piece]) -> tuple[list[int], list[int]]:
        """Return the ids and labels of pieces, the automatic bos token first."""
        ids = list(self.bos_ids)
        labels = [IGNORED] * len(ids)
        after_special = True
        for piece in parts:
            if piece.text is None:
                new = [self.image_id] * self.tokens_per_image
            elif piece.special:
                new = [int(self.tokenizer.convert_tokens_to_ids(piece.text))]
            else:
                new = self.text_ids(piece.text, after_special=after_special)
            after_special = piece.text is None or piece.special
            ids += new
            labels += new if piece.supervised else [IGNORED] * len(new)
        return ids, labels

    def encode(self, turns: Sequence[Turn], max_length: int) -> Encoded:
        """Encode a conversation, cut at `max_length` tokens.

        Raises: Rejected if the cut would split an image, or leaves no supervised token.
        """
        ids, labels = self.piece_ids(self.pieces(turns))
        truncated = len(ids) > max_length
        if truncated and self.image_id in ids[max_length:]:
            raise Rejected("image_beyond_max_length")
        ids, labels = ids[:max_length], labels[:max_length]
        # A label at position 0 has no position before it that could predict it.
        if not any(label != IGNORED for label in labels[1:]):
            raise Rejected("no_supervised_token")
        num_images, own = sum(turn.num_images for turn in turns), self.template
        told = (False, False) if isinstance(own, Template) else (own.thinking(turns), own.leaves_out(turns))
        return Encoded(np.array(ids, np.int32), np.array(labels, np.int32), num_images, truncated, *told)


def is_token(tokenizer: Any, token: str) -> bool:
    """Whether a tokenizer knows a token by itself."""
    found = tokenizer.convert_tokens_to_ids(token)
    return found is not None and (found != tokenizer.unk_token_id or token == tokenizer.unk_token)
