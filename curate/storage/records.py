"""What curate does with instruction records beside reading their forms, which pipelines/records.py does.

Names for images by their bytes, captions as conversations, a record as a line of JSON, the texts and tokens of one; and
files of records with curate's errors.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import IO, Any

from curate.errors import ContractError
from pipelines import record_files
from pipelines.record_forms import Turns
from pipelines.records import IMAGE_MARK, said_in

# One of the questions for a short caption in LLaVA's pretraining data (blip_laion_cc_sbu_558k.json).
PROMPT = "Provide a brief description of the given image."
CHUNK_BYTES = record_files.CHUNK_BYTES


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


def conversations_of(record: Mapping[str, Any] | None) -> Turns | None:
    """Return a record's conversation if it has a whole one, in LLaVA's form: turns by known speakers, with an answer.

    Any written form that pipelines/records.py reads counts; pictures need not be there.
    """
    return None if record is None else said_in(record)


def dump(record: Any) -> bytes:
    """Write a record as one line of UTF-8 JSON that reads back equal; lone surrogates stay escapes."""
    try:
        return json.dumps(record, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        return json.dumps(record, default=str).encode()


def read_records(file: IO[bytes], where: str) -> Iterator[tuple[Any, str]]:
    """Yield (record, "") of a file of records, as pipelines/record_files.py reads them; of a bad line (None, why).

    Raises: ContractError when a list breaks off or holds what is not JSON: what follows the fault cannot be found.
    """
    try:
        for item in record_files.read_items(file, where, CHUNK_BYTES):
            yield item.value, item.fault
    except record_files.Broken as broken:
        raise ContractError(str(broken)) from None


def whole_text(record: Mapping[str, Any]) -> str:
    """Return all that is said in a record's conversation, without image marks."""
    return _joined(record["conversations"])


def spoken_text(record: Mapping[str, Any]) -> str | None:
    """Return all that is said in a record of any form, without image marks; None where it has no conversation."""
    turns = conversations_of(record)
    return None if turns is None else _joined(turns)


def _joined(turns: Turns) -> str:
    return "\n".join(turn["value"].replace(IMAGE_MARK, "").strip() for turn in turns)


def estimate_tokens(text: str) -> int:
    """Estimate a text's tokens as a quarter of its UTF-8 bytes, rounded up: the same on any machine."""
    return -(-len(text.encode("utf-8", "surrogatepass")) // 4)
