"""Import published embeddings as sidecars, as they are or joined to your own download.

Without a pool, each part of the source becomes `EMB/{stem}.arrow` with its rows. With one, the sidecars are those of
the pool's shards: each row keeps its place, and its vectors are looked up in the source by key, url, sha256 or uid; if
there are none, its status is `unmatched`. The match rate is reported and kept. A join holds 16 bytes per source row.
"""

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from curate import engine
from curate.embed import reader
from curate.embed.contents import reading
from curate.embed.side_data import Extras, table_kinds
from curate.engine import Job
from curate.errors import UsageError, unknown
from curate.ingest import layouts
from curate.ingest.import_tasks import ImportPart, ImportShard
from curate.ingest.join import EXACT, JOINS, choose_form, unclear_keys
from curate.ingest.options import ImportOptions
from curate.storage import faults, manifest, paths, tar
from curate.storage.renewal import Parts, shared


@shared
def import_layout(source: str, out: str, options: ImportOptions, job: Job) -> dict[str, Any]:
    """Convert published embeddings to the form that `curate embed` writes, and return the manifest.

    Raises: UsageError for an unknown layout or join, a source of another form, or a join that matches nothing.
    """
    if bool(options.pool) != bool(options.join):
        raise UsageError("--pool and --join go together.", f"--pool POOL --join {'|'.join(JOINS)}")
    if options.join and options.join not in JOINS:
        raise unknown("join", options.join, JOINS)
    parts = layouts.list_parts(source, options.layout, options.arch)
    whole = options.layout != "nemo" and not source.endswith(".npy")  # of one file that is named nothing is left out
    passed = layouts.left_over(parts) if whole else {}
    looked = layouts.look(parts)
    files = [[p.stem, *(looked[file].size for file in (p.image, p.text, p.table) if file)] for p in parts]
    inputs: dict[str, Any] = {"source": {"path": source, "digest": manifest.digest(files)}}
    held = tar.survey_pool(options.pool) if options.pool else tar.Pool([], {})
    found = {shard.stem: shard for shard in held.shards}
    if options.pool:
        sizes = manifest.digest([[shard.stem, shard.size] for shard in found.values()])
        inputs["pool"] = {"path": options.pool, "digest": sizes}
    made: dict[str, Any] = {name: getattr(options, name) for name in ("layout", "join", "arch", "max_pixels")}
    extra = _extras(next((part for part in parts if part.table), parts[0]), options.columns)
    if extra.columns:
        made["columns"] = dict(extra.columns)
    named = {part.stem: part for part in parts}
    given: dict[str, tar.Shard | Sequence[str]] = {**found} if options.pool else {s: p.files for s, p in named.items()}
    contents = reading(given, job, verify=options.verify)
    made_of = tar.parts_of(held.shards, contents, f"{inputs['source']['digest']} ", verify=options.verify)
    stamps = layouts.seen(parts, looked)  # sizes alone would miss vectors made anew by another model
    written = manifest.digest([stamps[stem][1] for stem in named])
    made_of = replace(made_of, seen={stem: (*seen[:2], f"{seen[2]} {written}") for stem, seen in made_of.seen.items()})
    if not options.pool:
        place = paths.place(paths.parent(parts[0].image))
        made_of = Parts(("source",), stamps, place, contents, options.verify)
    output = manifest.open_output(
        out, "import", made, inputs, overwrite=job.overwrite, parts=replace(made_of, inputs=tuple(inputs))
    )
    if output.complete:
        output.tell(quiet=job.quiet)
        return output.manifest
    if not options.pool:
        output.tell(quiet=job.quiet)
        todo = output.pending(job.share(list(named)))
        task_of_parts = ImportPart(named, output.directory, extra)
        outcome = engine.run_stage("import", task_of_parts, todo, job, places=(out,))
        return _finish(output, list(named), outcome, {}, passed, quiet=job.quiet)
    inside = None if paths.is_remote(out) else paths.local(output.directory)  # all nodes see it, a rerun clears it
    with output.attempt(), tempfile.TemporaryDirectory(".tmp", ".join-", inside) as folder:
        form, joined = choose_form(parts, options.join, folder, held.shards)
        if form != EXACT:
            joined["form"] = form
        _keep_of_form(output, form)
        output.tell(quiet=job.quiet)
        task = ImportShard(parts, found, folder, options.join, form, options.max_pixels, output.directory, extra)
        outcome = engine.run_stage("import", task, output.pending(job.share(list(found))), job, places=(out,))
    return _finish(output, list(found), outcome, joined, faults.total([passed, held.passed]), quiet=job.quiet)


def _keep_of_form(output: manifest.Output, form: str) -> None:
    """Keep no shard whose rows were looked up by another form of their keys than the present one."""
    if output.kept:
        before = manifest.open_input(output.home).manifest.get("joined", {}).get("form", EXACT)
        if before != form:
            output.kept, output.why = frozenset(), f"keys are now compared as {form}: all shards are joined again"


def _extras(part: layouts.Part, names: Sequence[str]) -> Extras:
    """Look up the types of further columns in the first part's table."""
    if names and not part.table:
        raise UsageError(f"{part.image} has no table beside it, so there are no columns {', '.join(names)}.")
    return Extras(table_kinds(layouts.table_schema(part), names, part.table) if names else {})


def _finish(
    output: manifest.Output,
    stems: list[str],
    outcome: engine.Outcome,
    joined: dict[str, Any],
    passed: faults.Faults,
    *,
    quiet: bool,
) -> dict[str, Any]:
    """Account for every row, check that one model made them all, and write the manifest."""
    facts, counts = reader.account(output, stems)
    dims = {fact["dim"]: stem for stem, fact in facts.items() if fact["dim"]}
    if len(dims) > 1:
        told = ", ".join(f"{stem} has {dim}" for dim, stem in dims.items())
        raise UsageError(
            f"the parts are from different models: {told} dimensions.", "import each into its own directory"
        )
    output.log(stage="import", rows=outcome.rows, seconds=round(outcome.seconds, 3))
    failed = output.failures(stems, outcome.failed)
    if unfinished := output.unfinished(stems, failed):
        return unfinished
    example_there = joined.pop("source_example", "")
    if joined and facts:
        total = sum(fact["rows"] for fact in facts.values())
        joined["matched"] = sum(fact["matched"] for fact in facts.values())
        if not joined["matched"]:
            paths.remove(output.directory)
            example, join = next(iter(facts.values()))["example"], output.plan["options"]["join"]
            others = " or ".join(f"--join {name}" for name in JOINS if name != join)
            told = f"the pool has {example!r}, the source {example_there!r}"
            raise UsageError(f"no row of the pool matches by {join}: {told}.", f"try {others}")
        if not quiet:
            rate = f"{joined['matched']:,} of {total:,} rows of the pool matched ({joined['matched'] / total:.1%})"
            form = f", keys compared as {joined['form']}" if "form" in joined else ""
            sys.stderr.write(f"import: {rate}{form}; the source has {joined['source_rows']:,} rows\n")
    if joined and output.plan["options"]["join"] == "key":
        passed = faults.total([passed, unclear_keys(joined, {stem: output.find(stem) for stem in facts})])
    bad = reader.all_faults(facts, passed)
    faults.write("import", bad, quiet=quiet)
    return output.finish(
        shards={
            stem: {name: fact[name] for name in ("rows", "digest", "source") if name in fact}
            for stem, fact in facts.items()
        },
        counts=counts,
        **({"joined": joined} if joined else {}),
        **({"faults": bad} if bad else {}),
        **({"failed": failed} if failed else {}),
    )
