"""Cluster and select on a pool larger than memory should hold: time, peak memory, and the products that it needs.

    python tests/bench/scale.py [--rows 1000000] [--dim 512] [--k 1000] [--floor 0.90] [--workers 2] [--keep DIR]

Draws f16 embeddings from a mixture of 2,000 clouds with 15 % near-duplicates onto disk (two rows of a cloud have a
cosine of 0.80, so the floor is above that: at 0.80 half of all pairs would be edges), then runs `curate cluster` and
three selections, each in a process of its own. Memory is sampled: what the processes own (anonymous), and all that they
map, whose file pages can be dropped at any time. The bare products are timed in the same run on the same
machine: the fit's (sample x k x iterations), the assignment's (rows x k) and the pairs' of every cluster. Both also in
processor seconds (`cpu_s`, `cpu_ratio`), the only ones that mean something on a busy machine.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from itertools import repeat
from pathlib import Path

import numpy as np
import pyarrow as pa

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

from curate.storage import sidecar  # noqa: E402
from curate.storage.manifest import (  # noqa: E402
    open_output,  # noqa: E402
    versions,  # noqa: E402
)
from curate.storage.schema import (  # noqa: E402
    MEMBERS,  # noqa: E402
    STATUSES,  # noqa: E402
    embedding_schema,  # noqa: E402
)

SHARD = 100_000
CLOUDS = 2_000


def draw(folder, rows, dim, workers):
    """Write the embeddings, shard by shard, in several processes."""
    output = open_output(str(folder), "embed", {"rows": rows, "dim": dim}, {})
    firsts = range(0, rows, SHARD)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        drawn = pool.map(
            draw_shard, repeat(str(folder)), firsts, (min(SHARD, rows - first) for first in firsts), repeat(dim)
        )
        shards = dict(drawn)
    output.finish(shards=shards, counts={})


def draw_shard(folder, first, n, dim):
    """Write one shard. Returns its stem and its facts."""
    spectrum = (np.arange(1, dim + 1) ** -0.5).astype(np.float32)  # falls like that of image embeddings
    centers = np.random.default_rng(0).standard_normal((CLOUDS, dim), np.float32) * spectrum
    weights = 1 / np.arange(1, CLOUDS + 1) ** 0.7
    names = list(STATUSES)
    rng = np.random.default_rng([1, first])
    cloud = rng.choice(CLOUDS, n, p=weights / weights.sum())
    image = centers[cloud] + 0.5 * spectrum * rng.standard_normal((n, dim), np.float32)
    copy = np.flatnonzero(rng.random(n) < 0.15)
    origin = rng.integers(0, n // 10, len(copy))
    image[copy] = image[origin] + 0.05 * spectrum * rng.standard_normal((len(copy), dim), np.float32)
    image /= np.linalg.norm(image, axis=1, keepdims=True)
    text = image + 0.04 * rng.standard_normal((n, dim), np.float32)
    text /= np.linalg.norm(text, axis=1, keepdims=True)
    phash = rng.integers(0, 1 << 63, n, dtype=np.uint64)
    phash[copy] = phash[origin]
    ok = rng.random(n) > 0.01
    schema = embedding_schema(dim)
    batch = pa.record_batch(
        [
            pa.array([f"{row:09d}" for row in range(first, first + n)]),
            pa.array([row.to_bytes(16, "little") for row in range(first, first + n)], pa.binary(16)),
            pa.array(phash, mask=~ok),
            sidecar.label_codes(np.where(ok, 0, names.index("decode_error")), names),
            sidecar.vector_column(image.astype(np.float16), ok),
            sidecar.vector_column(text.astype(np.float16), ok),
            pa.array((image * text).sum(axis=1), mask=~ok),
            pa.array(["a caption"] * n),
            pa.array(np.full(n, 224), pa.int32()),
            pa.array(np.full(n, 224), pa.int32()),
            pa.nulls(n, pa.string()),
            pa.nulls(n, schema.field("detail").type),
            pa.nulls(n, pa.bool_()),
            pa.nulls(n, MEMBERS),
        ],
        schema=schema,
    )
    stem = f"{first // SHARD:05d}"
    sidecar.write_table(str(Path(folder) / f"{stem}.arrow"), schema, [batch])
    print(f"drawn {first + n:,}", file=sys.stderr)
    return stem, {"rows": n}


def memory(pid):
    """Sum anonymous and resident KiB over a process and its children."""
    own, mapped = 0, 0
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon"):
                own += int(line.split()[1])
            if line.startswith("VmRSS"):
                mapped += int(line.split()[1])
        for child in children:
            a, b = memory(child)
            own, mapped = own + a, mapped + b
    except (FileNotFoundError, ProcessLookupError):
        pass
    return own, mapped


def measured(words):
    """Run curate in a process of its own: seconds, processor seconds, and peak GiB, owned and mapped."""
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "curate", *words], cwd=ROOT)
    peak, done = [0, 0], threading.Event()

    def watch():
        while not done.wait(0.1):
            peak[:] = np.maximum(peak, memory(process.pid)).tolist()

    thread = threading.Thread(target=watch)
    thread.start()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    done.set()
    thread.join()
    assert process.returncode == 0, words
    return {
        "seconds": round(time.perf_counter() - started, 2),
        "cpu_s": round(usage.ru_utime + usage.ru_stime, 2),
        "peak_own_gib": round(peak[0] / 2**20, 2),
        "peak_mapped_gib": round(peak[1] / 2**20, 2),
    }


def product_rate(dim, width):
    """Measure f32 products, [1024, dim] x [dim, width], as the stages form them: GFLOP/s, and per processor."""
    rng = np.random.default_rng(0)
    x, y = rng.random((1024, dim), np.float32), rng.random((dim, width), np.float32)
    out = np.empty((1024, width), np.float32)
    np.matmul(x, y, out=out)
    times = []
    for _ in range(15):
        started = time.perf_counter(), time.process_time()
        np.matmul(x, y, out=out)
        times.append((time.perf_counter() - started[0], time.process_time() - started[1]))
    return 2e-9 * 1024 * dim * width / np.median(times, axis=0)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--k", type=int, default=1_000)
    parser.add_argument("--floor", type=float, default=0.90)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--keep", help="folder for the data, which is drawn once and kept")
    chosen = parser.parse_args()
    folder = Path(chosen.keep or tempfile.mkdtemp())
    emb, clu = folder / f"emb-{chosen.rows}-{chosen.dim}", folder / "clu"
    if not (emb / "manifest.json").exists():
        draw(emb, chosen.rows, chosen.dim, chosen.workers)
    for name in ("clu", "sel-1", "sel-2", "sel-3"):
        shutil.rmtree(folder / name, ignore_errors=True)
    options = ["--k", str(chosen.k), "--floor", str(chosen.floor), "--workers", str(chosen.workers)]
    found = {name: getattr(chosen, name) for name in ("rows", "dim", "k", "floor", "workers")}
    rates = [product_rate(chosen.dim, min(chosen.k, 4096))]
    found["cluster"] = measured(["cluster", str(emb), str(clu), *options])
    rates.append(product_rate(chosen.dim, min(chosen.k, 4096)))
    bands = ["--step", "dedup(0.92)", "--step", "rank(clip_score, 0.40, 0.60)"]
    steps = (["--recipe", "balanced"], bands, ["--step", "dedup(0.95)", "--step", "sample(0.1)"])
    for index, words in enumerate(steps, 1):
        found[f"select {words[1]}"] = measured(["select", str(clu), str(folder / f"sel-{index}"), *words])
    manifest = json.loads((clu / "manifest.json").read_text())
    clusters = np.concatenate(
        [sidecar.table(str(clu / f"{s}.arrow"))["cluster"].to_numpy() for s in manifest["shards"]]
    )
    sizes = np.bincount(clusters[clusters >= 0])
    options = manifest["options"]
    flops = {
        "fit": 2 * options["sample"] * options["k"] * chosen.dim * (options["iters"] + 1),
        "assign": 2 * int(sizes.sum()) * options["k"] * chosen.dim,
        "pairs": int((sizes.astype(np.float64) ** 2).sum()) * chosen.dim,
    }
    rate, cpu_rate = np.mean(rates, axis=0).tolist()
    found["largest_cluster"], found["edges"] = int(sizes.max()), manifest["edges"]
    found["product_gflops_per_s"], found["product_gflops_per_cpu_s"] = round(rate, 1), round(cpu_rate, 1)
    found["products_s"] = {name: round(count * 1e-9 / rate, 2) for name, count in flops.items()}
    found["ratio"] = round(found["cluster"]["seconds"] / sum(found["products_s"].values()), 3)
    found["cpu_ratio"] = round(found["cluster"]["cpu_s"] / (sum(flops.values()) * 1e-9 / cpu_rate), 3)
    found |= {
        "date": date.today().isoformat(),
        "cores": os.cpu_count(),
        "versions": versions("faiss-gpu", "numpy"),
    }
    print(json.dumps(found, indent=1))
    if not chosen.keep:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
