"""Finished directories, opened for reading: their manifests, their sidecars, and the directories they are made from."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa

from curate.errors import ContractError, UsageError
from curate.storage import paths, renewal
from curate.storage.json_files import digest, load_json
from curate.storage.renewal import MANIFEST, PLAN
from curate.storage.sidecars import Sidecars

FORMAT = 2  # 1: the embeddings lack `members`
MAKERS = {"losses": "python -m train … --losses"}  # what makes artefacts besides the verbs


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

    @cached_property
    def sidecars(self) -> Sidecars:
        """Its sidecars, opened for reading."""
        return Sidecars(self.directory, self.rows, f"re-run `curate {self.command} …` with --overwrite")

    def table(self, stem: str, columns: Sequence[str] | None = None) -> pa.Table:
        """Read a stem's sidecar. Raises: ContractError when its rows are not those of the manifest."""
        return self.sidecars.table(stem, columns)

    def batches(self, stem: str, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
        """Yield the record batches of a stem's sidecar."""
        return self.sidecars.batches(stem, columns)

    def input_path(self, name: str) -> str:
        """Locate one of its inputs as it was recorded."""
        return paths.resolve(self.manifest["inputs"][name]["path"], self.directory)

    def places(self) -> Iterator[str]:
        """Locate this directory and those that it was made from, as far as they exist."""
        yield self.directory
        for name in self.manifest["inputs"]:
            location = self.input_path(name)
            known = paths.exists(paths.join(location, MANIFEST))
            yield from Artefact(location, load_json(paths.join(location, MANIFEST))).places() if known else [location]

    def source(self, *commands: str) -> "Artefact":
        """Walk up the chain of inputs to the nearest artefact, this one included, made by one of the verbs.

        Raises: LookupError where there is none, ContractError when an input has changed since.
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
                    f"run again the `curate {self.command} …` that made it: it brings it up to date",
                )
            try:
                return upstream.source(*commands)
            except LookupError:
                continue
        raise LookupError(f"{self.directory} was not made from a directory made by `curate {' or '.join(commands)}`")

    def embeddings(self) -> "Artefact":
        """Walk up to the embeddings. Raises: UsageError if they are gone, ContractError as `source` does."""
        try:
            return self.source("embed", "import")
        except LookupError:
            raise UsageError(
                f"the embeddings that {self.directory} was made from are not where its manifest says.",
                "put them back, or make them again and then this directory",
            ) from None


def is_readable(number: Any) -> bool:
    """Say whether this version reads directories of a format."""
    return isinstance(number, int) and 1 <= number <= FORMAT


def open_input(directory: str, *commands: str) -> Artefact:
    """Open a finished directory. commands: the verbs that may have made it, by default any.

    Raises: UsageError when it is missing or was made by another verb, ContractError when it is unfinished.
    """
    renewal.settle(directory)
    makers = " or ".join(f"`{MAKERS.get(command, f'curate {command}')}`" for command in commands)
    wanted = f"expected a directory made by {makers}" if commands else ""
    if not paths.exists(paths.join(directory, MANIFEST)):
        if paths.exists(paths.join(directory, PLAN)):
            renewal.refuse_unfinished(directory)
        what = "does not exist" if not paths.exists(directory) else f"has no {MANIFEST}"
        raise UsageError(f"{directory} {what}; {wanted or 'expected a directory made by curate'}.")
    manifest = load_json(paths.join(directory, MANIFEST))
    if not isinstance(manifest, dict) or "command" not in manifest:
        raise ContractError(
            f"{directory}/{MANIFEST} was not written by curate; {wanted or 'expected a directory made by curate'}."
        )
    if not is_readable(manifest.get("format")):
        raise ContractError(f"{directory} has format {manifest.get('format')}, this version reads 1 to {FORMAT}")
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
