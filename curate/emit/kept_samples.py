"""The kept samples of a selection, fetched from its pool: which rows, under which keys, and whether they still exist.

In: `SEL/{stem}.arrow`, the embeddings that it rests on (key, uid, caption) and the pool's tars, found through the
manifests. Out: one `Fetched` per kept row with its original members, or the reason why it cannot be had any more. A
sample counts as the same one when its image still has the recorded uid (blake2b-128 of the image's bytes).
"""

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO

import numpy as np

from curate.errors import ShardError, UsageError
from curate.storage import manifest, records, tar
from pipelines.samples import ordered_pictures


@dataclass(frozen=True, slots=True)
class Fetched:
    """A kept row. `members` holds (name, suffix, content) of each original member; none when `gone` names why.

    `sample` says where in the tar they lie.
    """

    stem: str
    row: int
    key: str
    uid: bytes | None
    caption: str
    members: Sequence[tuple[str, str, bytes]]
    gone: str = ""
    sample: tar.Sample | None = None

    @property
    def image(self) -> tuple[str, str, bytes] | None:
        """Return the first image member, if there is one."""
        return next(iter(self.images), None)

    @property
    def images(self) -> list[tuple[str, str, bytes]]:
        """Return the image members in their order."""
        members = {member[1]: member for member in reversed(self.members)}
        return [members[suffix] for suffix in ordered_pictures([suffix for _, suffix, _ in self.members])]

    def text(self, suffix: str) -> bytes | None:
        """Return the content of the member with a suffix, if there is one."""
        return next((data for _, found, data in self.members if found == suffix), None)


@dataclass(frozen=True)
class Coreset:
    """A selection joined to its embeddings and its pool. Picklable."""

    selection: manifest.Artefact
    embedded: manifest.Artefact
    pool: str
    tars: dict[str, str]

    def kept_rows(self, stem: str) -> np.ndarray:
        """Return the kept rows of a stem, i64, ascending."""
        kept = self.selection.table(stem, ["kept"])["kept"]
        return np.flatnonzero(kept.to_numpy(zero_copy_only=False))

    def keys(self, stem: str, rows: np.ndarray) -> list[str]:
        """Return the keys of some rows of a stem."""
        return list(self.selection.table(stem, ["key"])["key"].take(rows).to_pylist())

    def fetch(self, stem: str, rows: np.ndarray) -> Iterator[Fetched]:
        """Yield rows of a stem in order, one at a time in memory."""
        table = self.embedded.table(stem, ["key", "uid", "caption"]).take(rows)
        entries = list(zip(rows.tolist(), *(column.to_pylist() for column in table.columns), strict=True))
        location, trouble = self.tars.get(stem), "shard_missing"
        if location is not None:
            with tar.open_tar(location) as file:
                try:
                    index = tar.read_index(file)
                except ShardError:
                    trouble = "shard_unreadable"
                else:
                    yield from self._fetch(file, index, stem, entries)
                    return
        for row, key, uid, caption in entries:
            yield Fetched(stem, row, key, uid, caption or "", (), trouble)

    def _fetch(
        self, file: IO[bytes], index: tar.Index, stem: str, entries: Iterable[tuple[int, str, bytes | None, str]]
    ) -> Iterator[Fetched]:
        by_key: dict[str, tar.Sample] = {}
        for sample in index.samples:
            by_key.setdefault(sample.key, sample)
        for row, key, uid, caption in entries:
            at_row = index.samples[row] if row < len(index.samples) else None
            found = at_row if at_row is not None and at_row.key == key else by_key.get(key)
            members: list[tuple[str, str, bytes]] = []
            gone = "gone" if found is None else _read(file, found, members)
            fetched = Fetched(stem, row, key, uid, caption or "", members, gone, found)
            if not gone and self._image_changed(fetched):
                gone = "changed"
            yield Fetched(stem, row, key, uid, caption or "", (), gone) if gone else fetched

    def _image_changed(self, sample: Fetched) -> bool:
        """Say whether the image is another than the one recorded. An imported uid may be another's: not checked."""
        if sample.uid is None or self.embedded.command != "embed":
            return False
        return sample.image is None or records.image_uid(sample.image[2]) != sample.uid


