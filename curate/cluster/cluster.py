"""Cluster a pool: `curate cluster EMB CLU`.

In: `EMB/{stem}.arrow`. Out: `CLU/centroids.npy` f32 [k, d], `CLU/{stem}.arrow` (cluster and cosine to its centroid),
`CLU/edges.arrow` (each cluster's near-duplicate forest above a floor), `CLU/fit.json` (how the centroids came about).

Three passes: fit on a sample of rows; assign every row, shard by shard, and scatter the vectors to buckets of clusters
under `CLU/.buckets`; find the near-duplicates in each cluster, bucket by bucket. The scatter takes the image vectors'
size on disk until the end. Memory: the sample (1 GiB by default) on the driver, then one shard or one bucket for each
worker.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from curate.cluster import edges
from curate.cluster.edges import BUCKETS, EDGES
from curate.cluster.options import ClusterOptions
from curate.engine import Job, Outcome, advance, run_stage
from curate.errors import ContractError, ShardError, UsageError
from curate.storage import claim, paths, sidecar
from curate.storage.manifest import (
    MANIFEST,
    PLAN,
    Artefact,
    Output,
    load_json,
    open_input,
    open_output,
    reconcile,
    save_json,
    versions,
)
from curate.storage.schema import CLUSTER_SCHEMA
from curate.vectors import kmeans
from curate.vectors.exact import widen

MAX_BUCKETS = 1024
NULL_ROWS = 1 << 16
RECALL_SAMPLE = 1 << 16
CENTROIDS, FIT = "centroids.npy", "fit.json"
FIT_CLAIM, FINISH_CLAIM = ".fit.claim", ".finish.claim"


def cluster(emb: str, out: str, options: ClusterOptions, job: Job) -> dict[str, Any]:
    """Cluster the good rows of `emb` and find the near-duplicates in each cluster. Returns the manifest.

    Raises: UsageError when k does not suit the rows, ShardError when a sidecar cannot be read.
    """
    source = open_input(emb, "embed", "import")
    rows_ok = {stem: int(_is_ok(source, stem).sum()) for stem in source.stems}
    dim = _dimensions(source)
    options, inputs = _resolve(options, source, sum(rows_ok.values()), dim)
    output = open_output(out, "cluster", _recorded(options), inputs, overwrite=job.overwrite)
    if output.complete:
        return output.manifest
    _once(
        job,
        output.path(FIT_CLAIM),
        lambda: paths.exists(output.path(FIT)),
        lambda: _fit(source, rows_ok, options, output, job),
    )
    scattered = sum(rows_ok.values()) * options.neighbours
    buckets = min(MAX_BUCKETS, -(-scattered * dim * 2 // edges.BUCKET_BYTES)) or 1
    assigned = _assign(source, output, options.neighbours, buckets, job)
    counts = {"assigned": assigned.rows}
    if left := output.missing(source.stems):
        return {**output.plan, "shards": {}, "counts": counts, "unfinished": left}
    _refuse_unlike(source, output)
    found = _find_edges(emb, output, options.floor, buckets, job)
    counts["related"] = found.rows
    if not paths.exists(output.path(EDGES)) and (buckets_left := edges.missing(output, buckets)):
        return {**output.plan, "shards": {}, "counts": counts, "unfinished": [f"bucket {b}" for b in buckets_left]}

    def finish() -> None:
        if not paths.exists(output.path(EDGES)):
            edges.join_edges(output, buckets, options.neighbours)
        paths.remove(output.path(BUCKETS))
        _finish(source, output, rows_ok, _recall(source, rows_ok, options, output))

    _once(job, output.path(FINISH_CLAIM), lambda: paths.exists(output.path(MANIFEST)), finish)
    paths.remove(output.path(PLAN))  # this slice may have written it after another had finished
    seconds = round(assigned.seconds + found.seconds, 3)
    output.log(stage="cluster", rows=sum(rows_ok.values()), seconds=seconds, workers=job.workers)
    manifest: dict[str, Any] = load_json(output.path(MANIFEST))
    return manifest


def _once(job: Job, claimed: str, done: Callable[[], bool], work: Callable[[], None]) -> None:
    """Do what is not done yet; of several slices one does it, and the others wait."""
    if job.part is not None:
        claim.once(claimed, done, work)
    elif not done():
        work()


def _assign(source: Artefact, output: Output, neighbours: int, buckets: int, job: Job) -> Outcome:
    """Assign and scatter what this slice has to, of the shards that lack their sidecar or their scattered vectors."""
    missing = set(output.missing(source.stems))
    scattered = set(paths.listdir(output.path(BUCKETS)))
    # Looked at after the scatter: it is removed only once the edges are there.
    if not paths.exists(output.path(EDGES)):
        missing |= {stem for stem in source.stems if f"{stem}.arrow" not in scattered}
    todo = [stem for stem in job.share(source.stems) if stem in missing]
    task = Assign(source.directory, output.directory, buckets, neighbours)
    assigned = run_stage("assign", task, todo, job, places=(source.directory, output.directory))
    _refuse_failures(assigned.failed)
    return assigned


def _find_edges(emb: str, output: Output, floor: float, buckets: int, job: Job) -> Outcome:
    """Find the edges of this slice's buckets that are not there yet."""
    missing = set(edges.missing(output, buckets))
    if paths.exists(output.path(EDGES)):  # looked at after the buckets: they are removed only once the edges are there
        missing.clear()
    todo = [bucket for bucket in job.share(range(buckets)) if bucket in missing]
    found = run_stage("relate", edges.FindEdges(emb, output.directory, floor), todo, job, places=(output.directory,))
    if not paths.exists(output.path(EDGES)):  # else another slice has finished, and taken away what this one read
        _refuse_failures(found.failed)
    return found


