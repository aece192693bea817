"""What `curate pack` and `import` may be asked for. Imports nothing heavy: the command line reads it for its help."""

from dataclasses import dataclass
from typing import Annotated

from pipelines.pictures import MAX_PIXELS


@dataclass(frozen=True)
class PackOptions:
    """How a pool is made. image, caption: columns of parquet files, if their names do not tell."""

    layout: Annotated[str, "auto, files or parquet."] = "auto"
    image: Annotated[str, "The column of images (parquet)."] = ""
    caption: Annotated[str, "The column of captions (parquet); of A,B,… the first that exists."] = ""
    shard_size: Annotated[int, "Most samples per tar."] = 10_000


@dataclass(frozen=True)
class ImportOptions:
    """What is imported. pool, join: attach to the rows of your own download by key, url, sha256 or uid.

    arch: which of DataComp's two models, l14 or b32. columns: further columns of the source's tables to keep.
    verify: if there is an earlier import, the contents of its sources are compared with what they were.
    """

    layout: Annotated[str, "clip-retrieval, datacomp, nemo or npy."]
    pool: Annotated[str, "The tars of your own download, to attach the embeddings to."] = ""
    join: Annotated[str, "Match rows of the pool by key, url, sha256 or uid."] = ""
    arch: Annotated[str, "Which of DataComp's two models: l14 or b32."] = "l14"
    max_pixels: int = MAX_PIXELS
    columns: Annotated[tuple[str, ...], "Columns of the tables to keep."] = ()
    verify: Annotated[bool, "Check every file for changes, not only those with a new time stamp.", "--verify"] = False
