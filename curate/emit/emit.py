"""Write out a selection, ready to train on.

In: SEL, and through its manifests the embeddings and the pool. Out, by `format`:
    webdataset  OUT/{000000}.tar   the original members of each kept sample byte for byte, a key.txt where its caption
                came from elsewhere, and OUT/{000000}.arrow, which says where each sample came from
    llava       OUT/coreset.json + OUT/images/{000000}/…, the same sidecars
    keys, datacomp, parquet, clip-retrieval   lists and tables, no samples: see tables.py
Which samples go to which output shard is computed once on the driver from the `kept` columns, so output shards can be
written independently. A sample that the pool no longer has is counted by reason and listed; its shard is one shorter.
"""

import errno
import itertools
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from curate import engine
from curate.emit import tables
from curate.emit.kept_samples import Coreset, Fetched, open_coreset, unique_keys
from curate.emit.options import TABLES, EmitOptions
from curate.errors import UsageError
from curate.storage import paths, records, sidecar
from curate.storage.manifest import Artefact, Output, digest, load_json, open_output, reconcile, versions
from curate.storage.renewal import shared
from curate.storage.schema import FUNNEL
from curate.storage.tar import CAPTION_SUFFIX, TarWriter
from pipelines.record_forms import Turns
from pipelines.records import read
from pipelines.samples import caption_turns

EMITTED_SCHEMA = pa.schema(
    [("key", pa.string()), ("source_stem", pa.string()), ("source_row", pa.int64()), ("uid", pa.binary(16))]
)
LLAVA_SCHEMA = EMITTED_SCHEMA.append(pa.field("record", pa.large_string()))
MAX_LISTED = 1000
# Errors of names that no file can have: too long, or another sample's picture is where a folder is needed.
NAMELESS = (errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EEXIST)


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of one stem's kept rows: the `start`-th up to, not including, the `stop`-th."""

    stem: str
    start: int
    stop: int


@shared
def emit(sel: str, out: str, options: EmitOptions, job: engine.Job, pool: str | None = None) -> dict[str, Any]:
    """Write the kept samples of `sel` to `out` and return the manifest.

    pool: where the pool is now, if it has moved. Raises: UsageError if nothing is kept or the pool is not found.
    """
    resolved = options.resolved()
    if options.format in TABLES:
        return tables.emit_tables(open_coreset(sel, pool, members=False), out, resolved, job)
    coreset = open_coreset(sel, pool)
    recorded = coreset.embedded.manifest["inputs"].get("pool", {}).get("digest", "")
    inputs: dict[str, Artefact | Mapping[str, Any]] = {
        "selection": coreset.selection,
        "pool": {"path": coreset.pool, "digest": _pool_digest(coreset, recorded)},
    }
    output = open_output(out, "emit", resolved, inputs, overwrite=job.overwrite)
    if output.complete:
        return output.manifest
    output.tell(quiet=job.quiet)
    plan = plan_shards(coreset, options.shard_size)
    with output.attempt():
        if not plan:
            raise UsageError(f"{sel} keeps no sample, so there is nothing to emit.", "loosen a step of `curate select`")
    renamed = unique_keys(coreset.all_kept_keys(), coreset.keys)
    suffix = ".tar" if options.format == "webdataset" else ".arrow"
    make: type[_WriteTar] | type[_WriteImages] = _WriteTar if options.format == "webdataset" else _WriteImages
    task = make(coreset, output.directory, plan, renamed, options.prompt)
    outcome = engine.run_stage("emit", task, output.pending(job.share(list(plan)), suffix), job, places=(out,))
    output.log(
        stage="emit", rows=outcome.rows, seconds=round(outcome.seconds, 3), workers=job.workers, engine=job.engine
    )
    if output.overtaken():
        return output.manifest
    failed = output.failures(list(plan), outcome.failed, suffix)
    if unfinished := output.unfinished(list(plan), failed, suffix):
        return unfinished
    replaced = None if failed else _replace_gone(task, output, suffix)
    manifest = _finish(output, plan, task.renamed, suffix, failed, replaced)
    counts = manifest["counts"]
    lost = counts["rows"] - counts["written"] + counts.get("replaced", 0) - counts.get("in_failed_shards", 0)
    if lost and not job.quiet:
        told = f"{counts.get('replaced', 0):,} replaced by the next in rank, {counts['written']:,} written"
        sys.stderr.write(f"emit: {lost:,} of {counts['rows']:,} samples could not be read from the pool; {told}\n")
    if (otherwise := manifest.get("other_captions")) and not job.quiet:
        told = "than their caption; --format llava writes the captions that `embed --caption` chose"
        sys.stderr.write(f"emit: {otherwise:,} samples keep a text other {told}\n")
    return manifest


