"""Bring a finished directory up to date with its changed inputs: what of it is kept, and the swap to its next state.

The next state is made in a folder inside, `DIR/.next-{digest}`, as any directory is: with a plan, resumable, by slices
if asked for. Meanwhile DIR stays as it was. When the new manifest is written, `DIR/.swap.json` names the folder: that
is the moment of change. From then on, whoever opens DIR first carries out the swap, by renaming file after file, before
it reads; so nobody sees half of one, whichever process died on the way. A run that finds DIR in another state than the
one it began from changes nothing.

`DIR/.seen.json`, which is not part of the artefact, records what each shard was made of: size and stamp of each file.
"""

import functools
import json
import os
import re
import sys
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from curate.errors import ContractError, CurateError
from curate.storage import paths, sidecar, whole_files
from curate.storage.json_files import digest, load_json, save_json

MANIFEST, PLAN, LOG = "manifest.json", ".plan.json", "log.jsonl"
SEEN, SWAP, NEXT = ".seen.json", ".swap.json", ".next-"
Seen = tuple[int, str, str]
Made = ParamSpec("Made")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Parts:
    """What each shard of a directory is made of.

    inputs: the inputs that consist of these parts. seen: by stem the size of its file, its stamp (when it was written,
    or a store's ETag), and what else counts. place: stamps are compared within one place only, sizes always. contents:
    reads digests of the files' bytes, by stem, which decide if only the stamp differs; with `verify`, always. adopted:
    whether files of an interrupted run, under their stems, suit any later run that sees the same parts.
    """

    inputs: tuple[str, ...]
    seen: Mapping[str, Seen]
    place: str = ""
    contents: Callable[[Collection[str]], Mapping[str, str]] | None = None
    verify: bool = False
    adopted: bool = True

    def record(self) -> dict[str, Any]:
        """Write down what was seen, for a later run to compare with."""
        return {"place": self.place, "parts": {stem: list(seen) for stem, seen in self.seen.items()}}

    def same(self, before: Mapping[str, Any], stem: str, *, stamped: bool = True) -> bool:
        """Say whether a shard's part is unchanged. before: an earlier `record`; stamped: whether stamps count."""
        old, new = before["parts"].get(stem), self.seen.get(stem)
        if old is None or new is None or old[0] != new[0]:
            return False
        # Older versions recorded less: only the tar's stamp, and for published tables only the sizes.
        stamps_alike, rest_alike = (f"{new[at]} ".startswith(f"{old[at]} ") for at in (1, 2))
        if old[2] is not None and not rest_alike:
            return False
        return not stamped or not old[1] or stamps_alike or before["place"] != self.place

    def copied(self, before: Mapping[str, Any], stems: Collection[str]) -> set[str]:
        """Pick a copy's shards that only their size identifies and whose files can be read. before: as in `same`."""
        if self.contents is None or before["place"] == self.place or paths.is_remote(self.place):
            return set()
        here = replace(self, place=before["place"])
        return {stem for stem in stems if self.same(before, stem) and not here.same(before, stem)}

    def same_bytes(self, before: Mapping[str, Any], held: Mapping[str, str]) -> set[str]:
        """Name the shards that must be read to be identified and have the digests `held`. before: as in `same`."""
        if self.contents is None:
            return set()
        doubted = {
            stem
            for stem in held.keys() & self.seen.keys()
            if (self.verify and stem not in before["parts"])
            or (self.same(before, stem, stamped=False) and (self.verify or not self.same(before, stem)))
        } | self.copied(before, held.keys() & self.seen.keys())
        found = self.contents(doubted) if doubted else {}
        return {stem for stem in doubted if found.get(stem) == held[stem]}


@dataclass(frozen=True)
class Change:
    """What became of a finished directory's shards. again: those that failed before, unchanged.

    touched: how many of those kept have been rewritten with the same bytes.
    """

    kept: frozenset[str]
    touched: int = 0
    new: int = 0
    changed: int = 0
    gone: int = 0
    again: int = 0

    def __bool__(self) -> bool:
        return bool(self.new or self.changed or self.gone or self.again)

    def __str__(self) -> str:
        counts = {"new": self.new, "changed": self.changed, "gone": self.gone, "tried again": self.again}
        told = [f"{count:,} {what}" for what, count in counts.items() if count]
        touched = f"{self.touched:,} touched, same content" if self.touched else ""
        if not told:
            return touched
        return ", ".join([*told, f"{len(self.kept):,} kept"]) + (f" ({touched})" if touched else "")


