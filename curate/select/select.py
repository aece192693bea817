"""Select a coreset: `curate select CLU SEL --step "…"` or `--recipe NAME`.

In: `CLU/{stem}.arrow` and `CLU/edges.arrow` with the scalar columns of `EMB/{stem}.arrow`, or an EMB alone where no
step needs clusters. Out: `SEL/{stem}.arrow` (kept, or which step dropped the row, and its twin) and `SEL/funnel.json`
(what every step kept, dropped and estimated, with the curves and histograms of the report).

The funnel runs on the driver over scalar columns, a few dozen bytes per row. Embeddings are read only by steps that
need them: `exclude`, for example, and `dedup` if an earlier step split a component or the rule is not `components`.
"""

import math
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from curate.embed.weights import whole_name
from curate.engine import Job
from curate.errors import UsageError
from curate.progress import Progress
from curate.select import catalogue, cluster_shares, recipes, thresholds
from curate.select.frame import Directory, Frame, reserve_size
from curate.select.options import SelectOptions
from curate.select.pool import Pool
from curate.storage import paths, ranges, sidecar, whole_files
from curate.storage.manifest import (
    Artefact,
    Output,
    file_digest,
    open_input,
    open_output,
    reconcile,
    save_json,
    versions,
)
from curate.storage.renewal import shared
from curate.storage.schema import FUNNEL, SELECTION_SCHEMA, STATUSES

NUM_BINS = 60
SCORES = ("clip_score", "centroid_similarity")


@shared
def select(source: str, out: str, options: SelectOptions, job: Job) -> dict[str, Any]:
    """Run the funnel over a clustered (or only embedded) pool and write what became of each row. Returns the manifest.

    Raises: UsageError for impossible steps, or steps that leave no row.
    """
    parent = open_input(source, "cluster", "embed", "import")
    texts = options.texts()
    parsed = catalogue.parse(texts)
    losses = open_input(options.losses, "losses") if options.losses else None
    pool = Pool(parent, losses)
    frame = pool.frame(options.seed, options.model, options.pretrained)
    for step in parsed:
        step.check(frame)
    recipe = "" if options.steps else options.recipe or recipes.DEFAULT
    output = open_output(
        out,
        "select",
        {"steps": texts, "recipe": recipe, "seed": options.seed} | frame.text_weights,
        {"clusters" if parent.command == "cluster" else "embeddings": parent}
        | ({"losses": losses} if losses is not None else {})
        | _read_besides(parsed),
        overwrite=job.overwrite,
    )
    if output.complete:
        return output.manifest
    output.tell(quiet=job.quiet)
    started = time.perf_counter()
    progress = Progress("select", len(parsed), unit="steps", quiet=job.quiet)
    with output.attempt():
        codes, funnel = _run(parsed, frame, pool, progress)
    progress.close()
    shards = _write(output, pool, frame, codes, _names(parsed))
    save_json(output.path(FUNNEL), funnel)
    manifest = output.finish(
        shards=shards,
        counts={name: funnel[name] for name in ("kept", "dropped", "bad")},
        funnel=funnel["steps"],
        versions=versions("numpy", "scipy", "pyarrow"),
    )
    seconds = round(time.perf_counter() - started, 3)
    asked = {name: whole_name(getattr(options, name)) for name in ("model", "pretrained") if frame.text_weights}
    texts = [step["text"] for step in funnel["steps"]]
    output.log(stage="select", rows=funnel["rows"], seconds=seconds, steps=texts, **asked)
    return manifest


def _read_besides(parsed: Sequence[catalogue.Step]) -> dict[str, Artefact | Mapping[str, Any]]:
    """Open what steps and computed columns name besides the pool: these are inputs, too."""
    inputs: dict[str, Artefact | Mapping[str, Any]] = {}
    for number, (location, kind) in enumerate(dict.fromkeys(each for step in parsed for each in step.reads()), 1):
        if kind is Directory:
            inputs[f"target-{number}"] = open_input(location, "embed", "import")
        elif not paths.exists(location):
            raise UsageError(f"{location or repr(location)}, which a step reads, does not exist.")
        else:
            inputs[f"file-{number}"] = {"path": location, "digest": file_digest(location)}
    return inputs