def _pool_digest(coreset: Coreset, recorded: str) -> str:
    """Fingerprint the pool: as it was embedded, together with any shards that are gone or have another size now."""
    embedded = {stem: shard.get("size") for stem, shard in coreset.embedded.manifest["shards"].items()}
    now = {stem: coreset.tars[stem].size if stem in coreset.tars else None for stem in embedded}
    other = {stem: size for stem, size in now.items() if size is None or embedded[stem] not in (None, 0, size)}
    return digest([recorded, other]) if other else recorded


def _replace_gone(task: "_WriteTar | _WriteImages", output: Output, suffix: str) -> str | None:
    """Write one more shard with the next samples in rank for those gone, if the selection names any. Returns its name.

    The funnel's `reserve` lists [stem, row] in the order in which they would have been kept.
    """
    name = f"{len(task.plan):06d}"
    gone = sum(len(sidecar.facts(output.path(f"{made}.arrow"))["gone"]) for made in task.plan)
    reserve = load_json(task.coreset.selection.path(FUNNEL)).get("reserve", []) if gone else []
    if not reserve:
        return None
    task.need, task.reserve = gone, [(str(stem), int(row)) for stem, row in reserve]
    coreset = task.coreset
    rows_of: dict[str, list[int]] = {}
    for stem, row in task.reserve:
        rows_of.setdefault(stem, []).append(row)
    keys = {
        (stem, row): key
        for stem, rows in rows_of.items()
        for row, key in zip(rows, coreset.keys(stem, np.array(rows)), strict=True)
    }
    more = ((stem, np.array([row]), [keys[stem, row]]) for stem, row in task.reserve)
    task.renamed = unique_keys(itertools.chain(coreset.all_kept_keys(), more), coreset.keys)
    if output.missing([name], suffix):
        task.setup()
        task(name)
    table = sidecar.table(output.path(f"{name}.arrow"), ["source_stem", "source_row"])
    used = set(zip(*(column.to_pylist() for column in table.columns), strict=True))
    for stem, row in set(task.reserve) - used:
        task.renamed.get(stem, {}).pop(row, None)
    return name


def _finish(
    output: Output,
    plan: Mapping[str, list[Span]],
    renamed: Mapping[str, Mapping[int, str]],
    suffix: str,
    failed: Mapping[str, str],
    replaced: str | None,
) -> dict[str, Any]:
    """Account for every selected sample and complete the directory. replaced: the shard of replacements."""
    made = {name: sidecar.facts(output.path(f"{name}.arrow")) for name in plan if name not in failed}
    gone = [entry for fact in made.values() for entry in fact["gone"]]
    reasons: dict[str, int] = {}
    for entry in gone:
        reasons[entry["why"]] = reasons.get(entry["why"], 0) + 1
    selected = sum(span.stop - span.start for spans in plan.values() for span in spans)
    counts = {"written": sum(fact["rows"] for fact in made.values()), **dict(sorted(reasons.items()))}
    if failed:
        counts["in_failed_shards"] = sum(span.stop - span.start for name in failed for span in plan[name])
    reconcile(output.directory, selected, counts)
    if replaced is not None:
        made[replaced] = sidecar.facts(output.path(f"{replaced}.arrow"))
        counts["replaced"] = made[replaced]["rows"]
        counts["written"] += made[replaced]["rows"]
    if not counts["written"] and not failed:
        paths.remove(output.directory)
        told = ", ".join(f"{count:,} {why}" for why, count in reasons.items())
        raise UsageError(
            f"none of the {selected:,} kept samples could be read from the pool: {told}.",
            "say where the pool is: --pool",
        )
    if suffix == ".arrow" and not failed:
        _join_records(output, list(made))
    facts: dict[str, Any] = {
        "shards": {name: {"rows": fact["rows"], "bytes": fact["bytes"]} for name, fact in made.items()},
        "counts": {"rows": selected, **counts},
        "versions": versions("pyarrow"),
    }
    captioned = sum(fact["captioned"] for fact in made.values())
    if captioned:
        facts["captions_added"] = captioned
    if otherwise := sum(fact.get("other_captions", 0) for fact in made.values()):
        facts["other_captions"] = otherwise
    if gone:
        facts["gone"] = gone[:MAX_LISTED]
    if renamed:
        pairs = [(new, f"{stem} row {row}") for stem, rows in renamed.items() for row, new in rows.items()]
        facts["counts"]["renamed"] = len(pairs)
        facts["renamed"] = dict(pairs[:MAX_LISTED])
    if failed:
        facts["failed"] = failed
    return output.finish(**facts)


