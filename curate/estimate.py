"""Say beforehand what a pipeline would do: the commands, and rows, bytes and time per stage.

Rows and bytes come from the headers of the pool's shards (of many: the first, the middle and the last). Time comes from
what an earlier run in the same place measured (`log.jsonl`), else from a short calibration on this machine: a hundred
samples really embedded, and one matrix product for the stages that are matrix products. Nothing is written outside a
temporary directory.
"""

import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from curate import paths, shards, store
from curate.engine import Job, cores
from curate.errors import CurateError
from curate.pipeline import TRAINER, Pipeline, check_trainer, shown_command, stage_options

CALIBRATION_ROWS = (16, 16, 128)  # the first run pays for imports, the difference of the others is the rate
RECORDS = (store.MANIFEST, "train_manifest.json", "answers.manifest.json")  # each says that a stage is done
MAX_COUNTED = 16  # shards whose headers are all read; of more, the first, the middle and the last
WRITE_BYTES_PER_S = 300e6  # tar copy and sidecar writing, fsync included; a fifth of an NVMe disk
ROW_OVERHEAD_BYTES = 120  # key, uid, hash, caption, scores


@dataclass(frozen=True)
class Size:
    """What a pool holds, exactly or (with more than three shards) extrapolated."""

    rows: int
    size_bytes: int
    num_shards: int
    exact: bool


@dataclass(frozen=True)
class Cost:
    """What a stage reads and writes."""

    rows: int
    size_bytes: int
    seconds: float | None
    why: str = ""


