"""Instruction records: LLaVA's JSON form, what other text forms become in it, and how large files of them are read.

A record is `{"id", "image"?, "conversations": [{"from": "human", "value": …}, {"from": "gpt", "value": …}, …]}`;
without `image` it is text-only. Records already in that form pass through unchanged, with their key order and unknown
fields. Alpaca (`instruction`, `input`, `output`, `history`), `messages` (`role`, `content`) and `texts` (`user`,
`assistant`, as in The Cauldron and FineVision) are rewritten; ShareGPT is LLaVA's form already. Files are read record
by record: a list of any length needs the memory of its largest record.
"""

import codecs
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any

from curate.errors import ContractError

Turns = list[dict[str, Any]]
# One of the questions for a short caption in LLaVA's pretraining data (blip_laion_cc_sbu_558k.json).
PROMPT = "Provide a brief description of the given image."
IMAGE_MARK = "<image>"
HUMAN, MODEL = ("human", "user"), ("gpt", "assistant", "chatgpt", "model", "bing", "bard")
ROLES = {**dict.fromkeys(HUMAN, "human"), **dict.fromkeys(MODEL, "gpt"), "system": "system"}
CHUNK_BYTES = 4 << 20
MAX_RECORD_CHARS = 64 << 20


def usable_text(value: Any) -> str | None:
    """Take a JSON value for text: a non-empty string that UTF-8 can hold, without the space around it; else None."""
    if not isinstance(value, str) or not value.strip():
        return None
    try:
        value.encode()
    except UnicodeEncodeError:
        return None
    return value.strip()


def image_uid(data: bytes) -> bytes:
    """Name an image by its bytes: blake2b-128."""
    return hashlib.blake2b(data, digest_size=16).digest()


def uid_bytes(uid: Any) -> bytes | None:
    """Take a uid for its 16 bytes: as they are, or written in hexadecimal digits as DataComp does; None otherwise."""
    try:
        found = bytes.fromhex(uid) if isinstance(uid, str) else uid
    except ValueError:
        return None
    return found if isinstance(found, bytes) and len(found) == 16 else None


def caption_turns(caption: str, prompt: str = PROMPT) -> Turns:
    """Ask for a caption and answer with it."""
    return [{"from": "human", "value": f"{IMAGE_MARK}\n{prompt}"}, {"from": "gpt", "value": caption}]


def conversations_of(record: Mapping[str, Any] | None) -> Turns | None:
    """Return a record's conversation if it has a whole one: turns with a speaker and a text, at least one answer."""
    turns = None if record is None else record.get("conversations")
    return turns if isinstance(turns, list) and not conversation_fault(turns) else None


def conversation_fault(turns: Sequence[Any]) -> str:
    """Name what keeps turns from being a conversation at all, or nothing."""
    if not turns:
        return "no turns"
    for turn in turns:
        if not (isinstance(turn, dict) and isinstance(turn.get("value"), str) and isinstance(turn.get("from"), str)):
            return "a turn without from and value"
    if not any(turn["from"] in MODEL and turn["value"].strip() for turn in turns):
        return "no answer"
    return ""


def normalise(record: Any, default_id: str) -> tuple[dict[str, Any] | None, str]:
    """Bring a record of any known form into LLaVA's. Returns (record, "") or (None, what is wrong with it)."""
    if not isinstance(record, dict):
        return None, "not a JSON object"
    rest: tuple[str, ...] = ()
    if "conversations" in record:
        turns = record["conversations"]
    elif "messages" in record:
        turns, rest = _from_messages(record["messages"]), ("messages",)
    elif "instruction" in record and "output" in record:
        turns, rest = _from_alpaca(record), ("instruction", "input", "output", "history")
    elif "texts" in record:
        turns, rest = _from_texts(record["texts"], bool(record.get("image"))), ("texts",)
    else:
        return None, "neither conversations, messages, texts nor instruction and output"
    fault = conversation_fault(turns) if isinstance(turns, list) else "no list of turns"
    if not fault and record.get("image") and not isinstance(record["image"], str):
        fault = "image is not a name"
    if fault:
        return None, fault
    if not rest:
        return record, ""
    kept = {key: value for key, value in record.items() if key not in rest}
    return {"id": default_id, **kept, "conversations": turns}, ""


