"""Embeddings directories drawn from a mixture, with planted near-duplicates, mismatches and bad rows."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from curate.storage import manifest, sidecar
from curate.storage.schema import DETAIL_BYTES, MEMBERS, STATUSES, embedding_schema


@dataclass
class Cloud:
    """What a directory was drawn from; arrays have one entry per row. source: the row that a row is a copy of."""

    path: str
    image: np.ndarray  # f32 of the stored f16
    text: np.ndarray
    ok: np.ndarray
    group: np.ndarray
    source: np.ndarray
    mismatched: np.ndarray
    score: np.ndarray
    phash: np.ndarray
    keys: list[str]


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def draw(
    path, rows=900, dim=32, stems=3, groups=12, copies=0.2, mismatched=0.0, bad=0.02, seed=0, spread=0.6, captions=97
):
    """Write EMB: `groups` clouds by Zipf's law, copies at cosine ~.999 of a tenth of the rest."""
    rng = np.random.default_rng(seed)
    noise = lambda scale: scale * rng.normal(size=(rows, dim)) / np.sqrt(dim)  # noqa: E731
    weights = 1 / np.arange(1, groups + 1)
    group = rng.choice(groups, rows, p=weights / weights.sum())
    image = unit(rng.normal(size=(groups, dim)))[group] + noise(spread)
    source = np.arange(rows)
    copy = rng.random(rows) < copies
    source[copy] = rng.choice(np.flatnonzero(~copy)[: max(1, rows // 10)], copy.sum())
    group = group[source]
    image = unit(image[source] + copy[:, None] * noise(0.03))
    text = unit(image[source] + noise(0.7))
    swapped = rng.random(rows) < mismatched
    text[swapped] = text[rng.permutation(rows)[swapped]]
    phash = rng.integers(0, 1 << 63, rows, dtype=np.uint64)[source] ^ np.where(copy, np.uint64(5), np.uint64(0))
    ok = rng.random(rows) >= bad
    image, text = image.astype(np.float16), text.astype(np.float16)
    score = (image.astype(np.float32) * text.astype(np.float32)).sum(axis=1)
    keys = [f"{row:09d}" for row in range(rows)]
    table = pa.record_batch(
        [
            pa.array(keys),
            pa.array([int(row).to_bytes(16, "little") for row in source], pa.binary(16)),
            pa.array(phash, mask=~ok),
            sidecar.labels(["ok" if flag else "decode_error" for flag in ok], list(STATUSES)),
            sidecar.vector_column(image, ok),
            sidecar.vector_column(text, ok),
            pa.array(score, mask=~ok),
            pa.array([f"caption number {row % captions}" for row in range(rows)]),
            pa.array(64 + np.arange(rows) % 7, pa.int32()),
            pa.array(np.full(rows, 48), pa.int32()),
            pa.array([None if row % 3 else f"http://x/{row // 9}" for row in range(rows)], pa.string()),
            pa.nulls(rows, pa.binary(DETAIL_BYTES)),
            pa.nulls(rows, pa.bool_()),
            pa.nulls(rows, MEMBERS),
        ],
        schema=embedding_schema(dim),
    )
    output = manifest.open_output(str(path), "embed", {"seed": seed, "rows": rows}, {})
    bounds = np.linspace(0, rows, stems + 1).astype(int).tolist()
    for index, (first, last) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        middle = (first + last) // 2  # every other sidecar has two record batches
        cuts = [first, middle, last] if index % 2 else [first, last]
        parts = [table.slice(i, j - i) for i, j in zip(cuts[:-1], cuts[1:], strict=True)]
        sidecar.write_table(output.path(f"{index:05d}.arrow"), table.schema, parts)
    shards = {f"{i:05d}": {"rows": bounds[i + 1] - bounds[i]} for i in range(stems)}
    output.finish(shards=shards, counts={"ok": int(ok.sum())})
    return Cloud(
        str(path), image.astype(np.float32), text.astype(np.float32), ok, group, source, swapped, score, phash, keys
    )


def clustered(folder):
    """Draw a pool with mismatches, cluster it, and add the facts of its rows as plain arrays."""
    from curate.cluster.cluster import ClusterOptions, cluster
    from curate.engine import Job

    cloud = draw(folder / "emb", mismatched=0.2)
    cloud.clu = str(folder / "clu")
    cluster(cloud.path, cloud.clu, ClusterOptions(k=8, floor=0.8), Job(workers=1, quiet=True))
    table = pa.concat_tables([sidecar.table(f"{cloud.clu}/{i:05d}.arrow") for i in range(3)])
    cloud.cluster = table["cluster"].to_numpy()
    cloud.near = table["centroid_similarity"].to_numpy(zero_copy_only=False)
    return cloud
