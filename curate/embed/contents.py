"""Whether a pool's shards, or files of published embeddings, have the bytes that they had.

In: files, read whole, as many at a time as there are workers. Out: a fingerprint of each shard's. With `--verify` all
are read, else those that have another time and the same size: reading a file costs a small part of embedding it.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from curate import engine
from curate.engine import Job
from curate.storage import paths, tar
from curate.storage.json_files import file_digest


@dataclass
class Fingerprint:
    """The task: read what a shard is made of, a tar of a pool or the files of a part."""

    sources: Mapping[str, tar.Shard | Sequence[str]]

    def setup(self) -> None:
        """Nothing is shared between shards."""

    def __call__(self, stem: str) -> dict[str, Any]:
        """Read one shard's files. Returns their fingerprint."""
        source = self.sources[stem]
        if not isinstance(source, tar.Shard):
            return {"digest": file_digest(*source)}
        with tar.local_tar(source.location) as path:
            return {"digest": tar.content_digest(source, path)}


def reading(
    sources: Mapping[str, tar.Shard | Sequence[str]], job: Job, *, verify: bool
) -> Callable[[Collection[str]], dict[str, str]]:
    """Return what reads chosen shards' files and fingerprints them; one that cannot be read has no fingerprint.

    A store's files are read where `verify` asks for it: else their ETag says enough, and reading is no small part.
    """

    def read(stems: Collection[str]) -> dict[str, str]:
        chosen = {stem: source for stem, source in sources.items() if stem in stems}
        if not verify:
            chosen = {stem: source for stem, source in chosen.items() if not _is_remote(source)}
        outcome = engine.run_stage("verify", Fingerprint(chosen), list(chosen), job) if chosen else None
        return {stem: str(done["digest"]) for stem, done in outcome.done.items()} if outcome else {}

    return read


def _is_remote(source: tar.Shard | Sequence[str]) -> bool:
    return any(map(paths.is_remote, [source.location] if isinstance(source, tar.Shard) else source))
