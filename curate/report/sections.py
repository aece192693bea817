"""The parts of a report: each turns manifests, stored counts and sidecars into what the template shows.

Arrays are scalar columns, one shard at a time; charts come back as SVG that escapes its own texts.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from curate.report import charts, provenance
from curate.select.steps.by_concept import LISTED
from curate.storage import manifest, paths
from curate.storage.schema import STATUSES

PACE = {"tokens_per_s": "tokens/s", "mfu": "MFU", "peak_memory_gb": "GB at the peak"}


def funnel(funnel: Mapping[str, Any]) -> dict[str, Any]:
    """Lay out the funnel: one bar per step, as wide as its rows, filled as far as they stay."""
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
        told = {name: value for name, value in (step.get("estimates") or {}).items() if name != LISTED}
        facts = [(name.replace("_", " "), _fact(value)) for name, value in told.items()]
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
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value) if not isinstance(value, list | dict) else f"{len(value)} values"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def mixture(mixed: manifest.Artefact | None) -> dict[str, Any] | None:
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
    """Draw the loss of each training run, step by step and smoothed, with its pace."""
    for name, place in runs.items():
        entries = [
            entry
            for entry in provenance.entries(paths.join(place, "metrics.jsonl"))
            if provenance.is_finite(entry.get("loss")) and isinstance(entry.get("step"), int)
        ]
        if len(entries) < 2:
            continue
        steps, loss = [entry["step"] for entry in entries], np.array([entry["loss"] for entry in entries], float)
        width = max(1, len(loss) // 40)
        ends = np.cumsum(np.insert(loss, 0, 0.0))
        starts = np.maximum(np.arange(len(loss)) - width + 1, 0)
        smooth = (ends[1:] - ends[starts]) / (np.arange(len(loss)) - starts + 1)
        thin = slice(None, None, max(1, len(steps) // 400))
        lines = [
            charts.Line("loss of each step", steps[thin], loss[thin].tolist(), "all"),
            charts.Line(f"mean of {width} steps", steps[thin], smooth[thin].tolist(), "kept"),
        ]
        facts = {name: float(np.median(values)) for key, name in PACE.items() if (values := _numbers(entries, key))}
        chart = charts.curves(lines, f"loss of {name} by step", from_zero=True)
        yield {
            "name": name,
            "chart": chart,
            "last": float(smooth[-1]),
            "width": width,
            "steps": steps[-1],
            "facts": facts,
        }


def scores(evals: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """Read a trained model's answers: its accuracy by task, and some answers beside the truth."""
    for name, place in evals.items():
        tasks: dict[str, list[bool]] = {}
        examples: list[Mapping[str, Any]] = []
        for entry in provenance.entries(paths.join(place, "answers.jsonl")):
            if isinstance(entry.get("right"), bool):
                answers = tasks.setdefault(str(entry.get("task") or "all"), [])
                answers.append(entry["right"])
                if len(answers) <= 3:
                    examples.append({"task": "all", "question": "", "answer": "", "truth": "", **entry})
        table = [
            {"task": task, "questions": len(right), "accuracy": 100 * sum(right) / len(right)}
            for task, right in sorted(tasks.items())
        ]
        published = [
            {"task": child, "scores": {k: v for k, v in result.get("scores", {}).items() if _is_number(v)}}
            for child in paths.listdir(place)
            if is_benchmark(paths.join(place, child))
            for result in (manifest.load_json(paths.join(place, child, manifest.MANIFEST)).get("result", {}),)
        ]
        if table or published:
            yield {"name": name, "tasks": table, "examples": examples, "benchmarks": published}


def is_benchmark(place: str) -> bool:
    """Say whether a directory holds a finished benchmark: its answers and the manifest with its scores."""
    return all(paths.exists(paths.join(place, name)) for name in ("answers.jsonl", manifest.MANIFEST))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _numbers(entries: list[Mapping[str, Any]], key: str) -> list[float]:
    return [float(entry[key]) for entry in entries if provenance.is_finite(entry.get(key))]


def bad_counts(embedded: manifest.Artefact | None) -> dict[str, int]:
    """Count the unusable rows by status, the most frequent first."""
    counts = embedded.manifest.get("counts", {}) if embedded is not None else {}
    bad = {name: int(counts[name]) for name in STATUSES if name != "ok" and counts.get(name)}
    return dict(sorted(bad.items(), key=lambda item: -item[1]))
