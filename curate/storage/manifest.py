"""Sidecars and manifests: the schemas of every artefact, and how a directory is made, resumed and read.

A sidecar is an Arrow IPC file, one per shard, with the shard's stem and exactly its rows in its order, mapped to memory
with no copy. `manifest.json` is written last, so that its presence means that the directory is complete; until then
`.plan.json` holds the request, and a rerun with the same request goes on where the last one stopped. A manifest holds
nothing that differs between two runs of the same request: times and speeds go to `log.jsonl`.
"""

import hashlib
import importlib.metadata
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pyarrow as pa

from curate.errors import ContractError, CurateError, UsageError
from curate.storage import paths
from curate.storage.sidecar import batches, table

FORMAT = 1
MANIFEST, PLAN, LOG = "manifest.json", ".plan.json", "log.jsonl"
FAILED = ".failed"  # a folder with a JSON file for each shard that a slice could not make
MAKERS = {"losses": "python -m train … --losses"}  # what makes artefacts besides the verbs


def digest(value: Any) -> str:
    """Fingerprint a JSON value: blake2b-128 in hex over its canonical text."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def file_digest(location: str) -> str:
    """Fingerprint a file's bytes: blake2b-128 in hex."""
    found = hashlib.blake2b(digest_size=16)
    with paths.open_read(location) as file:
        while part := file.read(1 << 20):
            found.update(part)
    return found.hexdigest()


def versions(*packages: str) -> dict[str, str]:
    """Look up the installed versions of the packages a stage rests on."""
    found = {}
    for package in ("data-curate", *packages):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def reconcile(where: str, rows: int, parts: Mapping[str, int]) -> None:
    """Check that every row is accounted for once. Raises: ContractError with both sides."""
    if sum(parts.values()) != rows:
        account = " + ".join(f"{count:,} {name}" for name, count in parts.items())
        raise ContractError(f"{where}: {rows:,} rows in, but {account} = {sum(parts.values()):,} accounted for")


def save_json(location: str, value: Any) -> None:
    """Write a JSON file whole or not at all."""
    with paths.atomic_write(location) as file:
        file.write((json.dumps(value, indent=1, sort_keys=False, ensure_ascii=False) + "\n").encode())


def load_json(location: str) -> Any:
    """Read a JSON file. Raises: ContractError when it is not there, or not JSON."""
    try:
        return json.loads(paths.read_text(location))
    except FileNotFoundError:
        raise ContractError(f"{location} is missing.", "make its directory again, with --overwrite") from None
    except (ValueError, RecursionError) as error:
        raise ContractError(f"{location} is not readable JSON: {error}") from None


