"""Whether a pool's shards, or files of published embeddings, have the bytes that they had: `--verify`.

In: files, read whole, as many at a time as there are workers. Out: a fingerprint of each shard's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from curate import engine
from curate.engine import Job
from curate.storage import tar
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


def fingerprints(sources: Mapping[str, tar.Shard | Sequence[str]], job: Job) -> dict[str, str]:
    """Read what all shards are made of; one that cannot be read has no fingerprint."""
    outcome = engine.run_stage("verify", Fingerprint(sources), list(sources), job)
    return {stem: str(done["digest"]) for stem, done in outcome.done.items()}
