"""Write small pools, embeddings, clusters and selections by hand, through the store's own schemas."""

import hashlib
import io
import json

import numpy as np
import pyarrow as pa
from PIL import Image

from curate.storage import manifest, paths, sidecar
from curate.storage import members as places
from curate.storage.schema import CLUSTER_SCHEMA, SELECTION_SCHEMA, STATUSES, embedding_schema
from curate.storage.tar import TarWriter, list_pool, open_tar, read_index, read_member


def picture(seed, side=24, kind="JPEG"):
    rng = np.random.default_rng(seed)
    pixels = np.kron(rng.integers(0, 255, (4, 4, 3), np.uint8), np.ones((side // 4, side // 4, 1), np.uint8))
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def write_pool(folder, stems, rows, *, first=0, caption=lambda row: f"a caption {row}", extra=None):
    """Write tars whose keys go on counting through the stems."""
    folder.mkdir(parents=True, exist_ok=True)
    number = first
    for stem in stems:
        with open(folder / f"{stem}.tar", "wb") as file, TarWriter(file) as tar:
            for _ in range(rows):
                key = f"{number:09d}"
                tar.add(f"{key}.jpg", picture(number))
                tar.add(f"{key}.txt", caption(number).encode())
                tar.add(f"{key}.json", json.dumps({"key": key, "url": f"http://x/{number}", **(extra or {})}).encode())
                number += 1
    return str(folder)


def write_embeddings(folder, pool, dim=8, seed=0):
    """Write EMB for a pool: the true keys and uids, random vectors."""
    listed = list_pool(pool)
    output = manifest.open_output(str(folder), "embed", {"model": "none"}, {"pool": {"path": pool, "digest": "d"}})
    schema, counts = embedding_schema(dim), {}
    for shard in listed:
        rng = np.random.default_rng([seed, int.from_bytes(shard.stem.encode(), "big") % 2**32])
        with open_tar(shard.location) as file:
            index = read_index(file)
            samples = index.samples
            images = [read_member(file, sample.image) if sample.image else None for sample in samples]
            texts = [read_member(file, sample.member("txt")) if sample.member("txt") else None for sample in samples]
        ok = np.array([image is not None and text is not None for image, text in zip(images, texts, strict=True)])
        vectors = [rng.normal(size=(len(samples), dim)) for _ in range(2)]
        vectors = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in vectors]
        batch = pa.record_batch(
            [
                pa.array([sample.key for sample in samples]),
                pa.array(
                    [image and hashlib.blake2b(image, digest_size=16).digest() for image in images], pa.binary(16)
                ),
                pa.array([None] * len(samples), pa.uint64()),
                sidecar.labels(["ok" if flag else "no_image" for flag in ok], list(STATUSES)),
                sidecar.vector_column(vectors[0].astype(np.float16), ok),
                sidecar.vector_column(vectors[1].astype(np.float16), ok),
                pa.array(np.float32((vectors[0] * vectors[1]).sum(1)), mask=~ok),
                pa.array([text and text.decode() for text in texts], pa.string()),
                pa.array([24] * len(samples), pa.int32()),
                pa.array([24] * len(samples), pa.int32()),
                pa.array([None] * len(samples), pa.string()),
                pa.nulls(len(samples), schema.field("detail").type),
                pa.nulls(len(samples), pa.bool_()),
                places.column(index, shard.size),
            ],
            schema=schema,
        )
        facts = {"rows": len(samples), "size": shard.size}
        sidecar.write_table(paths.join(str(folder), f"{shard.stem}.arrow"), schema, [batch], facts)
        counts[shard.stem] = facts
    output.finish(shards=counts, counts={"rows": sum(entry["rows"] for entry in counts.values())})
    return str(folder)


def write_clusters(folder, emb, k=3):
    embedded = manifest.open_input(emb)
    output = manifest.open_output(str(folder), "cluster", {"k": k}, {"embeddings": embedded})
    for stem, rows in embedded.rows.items():
        status = embedded.table(stem, ["status"])["status"].to_pylist()
        cluster = [row % k if status[row] == "ok" else -1 for row in range(rows)]
        near = [0.5 + row / (2 * rows) if status[row] == "ok" else None for row in range(rows)]
        batch = pa.record_batch([pa.array(cluster, pa.int32()), pa.array(near, pa.float32())], schema=CLUSTER_SCHEMA)
        sidecar.write_table(paths.join(str(folder), f"{stem}.arrow"), CLUSTER_SCHEMA, [batch])
    output.finish(shards={stem: {"rows": rows} for stem, rows in embedded.rows.items()}, counts={})
    return str(folder)


def write_selection(folder, source, kept, *, funnel=None, steps=("dedup(0.86)", "sample(9)"), twins=None):
    """Write SEL. kept: (stem, row, key) -> True, or the text of the step that drops it."""
    below = manifest.open_input(source)
    embedded = below.source("embed", "import")
    output = manifest.open_output(str(folder), "select", {"steps": list(steps)}, {"clusters": below})
    total = 0
    for stem, rows in below.rows.items():
        keys, status = (embedded.table(stem)[name].to_pylist() for name in ("key", "status"))
        verdicts = [kept(stem, row, keys[row]) if status[row] == "ok" else status[row] for row in range(rows)]
        dropped = [None if verdict is True else verdict for verdict in verdicts]
        pairs = [(twins or {}).get(key, (None, None)) for key in keys]
        batch = pa.record_batch(
            [
                pa.array(keys),
                pa.array([verdict is True for verdict in verdicts]),
                sidecar.labels(dropped, [*steps, *STATUSES]),
                pa.array([None] * rows, pa.int64()),
                pa.array([pair[0] for pair in pairs], pa.string()),
                pa.array([pair[1] for pair in pairs], pa.float32()),
            ],
            schema=SELECTION_SCHEMA,
        )
        sidecar.write_table(paths.join(str(folder), f"{stem}.arrow"), SELECTION_SCHEMA, [batch])
        total += sum(verdict is True for verdict in verdicts)
    manifest.save_json(paths.join(str(folder), "funnel.json"), funnel or {"steps": []})
    output.finish(shards={stem: {"rows": rows} for stem, rows in below.rows.items()}, counts={"kept": total})
    return str(folder)


def tree(folder, *, but=("log.jsonl", ".seen.json")):
    """Read every file of a directory."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in but
    }


def members(location):
    """Read a tar's members in order with the standard library."""
    import tarfile

    with tarfile.open(location) as tar:
        return [(info.name, tar.extractfile(info).read()) for info in tar]
