"""What `curate pack` and `import` may be asked for. Imports nothing heavy: the command line reads it for its help."""

from dataclasses import dataclass
from typing import Annotated

from pipelines.pictures import MAX_PIXELS


@dataclass(frozen=True)
class PackOptions:
    """How a pool is made. image, caption: columns of parquet files, where their names do not say so."""

    layout: Annotated[str, "auto, files or parquet."] = "auto"
    image: Annotated[str, "The column of images (parquet)."] = ""
    caption: Annotated[str, "The column of captions (parquet); of A,B,… the first that is there."] = ""
    shard_size: Annotated[int, "Samples per tar, at most."] = 10_000


@dataclass(frozen=True)
class ImportOptions:
    """What is imported. pool, join: attach to the rows of your own download by key, url, sha256 or uid.

    arch: which of DataComp's two models, l14 or b32. columns: further columns of the source's tables to keep.
    verify: where something stands imported, its sources are compared with what they were by content.
    """

    layout: Annotated[str, "clip-retrieval, datacomp, nemo or npy."]
    pool: Annotated[str, "The tars of your own download, to attach the embeddings to."] = ""
    join: Annotated[str, "Match rows of the pool by key, url, sha256 or uid."] = ""
    arch: Annotated[str, "Which of DataComp's two models: l14 or b32."] = "l14"
    max_pixels: int = MAX_PIXELS
    columns: Annotated[tuple[str, ...], "Columns of the tables to keep."] = ()
    verify: Annotated[bool, "Look for changes in every file, not only in those of another time.", "--verify"] = False
