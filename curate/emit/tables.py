"""Write a selection as lists and tables, which need no pool.

In: SEL and the embeddings and clusters it was made from. Out, by format:
    keys            OUT/{stem}.txt: the kept keys of a pool shard, one a line; {stem}.npy i64 where all are numbers
    datacomp        OUT/subset.npy: the kept uids as sorted (u8, u8), DataComp's subset files
    parquet         OUT/table/{stem}.parquet: every row with its key, caption, scores and verdict
    clip-retrieval  OUT/img_emb/img_emb_{i}.npy, text_emb/text_emb_{i}.npy f16, metadata/metadata_{i}.parquet: kept rows
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from curate import engine
from curate.emit.kept_samples import Coreset
from curate.errors import UsageError
from curate.storage import manifest, paths, records, sidecar, whole_files
from curate.storage.schema import UID, extra_columns, uid_pairs

GROUP_ROWS, MANY = 4096, 64  # tiny shards are written together: about so many rows of them, where there are many
FOLDERS = ("table", "img_emb", "text_emb", "metadata")
EMBEDDED_COLUMNS = ("uid", "caption", "url", "width", "height", "status", "clip_score")


def emit_tables(coreset: Coreset, out: str, options: Mapping[str, Any], job: engine.Job) -> dict[str, Any]:
    """Write one of the table formats and return the manifest."""
    output = manifest.open_output(out, "emit", options, {"selection": coreset.selection}, overwrite=job.overwrite)
    if output.complete:
        return output.manifest
    output.tell(quiet=job.quiet)
    kind, stems = options["format"], coreset.selection.stems
    if kind == "datacomp":
        started = {"subset": _write_subset(coreset, output.path("subset.npy"))}
        kept = sum(len(rows) for _, rows in coreset.all_kept_rows())
        if kept and not started["subset"]["rows"]:
            paths.remove(output.directory)
            told = f"none of the {kept:,} kept rows has a uid, of which DataComp's subset files are made"
            raise UsageError(f"{told}.", "--format keys, or import with --pool")
        return output.finish(shards=started, counts=_account(output, kept, *started["subset"].values()))
    number = {stem: f"{index:0{len(str(len(stems)))}d}" for index, stem in enumerate(stems)}
    task: _Write = {"keys": _WriteKeys, "parquet": _WriteParquet, "clip-retrieval": _WriteVectors}[kind](
        coreset, output.directory, number
    )
    todo = output.pending(job.share(stems), task.name)
    group = max(1, min(len(todo) // MANY, GROUP_ROWS * len(stems) // max(1, sum(coreset.selection.rows.values()))))
    outcome = engine.run_stage("emit", task, todo, job, places=(out,), group=group, around=whole_files.together)
    output.log(stage="emit", rows=outcome.rows, seconds=round(outcome.seconds, 3), workers=job.workers)
    if output.overtaken():
        return output.manifest
    lost = output.failures(stems, outcome.failed, task.name)
    if unfinished := output.unfinished(stems, lost, task.name):
        return unfinished
    for folder in FOLDERS:
        paths.clear_temporaries(output.path(folder))
    wanted = coreset.selection.rows if kind == "parquet" else {s: len(rows) for s, rows in coreset.all_kept_rows()}
    shards = {stem: {"rows": rows} for stem, rows in wanted.items() if stem not in lost}
    shards |= {stem: {"rows": int(made["rows"])} for stem, made in outcome.done.items()}
    written, failed = sum(shard["rows"] for shard in shards.values()), sum(wanted[stem] for stem in lost)
    counts = _account(output, sum(wanted.values()), written, failed)
    counts = {"rows": counts["rows"]} if kind == "parquet" else counts
    return output.finish(shards=shards, counts=counts, **({"failed": lost} if lost else {}))


def _account(output: manifest.Output, wanted: int, written: int, missing: int) -> dict[str, int]:
    """Check that as much was written as there was to write."""
    manifest.reconcile(output.directory, wanted, {"written": written, "not written": missing})
    return {"rows": wanted, "written": written, **({"not_written": missing} if missing else {})}


def _write_subset(coreset: Coreset, location: str) -> dict[str, int]:
    """Write DataComp's subset file: dtype u8,u8, the two halves of each uid read as hexadecimal numbers, sorted.

    The uids are those of the pool's own JSON, if it has any.
    """
    halves, without = [np.empty(0, UID)], 0
    for stem in coreset.selection.stems:
        own = "source_uid" if "source_uid" in coreset.embedded.sidecars.schema(stem).names else "uid"
        given = coreset.embedded.table(stem, [own])[own]
        uids = [records.uid_bytes(uid) for uid in given.take(coreset.kept_rows(stem)).to_pylist()]
        found = [uid for uid in uids if uid is not None]
        without += len(uids) - len(found)
        halves.append(uid_pairs(found))
    subset = np.sort(np.concatenate(halves))
    sidecar.save_npy(location, subset)
    return {"rows": len(subset), "no_uid": without}


@dataclass
class _Write:
    """One table per stem. number: each stem's place, as clip-retrieval's files count."""

    coreset: Coreset
    out: str
    number: Mapping[str, str]
    clusters: manifest.Artefact | None = None

    def setup(self) -> None:
        """Nothing to prepare."""

    def __call__(self, stem: str, /) -> dict[str, Any]:
        """Write a stem's table."""
        raise NotImplementedError

    def name(self, stem: str) -> str:
        """Name the file, within the directory, that is written last and so marks a stem as done."""
        raise NotImplementedError

    def place(self, stem: str) -> str:
        """Locate that file."""
        return paths.join(self.out, self.name(stem))