def plan_shards(coreset: Coreset, shard_size: int) -> dict[str, list[Span]]:
    """Cut the kept rows, in stem and row order, into output shards of `shard_size` samples. Reads only `kept`."""
    plan: dict[str, list[Span]] = {}
    position = 0
    for stem, rows in coreset.all_kept_rows():
        start, total = 0, len(rows)
        while start < total:
            stop = min(total, start + shard_size - position % shard_size)
            plan.setdefault(f"{position // shard_size:06d}", []).append(Span(stem, start, stop))
            position += stop - start
            start = stop
    return plan


class _KeptRows:
    """Caches the kept rows of the last stem, since spans come stem by stem."""

    def __init__(self, coreset: Coreset) -> None:
        self.coreset = coreset
        self.stem, self.rows = "", np.empty(0, np.int64)

    def __call__(self, span: Span) -> np.ndarray:
        if span.stem != self.stem:
            self.stem, self.rows = span.stem, self.coreset.kept_rows(span.stem)
        return self.rows[span.start : span.stop]


@dataclass
class _Write:
    """What the two writers share. need, reserve: see `_replace_gone`. gone: samples not found, in the order met."""

    coreset: Coreset
    out: str
    plan: Mapping[str, list[Span]]
    renamed: dict[str, dict[int, str]]
    prompt: str
    need: int = 0
    reserve: list[tuple[str, int]] = field(default_factory=list)
    gone: list[dict[str, Any]] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    captioned: int = 0
    other_captions: int = 0  # samples that say another caption than the one that `embed --caption` chose
    held_captions: tuple[str, pa.ChunkedArray] | None = None

    def setup(self) -> None:
        """Nothing to prepare."""

    def samples(self, name: str) -> Iterator[tuple[str, Fetched]]:
        """Yield (output key, sample) of an output shard, noting what is gone."""
        self.gone, self.rows, self.captioned, self.other_captions = [], [], 0, 0
        for sample in self._fetch(name):
            engine.advance(1)
            if sample.gone:
                self.gone.append({"stem": sample.stem, "row": sample.row, "key": sample.key, "why": sample.gone})
                continue
            key = self.renamed.get(sample.stem, {}).get(sample.row, sample.key)
            self.rows.append({"key": key, "source_stem": sample.stem, "source_row": sample.row, "uid": sample.uid})
            yield key, sample

    def _fetch(self, name: str) -> Iterator[Fetched]:
        kept_rows = _KeptRows(self.coreset)
        for span in self.plan.get(name, []):
            yield from self.coreset.fetch(span.stem, kept_rows(span))
        for stem, row in self.reserve if name not in self.plan else []:
            if len(self.rows) < self.need:
                yield from self.coreset.fetch(stem, np.array([row]))

    def caption(self, sample: Fetched) -> str:
        """Look up a sample's caption, "" if it has none; each shard's column is read at most once."""
        if self.held_captions is None or self.held_captions[0] != sample.stem:
            self.held_captions = sample.stem, self.coreset.embedded.table(sample.stem, ["caption"])["caption"]
        return self.held_captions[1][sample.row].as_py() or ""

    def write_sidecar(self, name: str, schema: pa.Schema, size: int) -> dict[str, Any]:
        """Write where each sample of an output shard came from. size: bytes of the samples."""
        batch = pa.RecordBatch.from_pylist(self.rows, schema)
        facts = {"rows": len(self.rows), "bytes": size, "gone": self.gone, "captioned": self.captioned}
        facts["other_captions"] = self.other_captions
        sidecar.write_table(paths.join(self.out, f"{name}.arrow"), schema, [batch], facts)
        return {"rows": len(self.rows), "bad": len(self.gone)}


