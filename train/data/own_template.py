"""A language model's own chat template (`template = "chat"`), taken apart into pieces with labels.

The Jinja text is rendered with a mark in place of each text and image of a sample, so that no text can turn into a
special token. Between the marks stand the template's own words and special tokens. They depend only on a conversation's
shape (its roles, and where texts, images and thinking stand), so each shape is rendered once.

Supervised is what the model must write itself. Answer k begins where its rendering departs from the prompt that serving
writes (the turns before it, with `add_generation_prompt`). The two are compared from the last text before the answer
on, since templates write earlier turns differently once another turn follows. The answer ends with the first special
token after it. If a template marks what is generated (`{% generation %}`), nothing outside these marks is supervised.

`<think>…</think>` at the start of an answer is passed to the template, which may leave it out of earlier answers; such
samples are counted. A system text that a template refuses or drops is written before the first question. Templates that
ask for the date get a fixed one, so that the same request gives the same tokens on any day.
"""

from __future__ import annotations

import dataclasses
import datetime
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from train.data.prompts import OWN, Piece, Rejected, Turn, add_special, add_text
from train.errors import UsageError

DATE = datetime.date(2024, 7, 26)  # what Llama 3's template writes where it has no clock
SHAPES = 4096  # layouts kept at a time
Shape = tuple[tuple[str, str, bool], ...]  # per message: its role, its content with marks, whether it is learnt
Layout = list[tuple[int | Piece, bool]]  # a mark's number or the template's own words; whether it is supervised
_MARK = re.compile("\ue000(\\d+)\ue001")
_OPENED, _CLOSED = "<think>", "</think>"
_CLOCK = re.compile(r"""strftime_now\(\s*(['"])([^'"]*)\1\s*\)""")
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def _thought(text: str) -> tuple[str, str, str, str] | None:
    """Split a text that begins with thinking into its opening, the thought, its end, and the answer, spaces included.

    Takes linear time, unlike a regular expression with optional spaces around each part.
    """
    end = text.find(_CLOSED, len(_OPENED))
    if not text.startswith(_OPENED) or end < 0:
        return None
    held, answer = text[len(_OPENED) : end].lstrip(), text[end + len(_CLOSED) :].lstrip()
    thought, opened = held.rstrip(), text[: end - len(held)]
    return opened, thought, text[len(opened) + len(thought) : len(text) - len(answer)], answer


