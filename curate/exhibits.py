"""The parts of a report: each turns manifests, stored counts and sidecars into what the template shows.

Arrays are scalar columns, one shard at a time; charts come back as SVG that escapes its own texts.
"""

import platform
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from curate import charts, paths, shards, store

MAX_ROWS_FOR_SIZES = 200_000_000
TITLES = {
    "clip_score": "clip_score: how well image and caption agree (cosine)",
    "centroid_similarity": "centroid_similarity: how typical an image is of its cluster (cosine)",
    "nearest_similarity": "nearest_similarity: cosine to the nearest other image of the cluster",
}


def funnel(funnel: Mapping[str, Any]) -> dict[str, Any]:
    """Lay out the funnel: one bar per step, its width the rows that were there, filled where they stay."""
    total = max(1, int(funnel["rows"]))
    log = funnel["kept"] / total < 1 / 300 and funnel["kept"] > 1

    def width(rows: int) -> float:
        share = np.log1p(rows) / np.log1p(total) if log else rows / total
        return round(100 * float(share), 3)

    bars = [{"text": "", "name": "the pool", "rows": total, "outer": 100.0, "inner": 100.0, "dropped": 0, "facts": []}]
    if funnel.get("bad"):
        good = total - funnel["bad"]
        facts = [(name.replace("_", " "), f"{count:,}") for name, count in funnel["statuses"].items()]
        bars.append(
            {
                "text": "",
                "name": "usable rows",
                "rows": good,
                "outer": 100.0,
                "inner": width(good),
                "dropped": funnel["bad"],
                "facts": facts,
            }
        )
    for step in funnel["steps"]:
        facts = [(name.replace("_", " "), _fact(value)) for name, value in (step.get("estimates") or {}).items()]
        bar = {"outer": width(step["before"]), "inner": width(step["kept"]), "dropped": step["dropped"], "facts": facts}
        bars.append({"text": step["text"], "rows": step["kept"], **bar})
    return {
        "bars": bars,
        "log": log,
        "rows": total,
        "kept": funnel["kept"],
        "steps": funnel["steps"],
        "statuses": funnel.get("statuses", {}),
        "bad": funnel.get("bad", 0),
    }


