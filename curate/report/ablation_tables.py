"""An ablation in the report: which claims held, all arms at a glance, and each beside the reference with its interval.

In: `ablation.json` as curate/README.md describes it. Out: tables and charts, one group for each
combination of the axes that are not compared; within it the arms by the compared axis. Means come with their
standard deviation and number of seeds, differences are paired and come with their 95 % interval.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from curate.report import charts
from curate.storage import manifest, paths

FILE = "ablation.json"
MAX_FAILED = 20
Ablation = Mapping[str, Any]


def section(location: str) -> dict[str, Any]:
    """Lay out an ablation: its claims, and for every measure the arms in groups."""
    ablation = manifest.load_json(location)
    record = paths.join(paths.parent(location), manifest.MANIFEST)
    made = manifest.load_json(record) if paths.exists(record) else {}
    every = list(measures(ablation))
    return {
        "name": str(ablation.get("name", paths.name(paths.parent(location)))),
        "about": ablation.get("about", ""),
        "axes": {axis: " · ".join(map(str, values)) for axis, values in ablation["axes"].items()},
        "settings": list(_settings(made.get("options", {}).get("axes", {}))),
        "versions": made.get("versions", {}),
        "compare": ablation["compare"],
        "reference": ablation["reference"],
        "seeds": len(ablation["seeds"]),
        "trials": len(ablation["trials"]),
        "bars": [{**bar, **_measure(ablation, bar["measure"])} for bar in ablation.get("bars", [])],
        "mixtures": [_mixture(each) for each in ablation.get("mixtures", [])],
        "measures": every,
        "glance": list(_glance(every)),
        "failed": ablation.get("failed", [])[:MAX_FAILED],
        "num_failed": len(ablation.get("failed", [])),
    }


def _settings(axes: Mapping[str, Any]) -> Iterator[tuple[str, str, list[str]]]:
    """List what each value of an axis sets: the axis, the value, and the settings, steps joined by arrows."""
    for axis, values in axes.items():
        for value, tables in values.items():
            settings: list[str] = []
            for table, pairs in tables.items():
                away = f"no {table}"  # align = false takes a table away
                settings += (
                    [f"{table}.{key}={_written(v)}" for key, v in pairs.items()] if pairs is not False else [away]
                )
            yield axis, value, settings


def _mixture(fitted: Mapping[str, Any]) -> dict[str, Any]:
    """Lay out a response over a mixture: a chart of each source's share, and where the best mixture lies."""
    drawn = []
    for source, line in zip(fitted["sources"], fitted["along"], strict=True):
        xs = [100 * share for share in line["shares"]]
        kinds = (("fit", "mean", "c0"), ("95 % interval", "low", "c5"), ("95 % interval", "high", "c5"))
        curves = [charts.Line(label, xs, [each[key] for each in line["values"]], kind) for label, key, kind in kinds]
        drawn.append((source, charts.curves(curves, f"the goal by the share of {source}")))
    spans = zip(fitted["sources"], fitted["best"]["from"], fitted["best"]["to"], strict=True)
    likely = [(source, 100 * low, 100 * high) for source, low, high in spans]
    return {**fitted, "name": _others(fitted["arm"], ""), "likely": likely, "charts": drawn}


def _written(value: Any) -> str:
    if isinstance(value, list):
        return " → ".join(map(_written, value))
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def measures(ablation: Ablation) -> Iterator[dict[str, Any]]:
    """Lay out each measure: its arms in groups, each with its interval, and a sweep where an axis is a scale."""
    for name in ablation["measures"]:
        cells = [cell for cell in ablation["summary"] if cell["measure"] == name]
        groups = []
        for key in dict.fromkeys(_others(cell["arm"], ablation["compare"]) for cell in cells):
            rows = [_row(cell, ablation) for cell in cells if _others(cell["arm"], ablation["compare"]) == key]
            plots, scale = charts.forest([_interval(row) for row in rows])
            drawn = [row | {"plot": plot} for row, plot in zip(rows, plots, strict=True)]
            held = max([row["records"]["n"] for row in rows if row["records"]], default=0)
            groups.append({"name": key, "rows": drawn, "scale": scale, "records": held})
        if groups:
            yield {
                "name": name,
                **_measure(ablation, name),
                "groups": groups,
                "sweeps": list(_sweeps(ablation, cells, name)),
            }