@dataclass(frozen=True)
class OwnTemplate:
    """A chat template: its Jinja text, the special tokens it may name and may write, and what was inferred from it."""

    source: str
    tokens: Mapping[str, str]  # bos_token, eos_token, …
    specials: str  # a regular expression that finds special tokens, with the spaces that they absorb
    end: str = ""  # the special token that ends answers
    folds_system: bool = False
    thinks: bool = False  # the export's default for enable_thinking
    name: str = OWN
    _layouts: dict[tuple[Shape, bool], Layout] = field(default_factory=dict, compare=False, repr=False)

    @property
    def knows_thinking(self) -> bool:
        """Whether the template treats `<think>…</think>` in an answer in its own way."""
        return "</think>" in self.source

    def pieces(self, turns: Sequence[Turn]) -> list[Piece]:
        """Write turns as pieces; if they end with a question, up to where the answer begins.

        Raises: Rejected if the template refuses them or leaves an answer out.
        """
        shape, texts = self._shape(turns)
        out: list[Piece] = []
        for item, supervised in self._layout(shape, self.thinking(turns)):
            if isinstance(item, Piece):
                if item.special:
                    add_special(out, item.text or "", supervised)
                else:
                    add_text(out, item.text or "", supervised)
            elif (text := texts[item]) is None:
                out.append(Piece(None))
            else:
                add_text(out, text, supervised)
        return out

    def thinking(self, turns: Sequence[Turn]) -> bool:
        """Whether the last answer begins with thinking."""
        said = [turn.text for turn in turns if turn.role == "assistant"]
        return self.knows_thinking and bool(said) and bool((found := _thought(said[-1])) and found[1])

    def leaves_out(self, turns: Sequence[Turn]) -> bool:
        """Whether their rendering leaves out a text of the turns, such as the thinking of an earlier answer."""
        shape, texts = self._shape(turns)
        return len(texts) > sum(isinstance(item, int) for item, _ in self._layout(shape, self.thinking(turns)))

    def is_plain(self, turns: Sequence[Turn]) -> bool:
        """Whether the template, given the turns as text, finds thinking in the same places as this class."""
        if not self.knows_thinking:
            return True
        answers = [turn.text for turn in turns if turn.role == "assistant"]
        rest = [found[3] if (found := _thought(text)) else text for text in answers]
        rest += [turn.text for turn in turns if turn.role != "assistant"]
        return not any("think>" in text for text in rest)

    def _shape(self, turns: Sequence[Turn]) -> tuple[Shape, list[str | None]]:
        """Put marks in place of texts; return the shape, and the texts (None: an image) by mark."""
        texts: list[str | None] = []

        def mark(text: str | None) -> str:
            texts.append(text)
            return _mark(len(texts) - 1)

        folded: tuple[str | None, ...] = ()
        shape = []
        for turn in turns:
            if turn.role == "assistant":
                shape.append((turn.role, self._mark_answer(turn.text, mark), turn.learnt))
            elif turn.role == "system" and self.folds_system:
                folded = (turn.text,)
            elif turn.role == "system":
                shape.append((turn.role, mark(turn.text), False))
            else:
                shape.append((turn.role, "\n".join(map(mark, folded + turn.parts)), False))
                folded = ()
        return tuple(shape), texts

    def _mark_answer(self, text: str, mark: Any) -> str:
        found = _thought(text) if self.knows_thinking else None
        if found is None:
            return mark(text) if text else ""
        opened, thought, closed, answer = found
        return opened + (mark(thought) if thought else "") + closed + (mark(answer) if answer else "")

    def _layout(self, shape: Shape, thinking: bool) -> Layout:
        if (shape, thinking) not in self._layouts:
            if len(self._layouts) >= SHAPES:
                self._layouts.clear()
            self._layouts[shape, thinking] = self._lay_out(shape, thinking)
        return self._layouts[shape, thinking]

    def _lay_out(self, shape: Shape, thinking: bool) -> Layout:
        asks = bool(shape) and shape[-1][0] == "user"
        text, generated = self.render(shape, thinking=thinking, asks=asks)
        spans = []
        for number, (_, content, learnt) in enumerate(shape):
            if learnt and _MARK.search(content):
                start, end = self._span(shape, number, text, thinking)
                if generated is not None:
                    within = [a for a, b in generated if a < end and start < b]
                    start = max(start, min(within, default=end))
                spans.append((start, end))
        found = [*_MARK.finditer(text), *re.finditer(self.specials, text)]
        inside = {at for match in found for at in range(match.start() + 1, match.end())}
        edges = {0, len(text), *(at for match in found for at in match.span()), *(at for span in spans for at in span)}
        kinds = {match.start(): match for match in found}
        cuts = sorted(edges - inside)
        layout: Layout = []
        for start, end in zip(cuts[:-1], cuts[1:], strict=True):
            supervised = any(first < end and start < last for first, last in spans)
            match = kinds.get(start)
            if match is None:
                layout.append((Piece(text[start:end]), supervised))
            elif match.re is _MARK:
                layout.append((int(match[1]), supervised))
            else:
                layout.append((Piece(match[0].strip(), special=True), supervised))
        return layout

    def _span(self, shape: Shape, number: int, text: str, thinking: bool) -> tuple[int, int]:
        """Return where the answer of a message begins in a rendering, and where the token that ends it begins."""
        marks = [text.find(match[0]) for match in _MARK.finditer(shape[number][1])]
        shown = [at for at in marks if at >= 0]
        if marks[-1] < 0 or shown != sorted(shown):
            raise Rejected("answer_left_out_by_chat_template")
        earlier = [match for match in _MARK.finditer(text) if match.end() <= shown[0]][-1:]
        after = earlier[0].end() if earlier else 0
        prompt, _ = self.render(shape[:number], thinking=thinking, asks=True)
        asked = list(_MARK.finditer(prompt))[-1:]
        if [match[0] for match in asked] != [match[0] for match in earlier]:
            raise Rejected("prompt_changed_by_chat_template")
        tail = prompt[asked[0].end() if asked else 0 :]
        kept = os.path.commonprefix([text[after : shown[0]], tail])
        if number == len(shape) - 1 and kept != tail:  # DeepSeek-R1: a prompt ends with <think>, and no answer has one
            raise Rejected(f"answer_without_what_ends_the_prompt_in_chat_template: {tail[len(kept) :]!r}")
        start = after + len(kept)
        last = _MARK.match(text, marks[-1])
        following = _MARK.search(text, last.end() if last else 0)
        end = re.compile(self.specials).search(text, last.end() if last else 0)
        if end is None or (following and following.start() < end.start()) or self.end not in ("", end[0].strip()):
            raise Rejected("answer_without_end_in_chat_template")
        return start, end.end()

    def render(self, shape: Shape, *, thinking: bool, asks: bool) -> tuple[str, list[tuple[int, int]] | None]:
        """Render messages; return the text, and where it is marked as generated (None: the template marks nothing).

        Raises: Rejected where the template refuses them.
        """
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        marks = bool(_GENERATION.search(self.source))
        try:
            texts, generated = render_jinja_template(
                [[{"role": role, "content": content} for role, content, _ in shape]],
                chat_template=self.source,
                return_assistant_tokens_mask=marks,
                add_generation_prompt=asks,
                enable_thinking=thinking,
                **self.tokens,
            )
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            raise Rejected(f"refused_by_chat_template: {error}".splitlines()[0][:200]) from None
        return texts[0], [(int(a), int(b)) for a, b in generated[0]] if marks else None


