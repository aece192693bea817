"""The report's scores: each as a histogram with the cut that a step made, which the reader can move.

In: `funnel.json`. Out: figures, each with its chart and, if the counts are stored (`cuts`, `curves`), a control: the
thresholds to which the cut can be moved and the number of rows that stay at each. The page's script only looks numbers
up, so it shows what `curate select` would give.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from curate.errors import UsageError
from curate.report import charts
from curate.select import catalogue

TITLES = {
    "clip_score": "clip_score: how well image and caption agree (cosine)",
    "centroid_similarity": "centroid_similarity: how typical an image is of its cluster (cosine)",
    "nearest_similarity": "nearest_similarity: cosine to the nearest other image of the cluster",
}
Funnel = Mapping[str, Any]


def figures(funnel: Funnel) -> Iterator[dict[str, Any]]:
    """Draw every score, in the order of the steps that cut it; those that no step cuts come last."""
    histograms = dict(funnel.get("histograms", {}))
    texts = [str(step["text"]) for step in funnel["steps"]]
    shown = set()
    tables = [table for table in funnel.get("cuts", []) if table["column"] in histograms]
    near = _dedup_control(funnel, texts)
    if near is not None:
        shown.add("nearest_similarity")
        yield from _dedup_figures(funnel, near)
    for number, table in enumerate(tables):
        control = _control(f"cut{number}", table, texts)
        shown.add(table["column"])
        chart = _histogram(histograms, table["column"], control)
        yield _figure(table["column"], chart, control)
    for column in histograms:
        if column not in shown:
            yield _figure(column, _histogram(histograms, column, None), None)


def plain(column: str, values: np.ndarray, label: str) -> dict[str, Any]:
    """Draw the spread of a score that nothing was selected by. values: f32 [n], NaN left out."""
    counts, edges = np.histogram(values[~np.isnan(values)].astype(np.float64), 60)  # f32 may be too coarse for 60 bins
    chart = charts.histogram(edges.tolist(), counts.tolist(), [], f"spread of {column}")
    return _figure(column, chart, None, label)


def _figure(
    column: str, chart: Markup, control: dict[str, Any] | None, heading: str = "No step cuts here"
) -> dict[str, Any]:
    return {"title": TITLES.get(column, column), "chart": chart, "control": control, "heading": heading}


def _histogram(histograms: Mapping[str, Any], column: str, control: Mapping[str, Any] | None) -> Markup:
    counted = histograms[column]
    window = _window(control) if control else None
    label = f"spread of {column}, all rows and kept rows"
    return charts.histogram(counted["edges"], counted["all"], counted["kept"], label, window)


def _window(control: Mapping[str, Any]) -> charts.Window:
    low, high = (None if control[end] is None else control["values"][control[end]] for end in ("low", "high"))
    return charts.Window(low, high, "what stays", control["id"])


def _control(identity: str, table: Mapping[str, Any], texts: Sequence[str]) -> dict[str, Any]:
    """Describe a movable cut: the text around its thresholds, the steps around it, and its present position."""
    column, kind, place = table["column"], table["kind"], table["step"]
    head = f"{kind}({column}, " if kind != "band" else f"rank({column}, "
    if kind == "band" and table["high"] is None:
        head += "0, "
    before, after = ([], []) if place is None else (list(texts[:place]), list(texts[place + 1 :]))
    stay = table["kept"][table["low" if table["low"] is not None else "high"]]
    stay -= table["kept"][table["high"]] if kind == "band" and table["high"] is not None else 0
    kept = {name: table[name] for name in ("rows", "names", "values", "kept", "low", "high")}
    if kind == "band":
        kept["names"] = [_share(name, table["rows"]) for name in table["names"]]
        if table["high"] is None and float(table["names"][-1]) == 0:  # `rank` refuses a band from 0 to 0
            kept |= {name: kept[name][:-1] for name in ("names", "values", "kept")}
    return {
        "id": identity,
        "step": None if place is None else texts[place],
        "alone": place is None,
        "note": "",
        **kept,
        "from_top": table["low"] is not None,
        "head": head,
        "tail": ")",
        "before": before,
        "after": after,
        "stay": stay,
    }


def _share(name: str, rows: int) -> str:
    """Write a share with the fewest digits, at least three, for which `rank` keeps the same number of rows."""
    shorter = (repr(round(float(name), digits)) for digits in range(3, 17))
    return next((text for text in shorter if round(float(text) * rows) == round(float(name) * rows)), name)


def _dedup_control(funnel: Funnel, texts: Sequence[str]) -> dict[str, Any] | None:
    """Describe dedup's movable threshold: by cosine alone, over all usable rows, so exact only for the first step.

    A step that met fewer rows, or requires more than a cosine ("auto"), kept a different number; the figure says so.
    """
    curve = funnel.get("curves", {}).get("dedup")
    if not curve:
        return None
    values = list(curve["threshold"])
    place = next((i for i, step in enumerate(funnel["steps"]) if _keep(step["text"]) is not None), None)
    start, keep, step = len(values) - 1, "", None
    if place is not None:
        step, keep = funnel["steps"][place], _keep(texts[place]) or ""
        chosen = float((step.get("estimates") or {}).get("threshold", values[-1]))
        start = min(sum(value < chosen for value in values), len(values) - 1)
    stay = curve["kept"][start]
    fewer = step is not None and step["before"] < curve["rows"]
    why = "it saw only the rows that the steps before it left" if fewer else "it requires similar pixels, too"
    return {
        "id": "dedup",
        "step": texts[place] if place is not None else None,
        "alone": place != 0,
        "note": f"The step itself kept {step['kept']:,} of {step['before']:,}: {why}."
        if step is not None and step["kept"] != stay
        else "",
        "rows": curve["rows"],
        "names": [str(np.float32(value)) for value in values],  # dedup compares in this precision
        "values": values,
        "kept": list(curve["kept"]),
        "low": None,
        "high": start,
        "from_top": False,
        "head": "dedup(",
        "tail": f", keep={keep!r})" if keep else ")",
        "before": [],
        "after": list(texts[1:]) if place == 0 else [],
        "stay": stay,
    }


def _keep(text: str) -> str | None:
    """Find a dedup step's policy; None if the curve, which is of components, does not apply to this step."""
    try:
        [step] = catalogue.parse([text])
    except UsageError:
        return None
    ours = step.name == "dedup" and step.arguments.get("rule", "components") == "components"
    return str(step.arguments.get("keep", "")) if ours else None


def _dedup_figures(funnel: Funnel, control: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Draw dedup's threshold twice: over the similarities, and on the curve of the rows that stay."""
    histograms = funnel.get("histograms", {})
    line = charts.Line("rows that dedup keeps", control["values"], control["kept"], "kept")
    curve = charts.curves([line], "rows kept by dedup at each threshold", window=_window(control), from_zero=True)
    if "nearest_similarity" in histograms:
        chart = _histogram(histograms, "nearest_similarity", control)
        yield _figure("nearest_similarity", chart, control)
        yield _figure("rows that dedup alone would keep, by threshold", curve, None, "The same threshold on its curve")
    else:
        yield _figure("rows that dedup alone would keep, by threshold", curve, control)