def _measure(ablation: Ablation, name: str) -> dict[str, Any]:
    """Say how a measure is meant and written."""
    known = ablation["measures"].get(name, {})
    unit = known.get("unit", "number")
    return {
        "means": known.get("about", ""),
        "better": known.get("better", ""),
        "unit": unit,
        "percent": unit == "share",
    }


def _others(arm: Mapping[str, Any], compare: str) -> str:
    return ", ".join(f"{axis} {value}" for axis, value in arm.items() if axis != compare)


def _row(cell: Mapping[str, Any], ablation: Ablation) -> dict[str, Any]:
    """Write one arm: the compared value, its mean, and whether it differs from the reference for better or worse."""
    difference = cell.get("difference")
    better = ablation["measures"].get(cell["measure"], {}).get("better", "")
    verdict = ""
    if difference and difference.get("low") is not None and better:
        up = difference["low"] > 0
        if up or difference["high"] < 0:
            verdict = "better" if up == (better == "higher") else "worse"
    scale = 100 if ablation["measures"].get(cell["measure"], {}).get("unit") == "share" else 1
    held = (difference or {}).get("records")
    return {
        "value": str(cell["arm"].get(ablation["compare"], "")),
        "n": cell["n"],
        "mean": scale * cell["mean"],
        "sd": None if cell.get("sd") is None else scale * cell["sd"],
        "difference": {k: _scaled(v, scale, k) for k, v in difference.items()} if difference else None,
        "records": {k: _scaled(v, scale, k) for k, v in held.items()} if held else None,
        "verdict": verdict,
    }


def _scaled(value: Any, scale: float, name: str) -> Any:
    return scale * value if name in ("mean", "sd", "low", "high") and value is not None else value


def _interval(row: Mapping[str, Any]) -> charts.Interval | None:
    """Describe an arm's paired difference with its interval; None where it has none."""
    difference = row["difference"]
    if not difference or difference.get("low") is None:
        return None
    ends = (difference["mean"], difference["low"], difference["high"])
    return charts.Interval(row["value"], *ends, row["verdict"] or "par")


def _glance(every: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Turn the measures round: for each group a row for every arm, with its place in each measure (None: not there)."""
    names = [measure["name"] for measure in every]
    for group in dict.fromkeys(group["name"] for measure in every for group in measure["groups"]):
        arms: dict[str, dict[str, Any]] = {}
        for measure in every:
            for row in (row for each in measure["groups"] if each["name"] == group for row in each["rows"]):
                arms.setdefault(row["value"], {})[measure["name"]] = row | {"percent": measure["percent"]}
        yield {"name": group, "arms": {arm: [cells.get(name) for name in names] for arm, cells in arms.items()}}


def _sweeps(ablation: Ablation, cells: Sequence[Mapping[str, Any]], name: str) -> Iterator[dict[str, Any]]:
    """Draw the means over each axis that is a scale of three values or more, a line for each compared value."""
    scale = 100 if _measure(ablation, name)["percent"] else 1
    for axis, values in ablation["axes"].items():
        places = {str(value): _as_number(value) for value in values}
        if axis == ablation["compare"] or len(values) < 3 or None in places.values():
            continue
        groups: dict[str, dict[str, list[tuple[float, float]]]] = {}
        for cell in cells:
            arm = {other: value for other, value in cell["arm"].items() if other != axis}
            place = places.get(str(cell["arm"].get(axis)))
            if place is not None:
                lines = groups.setdefault(_others(arm, ablation["compare"]), {})
                lines.setdefault(str(arm.get(ablation["compare"], "")), []).append((place, scale * float(cell["mean"])))
        ticks = {place: text for text, place in places.items() if place is not None}
        log = min(ticks) > 0 and max(ticks) / min(ticks) >= 8
        for group, lines in groups.items():
            drawn = [
                charts.Line(label, [x for x, _ in sorted(points)], [y for _, y in sorted(points)], f"c{number % 6}")
                for number, (label, points) in enumerate(lines.items())
            ]
            chart = charts.curves(drawn, f"{name} by {axis}", log_x=log, ticks=ticks)
            yield {"axis": axis, "group": group, "chart": chart, "lines": [(line.label, line.kind) for line in drawn]}


def _as_number(value: Any) -> float | None:
    """Read a number, or a share such as "2%"; None where it is neither."""
    if isinstance(value, bool):
        return None
    text = str(value).strip().replace("_", "")
    try:
        return float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