def _names(parsed: Sequence[catalogue.Step]) -> list[str]:
    """Name what may drop a row: the steps' texts, numbered if one is given twice, then the bad statuses."""
    texts = [step.text for step in parsed]
    names = [text if texts.count(text) == 1 else f"{text} #{i}" for i, text in enumerate(texts, 1)]
    return [*names, *(status for status in STATUSES if status != "ok")]


def _run(
    parsed: Sequence[catalogue.Step], frame: Frame, pool: Pool, progress: Progress
) -> tuple[np.ndarray, dict[str, Any]]:
    """Run the steps. Returns per row the number of what dropped it (-1: kept) and the funnel's account."""
    names = _names(parsed)
    codes = np.full(len(frame.good), -1, np.int16)
    bad: dict[str, int] = {}
    for status, count in pool.statuses.items():
        if status != "ok":
            codes[pool.status_rows(status)] = names.index(status)
            bad[status] = count
    account: list[dict[str, Any]] = []
    movable: list[dict[str, Any]] = []
    reserve = np.empty(0, np.int64)
    for step in parsed:
        if not frame.alive.any():
            last = account[-1]["text"] if account else "the pool's own statuses"
            raise UsageError(f"no row is left for the step {step.text}: {last} dropped the last.", "loosen that step")
        before = frame.alive.copy()
        verdict = step.run(frame)
        frame.alive &= verdict.keep
        codes[before & ~frame.alive] = step.number - 1
        kept, reserve = int(frame.alive.sum()), verdict.reserve
        facts = {"before": int(before.sum()), "kept": kept, "dropped": int(before.sum()) - kept}
        account.append({"text": step.text, **facts, "estimates": verdict.estimates})
        movable += _movable(step, frame, before, kept)
        if "available" in verdict.estimates:
            asked, there = verdict.estimates["asked"], verdict.estimates["available"]
            progress.write(f"select: {step.text} asked for {asked:,} rows, only {there:,} were there: all are kept")
        progress.update(step.number, len(codes))  # the speed counts all rows, not those that stay
    kept = int(frame.alive.sum())
    if not kept:
        last, met = (account[-1]["text"], account[-1]["before"]) if account else ("a bad status", len(codes))
        raise UsageError(f"the selection is empty: {last} dropped the last {met:,} rows.", "loosen that step")
    parts = {"kept": kept, **{f"{s['text']} [{i}]": s["dropped"] for i, s in enumerate(account)}, **bad}
    reconcile("select", len(codes), parts)
    return codes, {
        "rows": len(codes),
        "kept": kept,
        "dropped": sum(step["dropped"] for step in account),
        "bad": sum(bad.values()),
        "statuses": bad,
        "steps": account,
        "curves": _curves(frame, account),
        "cuts": movable + _free_cuts(frame, {table["column"] for table in movable}),
        "histograms": _histograms(frame),
        "reserve": _reserve(reserve, kept, pool),
        **_clusters(frame, pool),
    }


def _clusters(frame: Frame, pool: Pool) -> dict[str, Any]:
    """Name the clusters that were starved and favoured, if there are clusters."""
    if pool.clu is None:
        return {}
    return {"clusters": cluster_shares.account(pool.emb, pool.clu, frame.group("cluster"), frame.alive)}


def _movable(step: catalogue.Step, frame: Frame, before: np.ndarray, kept: int) -> list[dict[str, Any]]:
    """Tabulate what other thresholds of the step would have kept, if it cuts a score."""
    column = thresholds.column_of(step.name, step.arguments)
    if column is None:
        return []
    table = thresholds.cut(step.name, step.arguments, frame.column(column)[before], kept)
    return [{"step": step.number - 1, "column": column, **table}]


def _reserve(rows: np.ndarray, kept: int, pool: Pool) -> list[list[str | int]]:
    """List the rows next in the last step's rank, [stem, row] each, to replace what emit finds gone."""
    rows = rows[: reserve_size(kept)]
    stem_of = np.searchsorted(pool.bounds, rows, side="right") - 1
    places = rows - pool.bounds[stem_of]
    return [[pool.emb.stems[stem], place] for stem, place in zip(stem_of.tolist(), places.tolist(), strict=True)]


