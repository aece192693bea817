"""Cluster a pool: `curate cluster EMB CLU`.

In: `EMB/{stem}.arrow`. Out: `CLU/centroids.npy` f32 [k, d], `CLU/{stem}.arrow` (cluster and cosine to its centroid),
`CLU/edges.arrow` (each cluster's near-duplicate forest above a floor), `CLU/fit.json` (how the centroids were fitted).

Three passes: fit on a sample of rows; assign every row, shard by shard, and scatter the vectors to buckets of clusters
under `CLU/.buckets`; find the near-duplicates in each cluster, bucket by bucket. Until the end the scattered vectors
take as much disk space as the image vectors. Memory: the sample (1 GiB by default) on the driver, then one shard or one
bucket for each worker.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from curate.cluster import edges, giants, recall, renewed, scatter
from curate.cluster.assign import Assign, digest, is_ok
from curate.cluster.options import ClusterOptions
from curate.cluster.sampled import sample_rows, shuffled_quantiles
from curate.cluster.scatter import BUCKETS
from curate.engine import Job, Outcome, Task, gpus, run_stage
from curate.errors import ContractError, ShardError, UsageError
from curate.storage import claim, paths, ranges, sidecar
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
from curate.storage.renewal import settle, shared
from curate.storage.schema import CENTROIDS, EDGES
from curate.vectors import kmeans
from curate.vectors.near_pairs import is_worth_rounding
from curate.vectors.products import fastest_product

MAX_BUCKETS = 1024
SMALL_SAMPLE = 1 << 16  # rows by which shuffled scores and the recall are estimated
GPU_SHARE = 0.25  # of a GPU for each worker, which spends most of its time reading and scattering
FIT = "fit.json"
LEAST_LENGTH = 1e-15  # of a given centroid, and the inverse of the greatest: its square fits f32
FIT_CLAIM, FINISH_CLAIM = ".fit.claim", ".finish.claim"


@shared
def cluster(emb: str, out: str, options: ClusterOptions, job: Job) -> dict[str, Any]:
    """Cluster the good rows of `emb` and find the near-duplicates in each cluster. Returns the manifest.

    Raises: UsageError if k does not suit the rows, ShardError if a sidecar cannot be read.
    """
    source = open_input(emb, "embed", "import")
    rows_ok = {stem: int(is_ok(table).sum()) for stem, table in source.sidecars.tables(["status"])}
    dim = _dimensions(source)
    settle(out)
    before = {} if job.overwrite else renewed.standing(out)
    free = renewed.free(options, before, out, source)
    options, inputs = _resolve(options, source, sum(rows_ok.values()), dim, before)
    anew = renewed.why_anew(options, before, source, _recorded(options))
    output = open_output(
        out,
        "cluster",
        _recorded(options),
        inputs,
        overwrite=job.overwrite,
        parts=renewed.parts(source),
        anew=anew,
        free=free,
    )
    if output.complete:
        return output.manifest
    output.tell(quiet=job.quiet)
    renewed.drop_older(output, source.stems, quiet=job.quiet)
    kept = before if output.basis and not anew and not options.centroids else {}
    sampled: list[np.ndarray] = []  # images, if this slice does the fit

    def fit() -> None:
        sampled[:] = [_fit(source, rows_ok, options, output, job, kept)]

    _once(job, output.path(FIT_CLAIM), lambda: paths.exists(output.path(FIT)), fit)
    renewed.tell_other_fit(load_json(output.path(FIT)), quiet=job.quiet)
    scattered = sum(rows_ok.values()) * options.neighbours
    buckets = min(MAX_BUCKETS, -(-scattered * dim * 2 // edges.BUCKET_BYTES)) or 1
    assigned = _assign(source, output, options.neighbours, buckets, job)
    if output.overtaken():
        return output.manifest
    made = {**output.plan, "shards": {}, "counts": {"assigned": assigned.rows}}
    if left := _unassigned(source, output):
        return output.manifest if output.overtaken() else {**made, "unfinished": left}
    sizes, assigned_on = _sizes(source, output, rows_ok)
    task = edges.FindEdges(
        emb, output.directory, options.floor, load_json(output.path(FIT)).get("screen", "f32"), giants.choose(sizes)
    )
    found = _find_edges(output, task, buckets, job)
    made["counts"]["related"] = found.rows
    if found.left:
        return {**made, "unfinished": found.left}

    def finish() -> None:
        if not paths.exists(output.path(EDGES)):
            edges.join_edges(output, buckets, options.neighbours, options.floor)
        paths.remove(output.path(BUCKETS))
        later = renewed.later(output, kept, source.stems) if kept else set()
        images = sampled[0] if sampled else sample_rows(source, rows_ok, [SMALL_SAMPLE], options.seed)[0]
        _finish(source, output, rows_ok, sizes, assigned_on, _recall(images, options, output), later)

    _once(job, paths.join(output.home, FINISH_CLAIM), lambda: _is_finished(output), finish)
    paths.remove(output.path(PLAN))  # this slice may have written it after another had finished
    seconds = round(assigned.seconds + found.seconds, 3)
    output.log(stage="cluster", rows=sum(rows_ok.values()), seconds=seconds, workers=job.workers)
    manifest: dict[str, Any] = load_json(paths.join(output.home, MANIFEST))
    renewed.tell_later(manifest["fit"], sum(rows_ok.values()), quiet=job.quiet)
    return manifest


def _is_finished(output: Output) -> bool:
    """Say whether this run or another slice has finished."""
    return output.overtaken() if output.basis else paths.exists(output.path(MANIFEST))


def _once(job: Job, claimed: str, done: Callable[[], bool], work: Callable[[], None]) -> None:
    """Do work that is not done yet; of several slices one does it, and the others wait."""
    if job.part is not None:
        claim.once(claimed, done, work)
    elif not done():
        work()


def _assign(source: Artefact, output: Output, neighbours: int, buckets: int, job: Job) -> Outcome:
    """Assign and scatter this slice's share of the parts that lack a sidecar or their scattered vectors."""
    parts = scatter.parts(source.rows)
    missing, unscattered = set(output.missing(source.stems)), set(scatter.missing(output.directory, list(parts)))
    # Checked after listing the scattered files, which are removed only once the edges exist.
    if edges.are_joined(output):
        unscattered.clear()
    todo = [part for part in job.share(list(parts)) if part in unscattered or missing & set(parts[part])]
    task = Assign(source.directory, output.directory, buckets, neighbours, output.home, output.kept, gpus(job) > 0)
    assigned = run_stage("assign", task, todo, job, gpu=GPU_SHARE, places=(source.directory, output.home))
    _refuse_failures(assigned.failed)
    return assigned


