"""What `curate embed` may be asked for. Imports nothing heavy: the command line reads it for its help."""

from dataclasses import dataclass
from typing import Annotated

from pipelines.pictures import MAX_PIXELS


@dataclass(frozen=True)
class EmbedOptions:
    """What is embedded, and how exactly. batch_size 0: 32 on CPU, 256 on a GPU.

    columns: fields of the samples' JSON to keep as columns; captions: a TSV of captions by url, for samples without.

    caption: fields of the JSON or suffixes of members, in order; the first text in them is the caption.
    verify: if embeddings exist, the contents of all shards are compared with what they were made of.

    faithful: 16-bit and transparent images go to open_clip's transform as they are, not as `images.visible` makes them.

    decode: fast lets torch resize, whose pixels are off by 1 of 255 here and there; full is open_clip's own transform;
    gpu lets the GPU that embeds decode and resize plain JPEGs (`jpegs`), and does all else as full.

    decoders: processes that decode, per worker; the output does not depend on it. 0: on a CPU the model's own threads
    decode, on a GPU there is one process per core.
    """

    model: Annotated[str, "An open_clip name, local-dir:FOLDER, hf-hub:ID or a config JSON."] = "ViT-L-14"
    pretrained: Annotated[str, "A tag that open_clip lists, or a local checkpoint."] = ""
    precision: Annotated[str, "auto, bf16, fp16 or fp32."] = "auto"
    batch_size: Annotated[int, "Samples per forward pass (0: by device)."] = 0
    max_pixels: int = MAX_PIXELS
    decode: Annotated[str, "full, or a little less exact: fast (torch resizes), gpu (decodes JPEGs)."] = "full"
    decoders: Annotated[int, "Decoding processes per worker (0: by device)."] = 0
    columns: Annotated[tuple[str, ...], "JSON fields, or columns of the table beside the tar, to keep."] = ()
    captions: Annotated[str, "A TSV of captions and urls, for samples without a caption."] = ""
    caption: Annotated[
        str, "JSON fields or suffixes with captions, A,B,…; the first with text counts [txt, caption]."
    ] = ""
    caption_pick: Annotated[str, "Which of a list of captions to take: first, or random (by --seed)."] = "first"
    seed: int = 0
    verify: Annotated[bool, "Check every shard for changes, not only those with a new time stamp.", "--verify"] = False
    faithful: Annotated[bool, "Leave 16-bit and transparent images as they are, as open_clip does.", "--faithful"] = (
        False
    )
