"""Say beforehand what a pipeline would do: the commands, and rows, bytes and time per stage.

Rows and bytes come from the headers of the pool's shards (of many, the first, the middle and the last), or from the
embeddings if they exist. Time comes from what an earlier run in the same place measured (`log.jsonl`), else from a
short calibration on this machine: a hundred samples are really embedded, and the clustering code runs on made-up rows
of the same width (calibration.py). Nothing is written outside a temporary directory.
"""

import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

from curate.engine import Job, cores
from curate.errors import CurateError, UsageError
from curate.run import calibration
from curate.run.pipeline import TRAINER, Pipeline, check_trainer, shown_command, stage_options
from curate.select import catalogue, syntax
from curate.select.frame import Count
from curate.storage import manifest, paths, sidecar
from curate.storage.tar import Shard, TarWriter, list_pool, open_tar, read_index, read_member
from curate.vectors import kmeans

CALIBRATION_ROWS = (16, 16, 128)  # the first run pays for imports, the difference between the others gives the rate
RECORDS = (manifest.MANIFEST, "train_manifest.json", "answers.manifest.json")  # each says that a stage is done
MAX_COUNTED = 16  # most shards whose headers are all read; of more, the first, the middle and the last
WRITE_BYTES_PER_S = 300e6  # tar copy and sidecar writing, fsync included; a fifth of an NVMe disk
START_S = 4.0  # imports and workers, of a stage
SKEW = 2.0  # sum of squared cluster sizes over that of equal clusters, as k-means gives on a mixture
SELECT_S_PER_ROW = 6e-6  # of the recipe balanced: sorts, and a pass over the edges
DEMO_ROW_BYTES = 4500  # of a rendered sample in its tar
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
    gpus: int = 0