def _unassigned(source: Artefact, output: Output) -> list[str]:
    """List the shards that other slices still have to assign or scatter: kept shards are scattered, too."""
    parts = scatter.parts(source.rows)
    unscattered = [stem for part in scatter.missing(output.directory, list(parts)) for stem in parts[part]]
    left = {*output.missing(source.stems), *([] if edges.are_joined(output) else unscattered)}
    return [stem for stem in source.stems if stem in left]


@dataclass
class _Found:
    """What a slice found: rows compared, seconds, and what other slices are still working on."""

    rows: int = 0
    seconds: float = 0.0
    left: list[str] = field(default_factory=list)


def _find_edges(output: Output, task: edges.FindEdges, buckets: int, job: Job) -> _Found:
    """Find the edges of this slice's buckets, and, when all are there, of its blocks of giant clusters."""
    found = _Found()

    def compare(task: Task, items: Sequence[Any], missing: Callable[[], list[Any]], unit: str) -> bool:
        """Process this slice's missing items; returns whether all items are there."""
        lacking = set(missing())
        # Checked after listing the files, which are removed only once the edges exist.
        if edges.are_joined(output):
            return True
        todo = [item for item in job.share(items) if item in lacking]
        outcome = run_stage("relate", task, todo, job, unit=unit, gpu=GPU_SHARE, places=(output.home,))
        found.rows, found.seconds = found.rows + outcome.rows, found.seconds + outcome.seconds
        lacking = set(missing())
        if edges.are_joined(output):  # another slice has finished, and removed what this one read
            return True
        _refuse_failures(outcome.failed)
        found.left = [f"{unit} {item}" for item in items if item in lacking]
        return not found.left

    if compare(task, range(buckets), lambda: edges.missing(output, buckets), "buckets"):
        if blocks := edges.blocks(output, buckets):
            blockwise = giants.CompareBlocks(output.directory, task.floor, task.product)
            compare(blockwise, blocks, lambda: edges.missing_blocks(output, blocks), "blocks")
    return found


