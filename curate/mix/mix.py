"""Mix instruction data from several sources: how much of each, how much text-only, in which order.

In: a `[mix]` table with `[mix.sources.NAME]` tables. Out: `MIX/{000000}.tar` with `key.jpg` (the original bytes; absent
for text-only; `key.0.jpg`, `key.1.jpg`, … where a record has several) and `key.json` (the record in LLaVA's form,
unchanged, plus `source`), or `MIX/mix.json` (write_json.py).
Three stages: each source is read once into a temporary table (`.spool/NAME.arrow`: the record, where its picture's
bytes are, its tokens); the driver draws row numbers and shuffles them (sampling.py); each output shard is then written
independently from its rows. Records are never all in memory at once: 665,298 need a few hundred MB.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

import pipelines
from curate import engine, options
from curate.errors import ContractError, UsageError, unknown
from curate.mix import account as accounts
from curate.mix import sampling
from curate.mix.account import Columns, describe, recorded
from curate.mix.pictures import Picture, read_picture
from curate.mix.read_sources import ReadSource, facts_location
from curate.mix.sources import ELSEWHERE, SourceOptions
from curate.mix.write_json import write_json
from curate.storage import faults, paths, records, sidecar
from curate.storage.manifest import Output, load_json, open_output, versions
from curate.storage.renewal import shared
from curate.storage.tar import TarWriter, is_safe
from pipelines.terminal import printable

SCRATCH = ".spool"


@dataclass(frozen=True)
class MixOptions:
    """The table `[mix]`, without its sources.

    text_share, total: in samples or tokens (`by`). tokenizer: `estimate` (a quarter of the UTF-8 bytes) or the path of
    a tokenizer.json. image_tokens: how many an image counts as. strict: refuse faults instead of counting them.
    """

    seed: int = 0
    shard_size: int = 5_000
    shuffle: bool = True
    format: Literal["webdataset", "llava", "messages"] = "webdataset"
    by: Literal["samples", "tokens"] = "samples"
    text_share: float | None = None
    total: int | None = None
    tokenizer: str = "estimate"
    image_tokens: int = 0
    strict: bool = False
    sources: dict[str, dict[str, Any]] = field(default_factory=dict)


def read_table(mix_toml: str) -> dict[str, Any]:
    """Read the `[mix]` table of a TOML file, laid over its base."""
    try:
        table = pipelines.read(Path(mix_toml)).get("mix")
    except (OSError, ValueError) as error:
        raise UsageError(f"{mix_toml} is not a readable TOML file: {error}") from None
    if not isinstance(table, dict):
        raise UsageError(f"{mix_toml} has no [mix] table.", "write [mix] and [mix.sources.NAME] tables")
    return table


@shared
def mix(table: str | Mapping[str, Any], out: str, job: engine.Job) -> dict[str, Any]:
    """Mix the sources of a `[mix]` table (or of the TOML file that holds one) and return the manifest.

    Raises: UsageError for tables that ask for the impossible; ContractError if `strict` meets a fault, or a source has
    not as many records as its `expect` says.
    """
    chosen = options.build(MixOptions, read_table(table) if isinstance(table, str) else table, "mix")
    sources = build_sources(chosen)
    request, inputs = recorded(vars(chosen), sources), accounts.inputs(sources)
    output = open_output(out, "mix", request, inputs, overwrite=job.overwrite)
    if output.complete:
        return output.manifest
    output.tell(quiet=job.quiet)
    with output.attempt():
        facts = _read_sources(output, chosen, sources, job)
        tables = {name: Columns.read(output.path(f"{SCRATCH}/{name}.arrow")) for name in sources}
        _refuse_faults(chosen, sources, facts)
        _refuse_nothing(facts, {name: len(table.tokens) for name, table in tables.items()})
        order = _draw(chosen, sources, tables, facts)
        manifest = _write(output, chosen, sources, order, describe(sources, tables, facts, order), job)
    if not job.quiet:
        sys.stderr.writelines(f"mix: {printable(line)}\n" for line in accounts.losses(manifest.get("sources", {})))
    return manifest


def build_sources(chosen: MixOptions) -> dict[str, SourceOptions]:
    """Build the options of the sources, leaving out those that another source replaces.

    Raises: UsageError for a key that does not exist, or amounts that contradict each other.
    """
    if not chosen.sources:
        raise UsageError("[mix] names no source.", "add a table [mix.sources.NAME] with path = …")
    if chosen.shard_size < 1 or chosen.image_tokens < 0:
        raise UsageError(
            f"mix.shard_size={chosen.shard_size} and image_tokens={chosen.image_tokens}: expected at least 1 and 0."
        )
    for name in chosen.sources:
        if "/" in name or not is_safe(name):
            raise UsageError(
                f"the name of the mix source {name!r} cannot be part of a file name.", "use letters, digits, - and _"
            )
    built = {name: options.build(SourceOptions, table, f"mix.sources.{name}") for name, table in chosen.sources.items()}
    replaced = {source.replaces for source in built.values()} - {""}
    for name in replaced - set(built):
        raise unknown("source that another replaces", name, built)
    sources = {name: source for name, source in built.items() if name not in replaced}
    sampling.check(chosen.text_share, chosen.total, {name: source.amount for name, source in sources.items()})
    return sources


def _read_sources(
    output: Output, chosen: MixOptions, sources: Mapping[str, SourceOptions], job: engine.Job
) -> dict[str, dict[str, Any]]:
    """Read every source once into its temporary table. Returns what was found out about each, by name."""
    place = output.path(SCRATCH)
    paths.make_dir(place)
    paths.clear_temporaries(place)
    present = set(paths.listdir(place))
    missing = [name for name in sources if f"{name}.arrow" not in present]
    task = ReadSource(dict(sources), place, chosen.tokenizer, chosen.image_tokens)
    outcome = engine.run_stage("read", task, missing, job)
    output.log(stage="mix read", rows=outcome.rows, seconds=round(outcome.seconds, 3), workers=job.workers)
    for name, why in outcome.failed.items():
        raise ContractError(f"mix source {name} cannot be read: {why}")
    return {name: load_json(facts_location(place, name)) for name in sources}


def _refuse_faults(
    chosen: MixOptions, sources: Mapping[str, SourceOptions], facts: Mapping[str, Mapping[str, Any]]
) -> None:
    """Compare each source with its `expect`; under `strict` refuse any lost record. Raises: ContractError."""
    for name, fact in facts.items():
        expect = sources[name].expect
        wanted = expect if isinstance(expect, dict) else {} if expect is None else {"": expect}
        found = fact["folders"] if isinstance(expect, dict) else {"": fact["read"]}
        for where in (*wanted, ELSEWHERE):
            if found.get(where, 0) != wanted.get(where, 0):
                raise ContractError(
                    f"mix source {name} has {found.get(where, 0):,} records{where and ' in '}{where}, "
                    f"expected {wanted.get(where, 0):,}.",
                    "fetch the published file again, or change its `expect`",
                )
        faults = fact["faults"]
        if chosen.strict and (faults or fact["duplicate_ids"]):
            account = [f"{count:,} {why}" for why, count in faults.items()]
            account += [f"{fact['duplicate_ids']:,} duplicate ids"] if fact["duplicate_ids"] else []
            where = next((entry["what"] for entry in fact["listed"]), fact["listed_ids"][:1])
            raise ContractError(
                f"mix source {name} has {', '.join(account)} (the first: {where}), which strict refuses."
            )


def _refuse_nothing(facts: Mapping[str, Mapping[str, Any]], usable: Mapping[str, int]) -> None:
    """Refuse sources that have no usable record between them, saying what became of theirs. Raises: UsageError."""
    if not any(usable.values()):
        told = accounts.losses(facts) or [f"{name}: {facts[name]['read']:,} records" for name in usable]
        raise UsageError(f"the mix is empty: no source gave a usable record. {'. '.join(told)}.")


def _draw(
    chosen: MixOptions,
    sources: Mapping[str, SourceOptions],
    tables: Mapping[str, Columns],
    facts: Mapping[str, Mapping[str, Any]],
) -> sampling.Order:
    """Choose the rows of each source, and their order in the mix. Raises: UsageError, also naming what was lost."""
    parts = [
        sampling.Part(
            name=name,
            rows=sampling.choose(len(tables[name].tokens), source.amount, chosen.seed, name),
            tokens=tables[name].tokens,
            is_text=tables[name].is_text,
            weight=source.weight,
        )
        for name, source in sources.items()
    ]
    for name, source in sources.items():
        if source.weight is not None and not len(tables[name].tokens):
            told = "".join(f" {line}." for line in accounts.losses(facts))
            raise UsageError(f"mix source {name} has a weight and no usable record.{told}", "fix it, or take it out")
    try:
        return sampling.draw(parts, chosen.text_share, chosen.total, chosen.by, chosen.seed, chosen.shuffle)
    except UsageError as error:
        told = "".join(f" {line}." for line in accounts.losses(facts))
        raise UsageError(f"{error.message}{told}", error.hint) from None


def _write(
    output: Output,
    chosen: MixOptions,
    sources: Mapping[str, SourceOptions],
    order: sampling.Order,
    account: Mapping[str, Any],
    job: engine.Job,
) -> dict[str, Any]:
    """Write the mix and complete the directory."""
    if not len(order.rows):
        raise UsageError("the mix is empty: count, fraction and cap leave no record.", "raise them")
    names, place = list(sources), output.path(SCRATCH)
    if chosen.format != "webdataset":
        refused = write_json(output, chosen.format, _Rows(place, names).row, order, sources)
        faults.write("mix", refused, quiet=job.quiet)
        account = {**account, **({"not_for_all": refused} if refused else {})}
        finished: dict[str, Any] = {"mix": {"rows": len(order.rows)}}
    else:
        stems = [f"{index:06d}" for index in range(-(-len(order.rows) // chosen.shard_size))]
        task = _WriteShard(output.directory, place, names, order, chosen.shard_size)
        outcome = engine.run_stage(
            "mix", task, output.missing(job.share(stems), ".tar"), job, places=(output.directory,)
        )
        output.log(stage="mix", rows=outcome.rows, seconds=round(outcome.seconds, 3), workers=job.workers)
        left = set(output.missing(stems, ".tar"))
        if left - set(outcome.failed):
            return {"unfinished": len(left), **output.plan}
        finished = {stem: {"rows": len(task.positions(stem))} for stem in stems if stem not in left}
        if outcome.failed:
            return output.finish(shards=finished, **account, failed=outcome.failed)
    manifest = output.finish(shards=finished, **account, versions=versions("pyarrow"))
    paths.remove(place)
    return manifest


class _Rows:
    """Fetch single rows of the temporary tables, which are memory-mapped: only the row itself is read."""

    def __init__(self, place: str, names: list[str]) -> None:
        self.place, self.names = place, names
        self.opened = lru_cache(maxsize=None)(self._open)

    def _open(self, source: int) -> tuple[list[Any], np.ndarray]:
        batches = list(sidecar.batches(paths.join(self.place, f"{self.names[source]}.arrow")))
        return batches, np.cumsum([0, *(batch.num_rows for batch in batches)])

    def row(self, source: int, row: int, columns: Sequence[str]) -> list[Any]:
        """Return some columns of one row."""
        batches, starts = self.opened(source)
        index = int(np.searchsorted(starts, row, side="right")) - 1
        return [batches[index].column(name)[row - int(starts[index])].as_py() for name in columns]


@dataclass
class _WriteShard:
    """Write one tar of the mix."""

    out: str
    place: str
    names: list[str]
    order: sampling.Order
    shard_size: int

    def setup(self) -> None:
        """Open the temporary tables."""
        self.table_rows = _Rows(self.place, self.names)

    def positions(self, stem: str) -> range:
        """List the mix's positions that a shard holds."""
        start = int(stem) * self.shard_size
        return range(start, min(len(self.order.rows), start + self.shard_size))

    def __call__(self, stem: str, /) -> dict[str, Any]:
        with paths.atomic_write(paths.join(self.out, f"{stem}.tar")) as file, TarWriter(file) as tar:
            for position in self.positions(stem):
                source, key = int(self.order.source[position]), f"{position:09d}"
                picture = ("location", "offset", "size", "suffix")
                row = self.table_rows.row(source, int(self.order.rows[position]), ("record", "has_source", *picture))
                record, has_source, *places = row
                pictures = [Picture(*place) for place in zip(*places, strict=True)]
                for number, each in enumerate(pictures):
                    name = f"{key}.{each.suffix}" if len(pictures) == 1 else f"{key}.{number}.{each.suffix}"
                    tar.add(name, read_picture(each))
                # One field more than the record had, as its last; a record with a `source` of its own keeps that.
                more = b"}" if has_source else b', "source": ' + records.dump(self.names[source]) + b"}"
                tar.add(f"{key}.json", record[:-1] + more)
        return {"rows": len(self.positions(stem))}
