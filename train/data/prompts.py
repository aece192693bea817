"""Conversations to pieces, by a template: text, special tokens and images, each of them supervised or not.

A conversation in LLaVA's form ({"from", "value"} turns, `<image>` in human turns) is read as turns, and a template
writes turns as pieces, which encoder.py turns into token ids and labels. Text of a sample can never become a special
token: only a template writes those. Supervised are the answers and the token that ends them.

The Jinja template of chat.py renders the same strings; tests compare the two token by token. A language model's own
chat template is split into the same pieces by own_template.py.
Sources: LLaVA conversation.py (v1, plain), Bunny conversation.py (bunny, phi3, minicpm, llama), LLaVA-Gemma (gemma).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pipelines import record_forms, records
from train.errors import UsageError, did_you_mean

OWN = "chat"  # the name of the language model's own template
TOOLS = frozenset("tool tools function function_call observation tool_call tool_response ipython environment".split())
ROLES = {speaker: record_forms.SPEAKERS[role] for speaker, role in record_forms.ROLES.items()}
_CURIOUS = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


@dataclass(frozen=True)
class Template:
    """How turns are written. `end` is a special token; empty means the tokenizer's eos token."""

    name: str
    system: str = ""  # the default system text
    system_end: str = " "
    start_user: str = ""  # a special token before each user turn
    user: str = "USER:"
    lead: str = " "  # between a role and what it says
    end_user: str = ""  # a special token after each user turn
    start_assistant: str = ""  # a special token before each answer
    assistant: str = " ASSISTANT:"
    bare_assistant: str | None = None  # replaces `assistant` if the user turn has no text
    end: str = ""
    end_text: str = ""  # text that ends an answer instead of a token
    after_end: str = ""  # text after the end of an answer, supervised with it
    question: Literal["inline", "after_images", "dropped"] = "inline"
    fold_system: bool = False  # no system turn of its own: written before the first question

    @property
    def special_tokens(self) -> list[str]:
        """The special tokens that the tokenizer must know."""
        return sorted({t for t in (self.start_user, self.end_user, self.start_assistant, self.end) if t})


_GEMMA = Template(
    "gemma",
    start_user="<start_of_turn>",
    user="user",
    lead="\n",
    end_user="<end_of_turn>",
    start_assistant="<start_of_turn>",
    assistant="model",
    end="<end_of_turn>",
    after_end="\n",
    fold_system=True,
)
TEMPLATES = {
    template.name: template
    for template in (
        Template("plain", user="", lead="", assistant="", question="dropped"),
        Template("vicuna", system=_CURIOUS),
        Template("bunny", system=_CURIOUS),
        Template("phi3", system=_CURIOUS, end="<|endoftext|>"),
        # Bunny trains Llama-3-Instruct on this prompt, not on the model's own chat format.
        Template("llama", system=_CURIOUS, end="<|end_of_text|>"),
        Template("minicpm", system=_CURIOUS, end="</s>"),
        _GEMMA,
        # Lower-case words between spaces, for small word-level vocabularies.
        Template(
            "qa",
            user="question :",
            assistant=" answer :",
            bare_assistant="caption :",
            question="after_images",
            fold_system=True,
        ),
    )
}


def get_template(name: str) -> Template:
    """Return the template of that name.  Raises: UsageError with the list of names."""
    if name not in TEMPLATES:
        raise UsageError(f"unknown template {name!r}{did_you_mean(name, [*TEMPLATES, OWN])}")
    return TEMPLATES[name]


@dataclass(frozen=True)
class Turn:
    """One turn: its role and its parts in order; None stands for an image. learnt: whether an answer is trained on."""

    role: str
    parts: tuple[str | None, ...]
    learnt: bool = True

    @property
    def text(self) -> str:
        """The text parts, joined by newlines."""
        return "\n".join(part for part in self.parts if part)

    @property
    def num_images(self) -> int:
        """How many images the turn shows."""
        return sum(part is None for part in self.parts)


class Rejected(Exception):
    """A sample cannot be trained on; the text is the reason that it is counted under."""


