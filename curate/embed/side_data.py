"""Data beside a pool's pictures: fields of its JSON, img2dataset's side tables, captions by url.

In: the `key.json` of each sample, `{stem}.parquet` beside `{stem}.tar` (img2dataset writes one row there for every url
it was given, downloaded or not), and a TSV of captions and urls, as CC3M is published, or with the header that
img2dataset asks for. Out: extra columns of the embeddings, the outcomes of the downloads, and captions for samples that
have none.
"""

import codecs
import io
import math
import threading
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import IO, Any

import numpy as np
import pyarrow as pa

from curate.embed.captions import USUAL, Caption, Wanted, clean
from curate.errors import ShardError, UsageError, unknown
from curate.storage import paths, records
from curate.storage.json_files import digest, file_digest
from curate.storage.schema import DERIVED, embedding_schema
from curate.storage.tar import MAX_TEXT_BYTES, Shard, describe, open_tar, read_index, without_suffix
from pipelines.terminal import first_line

NUMBER, TEXT = "number", "text"
URL_NAMES, CAPTION_NAMES = (b"url", b"URL"), (b"caption", b"text", b"TEXT")  # in a header
PROBED = 100  # samples of a shard whose JSON is read to find its fields
PROBED_SHARDS = 8  # most shards read for that, so that a pool without JSON, or without a field, is not read twice
HEX_UID = 32  # DataComp's uid, in hexadecimal digits


@dataclass(frozen=True)
class Extras:
    """What a row holds beyond the fixed columns. columns: field -> number or text; captions: a TSV, or "".

    wanted: which of a sample's captions is taken.
    """

    columns: Mapping[str, str]
    captions: str = ""
    wanted: Wanted = USUAL

    @property
    def fields(self) -> dict[str, pa.DataType]:
        """Name the sidecar's extra columns and their types."""
        return {
            column_name(name): pa.float64() if kind == NUMBER else pa.string() for name, kind in self.columns.items()
        }

    def values(self, *described: Mapping[str, Any] | None) -> dict[str, Any]:
        """Take the extra columns of a row from the first description that has the field."""
        found = {}
        for name, kind in self.columns.items():
            value = next((each[name] for each in described if each and each.get(name) is not None), None)
            found[column_name(name)] = to_column_value(value, kind)
        return found


NO_EXTRAS = Extras({})


def column_name(name: str) -> str:
    """Name a field's column: as the field, or `source_…` if one of our columns has that name."""
    return f"source_{name}" if name in (*embedding_schema(1).names, *DERIVED) else name


def to_column_value(value: Any, kind: str) -> Any:
    """Convert a value to its column's type; None if it does not fit, or is not a finite number."""
    try:
        if kind == TEXT:
            return None if value is None else records.usable_text(value if isinstance(value, str) else str(value))
        return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
    except (OverflowError, RecursionError):  # a number of 400 digits, lists in lists in lists
        return None


def column_kinds(
    found: Sequence[Shard], names: Sequence[str], begun: Mapping[str, Any] | None = None
) -> dict[str, str]:
    """Find out which of a pool's JSON fields are numbers, from the first shard that has them.

    DataComp's `uid` is always taken if the pool has one. begun: the options that the directory was begun with, whose
    kinds stay, whatever shards have been added since. Raises: UsageError naming the fields that exist.
    """
    standing: dict[str, str] = dict((begun or {}).get("columns", {}))
    if begun is not None and set(names) <= standing.keys() <= {*names, "uid"}:
        return standing
    fields: dict[str, list[Any]] = {}
    looked = 0
    for shard in found if names else found[:PROBED_SHARDS]:
        try:
            with open_tar(shard.location) as file:
                for sample in read_index(file).samples[:PROBED]:
                    for name, value in describe(file, sample).items():
                        fields.setdefault(name, []).append(value)
        except (ShardError, OSError):
            continue  # it fails by name when its turn comes
        looked += bool(fields)
        there = all(any(value is not None for value in fields.get(name, ())) for name in names)
        if fields and (there or looked == PROBED_SHARDS):
            break
    wanted = list(dict.fromkeys(names))
    if "uid" not in wanted and any(_is_uid(value) for value in fields.get("uid", [])):
        wanted.append("uid")
    for name in wanted:
        if name not in fields:
            raise unknown("field of the pool's JSON", name, fields)
    return {name: _kind(fields[name]) for name in wanted}


def _is_uid(value: Any) -> bool:
    return isinstance(value, str) and len(value) == HEX_UID and not set(value.lower()) - set("0123456789abcdef")


def _kind(values: Sequence[Any]) -> str:
    given = [value for value in values if value is not None]
    return NUMBER if given and all(isinstance(value, int | float) for value in given) else TEXT


def table_kinds(schema: pa.Schema, names: Sequence[str], where: str) -> dict[str, str]:
    """Find out which columns of a table are numbers. Raises: UsageError naming the columns that exist."""
    kinds = {}
    for name in names:
        if name not in schema.names:
            raise unknown(f"column of {where}", name, schema.names)
        kind = schema.field(name).type
        number = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)
        kinds[name] = NUMBER if number else TEXT
    return kinds


