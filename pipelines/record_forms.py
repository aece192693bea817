"""The turns of an instruction record, found in any written form.

Forms: turns as `from` and `value`, or as `role` and `content` (a text, or parts) under `messages` or `conversations`;
JSON text of those; alpaca (`instruction`, `input`, `output`, `history`, `system`); ms-swift (`query`, `response`); TRL
(`prompt`, `completion`); The Cauldron's and FineVision's `texts` (`user`, `assistant`). Out: turns as `from` and
`value` with LLaVA's speakers; a value may still be a list of parts. records.py gives each picture its mark.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

Turns = list[dict[str, Any]]
HUMAN, MODEL = ("human", "user"), ("gpt", "assistant", "chatgpt", "model", "bing", "bard")
ROLES = {**dict.fromkeys(HUMAN, "human"), **dict.fromkeys(MODEL, "gpt"), "system": "system"}
SPEAKERS = {"human": "user", "gpt": "assistant", "system": "system"}  # LLaVA's roles, as other forms call them
FORM_KEYS = ("conversations", "messages", "texts", "instruction", "query", "prompt")
QUESTIONS = (("instruction", "output"), ("query", "response"), ("prompt", "completion"))
NO_FORM = "neither conversations, messages, texts nor instruction and output"


class Unusable(Exception):
    """A record cannot be used; the text says why."""


def unpacked(value: dict[str, Any]) -> dict[str, Any]:
    """Undo how `curate mix` writes messages: all of the record except its turns is in `record`, as JSON text."""
    packed, images = value.get("record"), as_list(value.get("images"))
    if not isinstance(packed, str) or not isinstance(value.get("messages"), list):
        return value
    try:
        record = json.loads(packed)
    except ValueError:
        return value
    if not isinstance(record, dict) or "conversations" not in record:
        return value
    if record["conversations"] is None:
        record["conversations"] = _spoken(value["messages"])
    if images and as_list(record.get("image")) != images:
        record["image"] = images[0] if len(images) == 1 else images
    return record


def has_turns(value: Any) -> bool:
    """Say whether a value is of a known form, judging by its keys."""
    return isinstance(value, dict) and any(key in value for key in FORM_KEYS)


def is_answered(value: Mapping[str, Any]) -> bool:
    """Say whether a record holds a question and its answer, in a pair of fields that `QUESTIONS` lists."""
    return any(value.get(asked) is not None and answer in value for asked, answer in QUESTIONS)


def as_list(value: Any) -> list[Any]:
    """Return a field, which may be absent, one value or a list, as a list."""
    return [] if value in (None, "", []) else list(value) if isinstance(value, list | tuple) else [value]


def conversation_fault(turns: Sequence[Any]) -> str:
    """Say why turns are not a conversation, or nothing."""
    if not turns:
        return "no turns"
    for turn in turns:
        if not (isinstance(turn, dict) and isinstance(turn.get("value"), str) and isinstance(turn.get("from"), str)):
            return "a turn without from and value"
        if turn["from"] not in ROLES:
            return "a turn by an unknown speaker"
    if not any(turn["from"] in MODEL and turn["value"].strip() for turn in turns):
        return "no answer"
    return ""


def turns_of(value: Mapping[str, Any]) -> tuple[list[Any], tuple[str, ...]]:
    """Find a record's turns, as from and value; value may still be a list of parts. Returns (turns, fields used)."""
    for key in ("conversations", "messages"):
        if key in value and value[key] is not None:
            turns, system = _spoken(_parsed(value[key])), value.get("system")
            if isinstance(system, str) and system.strip() and all(turn["from"] != "system" for turn in turns):
                return [{"from": "system", "value": system}, *turns], (key, "system")
            return turns, (key,)
    if value.get("instruction") is not None and "output" in value:
        return _asked(value, "instruction", "output"), ("instruction", "input", "output", "history", "system")
    if value.get("query") is not None and "response" in value:
        return _asked(value, "query", "response"), ("query", "response", "history", "system")
    if value.get("texts") is not None:
        return _from_texts(_parsed(value["texts"])), ("texts",)
    if value.get("prompt") is not None and "completion" in value:
        return _half(value["prompt"], "human") + _half(value["completion"], "gpt"), ("prompt", "completion")
    raise Unusable(NO_FORM)


def _half(said: Any, speaker: str) -> list[Any]:
    """Read TRL's `prompt` or `completion`: a text, or turns."""
    return [{"from": speaker, "value": said}] if isinstance(said, str) else _spoken(_parsed(said))


def _parsed(value: Any) -> list[Any]:
    """Parse turns that are written as JSON text, as parquet columns often hold them."""
    try:
        value = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        value = None
    if not isinstance(value, list):
        raise Unusable("no list of turns")
    return value


def _spoken(turns: list[Any]) -> list[Any]:
    """Write turns as from and value, with LLaVA's speakers; the same list if all are in that form."""
    if all(isinstance(turn, dict) and _is_written(turn.get("from"), turn.get("value")) for turn in turns):
        return turns
    written = []
    for turn in turns:
        if not isinstance(turn, dict):
            raise Unusable("a turn without from and value")
        speaker = turn["from"] if turn.get("from") is not None else turn.get("role")
        said = turn["value"] if turn.get("value") is not None else turn.get("content")
        speaker = ROLES.get(str(speaker).strip().lower(), speaker)
        kept = {key: item for key, item in turn.items() if key not in ("from", "role", "value", "content")}
        written.append({"from": speaker, "value": said, **{k: v for k, v in kept.items() if v is not None}})
    return written


def _is_written(speaker: Any, said: Any) -> bool:
    return isinstance(speaker, str) and speaker in ROLES and isinstance(said, str | list)


def _asked(value: Mapping[str, Any], question: str, answer: str) -> Turns:
    """Read alpaca's and ms-swift's fields, earlier rounds (`history`, pairs) first."""
    history, system = value.get("history") or [], value.get("system")
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise Unusable("no list of turns")
    asked, more = value[question], value.get("input") or "" if question == "instruction" else ""
    asked = f"{asked}\n{more}" if more and isinstance(asked, str) and isinstance(more, str) else asked
    turns: Turns = [{"from": "system", "value": system}] if isinstance(system, str) and system else []
    for human, model in [*history, (asked, value[answer])]:
        turns += [{"from": "human", "value": human}, {"from": "gpt", "value": model}]
    return turns


def _from_texts(texts: list[Any]) -> Turns:
    turns: Turns = []
    for each in texts:
        if not isinstance(each, dict):
            raise Unusable("no list of turns")
        turns += [{"from": "human", "value": each.get("user")}, {"from": "gpt", "value": each.get("assistant")}]
    return turns