def parse(conversations: Any, num_images: int) -> list[Turn]:
    """Turn a LLaVA conversation into alternating user and assistant turns, a system turn first where there is one.

    Consecutive turns of one role are joined; an answer before the first question and a question after the last answer
    are dropped. An answer whose `loss` (ms-swift) or `weight` (OpenAI) is false or 0 is not learnt. Images stay where
    the human turns place them; otherwise they come first. Without images, and in answers, `<image>` is plain text.
    Raises: Rejected.
    """
    if not isinstance(conversations, list) or not conversations:
        raise Rejected("no_conversation")
    turns: list[Turn] = []
    for entry in conversations:
        role, parts = parse_turn(entry, num_images > 0)
        if role == "system":
            if not turns and any(parts):
                turns.append(Turn("system", parts))
            continue
        learnt = not any(entry.get(key) in (False, 0) for key in ("loss", "weight"))
        if turns and turns[-1].role == role:
            turns[-1] = Turn(role, turns[-1].parts + parts, turns[-1].learnt and learnt)
        elif role == "user" or (turns and turns[-1].role == "user"):
            turns.append(Turn(role, parts, learnt))
    while turns and turns[-1].role != "assistant":
        turns.pop()
    if not turns:
        raise Rejected("no_answer")
    shown = sum(turn.num_images for turn in turns)
    if num_images and not shown:
        first = next(i for i, turn in enumerate(turns) if turn.role == "user")
        turns[first] = Turn("user", (None,) * num_images + turns[first].parts)
    elif shown != num_images:
        raise Rejected("image_count")
    return turns


def parse_turn(entry: Any, has_images: bool) -> tuple[str, tuple[str | None, ...]]:
    """Read the role and the parts of one turn.  Raises: Rejected."""
    if not isinstance(entry, dict):
        raise Rejected("bad_turn")
    speaker = str(entry.get("from", entry.get("role"))).lower()
    role, value = ROLES.get(speaker), entry.get("value", entry.get("content"))
    if speaker in TOOLS or entry.get("tool_calls"):
        raise Rejected("tool_turn")
    if role is None or not isinstance(value, str):
        raise Rejected("bad_turn")
    try:
        value.encode()
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can hold but no tokenizer reads
        raise Rejected("bad_utf8") from None
    if role != "user" or not has_images:
        return role, (value.strip(),) if value.strip() else ()
    return role, records.split_at_marks(value)


@dataclass(frozen=True)
class Piece:
    """A stretch of text, a special token by name, or an image (`text` None)."""

    text: str | None
    special: bool = False
    supervised: bool = False


def pieces(turns: Sequence[Turn], template: Template, eos: str) -> list[Piece]:
    """Write turns as pieces in order; text of the same kind side by side is one piece.

    Turns that end with a question are written up to where the answer begins.
    """
    out: list[Piece] = []
    system = template.system
    if turns and turns[0].role == "system":
        system, turns = turns[0].text, turns[1:]
    if system and not template.fold_system and template.question != "dropped":
        add_text(out, system + template.system_end)
    folded = system if template.fold_system else ""
    prefix = template.assistant
    in_prompt = template.lead if template.lead == "\n" else ""  # a space belongs to the answer's first word instead
    for turn in turns:
        if turn.role == "user":
            prefix = _add_question(out, turn, template, folded)
            folded = ""
            continue
        answer = turn.text
        supervised = bool(answer) and turn.learnt  # an empty answer would only teach the model to stop
        add_special(out, template.start_assistant)
        add_text(out, prefix + in_prompt)
        add_text(out, answer if in_prompt or not answer else template.lead + answer, supervised)
        add_special(out, "" if template.end_text else template.end or eos, supervised)
        add_text(out, template.end_text + template.after_end, supervised)
    if turns and turns[-1].role == "user":
        add_special(out, template.start_assistant)
        add_text(out, prefix + in_prompt)
    return out


def _add_question(out: list[Piece], turn: Turn, template: Template, folded: str) -> str:
    """Write a user turn and return what precedes its answer."""
    text = "\n".join(part for part in (folded, turn.text) if part)
    if template.question == "inline":
        add_special(out, template.start_user)
        add_text(out, template.user + template.lead)
        parts = ((folded,) if folded else ()) + turn.parts
        for i, part in enumerate(parts):
            add_text(out, "\n" if i else "")
            if part is None:
                out.append(Piece(None))
            else:
                add_text(out, part)
        if template.end_user:
            add_special(out, template.end_user)
            add_text(out, template.after_end)
        return template.assistant
    out.extend(Piece(None) for _ in range(turn.num_images))
    if template.question == "dropped":
        return template.assistant
    if not text and template.bare_assistant is not None:
        return template.bare_assistant
    add_text(out, template.user + template.lead + text)
    return template.assistant


def add_text(out: list[Piece], text: str, supervised: bool = False) -> None:
    """Append text, to the last piece where that is text of the same kind."""
    if not text:
        return
    if out and out[-1].text is not None and not out[-1].special and out[-1].supervised == supervised:
        text = (out.pop().text or "") + text
    out.append(Piece(text, supervised=supervised))


def add_special(out: list[Piece], token: str, supervised: bool = False) -> None:
    """Append a special token, if it is one."""
    if token:
        out.append(Piece(token, special=True, supervised=supervised))
