"""A directory in the making: its plan, which of its files exist, what failed, and how it is completed.

manifest.py decides whether a request begins a directory, resumes it, or finds it finished.
"""

import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from curate.errors import ContractError, CurateError, RunError
from curate.storage import paths, renewal
from curate.storage.artefact import FORMAT, Artefact
from curate.storage.json_files import digest, load_json, save_json
from curate.storage.renewal import LOG, MANIFEST, PLAN, SEEN, Parts

FAILED = ".failed"  # a folder with a JSON file for each shard that a slice could not make


@dataclass
class Output:
    """A directory in the making. `plan` is the request; `complete` says that it was already finished.

    directory: where it is made: at `home`, or, if `home` is already a finished directory, in a folder inside it until
    the new state is complete. basis: the digest of the manifest at `home`, or "". kept: shards whose files stay. why:
    what happens to an existing directory, in words.
    """

    directory: str
    plan: dict[str, Any]
    complete: bool = False
    manifest: dict[str, Any] = field(default_factory=dict)
    home: str = ""
    basis: str = ""
    kept: frozenset[str] = frozenset()
    parts: Parts | None = None
    sources: tuple[Artefact, ...] = ()
    why: str = ""

    def __post_init__(self) -> None:
        self.home = self.home or self.directory

    def tell(self, *, quiet: bool = False) -> None:
        """Say on stderr what happens to an existing directory."""
        if self.why and not quiet:
            sys.stderr.write(f"{self.plan['command']}: {self.why}\n")

    def path(self, name: str) -> str:
        """Locate a file of this directory, as it is made."""
        return paths.join(self.directory, name)

    def find(self, stem: str, suffix: str = ".arrow") -> str:
        """Locate the file of a shard, whether it is kept or newly made."""
        return paths.join(self.home if stem in self.kept else self.directory, stem + suffix)

    def missing(self, stems: Sequence[str], name: str | Callable[[str], str] = ".arrow") -> list[str]:
        """List the stems whose file is not there yet, in order. One listing per folder.

        name: the suffix of a stem's file, or how the file of a stem is called (`table/00000.parquet`).
        """
        named = {stem: stem + name if isinstance(name, str) else name(stem) for stem in stems if stem not in self.kept}
        folders = {file.rpartition("/")[0] for file in named.values()}
        present = {
            paths.join(folder, file) if folder else file
            for folder in folders
            for file in paths.listdir(self.path(folder) if folder else self.directory)
        }
        return [stem for stem, file in named.items() if file not in present]

    def pending(self, share: Sequence[str], name: str | Callable[[str], str] = ".arrow") -> list[str]:
        """List the stems of this run's share to be made, and forget their earlier failures. name: as in `missing`."""
        todo = self.missing(share, name)
        for stem in set(todo) & self._recorded_failures():
            paths.remove(self._failure(stem))
        return todo

    def failures(
        self, stems: Sequence[str], failed: Mapping[str, str], name: str | Callable[[str], str] = ".arrow"
    ) -> dict[str, str]:
        """Return why shards could not be made, by this run or by other slices, in the order of the stems.

        failed: by this run; they are recorded, so that a slice that ends later does not wait for them.
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
        """Return the stage's result if other slices still have shards to make; None if all are made or have failed.

        failed: what `failures` returned. A shard that could not be made counts as finished. name: as for `missing`.
        """
        left = [stem for stem in self.missing(stems, name) if stem not in failed]
        if left and self.overtaken():
            return self.manifest
        return {"format": FORMAT, **self.plan, "unfinished": left, "failed": dict(failed)} if left else None

    def overtaken(self) -> bool:
        """Say whether another run has finished the same directory first; `manifest` is then what it wrote.

        Raises: ContractError if another run is making it from another state of the input.
        """
        if not self.basis:
            return False
        renewal.settle(self.home)
        if paths.exists(self.path(PLAN)):
            return False
        paths.remove(self.directory)
        found = load_json(paths.join(self.home, MANIFEST))
        if any(found.get(name) != value for name, value in self.plan.items()):
            raise _other_run(self.home)
        self.manifest = found
        return True

    def finish(self, **facts: Any) -> dict[str, Any]:
        """Write the manifest, which completes the directory, and return it. Leftovers of killed runs are deleted.

        (They are not deleted earlier: another slice may be writing.) Raises: ContractError if an input has changed.
        """
        if self.overtaken():
            return self.manifest
        self._refuse_meanwhile()
        paths.clear_temporaries(self.directory, but=(MANIFEST,))
        self.manifest = {"format": FORMAT, **self.plan, **facts}
        self.save_seen(self.manifest)
        save_json(self.path(MANIFEST), self.manifest)
        if self.basis:
            renewal.swap(self.home, self.directory, self.basis, digest(self.manifest), self.kept)
        else:
            paths.remove(self.path(PLAN))
            paths.remove(self.path(FAILED))
        self.complete = not self.manifest.get("failed")
        return self.manifest

    def save_seen(self, manifest: Mapping[str, Any]) -> None:
        """Write down what the shards of a manifest are made of."""
        if self.parts is not None:
            save_json(self.path(SEEN), {"manifest": digest(manifest), **self.parts.record()})

    def _refuse_meanwhile(self) -> None:
        """Raise ContractError if an input, or another run's state of this directory, is not what it began with."""
        for source in self.sources:
            if digest(load_json(source.path(MANIFEST))) != source.digest:
                raise ContractError(
                    f"{source.directory} has changed while {self.home} was being made from it.",
                    "run the same command again",
                )
        plan = load_json(self.path(PLAN)) if self.parts is not None and paths.exists(self.path(PLAN)) else {}
        seen = plan.get("seen")
        if self.parts is not None and seen and not all(self.parts.same(seen, stem) for stem in self.parts.seen):
            raise _other_run(self.home)

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """Remove the directory again if the request is refused before anything but scratch files was made.

        A finished one stays as it was.
        """
        try:
            yield
        except RunError:  # the disk is at fault, not the request: a rerun resumes from here
            raise
        except CurateError:
            if self.basis or all(name.startswith(".") or name == LOG for name in paths.listdir(self.directory)):
                paths.remove(self.directory)
            raise

    def log(self, **entry: Any) -> None:
        """Append a line to `log.jsonl`: times, speeds, workers, the command; not part of the artefact's identity."""
        if paths.is_remote(self.home):
            return
        with open(paths.local(paths.join(self.home, LOG)), "a", encoding="utf-8") as file:
            file.write(json.dumps({"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **entry, **_typed()}) + "\n")


def _typed() -> dict[str, str]:
    """Return the command line that this process was started with, where it is one of ours."""
    ours = paths.name(sys.argv[0]) == "curate" or sys.argv[0].endswith("curate/__main__.py")
    return {"typed": shlex.join(["curate", *sys.argv[1:]])} if ours else {}


def _other_run(home: str) -> ContractError:
    return ContractError(f"another run is making {home} from another state of its input.", "run the same command again")
