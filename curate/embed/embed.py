"""Embed a pool: image and caption vectors, their cosine and what each image is, one sidecar per shard.

In: a pool of tars. Out: `EMB/{stem}.arrow` with the shard's rows in its order; a bad sample keeps its row.
Batches are fixed slices of a shard and never cross shards; each runs on one thread, so that the bytes depend neither on
the number of threads nor on that of workers. On a CPU the same thread decodes and embeds a batch; on a GPU, or with
`decoders`, processes decode ahead of the model. Captions are sorted by length within their shard and run at it.
"""

import os
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from curate import engine
from curate.embed import encoder, jpegs, makers, reader, side_data, weights
from curate.embed.captions import Wanted
from curate.embed.check_pool import check_members
from curate.embed.contents import reading
from curate.embed.decoding import Decoders
from curate.embed.options import EmbedOptions
from curate.embed.spent import Spent, in_words, shares
from curate.engine import Job
from curate.errors import UsageError, unknown
from curate.storage import faults, manifest, members, paths, sidecar, tar
from curate.storage.ranges import map_ahead
from curate.storage.renewal import shared
from curate.storage.schema import STATUSES, embedding_schema
from curate.vectors import exact
from pipelines import memory

PICKS = ("first", "random")
DECODES = ("full", "fast", "gpu")
CPU_BATCH, GPU_BATCH = 32, 256
MOST_SHARED_BYTES = 2 << 30  # fp32 weights up to this size (ViT-L has 1.7 GB) are held twice on a GPU
TEXTS_PER_IMAGE = 2  # caption batches may be larger: captions are short