def compare(home: str, recorded: Mapping[str, Any], plan: Mapping[str, Any], parts: Parts) -> Change:
    """Compare the parts of a finished directory's shards with what was recorded. recorded: its manifest."""
    before = _seen(home, recorded)
    found = before or {"place": "", "parts": {}}
    stood, failed = set(recorded.get("shards", {})), set(recorded.get("failed", {}))
    if before is None and all(
        recorded["inputs"].get(name, {}).get("digest") == plan["inputs"][name]["digest"] for name in parts.inputs
    ):
        same = stood | failed  # an older version recorded nothing more
    else:
        same = {stem for stem in (stood | failed) & parts.seen.keys() if parts.same(found, stem)}
    held = {stem: str(shard["digest"]) for stem, shard in recorded.get("shards", {}).items() if shard.get("digest")}
    alike = parts.same_bytes(found, held)
    same -= parts.copied(found, held)
    touched = len((alike - same) & found["parts"].keys())
    same = (same - stood if parts.verify else same) | alike
    kept, there = same & stood & parts.seen.keys(), stood | failed
    again = len((failed & same & parts.seen.keys()) - stood)
    return Change(
        kept=frozenset(kept),
        touched=touched,
        new=len(parts.seen.keys() - there),
        changed=len(there & parts.seen.keys()) - len(kept) - again,
        gone=len(there - parts.seen.keys()),
        again=again,
    )


def _seen(home: str, recorded: Mapping[str, Any]) -> dict[str, Any] | None:
    """Read what a directory's shards were made of; for one of an older version only the sizes, if recorded."""
    if paths.exists(paths.join(home, SEEN)):
        found = load_json(paths.join(home, SEEN))
        if isinstance(found, dict) and found.get("manifest") == digest(recorded):
            return found
    sizes = {stem: shard.get("size") for stem, shard in recorded.get("shards", {}).items()}
    if not sizes or None in sizes.values():
        return None
    return {"place": "", "parts": {stem: [size, "", None] for stem, size in sizes.items()}}


def next_folder(home: str, plan: Mapping[str, Any], basis: str) -> str:
    """Locate where a directory's next state is made. basis: the digest of the manifest that it has now."""
    return paths.join(home, NEXT + digest([plan, basis])[:12])


def adopt(home: str, folder: str, parts: Parts | None, kept: Iterable[str]) -> None:
    """Move what interrupted runs have made of the same parts into a folder, and delete theirs."""
    for name in paths.listdir(home):
        old = paths.join(home, name)
        if not name.startswith(NEXT) or old == folder:
            continue
        if parts is not None and parts.adopted and paths.exists(paths.join(old, PLAN)):
            before = load_json(paths.join(old, PLAN)).get("seen") or {"place": "", "parts": {}}
            same = _as_they_were(old, before, parts) - set(kept)
            for file in belonging(paths.listdir(old), same):
                paths.move(paths.join(old, file), paths.join(folder, file))
        paths.remove(old)


def drop_stale(directory: str, recorded: Mapping[str, Any], parts: Parts) -> None:
    """Delete from an unfinished directory what was made of parts that have changed since."""
    before = recorded.get("seen") or {"place": "", "parts": {}}
    names = paths.listdir(directory)
    stems = before["parts"].keys() - _as_they_were(directory, before, parts)
    for name in belonging(names, stems):
        paths.remove(paths.join(directory, name))


def _as_they_were(directory: str, before: Mapping[str, Any], parts: Parts) -> set[str]:
    """Name the shards whose part has not changed since an unfinished directory made files of it."""
    same = {stem for stem in before["parts"] if parts.same(before, stem)}
    same -= parts.copied(before, same)
    doubted = {stem for stem in before["parts"].keys() - same if parts.same(before, stem, stamped=False)}
    if parts.contents is None or not doubted:
        return same
    made = doubted & {name.removesuffix(".arrow") for name in paths.listdir(directory) if name.endswith(".arrow")}
    held = {stem: sidecar.facts(paths.join(directory, f"{stem}.arrow")).get("digest") for stem in made}
    return same | parts.same_bytes(before, {stem: str(digest) for stem, digest in held.items() if digest})


def belonging(names: Iterable[str], stems: set[str]) -> Iterator[str]:
    """Pick the file names that are a stem and a suffix."""
    return (name for name in names if name.rpartition(".")[0] in stems and name not in (MANIFEST, LOG))


def shared(stage: Callable[Concatenate[Any, str, Made], Result]) -> Callable[Concatenate[Any, str, Made], Result]:
    """Let a stage, called as `stage(source, out, …)`, end well if an equal run beside it is faster.

    The faster run removes the folder in which both make the next state. The slower one then fails with an error that
    names the folder; it is called again, and finds what the other has finished.
    """

    @functools.wraps(stage)
    def made(source: Any, out: str, /, *more: Made.args, **named: Made.kwargs) -> Result:
        try:
            return stage(source, out, *more, **named)
        except (CurateError, OSError) as error:
            found = re.search(re.escape(NEXT) + r"[0-9a-f]{12}", str(error))
            folder = paths.join(out, found[0]) if found else out
            if not found or paths.exists(paths.join(folder, PLAN)) or not paths.exists(paths.join(out, MANIFEST)):
                raise
            paths.remove(folder)  # what was written after it was removed
        sys.stderr.write(f"another run has finished {out} in the meantime\n")
        return stage(source, out, *more, **named)

    return made


