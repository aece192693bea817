"""The kept samples of a selection, fetched from its pool: which rows, under which keys, and whether they still exist.

In: `SEL/{stem}.arrow`, the embeddings that it was made from (key, uid, caption) and the pool's tars, found through the
manifests. Out: one `Fetched` per kept row with its original members, or the reason why it is no longer available. A
sample counts as the same one if its image still has the recorded uid (blake2b-128 of the image's bytes).
"""

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import pyarrow as pa

from curate.errors import ShardError, UsageError
from curate.storage import manifest, members, records, tar
from pipelines import samples

MEMBERS = "members"
Entry = tuple[int, str, bytes | None]  # row, key, uid


@dataclass(frozen=True, slots=True)
class Fetched:
    """A kept row. `members` holds (name, suffix, content) of each original member; none if `gone` says why.

    `sample` says where in the tar they lie.
    """

    stem: str
    row: int
    key: str
    uid: bytes | None
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
        return [members[suffix] for suffix in samples.ordered_pictures([suffix for _, suffix, _ in self.members])]

    def text(self, suffix: str) -> bytes | None:
        """Return the content of the member with a suffix, if there is one."""
        return next((data for _, found, data in self.members if found == suffix), None)

    @property
    def described(self) -> dict[str, Any]:
        """Return the sample's JSON, empty where it has none that can be read."""
        return tar.read_json(self.text(tar.JSON_SUFFIX) or b"") or {}

    @property
    def has_text(self) -> bool:
        """Say whether the sample has a caption of its own, or a conversation: in its text member or its JSON."""
        return self._says("", said=True)

    def says_other(self, caption: str) -> bool:
        """Say whether a reader of the sample would find another caption in it than the one it was scored by."""
        return self._says("", caption, said=False)

    def _says(self, *nothing: str, said: bool) -> bool:
        """Say whether the sample's caption is none of these. said: the result if it has a conversation instead."""
        described = self.described
        if records.conversations_of(described):
            return said
        try:
            return samples.caption_of(described, self.text(tar.CAPTION_SUFFIX)) not in nothing
        except UnicodeDecodeError:
            return True


@dataclass(frozen=True)
class Samples:
    """Embeddings joined to the tars of their pool, by stem. Picklable."""

    embedded: manifest.Artefact
    tars: dict[str, tar.Shard]

    def fetch(self, stem: str, rows: np.ndarray) -> Iterator[Fetched]:
        """Yield rows of a stem in order, a few at a time in memory: by their places in the tar, if those are known.

        If not, or if the tar is not the one that was embedded, the whole tar is searched.
        """
        placed = [MEMBERS] if MEMBERS in self.embedded.sidecars.schema(stem).names else []
        table = self.embedded.table(stem, ["key", "uid", *placed]).take(rows)
        entries = list(zip(rows.tolist(), table["key"].to_pylist(), table["uid"].to_pylist(), strict=True))
        shard, trouble, done = self.tars.get(stem), "shard_missing", 0
        if shard is not None:
            samples = members.samples(table["key"].to_pylist(), table[MEMBERS]) if placed else None
            if samples is not None and self.embedded.sidecars.facts(stem).get("size") == shard.size:
                for fetched in self._by_place(shard, entries, samples):
                    yield fetched
                    done += 1
            if done == len(entries):
                return
            with tar.open_tar(shard.location) as file:
                try:
                    index = tar.read_index(file)
                except ShardError:
                    trouble = "shard_unreadable"
                else:
                    yield from self._by_key(file, index, stem, entries[done:])
                    return
        for row, key, uid in entries[done:]:
            yield Fetched(stem, row, key, uid, (), trouble)

    def _by_place(self, shard: tar.Shard, entries: Iterable[Entry], samples: Sequence[tar.Sample]) -> Iterator[Fetched]:
        """Yield rows by their places in the tar; end before the first that is no longer there."""
        troubles = [_trouble(sample) for sample in samples]
        sound = [sample for sample, trouble in zip(samples, troubles, strict=True) if not trouble]
        contents = members.read(shard.location, shard.size, sound)
        for (row, key, uid), sample, trouble in zip(entries, samples, troubles, strict=True):
            data = [] if trouble else next(contents, None)
            if data is None:
                return
            yield self._fetched(shard.stem, row, key, uid, sample, data, trouble)

    def _by_key(self, file: IO[bytes], index: tar.Index, stem: str, entries: Iterable[Entry]) -> Iterator[Fetched]:
        """Yield rows as the tar has them now, looked up by key if another sample has the row."""
        by_key: dict[str, tar.Sample] = {}
        for sample in index.samples:
            by_key.setdefault(sample.key, sample)
        for row, key, uid in entries:
            at_row = index.samples[row] if row < len(index.samples) else None
            found = at_row if at_row is not None and at_row.key == key else by_key.get(key)
            gone = "gone" if found is None else _trouble(found)
            data = []
            try:
                data = [tar.read_member(file, member) for member in found.members] if found and not gone else []
            except ShardError:
                gone = "unreadable"
            yield self._fetched(stem, row, key, uid, found, data, gone)

    def _fetched(
        self,
        stem: str,
        row: int,
        key: str,
        uid: bytes | None,
        sample: tar.Sample | None,
        data: Sequence[bytes],
        gone: str,
    ) -> Fetched:
        """Put a sample together, unless it is gone, or its image differs from the recorded one."""
        if sample is None or gone:
            return Fetched(stem, row, key, uid, (), gone)
        held = [(member.name, member.suffix, each) for member, each in zip(sample.members, data, strict=True)]
        fetched = Fetched(stem, row, key, uid, held, "", sample)
        return Fetched(stem, row, key, uid, (), "changed") if self._image_changed(fetched) else fetched

    def _image_changed(self, sample: Fetched) -> bool:
        """Say whether the image differs from the recorded one. Not checked if the uid was imported from elsewhere."""
        if sample.uid is None or self.embedded.command != "embed":
            return False
        return sample.image is None or records.image_uid(sample.image[2]) != sample.uid