def measure_pool(pool: str) -> tuple[Size, list[Shard]]:
    """Count the samples of a pool from its shards' headers, of a large pool from three shards'."""
    shards = list_pool(pool)
    counted = shards if len(shards) <= MAX_COUNTED else [shards[0], shards[len(shards) // 2], shards[-1]]
    rows = seen = 0
    for shard in counted:
        with suppress(CurateError), open_tar(shard.location) as file:
            rows += len(read_index(file).samples)
            seen += shard.size
    total = sum(shard.size for shard in shards)
    return Size(round(rows * total / seen) if seen else 0, total, len(shards), len(counted) == len(shards)), shards


def lines(pipeline: Pipeline, only: str | None, gpus: int = 0) -> Iterator[str]:
    """Yield the plan of a pipeline, one stage after the other. gpus: how many the stages would share."""
    check_trainer(pipeline, only)
    total = hours = 0.0
    left_out: dict[str, None] = {}  # of the time in all, in words
    sizes: dict[str, int] = {"gpus": gpus}
    missing = None
    for stage in pipeline.stages(only):
        yield f"▸ {shown_command(pipeline, stage)}"
        if any(paths.exists(paths.join(pipeline.place(stage), name)) for name in RECORDS):
            yield "    already finished; it is run again only if its request has changed"
            if stage in ("embed", "import"):
                _take_sizes(pipeline.place(stage), sizes)
            continue
        if stage == "mix":
            yield from _sources(pipeline)
        if stage in TRAINER or stage in ("report", "mix"):
            left_out |= {"training": None} if stage in TRAINER else {}
            continue
        cost = _cost(pipeline, stage, sizes)
        if cost is None or not cost.rows:
            missing = missing or _missing(pipeline, stage, only)
            yield f"    unknown until {'what it imports' if 'import' in pipeline.tables else 'the pool'} is there"
            continue
        total += cost.seconds or 0.0
        if cost.seconds is None:
            left_out = {"what is not known": None, **left_out}
        spell = f"about {duration(cost.seconds)}" if cost.seconds is not None else "time not known"
        why = f" ({cost.why})" if cost.why else ""
        taken = (cost.seconds or 0.0) * cost.gpus / 3600
        hours += taken
        spell += f" · {taken:.2g} GPU-hours" if taken else ""
        yield f"    {cost.rows:,} rows · {volume(cost.size_bytes)} written · {spell}{why}"
    if total:
        gpu = f", {hours:.2g} GPU-hours of it," if gpus else ""
        core = f"{total * cores() / 3600:.2g} core-hours"
        without = f", without {' and '.join(left_out)}" if left_out else ""
        yield f"about {duration(total)} in all{without}{gpu} ({core}) on this machine, as it is now"
    if missing:  # last, since commands and an ablation's costs are wanted even before there is a pool
        raise missing


def _missing(pipeline: Pipeline, stage: str, only: str | None) -> UsageError | None:
    """Return the error that a stage with outside input would end with if that is missing and no stage makes it."""
    if stage == "import":
        source = str(pipeline.tables[stage]["source"])
        return None if paths.exists(source) else UsageError(f"{source} does not exist", "--set import.source=DIR")
    if stage == "embed" and "demo" not in pipeline.stages(only):
        try:
            list_pool(pipeline.pool)
        except UsageError as error:
            return error
    return None


def _sources(pipeline: Pipeline) -> Iterator[str]:
    """Say what each source of the mix is expected to hold, and which of its files are missing."""
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
        sizes["rows"], sizes["row_bytes"] = options.rows, DEMO_ROW_BYTES
        seconds = options.rows / 1500 / cores()
        return Cost(options.rows, options.rows * DEMO_ROW_BYTES, seconds, "1,500 rows/s a core")
    if stage == "embed":
        return _embed_cost(pipeline, sizes)
    if stage == "import" or stage == "emit" and "select" not in pipeline.tables:
        return None  # a published table tells its rows when it is read, a selection of another run what it kept
    rows, dim = sizes.get("rows", 0), sizes.get("dim", 512)
    if stage == "cluster":
        return _cluster_cost(pipeline, rows, dim, sizes["gpus"])
    if stage == "select":
        chains = 1 + len(pipeline.tables["select"].get("compare", []))
        seconds = 1 + chains * rows * SELECT_S_PER_ROW
        return Cost(rows, chains * rows * 40, seconds, "sorting")
    kept = _kept(stage_options(pipeline, "select").texts(), rows)
    size_bytes = kept * sizes.get("row_bytes", 0)
    return Cost(kept, size_bytes, size_bytes / WRITE_BYTES_PER_S, f"at {100 * kept / max(rows, 1):.3g} % kept")


def _kept(steps: Sequence[str], rows: int) -> int:
    """Estimate how many rows a selection keeps: by the shares of its bands and the budgets that its steps have."""
    kept = float(rows)
    for step in catalogue.parse(steps):
        if step.name == "rank":
            kept *= step.arguments["hi"] - step.arguments["lo"]
        elif syntax.parameters(catalogue.STEPS[step.name], catalogue.HIDDEN).get("n") is Count:
            n = step.arguments["n"]
            kept = min(kept, n * rows if isinstance(n, float) else n)
    return round(kept)


def _take_sizes(directory: str, sizes: dict[str, int]) -> None:
    """Read rows and dimensions off finished embeddings."""
    embedded = manifest.open_input(directory)
    sizes["rows"] = sum(embedded.rows.values())
    whole = sum(int(shard.get("size", 0)) for shard in embedded.manifest["shards"].values())  # of the pool's tars
    sizes["row_bytes"] = whole // max(sizes["rows"], 1)
    if embedded.stems:
        schema = embedded.sidecars.schema(embedded.stems[0])
        sizes["dim"] = schema.field("image_embedding").type.list_size


def _cluster_cost(pipeline: Pipeline, rows: int, dim: int, gpus: int) -> Cost | None:
    """Estimate the fit on its sample, the assignment of all rows and the comparisons inside clusters."""
    if not rows:
        return None
    options = stage_options(pipeline, "cluster")
    k = int(options.k) or kmeans.default_k(rows)
    sample = int(options.sample) or kmeans.default_sample(rows, k, dim)
    rates = calibration.cluster_rates(dim, k, rows, options.floor, gpu=gpus > 0)
    passes = 3.0 if options.neighbours == 2 else 1.0  # own pairs are half of s², those with as many visitors another s²
    parts = {
        "fit": sample * options.iters * (rates.fit_row + k * rates.fit),
        "assign": rows * k * rates.assign,
        "relate": rows * rates.relate * SKEW * passes,
        "scatter": rows * options.neighbours * dim * 4 / WRITE_BYTES_PER_S,  # written and read again
    }
    by_part = ", ".join(f"{name} {duration(seconds)}" for name, seconds in parts.items())
    why = f"k = {k:,} by {rates.backend}, calibrated: {by_part}"
    return Cost(rows, rows * 28, START_S + sum(parts.values()), why, gpus if rates.backend.endswith("-gpu") else 0)


def _embed_cost(pipeline: Pipeline, sizes: dict[str, int]) -> Cost | None:
    """Estimate embedding from its log, else from really embedding the pool's first samples."""
    try:
        size, shards = measure_pool(pipeline.pool)
    except CurateError:
        if "rows" not in sizes:
            return None
        return Cost(sizes["rows"], sizes["rows"] * (4 * sizes.get("dim", 64) + ROW_OVERHEAD_BYTES), None)
    sizes["rows"], sizes["row_bytes"] = size.rows, size.size_bytes // max(size.rows, 1)
    logged = _logged_rate(paths.join(pipeline.place("embed"), manifest.LOG))
    try:
        rate, dim = logged or _calibrate(pipeline, shards)
        why = "measured by an earlier run" if logged else "calibrated"
    except CurateError as error:  # no weights yet, or no sample that can be read: the run itself would end like this
        rate, dim, why = 0.0, sizes.get("dim", 512), f"the stage would fail: {error}"
    sizes["dim"] = dim
    why += "" if size.exact else f", rows extrapolated from 3 of {size.num_shards:,} shards"
    gpus = sizes["gpus"]
    seconds = START_S + size.rows / rate / max(1, gpus if not logged else 1) if rate else None
    return Cost(size.rows, size.rows * (4 * dim + ROW_OVERHEAD_BYTES), seconds, why, gpus)


def _logged_rate(location: str) -> tuple[float, int] | None:
    """Read rows/s and dimensions of the longest run in a log."""
    best: tuple[float, float, int] | None = None
    if paths.exists(location):
        for line in paths.read_lines(location):
            with suppress(ValueError, KeyError, ZeroDivisionError):
                entry = json.loads(line)
                rows = float(entry["rows"])
                if rows and (best is None or rows > best[0]):
                    best = (rows, rows / float(entry["seconds"]), int(entry.get("dim", 512)))
    return best[1:] if best else None


def _calibrate(pipeline: Pipeline, shards: list[Shard]) -> tuple[float, int]:
    """Embed the pool's first samples, few and more, so that loading cancels out. Returns rows/s and dimensions."""
    from curate.embed.embed import embed

    seconds, rows, dim = [], [], 512
    with tempfile.TemporaryDirectory() as folder:
        for turn, count in enumerate(CALIBRATION_ROWS):
            pool, out = paths.join(folder, f"pool{turn}"), paths.join(folder, f"emb{turn}")
            rows.append(_copy_head(shards[0], paths.join(pool, "00000.tar"), count))
            started = time.perf_counter()
            embed(pool, out, stage_options(pipeline, "embed"), Job(workers=1, quiet=True))
            seconds.append(time.perf_counter() - started)
            dim = sidecar.schema(paths.join(out, "00000.arrow")).field("image_embedding").type.list_size
    return max(rows[-1] - rows[-2], 1) / max(seconds[-1] - seconds[-2], 1e-3), dim


def _copy_head(shard: Shard, target: str, count: int) -> int:
    """Copy a shard's first samples into a tar of their own; returns how many there were."""
    with open_tar(shard.location) as file:
        samples = read_index(file).samples[:count]
        with paths.atomic_write(target) as sink, TarWriter(sink) as tar:
            for sample in samples:
                for member in sample.members:
                    tar.add(member.name, read_member(file, member))
    return len(samples)


def duration(seconds: float) -> str:
    """Format a time span for people."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def volume(size_bytes: float) -> str:
    """Format a number of bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if size_bytes < 1000:
            return f"{size_bytes:.3g} {unit}"
        size_bytes /= 1000
    return f"{size_bytes:.3g} TB"