class _WriteKeys(_Write):
    def name(self, stem: str) -> str:
        return f"{stem}.txt"

    def __call__(self, stem: str, /) -> dict[str, Any]:
        table = self.coreset.selection.table(stem, ["kept", "key"])
        keys = table.filter(table["kept"])["key"].to_pylist()
        if keys and all(key.isdecimal() and key.isascii() and len(key) <= 18 for key in keys):
            sidecar.save_npy(paths.join(self.out, f"{stem}.npy"), np.array(keys, np.int64))
        with paths.atomic_write(self.place(stem)) as file:
            file.write("".join(f"{key}\n" for key in keys).encode())
        return {"rows": len(keys)}


class _WriteParquet(_Write):
    def setup(self) -> None:
        """Look the clusters up once: that reads and digests the manifests on the way to them."""
        try:
            self.clusters = self.coreset.selection.source("cluster")
        except LookupError:
            self.clusters = None

    def name(self, stem: str) -> str:
        return f"table/{stem}.parquet"

    def __call__(self, stem: str, /) -> dict[str, Any]:
        chosen, sidecars = self.coreset.selection.table(stem), self.coreset.embedded.sidecars
        embedded = sidecars.table(stem, [*EMBEDDED_COLUMNS, *extra_columns(sidecars.schema(stem))])
        columns: dict[str, Any] = {"key": chosen["key"], "stem": pa.array([stem] * chosen.num_rows)}
        for name in embedded.column_names:
            columns[name] = embedded[name]
        columns["uid"] = pa.chunked_array(map(_hexadecimal, embedded["uid"].chunks), pa.string())
        clusters = self.clusters.table(stem) if self.clusters is not None else None
        for table in filter(None, (clusters, chosen)):
            columns |= {name: table[name] for name in table.column_names}
        _save_parquet(self.place(stem), pa.table(columns).replace_schema_metadata(None))
        return {"rows": chosen.num_rows}


class _WriteVectors(_Write):
    scored = True  # whether any caption was embedded

    def setup(self) -> None:
        """Find out whether there are caption vectors to write: zeros in their place would pass for vectors."""
        scores = self.coreset.embedded.sidecars.tables(["clip_score"])
        self.scored = any(table["clip_score"].null_count < table.num_rows for _, table in scores)

    def name(self, stem: str) -> str:
        return f"metadata/metadata_{self.number[stem]}.parquet"

    def __call__(self, stem: str, /) -> dict[str, Any]:
        rows, number = self.coreset.kept_rows(stem), self.number[stem]
        columns = (("image_embedding", "img_emb"), ("text_embedding", "text_emb"))
        for column, name in columns if self.scored else columns[:1]:
            vectors = self.coreset.embedded.sidecars.take_vectors(stem, column, rows)
            sidecar.save_npy(paths.join(self.out, name, f"{name}_{number}.npy"), vectors)
        engine.advance(len(rows))
        table = self.coreset.embedded.table(stem, ["key", *EMBEDDED_COLUMNS]).take(rows)
        names = {"key": "image_path", "clip_score": "similarity"}
        told = {names.get(name, name): table[name] for name in table.column_names if name not in ("uid", "status")}
        _save_parquet(self.place(stem), pa.table(told).replace_schema_metadata(None))
        return {"rows": len(rows)}


def _hexadecimal(uids: pa.Array) -> pa.Array:
    """Write uids as text, which takes most of the time for a long shard."""
    written = pa.array([uid and uid.hex() for uid in uids.to_pylist()], pa.string())
    engine.advance(len(written))
    return written


def _save_parquet(location: str, table: pa.Table) -> None:
    import pyarrow.parquet

    with paths.atomic_write(location) as file:
        pyarrow.parquet.write_table(table, file, compression="zstd")