def _sizes(source: Artefact, output: Output, rows_ok: dict[str, int]) -> tuple[np.ndarray, dict[str, int]]:
    """Count the rows of every cluster, i64 [k], and the shards that each kind of device assigned.

    Raises: ContractError when a shard was assigned to other centroids than those that stand there, or rows are lacking.
    """
    k, centroids = int(output.plan["options"]["k"]), digest(sidecar.load_npy(output.path(CENTROIDS)))
    sizes, devices = np.zeros(k, np.int64), Counter[str]()

    def read(stem: str) -> tuple[str, np.ndarray]:
        where = output.find(stem)
        table = sidecar.table(where, ["cluster"])
        facts = sidecar.facts_of(table.schema)
        used = facts.get("centroids")
        if used != centroids:
            raise ContractError(
                f"{where} was assigned to centroids {used}, but {CENTROIDS} now holds {centroids}.",
                "make the directory anew with --overwrite",
            )
        return facts.get("device", "cpu"), np.asarray(table["cluster"].to_numpy())

    found = ranges.ahead(output.directory, read, source.stems)
    for (stem, rows), (device, clusters) in zip(source.rows.items(), found, strict=True):
        devices[device] += 1
        sizes += np.bincount(clusters[clusters >= 0], minlength=k)
        reconcile(stem, rows, {"clustered": int((clusters >= 0).sum()), "bad": rows - rows_ok[stem]})
    return sizes, dict(devices)


def _dimensions(source: Artefact) -> int:
    """Read the dimensions of the image embeddings from the first sidecar."""
    if not source.stems:
        raise UsageError(f"{source.directory} has no shards to cluster.")
    kind = source.sidecars.schema(source.stems[0]).field("image_embedding").type
    return int(kind.list_size)


def _resolve(
    options: ClusterOptions, source: Artefact, rows: int, dim: int, before: Mapping[str, Any]
) -> tuple[ClusterOptions, dict[str, Any]]:
    """Fill in options left at 0 and name the inputs. before: the manifest of the existing clusters.

    Raises: UsageError for an impossible k, sample or floor.
    """
    inputs: dict[str, Any] = {"embeddings": source}
    if EDGES.removesuffix(".arrow") in source.stems:
        raise UsageError(
            f"{source.directory} has a shard called {EDGES}, a name that `curate cluster` needs for its own file.",
            "rename its tar",
        )
    if not rows:
        raise UsageError(f"{source.directory} has no good row to cluster.", f"curate show {source.directory}")
    if options.neighbours not in (1, 2):
        raise UsageError(f"neighbours={options.neighbours} is neither 1 nor 2.", "--neighbours 2")
    if not -1 < options.floor < 1:
        raise UsageError(f"floor={options.floor} is not a cosine: expected a number between -1 and 1.", "--floor 0.80")
    if options.centroids and (options.k or options.refit):
        raise UsageError(
            "--centroids gives the clusters: --k and --refit fit others.",
            "leave one of them out (in a pipeline: k = 0)",
        )
    if options.centroids:
        given = _load_centroids(options.centroids, dim)
        inputs["centroids"] = {"path": options.centroids, "digest": digest(given)}
        neighbours = min(len(given), options.neighbours)
        return replace(options, k=len(given), sample=0, iters=0, neighbours=neighbours), inputs
    options = renewed.keep_sizes(options, before)
    k = options.k or kmeans.default_k(rows)
    if renewed.keeps(options, before):
        return replace(options, neighbours=min(k, options.neighbours)), inputs
    if k < 1 or k > rows:
        hint = f"--k {kmeans.default_k(rows)}"
        raise UsageError(f"k={k:,} clusters were asked for, but there are {rows:,} good rows.", hint)
    sample = min(options.sample or kmeans.default_sample(rows, k, dim), rows)
    if sample < k:
        raise UsageError(f"a sample of {sample:,} rows cannot fit k={k:,} clusters.", f"--sample {min(rows, 256 * k)}")
    if options.iters < 1:
        raise UsageError(f"iters={options.iters}: expected at least 1.", "--iters 20")
    return replace(options, k=k, sample=sample, neighbours=min(k, options.neighbours)), inputs


def _recorded(options: ClusterOptions) -> dict[str, Any]:
    """Return the options to record; given centroids are an input, identified by their content."""
    return {name: value for name, value in asdict(options).items() if name not in ("centroids", "refit")}