@dataclass(frozen=True)
class Coreset(Samples):
    """A selection joined to its embeddings and its pool. Picklable."""

    selection: manifest.Artefact
    pool: str

    def kept_rows(self, stem: str) -> np.ndarray:
        """Return the kept rows of a stem, i64, ascending."""
        return _kept(self.selection.table(stem, ["kept"]))

    def all_kept_rows(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yield each stem with its kept rows, i64, ascending."""
        return ((stem, _kept(table)) for stem, table in self.selection.sidecars.tables(["kept"]))

    def all_kept_keys(self) -> Iterator[tuple[str, np.ndarray, list[str]]]:
        """Yield each stem with its kept rows, and their keys."""
        for stem, table in self.selection.sidecars.tables(["kept", "key"]):
            rows = _kept(table)
            yield stem, rows, table["key"].take(rows).to_pylist()

    def keys(self, stem: str, rows: np.ndarray) -> list[str]:
        """Return the keys of some rows of a stem."""
        return list(self.selection.table(stem, ["key"])["key"].take(rows).to_pylist())


def _kept(table: pa.Table) -> np.ndarray:
    return np.flatnonzero(table["kept"].to_numpy(zero_copy_only=False))


def _trouble(sample: tar.Sample) -> str:
    """Say why a sample cannot be emitted, or nothing."""
    if not all(tar.is_safe(member.name) for member in sample.members):
        return "unsafe_key"
    return "unreadable" if any(member.size > tar.MAX_MEMBER_BYTES for member in sample.members) else ""


def open_coreset(directory: str, pool: str | None = None, *, members: bool = True) -> Coreset:
    """Join a selection to its embeddings and, if members are wanted, to its pool.

    pool: where the pool is now, if it has moved since it was embedded.
    Raises: UsageError when the embeddings or every shard of the pool are missing.
    """
    selection = manifest.open_input(directory, "select")
    embedded = selection.embeddings()
    manifest.check_aligned(embedded, selection)
    where, tars = _find_pool(embedded, pool) if members else ("", {})
    return Coreset(embedded, tars, selection, where)


def kept_pictures(directory: str) -> set[bytes]:
    """Gather the uids of the pictures that a selection kept; about 100 bytes of memory each."""
    coreset = open_coreset(directory, members=False)
    found: set[bytes] = set()
    tables = coreset.embedded.sidecars.tables(["uid"])
    for (_, rows), (_, table) in zip(coreset.all_kept_rows(), tables, strict=True):
        uids = table["uid"].take(rows)
        found.update(uid for uid in uids.to_pylist() if uid is not None)
    return found


def _find_pool(embedded: manifest.Artefact, pool: str | None) -> tuple[str, dict[str, tar.Shard]]:
    """Locate the pool and its tars by stem."""
    if pool is None:
        if "pool" not in embedded.manifest["inputs"]:
            raise UsageError(
                f"{embedded.directory} was imported without a pool, so there is nothing to copy samples from.",
                "name it with --pool, or use --format keys, datacomp or parquet",
            )
        pool = embedded.input_path("pool")
    try:
        tars = {shard.stem: shard for shard in tar.list_pool(pool)}
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
    chunks: Iterable[tuple[str, np.ndarray, list[str]]], keys_of: Callable[[str, np.ndarray], list[str]]
) -> dict[str, dict[int, str]]:
    """Find new keys for rows whose key an earlier row has too.

    chunks: (stem, rows, keys) in output order. Returns {stem: {row: new key}}; `a/b` of stem s becomes `a/s__b`.
    Keys are compared by 64-bit hashes, 8 bytes each: a chance collision costs a needless new name, nothing else.
    """
    places: list[tuple[str, np.ndarray]] = []
    hashes: list[np.ndarray] = []
    for stem, rows, keys in chunks:
        places.append((stem, rows))
        hashes.append(np.array([_hash_key(key) for key in keys], np.uint64))
    flat = np.concatenate(hashes) if hashes else np.empty(0, np.uint64)
    order = np.argsort(flat, kind="stable")
    ascending = flat[order]
    repeated = np.sort(order[1:][ascending[1:] == ascending[:-1]])
    bounds = np.cumsum([0, *map(len, hashes)])
    renamed: dict[str, dict[int, str]] = {}
    taken: set[int] = set()
    held, olds = -1, [""]  # a chunk's keys, read once for all of its rows
    for position in repeated.tolist():
        chunk = int(np.searchsorted(bounds, position, side="right")) - 1
        stem, rows = places[chunk]
        if chunk != held:
            held, olds = chunk, keys_of(stem, rows)
        at = int(position - bounds[chunk])
        row = int(rows[at])
        for new in _other_keys(olds[at], stem):
            value = _hash_key(new)
            place = int(np.searchsorted(ascending, np.uint64(value)))
            if value not in taken and (place == len(ascending) or int(ascending[place]) != value):
                taken.add(value)
                renamed.setdefault(stem, {})[row] = new
                break
    return renamed


def _other_keys(key: str, stem: str) -> Iterator[str]:
    """Propose an endless series of new keys. No dots in the last part: a key ends at its first dot."""
    head, slash, tail = key.rpartition("/")
    for number in itertools.count():
        yield f"{head}{slash}{stem.replace('.', '_')}__{tail}{f'_{number}' if number else ''}"


def _hash_key(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.removeprefix("./").encode(), digest_size=8).digest())
