"""How much a difference depends on the records that it was measured on: a bootstrap over photographs.

The interval of statistics.py is over seeds: would other draws and other first weights say the same, judged on the same
records? This one is over records: would the same models differ as much on other ones? Neither replaces the other: three
seeds say little about seeds in general, and a few dozen photographs little about photographs.

Questions about one photograph rise and fall together, so photographs are drawn, with replacement, with all
that was asked about them (a record without one by itself), the same for both arms (the cluster bootstrap; Efron and
Tibshirani, An Introduction to the Bootstrap, 1993, chapters 8 and 13). The interval is from the 2.5th to the 97.5th
percentile of the difference of the arms' means over their common seeds.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

DRAWS = 2000
AT_ONCE = 100  # draws, so that memory stays small however many records there are
SEED = 0
# Of each unit (a photograph or a record) its part of a measure: numerator and denominator, summed over its records.
Values = Mapping[str, Mapping[str, tuple[float, float]]]


def values(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, tuple[float, float]]]:
    """Split what `train eval` sums up: measure -> photograph or record -> its numerator and denominator.

    rows: lines of its answers. Measures are named as in trials; a perplexity is the exponential of its quotient.
    """
    found: dict[str, dict[str, tuple[float, float]]] = defaultdict(dict)
    for row in rows:
        unit = " ".join(row.get("pictures", ())) or f"record {row['key']}"
        for name, above, below in _parts(row):
            own = found[name].get(unit, (0.0, 0.0))
            found[name][unit] = (own[0] + above, own[1] + below)
    return dict(found)


def _parts(row: Mapping[str, Any]) -> Iterator[tuple[str, float, float]]:
    for task in ("", row["task"] + "_") if row["task"] else ("",):
        yield f"{task}accuracy", float(row["right"]), 1.0
        if "truth_loss" in row:
            yield f"{task}perplexity", row["truth_loss"], row["tokens"]
    for kind in ("", "gain_", "picture_"):
        if f"{kind}rank" in row:
            yield f"{kind}ranked_first", float(row[f"{kind}rank"] == 1), 1.0
            yield f"{kind}mean_rank", row[f"{kind}rank"], 1.0
    if "information" in row:
        yield "information", row["information"], 1.0


def add(summary: Sequence[dict[str, Any]], answers: Mapping[tuple[tuple[str, ...], int], Values], compare: str) -> None:
    """Add to each difference of a summary its interval over records: `records`, with the number of units.

    summary: entries of statistics.summarise.  answers: a trial's values by the values of its arm, in order, and its
    seed. A difference of arms whose trials did not answer the same records, or fewer than two of them, gets none.
    """
    for entry in summary:
        if entry["difference"]:
            measure, reference = entry["measure"], {**entry["arm"], compare: entry["difference"]["to"]}
            ours, theirs = (
                {
                    seed: own[measure]
                    for (arm, seed), own in answers.items()
                    if arm == tuple(side.values()) and measure in own
                }
                for side in (entry["arm"], reference)
            )
            entry["difference"]["records"] = interval(ours, theirs, exponential=measure.endswith("perplexity"))


def interval(
    ours: Mapping[int, Mapping[str, tuple[float, float]]],
    theirs: Mapping[int, Mapping[str, tuple[float, float]]],
    exponential: bool = False,
) -> dict[str, Any] | None:
    """Return `n` units and the interval `low` to `high` of the difference, or None where nothing can be said.

    ours, theirs: seed -> unit -> parts.  exponential: the measure is the exponential of the quotient.
    """
    seeds = sorted(set(ours) & set(theirs))
    units = sorted(ours[seeds[0]]) if seeds else []
    if len(units) < 2 or any(side[seed].keys() != set(units) for seed in seeds for side in (ours, theirs)):
        return None
    # f64 [units, side, seed, above or below]
    parts = np.array([[[side[seed][unit] for seed in seeds] for side in (ours, theirs)] for unit in units])
    random = np.random.default_rng(SEED)
    drawn = [_differences(parts, random, min(AT_ONCE, DRAWS - at), exponential) for at in range(0, DRAWS, AT_ONCE)]
    low, high = np.percentile(np.concatenate(drawn), [2.5, 97.5])
    return {"n": len(units), "low": float(low), "high": float(high)}


def _differences(
    parts: NDArray[np.float64], random: np.random.Generator, draws: int, exponential: bool
) -> NDArray[np.float64]:
    times = random.multinomial(len(parts), np.full(len(parts), 1 / len(parts)), draws)
    above, below = np.moveaxis(np.tensordot(times, parts, 1), -1, 0)  # each [draws, side, seed]
    means = above / below
    means = (np.exp(np.minimum(means, 100)) if exponential else means).mean(2)
    differences: NDArray[np.float64] = means[:, 0] - means[:, 1]
    return differences
