"""Clusters of embeddings that have changed: which shards keep their assignment, and to which centroids.

A shard of `CLU` is kept if the embeddings of its rows are those that were assigned. The centroids stay, unless a new
fit is asked for; shards that came after the fit are marked in the manifest (`later`), and counted.
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from curate.cluster.options import ClusterOptions
from curate.cluster.scatter import BUCKETS, is_scratch
from curate.storage import paths, sidecar
from curate.storage.manifest import MANIFEST, Artefact, Output, Parts, digest, load_json, recorded, versions
from curate.storage.schema import CENTROIDS

FIT_BY = ("faiss-gpu", "faiss-cpu", "torch", "numpy")  # the packages that a fit depends on
LARGE_SHARE = 0.1  # share of later rows above which a new fit is advised


def standing(out: str) -> dict[str, Any]:
    """Read the manifest of a finished clustering, or nothing."""
    where = paths.join(out, MANIFEST)
    found = load_json(where) if paths.exists(where) else {}
    return found if isinstance(found, dict) and found.get("command") == "cluster" else {}


def keeps(options: ClusterOptions, before: Mapping[str, Any]) -> bool:
    """Say whether the existing centroids stay, whatever the rows are now."""
    return bool(before) and not options.centroids and not options.refit


def keep_sizes(options: ClusterOptions, before: Mapping[str, Any]) -> ClusterOptions:
    """Take k and sample, if left at 0, from the existing clusters."""
    if not keeps(options, before):
        return options
    made = before["options"]
    return replace(options, k=options.k or made["k"], sample=options.sample or made["sample"])


def free(options: ClusterOptions, before: Mapping[str, Any], out: str, source: Artefact) -> tuple[str, ...]:
    """Name the options that may differ from those of the clusters at `out`: all of a fit that is asked for.

    For clusters begun on other rows, also k and sample if left at 0: they follow from the rows. before: `standing`.
    """
    if options.refit:
        return "k", "sample", "iters", "seed"
    begun = {} if before else recorded(out, "cluster")
    if not begun or begun["inputs"].get("embeddings", {}).get("digest") == source.digest:
        return ()
    return tuple(name for name in ("k", "sample") if not getattr(options, name))


def why_anew(options: ClusterOptions, before: Mapping[str, Any], source: Artefact, asked: Mapping[str, Any]) -> str:
    """Say why no assignment may stay, or "": a fit is asked for, and the existing one is not of these rows."""
    if not before or not options.refit or options.centroids:
        return ""
    if _is_of(before, source) and "later_rows" not in before["fit"] and before["options"] == asked:
        return ""
    return f"fitted again, on the {sum(source.rows.values()):,} rows that there are now"


def _is_of(before: Mapping[str, Any], source: Artefact) -> bool:
    return bool(before["inputs"]["embeddings"]["digest"] == source.digest)


def parts(source: Artefact) -> Parts:
    """Describe what each shard is assigned from: its rows, what their embeddings were made of, and by what."""
    found = source.manifest
    joined = bool(found["options"].get("join"))
    inputs = {name: each["digest"] for name, each in found["inputs"].items() if name == "captions" or joined}
    common = [found["command"], found["options"], {name: made for name, made in inputs.items() if name != "pool"}]
    makers = {stem: maker for maker in found.get("made_by", []) for stem in maker["shards"]}
    seen = {}
    for stem, shard in found["shards"].items():
        maker = makers.get(stem, found)
        by = [maker.get("device"), maker.get("versions")]
        made_of = [shard.get("digest") or source.digest, *([shard["source"]] if "source" in shard else [])]
        seen[stem] = (int(shard["rows"]), "", digest([common, by, *made_of]))
    return Parts(("embeddings",), seen, adopted=False)


def keep_centroids(output: Output, before: Mapping[str, Any], rows_ok: Mapping[str, int]) -> dict[str, Any]:
    """Copy the centroids of the previous state into the next one; returns how they were fitted."""
    sidecar.save_npy(output.path(CENTROIDS), sidecar.load_npy(paths.join(output.home, CENTROIDS)))
    facts: dict[str, Any] = dict(before["fit"])
    facts["later_rows"] = sum(rows_ok[stem] for stem in later(output, before, list(rows_ok)))
    return facts


def later(output: Output, before: Mapping[str, Any], stems: list[str]) -> set[str]:
    """Name the shards that the centroids were not fitted on: those made now, and those already marked so."""
    return {stem for stem in stems if stem not in output.kept or before["shards"][stem].get("later")}


def tell_later(fit: Mapping[str, Any], rows: int, *, quiet: bool) -> None:
    """Say on stderr how many rows are assigned to centroids that were fitted before they came."""
    if quiet or "later_rows" not in fit:
        return
    share = fit["later_rows"] / max(rows, 1)
    advice = "--refit fits them anew" if share <= LARGE_SHARE else "that is a large share: --refit fits them anew"
    told = f"{fit['later_rows']:,} of {rows:,} rows ({share:.1%}) came after the centroids were fitted"
    sys.stderr.write(f"cluster: {told}; {advice}\n")


def tell_other_fit(fit: Mapping[str, Any], *, quiet: bool) -> None:
    """Say on stderr if other versions than the present ones fitted the centroids; the manifest's `fit` names them."""
    here = versions(*FIT_BY)
    there = fit.get("versions", here)
    if there != here and not quiet:
        told = " and ".join(json.dumps(each, sort_keys=True) for each in (there, here))
        sys.stderr.write(f"cluster: the centroids were fitted by other versions than these: {told}\n")


def drop_older(output: Output, stems: list[str], *, quiet: bool) -> None:
    """Delete what an older version began and this one cannot continue; the centroids stay."""
    present = sorted(set(stems) - output.kept - set(output.missing(stems)))
    unknown = next((stem for stem in present if "centroids" not in sidecar.facts(output.find(stem))), None)
    scratch = paths.listdir(output.path(BUCKETS))
    if unknown is None and all(is_scratch(name) for name in scratch):
        return
    for stem in present:
        paths.remove(output.find(stem))
    paths.remove(output.path(BUCKETS))
    if not quiet:
        told = f"{output.home} was begun by an older version: its centroids are kept, all rows are assigned again"
        sys.stderr.write(f"cluster: {told}\n")
