"""Find the row of a published table that belongs to a sample: by key, url, sha256 or uid.

The source is indexed once: 64-bit hashes of its values, sorted, and the places they stand for; 16 bytes a row. Keys may
be written in several ways (`./000`, `/data/000.jpg`, the number 0): they are compared as they are; if nothing matches,
by the file's name; and if nothing matches then, as whole numbers.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from curate.errors import ShardError, UsageError
from curate.ingest import layouts
from curate.storage import faults, sidecar, tar
from curate.storage.faults import Faults

JOINS = ("key", "url", "sha256", "uid")
ROW_BITS = 40  # a place in the source is part << ROW_BITS | row
EXACT, NAME, NUMBER = "they are", "file names without folder and suffix", "whole numbers"
FORMS = (EXACT, NAME, NUMBER)
MOST_DIGITS = 19
AMBIGUOUS = "rows of the source that share their key: they match nothing, try --join url or sha256"
TAKEN_TWICE = "rows of the pool that share their key, and so get the same vectors: try --join url or sha256"


def build_join(parts: Sequence[layouts.Part], join: str, folder: str, form: str = EXACT) -> dict[str, Any]:
    """Index the source by a column: sorted 64-bit hashes and the places they stand for, as two files in `folder`.

    A repeated value keeps its first place; a repeated key has none. Returns the rows, the repeats and an example value.
    Raises: UsageError when a part lacks the column, ShardError when it cannot be read.
    """
    hashes, places, example = [], [], ""
    for number, part in enumerate(parts):
        columns = layouts.read_columns(part, (join,)) if part.table else {}
        if join not in columns:
            raise UsageError(
                f"{part.table or part.image} has no column to join by {join}: one of {', '.join(layouts.NAMES[join])}."
            )
        values = columns[join].to_pylist()
        example = example or next((str(value) for value in values if value is not None), "")
        found = [join_hash(value, join, form) for value in values]
        hashes.append(np.array([value or 0 for value in found], np.uint64))
        places.append(np.arange(len(found)) | number << ROW_BITS)
    every = np.concatenate(hashes)
    if not len(every):
        raise UsageError("the source has no rows.")
    unique, first, counts = np.unique(every, return_index=True, return_counts=True)  # the first of equals
    # A key that several rows share says nothing of which is meant; a url or a checksum says that they are one picture.
    alone = counts == 1 if join == "key" else np.ones(len(unique), bool)
    if form == EXACT and example and not alone.any():
        raise UsageError(
            f"every key of the source belongs to several rows (e.g. {example!r}), so none can be matched.",
            "--join url or --join sha256",
        )
    np.save(f"{folder}/hashes.npy", unique[alone])
    np.save(f"{folder}/places.npy", np.concatenate(places)[first[alone]])
    repeated = int(counts[unique > 0].sum() - (unique > 0).sum())
    told: dict[str, Any] = {"source_rows": len(every), "repeated": repeated, "source_example": example}
    shared = int(counts[(unique > 0) & ~alone].sum())
    return told | ({"shared": shared} if shared else {})


def choose_form(
    parts: Sequence[layouts.Part], join: str, folder: str, found: Sequence[tar.Shard]
) -> tuple[str, dict[str, Any]]:
    """Index the source by the first form of its keys in which a row of the pool's first readable shard has a match.

    Forms: the key as it is (without a leading `./` or `/`), the file's name without folder and suffix, the key as a
    number. Returns the form and what `build_join` returns.
    """
    index = build_join(parts, join, folder)
    if join != "key":
        return EXACT, index
    keys = next(filter(None, map(_keys_of, found)), [])
    for form in FORMS:
        index = index if form == EXACT else build_join(parts, join, folder, form)
        wanted = np.array([join_hash(key, join, form) or 0 for key in keys], np.uint64)
        if np.isin(wanted[wanted > 0], np.load(f"{folder}/hashes.npy", mmap_mode="r")).any():
            return form, index
    return EXACT, build_join(parts, join, folder)


def _keys_of(shard: tar.Shard) -> list[str]:
    try:
        with tar.open_tar(shard.location) as file:
            return [sample.key for sample in tar.read_index(file).samples]
    except (ShardError, OSError):
        return []  # it fails by name when its turn comes


def join_hash(value: Any, join: str, form: str = EXACT) -> int | None:
    """Hash a value to join by into 64 bits, above zero; None for what names nothing. form: of a key."""
    text = layouts.name_of(value)
    if text is None:
        return None
    text = text.lower() if join in ("sha256", "uid") else key_form(text, form) if join == "key" else text
    if not text:
        return None
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest(), "big") | 1


def unclear_keys(joined: Mapping[str, Any], sidecars: Mapping[str, str]) -> Faults:
    """Count what shared keys leave unclear: rows of the source, and rows of the pool that got the same vectors.

    joined: what `build_join` found. sidecars: of the imported shards, by stem. Memory: some 40 bytes a row of the pool.
    """
    form = joined.get("form", EXACT)

    def keys(stem: str) -> list[str]:
        table = sidecar.table(sidecars[stem], ("key", "status"))
        rows = zip(table["key"].to_pylist(), table["status"].to_pylist(), strict=True)
        return [key for key, status in rows if status == "ok"]

    hashes = [np.array([join_hash(key, "key", form) or 0 for key in keys(stem)], np.uint64) for stem in sidecars]
    every = np.concatenate([np.zeros(0, np.uint64), *hashes])
    order = np.argsort(every, kind="stable")
    again = order[1:][(every[order[1:]] == every[order[:-1]]) & (every[order[1:]] > 0)]
    found: Faults = {}
    if joined.get("shared"):
        faults.add(found, AMBIGUOUS, "", joined["shared"])
    if len(again):
        first, starts = int(again.min()), np.cumsum([0, *map(len, hashes)])
        number = int(np.searchsorted(starts, first, side="right")) - 1
        stem = list(sidecars)[number]
        faults.add(found, TAKEN_TWICE, f"{stem}: {keys(stem)[first - starts[number]]}", len(again))
    return found


def key_form(key: str, form: str) -> str:
    """Write a key in one of the forms by which two tables can name the same file; "" where it has no such form."""
    plain = key.replace("\\", "/").removeprefix("./").lstrip("/")
    if form == EXACT:
        return plain
    name = plain.rpartition("/")[2]
    stem = name.rpartition(".")[0] if name.rpartition(".")[2].lower() in tar.IMAGE_SUFFIXES and "." in name else name
    if form == NAME:
        return stem
    return str(int(stem)) if stem.isdecimal() and stem.isascii() and len(stem) < MOST_DIGITS else ""
