"""The columns of every sidecar, the statuses that a row can have, and names that no pool's own column may take.

Also the names of files beside the sidecars that several rooms open.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa

CENTROIDS, EDGES, FUNNEL = "centroids.npy", "edges.arrow", "funnel.json"  # of clusters, and of a selection
DETAIL_BYTES = 72  # four hashes of 144 bits (curate/embed/details.py)
LABEL = pa.dictionary(pa.int16(), pa.string())
# Where a sample's members lie in its tar: `name` is the key, a dot and the suffix; bytes of the content.
MEMBERS = pa.list_(pa.struct([("suffix", LABEL), ("offset", pa.int64()), ("size", pa.int32())]))

STATUSES = {
    "ok": "embedded",
    "no_image": "no image member",
    "empty_image": "an image member of zero bytes",
    "decode_error": "the image is truncated, unreadable or of another type than it claims",
    "no_decoder": "the image is of a format that is not decoded here (HEIC, JPEG XL)",
    "too_large": "the image is over the pixel or byte limit",
    "no_caption": "no caption member, or an empty one",
    "bad_caption": "the caption is not UTF-8, or over 1 MiB",
    "bad_embedding": "an embedding is NaN, infinite or zero",
    "duplicate_key": "the shard uses this key more than once",
    "unsafe_key": "the key would write outside its folder, or holds control characters",
    "unmatched": "no row of the imported table belongs to this sample",
}


def embedding_schema(dim: int, extra: Mapping[str, pa.DataType] | None = None) -> pa.Schema:
    """Describe `EMB/{stem}.arrow` for embeddings of `dim` dimensions. extra: columns of the pool's own, by name."""
    return pa.schema(
        [
            ("key", pa.string()),
            ("uid", pa.binary(16)),
            ("phash", pa.uint64()),
            ("status", LABEL),
            ("image_embedding", pa.list_(pa.float16(), dim)),
            ("text_embedding", pa.list_(pa.float16(), dim)),
            ("clip_score", pa.float32()),
            ("caption", pa.string()),
            ("width", pa.int32()),
            ("height", pa.int32()),
            ("url", pa.string()),
            ("detail", pa.binary(DETAIL_BYTES)),
            ("writing", pa.bool_()),
            ("members", MEMBERS),
            *(extra or {}).items(),
        ]
    )


def extra_columns(schema: pa.Schema) -> list[str]:
    """Name the columns of an embedding sidecar that are the pool's own."""
    return [name for name in schema.names if name not in embedding_schema(1).names]


CLUSTER_SCHEMA = pa.schema([("cluster", pa.int32()), ("centroid_similarity", pa.float32())])

EDGE_SCHEMA = pa.schema(
    [
        ("cluster", pa.int32()),
        ("a", pa.int64()),
        ("b", pa.int64()),
        ("similarity", pa.float32()),
        ("phash_bits", pa.uint8()),
    ]
)

SELECTION_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("kept", pa.bool_()),
        ("dropped_by", LABEL),
        ("component", pa.int64()),
        ("twin", pa.string()),
        ("twin_similarity", pa.float32()),
    ]
)

LOSS = "loss"
CAPTION = ("caption_words", "caption_chars")
SIZES = ("min_side", "aspect_ratio")
DERIVED = (*CAPTION, *SIZES, *CLUSTER_SCHEMA.names, "nearest_similarity", "host", "shard", LOSS)  # no pool's own
UID = np.dtype([("f0", "<u8"), ("f1", "<u8")])  # as DataComp's subset files have them


def uid_pairs(uids: Sequence[bytes]) -> np.ndarray:
    """Read uids of 16 bytes as DataComp's subset files have them: (u8, u8) [n], halves of the hexadecimal number."""
    return np.frombuffer(b"".join(uids), ">u8").astype("<u8").view(UID)
