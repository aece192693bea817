"""Cluster a pool: `curate cluster EMB CLU`.

In: `EMB/{stem}.arrow`. Out: `CLU/centroids.npy` f32 [k, d], `CLU/{stem}.arrow` (cluster and cosine to its centroid),
`CLU/edges.arrow` (each cluster's near-duplicate forest above a floor), `CLU/fit.json` (how the centroids came about).

Three passes: fit on a sample of rows; assign every row, shard by shard, and scatter the vectors to buckets of clusters
under `CLU/.buckets`; find the near-duplicates in each cluster, bucket by bucket. The scatter takes the image vectors'
size on disk until the end. Memory: the sample (1 GiB by default) on the driver, then one shard or one bucket for each
worker.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from curate.cluster import edges
from curate.cluster.edges import BUCKETS, EDGES
from curate.cluster.options import ClusterOptions
from curate.engine import Job, run_stage
from curate.errors import ContractError, ShardError, UsageError
from curate.storage import paths, sidecar
from curate.storage.manifest import Artefact, Output, load_json, open_input, open_output, reconcile, save_json, versions
from curate.storage.schema import CLUSTER_SCHEMA
from curate.vectors import kmeans
from curate.vectors.exact import widen

MAX_BUCKETS = 1024
NULL_ROWS = 1 << 16
RECALL_SAMPLE = 1 << 16
CENTROIDS, FIT = "centroids.npy", "fit.json"


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
    if not paths.exists(output.path(FIT)):
        _fit(source, rows_ok, options, output, job)
    scattered = sum(rows_ok.values()) * options.neighbours
    buckets = min(MAX_BUCKETS, -(-scattered * dim * 2 // edges.BUCKET_BYTES)) or 1
    scatter = output.path(BUCKETS)
    has_edges = paths.exists(output.path(EDGES))
    missing = set(output.missing(source.stems))
    if not has_edges:
        missing |= {stem for stem in source.stems if not paths.exists(paths.join(scatter, f"{stem}.arrow"))}
    assigned = run_stage(
        "assign",
        Assign(emb, out, buckets, options.neighbours),
        [stem for stem in job.share(source.stems) if stem in missing],
        job,
    )
    _refuse_failures(assigned.failed)
    if job.part is not None and output.missing(source.stems):
        return {**output.plan, "shards": {}, "counts": {"assigned": assigned.rows}}
    seconds = assigned.seconds
    if not has_edges:
        todo = [b for b in job.share(range(buckets)) if not paths.exists(paths.join(scatter, f"edges-{b}.arrow"))]
        found = run_stage("relate", edges.FindEdges(emb, out, options.floor), todo, job)
        _refuse_failures(found.failed)
        if not all(paths.exists(paths.join(scatter, f"edges-{b}.arrow")) for b in range(buckets)):
            return {**output.plan, "shards": {}, "counts": {"assigned": assigned.rows, "related": found.rows}}
        edges.join_edges(output, buckets, options.neighbours)
        seconds += found.seconds
    paths.remove(scatter)
    manifest = _finish(source, output, rows_ok, _recall(source, rows_ok, options, output))
    output.log(stage="cluster", rows=sum(rows_ok.values()), seconds=round(seconds, 3), workers=job.workers)
    return manifest


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
        digest = hashlib.blake2b(given.tobytes(), digest_size=16).hexdigest()
        inputs["centroids"] = {"path": options.centroids, "digest": digest}
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
        places[:, ~ok] = -1
        scattered = paths.join(self.out, BUCKETS, f"{stem}.arrow")
        edges.scatter(scattered, self.source, stem, self.first_row[stem], places, self.buckets)
        table = pa.record_batch([pa.array(places[0]), pa.array(similarity, mask=~ok)], schema=CLUSTER_SCHEMA)
        facts = {"rows": len(ok), "ok": int(ok.sum())}
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


def _finish(source: Artefact, output: Output, rows_ok: dict[str, int], recall: dict[str, Any]) -> dict[str, Any]:
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
    return output.finish(
        shards=shards,
        counts=counts,
        fit=load_json(output.path(FIT)),
        clusters={"k": k, "used": int((sizes > 0).sum()), "largest": int(sizes.max())},
        edges=sidecar.num_rows(output.path(EDGES)),
        recall=recall,
        versions=versions("faiss-gpu", "faiss-cpu", "numpy", "scipy", "pyarrow"),
    )
