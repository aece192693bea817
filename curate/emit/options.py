"""What `curate emit` may be asked for. Imports nothing heavy: the command line reads it for its help."""

from dataclasses import asdict, dataclass
from typing import Annotated, Any

from curate.errors import UsageError, unknown
from curate.storage.records import PROMPT

TABLES = ("keys", "datacomp", "parquet", "clip-retrieval")
FORMATS = ("webdataset", "llava", *TABLES)


@dataclass(frozen=True)
class EmitOptions:
    """What is written. shard_size: samples per output shard. prompt: the question asked of an image (llava)."""

    format: Annotated[str, "webdataset, llava, datacomp, keys, parquet or clip-retrieval."] = "webdataset"
    shard_size: Annotated[int, "Samples per output shard."] = 10_000
    prompt: Annotated[str, "The question to put before each caption (llava)."] = PROMPT

    def resolved(self) -> dict[str, Any]:
        """List the options that affect this format."""
        if self.format not in FORMATS:
            raise unknown("format", self.format, FORMATS)
        if self.shard_size < 1:
            raise UsageError(f"shard_size is {self.shard_size}, expected at least 1")
        names = {"webdataset": ("format", "shard_size"), "llava": ("format", "shard_size", "prompt")}
        return {name: value for name, value in asdict(self).items() if name in names.get(self.format, ("format",))}