def _from_messages(messages: Any) -> Turns | None:
    if not isinstance(messages, list):
        return None
    turns: Turns = []
    for message in messages:
        role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
        if isinstance(content, list):  # parts; one that is neither text nor image makes the record unreadable
            texts = [_part(part) for part in content]
            content = "\n".join(texts) if all(isinstance(text, str) for text in texts) else None  # type: ignore[arg-type]
        turns.append({"from": ROLES.get(str(role), role), "value": content})
    return turns


def _part(part: Any) -> Any:
    if not isinstance(part, dict):
        return None
    return IMAGE_MARK if part.get("type") == "image" else part.get("text")


def _from_texts(texts: Any, has_image: bool) -> Turns | None:
    if not isinstance(texts, list) or not all(isinstance(each, dict) for each in texts):
        return None
    turns: Turns = []
    for each in texts:
        turns += [{"from": "human", "value": each.get("user")}, {"from": "gpt", "value": each.get("assistant")}]
    if turns and has_image and isinstance(turns[0]["value"], str) and IMAGE_MARK not in turns[0]["value"]:
        turns[0]["value"] = f"{IMAGE_MARK}\n{turns[0]['value']}"
    return turns


def _from_alpaca(record: Mapping[str, Any]) -> Turns | None:
    turns: Turns = []
    history = record.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        return None
    asked, given = record["instruction"], record.get("input") or ""
    question = f"{asked}\n{given}" if given and isinstance(asked, str) and isinstance(given, str) else asked
    for human, model in [*history, (question, record["output"])]:
        turns += [{"from": "human", "value": human}, {"from": "gpt", "value": model}]
    return turns


def dump(record: Any) -> bytes:
    """Write a record as one line of UTF-8 JSON that reads back equal; lone surrogates stay escapes."""
    try:
        return json.dumps(record, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        return json.dumps(record, default=str).encode()


def read_records(file: IO[bytes], where: str) -> Iterator[tuple[Any, str]]:
    """Yield (record, "") from a JSON list or JSON lines; of a line that is not JSON, (None, why).

    Raises: ContractError when a list breaks off or holds what is not JSON: what follows the fault cannot be found.
    """
    head = file.read(64)
    file.seek(0)
    if head.removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"[":
        for record in _read_list(file, where):
            yield record, ""
        return
    for line in file:
        text = line.removeprefix(codecs.BOM_UTF8).strip()
        if not text:
            continue
        try:
            yield json.loads(text), ""
        except (ValueError, RecursionError) as error:
            yield None, f"not JSON: {str(error)[:80]}"


def _read_list(file: IO[bytes], where: str) -> Iterator[Any]:
    """Parse a JSON list element by element."""
    decoder = json.JSONDecoder()
    utf8 = codecs.getincrementaldecoder("utf-8-sig")()
    text, at, wanted, number = "", 0, CHUNK_BYTES, 0
    opened = ended = False
    while True:
        while at < len(text) and text[at] in " \t\r\n":
            at += 1
        if not opened and at < len(text):
            opened, at = True, at + 1
            continue
        if opened and at < len(text) and text[at] == "]":
            return
        if opened and at < len(text):
            try:
                record, after = decoder.raw_decode(text, at)
                comma = after + len(text[after : after + 64]) - len(text[after : after + 64].lstrip())
                if comma < len(text) and text[comma] in ",]":
                    yield record
                    number, at = number + 1, comma + (text[comma] == ",")
                    wanted = CHUNK_BYTES
                    continue
                fault = "no comma after it"
            except (ValueError, RecursionError) as error:
                fault = str(error)
        else:
            fault = "the list has no end"
        if ended or len(text) - at > MAX_RECORD_CHARS:
            raise ContractError(f"{where} is not a readable JSON list: record {number:,}: {fault}")
        try:
            chunk = file.read(wanted)
            text, at = text[at:] + utf8.decode(chunk, final=not chunk), 0
        except UnicodeDecodeError as error:
            raise ContractError(f"{where} is not UTF-8 after record {number:,}: {error.reason}") from None
        ended, wanted = not chunk, wanted * 2


def whole_text(record: Mapping[str, Any]) -> str:
    """Return all that is said in a record's conversation, without image marks."""
    return "\n".join(turn["value"].replace(IMAGE_MARK, "").strip() for turn in record["conversations"])


def estimate_tokens(text: str) -> int:
    """Estimate a text's tokens as a quarter of its UTF-8 bytes, rounded up: the same on any machine."""
    return -(-len(text.encode("utf-8", "surrogatepass")) // 4)
