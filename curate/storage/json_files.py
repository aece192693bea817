"""JSON files, written whole or not at all, and fingerprints: of JSON values, of files."""

import hashlib
import json
from typing import Any

from curate.errors import ContractError
from curate.storage import paths


def digest(value: Any) -> str:
    """Fingerprint a JSON value: blake2b-128 in hex over its canonical text."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.blake2b(text.encode("utf-8", "backslashreplace"), digest_size=16).hexdigest()


def file_digest(*locations: str) -> str:
    """Fingerprint the bytes of files, one after the other: blake2b-128 in hex."""
    found = hashlib.blake2b(digest_size=16)
    for location in locations:
        with paths.open_read(location) as file:
            while part := file.read(1 << 20):
                found.update(part)
    return found.hexdigest()


def save_json(location: str, value: Any) -> None:
    """Write a JSON file whole or not at all."""
    with paths.atomic_write(location) as file:
        text = json.dumps(value, indent=1, sort_keys=False, ensure_ascii=False) + "\n"
        file.write(text.encode("utf-8", "backslashreplace"))  # of file names that are no UTF-8; an escape in JSON


def load_json(location: str) -> Any:
    """Read a JSON file. Raises: ContractError when it is not there, or not JSON."""
    try:
        return json.loads(paths.read_text(location))
    except FileNotFoundError:
        raise ContractError(f"{location} is missing.", "make its directory again, with --overwrite") from None
    except (ValueError, RecursionError) as error:
        raise ContractError(f"{location} is not readable JSON: {error}") from None