@dataclass(frozen=True)
class SideTable:
    """img2dataset's table of a shard. ended: downloads by how they ended; rows: the columns asked for, by key."""

    ended: dict[str, int]
    rows: dict[str, dict[str, Any]]


def read_side_table(tar: str, columns: Sequence[str]) -> SideTable | None:
    """Read `{stem}.parquet` beside a tar; None if there is none with a key and a status.

    Raises: ShardError when it cannot be read.
    """
    import pyarrow.parquet as pq

    location = f"{without_suffix(tar)}.parquet"
    if not paths.is_remote(location) and not paths.exists(location):
        return None
    try:
        with _opened(location) as file:
            held = pq.ParquetFile(file)
            names = held.schema_arrow.names
            if not {"key", "status"} <= set(names):
                return None
            table = held.read(columns=["key", "status", *(name for name in columns if name in names)])
    except FileNotFoundError:
        return None
    except (pa.ArrowException, OSError) as error:
        raise ShardError(f"{location} cannot be read: {first_line(error)}") from None
    counted = table["status"].value_counts().to_pylist()
    ended = {str(each["values"]): int(each["counts"]) for each in counted}
    rows = {row.pop("key"): row for row in table.drop_columns(["status"]).to_pylist()} if table.num_columns > 2 else {}
    return SideTable(dict(sorted(ended.items())), rows)


def _opened(location: str) -> IO[bytes]:
    """Open a table; a remote one takes one request, whether it exists or not."""
    return io.BytesIO(paths.read_bytes(location)) if paths.is_remote(location) else paths.open_read(location)


class Captions:
    """Captions by url, from a TSV; 16 bytes a row in memory. Safe to call from several threads.

    The columns may come in any order: a header names them, else the url is the one that looks like a url. The first
    of equal urls counts.
    Raises: UsageError when the file is not of that form.
    """

    def __init__(self, location: str) -> None:
        self._url, self._caption = caption_places(location)
        self._file: IO[bytes] = paths.open_read(location)
        self._lock = threading.Lock()
        hashes, places, offset = array("Q"), array("Q"), 0
        for line in self._file:
            hashes.append(_hash(self._split(line)[0]))
            places.append(offset)
            offset += len(line)
        order = np.argsort(np.frombuffer(hashes, np.uint64), kind="stable")
        self._hashes = np.frombuffer(hashes, np.uint64)[order]
        self._places = np.frombuffer(places, np.uint64)[order]

    def _split(self, line: bytes) -> tuple[bytes, bytes]:
        parts = line.removeprefix(codecs.BOM_UTF8).rstrip(b"\r\n").split(b"\t")
        whole = len(parts) > max(self._url, self._caption)
        return (parts[self._url], parts[self._caption]) if whole else (b"", b"")

    def get(self, url: str) -> Caption:
        """Find a url's caption, or say why there is none."""
        wanted = url.encode()
        at = int(np.searchsorted(self._hashes, np.uint64(_hash(wanted))))
        while at < len(self._hashes) and int(self._hashes[at]) == _hash(wanted):
            with self._lock:
                self._file.seek(int(self._places[at]))
                found, caption = self._split(self._file.readline())
            if found == wanted:
                try:
                    return Caption(clean(caption.decode()), "no_caption", "empty in the table of captions")
                except UnicodeDecodeError:
                    return Caption(None, "bad_caption", "the table of captions is not UTF-8: convert it, with iconv")
            at += 1
        return Caption(None, "no_caption", "its url is not in the table of captions")


def captions_digest(location: str, known: str | None) -> str:
    """Fingerprint a table of captions by its bytes: a corrected word may leave its size the same.

    known: what a directory recorded of it; older versions recorded only its size.
    """
    by_size = digest(paths.size(location))
    return by_size if known == by_size else file_digest(location)


def caption_places(location: str) -> tuple[int, int]:
    """Tell from the first line of a TSV which field is the url, and which the caption. Raises: UsageError."""
    if not paths.exists(location):
        raise UsageError(f"{location} does not exist")
    with paths.open_read(location) as file:
        first = file.readline(MAX_TEXT_BYTES).removeprefix(codecs.BOM_UTF8).rstrip(b"\r\n").split(b"\t")
    url = next((place for place, text in enumerate(first) if text.startswith((b"http://", b"https://"))), -1)
    if len(first) > 1 and url >= 0:
        return url, 0 if url else 1
    named = [next((first.index(name) for name in names if name in first), -1) for names in (URL_NAMES, CAPTION_NAMES)]
    if min(named) < 0:
        form = "`caption TAB url`, with or without these words as a header"
        raise UsageError(f"{location} is not a table of captions and urls: {form}.")
    return named[0], named[1]


def _hash(url: bytes) -> int:
    return int.from_bytes(blake2b(url, digest_size=8).digest())