def _refuse_unlike(source: Artefact, output: Output) -> None:
    """Raise ContractError when a shard was assigned to other centroids than those that stand there."""
    centroids = _digest(sidecar.load_npy(output.path(CENTROIDS)))
    for stem in source.stems:
        used = sidecar.facts(output.path(f"{stem}.arrow")).get("centroids")
        if used != centroids:
            raise ContractError(
                f"{output.path(stem)}.arrow was assigned to other centroids ({used}) than {CENTROIDS} ({centroids}).",
                "--overwrite makes the directory anew",
            )


def _digest(centroids_kd: np.ndarray) -> str:
    return hashlib.blake2b(np.ascontiguousarray(centroids_kd).tobytes(), digest_size=16).hexdigest()


def _is_ok(source: Artefact, stem: str) -> np.ndarray:
    """Say which rows of a stem are good, bool."""
    import pyarrow.compute as pc

    good = pc.equal(source.table(stem, ["status"])["status"].cast(pa.string()), "ok")
    return np.asarray(good.fill_null(False).to_numpy())


def _dimensions(source: Artefact) -> int:
    """Read the dimensions of the image embeddings from the first sidecar."""
    if not source.stems:
        raise UsageError(f"{source.directory} has no shards to cluster.")
    kind = sidecar.reader(source.path(f"{source.stems[0]}.arrow")).schema.field("image_embedding").type
    return int(kind.list_size)


def _resolve(options: ClusterOptions, source: Artefact, rows: int, dim: int) -> tuple[ClusterOptions, dict[str, Any]]:
    """Fill in what was left to us and name the inputs. Raises: UsageError for a k, sample or floor that cannot be."""
    inputs: dict[str, Any] = {"embeddings": source}
    if EDGES.removesuffix(".arrow") in source.stems:
        raise UsageError(f"{source.directory} has a shard called {EDGES}, a name that clusters need.", "rename its tar")
    if not rows:
        raise UsageError(f"{source.directory} has no good row to cluster.", f"curate show {source.directory}")
    if options.neighbours not in (1, 2):
        raise UsageError(f"neighbours={options.neighbours} is neither 1 nor 2 clusters.", "--neighbours 2")
    if not -1 < options.floor < 1:
        raise UsageError(f"floor={options.floor} is no cosine; it must lie between -1 and 1.", "--floor 0.80")
    if options.centroids:
        given = _load_centroids(options.centroids, dim)
        inputs["centroids"] = {"path": options.centroids, "digest": _digest(given)}
        neighbours = min(len(given), options.neighbours)
        return replace(options, k=len(given), sample=0, iters=0, neighbours=neighbours), inputs
    k = options.k or kmeans.default_k(rows)
    if k < 1 or k > rows:
        hint = f"--k {kmeans.default_k(rows)}"
        raise UsageError(f"k={k:,} clusters were asked for, but there are {rows:,} good rows.", hint)
    sample = min(options.sample or kmeans.default_sample(rows, k, dim), rows)
    if sample < k:
        raise UsageError(f"a sample of {sample:,} rows cannot fit k={k:,} clusters.", f"--sample {min(rows, 256 * k)}")
    if options.iters < 1:
        raise UsageError(f"iters={options.iters} is not at least 1.", "--iters 20")
    return replace(options, k=k, sample=sample, neighbours=min(k, options.neighbours)), inputs