class _WriteTar(_Write):
    """Write one output tar. Its sidecar comes first, so if the tar exists, the shard is finished."""

    def __call__(self, name: str, /) -> dict[str, Any]:
        chosen = self.coreset.embedded.manifest["options"].get("caption")
        with paths.atomic_write(paths.join(self.out, f"{name}.tar")) as file:
            with TarWriter(file) as tar:
                for key, sample in self.samples(name):
                    caption = "" if sample.has_text else self.caption(sample)
                    for member, suffix, data in sample.members:
                        blank = bool(caption) and suffix == CAPTION_SUFFIX
                        tar.add(key + member[len(sample.key) :], caption.encode() if blank else data)
                    if caption and sample.text(CAPTION_SUFFIX) is None:
                        tar.add(f"{key}.{CAPTION_SUFFIX}", caption.encode())
                    self.captioned += bool(caption)
                    self.other_captions += bool(chosen) and sample.says_other(self.caption(sample))
            return self.write_sidecar(name, EMITTED_SCHEMA, tar.offset)


class _WriteImages(_Write):
    """Write one folder of images. The sidecar, which carries the records, comes last."""

    def __call__(self, name: str, /) -> dict[str, Any]:
        size = 0
        for key, sample in self.samples(name):
            record: dict[str, Any] = {"id": key}
            images = []
            try:
                for member, _, data in sample.images:
                    images.append(f"{name}/{key}{member[len(sample.key) :]}")
                    paths.write_plain(paths.join(self.out, "images", images[-1]), data)
                    size += len(data)
            except OSError as error:
                if error.errno not in NAMELESS:
                    raise
                self.rows.pop()
                self.gone.append({"stem": sample.stem, "row": sample.row, "key": sample.key, "why": "no_file_name"})
                continue
            turns, images = _turns(sample.described, images)
            if images:
                record["image"] = images[0] if len(images) == 1 else images
            turns = turns or caption_turns(self.caption(sample), self.prompt, max(1, len(images)))
            made = {**record, "conversations": turns}
            self.rows[-1]["record"] = records.dump(made).decode()
        if not paths.is_remote(self.out):
            os.sync()  # once a shard, before the sidecar says that its images are there
        return self.write_sidecar(name, LLAVA_SCHEMA, size)


def _turns(described: dict[str, Any], images: list[str]) -> tuple[Turns | None, list[str]]:
    """Return a sample's conversation, with a mark for each image if its form has none (`texts`), and those in order.

    described: its JSON.
    """
    reading = read(described, "", given=images)
    if reading.record is None or len(reading.pictures) > len(images):
        return records.conversations_of(described), images
    return reading.record["conversations"], list(reading.arrange(images))


def _join_records(output: Output, names: list[str]) -> None:
    """Write coreset.json from the sidecars' records, one per line, without holding them all in memory."""
    with paths.atomic_write(output.path("coreset.json")) as file:
        separator = b"[\n"
        for name in names:
            for batch in sidecar.batches(output.path(f"{name}.arrow")):
                for record in batch.column("record"):
                    file.write(separator + record.as_buffer().to_pybytes())
                    separator = b",\n"
        file.write(b"\n]\n" if separator == b",\n" else b"[]\n")