@dataclass
class Output:
    """A directory in the making. `plan` is the request; `complete` says that it stood finished already."""

    directory: str
    plan: dict[str, Any]
    complete: bool = False
    manifest: dict[str, Any] = field(default_factory=dict)

    def path(self, name: str) -> str:
        """Locate a file of this directory."""
        return paths.join(self.directory, name)

    def missing(self, stems: Sequence[str], name: str | Callable[[str], str] = ".arrow") -> list[str]:
        """List the stems whose file is not there yet, in order. One listing per folder.

        name: the suffix of a stem's file, or how the file of a stem is called (`table/00000.parquet`).
        """
        named = {stem: stem + name if isinstance(name, str) else name(stem) for stem in stems}
        folders = {file.rpartition("/")[0] for file in named.values()}
        present = {
            paths.join(folder, file) if folder else file
            for folder in folders
            for file in paths.listdir(self.path(folder) if folder else self.directory)
        }
        return [stem for stem, file in named.items() if file not in present]

    def pending(self, share: Sequence[str], name: str | Callable[[str], str] = ".arrow") -> list[str]:
        """List what of this run's share is to be made, and forget that it failed before. name: as for `missing`."""
        todo = self.missing(share, name)
        for stem in set(todo) & self._recorded_failures():
            paths.remove(self._failure(stem))
        return todo

    def failures(
        self, stems: Sequence[str], failed: Mapping[str, str], name: str | Callable[[str], str] = ".arrow"
    ) -> dict[str, str]:
        """Return why shards could not be made, by this run or by other slices, in the order of the stems.

        failed: of this run; they are recorded, so that a slice that ends later does not wait for them.
        """
        for stem, why in failed.items():
            save_json(self._failure(stem), why)
        recorded = self._recorded_failures()
        lost = [stem for stem in self.missing(stems, name) if stem in recorded] if recorded else []
        return {stem: failed[stem] if stem in failed else str(load_json(self._failure(stem))) for stem in lost}

    def _failure(self, stem: str) -> str:
        return self.path(f"{FAILED}/{stem}.json")

    def _recorded_failures(self) -> set[str]:
        return {file.removesuffix(".json") for file in paths.listdir(self.path(FAILED)) if file.endswith(".json")}

    def unfinished(
        self, stems: Sequence[str], failed: Mapping[str, str], name: str | Callable[[str], str] = ".arrow"
    ) -> dict[str, Any] | None:
        """Return what a stage answers while other slices still have shards to make; None when all are made or failed.

        failed: what `failures` returned. A shard that could not be made is a finished one. name: as for `missing`.
        """
        left = [stem for stem in self.missing(stems, name) if stem not in failed]
        return {"format": FORMAT, **self.plan, "unfinished": left, "failed": dict(failed)} if left else None

    def finish(self, **facts: Any) -> dict[str, Any]:
        """Write the manifest, which makes the directory complete, and return it. What killed runs left half is deleted.

        Not before: another slice may be writing.
        """
        paths.clear_temporaries(self.directory, but=(MANIFEST,))
        self.manifest = {"format": FORMAT, **self.plan, **facts}
        save_json(self.path(MANIFEST), self.manifest)
        paths.remove(self.path(PLAN))
        paths.remove(self.path(FAILED))
        self.complete = not self.manifest.get("failed")
        return self.manifest

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """Take the directory away again when the request is refused before anything but scratch was made."""
        try:
            yield
        except CurateError:
            if all(name.startswith(".") or name == LOG for name in paths.listdir(self.directory)):
                paths.remove(self.directory)
            raise

    def log(self, **entry: Any) -> None:
        """Append a line to `log.jsonl`: times, speeds, workers, what was typed; no part of the artefact's identity."""
        if paths.is_remote(self.directory):
            return
        with open(paths.local(self.path(LOG)), "a", encoding="utf-8") as file:
            file.write(json.dumps({"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **entry, **_typed()}) + "\n")


def _typed() -> dict[str, str]:
    """Return the command line that this process was started with, where it is one of ours."""
    ours = paths.name(sys.argv[0]) == "curate" or sys.argv[0].endswith("curate/__main__.py")
    return {"typed": shlex.join(["curate", *sys.argv[1:]])} if ours else {}


def open_output(
    directory: str,
    command: str,
    options: Mapping[str, Any],
    inputs: Mapping[str, "Artefact | Mapping[str, Any]"],
    *,
    overwrite: bool = False,
) -> Output:
    """Begin, resume or recognise a derived directory.

    inputs: finished artefacts, or for foreign input `{"path": …, "digest": …}`. A directory made with other options, by
    another verb or from other input is refused unless `overwrite`; one that no curate verb made is never deleted.
    Raises: ContractError naming the first difference, both values and the way out.
    """
    sources = {
        name: {"path": paths.relative(source.directory, directory), "digest": source.digest}
        if isinstance(source, Artefact)
        else {**source, "path": paths.relative(source["path"], directory)}
        for name, source in inputs.items()
    }
    plan = json.loads(json.dumps({"command": command, "options": dict(options), "inputs": sources}))
    if plan["options"].get("seed", 0) < 0:
        raise UsageError(f"seed={plan['options']['seed']} is negative.", "give 0 or a positive whole number")
    names = [entry for entry in paths.listdir(directory) if not entry.endswith(".tmp")]
    found = next((name for name in (MANIFEST, PLAN) if name in names), None)
    recorded = load_json(paths.join(directory, found)) if found else {}
    if names and not (isinstance(recorded, dict) and plan.keys() <= recorded.keys()):
        raise ContractError(
            f"{directory} holds {names[0]} and was not made by curate.", "give a new or an empty directory"
        )
    if found and overwrite:
        _refuse_own_input(directory, inputs)
        paths.remove(directory)
    elif found:
        _refuse_difference(directory, recorded, plan)
        if found == MANIFEST and not recorded.get("failed"):
            return Output(directory, plan, complete=True, manifest=recorded)
    paths.make_dir(directory)
    save_json(paths.join(directory, PLAN), plan)
    return Output(directory, plan)


def recorded_options(directory: str, command: str) -> dict[str, Any]:
    """Return the options that a directory was made with by a verb, finished or not; none where it was not."""
    for name in (MANIFEST, PLAN):
        if paths.exists(paths.join(directory, name)):
            found = load_json(paths.join(directory, name))
            made_so = isinstance(found, dict) and found.get("command") == command
            return dict(found.get("options", {})) if made_so else {}
    return {}


def _refuse_own_input(directory: str, inputs: Mapping[str, "Artefact | Mapping[str, Any]"]) -> None:
    """Raise ContractError when a directory that is to be made anew is, or holds, what it would be made from."""
    out = paths.join(os.path.realpath(paths.local(directory)), "")
    for source in inputs.values():
        for place in source.places() if isinstance(source, Artefact) else [source["path"]]:
            if paths.join(os.path.realpath(paths.local(place)), "").startswith(out):
                raise ContractError(f"{directory} would be deleted, but {place} is needed.", "give another directory")


def _refuse_difference(directory: str, recorded: Mapping[str, Any], plan: Mapping[str, Any]) -> None:
    """Raise ContractError when a directory was made by another request than `plan`."""
    if recorded.get("format", FORMAT) != FORMAT:
        raise ContractError(
            f"{directory} has format {recorded['format']}, this version writes {FORMAT}", "use --overwrite"
        )
    command, way_out = plan["command"], "give another output directory, or --overwrite to make it anew"
    if recorded.get("command") != command:
        raise ContractError(
            f"{directory} was made by `curate {recorded.get('command')}`, not by `curate {command}`.", way_out
        )
    before, after = recorded.get("options", {}), plan["options"]
    for name in [*after, *(name for name in before if name not in after)]:
        if before.get(name) != after.get(name):
            raise ContractError(
                f"{directory} was made with {name}={json.dumps(before.get(name))}, "
                f"now {name}={json.dumps(after.get(name))} is asked for.",
                way_out,
            )
    for name, source in plan["inputs"].items():
        if recorded.get("inputs", {}).get(name, {}).get("digest") != source["digest"]:
            raise ContractError(f"{directory} was made from another state of {source['path']} ({name}).", way_out)


@dataclass(frozen=True)
class Artefact:
    """A finished directory, opened for reading."""

    directory: str
    manifest: dict[str, Any]

    @property
    def command(self) -> str:
        """The verb that made it."""
        return str(self.manifest["command"])

    @cached_property
    def digest(self) -> str:
        """The fingerprint of its manifest, which its successors record."""
        return digest(self.manifest)

    @cached_property
    def stems(self) -> list[str]:
        """The stems of its shards, in order."""
        return list(self.manifest["shards"])

    @cached_property
    def rows(self) -> dict[str, int]:
        """Rows per stem."""
        return {stem: int(shard["rows"]) for stem, shard in self.manifest["shards"].items()}

    def path(self, name: str) -> str:
        """Locate a file of this directory."""
        return paths.join(self.directory, name)

    def table(self, stem: str, columns: Sequence[str] | None = None) -> pa.Table:
        """Read a stem's sidecar. Raises: ContractError when its rows are not those of the manifest."""
        found = table(self.path(f"{stem}.arrow"), columns)
        if found.num_rows != self.rows[stem]:
            raise ContractError(
                f"{self.path(stem)}.arrow has {found.num_rows:,} rows but the manifest says {self.rows[stem]:,}.",
                f"re-run `curate {self.command} …` with --overwrite",
            )
        return found

    def batches(self, stem: str) -> Iterator[pa.RecordBatch]:
        """Yield the record batches of a stem's sidecar."""
        return batches(self.path(f"{stem}.arrow"))

    def input_path(self, name: str) -> str:
        """Locate one of its inputs as it was recorded."""
        return paths.resolve(self.manifest["inputs"][name]["path"], self.directory)

    def places(self) -> Iterator[str]:
        """Locate this directory and all that it rests on, as far as that is there."""
        yield self.directory
        for name in self.manifest["inputs"]:
            location = self.input_path(name)
            known = paths.exists(paths.join(location, MANIFEST))
            yield from Artefact(location, load_json(paths.join(location, MANIFEST))).places() if known else [location]

    def source(self, *commands: str) -> "Artefact":
        """Walk up to the nearest artefact, itself included, that one of the verbs made.

        Raises: ContractError when an input has changed since, or there is none.
        """
        if self.command in commands:
            return self
        for name, recorded in self.manifest["inputs"].items():
            location = self.input_path(name)
            if name == "pool" or not paths.exists(paths.join(location, MANIFEST)):
                continue
            upstream = open_input(location)
            if upstream.digest != recorded["digest"]:
                raise ContractError(
                    f"{self.directory} was made from another state of {location}.",
                    f"re-run `curate {self.command} …` with --overwrite",
                )
            try:
                return upstream.source(*commands)
            except LookupError:
                continue
        raise LookupError(f"{self.directory} does not rest on a directory made by `curate {' or '.join(commands)}`")


def open_input(directory: str, *commands: str) -> Artefact:
    """Open a finished directory, made by one of the verbs where they are given.

    Raises: UsageError when it is missing or was made by another verb, ContractError when it is unfinished.
    """
    makers = " or ".join(f"`{MAKERS.get(command, f'curate {command}')}`" for command in commands)
    wanted = f"expected a directory made by {makers}" if commands else ""
    if not paths.exists(paths.join(directory, MANIFEST)):
        if paths.exists(paths.join(directory, PLAN)):
            made_by = load_json(paths.join(directory, PLAN)).get("command")
            raise ContractError(
                f"{directory} is unfinished.", f"re-run the `curate {made_by} …` that made it; it resumes"
            )
        what = "does not exist" if not paths.exists(directory) else f"has no {MANIFEST}"
        raise UsageError(f"{directory} {what}; {wanted or 'expected a directory made by curate'}.")
    manifest = load_json(paths.join(directory, MANIFEST))
    if not isinstance(manifest, dict) or "command" not in manifest:
        raise ContractError(
            f"{directory}/{MANIFEST} is not a manifest of curate; {wanted or 'expected a directory made by curate'}."
        )
    if manifest.get("format") != FORMAT:
        raise ContractError(f"{directory} has format {manifest.get('format')}, this version reads {FORMAT}")
    if commands and manifest["command"] not in commands:
        raise UsageError(f"{directory} was made by `curate {manifest['command']}`; {wanted}.")
    return Artefact(directory, manifest)


def check_aligned(left: Artefact, right: Artefact) -> None:
    """Refuse two artefacts whose sidecars do not have the same stems and rows."""
    for stem, rows in left.rows.items():
        other = right.rows.get(stem, 0)
        if other != rows:
            raise ContractError(
                f"{left.path(stem)}.arrow has {rows:,} rows but {right.path(stem)}.arrow has {other:,}.",
                f"re-run `curate {right.command} …` with --overwrite",
            )
