"""Whether a pool's shards, or files of published embeddings, still have the same bytes.

In: files, read whole, as many at a time as there are workers. Out: a fingerprint for each shard. With `--verify` all
are read, else those with a new time and the same size: reading a file costs a small part of embedding it.
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
    """Return a function that fingerprints the files of chosen shards; one that cannot be read gets no fingerprint.

    Files of an object store are read only with `verify`: their ETag is enough otherwise, and reading them is slow.
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
