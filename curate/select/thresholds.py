"""What every threshold on a score would keep: the exact counts behind the report's movable cuts.

In: the values of the rows that a step saw. Out: a grid of about 200 ascending thresholds, and for each the number of
rows beyond it by that step's own rule. These are the numbers that `curate select` gives for the threshold as written
in the grid, so showing what a moved threshold would do needs no further computation.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

PLACES = 200
ONE_SIDED: dict[str, Literal["left", "right"]] = {
    "above": "right",
    "at_least": "left",
    "below": "left",
    "at_most": "right",
}  # the side on which x itself falls
DOWNWARD = ("below", "at_most")


def column_of(name: str, arguments: Mapping[str, Any]) -> str | None:
    """Name the score that a step cuts, if it cuts one."""
    if name == "mismatch":
        return "clip_score"
    return str(arguments["column"]) if name in ("rank", "top", *ONE_SIDED) else None


def cut(name: str, arguments: Mapping[str, Any], values: np.ndarray, kept: int) -> dict[str, Any]:
    """Tabulate what a step would keep at each threshold of its score.

    values: [n] of the rows before the step, NaN where unknown. kept: what it did keep. Returns `kind`, band or the
    step's name; `names`, each place as it is written in the step (for a band a share counted from the highest); its
    `values`; and `kept`: for a band the rows from there to the top, else those that the step keeps there.
    `low` and `high` are the places of the step itself, None where what it keeps is open at that end.
    """
    if name in ONE_SIDED:
        return _one_sided(name, float(arguments["x"]), values)
    size = len(values)
    if name == "rank":
        lo, hi = float(arguments["lo"]), float(arguments["hi"])
    else:
        lo, hi = 0.0, kept / max(1, size)
    shares = sorted({*(place / PLACES for place in range(PLACES + 1)), lo, hi}, reverse=True)
    counts = [round(share * size) for share in shares]
    known = np.sort(values[~np.isnan(values)])[::-1]
    at = [float(known[min(max(count - 1, 0), len(known) - 1)]) if len(known) else 0.0 for count in counts]
    ends = {"low": shares.index(hi), "high": shares.index(lo) if name == "rank" else None}
    return {
        "kind": "band",
        "rows": size,
        "names": [repr(share) for share in shares],
        "values": at,
        "kept": counts,
        **ends,
    }


def _one_sided(name: str, x: float, values: np.ndarray) -> dict[str, Any]:
    """Tabulate a cut at a value. Thresholds are compared as the step compares them, in the column's own precision."""
    known = np.sort(values[~np.isnan(values)])
    ranks = np.linspace(0, max(len(known) - 1, 0), PLACES + 1).astype(np.int64)
    places = np.unique(np.append(known[ranks].astype(np.float64).round(4) if len(known) else [], x))
    typed = places.astype(known.dtype) if known.dtype.kind == "f" else places
    below = np.searchsorted(known, typed, side=ONE_SIDED[name])
    counts = below if name in DOWNWARD else len(known) - below
    own = int(np.searchsorted(places, x))
    return {
        "kind": name,
        "rows": len(values),
        "names": [repr(place) for place in places.tolist()],
        "values": places.tolist(),
        "kept": counts.tolist(),
        "low": None if name in DOWNWARD else own,
        "high": own if name in DOWNWARD else None,
    }


def dedup_curve(similarity: np.ndarray, floor: float, good: int, also: Sequence[float] = ()) -> dict[str, Any]:
    """Count what dedup of all good rows keeps at 100 thresholds from the floor up: each edge above one drops a row.

    similarity: of all forest edges, compared in its own precision, as dedup does. also: further thresholds.
    """
    thresholds = np.unique([*np.linspace(floor, 1, 101)[:-1].round(6), *also])
    ascending = np.sort(similarity)
    merged = len(ascending) - np.searchsorted(ascending, thresholds.astype(ascending.dtype), side="right")
    return {"threshold": thresholds.tolist(), "kept": (good - merged).tolist(), "rows": good}