def _recorded(options: ClusterOptions) -> dict[str, Any]:
    """Name what the directory is made with; given centroids are an input, known by their content."""
    return {name: value for name, value in asdict(options).items() if name != "centroids"}


def _load_centroids(location: str, dim: int) -> np.ndarray:
    """Read centroids f32 [k, d]. Raises: UsageError when the file is no such array."""
    try:
        found = sidecar.load_npy(location)
    except (OSError, ValueError) as error:
        raise UsageError(f"{location} is no readable .npy array: {error}") from None
    if found.ndim != 2 or found.shape[1] != dim or found.dtype.kind != "f" or not np.isfinite(found).all():
        raise UsageError(f"{location} holds {found.dtype} {list(found.shape)}; expected finite numbers [k, {dim}].")
    return np.asarray(found, np.float32)


def _fit(source: Artefact, rows_ok: dict[str, int], options: ClusterOptions, output: Output, job: Job) -> None:
    """Write the centroids, and how they came about with the scores of shuffled pairs."""
    facts: dict[str, Any] = {}
    if options.centroids:
        centroids = kmeans.unit_rows(_load_centroids(options.centroids, _dimensions(source)))
    else:
        images = np.concatenate(list(_sample(source, rows_ok, options.sample, options.seed)))
        backend = kmeans.choose_backend(images.shape[1], options.k, gpu=job.gpus > 0)
        found = kmeans.fit(widen(images), options.k, options.iters, options.seed, backend=backend)
        centroids = found.centroids
        facts = {"fitted_rows": len(images), "backend": backend, "empty": found.empty}
        facts["mean_similarity"] = found.mean_similarity
    facts["shuffled_clip_score"] = _shuffled(source, rows_ok, options.seed)
    if paths.exists(output.path(FIT)):  # another slice took this one for dead, and has fitted meanwhile
        return
    sidecar.save_npy(output.path(CENTROIDS), centroids)
    save_json(output.path(FIT), facts)


def _sample(
    source: Artefact, rows_ok: dict[str, int], size: int, seed: int, column: str = "image_embedding"
) -> Iterator[np.ndarray]:
    """Yield `size` good rows drawn without replacement, f16 [m, d] per shard, in row order."""
    total = sum(rows_ok.values())
    drawn = np.sort(np.random.default_rng(seed).choice(total, min(size, total), replace=False, shuffle=False))
    first = 0
    for stem, count in rows_ok.items():
        wanted = drawn[np.searchsorted(drawn, first) : np.searchsorted(drawn, first + count)] - first
        first += count
        if len(wanted):
            rows = np.flatnonzero(_is_ok(source, stem))[wanted]
            yield sidecar.take_vectors(source.batches(stem), column, rows)


def _shuffled(source: Artefact, rows_ok: dict[str, int], seed: int) -> list[float] | None:
    """Score images against the captions of others: the 0 … 100 % quantiles; None without captions' vectors."""
    image, text = (
        np.concatenate(list(_sample(source, rows_ok, NULL_ROWS, seed, column)))
        for column in ("image_embedding", "text_embedding")
    )
    paired = np.abs(text).max(axis=1) > 0
    if paired.sum() < 2:
        return None
    scores = kmeans.shuffled_scores(image[paired], text[paired], seed)
    return [float(value) for value in np.quantile(scores, np.linspace(0, 1, 101))]