@shared
@memory.kept()
def embed(pool: str, out: str, options: EmbedOptions, job: Job) -> dict[str, Any]:
    """Embed every shard of a pool that is not embedded yet, and return the manifest.

    Raises: UsageError for an unknown model, missing weights, or a pool without images or captions.
    """
    if options.batch_size < 0 or options.decoders < 0 or options.max_pixels < 1:
        raise UsageError("batch_size and decoders cannot be negative, and max_pixels is at least 1.")
    if options.decode not in DECODES:
        raise unknown("decode", options.decode, DECODES)
    held = tar.survey_pool(pool)
    found = {shard.stem: shard for shard in held.shards}
    if options.captions:
        side_data.caption_places(options.captions)
    wanted = _wanted(options)
    check_members(list(found.values()), wanted, captions=bool(options.captions))
    before = {} if job.overwrite else manifest.recorded(out, "embed")
    recorded = before.get("options", {})
    kinds = side_data.column_kinds(list(found.values()), options.columns, before.get("options"))
    extras = side_data.Extras(kinds, options.captions, wanted)
    source = weights.find(options.model, options.pretrained)
    node: encoder.Node = engine.ask(partial(encoder.look, options.precision, source), job)
    device = node.device
    if options.decode == "gpu" and (reason := engine.ask(partial(jpegs.reason_against, device), job)):
        raise UsageError(f"--decode gpu needs a GPU that decodes JPEGs, but {reason}.", "take --decode fast")
    precision, reason = node.precision, node.reason
    if options.precision == "auto" and "precision" in recorded:
        precision, reason = str(recorded["precision"]), "as this directory was made"
    by_device = GPU_BATCH if device == "cuda" else CPU_BATCH
    batch_size = options.batch_size or int(recorded.get("batch_size", by_device))
    made = {
        "model": _portable_name(options.model),
        "pretrained": _portable_name(options.pretrained),
        "weights": source.weights,
        "precision": precision,
        "batch_size": batch_size,
        "max_pixels": options.max_pixels,
        **({"columns": dict(extras.columns)} if extras.columns else {}),
        **({"faithful": True} if options.faithful else {}),
        **({"decode": options.decode} if options.decode != "full" else {}),
        **({"caption": ",".join(wanted.fields)} if wanted.fields else {}),
        **({"caption_pick": wanted.pick, "seed": wanted.seed} if wanted.pick != "first" else {}),
    }
    listing = manifest.digest([[shard.stem, shard.size] for shard in found.values()])
    inputs = {"pool": {"path": pool, "digest": listing}}
    if options.captions:
        known = before.get("inputs", {}).get("captions", {}).get("digest")
        inputs["captions"] = {"path": options.captions, "digest": side_data.captions_digest(options.captions, known)}
    contents = reading(found, job, verify=options.verify)
    parts = tar.parts_of(held.shards, contents, verify=options.verify)
    output = manifest.open_output(out, "embed", made, inputs, overwrite=job.overwrite, parts=parts)
    output.tell(quiet=job.quiet)
    if output.complete:
        return output.manifest
    workers, share = _workers(job, device, source, len(found))
    if not job.quiet:
        apart = options.decoders or device == "cuda"
        number = options.decoders or max(1, node.cores // workers)
        told = f"{workers} worker(s), {number} decoding {'processes' if apart else 'threads'} each"
        told = f"{workers} worker(s), decoding by node" if job.engine == "ray" else told
        sys.stderr.write(f"embed: {options.model} in {precision} on {device} ({reason}), {told}\n")
    task = EmbedShard(
        source,
        precision,
        device,
        batch_size,
        options.max_pixels,
        0,
        options.decoders,
        output.directory,
        found,
        extras,
        options.faithful,
        options.decode,
    )
    try:
        todo = output.pending(job.share(list(found)))
        if not job.quiet:
            makers.say_other_maker(output, todo, list(found), node.described)
        places = {out, *(paths.parent(shard.location) for shard in found.values())}
        outcome = engine.run_stage("embed", task, todo, job, workers=workers, gpu=share, places=sorted(places))
    finally:
        task.close()
    output.log(model=weights.whole_name(options.model), pretrained=weights.whole_name(options.pretrained))
    return _finish(output, list(found), outcome, node.described, workers, held.passed, quiet=job.quiet)


def _workers(job: Job, device: str, source: weights.Source, shards: int) -> tuple[int, float]:
    """Choose the number of workers, and the share of a GPU that one takes.

    On a GPU there are two, unless the model is large: while one finishes a shard (a half-empty last batch, the texts,
    writing the file), the other's batches keep the card busy. The rows of a shard do not depend on it.
    """
    cards = engine.gpus(job) or 1
    each = 2 if source.size <= MOST_SHARED_BYTES else 1
    workers = max(1, min(job.workers or (each * cards if device == "cuda" else 1), shards))
    return workers, 1 / -(-workers // cards)


def _wanted(options: EmbedOptions) -> Wanted:
    """Read which captions are asked for. Raises: UsageError."""
    if options.caption_pick not in PICKS:
        raise unknown("caption_pick", options.caption_pick, PICKS)
    fields = tuple(field.strip() for field in options.caption.split(",") if field.strip())
    if options.caption_pick != "first" and not fields:
        raise UsageError("--caption-pick random needs the field that lists captions.", "name it: --caption FIELD")
    return Wanted(fields, options.caption_pick, options.seed)


def _portable_name(given: str) -> str:
    """Name a model or its weights without their location; their digest tells them apart."""
    place = weights.whole_name(given).removeprefix("local-dir:")
    return os.path.basename(place) if os.path.exists(place) else given


def _finish(
    output: manifest.Output,
    stems: list[str],
    outcome: engine.Outcome,
    device: str,
    workers: int,
    passed: faults.Faults,
    *,
    quiet: bool,
) -> dict[str, Any]:
    """Account for every row and write the manifest, unless other slices still have shards to do."""
    facts, counts = reader.account(output, stems)
    dim = next((fact["dim"] for fact in facts.values()), 0)
    spent = shares(done["spent"] for done in outcome.done.values())
    output.log(
        stage="embed", rows=outcome.rows, seconds=round(outcome.seconds, 3), workers=workers, dim=dim, spent=spent
    )
    if spent and not quiet:
        sys.stderr.write(f"embed: {in_words(spent)}\n")
    failed = output.failures(stems, outcome.failed)
    if unfinished := output.unfinished(stems, failed):
        return unfinished
    bad = reader.all_faults(facts, passed)
    faults.write("embed", bad, quiet=quiet)
    downloads: Counter[str] = Counter()
    for fact in facts.values():
        downloads.update(fact.get("downloads", {}))
    return output.finish(
        shards={
            stem: {name: fact[name] for name in ("rows", "size", "digest", "notes") if fact.get(name) not in (None, [])}
            for stem, fact in facts.items()
        },
        counts=counts,
        **({"downloads": dict(sorted(downloads.items()))} if downloads else {}),
        **({"faults": bad} if bad else {}),
        **({"failed": failed} if failed else {}),
        **makers.account(facts, device),
        **jpegs.account(facts, quiet=quiet),
    )


@dataclass
class EmbedShard:
    """The task: one shard to one sidecar. threads, decoders 0: by the machine that it runs on."""

    source: weights.Source
    precision: str
    device: str
    batch_size: int
    max_pixels: int
    threads: int
    decoders: int
    out: str
    found: dict[str, tar.Shard]
    extras: side_data.Extras = side_data.NO_EXTRAS
    faithful: bool = False
    decode: str = "full"

    def setup(self) -> None:
        """Load the model and start what decodes."""
        memory.keep()
        self.num_threads = self.threads or engine.cores_each()
        self.num_decoders = self.decoders or (self.num_threads if self.device == "cuda" else 0)
        self.encoder = encoder.Encoder(self.source, self.precision, self.device)
        # Two threads keep a GPU fed: one waits for its batch while the other queues the next.
        self.num_runners = 2 if self.device == "cuda" else self.num_threads
        self.runners = ThreadPoolExecutor(self.num_runners)
        reading = partial(
            reader.Reader,
            self.source,
            self.encoder.preprocess,
            self.max_pixels,
            self.extras,
            faithful=self.faithful,
        )
        size = encoder.pair(self.encoder.preprocess["size"])
        self.jpegs = jpegs.Jpegs(self.device, self.encoder.preprocess, size) if self.decode == "gpu" else None
        self.exact = reading() if self.jpegs else None
        reading = partial(reading, decode=self.decode)
        self.processes = Decoders(self.num_decoders, reading, size, self.batch_size) if self.num_decoders else None
        self.reader = None if self.num_decoders else reading()

    def close(self) -> None:
        """Stop the helpers of a task that ran in this process."""
        if (runners := getattr(self, "runners", None)) is not None:
            runners.shutdown(cancel_futures=True)
        if (processes := getattr(self, "processes", None)) is not None:
            processes.close()

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    def __call__(self, stem: str) -> dict[str, Any]:
        """Embed one shard. Returns its rows and how many of them are bad."""
        shard = self.found[stem]
        self.spent, self.decoding = Spent(), Spent()
        with tar.local_tar(shard.location) as path, encoder.single_threaded():
            with self.spent.on("read"), open(path, "rb") as file:
                index = tar.read_index(file)
            with ThreadPoolExecutor(1) as reading:
                exact = reading.submit(self._embed_exactly, path, index.samples[: jpegs.COMPARED])
                content = reading.submit(tar.content_digest, shard, path)
                facts, image, tokens = self._embed_images(path, index.samples)
                text = self._embed_texts(tokens)
        tar.refuse_changed(shard)
        beside = self._read_beside(shard, facts, index)
        schema = embedding_schema(self.encoder.dim, self.extras.fields)
        with self.spent.on("write"):
            columns = _columns(facts, image, text, members.column(index, shard.size), schema)
        statuses = Counter(row["status"] for row in facts)
        bad = {"reasons": reader.reasons(facts), "faults": reader.row_faults(stem, facts)}
        beside |= {name: told for name, told in bad.items() if told}
        beside |= jpegs.compare(facts, image, *compared) if (compared := exact.result()) else {}
        beside["digest"] = content.result()
        beside["made_by"] = makers.made_by(encoder.describe_device(self.device))
        meta = {"statuses": dict(statuses), "notes": index.notes, "size": shard.size, "dim": self.encoder.dim, **beside}
        batch = pa.RecordBatch.from_arrays(columns, schema=schema)
        with self.spent.on("write"):
            sidecar.write_table(paths.join(self.out, f"{stem}.arrow"), schema, [batch], {"rows": len(facts), **meta})
        spent = {"threads": self.spent.account(self.num_runners)}
        if self.processes is not None:
            spent["decoders"] = self.decoding.account(self.num_decoders)
        return {"rows": len(facts), "bad": len(facts) - statuses["ok"], "spent": spent}

    def _read_beside(self, shard: tar.Shard, facts: list[dict[str, Any]], index: tar.Index) -> dict[str, Any]:
        """Account for img2dataset's downloads, and fill columns missing in the samples' JSON from its side table."""
        side = side_data.read_side_table(shard.location, list(self.extras.columns))
        if side is None:
            return {}
        for row in facts:
            row |= {
                name: value
                for name, value in self.extras.values(side.rows.get(row["key"])).items()
                if row[name] is None
            }
        if side.ended.get("success", 0) != len(facts):
            index.notes.append(
                f"{len(facts)} samples, but its side table says {side.ended.get('success', 0)} downloads"
            )
        return {"downloads": side.ended}

    def _embed_images(
        self, path: str, samples: list[tar.Sample]
    ) -> tuple[list[dict[str, Any]], np.ndarray, np.ndarray]:
        """Read all rows and embed those that are ok: (facts of all, f32 [m, d], tokens i32 [m, context])."""
        batches = [samples[start : start + self.batch_size] for start in range(0, len(samples), self.batch_size)]
        depth = 2 * self.num_threads
        if self.processes is None:
            assert self.reader is not None
            read = partial(self.reader, path)
            done = map_ahead(self.runners, lambda part: self._encode(read(part)), batches, depth)
        else:
            done = map_ahead(
                self.runners, self._encode, self.processes(path, batches), 3 if self.device == "cuda" else depth
            )
        parts = []
        for part in done:
            parts.append(part)
            engine.advance(len(part[0]))
        facts = [row for part, _ in parts for row in part]
        if not parts:
            return facts, np.empty((0, self.encoder.dim), np.float32), np.empty((0, 1), np.int32)
        vectors = np.concatenate([vectors for _, (vectors, _) in parts])
        return facts, vectors, np.concatenate([tokens for _, (_, tokens) in parts])

    def _embed_exactly(self, path: str, samples: list[tar.Sample]) -> tuple[list[dict[str, Any]], np.ndarray] | None:
        """Embed a shard's first samples with the processor decoding: their facts, and f32 [m, d] of the ok ones."""
        if self.exact is None:
            return None
        rows = self.exact(path, samples)
        return rows.facts, self.encoder.images(rows.pixels) if len(rows.pixels) else np.empty((0, self.encoder.dim))

    def _encode(self, batch: reader.Rows) -> tuple[list[dict[str, Any]], tuple[np.ndarray, np.ndarray]]:
        (self.spent if self.processes is None else self.decoding).add(batch.spent)
        vectors = np.empty((0, self.encoder.dim), np.float32)
        pixels: Any = batch.pixels
        if batch.coded and self.jpegs is not None and self.exact is not None:
            with self.spent.on("decode"):
                batch, pixels = self.jpegs.fill(batch, self.encoder.put, self.exact)
        elif len(pixels):
            with self.spent.on("copy"):
                pixels = self.encoder.put(pixels)
        if len(pixels):
            with self.spent.on("compute"):
                vectors = self.encoder.images(pixels)
        return batch.facts, (vectors, batch.tokens)

    def _embed_texts(self, tokens_nl: np.ndarray) -> np.ndarray:
        """Embed captions in batches of like length: f32 [m, d]."""
        lengths = self.encoder.lengths(tokens_nl)
        order = np.argsort(-lengths, kind="stable")  # longest first, so that the last batches are short work
        size = TEXTS_PER_IMAGE * self.batch_size
        batches = [order[start : start + size] for start in range(0, len(order), size)]
        vectors = np.empty((len(order), self.encoder.dim), np.float32)

        def encode(at: np.ndarray) -> np.ndarray:
            with self.spent.on("compute"):
                return self.encoder.texts(tokens_nl[at])

        embedded = map_ahead(self.runners, encode, batches, 2 * self.num_threads)
        for at, part in zip(batches, embedded, strict=True):
            vectors[at] = part
        return vectors


def _columns(
    facts: list[dict[str, Any]], image_md: np.ndarray, text_md: np.ndarray, places: pa.Array, schema: pa.Schema
) -> list[pa.Array]:
    """Build a sidecar's columns from the rows' facts, the vectors f32 [m, d] of those that are ok, and MEMBERS.

    A row whose vectors are not finite becomes `bad_embedding`. The score is the cosine of the vectors as stored.
    """
    embedded = np.flatnonzero([row["status"] == "ok" for row in facts])
    sound = np.isfinite(image_md).all(axis=1) & np.isfinite(text_md).all(axis=1)
    for at in embedded[~sound]:
        facts[at]["status"] = "bad_embedding"
    at, size = embedded[sound], (len(facts), image_md.shape[1])
    image_nd, text_nd = np.zeros(size, np.float16), np.zeros(size, np.float16)
    image_nd[at], text_nd[at] = image_md[sound], text_md[sound]
    valid, score = np.zeros(len(facts), bool), np.zeros(len(facts), np.float32)
    valid[at], score[at] = True, exact.cosines(image_nd[at], text_nd[at])
    made = ("status", "image_embedding", "text_embedding", "clip_score", "members")
    columns = {
        field.name: pa.array([row[field.name] for row in facts], field.type)
        for field in schema
        if field.name not in made
    }
    columns["status"] = sidecar.labels([row["status"] for row in facts], list(STATUSES))
    columns["image_embedding"] = sidecar.vector_column(image_nd, valid)
    columns["text_embedding"] = sidecar.vector_column(text_nd, valid)
    columns["clip_score"] = pa.array(score, pa.float32(), mask=~valid)
    columns["members"] = places
    return [columns[name] for name in schema.names]