def _read(file: IO[bytes], sample: tar.Sample, members: list[tuple[str, str, bytes]]) -> str:
    """Append a sample's members. Returns the reason why it cannot be emitted, or nothing."""
    if not all(tar.is_safe(member.name) for member in sample.members):
        return "unsafe_key"
    try:
        members += [(member.name, member.suffix, tar.read_member(file, member)) for member in sample.members]
    except ShardError:
        return "unreadable"
    return ""


def open_coreset(directory: str, pool: str | None = None, *, members: bool = True) -> Coreset:
    """Join a selection to its embeddings and, where members are wanted, to its pool.

    pool: where the pool lies now, if it has moved since it was embedded.
    Raises: UsageError when the embeddings or every shard of the pool are missing.
    """
    selection = manifest.open_input(directory, "select")
    try:
        embedded = selection.source("embed", "import")
    except LookupError:
        raise UsageError(
            f"the embeddings that {directory} rests on are not where its manifest says.",
            "put them back, or run `curate embed` and `curate select` again",
        ) from None
    manifest.check_aligned(embedded, selection)
    return Coreset(selection, embedded, *_find_pool(embedded, pool) if members else ("", {}))


def kept_pictures(directory: str) -> set[bytes]:
    """Gather the uids of the pictures that a selection kept; about 100 bytes of memory each."""
    coreset = open_coreset(directory, members=False)
    found: set[bytes] = set()
    for stem in coreset.selection.stems:
        uids = coreset.embedded.table(stem, ["uid"])["uid"].take(coreset.kept_rows(stem))
        found.update(uid for uid in uids.to_pylist() if uid is not None)
    return found


def _find_pool(embedded: manifest.Artefact, pool: str | None) -> tuple[str, dict[str, str]]:
    """Locate the pool and its tars by stem."""
    if pool is None:
        if "pool" not in embedded.manifest["inputs"]:
            raise UsageError(
                f"{embedded.directory} was imported without a pool, so there is nothing to copy samples from.",
                "name it with --pool, or use --format keys, datacomp or parquet",
            )
        pool = embedded.input_path("pool")
    try:
        tars = {shard.stem: shard.location for shard in tar.list_pool(pool)}
    except UsageError as error:
        raise UsageError(
            f"the pool cannot be read: {error.message}", "if it has moved, say where it is with --pool"
        ) from None
    if not tars.keys() & embedded.rows.keys():
        raise UsageError(
            f"{pool} holds none of the shards that were embedded ({', '.join(embedded.stems[:3])} …).",
            "say where the pool is with --pool",
        )
    return pool, tars


def unique_keys(
    chunks: Iterable[tuple[str, np.ndarray]], keys_of: Callable[[str, np.ndarray], list[str]]
) -> dict[str, dict[int, str]]:
    """Find new keys for rows whose key an earlier row has too.

    chunks: (stem, rows) in output order. Returns {stem: {row: new key}}; `a/b` of stem s becomes `a/s__b`.
    Keys are compared by 64-bit hashes, 8 bytes each: a chance collision costs a needless new name, nothing else.
    """
    places = list(chunks)
    hashes = [np.array([_hash_key(key) for key in keys_of(stem, rows)], np.uint64) for stem, rows in places]
    flat = np.concatenate(hashes) if hashes else np.empty(0, np.uint64)
    order = np.argsort(flat, kind="stable")
    ascending = flat[order]
    repeated = np.sort(order[1:][ascending[1:] == ascending[:-1]])
    bounds = np.cumsum([0, *map(len, hashes)])
    renamed: dict[str, dict[int, str]] = {}
    taken: set[int] = set()
    for position in repeated.tolist():
        chunk = int(np.searchsorted(bounds, position, side="right")) - 1
        stem, rows = places[chunk]
        row = int(rows[position - bounds[chunk]])
        [old] = keys_of(stem, np.array([row]))
        for new in _other_keys(old, stem):
            value = _hash_key(new)
            place = int(np.searchsorted(ascending, np.uint64(value)))
            if value not in taken and (place == len(ascending) or int(ascending[place]) != value):
                taken.add(value)
                renamed.setdefault(stem, {})[row] = new
                break
    return renamed


def _other_keys(key: str, stem: str) -> Iterator[str]:
    """Propose new keys without end. No dots in the last part: a key ends at its first dot."""
    head, slash, tail = key.rpartition("/")
    for number in itertools.count():
        yield f"{head}{slash}{stem.replace('.', '_')}__{tail}{f'_{number}' if number else ''}"


def _hash_key(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.removeprefix("./").encode(), digest_size=8).digest())