@dataclass
class Assign:
    """Assign a shard's rows to centroids, write its sidecar, and scatter its vectors by bucket of clusters."""

    emb: str
    out: str
    buckets: int
    neighbours: int

    def setup(self) -> None:
        """Load the centroids."""
        self.source = open_input(self.emb)
        self.centroids = sidecar.load_npy(paths.join(self.out, CENTROIDS))
        self.digest = _digest(self.centroids)
        rows = list(self.source.rows.values())
        self.first_row = dict(zip(self.source.stems, np.cumsum([0, *rows]).tolist(), strict=False))

    def __call__(self, stem: str) -> dict[str, Any]:
        """Work one shard. Returns rows and good rows."""
        ok = _is_ok(self.source, stem)
        places = np.full((self.neighbours, len(ok)), -1, np.int32)
        similarity = np.zeros(len(ok), np.float32)
        start = 0
        for batch in self.source.batches(stem):
            rows = slice(start, start + batch.num_rows)
            start = rows.stop
            vectors = sidecar.vectors(batch.column("image_embedding"))
            if vectors.shape[1] != self.centroids.shape[1]:
                raise ContractError(
                    f"{stem}.arrow has {vectors.shape[1]} dimensions, the centroids {self.centroids.shape[1]}"
                )
            find = kmeans.assign if self.neighbours == 1 else kmeans.nearest_two
            places[:, rows], similarity[rows] = find(vectors, self.centroids)
            advance(batch.num_rows)
        places[:, ~ok] = -1
        scattered = paths.join(self.out, BUCKETS, f"{stem}.arrow")
        edges.scatter(scattered, self.source, stem, self.first_row[stem], places, self.buckets)
        table = pa.record_batch([pa.array(places[0]), pa.array(similarity, mask=~ok)], schema=CLUSTER_SCHEMA)
        facts = {"rows": len(ok), "ok": int(ok.sum()), "centroids": self.digest}
        sidecar.write_table(paths.join(self.out, f"{stem}.arrow"), CLUSTER_SCHEMA, [table], facts)
        return facts


def _refuse_failures(failed: dict[Any, str]) -> None:
    if failed:
        name, why = next(iter(failed.items()))
        raise ShardError(f"{len(failed)} part(s) failed, first {name}: {why}", "mend it and run again; it resumes")


def _recall(source: Artefact, rows_ok: dict[str, int], options: ClusterOptions, output: Output) -> dict[str, Any]:
    """Estimate the share of near pairs that were compared."""
    images = np.concatenate(list(_sample(source, rows_ok, RECALL_SAMPLE, options.seed)))
    shuffled = images[np.random.default_rng([options.seed, 0x4EC]).permutation(len(images))]
    return edges.recall(shuffled, sidecar.load_npy(output.path(CENTROIDS)), options.neighbours, options.floor)


def _finish(source: Artefact, output: Output, rows_ok: dict[str, int], recall: dict[str, Any]) -> None:
    """Check the counts and write the manifest."""
    shards = {}
    k = int(output.plan["options"]["k"])
    sizes = np.zeros(k, np.int64)
    for stem, rows in source.rows.items():
        clusters = sidecar.table(output.path(f"{stem}.arrow"), ["cluster"])["cluster"].to_numpy()
        sizes += np.bincount(clusters[clusters >= 0], minlength=k)
        reconcile(stem, rows, {"clustered": int((clusters >= 0).sum()), "bad": rows - rows_ok[stem]})
        shards[stem] = {"rows": rows, "ok": rows_ok[stem]}
    counts = {"clustered": sum(rows_ok.values()), "bad": sum(source.rows.values()) - sum(rows_ok.values())}
    output.finish(
        shards=shards,
        counts=counts,
        fit=load_json(output.path(FIT)),
        clusters={"k": k, "used": int((sizes > 0).sum()), "largest": int(sizes.max())},
        edges=sidecar.num_rows(output.path(EDGES)),
        recall=recall,
        versions=versions("faiss-gpu", "faiss-cpu", "numpy", "scipy", "pyarrow"),
    )