def measure_pool(pool: str) -> tuple[Size, list[shards.Shard]]:
    """Count the samples of a pool from its shards' headers, of a large pool from three shards'."""
    found = shards.list_pool(pool)
    looked = found if len(found) <= MAX_COUNTED else [found[0], found[len(found) // 2], found[-1]]
    rows = seen = 0
    for shard in looked:
        with suppress(CurateError), paths.open_read(shard.location) as file:
            rows += len(shards.read_index(file).samples)
            seen += shard.size
    total = sum(shard.size for shard in found)
    return Size(round(rows * total / seen) if seen else 0, total, len(found), len(looked) == len(found)), found


def lines(pipeline: Pipeline, only: str | None) -> Iterator[str]:
    """Yield the plan of a pipeline, one stage after the other."""
    check_trainer(pipeline, only)
    total = 0.0
    sizes: dict[str, int] = {}
    for stage in pipeline.stages(only):
        yield f"▸ {shown_command(pipeline, stage)}"
        if any(paths.exists(paths.join(pipeline.place(stage), name)) for name in RECORDS):
            yield "    stands finished; it is run again only if its request has changed"
            continue
        if stage == "mix":
            yield from _sources(pipeline)
        if stage in TRAINER or stage in ("report", "mix"):
            continue
        cost = _cost(pipeline, stage, sizes)
        if cost is None or not cost.rows:
            yield "    not known before the pool is there"
            continue
        total += cost.seconds or 0.0
        spell = f"about {duration(cost.seconds)}" if cost.seconds is not None else "time not known"
        why = f" ({cost.why})" if cost.why else ""
        yield f"    {cost.rows:,} rows · {volume(cost.size_bytes)} written · {spell}{why}"
    if total:
        yield f"about {duration(total)} in all on this machine, as it is now"


def _sources(pipeline: Pipeline) -> Iterator[str]:
    """Say what each source of the mix is expected to hold, and what is not there yet."""
    for name, source in stage_options(pipeline, "mix").items():
        expect = source.expect if isinstance(source.expect, dict) else {"": source.expect}
        known = None not in expect.values()
        holds = f"{sum(expect.values()):,} records expected" if known else "as many records as it holds"
        lacking = [each for each in (source.path, source.images) if each and not _there(each)]
        yield f"    {name}: {holds}" + (f"; not there yet: {', '.join(lacking)}" if lacking else "")


def _there(location: str) -> bool:
    return any(mark in location for mark in "*?[{") or paths.exists(location)


def _cost(pipeline: Pipeline, stage: str, sizes: dict[str, int]) -> Cost | None:
    """Estimate one stage; `sizes` carries rows and dimensions from stage to stage."""
    if stage == "demo":
        options = stage_options(pipeline, "demo")
        sizes["rows"] = options.rows
        return Cost(options.rows, options.rows * 4500, options.rows / 1500 / cores(), "1,500 rows/s a core")
    if stage == "embed":
        return _embed_cost(pipeline, sizes)
    rows, dim = sizes.get("rows", 0), sizes.get("dim", 512)
    if stage == "cluster":
        options = stage_options(pipeline, "cluster")
        k = int(getattr(options, "k", 0) or max(1, rows // 100))
        sample = int(getattr(options, "sample", 0) or min(rows, 256 * k))
        products = 2.0 * dim * (sample * k * options.iters + rows * k + rows * (rows / k))
        return Cost(rows, rows * 28, products / gemm_flops() + rows * 2e-6, f"k = {k:,}: {products / 1e12:.3g} TFLOP")
    if stage == "select":
        return Cost(rows, rows * 40, rows * 4e-6, "sorting, no embeddings read")
    kept = int(rows * 0.1)
    size_bytes = kept * sizes.get("row_bytes", 0)
    return Cost(kept, size_bytes, size_bytes / WRITE_BYTES_PER_S, "at 10 % kept")


def _embed_cost(pipeline: Pipeline, sizes: dict[str, int]) -> Cost | None:
    """Estimate embedding from its log, else from really embedding the pool's first samples."""
    try:
        size, found = measure_pool(pipeline.pool)
    except CurateError:
        if "rows" not in sizes:
            return None
        return Cost(sizes["rows"], sizes["rows"] * (4 * sizes.get("dim", 64) + ROW_OVERHEAD_BYTES), None)
    sizes["rows"], sizes["row_bytes"] = size.rows, size.size_bytes // max(size.rows, 1)
    logged = _logged_rate(paths.join(pipeline.place("embed"), store.LOG))
    rate, dim, why = (*logged, "measured by an earlier run") if logged else (*_calibrate(pipeline, found), "calibrated")
    sizes["dim"] = dim
    why += "" if size.exact else f", rows extrapolated from 3 of {size.num_shards:,} shards"
    return Cost(size.rows, size.rows * (4 * dim + ROW_OVERHEAD_BYTES), size.rows / rate if rate else None, why)


def _logged_rate(location: str) -> tuple[float, int] | None:
    """Read rows/s and dimensions of the longest run in a log."""
    best: tuple[float, float, int] | None = None
    if paths.exists(location):
        for line in paths.read_text(location).splitlines():
            with suppress(ValueError, KeyError, ZeroDivisionError):
                entry = json.loads(line)
                rows = float(entry["rows"])
                if rows and (best is None or rows > best[0]):
                    best = (rows, rows / float(entry["seconds"]), int(entry.get("dim", 512)))
    return best[1:] if best else None


def _calibrate(pipeline: Pipeline, found: list[shards.Shard]) -> tuple[float, int]:
    """Embed the pool's first samples, few and more, so that loading cancels out. Returns rows/s and dimensions."""
    from curate.embed import embed

    seconds, rows, dim = [], [], 512
    with tempfile.TemporaryDirectory() as folder:
        for turn, count in enumerate(CALIBRATION_ROWS):
            pool, out = paths.join(folder, f"pool{turn}"), paths.join(folder, f"emb{turn}")
            rows.append(_copy_head(found[0], paths.join(pool, "00000.tar"), count))
            started = time.perf_counter()
            embed(pool, out, stage_options(pipeline, "embed"), Job(workers=1, quiet=True))
            seconds.append(time.perf_counter() - started)
            dim = store.reader(paths.join(out, "00000.arrow")).schema.field("image_embedding").type.list_size
    return max(rows[-1] - rows[-2], 1) / max(seconds[-1] - seconds[-2], 1e-3), dim


def _copy_head(shard: shards.Shard, target: str, count: int) -> int:
    """Copy a shard's first samples into a tar of their own; returns how many there were."""
    with paths.open_read(shard.location) as file:
        samples = shards.read_index(file).samples[:count]
        with paths.atomic_write(target) as sink, shards.TarWriter(sink) as tar:
            for sample in samples:
                for member in sample.members:
                    tar.add(member.name, shards.read_member(file, member))
    return len(samples)


def gemm_flops(side: int = 2048) -> float:
    """Measure this machine's matrix products in FLOP/s, fp32, best of three."""
    x = np.random.default_rng(0).normal(size=(side, side)).astype(np.float32)
    best = float("inf")
    for _ in range(3):
        started = time.perf_counter()
        x @ x
        best = min(best, time.perf_counter() - started)
    return 2.0 * side**3 / best


def duration(seconds: float) -> str:
    """Write a time span to read."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def volume(size_bytes: float) -> str:
    """Write a number of bytes to read."""
    for unit in ("B", "kB", "MB", "GB"):
        if size_bytes < 1000:
            return f"{size_bytes:.3g} {unit}"
        size_bytes /= 1000
    return f"{size_bytes:.3g} TB"