def _load_centroids(location: str, dim: int) -> np.ndarray:
    """Read centroids f32 [k, d]. Raises: UsageError if the file does not hold such an array."""
    try:
        found = sidecar.load_npy(location)
    except (OSError, ValueError) as error:
        raise UsageError(f"{location} is not a readable .npy array: {error}") from None
    if found.ndim != 2 or found.shape[1] != dim or found.dtype.kind != "f" or not len(found):
        raise UsageError(
            f"{location} holds {found.dtype} {list(found.shape)}; expected floats [k, {dim}], k at least 1."
        )
    with np.errstate(over="ignore"):
        lengths = np.linalg.norm(found.astype(np.float64), axis=1)
    bad = np.flatnonzero(~((lengths > LEAST_LENGTH) & (lengths < 1 / LEAST_LENGTH)))  # NaN among them
    if len(bad):
        told = f"{len(bad):,} of {len(found):,} rows of no direction, the first row {bad[0]}"
        raise UsageError(f"{location} has {told}: zeros, or numbers that are not finite.", "leave these centroids out")
    return np.asarray(found, np.float32)


def _fit(
    source: Artefact,
    rows_ok: dict[str, int],
    options: ClusterOptions,
    output: Output,
    job: Job,
    kept: Mapping[str, Any],
) -> np.ndarray:
    """Write the centroids, and how they were fitted, with shuffled pairs' scores. Returns a small sample's images.

    kept: the manifest of the state whose centroids stay, or nothing. The rows of the fit and those of the small sample
    are read in one pass.
    """
    facts: dict[str, Any] = {}
    sizes, columns = [SMALL_SAMPLE, SMALL_SAMPLE], ["image_embedding", "text_embedding"]
    if not kept and not options.centroids:
        sizes, columns = [*sizes, options.sample], [*columns, "image_embedding"]
    small, text, *images = sample_rows(source, rows_ok, sizes, options.seed, columns)
    shuffled = shuffled_quantiles(small, text, options.seed)
    if kept:
        facts = renewed.keep_centroids(output, kept, rows_ok)
        facts["shuffled_clip_score"] = shuffled
        save_json(output.path(FIT), facts)
        return small
    if options.centroids:
        centroids = kmeans.as_centroids(_load_centroids(options.centroids, _dimensions(source)))
    else:
        fitted_rows, dim = images[0].shape
        backend = kmeans.choose_backend(dim, options.k, gpu=job.gpus > 0)
        found = kmeans.fit(images.pop(), options.k, options.iters, options.seed, backend=backend)
        centroids = found.centroids
        facts = {"fitted_rows": fitted_rows, "backend": backend, "empty": found.empty}
        facts["versions"] = versions(*renewed.FIT_BY)
        facts["mean_similarity"] = found.mean_similarity
    rows = np.array([sum(rows_ok.values())])
    # All that is known of the number of comparisons is that it is at least that of equal clusters.
    worth = is_worth_rounding(centroids.shape[1], rows // len(centroids), rows)
    facts["screen"] = "f32"
    if worth:
        facts["screen"] = "gpu" if gpus(job) else fastest_product(centroids.shape[1])
    facts["shuffled_clip_score"] = shuffled
    if not paths.exists(output.path(FIT)):  # else another slice took this one for dead and has done the fit
        sidecar.save_npy(output.path(CENTROIDS), centroids)
        save_json(output.path(FIT), facts)
    return small


def _refuse_failures(failed: dict[Any, str]) -> None:
    if failed:
        name, why = next(iter(failed.items()))
        raise ShardError(
            f"{len(failed)} part(s) failed, first {name}: {why}", "fix that and run the same command again; it resumes"
        )


def _recall(images: np.ndarray, options: ClusterOptions, output: Output) -> dict[str, Any]:
    """Estimate the share of near pairs that were compared."""
    shuffled = images[np.random.default_rng([options.seed, 0x4EC]).permutation(len(images))]
    return recall.recall(shuffled, sidecar.load_npy(output.path(CENTROIDS)), options.neighbours, options.floor)


def _finish(
    source: Artefact,
    output: Output,
    rows_ok: dict[str, int],
    sizes: np.ndarray,
    assigned_on: dict[str, int],
    recalled: dict[str, Any],
    later: set[str],
) -> None:
    """Write the manifest. later: shards whose rows came after the centroids were fitted."""
    counts = {"clustered": sum(rows_ok.values()), "bad": sum(source.rows.values()) - sum(rows_ok.values())}
    output.finish(
        shards={
            stem: {"rows": rows, "ok": rows_ok[stem], **({"later": True} if stem in later else {})}
            for stem, rows in source.rows.items()
        },
        counts=counts,
        fit=load_json(output.path(FIT)),
        assigned_on=assigned_on,
        clusters={"k": len(sizes), "used": int((sizes > 0).sum()), "largest": int(sizes.max())},
        edges=sidecar.num_rows(output.path(EDGES)),
        recall=recalled,
        versions=versions("faiss-gpu", "faiss-cpu", "numpy", "scipy", "pyarrow"),
    )