def _mark(number: int) -> str:
    return f"\ue000{number}\ue001"


def read_own_template(tokenizer: Any) -> OwnTemplate:
    """Read a tokenizer's chat template and find how it ends answers and what it does with a system text.

    Raises: UsageError if it has none, or if it does not render two rounds of question and answer in order, each answer
    ended by the same special token.
    """
    name = getattr(tokenizer, "name_or_path", "") or "the tokenizer"
    other = 'name another with model.template, for example "vicuna"'
    if not tokenizer.chat_template:
        raise UsageError(f"{name} has no chat template of its own; {other}")
    try:
        published = tokenizer.get_chat_template()
    except ValueError:
        raise UsageError(f"{name} has several chat templates and none of them is the default; {other}") from None
    source = _CLOCK.sub(lambda found: f"'{DATE.strftime(found[2])}'", published)
    template = OwnTemplate(source, dict(tokenizer.special_tokens_map), _special_tokens(tokenizer))
    rounds = [Turn("user", (None, "q")), Turn("assistant", ("a",)), Turn("user", ("q",)), Turn("assistant", ("a",))]
    try:
        layout = template._layout(template._shape(rounds)[0], False)
        ends = [
            item.text
            for (item, learnt), (_, more) in zip(layout, [*layout[1:], (0, False)], strict=True)
            if isinstance(item, Piece) and learnt and not more
        ]
        if [item for item, _ in layout if isinstance(item, int)] != list(range(5)) or len(set(ends)) != 1:
            raise Rejected("it does not keep the text of each question and answer")
    except Rejected as reason:
        raise UsageError(f"the chat template of {name} cannot be used ({reason}); {other}") from None
    return dataclasses.replace(
        template, end=str(ends[0]), folds_system=not _takes_system(template, rounds), _layouts={}
    )


def _takes_system(template: OwnTemplate, rounds: Sequence[Turn]) -> bool:
    try:
        return not template.leaves_out([Turn("system", ("s",)), *rounds])
    except Rejected:
        return False


def _special_tokens(tokenizer: Any) -> str:
    """Return a regular expression that matches a tokenizer's special tokens, the longest first."""
    tokens = {str(token): token for token in tokenizer.added_tokens_decoder.values() if token.special}
    found = []
    for text in sorted(tokens, key=len, reverse=True):
        before, after = (r"\s*" if getattr(tokens[text], side) else "" for side in ("lstrip", "rstrip"))
        found.append(f"{before}{re.escape(text)}{after}")
    return "|".join(found) or r"(?!)"