def swap(home: str, folder: str, basis: str, target: str, kept: frozenset[str]) -> None:
    """Make the finished folder the directory's new state. target: the digest of its manifest; kept: shards that stay.

    Raises: ContractError when the directory is no longer what the folder was begun from.
    """
    while True:
        settle(home)
        recorded = load_json(paths.join(home, MANIFEST))
        now = digest(recorded)
        # The plan disappears only with the folder. If it is missing, another run has finished the same and removed the
        # folder, and what this run wrote after that has made a new, nearly empty folder of the same name.
        whole = all(paths.exists(paths.join(folder, name)) for name in (PLAN, MANIFEST))
        if not whole or now == target != basis:
            paths.remove(folder)
            return
        if now not in (basis, target):
            raise ContractError(
                f"another run has changed {home} while this one was running.", "run the same command again"
            )
        files = set(_files(folder))
        old = set(recorded.get("shards", {})) - kept
        drop = [name for name in belonging(paths.listdir(home), old) if name not in files]
        if not kept:
            drop += [name for name in _files(home) if "/" in name and name not in files]
        if _decide(home, folder, {"folder": paths.name(folder), "basis": basis, "target": target, "drop": drop}):
            settle(home)
            return


def _decide(home: str, folder: str, decided: Mapping[str, Any]) -> bool:
    """Write the file that decides a swap, unless there is one already; returns whether it was written.

    It is not written either if another run has swapped meanwhile: the folder is gone then, and must not be made again.
    """
    where = paths.join(home, SWAP)
    if paths.is_remote(where):
        save_json(where, decided)  # object stores know no such thing; equal runs write the same
        return True
    written = Path(paths.local(folder), f"{SWAP}.{uuid.uuid4().hex}.tmp")  # left by a kill, it goes with the folder
    try:
        with written.open("w", encoding="utf-8", errors="backslashreplace") as file:
            json.dump(decided, file)
            file.flush()
            os.fsync(file.fileno())
        os.link(written, paths.local(where))
    except (FileExistsError, FileNotFoundError):
        return False
    except OSError:  # a file system without links
        os.replace(written, paths.local(where))
    finally:
        written.unlink(missing_ok=True)
    return True


def refuse_unfinished(directory: str) -> None:
    """Refuse an unfinished directory. Raises: ContractError naming the command that resumes it."""
    made_by = load_json(paths.join(directory, PLAN)).get("command")
    raise ContractError(f"{directory} is unfinished.", f"re-run the `curate {made_by} …` that made it; it resumes")


def settle(home: str) -> None:
    """Carry out a swap that has been decided, by whichever process; several may do so at once.

    Raises: ContractError if this process may not write there.
    """
    where = paths.join(home, SWAP)
    try:
        while paths.exists(where):
            with suppress(FileNotFoundError):  # another process was faster
                _carry_out(home, where)
    except PermissionError as error:
        raise ContractError(
            f"{home} is half-way through an update, which this process may not finish: {error.strerror}.",
            "run the command that makes it again, with permission to write there",
        ) from None


def settle_listed(folders: Collection[str], listed: Collection[str]) -> bool:
    """Finish decided swaps in folders of tars; returns whether there were any. listed: the files there.

    A remote folder costs no request. Raises: ContractError where a verb has not finished what stands there.
    """

    def holds(folder: str, name: str) -> bool:
        where = paths.join(folder, name)
        return where in listed or (not paths.is_remote(where) and paths.exists(where))

    between = [folder for folder in folders if holds(folder, SWAP)]
    for folder in folders:
        if not holds(folder, MANIFEST) and holds(folder, PLAN):
            refuse_unfinished(folder)
        if folder in between:
            settle(folder)
    return bool(between)


def _carry_out(home: str, where: str) -> None:
    decided = json.loads(paths.read_text(where))
    folder = paths.join(home, decided["folder"])
    if digest(load_json(paths.join(home, MANIFEST))) in (decided["basis"], decided["target"]):
        for name in _files(folder):
            if name != MANIFEST:
                paths.move(paths.join(folder, name), paths.join(home, name))
        for name in decided["drop"]:
            paths.remove(paths.join(home, name))
        for name in (SEEN, MANIFEST):
            if not paths.is_remote(home):
                whole_files.sync_dir(paths.local(home))
            paths.move(paths.join(folder, name), paths.join(home, name))
    paths.remove(folder)
    paths.remove(where)


def _files(folder: str, inside: str = "") -> Iterator[str]:
    """Name the files under a folder that are part of an artefact, as seen from it."""
    if not paths.is_dir(paths.join(folder, inside) if inside else folder):
        return
    files, folders = paths.entries(paths.join(folder, inside) if inside else folder)
    for name in files:
        if not name.startswith(".") and not name.endswith(".tmp") and name != LOG:
            yield f"{inside}/{name}" if inside else name
    for name in folders:
        if not name.startswith("."):
            yield from _files(folder, f"{inside}/{name}" if inside else name)