def _fact(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value) if not isinstance(value, list | dict) else f"{len(value)} values"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def histograms(funnel: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Draw each score's spread, with the bands that the steps cut out of it."""
    for column, counted in funnel.get("histograms", {}).items():
        bands = [band for step in funnel["steps"] if (band := _band(step, column))]
        chart = charts.histogram(
            counted["edges"], counted["all"], counted["kept"], f"spread of {column}, all rows and kept rows", bands
        )
        yield {"title": TITLES.get(column, column), "chart": chart, "bands": [title for _, _, title in bands]}


def _band(step: Mapping[str, Any], column: str) -> tuple[float | None, float | None, str] | None:
    """Find the stretch of a score that a step left: between its `lowest` and `highest`, or under its threshold."""
    name, _, arguments = step["text"].partition("(")
    facts = step.get("estimates") or {}
    if column == "nearest_similarity" and name == "dedup" and "threshold" in facts:
        return None, facts["threshold"], f"{step['text']}: near-duplicates lie to the right"
    about = column in arguments or (name == "mismatch" and column == "clip_score")
    if about and "lowest" in facts:
        return facts["lowest"], facts["highest"], f"{step['text']} kept {facts['lowest']:.4g} to {facts['highest']:.4g}"
    return None


def explorer(funnel: Mapping[str, Any]) -> dict[str, Any] | None:
    """Prepare the retention explorer: what dedup alone would keep at any threshold, as stored, exactly."""
    curve = funnel.get("curves", {}).get("dedup")
    if not curve:
        return None
    chosen = next(
        (s["estimates"]["threshold"] for s in funnel["steps"] if "threshold" in (s.get("estimates") or {})), None
    )
    line = charts.Line("rows that dedup keeps", curve["threshold"], curve["kept"], "kept")
    chart = charts.curves([line], "rows kept by dedup at each threshold", mark=chosen, from_zero=True, identity="curve")
    start = int(np.abs(np.array(curve["threshold"]) - (chosen if chosen is not None else 0.95)).argmin())
    return {"chart": chart, "data": {**curve, "chosen": chosen}, "start": start, "last": len(curve["threshold"]) - 1}


def sizes(clusters: store.Artefact, selection: store.Artefact | None) -> dict[str, Any] | None:
    """Compare the clusters' sizes before and after, and choose the ones to show: giants, the middle, the tail."""
    k = int(clusters.manifest["options"].get("k") or 0)
    if not k or sum(clusters.rows.values()) > MAX_ROWS_FOR_SIZES:
        return None
    before, after = np.zeros(k, np.int64), np.zeros(k, np.int64)
    for stem in clusters.stems:
        label = clusters.table(stem, ["cluster"])["cluster"].to_numpy()
        before += np.bincount(label[label >= 0], minlength=k)
        if selection is not None:
            kept = selection.table(stem, ["kept"])["kept"].to_numpy(zero_copy_only=False)
            after += np.bincount(label[(label >= 0) & kept], minlength=k)
    order = np.argsort(-before, kind="stable")
    order = order[before[order] > 0]
    ranks = np.unique(np.geomspace(1, len(order), min(len(order), 200)).astype(int)) if len(order) else np.empty(0, int)
    lines = [charts.Line("all rows", ranks.tolist(), before[order][ranks - 1].tolist(), "all")]
    if after.any():
        descending = np.sort(after)[::-1]
        there = ranks[descending[ranks - 1] > 0]
        lines.append(charts.Line("kept rows", there.tolist(), descending[there - 1].tolist(), "kept"))
    picks = [("giant", order[:3]), ("middling", order[len(order) // 2 : len(order) // 2 + 2]), ("tail", order[-3:])]
    groups, seen = [], set()
    for kind, members in picks:
        for cluster in members.tolist():
            if cluster not in seen:
                groups.append(
                    {"kind": kind, "cluster": cluster, "before": int(before[cluster]), "after": int(after[cluster])}
                )
            seen.add(cluster)
    return {
        "chart": charts.curves(lines, "cluster sizes by rank, all rows and kept rows", log_x=True, log_y=True)
        if len(ranks)
        else None,
        "k": k,
        "empty": int((before == 0).sum()),
        "without": int(((before > 0) & (after == 0)).sum()) if after.any() else None,
        "effective": (_effective(before), _effective(after)),
        "groups": groups,
    }


def _effective(sizes: np.ndarray) -> float:
    """Compute the number of clusters that rows are as evenly spread over: the exponential of the entropy."""
    shares = sizes[sizes > 0] / max(1, sizes.sum())
    return float(np.exp(-(shares * np.log(shares)).sum())) if len(shares) else 0.0


def mixture(mixed: store.Artefact | None) -> dict[str, Any] | None:
    """Lay out the shares of a mix's sources, in samples and in tokens."""
    if mixed is None:
        return None
    counts, sources = mixed.manifest["counts"], mixed.manifest["sources"]
    rows = [
        {
            "name": name,
            **source,
            "faults": {**source.get("faults", {}), **source.get("ruled_out", {})},
            "sample_share": 100 * source["samples"] / max(1, counts["rows"]),
            "token_share": 100 * source["tokens"] / max(1, counts["tokens"]),
        }
        for name, source in sources.items()
    ]
    return {"sources": rows, "counts": counts, "manifest": mixed.manifest}


def losses(runs: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """Draw the loss of each training run, thinned to what a chart can show."""
    for name, place in runs.items():
        points = []
        for text in paths.read_text(paths.join(place, "metrics.jsonl")).splitlines():
            entry = shards.read_json(text.encode())
            if entry and isinstance(entry.get("loss"), int | float) and isinstance(entry.get("step"), int):
                points.append((entry["step"], float(entry["loss"])))
        points = points[:: max(1, len(points) // 400)]
        if len(points) > 1:
            steps, losses = zip(*points, strict=True)
            chart = charts.curves(
                [charts.Line("loss", steps, losses, "kept")], f"loss of {name} by step", from_zero=True
            )
            yield {"name": name, "chart": chart, "last": losses[-1], "steps": steps[-1]}


def provenance(artefact: store.Artefact, out: str) -> dict[str, Any]:
    """Write the command that made an artefact, places as seen from the page."""
    here = paths.parent(out)
    inputs = [paths.relative(artefact.input_path(name), here) for name in artefact.manifest["inputs"]]
    words = ["curate", artefact.command, *inputs[:1], paths.relative(artefact.directory, here)]
    for key, value in artefact.manifest.get("options", {}).items():
        if key == "steps":
            words += [f"--step={step}" for step in value]
        elif artefact.command != "mix" and value not in ("", None) and not isinstance(value, list | dict):
            words.append(f"--{key.replace('_', '-')}={value}")
    if artefact.command == "select":  # its steps say all that a recipe would
        words = [word for word in words if not word.startswith("--recipe")]
    counts = {key: value for key, value in artefact.manifest.get("counts", {}).items() if isinstance(value, int)}
    return {
        "command": shlex.join(words),
        "verb": artefact.command,
        "counts": counts,
        "digest": artefact.digest,
        "device": artefact.manifest.get("device", ""),
        "failed": artefact.manifest.get("failed", {}),
        "gone": artefact.manifest.get("gone", []),
    }


def speeds(chain: list[store.Artefact]) -> Iterator[dict[str, Any]]:
    """Read how fast each stage ran from the logs beside the artefacts."""
    for artefact in chain:
        if not paths.exists(artefact.path(store.LOG)):
            continue
        for text in paths.read_text(artefact.path(store.LOG)).splitlines():
            entry = shards.read_json(text.encode())
            if entry and entry.get("seconds") and entry.get("rows"):
                yield {**entry, "rate": entry["rows"] / entry["seconds"]}


def versions(chain: list[store.Artefact]) -> dict[str, str]:
    """Gather the versions that the stages recorded."""
    found = {"python": platform.python_version()}
    for artefact in chain:
        found |= {name: str(version) for name, version in artefact.manifest.get("versions", {}).items()}
    return found