def _curves(frame: Frame, account: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Count what dedup of all good rows would keep at many thresholds, including those that steps used."""
    if frame.edges is None:
        return {}
    used = [step["estimates"]["threshold"] for step in account if "threshold" in step["estimates"]]
    return {"dedup": thresholds.dedup_curve(frame.edges()[2], frame.floor, int(frame.good.sum()), used)}


def _free_cuts(frame: Frame, cut: set[str]) -> list[dict[str, Any]]:
    """Count what `above` alone would keep of all good rows, for each score that no step cuts."""
    made = []
    for name in SCORES:
        values = _score(frame, name)
        if name not in cut and values is not None:
            lowest = math.floor(float(np.nanmin(values[frame.good])) * 1e4 - 1) / 1e4
            table = thresholds.cut("above", {"x": lowest}, values[frame.good], 0)
            made.append({"step": None, "column": name, **table})
    return made


def _score(frame: Frame, name: str) -> np.ndarray | None:
    """Return a score of all rows, or None where the good rows have none."""
    if name not in frame.columns:
        return None
    values = frame.cache.get(name)
    values = frame.columns[name]() if values is None else values
    return values if (frame.good & ~np.isnan(values)).any() else None


def _histograms(frame: Frame) -> dict[str, Any]:
    """Count good and kept rows by value: {column: {edges, all, kept}}; including columns that steps computed."""
    made = {}
    computed = [name for name in frame.cache if name not in frame.columns and name not in frame.groups]
    for name in (*SCORES, "nearest_similarity", *computed):
        values = frame.cache[name] if name in computed else _score(frame, name)
        if values is None:
            continue
        good = frame.good & ~np.isnan(values)
        edges = _bin_edges(values[good])
        counted = {"all": values[good], "kept": values[good & frame.alive]}
        counts = {key: np.histogram(part, edges)[0].tolist() for key, part in counted.items()}
        made[name] = {"edges": [float(edge) for edge in edges], **counts}
    return made


def _bin_edges(values: np.ndarray) -> np.ndarray:
    """Cut the range of values into NUM_BINS; in f64 if it is too narrow for as many distinct f32 numbers."""
    try:
        return np.histogram_bin_edges(values, NUM_BINS)
    except ValueError:
        return np.linspace(float(values.min()), float(values.max()), NUM_BINS + 1)


def _write(
    output: Output, pool: Pool, frame: Frame, codes: np.ndarray, names: Sequence[str]
) -> dict[str, dict[str, int]]:
    """Write the sidecars, and return per stem how many rows there are and how many stay."""
    gone = frame.duplicates.kept >= 0
    dropped, similarities = frame.duplicates.rows[gone], frame.duplicates.similarity[gone]
    kept_keys = pool.keys(frame.duplicates.kept[gone])
    missing = set(output.missing(pool.emb.stems))
    keys = pool.emb.sidecars.tables(["key"], [stem for stem in pool.emb.stems if stem in missing])
    shards: dict[str, dict[str, int]] = {}

    def made() -> Iterator[tuple[str, pa.RecordBatch]]:
        for stem, first, last in pool.extents():
            kept = codes[first:last] < 0
            shards[stem] = {"rows": last - first, "kept": int(kept.sum())}
            if stem not in missing:
                continue
            here = slice(*np.searchsorted(dropped, [first, last]))
            place, similarity = np.full(last - first, -1), np.full(last - first, np.nan, np.float32)
            place[dropped[here] - first] = np.arange(here.start, here.stop)
            similarity[dropped[here] - first] = similarities[here]
            component = frame.duplicates.components(first, last)
            columns = [
                next(keys)[1]["key"].combine_chunks(),
                pa.array(kept),
                sidecar.label_codes(codes[first:last], names),
                pa.array(component, pa.int64(), mask=component < 0),
                kept_keys.take(pa.array(place, mask=place < 0)).cast(pa.string()),
                pa.array(similarity, mask=np.isnan(similarity)),
            ]
            yield stem, pa.record_batch(columns, schema=SELECTION_SCHEMA)

    def write(each: tuple[str, pa.RecordBatch]) -> None:
        stem, batch = each
        sidecar.write_table(output.path(f"{stem}.arrow"), SELECTION_SCHEMA, [batch], shards[stem])

    with whole_files.together():
        deque(ranges.ahead(output.directory, write, made()), maxlen=0)
    return shards
